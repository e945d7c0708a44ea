"""How much memory there is left to take."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Where control groups, of version 2 and of 1, say what they allow, what is taken, and how much of
that are cached files that nobody uses."""


def available(device: str = "cpu") -> int | None:
    """Bytes that can still be taken on `device`; None where nobody says.

    On Linux what the kernel counts as available, and no more than the control group allows. Both
    count cached files that nobody uses as free, for they give way.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, taken, statistics, cached in _FILES:
        try:
            left = int((_GROUP / limit).read_text()) - int((_GROUP / taken).read_text())
            counts = dict(line.split() for line in (_GROUP / statistics).read_text().splitlines())
            found.append(left + int(counts.get(cached, 0)))
        except (OSError, ValueError):  # no such group, or no limit
            pass
    return min(found, default=None)
