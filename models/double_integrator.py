"""A frictionless cart that is pushed along a line and has to be brought to rest at the origin."""

from __future__ import annotations

import torch

from inference_rl.linear_gaussian import LinearGaussianModel


class DoubleIntegrator(LinearGaussianModel):
    """Position and velocity of a unit mass, driven by the action and by random pushes.

    State (position in m, velocity in m/s); action: acceleration in m/s², any real number, held over
    a step. Sampled exactly, pushes included: their covariance over a step of length h is
    intensity² · [[h³/3, h²/2], [h²/2, h]].

    :param time_step: h, in seconds.
    :param noise: intensity of the random pushes, in m s^{-3/2}; 0 for none.
    :param position_cost: reward lost per step and m². :param velocity_cost: ... per (m/s)².
    :param action_cost: ... per (m/s²)².
    :param initial_position, initial_velocity: where an episode starts, in m and m/s.
    :param initial_spread: standard deviation of either of them around that.
    :raises ValueError: the time step is not positive.
    """

    state_labels = ("position", "velocity")
    action_labels = ("acceleration",)

    def __init__(
        self,
        *,
        time_step: float = 0.1,
        noise: float = 0.1,
        position_cost: float = 1.0,
        velocity_cost: float = 0.1,
        action_cost: float = 0.1,
        initial_position: float = 1.0,
        initial_velocity: float = 0.0,
        initial_spread: float = 0.0,
        discount: float = 0.99,
        horizon: int | None = None,
    ) -> None:
        if not time_step > 0:
            raise ValueError(f"time_step: expected a positive number of seconds, got {time_step}")
        h = time_step
        pushes = torch.tensor([[h**3 / 3, h**2 / 2], [h**2 / 2, h]], dtype=torch.float64)
        super().__init__(
            A=[[1.0, h], [0.0, 1.0]],
            B=[[h**2 / 2], [h]],
            state_cost=[[position_cost, 0.0], [0.0, velocity_cost]],
            action_cost=[[action_cost]],
            noise_covariance=noise**2 * pushes,
            initial_mean=[initial_position, initial_velocity],
            initial_covariance=initial_spread**2 * torch.eye(2, dtype=torch.float64),
            discount=discount,
            horizon=horizon,
        )
