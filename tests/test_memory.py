"""What counts as free memory, by what the kernel and control groups write about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference_rl.learning import memory

MIB = 2**20


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 900 MiB to spare, and no control group yet."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {900 * 1024} kB\n")
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


def test_the_kernel_is_believed_where_no_group_sets_a_limit(told: Path) -> None:
    assert memory.available() == 900 * MIB
    (told / "memory.max").write_text("max\n")
    (told / "memory.current").write_text(f"{500 * MIB}\n")
    (told / "memory.stat").write_text(f"inactive_file {400 * MIB}\n")
    assert memory.available() == 900 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_allows_what_is_not_taken_and_what_is_cached_and_unused(
    told: Path, version: int
) -> None:
    limit, taken, cached = {
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    statistics = told / Path(limit).parent / "memory.stat"
    (told / limit).write_text(f"{1000 * MIB}\n")
    (told / taken).write_text(f"{800 * MIB}\n")
    statistics.write_text(f"anon 1\nactive_file {MIB}\n{cached} {300 * MIB}\n")
    assert memory.available() == 500 * MIB
    (told / limit).write_text(f"{9000 * MIB}\n")
    assert memory.available() == 900 * MIB


def test_nobody_says(told: Path) -> None:
    (told / "meminfo").unlink()
    assert memory.available() is None
