"""An update of episodic REPS beside MushroomRL's, on the same parameters and returns.

    pip install --no-deps mushroom-rl==1.10.2
    python tests/benchmarks/episodic_reps.py

Rewards in, the mean and covariance of the search out: the largest difference of any entry from
MushroomRL's `REPS`, relative to the largest entry, for a full and for a diagonal covariance. Theirs
stops minimising the dual at SciPy's default tolerance; "polished" starts their own program again
from where it stopped, until it no longer moves. Exit code 1 if any differs by more than 1e-6.

MushroomRL also imports cv2, pygame and sklearn: pip install opencv-python-headless pygame
scikit-learn.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import torch

from inference_rl.duals import solve_episodic
from inference_rl.inference.reps import weighted_gaussian

TOLERANCE = 1e-6


def sample(episodes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters, and returns that are a noisy paraboloid of them; no library draws these."""
    grid = np.arange(episodes * size).reshape(episodes, size)
    parameters = np.sin(1.7 * grid + 0.3 * grid**2 % 7)
    returns = -((parameters - 0.3) ** 2).sum(1) * 10 + np.cos(5.0 * np.arange(episodes)) - 20
    return parameters, returns


def ours(parameters: np.ndarray, returns: np.ndarray, epsilon: float) -> tuple[Any, Any]:
    weights = torch.from_numpy(solve_episodic(returns, epsilon).weights)
    one = torch.ones(len(returns), 1, dtype=torch.float64)
    gain, covariance = weighted_gaussian(one, torch.from_numpy(parameters), weights)
    return gain[:, 0].numpy(), covariance.numpy()


def main() -> None:
    from mushroom_rl.algorithms.policy_search.black_box_optimization import reps
    from mushroom_rl.distributions import GaussianCholeskyDistribution, GaussianDiagonalDistribution
    from scipy.optimize import minimize

    def polished(function: Any, start: Any, **options: Any) -> Any:
        found = minimize(function, start, **options)
        for _ in range(20):
            found = minimize(function, found.x, **options, options={"ftol": 1e-18, "gtol": 1e-14})
        return found

    worst = 0.0
    for kind in ("full", "diagonal"):
        for name, minimiser in (("as it is", minimize), ("polished", polished)):
            for epsilon in (0.1, 0.5, 1.5):
                size = 4
                parameters, returns = sample(40, size)
                distribution: Any = (
                    GaussianCholeskyDistribution(np.zeros(size), np.eye(size))
                    if kind == "full"
                    else GaussianDiagonalDistribution(np.zeros(size), np.ones(size))
                )
                peer = types.SimpleNamespace(_eps=lambda e=epsilon: e, distribution=distribution)
                reps.minimize = minimiser
                reps.REPS._update(peer, returns.copy(), parameters)
                mean, covariance = ours(parameters, returns, epsilon)
                if kind == "full":
                    factor = distribution._chol_sigma
                    spread, expected = factor @ factor.T, covariance
                else:
                    spread, expected = distribution._std**2, covariance.diagonal()
                difference = max(
                    np.abs(mean - distribution._mu).max() / np.abs(mean).max(),
                    np.abs(expected - spread).max() / np.abs(expected).max(),
                )
                worst = max(worst, float(difference))
                print(f"{kind}, {name}, epsilon {epsilon}: {difference:.1e}")
                if kind == "full" and name == "polished":  # which a test holds us to
                    print(f"    theirs: mean {distribution._mu.tolist()}")
                    print(f"    covariance, first row {spread[0].tolist()}")
    sys.exit(1 if worst > TOLERANCE else 0)


if __name__ == "__main__":
    main()
