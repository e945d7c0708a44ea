"""A sweep for people: its trials as a table, best first, and the command for the best."""

from __future__ import annotations

import collections
import math
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from inference_rl.search_spaces import text_of
from inference_rl.sweeping.results import TABLE, SweepResult, TrialResult
from inference_rl.sweeping.statistics import LEVEL

MOST_ROWS = 20
"""Of the table; the others are in the file."""


def print_sweep(result: SweepResult) -> None:
    console = Console()

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    plan = result.plan
    name = (plan.setup["origin"] or {}).get("target") or plan.setup["model"]
    table = Table(title=f"{name}: {plan.setup['routine']}", title_justify="left")
    for column in ("trial", "score", f"{LEVEL:.0%} interval"):
        table.add_column(column, justify="right", overflow="fold")
    for column in plan.search:
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")
    ordered = sorted(result.trials, key=_place)
    for trial in ordered[:MOST_ROWS]:
        tried = [_short(trial.settings[c]) if c in trial.settings else "" for c in plan.search]
        table.add_row(str(trial.number), *_scored(trial), *tried)
    console.print(table)
    if len(ordered) > MOST_ROWS:
        say(f"and {len(ordered) - MOST_ROWS} more, which are in the file.")
    counts = [f"{len(result.of(s))} {s}" for s in ("complete", "pruned", "failed") if result.of(s)]
    seeds = plan.run_seeds
    runs = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    say(
        f"{len(result.trials)} trials ({', '.join(counts)}), each of {runs}. Score: interquartile "
        f"mean over seeds of the mean return of {plan.setup['episodes']} episodes, actions drawn, "
        "not discounted."
    )
    for why, trials in _reasons(result).items():
        say(f"Failed: {', '.join(map(str, trials))}: {why}")
    best = result.best
    if best is None:
        say("No trial was completed, so there is no best one.")
    elif plan.setup["origin"] is not None:
        say(f"The best is trial {best.number}; its first run is repeated by:")
        say(f"  {result.command(best, seeds[0])}")
        say("It was chosen on these seeds: how good it is, others tell.")
    where = shlex.quote(str(result.directory))
    say(f"Saved in {where}, with all trials in {TABLE} and a picture: sweep.png")


def _place(trial: TrialResult) -> tuple[Any, ...]:
    order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
    return order[trial.state], -(trial.score or 0.0), trial.number


def _scored(trial: TrialResult) -> tuple[str, str]:
    if trial.score is None:
        return trial.state, ""
    if trial.interval is None:
        return f"{trial.score:.4g}", "one run"
    low, high = trial.interval
    return f"{trial.score:.4g}", f"{low:.4g} to {high:.4g}"


def _short(value: Any) -> str:
    is_number = isinstance(value, float) and math.isfinite(value)
    return f"{value:.3g}" if is_number else text_of(value)


def _reasons(result: SweepResult) -> dict[str, list[int]]:
    found: dict[str, list[int]] = collections.defaultdict(list)
    for trial in result.of("failed"):
        found[trial.why or "for a reason that was not noted"].append(trial.number)
    return found
