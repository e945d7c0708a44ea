"""Features φ(s) of states: what the flow constraint of step-based REPS counts, and linear models.

A feature map is any callable from N states to (N, K): those here, or any `torch.nn.Module`. Those
here are modules without parameters, whose `state_dict` holds all that was drawn; in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]
"""φ: states (N,) or (N, dim) -> (N, K)."""

_PAIRS_FROM = 1000


class TabularFeatures(nn.Module):
    """One feature per state: φ(s) = e_s.

    :param states: S >= 1, how many states there are.
    """

    def __init__(self, states: int) -> None:
        super().__init__()
        if states < 1:
            raise ValueError(f"TabularFeatures: expected at least one state, got {states}")
        self.states = states

    def forward(self, states: Tensor) -> Tensor:
        """(N, S). :raises ValueError: states that are not whole numbers from 0 to S - 1."""
        if states.is_floating_point() or states.dim() != 1:
            raise ValueError(
                "TabularFeatures: expected whole-number states of shape (N,), got "
                f"{states.dtype} of shape {tuple(states.shape)}"
            )
        outside = states[(states < 0) | (states >= self.states)]
        if len(outside):
            raise ValueError(
                f"TabularFeatures: expected states from 0 to {self.states - 1}, got "
                f"{int(outside[0])}; make as many features as there are states"
            )
        return nn.functional.one_hot(states.long(), self.states).double()


class RandomFourierFeatures(nn.Module):
    """φ_k(s) = √(2/K) cos(ω_k · s + b_k), whose products estimate a Gaussian kernel.

    φ(s)·φ(t) ≈ exp(-Σ_j ((s_j - t_j) / bandwidth_j)² / 2), with ω_kj ~ N(0, bandwidth_j⁻²) and
    b_k uniform on [0, 2π]. Rahimi and Recht (2007), algorithm 1.

    :param dim: entries of a state. :param count: K, how many features.
    :param bandwidth: in units of the state, one number or one per entry; `median_bandwidth` of
        `data` if None.
    :param seed: of ω and b; the global random state is neither read nor moved.
    :param data: (M, dim), states to take the bandwidth from.
    :raises ValueError: sizes below one, a bandwidth that is not positive, or none and no data.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        dim: int,
        count: int,
        bandwidth: float | Sequence[float] | Tensor | None = None,
        seed: int = 0,
        *,
        data: Tensor | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or count < 1:
            raise ValueError(
                "RandomFourierFeatures: expected dim and count of at least 1, got "
                f"{dim} and {count}"
            )
        if (bandwidth is None) == (data is None):
            raise ValueError(
                "RandomFourierFeatures: give either a bandwidth or data to take it from, not both "
                "or neither"
            )
        if data is not None:
            if data.dim() != 2 or data.shape[1] != dim:
                raise ValueError(
                    f"RandomFourierFeatures: expected data of shape (M, {dim}), got "
                    f"{tuple(data.shape)}"
                )
            bandwidth = median_bandwidth(data, seed)
        widths = torch.as_tensor(bandwidth, dtype=torch.float64)
        if widths.shape not in ((), (dim,)) or not ((widths > 0) & widths.isfinite()).all():
            raise ValueError(
                "RandomFourierFeatures: expected a bandwidth > 0 in units of the state, one number "
                f"or {dim}, got {bandwidth}"
            )
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(dim, count, generator=generator, dtype=torch.float64)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        self.register_buffer("frequencies", normal / widths.expand(dim)[:, None])
        self.register_buffer("phases", 2 * math.pi * uniform)

    def forward(self, states: Tensor) -> Tensor:
        """(N, K) of states (N, dim). :raises ValueError: states of another shape."""
        if states.dim() != 2 or states.shape[1] != len(self.frequencies):
            raise ValueError(
                f"RandomFourierFeatures: expected states of shape (N, {len(self.frequencies)}), "
                f"got {tuple(states.shape)}"
            )
        angles = states.to(self.frequencies.dtype) @ self.frequencies + self.phases
        return math.sqrt(2 / len(self.phases)) * angles.cos()


def median_bandwidth(states: Tensor, seed: int = 0) -> Tensor:
    """(dim,): the median distance of two states, each entry measured in its standard deviation.

    The median heuristic, after standardising, because entries of a state have different units.
    Entries that never vary count as of deviation one. Of more than a thousand states a random
    thousand is used.

    :param states: (M, dim), M >= 2.
    :raises ValueError: fewer states, states that are not finite, or more than half of all pairs
        equal.
    """
    if states.dim() != 2 or len(states) < 2 or not states.isfinite().all():
        raise ValueError(
            "median_bandwidth: expected at least two finite states of shape (M, dim), got shape "
            f"{tuple(states.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(states), generator=generator)[:_PAIRS_FROM]
    some = states.detach()[chosen].double()
    deviation = some.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    median = torch.pdist(some / deviation).median()
    if median == 0:
        raise ValueError(
            f"median_bandwidth: expected states that differ, but most of the {len(some)} are the "
            "same; give a bandwidth or more varied states"
        )
    return median * deviation


def feature_matrix(features: Features, states: Tensor) -> Tensor:
    """φ of N states as a checked (N, K) float64 tensor without gradient.

    :raises ValueError: another shape, or numbers that are not finite.
    """
    with torch.no_grad():
        matrix = features(states)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or len(matrix) != len(states):
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"features: expected a tensor (N, K) with N = {len(states)}, one row per state, got "
            f"{shape}; end the feature function with a flatten"
        )
    matrix = matrix.double()
    if not matrix.isfinite().all():
        row = int((~matrix.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"features: expected finite numbers, got {matrix[row].tolist()[:4]} for state "
            f"{states[row].tolist()}"
        )
    return matrix
