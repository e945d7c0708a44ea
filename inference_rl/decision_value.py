"""`DecisionValue`: V(s), the value of one decision under a Q that was learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference_rl.action_values import ActionValues, steps_in
from inference_rl.blocks import in_blocks
from inference_rl.decision import Decision, decide, every_action
from inference_rl.networks import as_space
from inference_rl.policies import Policy
from inference_rl.priors import ActionPrior
from inference_rl.randomness import ACTIONS, draw

DRAWS = 64
"""Actions of a box from which V is estimated in each state."""

SEED = 0
"""Of their noise."""


class DecisionValue(nn.Module):
    """V(s), reward units: what one decision of a policy is worth, given Q and the prior.

    Exact where actions are discrete. In a box an estimate by `DRAWS` draws of the policy, which are
    made of the same noise in all states and at every call: so it is a function of the state alone,
    and so is its error. It has no gradient.

    :param q: reward units; what its members come to together counts.
    :param temperature: reward units.
    :param how: from a decision to its value, (N,): by all actions in each of N states, (A, N), or
        in a box by K draws of the guide, (K, N).

    Policy, Q and prior are no parts of this module, and are read as they are at each call.
    """

    def __init__(
        self,
        policy: Policy,
        q: ActionValues,
        prior: ActionPrior,
        temperature: float,
        how: Callable[[Decision], Tensor],
    ) -> None:
        super().__init__()
        self._made_of = policy, q, prior  # in a tuple, because they are no parts
        self.temperature, self._how = temperature, how
        self._space = as_space(q.architecture.actions)
        self._actions = every_action(self._space)

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Batch + (1,).

        :param t: the step, of the batch shape, or one for all; needed under a horizon only.
        :raises ValueError: there is a horizon, and no step.
        """
        at = steps_in(self._made_of[1].architecture, state, t)
        states, steps = state.reshape(-1, *state.shape[at.dim() :]), at.reshape(-1)
        with torch.no_grad():
            (value,) = in_blocks(len(steps), lambda rows: (self._value(states[rows], steps[rows]),))
        return value.reshape(*at.shape, 1)

    def _value(self, state: Tensor, step: Tensor) -> Tensor:
        policy, q, prior = self._made_of
        guide: Any = policy(state, step)
        if self._actions is None:
            seeds = np.full(len(state), SEED, dtype=np.uint64)
            actions = torch.stack([draw(guide, seeds, k, ACTIONS) for k in range(DRAWS)])
        else:
            actions = self._actions

        def message(action: Tensor) -> Tensor:
            if self._actions is None:
                return q.combined(state, action, step)
            return q.combined(state, None, step).mT  # of all actions, which come in this order

        decision = decide(
            state,
            lambda *_: guide,
            prior,
            message,
            temperature=torch.tensor(self.temperature),
            action_space=self._space,
            actions=actions,
        )
        return self._how(decision)
