"""Gymnasium's Pendulum-v1 as a differentiable program: `Pendulum`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from gymnasium.spaces import Box
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints

from inference_rl.environment import EnvironmentModel

TIME_STEP = 0.05  # seconds
MAX_SPEED = 8.0  # radians per second
MAX_TORQUE = 2.0  # newton metres
# The rod is one metre long and weighs one kilogram, so neither shows in the equations.


class Pendulum(EnvironmentModel):
    """Swing a rod up and hold it there, with a motor too weak to lift it in one go.

    The state is what Gymnasium observes, (cos θ, sin θ, θ̇), with θ = 0 upright and θ̇ in radians per
    second; the action, in [-1, 1], is the share of the largest torque. A step pays
    −(θ² + 0.1 θ̇² + 0.001 torque²), with θ in [-π, π), for the state that it leaves. Dynamics and
    rewards are those of gymnasium/envs/classic_control/pendulum.py, to rounding, and both can be
    differentiated.

    :param gravity: metres per second squared.
    :param process_noise: standard deviation of Gaussian noise, per step, on θ (radians) and on θ̇
        (radians per second); 0 is Gymnasium's deterministic pendulum. The density of the next state
        ignores turns by more than π, which are out of reach for any noise below 0.5.
    :param discount: in [0, 1], per step.
    """

    action_space = Box(-1.0, 1.0, (1,))
    horizon = 200
    gymnasium_id = "Pendulum-v1"

    def __init__(
        self, *, gravity: float = 10.0, process_noise: float = 0.0, discount: float = 0.99
    ) -> None:
        if not math.isfinite(gravity):
            raise ValueError(f"Pendulum: gravity must be a finite number, got {gravity}")
        if not 0 <= process_noise < 0.5:
            raise ValueError(f"Pendulum: process_noise must be in [0, 0.5), got {process_noise}")
        if not 0 <= discount <= 1:
            raise ValueError(f"Pendulum: discount must be in [0, 1], got {discount}")
        self.gravity, self.process_noise, self.discount = gravity, process_noise, discount
        self.gymnasium_kwargs = {"g": gravity}
        # Noise may carry the speed past its limit, by little and for one step.
        fastest = np.inf if process_noise else MAX_SPEED
        high = np.array([1.0, 1.0, fastest], dtype=np.float32)
        self.state_space = Box(-high, high)

    def initial_state(self) -> TorchDistribution:
        high = torch.tensor([math.pi, 1.0])
        anywhere = dist.Uniform(-high, high).to_event(1)
        start: TorchDistribution = dist.TransformedDistribution(
            anywhere, [_OntoCylinder(torch.zeros(()))]
        )
        return start

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        sine, speed = state[..., 1], state[..., 2]
        torque = MAX_TORQUE * action[..., 0]
        acceleration = 1.5 * self.gravity * sine + 3.0 * torque
        speed = (speed + acceleration * TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
        angle = _angle(state) + speed * TIME_STEP
        onto_cylinder = _OntoCylinder(angle)
        mean = torch.stack([angle, speed], dim=-1)
        if not self.process_noise:
            return dist.Delta(onto_cylinder(mean), event_dim=1)
        noisy = dist.Normal(mean, self.process_noise).to_event(1)
        step: TorchDistribution = dist.TransformedDistribution(noisy, [onto_cylinder])
        return step

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        angle, speed, torque = _angle(state), state[..., 2], MAX_TORQUE * action[..., 0]
        return -(_wrapped(angle).square() + 0.1 * speed.square() + 0.001 * torque.square())


class _OntoCylinder(Transform):
    """(θ, θ̇) -> (cos θ, sin θ, θ̇). Rolling up a sheet keeps areas, so densities stay what they are.

    :param centre: of the turn in which the inverse looks for θ: centre − π to centre + π.
    """

    domain, codomain = constraints.real_vector, constraints.real_vector
    bijective = True

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.centre = centre

    def _call(self, x: Tensor) -> Tensor:
        angle, speed = x.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed], dim=-1)

    def _inverse(self, y: Tensor) -> Tensor:
        angle = self.centre + _wrapped(_angle(y) - self.centre)
        return torch.stack([angle, y[..., 2]], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], 3))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], 2))


def _angle(state: Tensor) -> Tensor:
    return torch.atan2(state[..., 1], state[..., 0])


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-π, π), half-open as Gymnasium's `angle_normalize` and `Uniform` are."""
    return (angle + math.pi) % (2 * math.pi) - math.pi
