"""Soft TD3: twin delayed deterministic policy gradient as inference, by a guide of fixed width.

Inferred: the mean of a policy, as guide of the trajectory program; the target is control. The
program is cut after one step, and Q stands for that step and all that follow (`decision`). Of the
guide, a = tanh u with u ~ N(μ(s), width²), only μ is learned: see `fixed_width`, also for why it is
squashed.

1. Of one decision, temperature · ELBO = E_u[Q(s, tanh u) − α log π/ρ]; μ climbs it through the
   draw, u = μ + width · ε, under the first of two Qs, every other update.
2. Q_i = r + γ E V(s'), V by one of three `backup`s: the bound, the evidence, or a Boltzmann mean,
   from Qs and a guide that lag behind, and move when μ does.
3. The message in V is smoothed: min_i Q_i(s', clip(a + clip(n, ±c))), n ~ N(0, smoothing²), of one
   n for each a. It is Q blurred by a noise of the box's own units, that no width or tanh bends.
4. width → 0, α → 0: the target is r + γ min_i Q_i(s', clip(tanh μ(s') + clip(n, ±c))), the gradient
   ∂_μ tanh μ · ∇_a Q_1, which is TD3 (1802.09477, algorithm 1).
5. log π = log N(u) − Σ log(1 − a²): at a fixed width the entropy is greatest at μ = 0, and falls as
   means go to the edges. So a positive temperature keeps tanh from saturating, and moves nothing
   else where ρ is uniform; for the same reason no temperature is tuned to an entropy here, which
   would only set how far from the edges the means lie.

The lesser of two Qs, smoothing and what lags are no part of the inference: they trade bias for
stability. An update is: Q, then, when it is their turn, μ and what lags behind.

Departures from 1802.09477:
1. Whoever acts draws from the guide; no other noise explores.
2. The residual has a factor ½.

Fujimoto, van Hoof and Meger (2018), arXiv:1802.09477. Haarnoja et al. (2017), arXiv:1702.08165.
Pan, Cai and Huang (2020), arXiv:2010.09177.
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

CRITICS = 2


@dataclasses.dataclass(frozen=True)
class SoftTD3:
    """Soft TD3, for boxes of actions, with a fixed or annealed temperature and width.

    :raises ValueError: (when made) a setting out of its range.
    """

    temperature: float = searched(0.05, LogUniform(1e-3, 0.1))
    """>= 0, reward units; never tuned, for the width does not move."""
    final_temperature: float | None = None
    """Annealed to this, geometrically, over the run; None keeps it."""
    width: float = searched(0.3, LogUniform(0.05, 0.8))
    """> 0, of the Gaussian whose tanh are the actions."""
    final_width: float | None = None
    """> 0: narrowed or widened to this, geometrically, over the run; None keeps it."""
    backup: Literal["elbo", "logsumexp", "boltzmann"] = "elbo"
    """The value of what follows: of one draw, or of many the evidence or a mean of Q."""
    samples: int = 16
    """>= 2, draws of the guide in each state, with backup logsumexp or boltzmann."""
    smoothing: float = 0.2
    """>= 0, of the noise on actions that the lagging Qs are asked for; the box is [-1, 1]."""
    smoothing_limit: float = 0.5
    """> 0: that noise lies within plus and minus this."""
    policy_every: int = 2
    """Updates of Q between those of the policy and of what lags."""
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
    learning_rate: float = searched(1e-3, LogUniform(1e-4, 1e-2))
    """Of the policy (Adam)."""
    value_learning_rate: float = searched(1e-3, LogUniform(1e-4, 1e-2))
    """Of Q (Adam)."""
    target_rate: float = searched(0.005, LogUniform(1e-3, 5e-2))
    """How far the lagging Q and policy move in an update, in (0, 1]."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers; discrete states have a table instead."""
    activation: Literal["tanh", "relu", "silu"] = "relu"
    """Between layers."""
    scale_observations: bool = False
    """To zero mean and unit variance, as seen so far; saved with the policy."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Updates to machine code; auto: in long runs, where a C++ compiler and Python.h are there."""
    side_by_side: bool = False
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

    name: ClassVar[str] = "soft-td3"

    def __post_init__(self) -> None:
        checks.check_fixed_width(self)
        checks.check_ranges(self, smoothing=(0, None), policy_every=(1, None))
        checks.check_positive(self, "smoothing_limit")

    def run(self, model: EnvironmentModel, **how: Unpack[learned.How]) -> InferenceResult:
        from inference_rl.inference.fixed_width import check_actions

        check_actions(model)
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
        """v: what `backup` makes of draws of the guide under q, neither smoothed nor lagging."""
        from inference_rl.inference import off_policy
        from inference_rl.inference.fixed_width import backed_up

        return off_policy.value(result, lambda decision: backed_up(decision, self.backup))


def smoothed(action: Tensor, smoothing: float, limit: float) -> Tensor:
    """Actions of the box [-1, 1]^d, each with clipped Gaussian noise, and clipped to the box."""
    import torch

    # Not randn_like: what is recorded draws its noise before it knows any action.
    standard = torch.randn(action.shape, dtype=action.dtype, device=action.device)
    noise = (smoothing * standard).clamp(-limit, limit)
    return (action + noise).clamp(-1.0, 1.0)


def _learner(settings: SoftTD3, model: EnvironmentModel, prior: ActionPrior) -> Learner:
    import functools

    from inference_rl.inference.fixed_width import learner

    noisy = functools.partial(
        smoothed, smoothing=settings.smoothing, limit=settings.smoothing_limit
    )
    every = settings.policy_every
    return learner(settings, model, prior, critics=CRITICS, every=every, smoothed=noisy)
