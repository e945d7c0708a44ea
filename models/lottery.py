"""The smallest model in which the two targets of inference part ways: `Lottery`."""

from __future__ import annotations

import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import SparseCategorical
from inference_rl.environment import EnvironmentModel

UNDECIDED, SAFE, LOST, WON = range(4)


class Lottery(EnvironmentModel):
    """One choice: a sure reward, or a ticket with a worse mean and a better best case.

    At temperature α, with win probability p, in closed form:

    | soft value         | action 0, safe | action 1, ticket                |
    |--------------------|----------------|---------------------------------|
    | control, Q         | safe_reward    | p · prize                       |
    | posterior, α · Q^x | safe_reward    | α log(1 − p + p · exp(prize/α)) |

    with V = α log(½ e^{Q(safe)/α} + ½ e^{Q(ticket)/α}) in both. Control keeps the odds as they are,
    so it leaves the ticket alone as α → 0. The posterior asks which action was taken, given that
    all went well: it supposes that the ticket won, and buys (Levine 2018, arXiv:1805.00909,
    section 3). The two agree again as α → ∞.

    :param safe_reward: what action 0 pays for sure, in reward units; tensors keep their gradient.
    :param prize: what a winning ticket pays, in reward units, likewise; a losing one pays nothing.
    :param win_probability: in [0, 1].
    """

    state_space, action_space = Discrete(4), Discrete(2)
    horizon = 1
    state_labels = ("undecided", "safe", "lost", "won")
    action_labels = ("safe", "ticket")

    def __init__(
        self,
        *,
        safe_reward: float | Tensor = 0.5,
        prize: float | Tensor = 3.0,
        win_probability: float = 0.1,
    ) -> None:
        for name, reward in (("safe_reward", safe_reward), ("prize", prize)):
            if not torch.isfinite(torch.as_tensor(reward)):
                raise ValueError(f"Lottery: {name} must be a finite number, got {reward}")
        if not 0 <= win_probability <= 1:
            raise ValueError(f"Lottery: win_probability must be in [0, 1], got {win_probability}")
        self.safe_reward, self.prize, self.win_probability = safe_reward, prize, win_probability

    def initial_state(self) -> TorchDistribution:
        return SparseCategorical(torch.tensor([UNDECIDED]), torch.ones(1))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        outcomes = torch.tensor([[SAFE, SAFE], [LOST, WON]])
        p = self.win_probability
        probs = torch.tensor([1 - p, p]).expand((*action.shape, 2))
        return SparseCategorical(outcomes[action], probs)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return (next_state == SAFE) * self.safe_reward + (next_state == WON) * self.prize

    def terminal(self, state: Tensor) -> Tensor:
        return state != UNDECIDED
