"""Soft Q-learning: Q by its soft Bellman residual, and the policy that Q itself is.

Inferred: Q, the message of the trajectory program; the target is control. The program is cut after
one step, and Q stands for that step and all that follow (`decision`).

1. Of one decision, temperature · log p(O | s) = α log Σ_a ρ(a|s) e^{Q(s, a)/α} = V(s), the soft
   value; ∫ for Σ in a box.
2. Q(s, a) = r + γ E V(s'), the soft Bellman equation, whose solution is the message of the best
   policy (1702.08165, theorems 2 and 3): the residual is squared over replayed transitions (§3.2).
3. That policy is the posterior of the decision, p(a | s, O) = ρ(a|s) e^{(Q(s, a) − V(s))/α}
   (theorem 1): a softmax where actions are discrete, and there is nothing else to fit.
4. In a box e^{V/α} is the mean of ρ e^{Q/α} / density over draws of a known density (§3.2), by
   whose logarithm V is estimated, in expectation too low by about one over their number.
5. There a network f turns noise into draws, a = tanh u, u = ξ + f(s, ξ): it follows the Stein
   gradient, in which KL(q ‖ p) falls fastest, q the density of its u (§3.3) and p that of u when a
   is of the posterior, ∝ ρ(tanh u) e^{Q(s, tanh u)/α} Π (1 − tanh² u).
6. Temperature: α minimises the dual E V_α + α · target, down whose gradient, target − KL(π ‖ ρ),
   log α takes a step of Adam (1812.05905, eq. 18, has the entropy), KL that of the posterior.

Departures from 1702.08165, or from the authors' code:
1. A divergence from a prior in place of an entropy: under a uniform prior they differ by log|A|, or
   d · log 2 on [−1, 1]^d, in which entropies are measured.
2. Particles are u, as their score is. The authors' code moves actions by the score of u, and so
   samples e^{Q/α} Π (1 − a²).
3. Particles begin all over the box, by adding ξ, and not together, where they end in one mode.
4. The density that V is weighed by is known: uniform, or half of it a mixture of kernels around
   draws of the sampler, whose own density nobody knows.
5. Q lags behind by a little every update, in place of a copy every thousand or so.
6. Of discrete actions in continuous states V and policy take the mean of two Qs, which errs less
   than one (`ActionValues.combined`). In a box there is one, as in the paper.
7. With `side_by_side`, the default, the sampler takes its step under the Q of before the update.

What a run in a box reports besides: `effective_share`, how many of the weighted draws count, and
`stein_discrepancy` of the sampler's u from p, squared, which is zero in expectation if they agree.

Haarnoja, Tang, Abbeel and Levine (2017), arXiv:1702.08165. Haarnoja et al. (2018),
arXiv:1812.05905. Wang and Liu (2016), arXiv:1611.01722 (samplers by Stein gradients).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from inference_rl.inference import checks, learned
from inference_rl.search_spaces import Choice, LogUniform, searched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult
    from inference_rl.inference.off_policy import Learner
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior


@dataclasses.dataclass(frozen=True)
class SQL:
    """Soft Q-learning, for boxes and discrete actions: the policy is the softmax of Q.

    :raises ValueError: (when made) a setting out of its range.
    """

    temperature: float | Literal["auto"] = "auto"
    """>= 0, reward units, in a box > 0; "auto" tunes it to a target."""
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
    batch_size: int = searched(128, Choice((64, 128, 256, 512)))
    """Transitions of an update."""
    replay_capacity: int = 1_000_000
    """Environment steps that are kept."""
    learning_rate: float = searched(3e-4, LogUniform(1e-4, 1e-2))
    """Of the sampler of actions in a box (Adam)."""
    value_learning_rate: float = searched(3e-4, LogUniform(1e-4, 1e-2))
    """Of Q (Adam)."""
    particles: int = 16
    """>= 4, even: in a box, draws in each state whose Stein gradient the sampler follows; half of
    them move to where the others say."""
    value_samples: int = 16
    """>= 4, even: in a box, weighted draws in each state from which V is estimated."""
    proposals: Literal["uniform", "guide"] = "guide"
    """Of which those are: uniform draws, or half of them from around draws of the sampler."""
    target_rate: float = searched(0.005, LogUniform(1e-3, 5e-2))
    """How far the lagging Q moves towards Q in an update, in (0, 1]."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers; discrete states and actions have a table instead."""
    activation: Literal["tanh", "relu", "silu"] = "relu"
    """Between layers."""
    scale_observations: bool = False
    """To zero mean and unit variance, as seen so far; saved with the policy."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Updates to machine code; auto: in long runs, where a C++ compiler and Python.h are there."""
    side_by_side: bool = True
    """Steps of Q and sampler from the same parameters, at the same time, in place of in turn."""
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

    name: ClassVar[str] = "sql"

    def __post_init__(self) -> None:
        checks.check_temperature(self)
        checks.check_off_policy(self)
        for name in ("particles", "value_samples"):
            if (count := getattr(self, name)) < 4 or count % 2:
                raise ValueError(f"{name}: expected an even number >= 4, got {count}")
        checks.check_positive(self, "learning_rate", "value_learning_rate")
        checks.check_tuning(self)

    def run(self, model: EnvironmentModel, **how: Unpack[learned.How]) -> InferenceResult:
        return learned.run(self, _learner, model, **how)

    def sample(self, result: InferenceResult, draws: int, *, horizon: int | None, seed: int) -> Any:
        return learned.sample(result, draws, horizon=horizon, seed=seed)

    def messages(self, result: InferenceResult) -> dict[str, Tensor]:
        """None besides those in the policy, which is made of q."""
        return {}

    def read_messages(self, tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
        """The policy's own q."""
        return {"q": policy.q, "v": None}

    def value(self, result: InferenceResult) -> nn.Module:
        """v: the evidence of one decision under q (line 1), as the policy has it; in a box an
        estimate (line 4)."""
        from inference_rl.networks import LogPartition
        from inference_rl.softmax_policy import SoftmaxPolicy
        from inference_rl.stein_policy import SteinPolicy, SteinValue
        from inference_rl.temperature import LEAST_TEMPERATURE

        policy = result.policy
        if isinstance(policy, SteinPolicy):
            return SteinValue(policy)
        assert isinstance(policy, SoftmaxPolicy)
        return LogPartition(policy, max(float(policy.temperature), LEAST_TEMPERATURE))


def _learner(settings: SQL, model: EnvironmentModel, prior: ActionPrior) -> Learner:
    from gymnasium.spaces import Box

    from inference_rl.inference import sql_sampler, sql_softmax
    from inference_rl.networks import Architecture, described

    architecture = Architecture(
        states=described(model.state_space),
        actions=described(model.action_space),
        horizon=model.horizon,
        hidden=tuple(settings.hidden),
        activation=settings.activation,
        scaled=settings.scale_observations,
    )
    kind = sql_sampler if isinstance(model.action_space, Box) else sql_softmax
    return kind.learner(settings, model, prior, architecture)
