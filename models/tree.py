"""A tree whose leaves pay at random, whose values follow by recursion: `Tree`."""

from __future__ import annotations

import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import SparseCategorical
from inference_rl.environment import EnvironmentModel

MOST_STATES = 10_000_000
"""Larger trees are refused: their rewards alone would fill the memory."""


class Tree(EnvironmentModel):
    """A tree of `depth` choices among `branching` actions; entering a leaf pays, nothing else does.

    States are numbered level by level: the root is 0, and action a leads from s to
    branching · s + a + 1. Leaf rewards are standard normal, in reward units. Without noise

        V(root) = α log mean over leaves of e^{reward/α}    (temperature α, uniform prior),

    which tends to the largest leaf as α → 0, and to the mean of all as α → ∞.

    :param depth: number of choices, at least 1; also the horizon.
    :param branching: number of actions, at least 1.
    :param noise: probability, in [0, 1], that the child is drawn uniformly, whatever the action.
    :param seed: of the leaf rewards, which come from a generator of their own.
    """

    def __init__(
        self, *, depth: int = 4, branching: int = 3, noise: float = 0.0, seed: int = 0
    ) -> None:
        for name, value in (("depth", depth), ("branching", branching)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Tree: {name} must be an integer of at least 1, got {value}")
        if not 0 <= noise <= 1:
            raise ValueError(f"Tree: noise must be a probability in [0, 1], got {noise}")
        leaves: int = branching**depth
        size: int = sum(branching**level for level in range(depth + 1))
        if size > MOST_STATES:
            raise ValueError(
                f"Tree: depth {depth} and branching {branching} make {size:,} states, more than "
                f"the {MOST_STATES:,} allowed; lower either"
            )
        self.horizon, self.branching, self.noise = depth, branching, noise
        self.state_space, self.action_space = Discrete(size), Discrete(branching)
        self.first_leaf = size - leaves
        generator = torch.Generator().manual_seed(seed)
        self.pay = torch.zeros(size, dtype=torch.float64)
        self.pay[self.first_leaf :] = torch.randn(leaves, generator=generator, dtype=torch.float64)

    def initial_state(self) -> TorchDistribution:
        return SparseCategorical(torch.tensor([0]), torch.ones(1))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        children = self.branching * state.unsqueeze(-1) + 1 + torch.arange(self.branching)
        children = torch.where(self.terminal(state).unsqueeze(-1), state.unsqueeze(-1), children)
        if not self.noise:
            return SparseCategorical(
                children.gather(-1, action.unsqueeze(-1)), torch.ones((*action.shape, 1))
            )
        chosen = torch.nn.functional.one_hot(action, self.branching)
        probs = (1 - self.noise) * chosen + self.noise / self.branching
        return SparseCategorical(children, probs)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.pay[next_state].to(torch.get_default_dtype())

    def terminal(self, state: Tensor) -> Tensor:
        return state >= self.first_leaf
