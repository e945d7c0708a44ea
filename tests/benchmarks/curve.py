"""The curve of a run on HalfCheetah-v5, beside what others published after a million steps.

    inference-rl infer HalfCheetah-v5 sac --total-steps 300000 --evaluate-every 10000 --compile on \
        --no-side-by-side --out RUN
    python tests/benchmarks/curve.py RUN --out tests/benchmarks/halfcheetah.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

PUBLISHED = [
    ("SAC, SimbaV2's table (v4, 10 seeds)", 11321, 1108),
    ("SAC, CleanRL (v4, 3 seeds, training return)", 9635, 1424),
]
"""What it is, and its mean and spread after 1,000,000 steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curve.png"))
    options = parser.parse_args()
    lines = (options.run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["steps"] / 1000 for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, colour in (
        ("deterministic", "most likely actions", "tab:blue"),
        ("stochastic", "actions drawn", "tab:orange"),
    ):
        means = [row[name]["mean_return"] for row in rows]
        errors = [row[name]["standard_error"] for row in rows]
        low, high = zip(*[(m - e, m + e) for m, e in zip(means, errors, strict=True)], strict=True)
        axes.plot(steps, means, color=colour, label=f"sac, one seed, {label}")
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
        print(f"{label}: {means[-1]:.0f} ± {errors[-1]:.0f} after {rows[-1]['steps']:,} steps")
    for (label, mean, spread), colour in zip(PUBLISHED, ("0.35", "0.65"), strict=True):
        axes.errorbar([1000], [mean], [spread], fmt="o", color=colour, capsize=4, label=label)
    axes.set(
        xlabel="environment steps, thousands", ylabel="return", xlim=(0, 1040), ylim=(-800, None)
    )
    axes.set_title("HalfCheetah-v5, mean of 10 episodes, standard error shaded", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
