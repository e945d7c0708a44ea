"""What comes of saved runs that were damaged, or made to do harm, watched by an audit hook.

`python tests/damage.py FOLDER [EVERY]` damages a small checkpoint and a small run in every EVERYth
byte, and in ways that somebody may think of. Each time it is the same as before that is loaded, or
the checkpoint before, with a warning that says so, or nothing, with an error that has a name.
Nothing else happens meanwhile: no code of data is compiled, executed or unpickled, no module is
imported, no other file opened, no socket or process. Prints how often which was the outcome.
"""

from __future__ import annotations

import builtins
import collections
import hashlib
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from inference_rl import Exact, InferenceResult, infer, runs
from inference_rl.finite import FiniteModel
from inference_rl.learning import checkpoints

FORBIDDEN = ("exec", "compile", "import", "pickle.", "marshal.", "code.", "ctypes.", "cpython.")
FORBIDDEN += ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.")
FORBIDDEN += ("socket.", "urllib.", "http.", "ftplib.", "shutil.", "os.remove", "os.rename")

State = dict[str, Any]
seen: list[str] = []


class Watch:
    """Within it, what happens is noted in `seen`."""

    folder: Path
    is_on = False

    def __enter__(self) -> None:
        Watch.is_on = True

    def __exit__(self, *raised: Any) -> None:
        Watch.is_on = False

    @classmethod
    def hook(cls, event: str, given: tuple[Any, ...]) -> None:
        if not cls.is_on:
            return
        outside = False
        if event == "open":
            path, _, flags = given
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            outside = writes or not str(path).startswith(f"{cls.folder}/")
        if outside or event.startswith(FORBIDDEN):
            seen.append(f"{event} {given!r}"[:300])


def state(steps: int) -> State:
    return {
        "learner": {"table": torch.arange(3) + steps, 7: [0.1, None, True]},
        "word": "a" * steps,
    }


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)


def loaded_checkpoint(run: Path) -> str:
    """What came of loading: "same", "the one before" or "refused"."""
    said = ""
    with warnings.catch_warnings(record=True) as caught, Watch():
        warnings.simplefilter("always")
        try:
            steps, found = checkpoints.load(run)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
    if said:
        assert said.startswith(f"{run}: every checkpoint in it is damaged; "), said
        return "refused"
    assert same(found, state(steps)), (steps, found)
    if steps == 2:
        assert not caught
        return "same"
    assert all(" is skipped: " in str(warning.message) for warning in caught)
    assert caught
    return "the one before"


def loaded_run(run: Path) -> str:
    said = ""
    with Watch():
        try:
            result = InferenceResult.load(run)
            found = result.summary(), result.policy.state_dict(), result.q, result.model.tensors()
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
    if said:
        assert said.startswith(f"{run}/")
        assert "is damaged" in said or " is not the file " in said, said
        return "refused"
    assert same(found[1:], expected_run[1:])
    left, right = (x[0] | {"seconds": 0} for x in (found, expected_run))
    assert same(left, right)
    return "same"


def damaged(content: bytes, every: int, rng: random.Random) -> Iterator[bytes]:
    """Cut off before each byte, and with a bit of each flipped."""
    for place in range(rng.randrange(every), len(content), every):
        yield content[:place]
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def each_damage(
    folder: Path, load: Callable[[Path], str], run: Path, every: int
) -> collections.Counter[str]:
    found, rng = collections.Counter[str](), random.Random(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for changed in damaged(content, every, rng):
            file.write_bytes(changed)
            found[load(run)] += 1
        file.write_bytes(content)
    assert load(run) == "same"
    return found


# ------------------------------------------------------------------ what somebody may think of


def newest(run: Path) -> Path:
    return run / f"checkpoints/{2:012d}"


def resealed(run: Path, **changes: Any) -> None:
    """Change the manifest, and let it hold the SHA-256 that this needs."""
    path = newest(run) / "run.json"
    path.write_text(json.dumps(runs.sealed(json.loads(path.read_bytes()) | changes)))


def replaced(run: Path, content: bytes) -> None:
    """Other tensors, of which the manifest says that they are right."""
    (newest(run) / "state.safetensors").write_bytes(content)
    resealed(run, files={"state.safetensors": hashlib.sha256(content).hexdigest()})


def header(size: int, text: bytes) -> bytes:
    return size.to_bytes(8, "little") + text


def exchanged(run: Path, name: str) -> None:
    left, right = run / f"checkpoints/{1:012d}/{name}", newest(run) / name
    shutil.copy(left, right)


def linked(run: Path, name: str, to: str) -> None:
    path = newest(run) / name
    path.unlink()
    path.symlink_to(to)


def renamed(run: Path) -> None:
    one, two = run / f"checkpoints/{1:012d}", newest(run)
    one.rename(run / "aside")
    two.rename(one)
    (run / "aside").rename(two)


def linked_directory(run: Path) -> None:
    newest(run).rename(run.parent / "elsewhere")
    newest(run).symlink_to(run.parent / "elsewhere")


TENSOR = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
ATTACKS: dict[str, Callable[[Path], None]] = {
    "tensors of another checkpoint": lambda run: exchanged(run, "state.safetensors"),
    "manifest of another checkpoint": lambda run: exchanged(run, "run.json"),
    "names exchanged": renamed,
    "names above the run": lambda run: resealed(run, files={"../../../../etc/passwd": "0" * 64}),
    "names of the root": lambda run: resealed(run, files={"/etc/passwd": "0" * 64}),
    "steps above the run": lambda run: resealed(run, steps="../../elsewhere"),
    "steps that are none": lambda run: resealed(run, steps=None),
    "no state": lambda run: resealed(run, state=None, files={}),
    "files that are a list": lambda run: resealed(run, files=[]),
    "a tensor above the run": lambda run: resealed(run, state={"tensor": "../policy"}),
    "a tensor without a name": lambda run: resealed(run, state={"tensor": {}}),
    "neither tensor nor dict": lambda run: resealed(run, state={"class": "os.system"}),
    "keys that are lists": lambda run: resealed(run, state={"dict": [[[], 1]]}),
    "a newer version": lambda run: resealed(run, format_version=runs.FORMAT_VERSION + 1),
    "an older version": lambda run: resealed(run, format_version=runs.FORMAT_VERSION - 1),
    "not sealed": lambda run: (newest(run) / "run.json").write_text('{"format_version": 2}'),
    "a manifest without an end": lambda run: (newest(run) / "run.json").write_text("[" * 10**6),
    "a manifest that is deep": lambda run: (newest(run) / "run.json").write_text(
        '{"a":' * 10**5 + "1" + "}" * 10**5
    ),
    "a number without an end": lambda run: (newest(run) / "run.json").write_text("1" * 10**6),
    "a huge header": lambda run: replaced(run, header(2**60, b"{}")),
    "a header as large as a word": lambda run: replaced(run, header(2**64 - 1, b"{}")),
    "a header that is too large": lambda run: replaced(run, header(10**8 + 1, b" " * 100)),
    "no header": lambda run: replaced(run, b""),
    "a header that is no JSON": lambda run: replaced(run, header(3, b"\x80\x04.")),
    "tensors beyond the end": lambda run: replaced(
        run, header(len(text := json.dumps({"0": TENSOR | {"shape": [2**60]}}).encode()), text)
    ),
    "tensors of a kind that there is not": lambda run: replaced(
        run, header(len(text := json.dumps({"0": TENSOR | {"dtype": "X"}}).encode()), text)
    ),
    "a pickle": lambda run: replaced(
        run, b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01:\x85R."
    ),
    "a link out of the run": lambda run: linked(run, "state.safetensors", "/etc/passwd"),
    "a link to a device": lambda run: linked(run, "state.safetensors", "/dev/zero"),
    "a manifest that is a device": lambda run: linked(run, "run.json", "/dev/zero"),
    "a manifest that is a directory": lambda run: linked(run, "run.json", "/etc"),
    "a directory that is a link": linked_directory,
}


def main(folder: Path, every: int) -> None:
    global expected_run
    Watch.folder = folder
    run = folder / "learned"
    for steps in (1, 2):
        checkpoints.save(run, steps, state(steps))
    exact = folder / "exact"
    tables = FiniteModel.from_tables(
        torch.tensor([[[0.5, 0.5], [1.0, 0.0]]] * 2, dtype=torch.float64),
        torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64),
        discount=0.5,
    )
    infer(tables, Exact(temperature=1.0)).save(exact)
    result = InferenceResult.load(exact)  # whatever is imported for it is imported now
    expected_run = (
        result.summary(), result.policy.state_dict(), result.q, result.model.tensors()
    )  # fmt: skip
    assert checkpoints.load(run)[0] == 2
    sys.addaudithook(Watch.hook)

    with Watch():  # and the watch sees what it is to see
        compile("1", "data", "eval")
        open(os.devnull).close()
    assert len(seen) == 2, seen
    seen.clear()

    told = {
        "checkpoint": each_damage(newest(run), loaded_checkpoint, run, every),
        "run": each_damage(exact, loaded_run, exact, 5 * every),
        "attack": collections.Counter(),
    }
    for name, attack in ATTACKS.items():
        struck = folder / "struck" / "run"
        shutil.copytree(run, struck)
        attack(struck)
        outcome = loaded_checkpoint(struck)
        assert outcome in ("the one before", "refused"), name
        told["attack"][outcome] += 1
        shutil.rmtree(struck.parent)
    if seen:
        builtins.print(*sorted(set(seen)), sep="\n", file=sys.stderr)
        raise SystemExit(1)
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
