"""Run directories: tensors as safetensors, everything else in `run.json`.

A run is committed by its `run.json`, written last, which holds the SHA-256 of every other file:
a directory without one holds no run, and a file that does not match is refused. Reading runs no
code from the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "run.json"
TIMING = "timing.json"


def claim(directory: str | Path) -> Path:
    """`directory`, made if need be, and checked to be writable and free for a run.

    :raises FileExistsError: it holds another run, or is a file. :raises OSError: not writable.
    """
    path = Path(directory)
    if (path / MANIFEST).exists():
        raise FileExistsError(f"{path} holds another run; choose another directory with --out")
    return directory_for(path)


def directory_for(path: Path) -> Path:
    """`path`, made if need be, and checked to be writable.

    :raises FileExistsError: it is a file. :raises OSError: not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise FileExistsError(f"{path} is a file; choose another directory with --out") from error
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}); choose another directory with --out"
        ) from error
    return path


def write(
    directory: str | Path, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """Write a run: each entry of `tensors` as `NAME.safetensors`, then the manifest.

    :raises FileExistsError: the directory holds another run. :raises OSError: not writable.
    """
    import safetensors.torch

    path = Path(directory)
    if (path / MANIFEST).exists():
        raise FileExistsError(f"{path} holds another run; choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, entries in tensors.items():
        content = safetensors.torch.save({k: v.contiguous() for k, v in entries.items()})
        write_durably(path / f"{name}.safetensors", content)
        files[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
    whole = {"format_version": FORMAT_VERSION, **manifest, "files": files}
    text = json.dumps(whole, indent=2, allow_nan=False)
    write_durably(path / MANIFEST, text.encode() + b"\n")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The contents of `run.json`.

    :raises FileNotFoundError: no run there. :raises ValueError: it is damaged, or was written by a
        newer version.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no saved run in {directory}: expected the file {MANIFEST} there")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); infer again, into a new directory"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this version reads {FORMAT_VERSION}; "
            "install the version of inference-rl that wrote it"
        )
    return manifest


def write_seconds(directory: str | Path, seconds: float) -> None:
    """Note the wall time of a run, apart from what the run determines."""
    path = claim(directory) / TIMING
    write_durably(path, json.dumps({"seconds": seconds}).encode() + b"\n")


def read_seconds(directory: str | Path) -> float:
    """The wall time of a run; 0 where it was not noted."""
    path = Path(directory) / TIMING
    return float(json.loads(path.read_bytes())["seconds"]) if path.is_file() else 0.0


def read_tensors(directory: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors`, if they are those that were written.

    :raises ValueError: the file is missing or is not the one that the manifest names.
    """
    import safetensors.torch

    path = Path(directory) / f"{name}.safetensors"
    expected = read_manifest(directory)["files"].get(path.name)
    content = path.read_bytes() if path.is_file() else b""
    if expected is None or hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(
            f"{path} is not the file that {MANIFEST} names (missing, damaged or exchanged); infer "
            "again, into a new directory"
        )
    return safetensors.torch.load(content)


def write_durably(path: Path, content: bytes) -> None:
    """Aside, flushed, then renamed: at every instant the old file or the new one is whole."""
    aside = path.with_name(f"{path.name}.partial")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush(path.parent)


def flush(directory: Path) -> None:
    """Make what was created or renamed in `directory` survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
