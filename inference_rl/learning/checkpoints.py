"""Checkpoints: the whole state of a run, saved so that nothing can harm the last good one.

A checkpoint is a directory under RUN/checkpoints, named by the steps taken. It is committed by its
manifest, which is written last and holds the SHA-256 of the tensors and of itself; one without is
no checkpoint, nor is a link to one. The last two are kept while a run goes on, and the last one
once it is done. Reading one runs no code: tensors are safetensors, all else is JSON.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from inference_rl import runs

KEPT = 2


def save(run: Path, steps: int, state: Any) -> None:
    """Write `state`, a tree of dicts, lists, tensors and JSON values, as of `steps`.

    :raises OSError: it cannot be written; earlier checkpoints are as they were.
    """
    tree, tensors = pack(state)
    directory = run / "checkpoints" / f"{steps:012d}"
    if (directory / runs.MANIFEST).exists():
        try:
            _told(directory)
            runs.verified(directory, "state")
        except ValueError:
            _remove(directory)
        else:  # a state is a function of its run and its steps, but for an evaluation done or due
            return
    runs.write(directory, {"steps": steps, "state": tree}, {"state": tensors})
    runs.flush(directory.parent)
    runs.flush(run)
    keep(run, KEPT)


def keep(run: Path, count: int) -> None:
    """Remove all checkpoints but the last `count`, and what is left of saves that failed."""
    kept = _committed(run)[-count:]
    for other in (run / "checkpoints").iterdir():
        if other not in kept:
            with contextlib.suppress(OSError):  # it is in nobody's way
                _remove(other)


def _remove(directory: Path) -> None:
    if directory.is_symlink():
        directory.unlink()  # and what it leads to stays as it is
        return
    # Its manifest first: half a checkpoint must not look like one.
    (directory / runs.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def load(run: Path) -> tuple[int, Any]:
    """Steps and state of the newest checkpoint that is whole.

    :warns UserWarning: a newer one is damaged.
    :raises FileNotFoundError: there is none. :raises ValueError: all are damaged.
    """
    found = _manifests(run)
    for directory in reversed(found):
        try:
            return int(directory.name), _read(directory)
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"{directory} is skipped: {error}", stacklevel=2)
    if found:
        raise ValueError(f"{run}: every checkpoint in it is damaged; infer again, into a new run")
    raise FileNotFoundError(f"{run}: no checkpoint to resume from; infer again, into a new run")


def _read(directory: Path) -> Any:
    """:raises ValueError: it is damaged, or not the one its name says, or elsewhere."""
    if directory.is_symlink():
        raise ValueError("it is a link, and a checkpoint is within its run")
    told, tensors = _told(directory), runs.read_tensors(directory, "state")
    try:
        return unpack(told, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{directory / runs.MANIFEST} is damaged ({error!r})") from error


def _told(directory: Path) -> Any:
    """What the manifest says of the state.

    :raises ValueError: it is damaged, or not the one its name says.
    """
    manifest = runs.read_manifest(directory)
    if str(manifest.get("steps")).zfill(12) != directory.name:
        raise ValueError(f"{directory / runs.MANIFEST} is of another checkpoint")
    return manifest.get("state")


def check_same(where: Path, then: Any, now: Any) -> None:
    """Hold what a run was against what it is to be; trees of JSON values.

    :param where: what says how it was.
    :raises ValueError: they differ: another routine or version, or other settings.
    """
    if changed := _first_change(then, now):
        name, was, wanted = changed
        raise ValueError(
            f"{where} is of a run whose {name} is {was!r}, and this one's is {wanted!r}: a run is "
            "resumed as it was begun; start another in a new directory"
        )


def _first_change(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return None if then == now else (name or "setup", then, now)
    for key in [*now, *(key for key in then if key not in now)]:
        below = f"{name}.{key}" if name else key
        if changed := _first_change(then.get(key), now.get(key), below):
            return changed
    return None


def exist(run: Path) -> bool:
    """Whether there is anything to resume from."""
    return bool(_committed(run))


def _committed(run: Path) -> list[Path]:
    return [directory for directory in _manifests(run) if not directory.is_symlink()]


def _manifests(run: Path) -> list[Path]:
    """What has one, links included."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"*/{runs.MANIFEST}"))


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """`tree` as JSON that names its tensors, and the tensors, which are no copies."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach()
            return {"tensor": name}
        if isinstance(node, dict):  # keys may be numbers, as in the state of an optimiser
            return {"dict": [[key, walk(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return [walk(value) for value in node]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"checkpoint: expected a tensor or a JSON value, got {node!r}")

    return walk(tree), tensors


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given; tuples come back as lists."""
    if isinstance(tree, list):
        return [unpack(node, tensors) for node in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    return {key: unpack(node, tensors) for key, node in tree["dict"]}
