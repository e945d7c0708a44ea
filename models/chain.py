"""A corridor with a bait at one end and a prize at the other: `Chain`."""

from __future__ import annotations

import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import SparseCategorical
from inference_rl.environment import EnvironmentModel, GridLayout


class Chain(EnvironmentModel):
    """A deceptive corridor of places 0, ..., length: the walk starts at 1, next to the bait.

    Actions are left and right. Place 0 pays `bait`, place `length` pays `prize`, nothing else pays,
    and both end the episode. A walk at random from s takes the bait with probability 1 − s/length,
    so whoever learns from reward alone sees the bait first and most. In closed form:

    - regular RL (temperature → 0), with γ the discount:
      V(s) = max(γ^(s−1) bait, γ^(length−s−1) prize);
    - at temperature α, undiscounted, under the uniform prior:
      V(s) = α log[(1 − s/length) e^{bait/α} + (s/length) e^{prize/α}],
      because e^{V/α} is the mean of its neighbours, hence linear in s (Todorov 2009, "Efficient
      computation of optimal actions", PNAS 106). Nothing is random here except the actions, so
      control and posterior agree.

    :param length: the place of the prize, at least 2; it is length − 1 steps away from the start.
    :param bait, prize: reward units; tensors keep their gradient.
    :param discount: in [0, 1], per step.
    """

    action_space = Discrete(2)
    action_labels = ("left", "right")

    def __init__(
        self,
        *,
        length: int = 10,
        bait: float | Tensor = 0.1,
        prize: float | Tensor = 1.0,
        discount: float = 0.99,
    ) -> None:
        if not isinstance(length, int) or length < 2:
            raise ValueError(f"Chain: length must be an integer of at least 2, got {length}")
        for name, reward in (("bait", bait), ("prize", prize)):
            if not torch.isfinite(torch.as_tensor(reward)):
                raise ValueError(f"Chain: {name} must be a finite number, got {reward}")
        if not 0 <= discount <= 1:
            raise ValueError(f"Chain: discount must be in [0, 1], got {discount}")
        self.length, self.bait, self.prize, self.discount = length, bait, prize, discount
        self.state_space = Discrete(length + 1)
        cells = "GS" + "." * (length - 2) + "G"
        self.layout = GridLayout(1, length + 1, ((0, -1), (0, 1)), cells)

    def initial_state(self) -> TorchDistribution:
        return SparseCategorical(torch.tensor([1]), torch.ones(1))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        there = (state + 2 * action - 1).clamp(0, self.length).unsqueeze(-1)
        return SparseCategorical(there, torch.ones(there.shape))

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return (next_state == 0) * self.bait + (next_state == self.length) * self.prize

    def terminal(self, state: Tensor) -> Tensor:
        return (state == 0) | (state == self.length)
