"""`in_blocks` and `in_place`: arithmetic whose last bit does not depend on who else is there.

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


def in_place(
    places: Tensor, size: int, function: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `function` gives for some rows of a batch of `size`, always asked for all of it.

    :param places: (n,), where in the batch the rows 0..n-1 are. Elsewhere row 0 stands in.
    :param function: from the numbers of rows, (size,), to tensors (size, ...).
    :returns: tensors (n, ...).
    """
    if len(places) == size:
        return function(torch.arange(size))
    rows = torch.zeros(size, dtype=torch.long)
    rows[places] = torch.arange(len(places))
    return tuple(values[places] for values in function(rows))
