"""Time what it takes to save and to load a run of `SAC` on HalfCheetah-v5 with a full replay.

One process fills the replay with collected transitions and saves the state of the learner as a
checkpoint, another one loads it, and they print seconds, flushing to the disk included, and the
most memory that was taken at any time, beside that which was there before: of both, since what
reads a file counts the part of it that the kernel keeps anyway, also without that. Linux only.

    python tests/benchmarks/replay_checkpoint.py [--transitions 1000000] [--directory DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

LEARNER = """
import threading, time
from pathlib import Path
import torch
from inference_rl import SAC, load_target
from inference_rl.inference import sac
from inference_rl.inference.off_policy import ByPrior
from inference_rl.learning import checkpoints
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments
torch.set_num_threads(1)  # as `infer` does
run, count = Path({directory!r}), {transitions}
model = load_target("HalfCheetah-v5")
torch.manual_seed(0)
settings = SAC(compile="off", replay_capacity=count)
learner = sac._learner(settings, model, model.action_prior)
def taken():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    return [int(found[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")]
def watched(words, function):
    most, over = [0.0, 0.0], False
    def watch():
        nonlocal most
        while not over:
            most = [max(pair) for pair in zip(most, taken())]
            time.sleep(0.001)
    watcher, before, start = threading.Thread(target=watch), taken(), time.perf_counter()
    watcher.start()
    function()
    seconds, over = time.perf_counter() - start, True
    watcher.join()
    more = [a - b for a, b in zip(most, before)]
    print(f"{{words}}: {{seconds:.2f}} s, {{more[0]:.0f}} MiB of memory at worst, "
          f"{{more[1]:.0f}} MiB of them not the kernel's copy of a file")
"""

SAVE = """
data = Collector(environments(model, 1), 0).collect(ByPrior(learner.prior), 1000)
for _ in range(count // 1000):
    learner.replay.add(data)
size = sum(ring.nbytes for ring in learner.replay._ring.values()) / 2**20
print(f"{{count:,}} transitions: {{size:.0f}} MiB")
watched("save", lambda: checkpoints.save(run, count, learner.state_dict()))
"""

LOAD = """
watched("load", lambda: learner.load_state_dict(checkpoints.load(run)[1]))
assert learner.replay._stored == count
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--directory", help="on the disk to be timed; default: temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        numbers = {"directory": directory, "transitions": options.transitions}
        for part in (SAVE, LOAD):
            code = (LEARNER + part).format(**numbers)
            subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
