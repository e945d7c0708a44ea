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
from scipy.linalg.lapack import dgesv
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
        self.alive = ~model.is_terminal.numpy()
        self.value: Array = np.zeros(model.num_states)
        self.dense: Array | None = None
        if model.num_states <= FEW_STATES:
            # Sparse products of small tables are all overhead.
            self.dense = self.transition.toarray()
            self._identity = np.eye(model.num_states)
            self._kept = self.discount * self.dense.reshape(*self.shape, -1) * self.alive

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
            q = reward + self._expected(value)
            value, _ = self._soften(q, temperature)
            found.append((q, value))
        qs, values = zip(*reversed(found), strict=True)
        return np.stack(qs), np.stack(values)

    def _expected(self, value: Array) -> Array:
        """γ P V, (S, A)."""
        table = self.transition if self.dense is None else self.dense
        return self.discount * (table @ value).reshape(self.shape)

    def _arriving(self, x: Array) -> Array:
        """γ Pᵀ x, (S,)."""
        table = self.transition if self.dense is None else self.dense
        return self.discount * (x.ravel() @ table)

    def _soften(self, q: Array, temperature: float) -> tuple[Array, Array]:
        """V (S,) and π (S, A) of Q; zero where nobody acts."""
        weight = self.log_prior + q / temperature
        peak = weight.max(1, keepdims=True)
        mass = np.exp(weight - peak)
        total = mass.sum(1, keepdims=True)
        value = temperature * (peak + np.log(total))[:, 0]
        return np.where(self.alive, value, 0.0), np.where(self.alive[:, None], mass / total, 0.0)

    def _fixed_point(self, reward: Array, temperature: float) -> tuple[Array, Array]:
        value, last = self.value, False
        # Not in units of V, which may be on its way to infinity.
        close = SETTLED * max(temperature, float(np.abs(reward).max()))
        for _ in range(STEPS):
            q = reward + self._expected(value)
            backed_up, policy = self._soften(q, temperature)
            if last:
                self.value = value
                return q, backed_up
            step = backed_up - value
            last = bool(np.abs(step).max() <= close)
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
            matrix = self._identity - (policy[:, None] @ self._kept)[:, 0]
            *_, found, singular = dgesv(matrix.T if transposed else matrix, right)
            if singular:
                raise np.linalg.LinAlgError
            return found
        along = policy.ravel()[self.model.rows().numpy()] * self.transition.data
        by_state = self.transition.indptr[:: self.shape[1]]
        moves = scipy.sparse.csr_array(
            (along * self.alive[self.transition.indices], self.transition.indices, by_state),
            shape=(self.shape[0],) * 2,
        )
        matrix = scipy.sparse.eye_array(self.shape[0]) - self.discount * moves
        return scipy.sparse.linalg.spsolve((matrix.T if transposed else matrix).tocsc(), right)

    def slopes(
        self, gradient: Array, q: Array, value: Array, temperature: float
    ) -> tuple[Array, float]:
        """∂/∂r̄ (S, A) and ∂/∂α, by the module's fourth line, for G = `gradient`, like Q."""
        log_ratio = (q - value[..., None]) / temperature
        policy = np.where(self.alive[:, None], np.exp(self.log_prior + log_ratio), 0.0)
        x, y = self._adjoint(gradient, policy, temperature)
        slope = (y * (value - (policy * q).sum(-1))).sum() - (gradient * log_ratio).sum()
        return x.reshape(-1, *self.shape).sum(0), float(slope / temperature)

    def _adjoint(self, gradient: Array, policy: Array, temperature: float) -> tuple[Array, Array]:
        """x and y of the module's third line: like Q and like V."""
        chosen, left = gradient / temperature, -gradient.sum(-1) / temperature
        if policy.ndim == 2:
            right = np.where(self.alive, left + self._arriving(chosen), 0.0)
            y = self.solve_linear(policy, right, transposed=True)
            return chosen + policy * y[:, None], y
        x, y = np.empty_like(policy), np.empty_like(left)
        arriving = np.zeros(self.shape[0])
        for t in range(len(policy)):
            y[t] = np.where(self.alive, left[t] + arriving, 0.0)
            x[t] = chosen[t] + policy[t] * y[t][:, None]
            arriving = self._arriving(x[t])
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
        along_reward, along_temperature = ctx.control.slopes(gradients[0].numpy(), *ctx.parts)
        return torch.from_numpy(along_reward), gradients[0].new_tensor(along_temperature), None
