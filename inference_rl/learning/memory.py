"""How much memory there is left to take."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available(device: str = "cpu") -> int | None:
    """Bytes that can still be taken on `device`; None where nobody says.

    On Linux what the kernel counts as available, and no more than the control group allows.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        limit = int((_GROUP / "memory.max").read_text())
        found.append(limit - int((_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no group, or no limit
        pass
    return min(found, default=None)
