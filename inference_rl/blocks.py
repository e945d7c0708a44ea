"""`in_blocks`: arithmetic whose last bit does not depend on the size of the batch.

A matrix product groups its sums by the size of its operands, so that the same row comes out
otherwise in a batch of 3 than in one of 64, and an unstable environment soon elsewhere. In batches
of one size it comes out the same, whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64
"""Rows at a time."""


def in_blocks(count: int, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `function` gives for the rows 0..count-1, always asked for `BLOCK` rows at a time.

    :param function: from the numbers of rows, (BLOCK,), to tensors (BLOCK, ...). The last block is
        filled up with its last row.
    :returns: tensors (count, ...).
    """
    parts = []
    for first in range(0, count, BLOCK):
        rows = torch.arange(first, first + BLOCK).clamp(max=count - 1)
        parts.append([values[: count - first] for values in function(rows)])
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
