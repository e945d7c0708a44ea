"""How good is the guide? `guide_quality` holds q(τ) of a result against p(τ, O).

1. log p(O) = ELBO(q) + KL(q ‖ p(τ | O)), and ELBO(q) = E_q log w, w = p(τ, O) / q(τ).
2. Constant w say that q is p(τ | O); an average under weights with a heavy tail says little.
3. Control: max ELBO = E V_0 / α, and max ELBO - ELBO(π) = E_π Σ γ^t KL(π ‖ π*): what is left to
   learn. What is missing to log p(O) then is due to start and dynamics, which no policy changes.

With a discount w are the weights of the program, which weighs step t by γ^t: their logarithms
average to J / α, while log p(O) reads γ as the probability of surviving a step, so that w say
nothing about it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.pareto import (
    NEARLY_CONSTANT,
    are_constant,
    effective_sample_size,
    pareto_k,
    reliable_k,
)
from inference_rl.diagnostics.samples import column
from inference_rl.inference import InferenceResult, as_number
from inference_rl.inference.exact_finite import objective_parts
from inference_rl.inference.reference import MOST_STATES, Reference, reference
from inference_rl.inference.sampling import program_of

if TYPE_CHECKING:
    import xarray

INTERVAL = 1.959964
"""Standard errors to either side of an interval of 95%."""


@dataclasses.dataclass(frozen=True)
class GuideQuality:
    """How close the guide q(τ) of a result is to its target; nats, None where not known.

    :ivar draws: trajectories. :ivar steps: that were drawn of each, at most. :ivar unfinished: the
        share of trajectories that go on after them.
    :ivar elbo: E_q log w, and its standard error: J / temperature of the policy, or log p(O) for a
        posterior. What follows the last step drawn is left out of a learned policy's.
    :ivar exact_elbo: the same without sampling, by the tables of a finite model.
    :ivar max_elbo: E V_0 / temperature, the largest of any policy.
    :ivar log_evidence: log p(O), exact. :ivar evidence_estimate: log mean w, where that estimates
        it: without a discount, of whole trajectories; and the standard error of that.
    :ivar constant: whether all w are the same up to rounding, as those of p(τ | O) are.
    :ivar pareto_k: k̂ of w; None too where they take too few values to have a tail.
    :ivar reliable_k: what it should be below, for so many draws.
    :ivar effective_sample_size: (Σ w)² / Σ w², of `draws`.
    :ivar divergence: KL(π ‖ π*) in every state, (S,), or (T, S) with a horizon.
    :ivar mean_divergence: the same, mean per (discounted) step along π.
    :ivar no_exact_because: why `exact_elbo` and what follows from it are None.
    """

    draws: int
    steps: int
    unfinished: float
    elbo: float
    elbo_standard_error: float
    exact_elbo: float | None
    max_elbo: float | None
    log_evidence: float | None
    evidence_estimate: float | None
    evidence_standard_error: float | None
    constant: bool
    pareto_k: float | None
    reliable_k: float
    effective_sample_size: float
    divergence: Array | None
    mean_divergence: float | None
    no_exact_because: str | None

    @property
    def elbo_interval(self) -> tuple[float, float]:
        """Of 95%, as if the mean were normal."""
        margin = INTERVAL * self.elbo_standard_error
        return self.elbo - margin, self.elbo + margin

    @property
    def left_to_learn(self) -> float | None:
        """max ELBO - ELBO(π) = E_π Σ γ^t KL(π ‖ π*), exact."""
        if self.max_elbo is None or self.exact_elbo is None:
            return None
        return self.max_elbo - self.exact_elbo

    @property
    def trusted(self) -> bool | None:
        """Whether averages under w are as good as their standard errors; None if k̂ cannot tell:
        there is none, or it is of weights that hardly vary."""
        if self.constant:
            return True
        if self.pareto_k is None:
            return None
        small = self.pareto_k < self.reliable_k
        hardly = self.effective_sample_size > NEARLY_CONSTANT * self.draws
        return small if small or not hardly else None

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON: null where one does not apply."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "divergence"]
        low, high = self.elbo_interval
        return {name: _plain(getattr(self, name)) for name in names} | {
            "elbo_low": _plain(low),
            "elbo_high": _plain(high),
            "left_to_learn": _plain(self.left_to_learn),
            "trusted": self.trusted,
        }


def guide_quality(
    result: InferenceResult,
    *,
    draws: int = 1000,
    horizon: int | None = None,
    seed: int | None = None,
    most_states: int = MOST_STATES,
) -> GuideQuality:
    """Compare the guide of `result` with its target, by `draws` trajectories of the program.

    A simulator is run for them; every other model is its own program, fast.

    :param horizon, seed: as in `InferenceResult.sample`.
    :param most_states: what is exact is known of models of at most so many, times the steps of a
        horizon.
    :raises ValueError: fewer than two draws; temperature 0, where reward is no evidence; or a saved
        run that does not hold its prior.
    """
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, to tell how they vary, got {draws}")
    if result.temperature == 0:
        raise ValueError(
            "temperature: expected one above 0, for at 0 reward is no evidence and a guide has "
            "no target, got 0; infer at a small one"
        )
    if result.prior is None:
        raise ValueError(
            "prior: expected that of the run, which was made in Python and which a saved run does "
            "not hold; judge the result before it is saved, or set result.prior_source"
        )
    seed = result.seed if seed is None else seed
    return judged(result, guide_draws(result, draws, horizon, seed), most_states)


def guide_draws(
    result: InferenceResult, draws: int, horizon: int | None, seed: int
) -> xarray.DataTree:
    """Trajectories of the guide in the program of its model, as a routine samples them."""
    in_program = dataclasses.replace(result, source=program_of(result.model))
    return result.routine.sample(in_program, draws, horizon=horizon, seed=seed)


def judged(
    result: InferenceResult, tree: xarray.DataTree, most_states: int = MOST_STATES
) -> GuideQuality:
    """What `guide_quality` says, by trajectories that `guide_draws` gave."""
    exact = reference(result, most_states)
    log_weights = column(tree, "sample_stats", "log_weight")[0]
    draws, unfinished = len(log_weights), _unfinished(result, tree)
    is_control = getattr(result.routine, "target", "control") == "control"
    whole = result.model.discount == 1 and unfinished == 0
    estimate = _log_mean(log_weights) if whole or not is_control else (None, None)
    exact_elbo = divergence = mean_divergence = None
    max_elbo = None if result.gap is None else result.gap.max_elbo
    if is_control and result.objective is not None and not hasattr(result.routine, "total_steps"):
        max_elbo = as_number(result.objective) / result.temperature
    log_evidence = None if result.log_evidence is None else as_number(result.log_evidence)
    why = exact if isinstance(exact, str) else None
    if isinstance(exact, Reference):
        max_elbo, log_evidence = exact.objective / result.temperature, exact.log_evidence
        if is_control:
            exact_elbo, divergence, mean_divergence = _exactly(result, exact)
            why = "the guide has mass where the prior has none" if exact_elbo is None else None
        else:
            why = "the guide is the posterior, which has dynamics of its own"
    constant = are_constant(log_weights)
    with np.errstate(invalid="ignore"):  # -inf where the prior forbids what the guide did
        deviation = 0.0 if constant else float(log_weights.std(ddof=1))  # and not their rounding
    return GuideQuality(
        draws=draws,
        steps=column(tree, "posterior", "alive").shape[2],
        unfinished=unfinished,
        elbo=float(log_weights.mean()),
        elbo_standard_error=deviation / math.sqrt(draws),
        exact_elbo=exact_elbo,
        max_elbo=max_elbo,
        log_evidence=log_evidence,
        evidence_estimate=estimate[0],
        evidence_standard_error=0.0 if constant and estimate[1] is not None else estimate[1],
        constant=constant,
        pareto_k=pareto_k(log_weights),
        reliable_k=reliable_k(draws),
        effective_sample_size=effective_sample_size(log_weights),
        divergence=divergence,
        mean_divergence=mean_divergence,
        no_exact_because=why,
    )


def _exactly(result: InferenceResult, exact: Reference) -> tuple[float | None, Array, float | None]:
    """ELBO(π) and KL(π ‖ π*), by state and mean per step; no means where the prior forbids."""
    policy, ended = exact.table_of(result), exact.model.is_terminal.unsqueeze(-1)
    divergence = _divergence(policy.numpy(), exact.control.policy.numpy())
    divergence = np.where(ended.squeeze(-1).numpy(), 0.0, divergence)
    if bool(((policy > 0) & (exact.model.log_prior == -math.inf) & ~ended).any()):
        return None, divergence, None
    parts = objective_parts(exact.model, policy)
    elbo = parts.expected_return / result.temperature - parts.divergence
    left = exact.objective / result.temperature - elbo
    return elbo, divergence, left / parts.steps if parts.steps else 0.0


def _unfinished(result: InferenceResult, tree: xarray.DataTree) -> float:
    """The share of trajectories that are alive after the last step drawn, short of the horizon."""
    import torch

    alive = column(tree, "posterior", "alive")[0]
    if alive.shape[1] == result.model.horizon:
        return 0.0
    last = torch.from_numpy(column(tree, "posterior", "state")[0, :, -1])
    return float((alive[:, -1] & ~result.model.terminal(last).numpy()).mean())


def _log_mean(log_weights: Array) -> tuple[float, float]:
    """log mean w, and its standard error by the delta method."""
    peak = float(log_weights.max())
    if not math.isfinite(peak):
        return peak, math.nan
    weights = np.exp(log_weights - peak)
    mean = float(weights.mean())
    return peak + math.log(mean), float(weights.std(ddof=1)) / math.sqrt(len(weights)) / mean


def _divergence(policy: Array, best: Array) -> Array:
    """KL(π ‖ π*) of the rows of two tables, nats; inf where π does what π* never does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(policy > 0, policy * (np.log(policy) - np.log(best)), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
