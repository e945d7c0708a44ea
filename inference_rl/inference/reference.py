"""What is known exactly about a finite model: what a guide, however it was learned, is held to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl.backups import soft_value
from inference_rl.distributions import as_probs, log_or_impossible
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import (
    Messages,
    control_messages,
    first_step,
    posterior_messages,
)
from inference_rl.simulate import GymnasiumModel
from inference_rl.tabulation import tabulate

if TYPE_CHECKING:
    import xarray

    from inference_rl.inference import InferenceResult

MOST_STATES = 5_000
"""Of a model that is solved besides, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact answer at the temperature and under the prior of a result.

    :ivar model: as tables, with that prior. :ivar control: messages (reward units) and π*.
    :ivar objective: J(π*) in KL form, reward units.
    :ivar log_evidence: log p(O), nats, with the discount as the probability of surviving a step;
        None where it is infinite, and at temperature 0.
    """

    model: FiniteModel
    control: Messages
    objective: float
    log_evidence: float | None

    def table_of(self, result: InferenceResult) -> Tensor:
        """The policy of `result` in every state, (S, A), or (T, S, A) with a horizon; float64."""
        states, horizon = torch.arange(self.model.num_states), self.model.horizon
        with torch.no_grad():
            if horizon is None:
                return _probs(result, states, None, self.model.num_actions)
            rows = [_probs(result, states, t, self.model.num_actions) for t in range(horizon)]
            return torch.stack(rows)

    def as_dataset(self) -> xarray.Dataset:
        """`value`, `q` and `policy`, by state and, with a horizon, by step; `objective`, and
        `log_evidence` if there is one."""
        import xarray

        steps = [] if self.model.horizon is None else ["step"]
        ends = [f"{name}_and_end" for name in steps]
        columns = {
            "value": ([*ends, "state"], self.control.v.detach().numpy()),
            "q": ([*steps, "state", "action"], self.control.q.detach().numpy()),
            "policy": ([*steps, "state", "action"], self.control.policy.detach().numpy()),
            "objective": ([], self.objective),
        }
        if self.log_evidence is not None:
            columns["log_evidence"] = ([], self.log_evidence)
        return xarray.Dataset(columns)


def reference(result: InferenceResult, most_states: int = MOST_STATES) -> Reference | str:
    """The exact answer to what `result` answers, or why there is none.

    :param most_states: of a model that is solved, times the steps of a horizon.
    """
    model, prior = result.model, result.prior
    discrete = isinstance(model.state_space, Discrete) and isinstance(model.action_space, Discrete)
    if isinstance(model, GymnasiumModel) or not discrete:
        return "the model is not finite"
    assert isinstance(model.state_space, Discrete)
    if int(model.state_space.n) * (model.horizon or 1) > most_states:
        return f"the model has more than {most_states:,} states"
    if prior is None:
        return "its prior was made in Python, and a saved run does not hold it"
    with torch.no_grad():
        finite = tabulate(model, prior=None if prior == model.action_prior else prior)
        try:
            control = control_messages(finite, result.temperature)
        except ValueError as error:
            return str(error)
        return Reference(
            model=finite,
            control=control,
            objective=float(finite.initial @ first_step(control.v)),
            log_evidence=_log_evidence(finite, result.temperature),
        )


def _log_evidence(model: FiniteModel, temperature: float) -> float | None:
    if temperature == 0:
        return None
    try:
        v = first_step(posterior_messages(model, temperature).v)
    except ValueError:  # infinite
        return None
    return float(soft_value(v, log_or_impossible(model.initial), 1.0))


def _probs(result: InferenceResult, states: Tensor, t: int | None, actions: int) -> Tensor:
    return as_probs(result.policy(states, t), actions).double()
