"""Checkpoints come back as they were, and no fault of the disk harms the last good one."""

from __future__ import annotations

import builtins
import errno
import os
import pathlib
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from inference_rl import runs
from inference_rl.learning import checkpoints


def state(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)
    optimiser = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    return {
        "layer": layer.state_dict(),
        "optimiser": optimiser.state_dict(),
        "nested": [
            1,
            0.1,
            None,
            True,
            "word",
            [torch.arange(3), torch.zeros(0), torch.tensor(True)],
        ],
    }


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_round_trip(tmp_path) -> None:
    checkpoints.save(tmp_path, 10, state())
    steps, found = checkpoints.load(tmp_path)
    assert steps == 10
    assert same(state(), found)


def test_what_is_no_tensor_and_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a tensor or a JSON value"):
        checkpoints.pack({"x": object()})


KINDS = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
KINDS += ["uint64", "uint32", "uint16", "uint8", "bool"]


def test_files_of_tensors_are_those_that_the_package_reads(tmp_path) -> None:
    some = (torch.arange(6) % 5).reshape(2, 3)
    tensors = {kind: some.to(getattr(torch, kind)) for kind in KINDS}
    tensors |= {"turned": some.T, "again": some, "none": some[:0], "scalar": some[0, 1]}
    runs.write(tmp_path, {}, {"it": tensors, "nothing": {}})
    found = safetensors.torch.load_file(tmp_path / "it.safetensors")
    assert same(dict(sorted(tensors.items())), dict(sorted(found.items())))
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    assert safetensors.torch.load_file(tmp_path / "nothing.safetensors") == {}
    with pytest.raises(TypeError, match=r"^x: expected a tensor of one of .*, got complex64"):
        runs.write(tmp_path / "other", {}, {"it": {"x": some.to(torch.complex64)}})


def memory_in_kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells")
def test_saving_holds_nothing_twice(tmp_path) -> None:
    whole = {"rows": torch.ones(2**26, dtype=torch.uint8), "others": torch.ones(3)}
    for _ in range(2):  # the second time it is there already, and is only looked at
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
        before = memory_in_kilobytes("VmRSS")
        checkpoints.save(tmp_path, 1, whole)
        assert memory_in_kilobytes("VmHWM") - before < 2**14
    assert same(checkpoints.load(tmp_path), (1, whole))


def test_the_last_two_are_kept(tmp_path) -> None:
    for steps in (1, 2, 3, 4):
        checkpoints.save(tmp_path, steps, state(steps))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3, 4]


def test_nothing_to_load(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        checkpoints.load(tmp_path)


FAULTS = [
    (os, "open"),
    (os, "fsync"),
    (os, "replace"),
    (builtins, "open"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "unlink"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize(("where", "name"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_at_any_file_operation_leaves_the_last_good_one(
    tmp_path, monkeypatch: pytest.MonkeyPatch, where, name: str
) -> None:
    original = getattr(where, name)
    for nth in range(1, 20):
        run = tmp_path / str(nth)
        checkpoints.save(run, 1, state(1))
        checkpoints.save(run, 2, state(2))
        calls = 0

        def failing(*given, nth=nth, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*given, **options)

        monkeypatch.setattr(where, name, failing)
        try:
            checkpoints.save(run, 3, state(3))
            saved = True
        except OSError:
            saved = False
        monkeypatch.undo()
        steps, found = checkpoints.load(run)
        assert steps in ((3,) if saved else (2, 3))
        assert same(found, state(steps))
        checkpoints.save(run, 4, state(4))
        assert checkpoints.load(run)[0] == 4
        assert len(list((run / "checkpoints").iterdir())) == 2
        if calls < nth:
            return
    pytest.fail("more file operations than were tried")


def test_damage_falls_back_to_the_one_before(tmp_path) -> None:
    checkpoints.save(tmp_path, 1, state(1))
    checkpoints.save(tmp_path, 2, state(2))
    newest = tmp_path / "checkpoints" / f"{2:012d}"
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for end in range(0, len(content) - 1, max(1, len(content) // 200)):
            file.write_bytes(content[:end])
            with pytest.warns(UserWarning, match="is skipped"):
                steps, found = checkpoints.load(tmp_path)
            assert steps == 1
            assert same(found, state(1))
        file.write_bytes(content)
    assert checkpoints.load(tmp_path)[0] == 2


def test_flipped_bits_are_found(tmp_path) -> None:
    checkpoints.save(tmp_path, 1, state(1))
    file = tmp_path / "checkpoints" / f"{1:012d}" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ValueError, match="every checkpoint in it is"),
    ):
        checkpoints.load(tmp_path)
