"""The exact policy of one finite model for reward after reward: `RepeatedControl`.

1. Q = r̄ + γ P V,  V = α log Σ_a ρ e^{Q/α},  log π = log ρ + (Q - V) / α: the policy of control.
2. Without a horizon V is found by Newton's method, V + (I - γ P_π)^{-1} (T V - V), which is soft
   policy iteration, from the V of the last call. A sampler's steps are short: two or three do.
3. Let G be a gradient at log π, and x, y those at Q and V. Then x = G / α + π y and
   y = γ Pᵀ x - Σ_a G / α, which is one more solve with the same matrix, transposed.
4. ∂/∂r̄ = x, and ∂/∂α = Σ_s y (V - E_π Q) / α - Σ G (Q - V) / α². Where G counts how often actions
   were chosen, αx is that less how often the policy would choose them, were it put where the
   choices were made: the matching of features of Ziebart et al. (2010).

The same is `behaviour.log_policy`, certified and differentiable in everything, but an order of
magnitude slower on small models. A test holds the one to the other, value and gradient; it is asked
where Newton does not settle, and says why there is no value if there is none.

Ziebart, Bagnell and Dey (2010), "Modeling interaction via the principle of maximum causal entropy",
ICML.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from inference_rl.diagnostics.page import Array
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import control_messages

STEPS = 50
SETTLED = 1e-6
"""Residual, in units of reward and temperature, after which one more Newton step leaves nothing but
rounding."""

FEW_STATES = 200
"""States up to which linear equations are solved as dense ones."""


class RepeatedControl:
    """Solves for the exact policy of `model`, the same in all but its rewards and temperature."""

    def __init__(self, model: FiniteModel) -> None:
        self.model, self.discount = model, float(model.discount)
        self.shape = (model.num_states, model.num_actions)
        self.transition, self.log_prior = model.csr, model.log_prior.numpy()
        self.backwards = self.transition.T.tocsr()
        self.alive = ~model.is_terminal.numpy()
        few = model.num_states <= FEW_STATES
        self.dense = self.transition.toarray().reshape(*self.shape, -1) if few else None
        self.value: Array = np.zeros(model.num_states)

    def log_policy(self, reward: Tensor, temperature: Tensor) -> Tensor:
        """log π, (S, A) or (T, S, A), nats, with its gradient.

        :param reward: r̄, (S, A), reward units. :param temperature: α > 0, reward units, a scalar.
        :raises ValueError: there is no finite value.
        """
        return _LogPolicy.apply(reward, temperature, self)

    def solve(self, reward: Array, temperature: float) -> tuple[Array, Array]:
        """Q (S, A) and V (S,), reward units, or (T, S, A) and (T, S) of a horizon."""
        if self.model.horizon is None:
            return self._fixed_point(reward, temperature)
        value, found = np.zeros(self.shape[0]), []
        for _ in range(self.model.horizon):
            q = reward + self.discount * (self.transition @ value).reshape(self.shape)
            value = self._soften(q, temperature)
            found.append((q, value))
        qs, values = zip(*reversed(found), strict=True)
        return np.stack(qs), np.stack(values)

    def _soften(self, q: Array, temperature: float) -> Array:
        """V of Q, (S,)."""
        weight = self.log_prior + q / temperature
        peak = weight.max(1)
        total = np.exp(weight - peak[:, None]).sum(1)
        return np.where(self.alive, temperature * (peak + np.log(total)), 0.0)

    def policy(self, q: Array, value: Array, temperature: float) -> Array:
        """π, (..., S, A); zero where nobody acts."""
        log_policy = self.log_prior + (q - value[..., None]) / temperature
        return np.where(self.alive[:, None], np.exp(log_policy), 0.0)

    def _fixed_point(self, reward: Array, temperature: float) -> tuple[Array, Array]:
        value, last = self.value, False
        # Not in units of V, which may be on its way to infinity.
        close = SETTLED * max(temperature, float(np.abs(reward).max()))
        for _ in range(STEPS):
            q = reward + self.discount * (self.transition @ value).reshape(self.shape)
            backed_up = self._soften(q, temperature)
            if last:
                self.value = value
                return q, backed_up
            step = backed_up - value
            last = bool(np.abs(step).max() <= close)
            policy = self.policy(q, backed_up, temperature)
            try:
                value = value + self.solve_linear(policy, step, transposed=False)
            except (np.linalg.LinAlgError, RuntimeError):
                break
            if not np.isfinite(value).all():
                break
        return self._certified(reward, temperature)

    def _certified(self, reward: Array, temperature: float) -> tuple[Array, Array]:
        along = torch.from_numpy(reward).flatten()[self.model.rows()]
        found = control_messages(self.model.replace(rewards=along), temperature)
        self.value = found.v.numpy()
        return found.q.numpy(), found.v.numpy()

    def solve_linear(self, policy: Array, right: Array, *, transposed: bool) -> Array:
        """(I - γ P_π)^{-1} right, or that of the transpose; P_π between states that do not end."""
        if self.dense is not None:
            moves = np.einsum("sa,sat->st", policy, self.dense) * self.alive
            matrix = np.eye(len(moves)) - self.discount * moves
            return np.linalg.solve(matrix.T if transposed else matrix, right)
        along = policy.ravel()[self.model.rows().numpy()] * self.transition.data
        by_state = self.transition.indptr[:: self.shape[1]]
        moves = scipy.sparse.csr_array(
            (along * self.alive[self.transition.indices], self.transition.indices, by_state),
            shape=(self.shape[0],) * 2,
        )
        matrix = scipy.sparse.eye_array(self.shape[0]) - self.discount * moves
        return scipy.sparse.linalg.spsolve((matrix.T if transposed else matrix).tocsc(), right)

    def adjoint(
        self, gradient: Array, q: Array, value: Array, temperature: float
    ) -> tuple[Array, Array]:
        """x and y of the module's third line, for G = `gradient`: like Q and like V."""
        policy = self.policy(q, value, temperature)
        chosen, left = gradient / temperature, -gradient.sum(-1) / temperature
        if q.ndim == 2:
            arriving = self.discount * (self.backwards @ chosen.ravel())
            right = np.where(self.alive, left + arriving, 0.0)
            y = self.solve_linear(policy, right, transposed=True)
            return chosen + policy * y[:, None], y
        x, y = np.empty_like(q), np.empty_like(value)
        arriving = np.zeros(self.shape[0])
        for t in range(len(q)):
            y[t] = np.where(self.alive, left[t] + arriving, 0.0)
            x[t] = chosen[t] + policy[t] * y[t][:, None]
            arriving = self.discount * (self.backwards @ x[t].ravel())
        return x, y


class _LogPolicy(torch.autograd.Function):
    """log π of rewards and a temperature, differentiated by the adjoint equations."""

    @staticmethod
    def forward(ctx: Any, reward: Tensor, temperature: Tensor, control: RepeatedControl) -> Tensor:
        alpha = float(temperature)
        q, value = control.solve(reward.detach().numpy(), alpha)
        ctx.control, ctx.parts = control, (q, value, alpha)
        return torch.from_numpy(control.log_prior + (q - value[..., None]) / alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        q, value, alpha = ctx.parts
        gradient = gradients[0].numpy()
        x, y = ctx.control.adjoint(gradient, q, value, alpha)
        expected = (ctx.control.policy(q, value, alpha) * q).sum(-1)
        slope = (y * (value - expected)).sum() / alpha
        slope -= (gradient * (q - value[..., None])).sum() / alpha**2
        return torch.from_numpy(x.reshape(-1, *x.shape[-2:]).sum(0)), torch.tensor(slope), None
