"""One decision as a trajectory program: what to do in each of a batch of states, given Q.

The program takes one step from states that are given, and what it is paid is the message Q(s, a),
which stands for that step and all that follow. Its evidence is the soft value,

1. temperature · log p(O | s) = temperature · log Σ_a ρ(a|s) e^{Q(s,a) / temperature} = V(s),
2. its posterior the best policy, p(a | s, O) = ρ(a|s) e^{(Q(s,a) − V(s)) / temperature}, and
3. its bound, temperature · ELBO = E_π[Q(s,a) − temperature · log π(a|s)/ρ(a|s)], the soft value of
   the policy that is the guide. The gap is temperature · KL(π ‖ p(a | s, O)).

The small programs of the routines that learn Q are these. Levine (2018), arXiv:1805.00909, §2.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from gymnasium.spaces import Discrete, MultiDiscrete, Space
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.temperature import LEAST_TEMPERATURE
from inference_rl.trajectory import ONE, ActionFactor, trajectory

MOST_ACTIONS = 10_000
"""Combinations of discrete actions that are summed over one by one."""


class _OneDecision(EnvironmentModel):
    """From given states, one step that is paid Q(s, a)."""

    discount, horizon = 1.0, 1
    state_space: Any = None  # whatever `states` are: they are neither drawn nor enumerated

    def __init__(
        self, states: Tensor, message: Callable[[Tensor], Tensor], action_space: Space[Any]
    ) -> None:
        self.states, self.message, self.action_space = states, message, action_space

    def initial_state(self) -> TorchDistribution:
        return dist.Delta(self.states)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta(self.states)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.message(action)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Both readings of one decision in N states.

    :ivar action: (N, ...) as drawn from the guide, or (A, 1, ...) all of them.
    :ivar log_guide: log q(a | s), nats, (N,) or (A, N). :ivar log_prior: log ρ(a | s), likewise.
    :ivar log_weight: log p(O | s, a) = Q / temperature, likewise. :ivar temperature: a scalar.
    """

    action: Tensor
    log_guide: Tensor
    log_prior: Tensor
    log_weight: Tensor
    temperature: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(a, O | s), nats."""
        return self.log_prior + self.log_weight


def decide(
    states: Tensor,
    guide: ActionFactor,
    prior: ActionFactor,
    message: Callable[[Tensor], Tensor],
    *,
    temperature: Tensor,
    action_space: Space[Any],
    actions: Tensor | None = None,
) -> Decision:
    """Run the program of one decision: as guide, and replayed as model.

    :param states: (N, ...). :param message: Q of actions in these states, reward units.
    :param temperature: a scalar, reward units; zero is the limit.
    :param actions: (K, 1, ...) or (K, N, ...), of which to take each in every state, in place of a
        draw from the guide; see `every_action`.
    """
    temperature = temperature.clamp(min=LEAST_TEMPERATURE)
    model = _OneDecision(states, message, action_space)
    given = {"state_0": states, "state_1": states}
    if actions is not None:
        given["action_0"] = actions
    program = poutine.condition(trajectory, data=given)
    q = poutine.trace(program).get_trace(model, guide, 1)
    replayed = poutine.replay(program, q)
    p = poutine.trace(replayed).get_trace(model, prior, 1, temperature=temperature)
    action: Any = q.nodes["action_0"]["value"]
    taken: Any = q.nodes["action_0"]["fn"]
    expected: Any = p.nodes["action_0"]["fn"]
    optimality: Any = p.nodes["optimality_0"]["fn"]
    return Decision(
        action=action,
        log_guide=taken.log_prob(action),
        log_prior=expected.log_prob(action),
        log_weight=optimality.log_prob(ONE),
        temperature=temperature,
    )


def bound(decision: Decision, *, drawn: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """temperature · ELBO of every state, reward units, its entropy and its divergence, nats; (N,).

    Exact where all actions were taken; else of the one that was drawn, whose expectation it is, and
    so is its gradient where draws are differentiable.

    :param drawn: whether several actions in a state are draws of the guide, and not all there are;
        then a mean over them.
    """
    log_ratio = decision.log_guide - decision.log_prior
    gain = decision.temperature * (decision.log_weight - log_ratio)
    if decision.log_guide.dim() == 1:
        return gain, -decision.log_guide, log_ratio
    if drawn:
        return gain.mean(0), -decision.log_guide.mean(0), log_ratio.mean(0)
    log_share = decision.log_guide
    return _mean(log_share, gain), -_mean(log_share, log_share), _mean(log_share, log_ratio)


def _mean(log_share: Tensor, value: Tensor) -> Tensor:
    """Over actions, (N,) of (A, N)."""
    share = log_share.exp()
    # What is never done counts for nothing, were it forbidden or not.
    return (share * torch.where(share > 0, value, 0.0)).sum(0)


def evidence(decision: Decision, log_proposal: Tensor | None = None) -> Tensor:
    """temperature · log p(O) of every state: the soft value V, reward units, (N,).

    :param log_proposal: of which density the actions were drawn, K of them for each state, (K, N)
        nats; then an estimate, log (1/K) Σ_k p(a_k, O) / density, which is below V in expectation
        by about 1/K. Exact, from all actions, where it is not given.
    """
    return decision.temperature * _log_terms(decision, log_proposal).logsumexp(0)


def posterior(decision: Decision, log_proposal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Entropy of p(a | s, O) and its divergence from the prior, nats, (N,): where the guide is that
    attains the bound.

    :param log_proposal: as in `evidence`; then an estimate, by weights that sum to one.
    """
    log_share = _log_terms(decision, log_proposal).log_softmax(0)
    log_posterior = log_share
    if log_proposal is not None:
        log_posterior = log_share + log_proposal + math.log(len(log_share))
    entropy = -_mean(log_share, log_posterior)
    return entropy, _mean(log_share, log_posterior - decision.log_prior)


def _log_terms(decision: Decision, log_proposal: Tensor | None) -> Tensor:
    """Whose exponentials add up to the evidence, (K, N) nats."""
    if log_proposal is None:
        return decision.log_joint
    return decision.log_joint - log_proposal - math.log(len(log_proposal))


def every_action(space: Space[Any]) -> Tensor | None:
    """All actions of a discrete space, (A, 1) or (A, 1, d); None of a box.

    :raises TypeError: there are more than `MOST_ACTIONS` combinations.
    """
    if isinstance(space, Discrete):
        return torch.arange(int(space.n)).unsqueeze(-1)
    if not isinstance(space, MultiDiscrete):
        return None
    count = int(space.nvec.prod())
    if count > MOST_ACTIONS:
        raise TypeError(
            f"action_space: expected at most {MOST_ACTIONS:,} combinations of actions to sum over, "
            f"got {count:,} in {space}; use policy-gradient or pcl, which need no sum"
        )
    rows = list(itertools.product(*(range(int(n)) for n in space.nvec)))
    return torch.tensor(rows).unsqueeze(1)
