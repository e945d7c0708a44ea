"""A comparison as text: every claim with its verdict, its effects, and the numbers behind them."""

from __future__ import annotations

import math
import textwrap

from rich.console import Console
from rich.text import Text

from inference_rl.diagnostics.comparison.compare import Comparison
from inference_rl.diagnostics.comparison.findings import (
    ROUNDING,
    Cell,
    Claim,
    Effect,
    Estimate,
    Table,
)

WIDTH = 100
"""Columns, or fewer where the terminal has no more."""

INDENT = 4

GUIDES = "How good are the soft policies as guides?"

GUIDES_SAY = (
    "Their evidence lower bound, by draws and exact, beside the evidence, which the bound of a "
    "policy misses by what start and dynamics would have to wish for, with a discount also that an "
    "episode ends in time. The fewer draws count, and the larger Pareto k̂, the less p(τ, O) / q(τ) "
    "can be averaged."
)

LEARNED_GUIDES = "How good are the learned policies as guides, and do seeds agree?"

LEARNED_GUIDES_SAY = (
    "The evidence lower bound of what each learner came to at its usual rate, means over seeds: by "
    "draws, and where the model is finite also exact, beside the largest of any policy; what "
    "separates these two is the divergence from the exact policy π*. Pareto k̂ is that of the worst "
    "seed. R̂ takes seeds as chains: well above 1 they differ by more than the spread of their own "
    "episodes explains. At temperature 0 reward is no evidence, and a policy no guide."
)

STYLES = {
    "holds": "green",
    "holds in part": "green",
    "does not hold": "bold red",
    "cannot be told apart": "yellow",
    "does not apply": "yellow",
}


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison, at most `WIDTH` columns wide."""
    console = console or Console()
    width = min(WIDTH, console.width)
    for line in heading(comparison):
        for text in textwrap.wrap(line, width):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    for number, claim in enumerate(comparison.claims, start=1):
        console.print()
        for shown in lines(number, claim, width):
            console.print(shown, soft_wrap=True)
    for title, says, table in guide_tables(comparison):
        console.print()
        console.print(Text(title, style="bold"))
        for shown in [*_wrapped(says, width), *table_lines(table, width)]:
            console.print(shown, soft_wrap=True)


def guide_tables(comparison: Comparison) -> list[tuple[str, str, Table]]:
    """What policies are as guides: titles, words and tables of those that there are."""
    found = (
        (GUIDES, GUIDES_SAY, comparison.guides),
        (LEARNED_GUIDES, LEARNED_GUIDES_SAY, comparison.learned_guides),
    )
    return [(title, says, table) for title, says, table in found if table is not None]


def heading(comparison: Comparison) -> list[str]:
    """What was compared, and how many claims came to what."""
    temperatures = ", ".join(f"{t:g}" for t in comparison.temperatures)
    counts = ", ".join(f"{verdict} {count}" for verdict, count in comparison.counts.items())
    policies = "exact policies" if comparison.exact else "learned policies"
    return [
        f"Regular RL beside MaxEnt RL on {comparison.target}: {policies}, temperatures "
        f"{temperatures} (reward units), verdicts at {comparison.reference:g}, discount "
        f"{comparison.discount:g}, prior {comparison.prior}, seed {comparison.seed}",
        f"Verdicts on {len(comparison.claims)} claims: {counts}; learning by "
        f"{', '.join(comparison.learned_by)}, {comparison.seeds} seeds of "
        f"{comparison.total_steps:,} steps; {comparison.seconds:.1f} s",
    ]


def lines(number: int, claim: Claim, width: int) -> list[Text]:
    """A claim as lines of at most `width` columns."""
    title = f"{number}. {claim.title}"
    gap = max(1, width - len(title) - len(claim.verdict))
    first = Text(f"{title}{' ' * gap}", style="bold")
    first.append(claim.verdict, style=STYLES[claim.verdict])
    shown = [first, *_wrapped(f"Claim: {claim.says}", width)]
    shown += _wrapped(claim.measured, width, style="dim") if claim.measured else []
    if claim.why:
        shown += _wrapped(claim.why, width)
    for effect in claim.effects:
        shown += _wrapped(effect_words(effect), width, style=STYLES[effect.verdict], hanging=2)
    if claim.table is not None:
        shown += table_lines(claim.table, width)
    if claim.remark:
        shown += _wrapped(claim.remark, width)
    return shown


def effect_words(effect: Effect) -> str:
    """An effect with its interval and its verdict."""
    return f"{effect.verdict}: {effect.name}: {shown_estimate(effect.estimate)} {effect.unit}"


def shown_estimate(estimate: Estimate) -> str:
    """A number, with the limits of its interval where it has one."""
    value = figures(estimate.value)
    if estimate.exact:
        return f"{value} (exact)"
    if not math.isfinite(estimate.low):
        return f"{value} (no interval)"
    return f"{value} [{figures(estimate.low)}, {figures(estimate.high)}]"


def figures(value: float) -> str:
    """A number to four figures, or to all of a whole one, as a count of steps is."""
    return f"{value:.0f}" if 1e4 - 0.5 <= abs(value) < 1e9 else f"{value:.4g}"


def table_lines(table: Table, width: int) -> list[Text]:
    """A table in columns, without intervals where there is no room for them."""
    room = width - INDENT
    for with_interval in (True, False):
        body = [tuple(cell(value, with_interval) for value in row) for row in table.rows]
        sizes = [max(map(len, column)) for column in zip(*body, strict=True)]
        words = [max(map(len, column.split())) for column in table.columns]
        sizes = [max(pair) for pair in zip(sizes, words, strict=True)]
        if sum(sizes) + 2 * (len(sizes) - 1) <= room:
            break
    for _ in range(room - sum(sizes) - 2 * (len(sizes) - 1)):  # room for the longest headings
        heights = [len(textwrap.wrap(n, s)) for n, s in zip(table.columns, sizes, strict=True)]
        if max(heights) > 1:
            sizes[heights.index(max(heights))] += 1
    heads = [textwrap.wrap(name, size) for name, size in zip(table.columns, sizes, strict=True)]
    height = max(map(len, heads))
    heads = [[""] * (height - len(lines)) + lines for lines in heads]
    rows = [(row, "dim") for row in zip(*heads, strict=True)] + [(row, "") for row in body]
    return [Text(" " * INDENT + _aligned(row, sizes), style=style) for row, style in rows]


def _aligned(row: tuple[str, ...], sizes: list[int]) -> str:
    first = row[0].ljust(sizes[0])
    return "  ".join(
        [first, *(text.rjust(size) for text, size in zip(row[1:], sizes[1:], strict=True))]
    )


def cell(value: Cell, with_interval: bool = True) -> str:
    """A number as a table shows it: half its interval after it."""
    if isinstance(value, str):
        return value
    shown = figures(value.value)
    if value.exact or not math.isfinite(value.low) or not with_interval:
        return shown
    half = (value.high - value.low) / 2
    if half <= ROUNDING * abs(value.value):
        return f"{shown} ± 0"
    return f"{shown} ± {half:.0f}" if 100 <= half < 1e9 else f"{shown} ± {half:.2g}"


def _wrapped(text: str, width: int, *, style: str = "", hanging: int = 0) -> list[Text]:
    found = textwrap.wrap(
        text,
        width,
        initial_indent=" " * INDENT,
        subsequent_indent=" " * (INDENT + hanging),
        break_on_hyphens=False,
    )
    return [Text(line, style=style) for line in found]
