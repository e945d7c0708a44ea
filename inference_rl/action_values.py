"""Q(s, a), the message of what follows a state and an action: tables and networks, in ensembles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from inference_rl.networks import ACTIVATIONS, Architecture, ObservationScaling


class ActionValues(nn.Module):
    """Several functions of state and action (and step), side by side; reward units.

    Of discrete actions every function gives the values of all at once, of a MultiDiscrete those of
    all combinations, the last dimension fastest. Discrete states and actions are a table, which
    starts at zero; all else a multilayer perceptron with the uniform initialisation of
    `torch.nn.Linear`.

    :param members: M, how many functions.
    :param outputs: of each function of the actions of a box; see `through`.
    """

    def __init__(self, architecture: Architecture, members: int, *, outputs: int = 1) -> None:
        super().__init__()
        states, actions = architecture.states, architecture.actions
        self.architecture = architecture
        self.horizon, self.members = architecture.horizon, members
        self.states: Any = states.get("size")
        self.takes_action = actions["kind"] == "box"
        if not self.takes_action:
            outputs = math.prod(actions.get("sizes", [actions.get("size")]))
        self.tabular = self.states is not None and not self.takes_action
        if self.tabular:
            rows = (architecture.horizon or 1) * states["size"]
            self.table = nn.Parameter(torch.zeros(members, rows, outputs))
            return
        inputs = states["dim"] if self.states is None else states["size"]
        scaled = architecture.scaled and self.states is None
        self.scaling = ObservationScaling(inputs) if scaled else None
        if self.takes_action:
            inputs += actions["dim"]
        widths = [inputs + (self.horizon is not None), *architecture.hidden, outputs]
        self.activation = ACTIVATIONS[architecture.activation]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            edge = 1 / math.sqrt(fan_in)
            weight, bias = torch.empty(members, fan_in, fan_out), torch.empty(members, 1, fan_out)
            self.weights.append(nn.Parameter(weight.uniform_(-edge, edge)))
            self.biases.append(nn.Parameter(bias.uniform_(-edge, edge)))

    def forward(
        self, state: Tensor, action: Tensor | None, t: int | Tensor | None = None
    ) -> Tensor:
        """(M, N) in N states, or (M, N, A) of discrete actions where `action` is None.

        :param state: (N, ...). :param action: (N, d) of a box, or (K, N, d), which gives (M, K, N);
            of discrete actions their number among all, (N,). :param t: the step, (N,), or one for
            all; needed under a horizon only.
        :raises ValueError: there is a horizon, and no step.
        """
        if self.takes_action:
            assert action is not None
            return self.through(state, action, t).squeeze(-1)
        if self.tabular:
            row = state
            if self.horizon is not None:
                row = state + self.states * steps_in(self.architecture, state, t)
            values = self.table[:, row]
        else:
            values = self._through_layers(self._inputs(state, t), None)
        if action is None:
            return values
        index = action.expand(self.members, *action.shape).unsqueeze(-1)
        return values.gather(-1, index).squeeze(-1)

    def combined(
        self, state: Tensor, action: Tensor | None, t: int | Tensor | None = None
    ) -> Tensor:
        """What the functions come to together, shaped as `forward` without M.

        For actions of a box the least of them, against overestimation (Fujimoto et al. 2018,
        arXiv:1802.09477, §4.2). Of discrete actions the mean (Zhou et al. 2022,
        arXiv:2209.10081): there the least is lowest where least was seen, and keeps a policy away.
        """
        values = self(state, action, t)
        return values.amin(0) if self.takes_action else values.mean(0)

    def through(self, state: Tensor, action: Tensor, t: int | Tensor | None = None) -> Tensor:
        """All outputs, (M, N, outputs) or (M, K, N, outputs), for actions of a box."""
        return self._through_layers(self._inputs(state, t), action)

    def _inputs(self, state: Tensor, t: int | Tensor | None) -> Tensor:
        dtype = self.weights[0].dtype
        if self.states is not None:
            # Not one_hot, which looks at values and cannot be recorded.
            numbers = torch.arange(self.states, device=state.device)
            inputs = (state.unsqueeze(-1) == numbers).to(dtype)
        else:
            inputs = state.to(dtype)
            if self.scaling is not None:
                inputs = self.scaling(inputs)
        if self.horizon is not None:
            share = (steps_in(self.architecture, state, t) / self.horizon).to(dtype)
            inputs = torch.cat([inputs, share.unsqueeze(-1)], dim=-1)
        return inputs

    def _through_layers(self, inputs: Tensor, action: Tensor | None) -> Tensor:
        if action is not None:
            inputs = inputs.expand(*action.shape[:-1], inputs.shape[-1])
            inputs = torch.cat([inputs, action.to(inputs.dtype)], dim=-1)
        batch = inputs.shape[:-1]
        values = inputs.reshape(1, -1, inputs.shape[-1]).expand(self.members, -1, -1)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, values, weight)
            if i < last:
                values = self.activation(values)
        return values.reshape(self.members, *batch, values.shape[-1])


def strides(sizes: Sequence[int]) -> Tensor:
    """Whose product with a MultiDiscrete action, summed, is its number among all of them, (d,).

    :param sizes: how many there are of each dimension, of which the last is the fastest.
    """
    return torch.tensor([*sizes[1:], 1]).flip(0).cumprod(0).flip(0)


def steps_in(architecture: Architecture, state: Tensor, t: int | Tensor | None) -> Tensor:
    """The step of every state, of its batch shape.

    :raises ValueError: what depends on the step is called without one.
    """
    if t is None and architecture.horizon is not None:
        raise ValueError(
            f"t: expected the step in 0..{architecture.horizon - 1}, for what is asked depends on "
            "the step, got none; give it last"
        )
    batch = state.shape if architecture.states["kind"] == "discrete" else state.shape[:-1]
    return torch.as_tensor(0 if t is None else t, device=state.device).expand(batch)
