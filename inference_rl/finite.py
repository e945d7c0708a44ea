"""`FiniteModel`: an environment as sparse tables, for exact inference.

Built from tables (`FiniteModel.from_tables`), from any program with Discrete spaces (`tabulate`),
or from Gymnasium's toy-text environments. Everything is float64 and checked, never repaired.

Row s·|A| + a of the transition lists the successors of (s, a) with their probabilities and rewards:
non-zero k of the row is `successors[k]`, `probabilities[k]`, `rewards[k]` for k in
`pointers[row] ... pointers[row + 1]`. Rows of terminal states are empty.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import scipy.sparse
import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import (
    ROW_SUM_TOLERANCE,
    SparseCategorical,
    categorical,
    check_probabilities,
    log_or_impossible,
)
from inference_rl.environment import EnvironmentModel


class FiniteModel(EnvironmentModel):
    """A finite Markov decision process as sparse tables (S states, A actions, N non-zeros).

    :param pointers: (S·A + 1,) int64, row boundaries. :param successors: (N,) int32 or int64.
    :param probabilities: (N,) float64. :param rewards: (N,) float64, reward units.
    :param initial: (S,) probabilities of the first state.
    :param log_prior: (S, A) log ρ(a|s), nats; -inf forbids an action.
    :param terminal: (S,) booleans.
    :param discount: in [0, 1]. :param horizon: number of steps, or None.

    Use `FiniteModel.from_tables` or `tabulate` rather than this constructor.
    """

    def __init__(
        self,
        *,
        pointers: Tensor,
        successors: Tensor,
        probabilities: Tensor,
        rewards: Tensor,
        initial: Tensor,
        log_prior: Tensor,
        terminal: Tensor,
        discount: float,
        horizon: int | None,
    ) -> None:
        self.pointers, self.successors = pointers, successors
        self.probabilities, self.rewards = probabilities, rewards
        self.initial, self.log_prior, self.is_terminal = initial, log_prior, terminal
        self.discount, self.horizon = discount, horizon
        self.num_states, self.num_actions = log_prior.shape
        self.state_space, self.action_space = Discrete(self.num_states), Discrete(self.num_actions)
        self._check()

    # ---- the model as a program ------------------------------------------------------------------

    def initial_state(self) -> TorchDistribution:
        return categorical(self.initial)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        slots, inside = self.slots(state, action)
        states = torch.where(inside, take(self.successors, slots).long(), 0)
        probs = torch.where(inside, take(self.probabilities, slots), 0.0)
        ended = self.is_terminal[state].unsqueeze(-1)
        states = torch.where(ended, state.unsqueeze(-1), states)
        first = torch.nn.functional.one_hot(torch.tensor(0), states.shape[-1]).to(probs.dtype)
        return SparseCategorical(states, torch.where(ended, first, probs), self.num_states)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        slots, inside = self.slots(state, action)
        match = inside & (take(self.successors, slots) == next_state.unsqueeze(-1))
        return torch.where(match, take(self.rewards, slots), 0.0).sum(-1)

    def terminal(self, state: Tensor) -> Tensor:
        return self.is_terminal[state]

    def action_prior(self, state: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=self.log_prior[state])

    @property
    def can_end(self) -> bool:
        return bool(self.is_terminal.any())

    def slots(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Where the non-zeros of rows (s, a) are, batch + (K,) padded to the longest; a mask."""
        row = state * self.num_actions + action
        begin, end = self.pointers[row], self.pointers[row + 1]
        width = max(1, int((end - begin).max())) if row.numel() else 1
        slots = begin.unsqueeze(-1) + torch.arange(width)
        return slots.clamp(max=max(len(self.successors) - 1, 0)), slots < end.unsqueeze(-1)

    # ---- the model as tables ---------------------------------------------------------------------

    def expected_reward(self) -> Tensor:
        """r̄(s, a) = E[r | s, a], (S, A), reward units; zero at terminal states."""
        return self.row_sum(self.probabilities * self.rewards)

    def expected_value(self, value: Tensor) -> Tensor:
        """E[value(s') | s, a], (S, A), for `value` of shape (S,)."""
        if torch.is_grad_enabled() and (value.requires_grad or self.probabilities.requires_grad):
            return self.row_sum(self.probabilities * value[self.successors])
        product = torch.from_numpy(self.csr @ value.detach().numpy())
        return product.reshape(self.num_states, self.num_actions)

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum values along the non-zeros (N,) over each row: (S, A)."""
        total = torch.segment_reduce(values, "sum", offsets=self.pointers, initial=0)
        return total.reshape(self.num_states, self.num_actions)

    def row_log_mean_exp(self, values: Tensor) -> Tensor:
        """log Σ_s' P exp(values) in each row, for values along the non-zeros (N,): (S, A).

        -inf for empty rows.
        """
        possible = self.probabilities > 0
        with torch.no_grad():
            masked = torch.where(possible, values, -torch.inf)
            peak = torch.segment_reduce(masked, "max", offsets=self.pointers, initial=-torch.inf)
            whole = (self.row_sum(self.probabilities) - 1).abs() < 1e-13
            along = peak[self.rows()]
        below = torch.where(possible, values - along, 0.0)
        shift = self.row_sum(self.probabilities * torch.expm1(below))
        # As in `soft_value`; rows that miss one by more than rounding are taken at their word.
        near = (shift > -0.5) & whole
        far = self.row_sum(self.probabilities * below.exp()).log()
        log_mean = torch.where(near, torch.log1p(torch.where(near, shift, 0.0)), far)
        return peak.reshape(shift.shape) + log_mean

    def rows(self) -> Tensor:
        """The row s·|A| + a of each non-zero, (N,)."""
        return self._rows

    @functools.cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.pointers) - 1).repeat_interleave(self.pointers.diff())

    @functools.cached_property
    def csr(self) -> scipy.sparse.csr_array:
        """The transition as a SciPy matrix (S·A, S) that shares its memory."""
        data = self.probabilities.detach().numpy()
        kind = self.successors.numpy().dtype
        pointers = self.pointers.numpy()
        if len(data) <= np.iinfo(kind).max:
            pointers = pointers.astype(kind, copy=False)
        shape = (self.num_states * self.num_actions, self.num_states)
        return scipy.sparse.csr_array((data, self.successors.numpy(), pointers), shape=shape)

    def tensors(self) -> dict[str, Tensor]:
        """The tables, by the names of the constructor's arguments."""
        return {
            "pointers": self.pointers,
            "successors": self.successors,
            "probabilities": self.probabilities,
            "rewards": self.rewards,
            "initial": self.initial,
            "log_prior": self.log_prior,
            "terminal": self.is_terminal,
        }

    def replace(self, **changes: Any) -> FiniteModel:
        """A copy with some constructor arguments changed; its description is kept."""
        arguments = self.tensors() | {"discount": self.discount, "horizon": self.horizon}
        return FiniteModel(**(arguments | changes)).described_like(self)

    def with_survival(self) -> FiniteModel:
        """The undiscounted model in which every step survives with probability `discount`.

        Each state s has a terminal copy S + s, entered instead of s with probability 1 - discount;
        the step that leads there is paid as ever. Its soft values for control are those of this
        model, and its posterior is what the posterior reading of this discounted model means.
        """
        dead = self.successors + self.num_states
        survives = self.probabilities * self.discount
        shape = (self.num_states, self.num_actions)
        return FiniteModel(
            pointers=torch.cat(
                [2 * self.pointers, (2 * self.pointers[-1]).expand(self.log_prior.numel())]
            ),
            successors=torch.stack([self.successors, dead], dim=1).flatten(),
            probabilities=torch.stack([survives, self.probabilities - survives], dim=1).flatten(),
            rewards=self.rewards.repeat_interleave(2),
            initial=torch.cat([self.initial, torch.zeros_like(self.initial)]),
            log_prior=torch.cat([self.log_prior, uniform_log_prior(*shape)]),
            terminal=torch.cat([self.is_terminal, torch.ones_like(self.is_terminal)]),
            discount=1.0,
            horizon=self.horizon,
        )

    # ---- construction ----------------------------------------------------------------------------

    @classmethod
    def from_tables(
        cls,
        transition: Any,
        reward: Any,
        *,
        discount: float = 1.0,
        initial: Any = None,
        prior: Any = None,
        terminal: Any = None,
        horizon: int | None = None,
    ) -> FiniteModel:
        """A model from arrays.

        :param transition: (S, A, S) dense, or SciPy / torch sparse (S·A, S) with row s·A + a.
        :param reward: (S, A), (S, A, S), or one value for each stored entry of a sparse transition,
            in the order in which it stores them.
        :param initial: (S,) probabilities; uniform if None.
        :param prior: (S, A) probabilities; uniform if None.
        :param terminal: (S,) booleans. Their rows are dropped, and must pay nothing.
        :raises ValueError: shapes that do not fit, rows that do not sum to one, numbers that are
            not finite, a sparse matrix that stores an entry twice, a terminal state that pays, a
            discount outside [0, 1].

        Torch tensors that require gradients stay connected: exact inference differentiates to them.
        """
        rows, columns, probabilities, order, shape = _coordinates(transition)
        states, actions = shape
        table = _from_array(reward).double()
        rewards = _along_entries(table, rows, columns, order, shape)
        ended = _as_tensor(terminal, (states,), "terminal", torch.bool, default=False)
        if table.shape == shape:  # says what is paid even where there is no transition
            _refuse_paid_ends(ended, torch.arange(states * actions), table.flatten(), actions)
        _refuse_paid_ends(ended, rows, rewards.where(probabilities != 0, 0), actions)
        keep = ~ended[rows // actions] & (probabilities != 0)
        rows, columns = rows[keep], columns[keep]
        if prior is None:
            log_prior = uniform_log_prior(states, actions)
        else:
            table = _as_tensor(prior, (states, actions), "prior", torch.float64)
            check_probabilities(table, "prior")
            log_prior = log_or_impossible(table)
        return cls(
            pointers=_pointers(rows, states * actions),
            successors=columns.to(index_dtype(states)),
            probabilities=probabilities[keep],
            rewards=rewards[keep],
            initial=_as_tensor(initial, (states,), "initial", torch.float64, default=1 / states),
            log_prior=log_prior,
            terminal=ended,
            discount=discount,
            horizon=horizon,
        )

    def described_like(self, model: EnvironmentModel) -> FiniteModel:
        """This model, with the labels, layout and real environment of `model`."""
        self.gymnasium_id, self.gymnasium_kwargs = model.gymnasium_id, model.gymnasium_kwargs
        self.name, self.origin, self.layout = model.name, model.origin, model.layout
        self.state_labels, self.action_labels = model.state_labels, model.action_labels
        self.remembers_action = model.remembers_action
        self.observe = model.observe  # type: ignore[method-assign]
        return self

    def _check(self) -> None:
        actions = self.num_actions
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount: expected a number in [0, 1], got {self.discount}")
        if self.horizon is not None and not (isinstance(self.horizon, int) and self.horizon >= 1):
            raise ValueError(
                f"horizon: expected a whole number of steps >= 1 or None, got {self.horizon!r}"
            )
        if not torch.isfinite(self.rewards).all():
            row = int(self.rows()[~torch.isfinite(self.rewards)][0])
            value = self.rewards[~torch.isfinite(self.rewards)][0].item()
            advice = "forbid an action by a prior of zero rather than by an infinite penalty"
            if math.isnan(value):
                advice = "see what it computes there, such as 0 / 0 or a root of a negative number"
            raise ValueError(
                f"reward: expected finite numbers, got {value} for state {row // actions}, action "
                f"{row % actions}; {advice}"
            )
        for name, at in (("negative", self.probabilities < 0), ("NaN", self.probabilities.isnan())):
            if at.any():
                row = int(self.rows()[at][0])
                raise ValueError(
                    f"transition: expected probabilities, got {self.probabilities[at][0].item():g} "
                    f"({name}) for state {row // actions}, action {row % actions}"
                )
        total = self.row_sum(self.probabilities.detach())
        wrong = ((total - 1).abs() > ROW_SUM_TOLERANCE) & ~self.is_terminal.unsqueeze(-1)
        if wrong.any():
            state, action = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"transition: expected probabilities that sum to one, got "
                f"{total[state, action].item():.9g} for state {state}, action {action}"
            )
        check_probabilities(self.initial.detach(), "initial state")
        mass = self.log_prior.detach().exp().sum(-1)
        wrong = ~((mass - 1).abs() <= ROW_SUM_TOLERANCE)
        if wrong.any():
            state = int(wrong.nonzero()[0])
            raise ValueError(
                f"action prior: expected probabilities over {actions} actions that sum to one, got "
                f"a sum of {mass[state].item():.9g} in state {state}"
            )


def take(values: Tensor, slots: Tensor) -> Tensor:
    """values[slots], zeros where there are no values at all."""
    return values[slots] if len(values) else values.new_zeros(slots.shape)  # every state terminal


def uniform_log_prior(states: int, actions: int) -> Tensor:
    return torch.full((states, actions), -np.log(actions), dtype=torch.float64)


def _refuse_paid_ends(ended: Tensor, rows: Tensor, rewards: Tensor, actions: int) -> None:
    pays = ended[rows // actions] & (rewards != 0)
    if pays.any():
        state, action = divmod(int(rows[pays][0]), actions)
        raise ValueError(
            f"reward: state {state} is terminal, but action {action} there pays "
            f"{rewards[pays][0].item():g}; pay on the step that enters it, or do not mark it "
            "terminal"
        )


def _coordinates(
    transition: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | slice, tuple[int, int]]:
    """Row s·A + a, column and probability of every entry, row by row; what puts the entries in this
    order, from that in which they are stored; and (S, A).
    """
    if isinstance(transition, Tensor) and transition.layout != torch.strided:
        stored = transition.to_sparse_coo()
        (rows, columns), matrix = stored._indices(), stored.shape
        values = stored.coalesce().values()
    elif scipy.sparse.issparse(transition):
        coo = transition.tocoo()
        rows, columns = torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()
        values, matrix = None, coo.shape
    else:
        dense = _from_array(transition)
        if dense.dim() != 3 or dense.shape[0] != dense.shape[2] or 0 in dense.shape:
            raise ValueError(
                f"transition: expected shape (S, A, S), or a sparse matrix (S·A, S), got "
                f"{tuple(dense.shape)}"
            )
        states, actions, _ = dense.shape
        flat = dense.reshape(states * actions, states)
        index = torch.arange(flat.numel())
        shape = (states, actions)
        return index // states, index % states, flat.flatten().double(), slice(None), shape
    if len(matrix) != 2 or 0 in matrix or matrix[0] % matrix[1]:
        raise ValueError(
            f"transition: expected a sparse matrix of shape (S·A, S), got {tuple(matrix)}"
        )
    keys, order = (rows * matrix[1] + columns).sort()
    if (keys.diff() == 0).any():
        raise ValueError(
            "transition: expected a sparse matrix that stores every entry once; add up those that "
            "are repeated (SciPy's sum_duplicates(), torch's coalesce())"
        )
    if values is None:
        values = torch.from_numpy(coo.data)[order]
    shape = (matrix[1], matrix[0] // matrix[1])
    return rows[order], columns[order], values.double(), order, shape


def _along_entries(
    table: Tensor, rows: Tensor, columns: Tensor, order: Tensor | slice, shape: tuple[int, int]
) -> Tensor:
    states, actions = shape
    if table.shape == (states, actions):
        return table.flatten()[rows]
    if table.shape == (states, actions, states):
        return table.reshape(-1, states)[rows, columns]
    if table.shape == rows.shape:
        return table[order]
    raise ValueError(
        f"reward: expected shape {(states, actions)}, {(states, actions, states)} or one value for "
        f"each of {len(rows)} entries of the transition, got {tuple(table.shape)}"
    )


def _as_tensor(
    value: Any, shape: tuple[int, ...], name: str, dtype: torch.dtype, default: float = 1.0
) -> Tensor:
    if value is None:
        return torch.full(shape, default, dtype=dtype)
    table = _from_array(value)
    if table.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(table.shape)}")
    if dtype == torch.bool and table.dtype != torch.bool:
        raise ValueError(f"{name}: expected booleans, got {table.dtype}")
    return table.to(dtype)


def _from_array(value: Any) -> Tensor:
    # torch warns of arrays that are not writable, though nobody writes to them here.
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    return torch.as_tensor(value)


def _pointers(rows: Tensor, count: int) -> Tensor:
    pointers = torch.zeros(count + 1, dtype=torch.long)
    pointers[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return pointers


def index_dtype(states: int) -> torch.dtype:
    return torch.int32 if states < 2**30 else torch.int64
