"""A point in the plane between four goals, all equally good: `Multigoal`."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from gymnasium.spaces import Box
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.environment import EnvironmentModel

GOALS = ((5.0, 0.0), (-5.0, 0.0), (0.0, 5.0), (0.0, -5.0))
REACHED = 1.0  # closer than this to a goal
EDGE = 7.0


class Multigoal(EnvironmentModel):
    """Walk from the middle to any of four goals, 5 away to the right, left, top and bottom.

    The state is a place (x, y) in [-7, 7]², the action, in [-1, 1]², the way of a step. A step pays
    −action_cost · ‖a‖² − distance_cost · d², d the distance that is left to the nearest goal, and
    `goal_reward` more where it gets within 1 of one, which ends the episode. Walks start at the
    centre, but for a Gaussian of width `spread`.

    Whoever maximises reward needs one goal, and a Gaussian around a single action has to choose
    one; the best policy above temperature 0 goes to all four, by symmetry a quarter of the time
    each. At temperature 10 its density has four modes around the centre. Haarnoja et al. (2017),
    arXiv:1702.08165, §5.1, whose episodes the authors' code cuts after 30 steps.

    :param action_cost: reward units per squared length of a step. :param distance_cost: reward
        units per squared distance. :param goal_reward: reward units.
    :param spread: of the start, >= 0. :param discount: in [0, 1], per step.
    """

    action_space = Box(-1.0, 1.0, (2,))
    state_space = Box(-EDGE, EDGE, (2,))
    horizon = 30

    def __init__(
        self,
        *,
        action_cost: float = 30.0,
        distance_cost: float = 1.0,
        goal_reward: float = 10.0,
        spread: float = 0.1,
        discount: float = 0.99,
    ) -> None:
        given = {
            "action_cost": action_cost,
            "distance_cost": distance_cost,
            "goal_reward": goal_reward,
            "spread": spread,
        }
        for name, value in given.items():
            if not math.isfinite(value):
                raise ValueError(f"Multigoal: {name} must be a finite number, got {value}")
        if spread < 0:
            raise ValueError(f"Multigoal: spread must not be negative, got {spread}")
        if not 0 <= discount <= 1:
            raise ValueError(f"Multigoal: discount must be in [0, 1], got {discount}")
        self.action_cost, self.distance_cost = action_cost, distance_cost
        self.goal_reward, self.spread, self.discount = goal_reward, spread, discount

    def initial_state(self) -> TorchDistribution:
        centre = torch.zeros(2)
        if not self.spread:
            return dist.Delta(centre, event_dim=1)
        return dist.Normal(centre, self.spread).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta((state + action).clamp(-EDGE, EDGE), event_dim=1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        cost = self.action_cost * action.square().sum(-1)
        cost = cost + self.distance_cost * _squared_distance(next_state)
        return self.goal_reward * self.terminal(next_state) - cost

    def terminal(self, state: Tensor) -> Tensor:
        return _squared_distance(state) < REACHED**2


def _squared_distance(state: Tensor) -> Tensor:
    """To the nearest goal."""
    goals = torch.tensor(GOALS, dtype=state.dtype, device=state.device)
    return (state.unsqueeze(-2) - goals).square().sum(-1).amin(-1)
