"""Rows of the step-based dual: features of states and steps, and those of a model's own tables."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inference_rl.feature_policies import with_share
from inference_rl.features import feature_matrix

if TYPE_CHECKING:
    from inference_rl.finite import FiniteModel

MOST_COLUMNS = 2000
"""Tabular features; the time of a dual goes with the cube of their number."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a dual is about: N states and actions, and how often each counts.

    :ivar reward: (N,), r̃, reward units. :ivar features, next_features: (N, K), φ(s) and E φ(s'),
        zero at ends. :ivar base: (N,), q, not normalised.
    """

    reward: Tensor
    features: Tensor
    next_features: Tensor
    base: Tensor

    def absorbing(self, mass: float) -> Rows:
        """With a row for the steps after ends: nothing is paid, and no feature is there."""
        if mass == 0:
            return self
        nothing = self.features.new_zeros(1, self.features.shape[1])
        return Rows(
            torch.cat([self.reward, self.reward.new_zeros(1)]),
            torch.cat([self.features, nothing]),
            torch.cat([self.next_features, nothing]),
            torch.cat([self.base, self.base.new_full((1,), mass)]),
        )


class Columns:
    """Tabular features: which state (and step) has which column, and which have none.

    :param kept: booleans, (T, S), or (1, S) without a horizon.
    :ivar cells: (K,), the number t · S + s that each column stands for.
    """

    def __init__(self, kept: Tensor, horizon: int | None) -> None:
        self.states, self.horizon = kept.shape[1], horizon
        self.cells = kept.flatten().nonzero().squeeze(-1)
        self.count = len(self.cells)
        # With those after the last step, which have none.
        self.column = torch.full((kept.numel() + self.states,), -1)
        self.column[self.cells] = torch.arange(self.count)

    def cell(self, state: Tensor, step: Tensor) -> Tensor:
        return state if self.horizon is None else state + self.states * step

    def of(self, state: Tensor, step: Tensor) -> Tensor:
        """The column of each, -1 for none."""
        return self.column[self.cell(state, step)]

    def __call__(self, state: Tensor, step: Tensor) -> Tensor:
        column = self.of(state, step)
        one_hot = nn.functional.one_hot(column.clamp(min=0), self.count).double()
        return one_hot * (column >= 0).unsqueeze(-1)


class ModuleFeatures:
    """Features by a module, of states and the share of the horizon that has passed, if any."""

    def __init__(self, module: nn.Module, horizon: int | None) -> None:
        self.module, self.horizon = module, horizon

    def __call__(self, state: Tensor, step: Tensor) -> Tensor:
        found = feature_matrix(self.module, with_share(state, step, self.horizon))
        if self.horizon is not None:
            found = found * (step < self.horizon).unsqueeze(-1)
        return found


def reachable(model: FiniteModel) -> Tensor:
    """States that are not ends and can be come to at each step, (T, S); ever, (1, S), without T."""
    goes_on = ~model.is_terminal
    moves = model.csr.astype(bool)
    allowed = model.log_prior > -torch.inf
    here = (model.initial > 0) & goes_on
    steps = [here]
    while model.horizon is None or len(steps) < model.horizon:
        pairs = (here.unsqueeze(-1) & allowed).flatten().numpy()
        there = torch.from_numpy(moves.T @ pairs > 0) & goes_on
        if model.horizon is None:
            there = there | here
            if torch.equal(there, here):
                return here.unsqueeze(0)
            steps = []
        here = there
        steps.append(here)
    return torch.stack(steps)


class ModelRows:
    """The rows of all actions in every state that `columns` has, by a model's expectations."""

    def __init__(self, model: FiniteModel, columns: Columns) -> None:
        self.columns = columns
        self.state = columns.cells % columns.states
        self.step = columns.cells // columns.states
        self.reward = model.expected_reward()[self.state]
        self.log_prior = model.log_prior[self.state]
        actions = model.num_actions
        self.features = torch.eye(columns.count, dtype=torch.float64).repeat_interleave(actions, 0)
        self.next_features = torch.zeros(columns.count * actions, columns.count).double()
        pair = (self.state.unsqueeze(-1) * actions + torch.arange(actions)).flatten()
        chosen = model.csr[pair.numpy()].tocoo()
        row, there = (torch.from_numpy(x).long() for x in chosen.coords)
        column = columns.of(there, self.step[row // actions] + 1)
        known = column >= 0
        self.next_features.index_put_(
            (row[known], column[known]), torch.from_numpy(chosen.data)[known], accumulate=True
        )

    def weighed(self, visits: Tensor, log_policy: Tensor, temperature: float) -> Rows:
        """Under visits (K,) and a policy, log π (K, A)."""
        from inference_rl.inference.reps import soft_reward

        log_ratio = torch.where(log_policy > -torch.inf, log_policy - self.log_prior, 0.0)
        return Rows(
            soft_reward(self.reward, log_ratio, temperature).flatten(),
            self.features,
            self.next_features,
            (visits.unsqueeze(-1) * log_policy.exp()).flatten(),
        )
