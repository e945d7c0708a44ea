"""Episodic REPS: a Gaussian over the parameters of a policy, reweighted by return and refitted."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.spaces import Box
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import duals
from inference_rl.contextual_policy import ContextualPolicy, evaluated, flattened
from inference_rl.inference import learned
from inference_rl.inference.reps import soft_reward, weighted_gaussian
from inference_rl.inference.reps_step import check_ends
from inference_rl.networks import NetworkPolicy
from inference_rl.policies import Policy
from inference_rl.randomness import derived, episode_seeds, uniforms

if TYPE_CHECKING:
    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference.reps import REPS
    from inference_rl.learning.collection import Collector, Segment
    from inference_rl.priors import ActionPrior

PARAMETERS = 0
"""Stream of the noise of parameters."""


@dataclasses.dataclass(frozen=True)
class _Search:
    """A round's distribution of parameters, N(W ψ(c), Σ), in which every slot has its own noise.

    :ivar policy: whose contexts are asked for. :ivar gain: W. :ivar covariance: Σ.
    :ivar seed: of the round.
    """

    policy: Policy
    gain: Tensor
    covariance: Tensor
    seed: int

    def draw(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """ψ of the contexts of states (N, ...), and parameters (N, P)."""
        seeds = episode_seeds(self.seed, np.arange(len(state)))
        noise = torch.special.ndtri(uniforms(seeds, 0, PARAMETERS, len(self.gain)))
        inputs = torch.ones(len(state), 1, dtype=torch.float64)
        if isinstance(self.policy, ContextualPolicy):
            inputs = self.policy.inputs(state)
        factor = torch.linalg.cholesky(self.covariance)
        return inputs, inputs @ self.gain.mT + noise @ factor.mT


class _Drawn(Policy):
    """One draw of the parameters for each slot, made when its episode begins."""

    kind = "drawn"

    def __init__(self, network: NetworkPolicy, search: _Search) -> None:
        super().__init__()
        self.network, self.search = network, search
        self.parameters_drawn: Tensor | None = None

    def forward(self, state: Tensor, t: Any = None) -> TorchDistribution:
        if self.parameters_drawn is None:
            _, self.parameters_drawn = self.search.draw(state)
        outputs, log_scale = evaluated(self.network, self.parameters_drawn, state, t)
        return self.network.distribution(outputs, log_scale, state)

    def mode(self, state: Tensor, t: Any = None) -> Tensor:
        raise NotImplementedError("a search draws its policies, and has no most likely one")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A round: whole episodes, the parameters (N, P) of each, and ψ of its context (N, C)."""

    data: Segment
    parameters: Tensor
    inputs: Tensor

    @property
    def steps(self) -> int:
        return self.data.steps


class EpisodicLearner:
    """The state of a run: the Gaussian over parameters, and the policy of its mean."""

    def __init__(self, settings: REPS, model: EnvironmentModel, prior: ActionPrior) -> None:
        check_ends(model)
        self.settings, self.model, self.prior = settings, model, prior
        self.tempering = learned.Tempering(settings, model, prior)
        self.seed = int(torch.randint(2**62, ()))
        built = settings if settings.form == "neural" else dataclasses.replace(settings, hidden=())
        network, _ = learned.networks(built, model, prior)
        assert isinstance(network, NetworkPolicy)
        self.network = network
        self.policy: Policy = network
        if settings.context:
            _check_context(settings, model)
            self.policy = ContextualPolicy(network, settings.context)
        mean = flattened(network)
        self.gain = torch.zeros(len(mean), 1 + len(settings.context), dtype=torch.float64)
        self.gain[:, 0] = mean
        self.covariance = settings.search_deviation**2 * torch.eye(len(mean)).double()
        self._check_size()
        self.rounds = 0

    def _check_size(self) -> None:
        size, contexts = self.gain.shape
        least = contexts + (size - 1 if self.settings.covariance == "full" else 0)
        if self.settings.environments <= least:
            raise ValueError(
                f"environments: expected more than {least} episodes a round for a "
                f"{self.settings.covariance} covariance of {size} parameters, got "
                f"{self.settings.environments}; raise environments, or search fewer parameters"
            )

    def collect(self, collector: Collector) -> Trial:
        seed = derived(self.seed, f"round {self.rounds}")
        search = _Search(self.policy, self.gain, self.covariance, seed)
        data = collector.collect_episodes(_Drawn(self.network, search))
        # Drawn once more, for another process may have done it, of the same states.
        inputs, parameters = search.draw(data.state[0])
        return Trial(data, parameters, inputs)

    def update(self, trial: Trial) -> dict[str, Tensor | float]:
        self.rounds += 1
        data, temperature = trial.data, self.tempering.temperature
        self._check_contexts(data)
        with torch.no_grad():
            log_policy = self._log_prob(trial)
        log_ratio = (log_policy - learned.log_prior(self.prior, data)).double()
        soft = soft_reward(data.reward, log_ratio, temperature)
        weight = self.model.discount ** data.step.double() * data.valid
        returns = (weight * torch.where(data.valid, soft, 0.0)).sum(0)
        found = duals.solve_episodic(returns, self.settings.epsilon)
        gain, covariance = weighted_gaussian(
            trial.inputs, trial.parameters, torch.from_numpy(found.weights)
        )
        if self.settings.covariance == "diagonal":
            covariance = covariance.diagonal().diag()
        moved = divergence_of_gaussians(gain, covariance, self.gain, self.covariance, trial.inputs)
        self.gain, self.covariance = gain, covariance
        self._set_policy()
        divergence = log_ratio[data.valid].mean()
        self.tempering.update(divergence, data.steps)
        return {
            "entropy": -log_policy[data.valid].double().mean(),
            "divergence": divergence,
            "temperature": temperature,
            "soft_return": returns.mean(),
            "dual_temperature": found.temperature,
            "divergence_of_weights": found.divergence,
            "divergence_of_search": moved,
            "effective_sample_size": found.effective_sample_size,
            "search_deviation": covariance.diagonal().mean().sqrt(),
        }

    def _log_prob(self, trial: Trial) -> Tensor:
        """log π of what was done, (T, N), each under its own parameters."""
        rows = []
        for state, step, action in zip(
            trial.data.state, trial.data.step, trial.data.action, strict=True
        ):
            outputs, log_scale = evaluated(self.network, trial.parameters, state, step)
            rows.append(self.network.distribution(outputs, log_scale, state).log_prob(action))
        return torch.stack(rows)

    def _check_contexts(self, data: Segment) -> None:
        entries = data.state[..., list(self.settings.context)] if self.settings.context else None
        if entries is None:
            return
        changed = ((entries != entries[0]).any(-1) & data.valid).nonzero()
        if len(changed):
            t, slot = changed[0].tolist()
            raise ValueError(
                f"context: expected entries {self.settings.context} of the state to stay as an "
                f"episode began, got {entries[0, slot].tolist()} and then, at step {t}, "
                f"{entries[t, slot].tolist()}; name others, or give none"
            )

    def _set_policy(self) -> None:
        if isinstance(self.policy, ContextualPolicy):
            self.policy.gain.copy_(self.gain)
        else:
            mean = self.gain[:, 0].to(next(self.network.parameters()).dtype)
            torch.nn.utils.vector_to_parameters(mean, self.network.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "gain": self.gain,
            "covariance": self.covariance,
            "temperature": self.tempering.state_dict(),
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.gain, self.covariance = state["gain"], state["covariance"]
        self.tempering.load_state_dict(state["temperature"])
        self.rounds = state["rounds"]


def divergence_of_gaussians(
    gain: Tensor, covariance: Tensor, old_gain: Tensor, old_covariance: Tensor, inputs: Tensor
) -> float:
    """Mean over the contexts of KL(N(W ψ, Σ) ‖ N(W' ψ, Σ')), nats; inputs (N, C) are the ψ."""
    ours, theirs = torch.linalg.cholesky(covariance), torch.linalg.cholesky(old_covariance)
    spread = torch.linalg.solve_triangular(theirs, ours, upper=False).square().sum()
    shift = inputs @ (gain - old_gain).mT
    moved = torch.linalg.solve_triangular(theirs, shift.mT, upper=False).square().sum(0).mean()
    logs = 2 * (theirs.diagonal().log().sum() - ours.diagonal().log().sum())
    return float((spread + moved - len(gain) + logs) / 2)


def _check_context(settings: REPS, model: EnvironmentModel) -> None:
    space = model.state_space
    size = math.prod(space.shape or ()) if isinstance(space, Box) else 0
    if not all(0 <= entry < size for entry in settings.context):
        raise ValueError(
            f"context: expected entries of a Box state, from 0 to {size - 1}, got "
            f"{settings.context} of {space}; leave it out for a search without contexts"
        )
