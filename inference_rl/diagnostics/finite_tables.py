"""What was inferred about a finite model as plain arrays, ready to be drawn: `Tables`."""

from __future__ import annotations

import dataclasses

import numpy as np

from inference_rl.diagnostics.page import Array, labels
from inference_rl.finite import FiniteModel
from inference_rl.inference import InferenceResult
from inference_rl.policies import TabularPolicy

VISITED_STEPS = 200
"""Steps from the start over which visits are counted."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """A finite result as arrays; without a horizon there is one step.

    :ivar values: (T + 1, S), or (1, S). :ivar policies: (T, S, A), or (1, S, A).
    :ivar ended: (S,), whether a state ends the episode.
    :ivar states, actions: what they are called, if only by their numbers.
    """

    model: FiniteModel
    values: Array
    policies: Array
    ended: Array
    states: list[str]
    actions: list[str]

    @classmethod
    def of(cls, model: FiniteModel, policy: TabularPolicy, result: InferenceResult) -> Tables:
        S, A = model.num_states, model.num_actions
        return cls(
            model=model,
            values=result.v.detach().numpy().reshape(-1, S),
            policies=policy.probs.detach().numpy().reshape(-1, S, A),
            ended=model.is_terminal.numpy(),
            states=labels(model.state_labels, S, "state"),
            actions=labels(model.action_labels, A, "action"),
        )

    @property
    def value(self) -> Array:
        """V at the first step: (S,)."""
        return self.values[0]

    @property
    def policy(self) -> Array:
        """π at the first step: (S, A)."""
        return self.policies[0]

    @property
    def value_name(self) -> str:
        return "V(s)" if self.model.horizon is None else "V at the first step"

    def visits(self) -> tuple[Array, int]:
        """Expected visits to each state under π and the model's dynamics, and in how many steps."""
        model = self.model
        forward = model.csr.T.tocsr()
        here = np.where(self.ended, 0.0, model.initial.detach().numpy())
        total, steps = here.copy(), min(VISITED_STEPS, model.horizon or VISITED_STEPS)
        for t in range(1, steps):
            policy = self.policies[0 if model.horizon is None else t - 1]
            here = np.where(self.ended, 0.0, forward @ (here[:, None] * policy).ravel())
            total += here
        return total, steps

    def reachable(self) -> Array:
        """Whether an episode can be in a state at a step, if the prior allows it: (T + 1, S)."""
        allowed = self.model.log_prior.isfinite().detach().numpy()
        here = self.model.initial.detach().numpy() > 0
        reached = [here]
        for _ in range(len(self.values) - 1):
            leaving = ((here & ~self.ended)[:, None] & allowed).ravel().astype(float)
            here = self.model.csr.T @ leaving > 0
            reached.append(here)
        return np.stack(reached)
