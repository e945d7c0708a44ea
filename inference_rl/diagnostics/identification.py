"""What demonstrated behaviour cannot tell, in words: `not_identified`.

Episodes say of a direction u in parameter space what the Fisher information F does: nothing if
uᵀFu = 0, as no action is then more likely on one side than on the other. In units in which the
prior has variance one the posterior has variance 1 / (1 + uᵀFu) along u, locally; u is reported
where that is no less than `NARROWER`.

This is local. That two remote points of parameter space explain behaviour equally well, as mirror
images may, is seen by chains that do not meet (R-hat), not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.reward_density import STEP, RewardDensity

NARROWER = 0.9
"""Of the prior's variance: a posterior that keeps more has learned next to nothing."""

NOTHING = 1e-6
"""uᵀFu below which it is nothing, up to differences in place of derivatives."""

PART = 0.05
"""Of the largest move, in widths of the prior: smaller ones go unmentioned."""

MENTIONED = 6
"""Parameters that a sentence lists."""


def not_identified(density: RewardDensity, z: Tensor) -> tuple[str, ...]:
    """A sentence for each direction, at the coordinates `z`, that the episodes do not tell of."""
    information = density.information(z)
    values, vectors = np.linalg.eigh(information)
    silent, faint = values < NOTHING, (values >= NOTHING) & (values < 1 / NARROWER - 1)
    found = [_nothing(density, z, u) for u in _sparse(vectors[:, silent])]
    for u in _sparse(vectors[:, faint]):
        found.append(_little(density, z, u, 1 / (1 + float(u @ information @ u))))
    return tuple(found)


def _sparse(basis: Array) -> list[Array]:
    """Unit vectors (d,) that span the same, each with one coordinate of its own."""
    if basis.shape[1] == 0:
        return []
    _, _, order = scipy.linalg.qr(basis.T, pivoting=True, mode="economic")
    own = order[: basis.shape[1]]
    return [u / np.linalg.norm(u) for u in (basis @ np.linalg.inv(basis[own])).T]


def _nothing(density: RewardDensity, z: Tensor, u: Array) -> str:
    names, moves = _moves(density, z, u)
    if len(names) == 1:
        return (
            f"{names[0]} has no say in this behaviour: no action's probability depends on it, and "
            "its posterior is its prior; fix it, or have it demonstrated where it matters"
        )
    return (
        f"{_listed(names)} cannot be told apart: moved together by {_listed(moves)}, they leave "
        "every action's probability as it is, and the posterior is as wide as the prior there; fix "
        "one of them, or say more of it by its prior"
    )


def _little(density: RewardDensity, z: Tensor, u: Array, share: float) -> str:
    names, moves = _moves(density, z, u)
    return (
        f"{_listed(names)}: these episodes say next to nothing, {share:.0%} of the prior's "
        f"variance is left along {_listed(moves)}; have more demonstrated, or fix one of them"
    )


def _moves(density: RewardDensity, z: Tensor, u: Array) -> tuple[list[str], list[str]]:
    """What moves along `u`, and by how much for a width of the prior: names, names with numbers."""
    step = STEP * torch.from_numpy(u)
    up, down = density.values(z + step), density.values(z - step)
    of_prior = density.values(density.draws)
    names, moves, sizes = [], [], []
    for name in up:
        slope = (up[name] - down[name]) / (2 * STEP)
        width = of_prior[name].std(0)
        if slope.size > 1 and np.ptp(slope) < PART * np.abs(slope).max():
            slope, width, name = slope.mean(), width.mean(), f"all of {name}"
        for index in np.ndindex(np.shape(slope)):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            names.append(label)
            moves.append(float(np.asarray(slope)[index]))
            sizes.append(abs(moves[-1]) / float(np.asarray(width)[index]))
    sign = np.sign(moves[int(np.argmax(sizes))])
    kept = [i for i in np.argsort(sizes)[::-1] if sizes[i] >= PART * max(sizes)]
    return [names[i] for i in kept], [f"{names[i]} {sign * moves[i]:+.3g}" for i in kept]


def _listed(words: Sequence[str]) -> str:
    if len(words) > MENTIONED:
        return f"{', '.join(words[:MENTIONED])} and {len(words) - MENTIONED} more"
    return " and ".join([*[", ".join(words[:-1])][: len(words) > 1], words[-1]])
