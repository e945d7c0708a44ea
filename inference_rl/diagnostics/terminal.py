"""Diagnostics for people, in a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from inference_rl.diagnostics.guide import GuideQuality
from inference_rl.diagnostics.temperature import Curve, TemperatureReport, TrustRegion

ROUNDING = 1e-12
"""Nats: below it a divergence is shown as nothing."""

ROWS = 9
"""Of a curve, around the temperature that matters."""


def print_guide(guide: GuideQuality) -> None:
    """How close the guide is to its target, and whether its weights can be trusted."""
    table = Table(title="How good is the guide?", title_justify="left")
    table.add_column("quantity")
    table.add_column("nats", justify="right")

    def row(name: str, value: float | None, error: float | None = None) -> None:
        if value is not None:
            value = 0.0 if abs(value) < ROUNDING else value
            table.add_row(name, f"{value:.6g}" + (f" ± {error:.2g}" if error else ""))

    row("evidence lower bound, by sampling", guide.elbo, guide.elbo_standard_error)
    row("evidence lower bound, exact", guide.exact_elbo)
    row("largest of any policy, E V / temperature", guide.max_elbo)
    row("  left to learn", guide.left_to_learn)
    row("  KL(π ‖ π*), mean per step", guide.mean_divergence)
    row("log evidence, log p(O)", guide.log_evidence)
    row("  by sampling", guide.evidence_estimate, guide.evidence_standard_error)
    console = Console()
    console.print(table)
    console.print(_verdict(guide), highlight=False, markup=False, soft_wrap=True)
    if guide.unfinished > 0:
        console.print(
            f"{guide.unfinished:.0%} of the trajectories go on after {guide.steps} steps.",
            highlight=False,
        )


def _verdict(guide: GuideQuality) -> str:
    effective = f"{guide.draws} draws count as {guide.effective_sample_size:.4g}"
    if guide.constant:
        return f"All weights p(τ, O) / q(τ) of {guide.draws} draws are the same."
    if guide.pareto_k is None:
        return f"The weights take too few values for Pareto k̂ to tell; {effective}."
    k = "infinite" if math.isinf(guide.pareto_k) else f"{guide.pareto_k:.2f}"
    limit = f"{guide.reliable_k:.2f}"
    if guide.trusted:
        return f"Pareto k̂ {k}, below {limit}: the weights can be trusted; {effective}."
    if guide.trusted is None:
        return f"Pareto k̂ {k}, of weights that hardly vary: it says nothing; {effective}."
    return (
        f"Pareto k̂ {k}, not below {limit}: what is estimated by these weights is not to be "
        f"trusted; {effective}."
    )


def print_temperature(report: TemperatureReport) -> None:
    """What a target for the temperature comes to, and where a run got to."""
    console = Console()

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    entropy = ""
    if report.target_entropy is not None:
        entropy = f" (an entropy of {report.target_entropy:.6g})"
    chosen = "" if report.given else ", by default"
    say(f"Temperature, tuned to a divergence of {report.target_divergence:.6g}{entropy} nats "
        f"per step{chosen}:")  # fmt: skip
    if report.infeasible_because is not None:
        say(f"  cannot be met: {report.infeasible_because}")
    if report.predicted is not None:
        say(f"  met by the best policy at temperature {report.predicted:.6g}, the minimum of the "
            "dual")  # fmt: skip
    for other in report.also_met_at:
        say(f"  met at {other:.6g} as well")
    if report.came_to is not None:
        measured = ""
        if report.measured_divergence is not None:
            measured = f", at a divergence of {report.measured_divergence:.6g} nats per step"
        moving = "" if report.settled is not False else ": it has not settled"
        say(f"  the run came to {report.came_to:.6g}{measured}{moving}")
    if report.no_curve_because is not None:
        say(f"  no prediction: {report.no_curve_because}")
    if report.curve is not None:
        console.print(_curve(report.curve, report.predicted))


def _curve(curve: Curve, predicted: float | None) -> Table:
    """The middle of a curve, or what is around the prediction."""
    names = ["temperature", "divergence", "entropy", "return"]
    table = Table(*names, *([] if curve.dual is None else ["dual"]))
    for column in table.columns:
        column.justify = "right"
    middle = len(curve.temperatures) // 2
    if predicted is not None:
        middle = sum(temperature < predicted for temperature in curve.temperatures)
    first = min(max(middle - ROWS // 2, 0), len(curve.temperatures) - ROWS)
    for i in range(first, first + ROWS):
        dual = [] if curve.dual is None else [f"{curve.dual[i]:.6g}"]
        table.add_row(
            f"{curve.temperatures[i]:.3g}",
            f"{curve.divergence[i]:.4f}",
            f"{curve.entropy[i]:.4f}",
            f"{curve.expected_return[i]:.4g}",
            *dual,
        )
    table.caption = "exact; nats per step, and discounted reward"
    return table


def print_trust_region(region: TrustRegion) -> None:
    """What reweighting episodes within a divergence comes to, and what the rounds of a run did."""
    console = Console()

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    say(f"Trust region of {region.epsilon:g} nats, for {region.episodes} whole episodes:")
    if region.refused_because is not None:
        say(f"  the dual has no minimum: {region.refused_because}")
    if region.temperature is not None:
        say(f"  the dual is least at temperature {region.temperature:.6g}, where they count as "
            f"{region.effective_sample_size:.4g}")  # fmt: skip
    if region.rounds:
        last = region.rounds[-1]
        say(f"  the run's last round, after {last['steps']:,.0f} steps: dual temperature "
            f"{last['dual_temperature']:.6g}, its sample counts as "
            f"{last['effective_sample_size']:.4g}")  # fmt: skip
    table = Table("dual temperature", "dual", caption="both in reward units")
    for column in table.columns:
        column.justify = "right"
    lowest = min(range(len(region.dual)), key=region.dual.__getitem__)
    first = min(max(lowest - ROWS // 2, 0), max(len(region.dual) - ROWS, 0))
    for temperature, dual in list(zip(region.temperatures, region.dual, strict=True))[
        first : first + ROWS
    ]:
        table.add_row(f"{temperature:.3g}", f"{dual:.6g}")
    console.print(table)
