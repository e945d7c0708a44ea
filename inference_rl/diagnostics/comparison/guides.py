"""How far each soft policy, as a guide, is from p(τ | O): what `guide_quality` says of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from inference_rl.diagnostics.comparison.exact import Policies
from inference_rl.diagnostics.comparison.findings import Cell, Estimate, Table, exactly
from inference_rl.diagnostics.guide import GuideQuality, guide_quality
from inference_rl.inference import infer
from inference_rl.inference.exact import Exact
from inference_rl.randomness import derived

DRAWS = 400
"""Trajectories to judge a guide by."""


def guides(known: Policies, seed: int, progress: Callable[[str], None]) -> Table:
    """A row for every temperature, by draws of the model's own program."""
    rows = []
    for name, temperature in zip(known.names[1:], known.temperatures, strict=True):
        progress(f"judging the guide: {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties, which are no fault here
            result = infer(known.model, Exact(temperature))
        quality = guide_quality(result, draws=DRAWS, seed=derived(seed, "guides"), most_states=0)
        rows.append((name, *_cells(quality)))
    return Table(
        (
            "policy",
            "ELBO by draws, nats",
            "exact",
            "log p(O)",
            f"{DRAWS} draws count as",
            "Pareto k̂",
        ),
        tuple(rows),
    )


def _cells(quality: GuideQuality) -> tuple[Cell, ...]:
    low, high = quality.elbo_interval
    evidence = quality.log_evidence
    return (
        Estimate(quality.elbo, low, high, quality.draws),
        "–" if quality.max_elbo is None else exactly(quality.max_elbo),
        "–" if evidence is None else exactly(evidence),
        f"{quality.effective_sample_size:.4g}",
        _tail(quality),
    )


def _tail(quality: GuideQuality) -> str:
    if quality.constant:
        return "all the same"
    if quality.pareto_k is None:
        return "too few values"
    return f"{quality.pareto_k:.2f}" + ("" if quality.trusted is not False else ", too large")
