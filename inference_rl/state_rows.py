"""`StateRows`: the tables of a range of states, which is all of a model or a part of it.

A model too large for one process exists in such parts only; see `inference_rl.scale_out`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from inference_rl.distributions import ROW_SUM_TOLERANCE


@dataclasses.dataclass(frozen=True)
class StateRows:
    """What can happen in n consecutive states (A actions, N non-zeros).

    :ivar first: the number of the first of them. :ivar pointers: (n·A + 1,) int64, row boundaries.
    :ivar successors: (N,), numbers of states of the whole model. :ivar probabilities: (N,) float64.
    :ivar rewards: (N,) float64, reward units. :ivar log_prior: (n, A), nats.
    :ivar terminal: (n,) booleans; their rows are empty.
    """

    first: int
    pointers: Tensor
    successors: Tensor
    probabilities: Tensor
    rewards: Tensor
    log_prior: Tensor
    terminal: Tensor

    def check(self) -> None:
        """:raises ValueError: no probabilities, or rewards that are not finite; says where."""
        expected = "reward: expected finite numbers, got {value} for {where}; "
        self._require(
            ~self.rewards.isnan(),
            self.rewards,
            expected + "see what it computes there, such as 0 / 0 or a root of a negative number",
        )
        self._require(
            torch.isfinite(self.rewards),
            self.rewards,
            expected + "forbid an action by a prior of zero rather than by an infinite penalty",
        )
        expected = "transition: expected probabilities, got {value:g} "
        self._require(
            ~(self.probabilities < 0), self.probabilities, expected + "(negative) for {where}"
        )
        self._require(
            ~self.probabilities.isnan(), self.probabilities, expected + "(NaN) for {where}"
        )
        actions = self.log_prior.shape[1]
        total = row_sum(self.probabilities.detach(), self.pointers, actions)
        wrong = ((total - 1).abs() > ROW_SUM_TOLERANCE) & ~self.terminal.unsqueeze(-1)
        if wrong.any():
            state, action = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"transition: expected probabilities that sum to one, got "
                f"{total[state, action].item():.9g} for state {self.first + state}, action {action}"
            )
        mass = self.log_prior.detach().exp().sum(-1)
        wrong = ~((mass - 1).abs() <= ROW_SUM_TOLERANCE)
        if wrong.any():
            state = int(wrong.nonzero()[0])
            raise ValueError(
                f"action prior: expected probabilities over {actions} actions that sum to one, got "
                f"a sum of {mass[state].item():.9g} in state {self.first + state}"
            )

    def _require(self, good: Tensor, values: Tensor, message: str) -> None:
        """Of values along the non-zeros."""
        if good.all():
            return
        entry = int((~good).nonzero()[0])
        row = int(torch.searchsorted(self.pointers, entry, right=True)) - 1
        state, action = divmod(row, self.log_prior.shape[1])
        where = f"state {self.first + state}, action {action}"
        raise ValueError(message.format(value=values[entry].item(), where=where))


def row_sum(values: Tensor, pointers: Tensor, actions: int) -> Tensor:
    """Sum values along the non-zeros (N,) over each row: (n, A)."""
    total = torch.segment_reduce(values, "sum", offsets=pointers, initial=0)
    return total.reshape(-1, actions)
