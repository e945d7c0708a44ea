"""Backward messages of finite models: soft Bellman values, and the posterior's log-evidence.

A finite horizon is a recursion; without one the message is a fixed point, solved in NumPy
(`inference_rl.fixed_point`) and given its gradient by the implicit function theorem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from inference_rl.backups import control_q, posterior_q, soft_policy, soft_value
from inference_rl.distributions import log_or_impossible
from inference_rl.finite import FiniteModel
from inference_rl.fixed_point import FixedPoint, solve_control, solve_posterior

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Messages:
    """Backward messages and the policy they imply.

    :ivar q: (S, A), :ivar v: (S,), or (T, S, A) and (T + 1, S). Control: reward units; posterior:
        nats. :ivar policy: like q.
    :ivar error_bound: certified sup-norm error of v, in its units.
    """

    q: Tensor
    v: Tensor
    policy: Tensor
    error_bound: float
    iterations: int
    residual: float


def control_messages(
    model: FiniteModel,
    temperature: float | Tensor,
    tolerance: float = 1e-10,
    progress: Progress | None = None,
) -> Messages:
    """Soft Bellman messages (reward units); hard ones at temperature 0."""

    def value(q: Tensor) -> Tensor:
        return torch.where(model.is_terminal, 0.0, soft_value(q, model.log_prior, temperature))

    if model.horizon is not None:
        reward = model.expected_reward()
        q, v, bound = _backward(
            model,
            lambda v: reward + model.discount * model.expected_value(v),
            value,
            model.discount,
            _largest(model.rewards),
        )
        return Messages(q, v, soft_policy(q, model.log_prior, temperature), bound, model.horizon, 0)
    point = solve_control(
        model.csr,
        model.expected_reward().detach().numpy(),
        model.log_prior.detach().numpy(),
        terminal=model.is_terminal.numpy(),
        discount=model.discount,
        temperature=_number(temperature),
        relative=tolerance,
        progress=_reporting(progress, "control"),
    )

    def act(q: Tensor) -> Tensor:
        policy = soft_policy(q, model.log_prior, temperature)
        if temperature == 0 and model.discount == 1:
            return _ending(model, policy, tied_actions(model.log_prior, q, point.residual))
        return policy

    def evaluated(q: Tensor) -> Tensor:
        # The gradient is that of one best policy: a mixture of tied ones may be nobody's.
        if temperature == 0:
            best = q.gather(-1, act(q).argmax(-1, keepdim=True)).squeeze(-1)
            return torch.where(model.is_terminal, 0.0, best)
        return value(q)

    def weights(q: Tensor) -> Tensor:
        return model.discount * act(q).flatten()[model.rows()] * model.probabilities

    v = _differentiable(point, lambda v: control_q(model, v), evaluated, weights, model)
    q = control_q(model, v)
    policy = act(q)
    return Messages(q, v, policy, float(point.error_bound), point.iterations, float(point.residual))


def posterior_messages(
    model: FiniteModel,
    temperature: float | Tensor,
    tolerance: float = 1e-10,
    progress: Progress | None = None,
) -> Messages:
    """Log-evidence messages (nats): log p(O_{t:T} = 1 | s), discount read as survival.

    :raises ValueError: the evidence is infinite.
    """

    def value(q: Tensor) -> Tensor:
        return torch.where(model.is_terminal, 0.0, soft_value(q, model.log_prior, 1.0))

    def step(v: Tensor) -> Tensor:
        q = posterior_q(model, v, temperature)
        return torch.where(model.is_terminal.unsqueeze(-1), 0.0, q)

    if model.horizon is not None:
        weight = _largest(model.rewards) / _number(temperature)
        q, v, bound = _backward(model, step, value, 1.0, weight)
        return Messages(q, v, soft_policy(q, model.log_prior, 1.0), bound, model.horizon, 0)
    point = solve_posterior(
        model.csr,
        (model.rewards / temperature).detach().numpy(),
        model.log_prior.detach().numpy(),
        terminal=model.is_terminal.numpy(),
        discount=model.discount,
        relative=tolerance,
        progress=_reporting(progress, "posterior"),
    )

    def weights(q: Tensor) -> Tensor:
        policy = soft_policy(q, model.log_prior, 1.0).flatten()[model.rows()]
        current = torch.from_numpy(point.value)
        alive = _log_posterior_transition(model, q, current, temperature).exp()
        return policy * alive

    v = _differentiable(point, step, value, weights, model)
    q = step(v)
    policy = soft_policy(q, model.log_prior, 1.0)
    return Messages(q, v, policy, float(point.error_bound), point.iterations, float(point.residual))


def _reporting(progress: Progress | None, which: str) -> Callable[[int, float], None] | None:
    if progress is None:
        return None
    say = progress
    return lambda step, error: say(f"{which}: Newton step {step}, error at most {error:.2g}")


def _backward(
    model: FiniteModel,
    step: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    contraction: float,
    scale: float,
) -> tuple[Tensor, Tensor, float]:
    """q (T, S, A), v (T + 1, S) of a finite horizon, and a bound on their rounding.

    :param scale: the largest reward, in the units of v.
    """
    assert model.horizon is not None
    v = [torch.zeros(model.num_states, dtype=torch.float64)]
    q: list[Tensor] = []
    bound, widest = 0.0, int(model.pointers.diff().max()) + model.num_actions
    for _ in range(model.horizon):
        q.append(step(v[-1]))
        v.append(value(q[-1]))
        size = max(scale, _largest(v[-1]), _largest(q[-1]))
        bound = rounding_of_steps(bound, contraction, widest, size)
    return torch.stack(q[::-1]), torch.stack(v[::-1]), bound


def rounding_of_steps(later: float, contraction: float, widest: int, size: float) -> float:
    """Bound on the rounding of a value, given that of the value one step `later`.

    Each backup sums `widest` terms of at most `size`, and rounds each sum by as many units.
    """
    return contraction * later + (widest + 8) * 2.0**-53 * size


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


class ImplicitGradient(torch.autograd.Function):
    """The fixed point V = T(V; θ), with its gradient in θ by the implicit function theorem.

    dV = (I - M)^{-1} dT, M = ∂T/∂V: the policy's own discounted transitions. So the gradient g at V
    becomes (I - M)^{-T} g at T(V; θ). Christianson (1994), doi:10.1080/10556789408805572.
    """

    @staticmethod
    def forward(ctx: Any, backup: Tensor, value: Tensor, derivative: Any) -> Tensor:
        ctx.derivative = derivative
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "exact inference without a horizon can be differentiated once only: expected "
                "create_graph=False; give the model a horizon for second derivatives"
            )
        transposed = scipy.sparse.eye_array(len(gradients[0])) - ctx.derivative().T
        solved = scipy.sparse.linalg.spsolve(transposed.tocsc(), gradients[0].numpy())
        return torch.from_numpy(np.atleast_1d(solved)), None, None


def _differentiable(
    point: FixedPoint,
    step: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    weights: Callable[[Tensor], Tensor],
    model: FiniteModel,
) -> Tensor:
    """The fixed point as a tensor that knows its gradient, if there is anything to differentiate.

    :param weights: the derivative of the backup along the non-zeros of the model.
    """
    v = torch.from_numpy(point.value)
    q = step(v)
    backup = value(q)
    if not backup.requires_grad:
        return v

    def derivative() -> scipy.sparse.csr_array:
        along = weights(q).detach()
        grouped = model.pointers[:: model.num_actions].numpy()
        shape = (model.num_states, model.num_states)
        matrix = scipy.sparse.csr_array(
            (along.numpy(), model.successors.numpy(), grouped), shape=shape
        )
        return matrix.multiply(~model.is_terminal.numpy())  # V is fixed at terminal states

    return ImplicitGradient.apply(backup, v, derivative)


def posterior_initial(model: FiniteModel, v: Tensor) -> Tensor:
    """p(s_0 | O) ∝ p(s_0) exp V(s_0), (S,); `v` in nats."""
    return torch.softmax(log_or_impossible(model.initial) + v, -1)


def posterior_transition(
    model: FiniteModel, messages: Messages, temperature: float | Tensor
) -> Tensor:
    """p(s', alive | s, a, O) along the non-zeros: (N,), or (T, N)."""
    if model.horizon is None:
        return _log_posterior_transition(model, messages.q, messages.v, temperature).exp()
    return torch.stack(
        [
            _log_posterior_transition(model, q, v, temperature).exp()
            for q, v in zip(messages.q, messages.v[1:], strict=True)
        ]
    )


def _log_posterior_transition(
    model: FiniteModel, q: Tensor, v: Tensor, temperature: float | Tensor
) -> Tensor:
    log_survives = torch.tensor(model.discount, dtype=torch.float64).log()
    return (
        model.probabilities.log()
        + model.rewards / temperature
        + log_survives
        + v[model.successors]
        - q.flatten()[model.rows()]
    )


def first_step(v: Tensor) -> Tensor:
    """The message at the first step."""
    return v if v.dim() == 1 else v[0]


def _number(value: float | Tensor) -> float:
    return value if isinstance(value, int | float) else float(value.item())


def tied_actions(log_prior: Tensor, q: Tensor, error: float) -> Tensor:
    """Which actions are best in their state, (..., S, A), for V known within `error`."""
    q = torch.where(log_prior > -torch.inf, q, -torch.inf).detach()
    best = q.amax(-1, keepdim=True)
    return q >= best - 2 * error - 1e-12 * best.abs()


def _ending(model: FiniteModel, policy: Tensor, tied: Tensor) -> Tensor:
    """A greedy policy (S, A) with its ties broken towards the end of the episode, if need be.

    Without a discount, waiting costs nothing: the first of the best actions may put off for ever
    what V counts on. Any policy of tied actions that does end is worth V.
    """
    _, stuck = _towards_the_end(model, policy > 0)
    if not stuck.any():
        return policy
    reaches, _ = _towards_the_end(model, tied)
    chosen = torch.where(reaches.any(-1), reaches.int().argmax(-1), policy.argmax(-1))
    return torch.nn.functional.one_hot(chosen, model.num_actions).to(policy.dtype)


def _towards_the_end(model: FiniteModel, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Which allowed actions (S, A) may come one step nearer to the end, and from which states (S,)
    none ever reaches it.
    """
    rows, states = model.rows(), model.num_states
    possible = allowed.flatten()[rows] & (model.probabilities > 0)
    source, target = rows // model.num_actions, model.successors.long()
    # Edges reversed, and one more node from which every terminal state is reached at once.
    ends = model.is_terminal.nonzero().squeeze(-1)
    row = torch.cat([target[possible], torch.full_like(ends, states)]).numpy()
    column = torch.cat([source[possible], ends]).numpy()
    reverse = scipy.sparse.csr_array((np.ones(len(row)), (row, column)), shape=(states + 1,) * 2)
    _, nearer = scipy.sparse.csgraph.breadth_first_order(reverse, states)
    following = torch.from_numpy(nearer[:states]).long()
    reaches = torch.zeros(allowed.numel(), dtype=torch.bool)
    reaches[rows[possible & (target == following[source])]] = True
    return reaches.reshape(allowed.shape), following < 0
