"""Run directories: tensors as safetensors, everything else in `run.json`.

A run is committed by its `run.json`, written last, which holds the SHA-256 of every other file and
of itself: a directory without one holds no run, and a file that does not match is refused. Reading
runs no code from the directory, and writing follows no link in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SAME = ("inference-rl", "torch", "numpy", "pyro-ppl", "gymnasium", "mujoco")
"""Packages whose versions the bytes of a run, and of each of its episodes, depend on."""

FORMAT_VERSION = 2
MANIFEST = "run.json"
TIMING = "timing.json"

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors calls the kinds of torch."""


_HELD: ContextVar[frozenset[tuple[int, int]]] = ContextVar("_HELD", default=frozenset())


@contextlib.contextmanager
def held(directory: Path, patience: float = 0.0) -> Iterator[int]:
    """Within this context nobody else is at work in `directory`, which exists.

    It may be held again by whoever holds it. A process that ends, however, lets go. On file systems
    without locks, as some are that machines share, nothing is held.

    :param patience: seconds that those who are at work there have to leave it.
    :returns: the handle of the directory. Processes that are given it hold the directory too, until
        the last of them is gone.
    :raises BlockingIOError: another process, or another thread, holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        status = os.fstat(handle)
        place = status.st_dev, status.st_ino
        if place in _HELD.get():
            yield handle
            return
        _lock(handle, directory, patience)
        token = _HELD.set(_HELD.get() | {place})
        try:
            yield handle
        finally:
            _HELD.reset(token)
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path, patience: float) -> None:
    import fcntl

    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            raise BlockingIOError(
                f"{directory} is in use: expected a directory that no other process works in; "
                "wait until that ends, or choose another directory with --out"
            ) from error
        except OSError:  # no locks here
            pass
        return


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
        os.close(no_link(str(probe), os.O_WRONLY | os.O_CREAT))
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
    path = Path(directory)
    if (path / MANIFEST).exists():
        raise FileExistsError(f"{path} holds another run; choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, entries in tensors.items():
        file = f"{name}.safetensors"
        files[file] = write_durably(path / file, _safetensors(entries))
    whole = {"format_version": FORMAT_VERSION, **manifest, "files": files}
    text = json.dumps(sealed(whole), indent=2, allow_nan=False)
    write_durably(path / MANIFEST, text.encode() + b"\n")


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with its own SHA-256, of all that is in it but that."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return told | {"sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time.

    Not by the package's own writer, which, depending on its version, has all of them in memory up
    to three times more, and whose errors are not those of the disk.

    :raises TypeError: the format has no word for what a tensor is made of.
    """
    import torch

    # The widest first, so that all are aligned to what they are made of.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise TypeError(
                f"{name}: expected a tensor of one of {', '.join(_DTYPES)} to save, got {kind}"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); infer again, into a new directory"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this version reads {FORMAT_VERSION}; "
            "install the version of inference-rl that wrote it"
        )
    if manifest.get("sha256") != sealed(manifest)["sha256"]:
        raise ValueError(
            f"{path} is damaged, or was edited (it is not what its SHA-256 says); infer again, "
            "into a new directory"
        )
    return manifest


def write_seconds(directory: str | Path, seconds: float) -> None:
    """Note the wall time of a run, apart from what the run determines."""
    path = claim(directory) / TIMING
    write_durably(path, json.dumps({"seconds": seconds}).encode() + b"\n")


def read_seconds(directory: str | Path) -> float:
    """The wall time of a run; 0 where it was not noted. :raises ValueError: it is damaged."""
    path = Path(directory) / TIMING
    if not path.is_file():
        return 0.0
    try:
        return float(json.loads(path.read_bytes())["seconds"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it: nothing depends on it"
        ) from error


def read_tensors(directory: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors`, if they are those that were written.

    :raises ValueError: the file is missing or is not the one that the manifest names.
    """
    import safetensors
    import safetensors.torch

    path = verified(directory, name)
    try:
        found = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no file of tensors ({error}); infer again, into a new directory"
        ) from error
    # Copies, because those that come are a view of the file, which may go away.
    return {key: value.clone() for key, value in found.items()}


def verified(directory: str | Path, name: str) -> Path:
    """The file `NAME.safetensors`, if it is the one that was written.

    :raises ValueError: it is missing or is not the one that the manifest names.
    """
    path = Path(directory) / f"{name}.safetensors"
    expected, found = read_manifest(directory)["files"].get(path.name), None
    if path.is_file():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is None or found != expected:
        raise ValueError(
            f"{path} is not the file that {MANIFEST} names (missing, damaged or exchanged); infer "
            "again, into a new directory"
        )
    return path


def versions() -> dict[str, str]:
    """Of the packages that bytes depend on, those here."""
    found = dict.fromkeys(SAME, "not installed")
    for name in SAME:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_durably(path: Path, content: bytes | Iterator[bytes | memoryview]) -> str:
    """Aside, flushed, then renamed: at every instant the old file or the new one is whole.

    :param content: in one piece, or piece by piece. :returns: its SHA-256.
    """
    aside = path.with_name(f"{path.name}.partial")
    digest = hashlib.sha256()
    with open(aside, "wb", opener=no_link) as file:
        for part in (content,) if isinstance(content, bytes) else content:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush(path.parent)
    return digest.hexdigest()


def no_link(path: str, flags: int) -> int:
    """Opens for `open`, but no link, which may lead out of the run. :raises OSError: it is one."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def flush(directory: Path) -> None:
    """Make what was created or renamed in `directory` survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
