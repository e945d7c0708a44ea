"""Time `SAC` beside Stable-Baselines3 and SBX on HalfCheetah-v5, at equal settings.

All have two hidden layers of 256, batches of 256, one update for every environment step, and one
environment, which is part of what is timed. Each side runs in a process of its own, in turn; what
is timed begins after `--warm-up` steps, and so after all compiling. Stable-Baselines3 runs with one
thread and with two, and counts with the faster of them. The ratios printed are medians of the
rounds' ratios.

    python tests/benchmarks/off_policy_speed.py [--rounds 5] [--peers sb3 sbx]

With `--limit` it times instead the update alone beside the matrix products in it, which nothing
that computes them can beat: of each layer one forward, one for the gradient of its inputs where
that is needed, one for that of its weights. With `--stored N` it times steps after so many stored
transitions beside those after few.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from statistics import median

OURS = """
import time, torch
from inference_rl import SAC, load_target
from inference_rl.inference import sac
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments
model = load_target("HalfCheetah-v5")
torch.manual_seed(0)
torch.set_num_threads(1)  # as `infer` does
settings = SAC(compile="{compile}", warmup_steps=256, side_by_side={side_by_side})
learner = sac._learner(settings, model, model.action_prior)
collector = Collector(environments(model, 1), 0)
def go(steps):
    start = time.perf_counter()
    for _ in range(steps):
        {{name: float(value) for name, value in learner.update(learner.collect(collector)).items()}}
    return steps / (time.perf_counter() - start)
go(256 + {warm_up})
"""

STEPS = "print(go({steps}))"

STORED = """
def fill(count):
    data = collector.collect(learner.policy, 1000)
    learner.replay = type(learner.replay)(count, dtype=torch.float32)
    for _ in range(count // 1000):
        learner.replay.add(data)
few, many = [], []
for _ in range({rounds}):
    fill(1000)
    few.append(go({steps}))
    fill({stored})
    many.append(go({steps}))
ratios = sorted(b / a for a, b in zip(few, many))
print("steps/s after 1,000 and after {stored} stored transitions:", [round(x) for x in few],
      [round(x) for x in many], "median ratio", round(ratios[len(ratios) // 2], 3))
"""

LIMIT = """
def milliseconds(function, count=60):
    best = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        best.append(time.perf_counter() - start)
    return 1e3 * sorted(best)[count // 2]
torch.set_num_threads(1)
state, hidden, action, batch = 17, 256, 6, 256
def product(rows, inner, columns, twin):
    a, b = torch.randn(twin, rows, inner), torch.randn(twin, inner, columns)
    out = torch.empty(twin, rows, columns)
    return lambda: torch.bmm(a, b, out=out)
def network(inputs, outputs, twin):
    return [(inputs, hidden, twin), (hidden, hidden, twin), (hidden, outputs, twin)]
guide, q = network(state, 2 * action, 1), network(state + action, 1, 2)
forward = lambda layers: [product(batch, i, o, t) for i, o, t in layers]
weights = lambda layers: [product(i, batch, o, t) for i, o, t in layers]
inputs = lambda layers: [product(batch, o, i, t) for i, o, t in layers]
# Q: guide and lagging Q forward, Q forward and backward. Guide: itself and Q forward and backward,
# but for the weights of Q.
products = forward(guide) + forward(q) + forward(q) + weights(q) + inputs(q[1:])
products += forward(guide) + forward(q) + inputs(q) + weights(guide) + inputs(guide[1:])
def limit():
    for one in products:
        one()
updating, least = [], []
for _ in range({rounds}):
    updating.append(milliseconds(learner._update))
    least.append(milliseconds(limit))
shares = sorted(b / a for a, b in zip(updating, least))
print("update ms", [round(x, 2) for x in updating], "its matrix products, one thread, ms",
      [round(x, 2) for x in least], "median share", round(shares[len(shares) // 2], 3))
"""

THEIRS = """
import os, time
import gymnasium
from {module} import SAC
model = SAC("MlpPolicy", gymnasium.make("HalfCheetah-v5"), learning_starts=256, seed=0, **{extra})
model.learn(256 + {warm_up})
start = time.perf_counter()
model.learn({steps}, reset_num_timesteps=False)
print({steps} / (time.perf_counter() - start))
"""

PEERS = {
    "sb3": ("stable_baselines3", '{"device": "cpu"}', ["1", "2"]),
    "sbx": ("sbx", "{}", [""]),
}


def output(python: str, code: str, threads: str = "") -> str:
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)
    if threads:
        environment["OMP_NUM_THREADS"] = threads
    run = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    if run.returncode:
        sys.exit(run.stderr)
    return run.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument("--compile", default="on", choices=["on", "off"])
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--stored", type=int)
    options = parser.parse_args()
    numbers = vars(options) | {"side_by_side": not options.in_turn}
    ours = OURS.format(**numbers)
    if options.limit or options.stored:
        print(output(sys.executable, ours + (LIMIT if options.limit else STORED).format(**numbers)))
        return
    rates: dict[str, list[float]] = {"ours": [], **{name: [] for name in options.peers}}
    for _ in range(options.rounds):
        rates["ours"].append(float(output(sys.executable, ours + STEPS.format(**numbers))))
        for name in options.peers:
            module, extra, threads = PEERS[name]
            code = THEIRS.format(module=module, extra=extra, **numbers)
            found = [float(output(options.peer_python, code, count)) for count in threads]
            rates[name].append(max(found))
        print("steps/s:", {name: round(found[-1], 1) for name, found in rates.items()}, flush=True)
    for name in options.peers:
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        print(f"ours / {name}: median of ratios {median(ratios):.2f} ({ratios})")


if __name__ == "__main__":
    main()
