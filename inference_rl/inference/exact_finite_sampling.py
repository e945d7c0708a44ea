"""Whole trajectories of a finite model: of the inferred policy, or of the posterior p(τ | O)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference_rl.finite import FiniteModel, take
from inference_rl.finite_messages import first_step, posterior_initial
from inference_rl.inference import InferenceResult
from inference_rl.inference.sampling import effective_horizon, trajectories_tree

if TYPE_CHECKING:
    import xarray


def sample(
    result: InferenceResult, draws: int, *, horizon: int | None, seed: int
) -> xarray.DataTree:
    """Trajectories of the inferred distribution; see `InferenceResult.sample`."""
    model = result.model
    assert isinstance(model, FiniteModel)
    steps = effective_horizon(model, draws, horizon)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        draw = _draw_posterior if result.routine.target == "posterior" else _draw_control
        return trajectories_tree(draw(result, model, draws, steps), result.summary())


def _draw_control(
    result: InferenceResult, model: FiniteModel, draws: int, steps: int
) -> dict[str, Tensor]:
    temperature, policy = result.temperature, result.policy
    path = _Path(model.initial_state().sample((draws,)), model)
    log_weight = torch.zeros(draws, dtype=torch.float64)
    for t in range(steps):
        chosen = policy(path.state, t)
        action = chosen.sample()
        slots, inside = model.slots(path.state, action)
        slot = _choose(slots, torch.where(inside, take(model.probabilities, slots), 0.0).log())
        reward = path.step(action, slot, torch.ones(draws, dtype=torch.bool))
        if temperature > 0:
            ratio = model.log_prior[path.before, action] - chosen.log_prob(action)
            factor = torch.where(path.was_alive, reward / temperature + ratio, 0.0)
            log_weight += model.discount**t * factor
    if temperature > 0:
        tail = result.v[path.state] if model.horizon is None else result.v[steps, path.state]
        log_weight += model.discount**steps * tail / temperature
        path.columns["log_weight"] = log_weight
    return path.finish()


def _draw_posterior(
    result: InferenceResult, model: FiniteModel, draws: int, steps: int
) -> dict[str, Tensor]:
    temperature = result.temperature
    start = posterior_initial(model, first_step(result.v) / temperature)
    path = _Path(torch.multinomial(start, draws, replacement=True), model)
    log_weight = (model.initial[path.state] / start[path.state]).log()
    log_alive = torch.tensor(model.discount, dtype=torch.float64).log()
    log_dead = torch.tensor(-model.discount, dtype=torch.float64).log1p()
    for t in range(steps):
        v = (result.v if model.horizon is None else result.v[t + 1]) / temperature
        chosen = result.policy(path.state, t)
        action = chosen.sample()
        slots, inside = model.slots(path.state, action)
        log_model = torch.where(inside, take(model.probabilities, slots).log(), -torch.inf)
        weighed = log_model + take(model.rewards, slots) / temperature
        both = torch.cat(
            [weighed + log_alive + v[take(model.successors, slots)], weighed + log_dead], dim=-1
        )
        log_step = both.log_softmax(-1)
        index = _choose(torch.arange(both.shape[-1]).expand(both.shape), log_step)
        survives, column = index < slots.shape[-1], index % slots.shape[-1]
        slot = slots.gather(-1, column.unsqueeze(-1)).squeeze(-1)
        reward = path.step(action, slot, survives)
        factor = (
            model.log_prior[path.before, action]
            - chosen.log_prob(action)
            + log_model.gather(-1, column.unsqueeze(-1)).squeeze(-1)
            + torch.where(survives, log_alive, log_dead)
            - log_step.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            + reward / temperature
        )
        log_weight += torch.where(path.was_alive, factor, 0.0)
    tail = (result.v if model.horizon is None else result.v[steps]) / temperature
    log_weight += torch.where(path.alive, tail[path.state], 0.0)
    path.columns["log_weight"] = log_weight
    return path.finish()


class _Path:
    """A batch of trajectories as it grows."""

    def __init__(self, state: Tensor, model: FiniteModel) -> None:
        self.model = model
        self.state = self.before = state
        self.alive = ~model.is_terminal[state]
        self.was_alive = self.alive
        self.states = [state]
        self.actions: list[Tensor] = []
        self.rewards: list[Tensor] = []
        self.lived: list[Tensor] = []
        self.columns: dict[str, Tensor] = {}

    def step(self, action: Tensor, slot: Tensor, survives: Tensor) -> Tensor:
        """Move along non-zero `slot` of the model where alive; the rewards."""
        model, self.before, self.was_alive = self.model, self.state, self.alive
        reward = torch.where(self.alive, take(model.rewards, slot), 0.0)
        moved = torch.where(self.alive, take(model.successors, slot).long(), self.state)
        self.alive = self.alive & survives & ~model.is_terminal[moved]
        self.state = moved
        self.states.append(moved)
        self.actions.append(action)
        self.rewards.append(reward)
        self.lived.append(self.was_alive)
        return reward

    def finish(self) -> dict[str, Tensor]:
        return self.columns | {
            "state": torch.stack(self.states, dim=1),
            "action": torch.stack(self.actions, dim=1),
            "reward": torch.stack(self.rewards, dim=1),
            "alive": torch.stack(self.lived, dim=1),
        }


def _choose(values: Tensor, log_probs: Tensor) -> Tensor:
    """One of `values` in each row, with these (unnormalised) log-probabilities."""
    # Gumbel's trick; rows of terminal states are all -inf, and whatever they choose is not used.
    noise = -torch.empty_like(log_probs).exponential_().log()
    return values.gather(-1, (log_probs + noise).argmax(-1, keepdim=True)).squeeze(-1)
