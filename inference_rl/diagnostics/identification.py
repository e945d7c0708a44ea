"""What demonstrated behaviour cannot tell, in words: `not_identified`.

Episodes say of a direction u in parameter space what the Fisher information F does: nothing if
uᵀFu = 0, as no action is then more likely on one side than on the other. In units in which the
prior has variance one the posterior has variance 1 / (1 + uᵀFu) along u, locally; u is reported
where that is no less than `NARROWER`, on average over draws of every chain. At the mean of the
draws F may be nothing like this: that of mirror images lies between them, where no draw is.

This is local. That two remote points of parameter space explain behaviour equally well, as mirror
images may, is seen by chains that do not meet (`mixing`), not here; and nowhere if all chains
started on the same side.
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
"""Of the prior's variance: what may seem lost by differences in place of derivatives."""

EACH = 3
"""Draws of each chain at which F is computed, which takes 2 d + 1 policies."""

PART = 0.05
"""Of the largest move, in widths of the prior: smaller ones go unmentioned."""

MENTIONED = 6
"""Parameters that a sentence lists."""


def not_identified(density: RewardDensity, z: Tensor) -> tuple[str, ...]:
    """A sentence for each direction that the episodes do not tell of.

    :param z: coordinates of draws, (chain, draw, d).
    """
    draws = z.shape[1]
    at = z[:, [(2 * i + 1) * draws // (2 * EACH) for i in range(EACH)]].reshape(-1, density.size)
    informations = [density.information(point) for point in at]
    # Which directions these are may turn from draw to draw, so that how many is what is averaged.
    shares = 1 / (1 + np.linalg.eigvalsh(informations).clip(min=0.0))
    mean = shares.mean(0)
    silent, wide = int((mean > 1 - NOTHING).sum()), int((mean > NARROWER).sum())
    if not wide:
        return ()
    typical = [i for i in range(len(at)) if shares[i, wide - 1] > NARROWER]
    chosen = max(typical, key=lambda i: float(density(at[i])))
    point, information = at[chosen], informations[chosen]
    _, vectors = np.linalg.eigh(information)
    found = [_nothing(density, point, u) for u in _sparse(vectors[:, :silent])]
    for u in _sparse(vectors[:, silent:wide]):
        found.append(_little(density, point, u, 1 / (1 + float(u @ information @ u))))
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
        f"{listed(names)} cannot be told apart: moved together by {listed(moves)}, they leave "
        "every action's probability as it is, and the posterior is as wide as the prior there; fix "
        "one of them, or say more of it by its prior"
    )


def _little(density: RewardDensity, z: Tensor, u: Array, share: float) -> str:
    names, moves = _moves(density, z, u)
    return (
        f"{listed(names)}: these episodes say next to nothing, {share:.0%} of the prior's "
        f"variance is left along {listed(moves)}; have more demonstrated, or fix one of them"
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


def listed(words: Sequence[str]) -> str:
    """The first `MENTIONED` of them, and how many more there are."""
    if len(words) > MENTIONED:
        return f"{', '.join(words[:MENTIONED])} and {len(words) - MENTIONED} more"
    return " and ".join([*[", ".join(words[:-1])][: len(words) > 1], words[-1]])
