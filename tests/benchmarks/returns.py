"""Returns of learned policies on real environments: one line a seed, then mean and standard error.

    python tests/benchmarks/returns.py CartPole-v1 policy-gradient --seeds 5 -- --total-steps 200000

What follows `--` goes to `inference-rl infer`. Each policy is evaluated over `--episodes` of the
real environment, with actions drawn and with the most likely ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("routine")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--episodes", default="100", help="of an evaluation")
    options, given = parser.parse_known_args()
    given = [word for word in given if word != "--"]
    command = Path(sys.executable).with_name("inference-rl")
    totals: dict[str, list[float]] = {"drawn": [], "most likely": []}
    for seed in range(options.first, options.first + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            infer = [command, "infer", options.target, options.routine, "--seed", str(seed)]
            inferred = _json([*infer, "--out", run, "--episodes", options.episodes, *given])
            evaluate = [command, "evaluate", run, "--episodes", options.episodes]
            likely = _json([*evaluate, "--deterministic"])
        returns = [report["evaluation"]["mean_return"] for report in (inferred, likely)]
        for name, value in zip(totals, returns, strict=True):
            totals[name].append(value)
        words = ", ".join(f"{n} {v:.1f}" for n, v in zip(totals, returns, strict=True))
        print(f"seed {seed}: {words}, {inferred['seconds']:.0f} s", flush=True)
    for name, values in totals.items():
        spread = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{name}: {mean(values):.1f} ± {spread:.1f} (standard error over seeds)")


def _json(words: list[object]) -> dict[str, object]:
    run = subprocess.run(
        [*map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout)


if __name__ == "__main__":
    main()
