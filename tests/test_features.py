"""Feature maps: one-hot rows, the kernel that random features estimate, seeds and saved states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inference_rl.duals import solve_step
from inference_rl.features import (
    RandomFourierFeatures,
    TabularFeatures,
    feature_matrix,
    median_bandwidth,
)


def states(count: int = 200, dim: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def test_tabular_features_are_one_hot() -> None:
    rows = TabularFeatures(4)(torch.tensor([2, 0, 3]))
    assert rows.dtype == torch.float64
    assert torch.equal(rows, torch.eye(4, dtype=torch.float64)[[2, 0, 3]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([0, 4]), "expected states from 0 to 3, got 4"),
        (torch.tensor([-1]), "expected states from 0 to 3, got -1"),
        (torch.tensor([0.0]), "expected whole-number states"),
        (torch.tensor([[0]]), "expected whole-number states"),
    ],
)
def test_other_states_are_refused(given: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularFeatures(4)(given)
    with pytest.raises(ValueError, match="expected at least one state"):
        TabularFeatures(0)


@pytest.mark.parametrize("bandwidth", [1.5, [0.7, 2.0, 1.0]])
def test_products_of_random_features_estimate_the_kernel(bandwidth: Any) -> None:
    count, data = 20_000, states(30)
    rows = RandomFourierFeatures(3, count, bandwidth, seed=1)(data)
    widths = torch.as_tensor(bandwidth, dtype=torch.float64)
    kernel = torch.exp(-(torch.cdist(data / widths, data / widths) ** 2) / 2)
    # Each entry is a mean of bounded terms with standard deviation below 1.
    assert (rows @ rows.T - kernel).abs().max() < 5 / math.sqrt(count)
    wrong = torch.exp(-(torch.cdist(data / widths, data / widths) ** 2))
    assert (rows @ rows.T - wrong).abs().max() > 5 / math.sqrt(count)


def test_features_follow_from_the_seed_alone() -> None:
    data = states()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = RandomFourierFeatures(3, 50, seed=7, data=data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    two = RandomFourierFeatures(3, 50, seed=7, data=data)
    assert torch.equal(one(data), two(data))
    assert not torch.equal(one(data), RandomFourierFeatures(3, 50, seed=8, data=data)(data))


def test_a_saved_state_gives_the_same_features() -> None:
    data = states()
    saved = RandomFourierFeatures(3, 50, seed=7, data=data)
    assert set(saved.state_dict()) == {"frequencies", "phases"}
    read = RandomFourierFeatures(3, 50, 1.0)
    read.load_state_dict(saved.state_dict())
    assert torch.equal(read(data), saved(data))
    assert not list(saved.parameters())
    assert saved(data.float()).dtype == torch.float64


def test_the_bandwidth_is_the_median_distance_after_standardising() -> None:
    data = states() * torch.tensor([1.0, 1e3, 1e-3]) + 5
    data = torch.cat([data, torch.full((len(data), 1), 2.0)], 1)
    deviation = data.std(0, correction=0)
    deviation[3] = 1.0
    scaled = (data / deviation).numpy()
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(scaled) for b in scaled[:i]]
    assert torch.allclose(median_bandwidth(data), float(np.median(pairs)) * deviation, rtol=1e-3)
    many = states(5000)
    assert torch.allclose(median_bandwidth(many, seed=1), median_bandwidth(many, seed=2), rtol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0, "bandwidth": 1.0}, "dim and count of at least 1"),
        ({"count": 0, "bandwidth": 1.0}, "dim and count of at least 1"),
        ({}, "either a bandwidth or data"),
        ({"bandwidth": 1.0, "data": states()}, "either a bandwidth or data"),
        ({"bandwidth": 0.0}, "expected a bandwidth > 0"),
        ({"bandwidth": [1.0, 2.0]}, "expected a bandwidth > 0"),
        ({"data": states(dim=2)}, r"expected data of shape \(M, 3\)"),
        ({"data": torch.zeros(9, 3)}, "expected states that differ"),
        ({"data": torch.zeros(1, 3)}, "expected at least two finite states"),
    ],
)
def test_malformed_random_features_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomFourierFeatures(**{"dim": 3, "count": 5} | arguments)


def test_random_features_of_other_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected states of shape \(N, 3\), got \(4, 2\)"):
        RandomFourierFeatures(3, 5, 1.0)(torch.zeros(4, 2))


def test_any_module_gives_features() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    matrix = feature_matrix(network, states().float())
    assert matrix.shape == (200, 8)
    assert matrix.dtype == torch.float64
    assert not matrix.requires_grad
    with pytest.raises(ValueError, match=r"features: expected a tensor \(N, K\) with N = 200"):
        feature_matrix(lambda s: s.sum(1), states())
    with pytest.raises(ValueError, match="features: expected finite numbers, got"):
        feature_matrix(lambda s: s / 0, states())


def test_features_serve_the_step_based_dual() -> None:
    data = torch.cumsum(states(301), 0).remainder(4)
    features = RandomFourierFeatures(3, 12, data=data)
    rows = feature_matrix(features, data)
    solution = solve_step(data[:-1, 0], rows[:-1], rows[1:], 0.5)
    assert solution.divergence == pytest.approx(0.5, rel=1e-6)
    assert solution.feature_mismatch < 1e-8
