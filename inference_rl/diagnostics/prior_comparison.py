"""Which action prior explains given behaviour better: `compare_priors`.

1. A prior ρ and a temperature α predict behaviour: π_{ρ,α}, the exact policy of control.
2. An episode's likelihood is Π_t π_{ρ,α}(a_t | s_t). What dynamics add is the same for all priors.
3. Where α is not known, it is inferred for each prior by itself: uniform on its logarithm within
   the limits given, p(α | episodes) ∝ Π_i p(episode_i | ρ, α).
4. A prior is judged by what it says of an episode that it has not seen: elpd = Σ_i log
   p(episode_i | the others, ρ), by Pareto-smoothed importance sampling (PSIS-LOO).

Where α is known nothing is fitted, leaving an episode out changes nothing, and elpd is the log
likelihood. Only finite models, whose π_{ρ,α} is known.

References: Vehtari, Gelman and Gabry (2017), arXiv:1507.04544, for PSIS-LOO and the standard error
of a difference. Yao, Vehtari, Simpson and Gelman (2018), arXiv:1704.02030, for stacking weights.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import CubicSpline

from inference_rl.diagnostics.arviz_versions import arviz, as_arviz, is_old
from inference_rl.diagnostics.behaviour import (
    Episode,
    check_episodes,
    episodes_of,
    first_forbidden,
    log_likelihood,
    log_policy,
    remembering,
)
from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.pareto import (
    NEARLY_CONSTANT,
    SAME,
    effective_sample_size,
)
from inference_rl.environment import EnvironmentModel, WithPreviousAction
from inference_rl.priors import ActionPrior
from inference_rl.tabulation import tabulate

if TYPE_CHECKING:
    import xarray

NODES = 65
"""Temperatures at which the likelihood is computed; between them its logarithm is interpolated."""


@dataclasses.dataclass(frozen=True)
class PriorScore:
    """How well one prior explains the episodes, with the others ranked beside it; nats.

    :ivar elpd: log p(episode | the others), summed over episodes, and its standard error.
    :ivar difference: the best elpd less this one, and the standard error of that.
    :ivar weight: in a mixture of priors that predicts best (stacking); None where α is known.
    :ivar pareto_k: the largest k̂ of the episodes that matter, below 0.7 if elpd is to be trusted:
        of those whose leaving moves the posterior of α. None if there are none of them.
    :ivar temperature: α, reward units: as given, or its posterior mean.
    :ivar temperature_low, temperature_high: its central 90% under the posterior.
    """

    name: str
    elpd: float
    standard_error: float
    difference: float
    difference_standard_error: float
    weight: float | None
    pareto_k: float | None
    temperature: float
    temperature_low: float
    temperature_high: float

    @property
    def as_good_as_the_best(self) -> bool:
        """Whether the difference is within two of its standard errors, or within rounding."""
        return self.difference <= 2 * self.difference_standard_error + 1e-9 * abs(self.elpd)


def compare_priors(
    model: EnvironmentModel,
    episodes: xarray.DataTree | Sequence[Episode | tuple[Any, Any]],
    priors: Mapping[str, ActionPrior],
    temperature: float | tuple[float, float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> list[PriorScore]:
    """Rank action priors by how well they predict behaviour, the best first.

    :param episodes: pairs of states and actions, or what `InferenceResult.sample` gave, of which
        only what was done while alive counts.
    :param priors: by name. One that remembers the previous action may be among them.
    :param temperature: α of whoever acted, > 0, reward units; or the limits within which it lies.
    :param draws: of the posterior of α. :param seed: of those draws.
    :raises TypeError: the model is not finite.
    :raises ValueError: fewer than two episodes in which something is done; no priors; a temperature
        out of range; or an action that a prior forbids, which settles the question.
    """
    if not priors:
        raise ValueError("priors: expected at least one, by name, got none")
    low, high = _limits(temperature)
    done = episodes_of(episodes)
    if len(done) < 2:
        raise ValueError(
            "episodes: expected at least two in which something is done, to tell how they vary, "
            f"got {len(done)}"
        )
    nodes = np.geomspace(low, high, NODES) if low < high else np.array([low])
    tables = {
        name: _log_likelihoods(model, prior, nodes, done, name) for name, prior in priors.items()
    }
    if low == high:
        return _ranked_without_fit(tables, low)
    return _ranked(tables, np.log(nodes), draws, seed)


def _limits(temperature: float | tuple[float, float]) -> tuple[float, float]:
    low, high = temperature if isinstance(temperature, tuple | list) else (temperature,) * 2
    if not (0 < low <= high < math.inf):
        raise ValueError(
            "temperature: expected a finite number > 0 in reward units, or limits (low, high) of "
            f"one, got {temperature}"
        )
    return float(low), float(high)


def _log_likelihoods(
    model: EnvironmentModel,
    prior: ActionPrior,
    temperatures: Array,
    episodes: list[Episode],
    name: str,
) -> Array:
    """log Π_t π_{ρ,α}(a_t | s_t) of every episode at every temperature, nats, (K, N)."""
    if getattr(prior, "needs_previous_action", False) and not model.remembers_action:
        model = WithPreviousAction(model)
        episodes = [remembering(episode, model) for episode in episodes]
    finite = tabulate(model, prior=prior)
    check_episodes(finite, episodes)
    if (found := first_forbidden(finite, episodes)) is not None:
        i, t = found
        raise ValueError(
            f"priors: {name!r} has no mass on action {int(episodes[i].actions[t])} in state "
            f"{int(episodes[i].states[t])}, which was taken at step {t} of episode {i}, so that it "
            "explains this behaviour not at all; leave it out, or give it a small probability"
        )
    rows = []
    for temperature in temperatures:
        table = log_policy(finite, float(temperature))
        rows.append([log_likelihood(table, episode) for episode in episodes])
    return np.array(rows)


def _ranked_without_fit(tables: dict[str, Array], temperature: float) -> list[PriorScore]:
    """By the log likelihood (1, N) of each prior itself."""
    scores = {name: table[0] for name, table in tables.items()}
    best = max(scores, key=lambda name: scores[name].sum())

    def error(values: Array) -> float:
        return math.sqrt(len(values) * float(values.var()))

    found = [
        PriorScore(
            name=name,
            elpd=float(values.sum()),
            standard_error=error(values),
            difference=float((scores[best] - values).sum()),
            difference_standard_error=error(scores[best] - values),
            weight=None,
            pareto_k=None,
            temperature=temperature,
            temperature_low=temperature,
            temperature_high=temperature,
        )
        for name, values in scores.items()
    ]
    return sorted(found, key=lambda score: score.difference)


def _ranked(tables: dict[str, Array], log_nodes: Array, draws: int, seed: int) -> list[PriorScore]:
    """By ArviZ, from draws of each prior's own posterior of α."""
    az = arviz()
    fits = {
        name: _posterior(table, log_nodes, draws, np.random.default_rng([seed, i]))
        for i, (name, table) in enumerate(tables.items())
    }
    trees = {name: as_arviz(_tree(*fit)) for name, fit in fits.items()}
    with warnings.catch_warnings():
        # k̂ is reported, and pandas announces its own future through ArviZ 0.23.
        warnings.simplefilter("ignore")
        loo = {name: az.loo(tree, pointwise=True) for name, tree in trees.items()}
        table = az.compare(loo) if is_old(az) else az.compare(loo, round_to="none")
    elpd = "elpd_loo" if is_old(az) else "elpd"
    found = []
    for name, row in table.iterrows():
        low, mean, high = _summary(fits[str(name)][0])
        found.append(
            PriorScore(
                name=str(name),
                elpd=float(row[elpd]),
                standard_error=float(row["se"]),
                difference=abs(float(row["elpd_diff"])),
                difference_standard_error=float(row["dse"]),
                weight=float(row["weight"]),
                pareto_k=_largest_k(loo[str(name)].pareto_k.values, fits[str(name)][1]),
                temperature=mean,
                temperature_low=low,
                temperature_high=high,
            )
        )
    return found


def _largest_k(found: Array, log_likelihood: Array) -> float | None:
    draws = len(log_likelihood)
    moved = [
        effective_sample_size(-column) < NEARLY_CONSTANT * draws for column in log_likelihood.T
    ]
    return float(found[moved].max()) if any(moved) else None


def _posterior(
    table: Array, log_nodes: Array, draws: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Draws of α (D,), and the log likelihood of every episode at each, (D, N).

    The density is tabulated finely between the nodes, and inverted at stratified quantiles.
    """
    spline = CubicSpline(log_nodes, table)
    fine = np.linspace(log_nodes[0], log_nodes[-1], 64 * len(log_nodes))
    total = spline(fine).sum(1)
    density = np.exp(total - total.max())
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    quantiles = (np.arange(draws) + generator.random(draws)) / draws
    drawn = np.interp(generator.permutation(quantiles) * mass[-1], mass, fine)
    found = spline(drawn)
    # ArviZ 1.x refuses weights that do not vary at all, as where α has no say in an episode.
    found[:, np.ptp(found, axis=0) < SAME] += SAME * generator.random((draws, 1))
    return np.exp(drawn), found


def _tree(temperatures: Array, log_likelihood: Array) -> xarray.DataTree:
    import xarray

    posterior = xarray.Dataset({"temperature": (["chain", "draw"], temperatures[np.newaxis])})
    episodes = xarray.Dataset(
        {"actions": (["chain", "draw", "episode"], log_likelihood[np.newaxis])}
    )
    return xarray.DataTree.from_dict({"posterior": posterior, "log_likelihood": episodes})


def _summary(temperatures: Array) -> tuple[float, float, float]:
    low, high = np.quantile(temperatures, [0.05, 0.95])
    return float(low), float(temperatures.mean()), float(high)
