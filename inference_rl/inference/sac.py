"""Soft actor-critic: Q by its soft Bellman residual, the guide by one decision under it.

Inferred: a policy π, as guide of the trajectory program; the target is control. The program is cut
after one step, and Q stands for that step and all that follow (`decision`).

1. Of one decision, temperature · ELBO = E_π[Q(s, a) − α log π(a|s)/ρ(a|s)] = V(s): the soft value
   of π (1801.01290, eq. 3), with log π/ρ in place of log π.
2. Q(s, a) = r + γ E V(s'), which is its own bound of one step more (eq. 2): the residual is squared
   over replayed transitions, V from a Q that lags behind (eqs. 5, 6).
3. The gap of 1 is α · KL(π(·|s) ‖ ρ e^{Q/α}/Z): who raises the bound projects π onto the posterior
   of the decision (eq. 10). Through the draw where actions are continuous (eqs. 11-13); as a sum
   over all of them where they are not (1910.07207, eq. 12).
4. With `learn_prior`, ρ(a) is fitted to the policy's actions: of the divergence that leaves the
   mutual information of states and actions (Grau-Moya et al. 2019, §3).
5. Temperature: α minimises the dual E V_α + α · target, down whose gradient, target − KL(π ‖ ρ),
   log α takes a step of Adam (1812.05905, eq. 18, has the entropy).

An update is: Q and π, then α, then the lagging Q.

Departures from 1812.05905:
1. Divergence from a prior in place of entropy: under a uniform prior they differ by log|A|, or
   d · log 2 on [−1, 1]^d, in which entropies are measured.
2. The gradient of log α does not have α as a factor, as in the authors' code.
3. In a box V takes the lesser of two lagging Qs, against overestimation (eq. 5 has one; §6 two),
   and so does the guide with the two Qs. That is no part of the inference: it biases Q downwards.
   Of discrete actions both take the mean of two (1910.07207 has the lesser, with which Acrobot-v1
   was never learned here).
4. With `side_by_side`, the default, π takes its step under the Q of before the update, and not
   under the one that has just taken its own: the two are computed at the same time.

Haarnoja, Zhou, Abbeel and Levine (2018), arXiv:1801.01290. Haarnoja et al. (2018),
arXiv:1812.05905. Christodoulou (2019), arXiv:1910.07207. Grau-Moya, Leibfried and Vrancx (2019),
"Soft Q-learning with mutual-information regularization", ICLR.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from inference_rl.inference import checks, learned
from inference_rl.search_spaces import Choice, LogUniform, searched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inference_rl.decision import Decision
    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult
    from inference_rl.inference.off_policy import Learner
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior

CRITICS = 2


@dataclasses.dataclass(frozen=True)
class SAC:
    """Soft actor-critic, for boxes and discrete actions, with a temperature that tunes itself.

    :raises ValueError: (when made) a setting out of its range.
    """

    temperature: float | Literal["auto"] = "auto"
    """>= 0, reward units; "auto" tunes it to a target."""
    final_temperature: float | None = None
    """Annealed to this, geometrically, over the run; None keeps it."""
    target_entropy: float | None = None
    """Nats per step, with temperature "auto"; None chooses, and says which."""
    target_divergence: float | None = None
    """KL(π ‖ ρ), nats per step, with temperature "auto"; in place of target_entropy."""
    initial_temperature: float = 1.0
    """> 0, within the two that follow, reward units, with temperature "auto"."""
    least_temperature: float = 1e-8
    """> 0, reward units: a tuned temperature stays above."""
    greatest_temperature: float = 1e8
    """Reward units: a tuned temperature stays below."""
    temperature_learning_rate: float = 3e-4
    """Of the logarithm of a tuned temperature (Adam)."""
    total_steps: int = 1_000_000
    """Environment steps."""
    environments: int = 1
    """Side by side."""
    steps_per_round: int = 1
    """Of each environment, between updates."""
    updates_per_step: float = 1.0
    """> 0, for every environment step."""
    warmup_steps: int = 1_000
    """Environment steps at the beginning, with actions of the prior and no updates."""
    batch_size: int = searched(256, Choice((64, 128, 256, 512)))
    """Transitions of an update."""
    replay_capacity: int = 1_000_000
    """Environment steps that are kept."""
    learn_prior: bool = False
    """In place of the prior one of actions alone, learned beside the policy: a price on mutual
    information of states and actions."""
    learning_rate: float = searched(3e-4, LogUniform(1e-4, 1e-2))
    """Of the policy, and of a learned prior (Adam)."""
    value_learning_rate: float = searched(3e-4, LogUniform(1e-4, 1e-2))
    """Of Q (Adam)."""
    target_rate: float = searched(0.005, LogUniform(1e-3, 5e-2))
    """How far the lagging Q moves towards Q in an update, in (0, 1]."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers; discrete states have a table instead."""
    activation: Literal["tanh", "relu", "silu"] = "relu"
    """Between layers."""
    scale_observations: bool = False
    """To zero mean and unit variance, as seen so far; saved with the policy."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Updates to machine code; auto: in long runs, where a C++ compiler and Python.h are there."""
    side_by_side: bool = True
    """Steps of Q and policy from the same parameters, at the same time, in place of in turn."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where updates run; environments are on the CPU."""
    evaluate_every: int = 20_000
    """Environment steps between evaluations."""
    evaluation_episodes: int = 10
    """Of each, with drawn and with most likely actions."""
    save_every: int = 50_000
    """Environment steps between checkpoints."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in the directory of the run."""
    policy: Any = None
    """An nn.Module, `state -> distribution`, of which a copy is learned in place of the built-in
    networks (Python only)."""

    name: ClassVar[str] = "sac"

    def __post_init__(self) -> None:
        checks.check_temperature(self)
        checks.check_off_policy(self)
        checks.check_positive(self, "learning_rate", "value_learning_rate")
        checks.check_tuning(self)

    def run(self, model: EnvironmentModel, **how: Unpack[learned.How]) -> InferenceResult:
        return learned.run(self, _learner, model, **how)

    def sample(self, result: InferenceResult, draws: int, *, horizon: int | None, seed: int) -> Any:
        return learned.sample(result, draws, horizon=horizon, seed=seed)

    def messages(self, result: InferenceResult) -> dict[str, Tensor]:
        """The parameters of q."""
        return learned.messages(result)

    def read_messages(self, tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
        """q from what `messages` gave."""
        from inference_rl.inference import off_policy

        return off_policy.messages(tensors, policy, CRITICS)

    def value(self, result: InferenceResult) -> nn.Module | None:
        """v: the bound of one decision of the policy under q (line 1)."""
        from inference_rl.decision import bound
        from inference_rl.inference import off_policy

        def how(decision: Decision) -> Tensor:
            return bound(decision, drawn=result.q.takes_action)[0]

        return off_policy.value(result, how)


def _check_uniform(model: EnvironmentModel, prior: ActionPrior) -> None:
    """:raises ValueError: there is a prior that a learned one would take the place of."""
    if not learned.is_uniform(model, prior):
        raise ValueError(
            "learn_prior: expected no other prior beside the one that is learned, got "
            f"{type(prior).__name__}; leave one of them out"
        )


def _learner(settings: SAC, model: EnvironmentModel, prior: ActionPrior) -> Learner:
    import copy

    import torch

    from inference_rl.action_values import ActionValues
    from inference_rl.decision import bound, decide, every_action
    from inference_rl.inference.off_policy import (
        Batch,
        Lag,
        Learner,
        Part,
        residual_loss,
        soft_target,
    )
    from inference_rl.learned_prior import LearnedPrior
    from inference_rl.priors import moved

    space, discount = model.action_space, float(model.discount)
    policy, architecture = learned.networks(settings, model, prior, squashed=True)
    if settings.learn_prior:
        _check_uniform(model, prior)
        prior = LearnedPrior(architecture.actions)
    there = moved(prior, settings.device)
    q = ActionValues(architecture, CRITICS)
    lagging = copy.deepcopy(q).requires_grad_(False)
    for module in (policy, q, lagging):
        module.to(settings.device)
    actions = every_action(space)
    if actions is not None:
        actions = actions.to(settings.device)

    def decision(q: ActionValues, state: Tensor, step: Tensor, temperature: Tensor) -> Decision:
        def message(action: Tensor) -> Tensor:
            if actions is None:
                return q.combined(state, action, step)
            return q.combined(state, None, step).mT  # of all actions, which come in this order

        return decide(
            state,
            lambda _: policy(state, step),
            there,
            message,
            temperature=temperature,
            action_space=space,
            actions=actions,
        )

    def critic_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            value = bound(decision(lagging, batch.next_state, batch.next_step, temperature))[0]
        target = soft_target(batch.reward, batch.goes_on, value, discount)
        found = q(batch.state, batch.action, batch.step)
        return residual_loss(found, target), {"q": found.mean()}

    def policy_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, entropy, divergence = bound(decision(q, batch.state, batch.step, temperature))
        return -value.mean(), {"entropy": entropy.mean(), "divergence": divergence.mean()}

    def prior_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        divergence = bound(decision(q, batch.state, batch.step, temperature))[2]
        return divergence.mean(), {}

    rates = settings.value_learning_rate, settings.learning_rate
    known = [there] if isinstance(there, LearnedPrior) else []
    parts = {
        "q": Part(q, critic_loss, [lagging, policy, *known], rates[0]),
        "policy": Part(policy, policy_loss, [q, *known], rates[1]),
    }
    if isinstance(there, LearnedPrior):
        parts["prior"] = Part(there, prior_loss, [q, policy], rates[1])
    return Learner(
        settings,
        model,
        prior,
        learned.Tempering(settings, model, prior),
        policy=policy,
        q=q,
        parts=parts,
        lags={"q": Lag(lagging, q, settings.target_rate)},
    )
