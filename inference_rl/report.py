"""What the command prints for people: tables, and a line on how the policy fared."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inference_rl.inference import InferenceResult


def parameters(item: Any) -> list[str]:
    """What the constructor of `item` takes, with defaults."""
    return [
        name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in inspect.signature(item).parameters.items()
        if name != "action_space"
    ]


def print_list(report: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Routines, models and priors, as tables."""
    console = Console()
    for group, items in report.items():
        table = Table("name", "what it is", "accepts", title=group, title_justify="left")
        for name, item in items.items():
            accepts = ", ".join(_shortened(parameter) for parameter in item["accepts"])
            table.add_row(name, escape(item["what"]), escape(accepts))
        console.print(table)
    console.print("What `inference-rl sweep TARGET ROUTINE` searches, unless told otherwise:")
    for name, item in report["routines"].items():
        if item["searches"]:
            spaces = (f"{key.replace('_', '-')}={text}" for key, text in item["searches"].items())
            console.print(f"  {name}: {' '.join(spaces)}", highlight=False, markup=False)


def _shortened(parameter: str) -> str:
    return parameter if len(parameter) <= 40 else parameter.partition("=")[0] + "=..."


QUALITY = {
    "effective_share": "share of draws that count for V, last",
    "stein_discrepancy": "sampler's Stein discrepancy, squared, last",
}
"""What a routine may log of how well it does what it approximates."""


def print_inference(result: InferenceResult, report: dict[str, Any]) -> None:
    """What was inferred, with units, and how it fared."""
    target = report["settings"].get("target", "control")
    table = Table(title=f"{result.model.name}: {report['routine']}, {target}", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("unit")

    def row(name: str, value: float | None, unit: str) -> None:
        if value is not None:
            table.add_row(name, f"{value:.6g}", unit)

    row("temperature", report["temperature"], "reward")
    if result.metrics:  # every row says what the temperature is tuned to, if it is
        for name, words in ("target_divergence", "a divergence"), ("target_entropy", "an entropy"):
            row(f"  tuned to {words} per step of", result.metrics[0].get(name), "nats")
    row("discount", report["discount"], "")
    row("objective J, KL form", report["objective"], "reward")
    row("  its standard error", report["objective_standard_error"], "reward")
    row("objective, entropy form", report["objective_entropy_form"], "reward")
    row("expected return, discounted", report["expected_return"], "reward")
    row("policy entropy, discounted sum", report["entropy"], "nats")
    row("divergence from the prior, discounted sum", report["divergence"], "nats")
    if result.parts is not None and result.parts.steps > 0 and report["entropy"] is not None:
        row("policy entropy, mean per step", report["entropy"] / result.parts.steps, "nats")
    if result.gap is not None:
        row("log evidence, log p(O)", result.gap.log_evidence, "nats")
        row("largest evidence lower bound, E V / temperature", result.gap.max_elbo, "nats")
        row("gap: optimism of the posterior", result.gap.total, "nats")
        row("  of the start", result.gap.start, "nats")
        row("  of the policy", result.gap.policy, "nats")
        row("  of the dynamics", result.gap.dynamics, "nats")
    rate = result.evidence.rate
    if rate is not None:
        row("log evidence, each step adds", rate.log_evidence, "nats")
        row("largest evidence lower bound, each step adds", rate.max_elbo, "nats")
        row("gap: optimism of the posterior, per step", rate.gap, "nats")
    row("certified error of V, at most", report["error_bound"], "reward")
    if report["error_bound"] is None:
        table.add_row("certified error of V", "none", "")
    is_learned = hasattr(result.routine, "total_steps")
    row("environment steps" if is_learned else "iterations", report["iterations"], "")
    for name, words in QUALITY.items():
        row(words, next((m[name] for m in reversed(result.metrics) if name in m), None), "")
    row("time", report["seconds"], "s")
    console = Console()
    console.print(table)
    ties = getattr(result.details, "ties", None)
    if ties is not None and bool((ties > 1).any()):
        count = int((ties > 1).sum())
        console.print(
            f"{count} states have several optimal actions; the policy takes the first, or one "
            "on the way to the end where waiting costs nothing.",
            highlight=False,
        )
    if hasattr(result.details, "bytes_exchanged"):
        print_blocks(result)
    if result.evidence.reason is not None:
        console.print(f"No evidence: {result.evidence.reason}.", highlight=False, markup=False)
    if report["evaluation"] is not None:
        print_evaluation(report["evaluation"])
    drawn = (Path(report["out"]) / "policy.png").exists()
    picture = ", with a picture: policy.png" if drawn else ""
    console.print(f"Saved in {report['out']}{picture}", highlight=False)


def print_blocks(result: InferenceResult) -> None:
    """Who solved it, where workers did, and what they told one another."""
    details = result.details
    again = f", {details.recoveries} blocks made again" if details.recoveries else ""
    Console().print(
        f"In {details.workers} blocks: {details.exchanges} exchanges, "
        f"{details.bytes_exchanged / 1e6:.3g} MB between workers, "
        f"{details.bytes_gathered / 1e6:.3g} MB to and from here{again}.",
        highlight=False,
        soft_wrap=True,
    )


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Return and length on the environment it ran on."""
    error = evaluation["standard_error"]
    spread = "" if error is None else f" ± {error:.2g} (standard error)"
    cut = evaluation["episodes_cut_by_time_limit"]
    Console().print(
        f"On {evaluation['environment']}: return {evaluation['mean_return']:.4g}{spread} over "
        f"{evaluation['episodes']} episodes of {evaluation['mean_length']:.4g} steps on average"
        + (f", {cut} of them cut by the time limit" if cut else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
