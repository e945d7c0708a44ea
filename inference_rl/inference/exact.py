"""Exact message passing: soft Bellman equations, Riccati equations, and the posterior beside them.

What is inferred: the policy of the trajectory program p(τ, O), in either of two readings. Program:
`inference_rl.trajectory.trajectory`, every step of it, summed out.

1. p(τ, O) = p(s_0) Π_t ρ(a_t|s_t) p(s_{t+1}|s_t, a_t) exp(r_t / α)            Levine (2018), §2.2
2. posterior: β_t(s, a) = E[exp(r/α) β_{t+1}(s')], β_t(s) = Σ_a ρ β_t(s, a)                   §2.3
3. p(a|s, O) = ρ β_t(s, a) / β_t(s), and p(s'|s, a, O) ∝ p(s'|s, a) exp(r/α) β_{t+1}(s')      §2.3
4. control: q(τ) = p(s_0) Π π(a_t|s_t) p(s_{t+1}|s_t, a_t) maximises E_q log p(τ, O)/q(τ)     §3.2
5. at E V_0 / α, where Q = E[r + γ V(s')] and V = α log Σ_a ρ exp(Q/α)                        §3.1
6. by π* = ρ exp((Q - V)/α)                                                                   §3.1
7. α → 0: V = max Q, the greedy policy: regular reinforcement learning
8. log p(O) - max ELBO = KL(p_0 ‖ p_0^x) + E_{π*} Σ_t [KL(π* ‖ π^x) + KL(P ‖ P^x)], x: given O

Departures. (1) A discount: γ^t weighs step t in 4-6; the posterior reads γ as the probability of
surviving a step, which gives control the same answer. (2) A prior ρ anywhere, where the paper folds
it into the reward. (3) Infinite horizons: the fixed point, solved by Newton's method with a
certified error, where the paper has finite ones; of the linear-Gaussian posterior, the limit of the
first steps of ever longer episodes.

References: Levine (2018), arXiv:1805.00909. Haarnoja et al. (2017), arXiv:1702.08165. Todorov
(2009), doi:10.1073/pnas.0710743106. Kappen et al. (2012), doi:10.1007/s10994-012-5278-7.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from inference_rl.inference import as_number

if TYPE_CHECKING:
    import xarray
    from torch import Tensor

    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult, Progress
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior
    from inference_rl.scale_out import Workers


@dataclasses.dataclass(frozen=True)
class Exact:
    """Exact inference on finite and on linear-Gaussian models.

    The posterior of a linear-Gaussian model needs discount 1, with or without a horizon; without
    one it has no evidence but the rate at which that grows, `result.evidence.rate`.

    In Python the temperature may be a torch scalar, to differentiate by.

    Finite models whose tables exceed one process are cut into blocks of states, one for each worker
    on a Ray cluster: `infer(..., workers=Workers(4, on="ray"))`; control, with a horizon or a
    discount below 1.

    :raises ValueError: a temperature below zero or not finite, a tolerance outside (0, 1), the
        posterior at temperature zero.
    """

    temperature: float = 1.0
    """>= 0, reward units; 0 is regular RL."""
    target: Literal["control", "posterior"] = "control"
    """control: the guide keeps the environment's dynamics. posterior: condition on O = 1."""
    tolerance: float = 1e-10
    """Error of V at which to stop, relative to its largest entry (infinite horizon only)."""

    name: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        try:
            temperature = as_number(self.temperature)
        except (AttributeError, ValueError, RuntimeError):
            raise ValueError(
                f"temperature: expected a number or a scalar tensor, got {self.temperature!r}"
            ) from None
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(
                f"temperature: expected a finite number >= 0 in reward units, got {temperature}"
            )
        if self.target not in ("control", "posterior"):
            raise ValueError(f"target: expected 'control' or 'posterior', got {self.target!r}")
        if self.target == "posterior" and temperature == 0:
            raise ValueError(
                "temperature: the posterior needs one above 0 (at 0 there is no evidence to "
                "condition on); use target='control' for regular RL"
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number in (0, 1), got {self.tolerance}")

    def run(
        self,
        model: EnvironmentModel,
        *,
        prior: ActionPrior | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        workers: Workers | None = None,
    ) -> InferenceResult:
        if workers is not None and workers.patience != type(workers).patience:
            raise ValueError(
                f"patience: expected none with Exact, got {workers.patience:g}: it steps no "
                "environments that one might wait for"
            )
        if workers is not None and workers.count > 0:
            from inference_rl.inference import exact_sharded

            return exact_sharded.run(
                self, model, prior=prior, seed=seed, progress=progress, workers=workers
            )
        return self._backend(model).run(self, model, prior=prior, seed=seed, progress=progress)

    def sample(
        self, result: InferenceResult, draws: int, *, horizon: int | None, seed: int
    ) -> xarray.DataTree:
        if result.prior_source is not None:  # a program, solved in blocks: nobody has its tables
            from inference_rl.inference import learned

            return learned.sample(result, draws, horizon=horizon, seed=seed)
        return self._backend(result.model).sample(result, draws, horizon=horizon, seed=seed)

    def messages(self, result: InferenceResult) -> dict[str, Tensor]:
        """q and v as tensors to save."""
        return self._backend(result.model).messages(result)

    def read_messages(self, tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
        """q and v from what `messages` gave."""
        if "q" in tensors:
            return tensors
        from inference_rl.inference import exact_linear_gaussian

        return exact_linear_gaussian.read_messages(tensors)

    @staticmethod
    def _backend(model: EnvironmentModel) -> Any:
        from inference_rl.linear_gaussian import LinearGaussianModel

        if isinstance(model, LinearGaussianModel):
            from inference_rl.inference import exact_linear_gaussian

            return exact_linear_gaussian
        from inference_rl.inference import exact_finite

        return exact_finite
