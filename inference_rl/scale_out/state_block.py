"""`StateBlock`: consecutive states of a finite model, and what is computed of them alone.

A model is cut into blocks, each of which has the rows of its own states and no others. To back up a
value it needs, besides its own entries, those of the states elsewhere that its rows lead to: its
halo. What is computed with a halo therefore takes two steps: every block hands out the entries that
others need (`send`, or another method that returns a dictionary of them), and then each takes what
it got (`back_up`, `multiply` and so on). Nothing here knows how the entries travel.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_array

from inference_rl.backups import policy_rates, soft_policy, soft_value
from inference_rl.bellman_operators import ControlBackup, StateBlocks
from inference_rl.environment import EnvironmentModel
from inference_rl.fixed_point import checked_tables
from inference_rl.policy_evaluation import PartFactors
from inference_rl.priors import ActionPrior
from inference_rl.state_rows import StateRows, row_sum
from inference_rl.tabulation import tabulate_rows

Parts = dict[int, np.ndarray]
"""Entries of a vector, by the number of the block that they come from or go to."""

BASIS = 30
"""Vectors of the Krylov space in which a linear system is solved before it starts anew."""


class StateBlock:
    """The control messages of n states, at one discount and one temperature (reward units).

    :param rows: their tables. :param number: of the block.
    :param edges: (B + 1,), block b of all B has the states edges[b], ..., edges[b + 1] - 1.
    """

    def __init__(
        self,
        rows: StateRows,
        *,
        number: int,
        edges: np.ndarray,
        discount: float,
        temperature: float,
    ) -> None:
        self._states, self._actions = rows.log_prior.shape
        self._discount, self._temperature = discount, temperature
        self._log_prior, self._terminal = rows.log_prior.detach(), rows.terminal
        probabilities = rows.probabilities.detach()
        rewards = rows.rewards.detach()
        self._largest_reward = float(rewards.abs().max()) if len(rewards) else 0.0
        self._reward = row_sum(probabilities * rewards, rows.pointers, self._actions)
        columns, outside = _local(rows.successors.numpy(), int(edges[number]), self._states)
        self._width = self._states + outside.size
        at = np.searchsorted(outside, edges)
        self._slots = {
            owner: slice(self._states + int(at[owner]), self._states + int(at[owner + 1]))
            for owner in range(len(edges) - 1)
            if at[owner] < at[owner + 1]
        }
        self._needed: Parts = {
            owner: outside[at[owner] : at[owner + 1]] - edges[owner] for owner in self._slots
        }
        self._wanted: Parts = {}
        kind = np.int32 if max(self._width, columns.size) < 2**31 else np.int64
        self._transition = csr_array(
            (
                probabilities.numpy(),
                columns.astype(kind, copy=False),
                rows.pointers.numpy().astype(kind, copy=False),
            ),
            shape=(self._states * self._actions, self._width),
        )

    @classmethod
    def tabulated(
        cls,
        model: EnvironmentModel,
        prior: ActionPrior | None,
        *,
        number: int,
        edges: np.ndarray,
        temperature: float,
    ) -> StateBlock:
        """Block `number` of a program, tabulated here; errors are those of `tabulate`."""
        low, high = int(edges[number]), int(edges[number + 1])
        rows = tabulate_rows(model, low, high, prior=prior)
        discount = model.discount
        return cls(rows, number=number, edges=edges, discount=discount, temperature=temperature)

    # ---- what others need to know ----------------------------------------------------------------

    def ask_for(self, blocks: int) -> Parts:
        """Which entries this one needs from each of all `blocks`, in their own numbering."""
        nothing = np.empty(0, dtype=np.int64)
        return {owner: self._needed.get(owner, nothing) for owner in range(blocks)}

    def note(self, asked: Parts) -> list[int]:
        """Take note of what each other one asked for; the numbers of those that asked."""
        self._wanted = {other: entries for other, entries in asked.items() if entries.size}
        return sorted(self._wanted)

    def describe(self) -> tuple[np.ndarray, int, int, float]:
        """Terminal states (n,), size of the halo, terms in the longest backup, largest reward."""
        widest = int(np.diff(self._transition.indptr).max()) + self._actions
        halo = self._width - self._states
        return self._terminal.numpy(), halo, widest, self._largest_reward

    # ---- values ----------------------------------------------------------------------------------

    def send(self, vector: np.ndarray) -> Parts:
        """Begin with a vector (n,), or some (c, n): what the others need of it."""
        self._sent = vector
        return {other: vector[..., entries] for other, entries in self._wanted.items()}

    def _seen(self, halo: Parts) -> np.ndarray:
        """The vector, own entries first: (width,) or (c, width)."""
        whole = np.empty((*self._sent.shape[:-1], self._width))
        whole[..., : self._states] = self._sent
        for owner, slots in self._slots.items():
            whole[..., slots] = halo[owner]
        return whole

    def back_up(self, halo: Parts) -> tuple[np.ndarray, float]:
        """T V (n,), and a bound on its rounding."""
        self._value = self._seen(halo)
        self._backed_up = self._backup(self._value)
        return self._backed_up, self._backup.rounding(self._value, self._backed_up)

    def slope(self) -> tuple[float, float]:
        """Least and largest sum of a row of T's derivative."""
        return self._backup.slope

    def conclude(self, halo: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Q and π (n, A), and the rates (n, 4) of `policy_rates`, for the value sent."""
        q = self._q(self._seen(halo))
        self._policy = soft_policy(q, self._log_prior, self._temperature)
        return q.numpy(), self._policy.numpy(), self._rates(self._policy).numpy()

    def allowed(self) -> np.ndarray:
        """Which actions the prior allows, (n, A)."""
        return (self._log_prior > -torch.inf).numpy()

    def step(self, halo: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """One step of a finite horizon backwards.

        :returns: V and the sums of the rates from here on (5, n), made of those sent; Q and π
            (n, A) and the largest |Q|.
        """
        value, *sums = self._seen(halo)
        q = self._q(value)
        policy = soft_policy(q, self._log_prior, self._temperature)
        rates = self._rates(policy)
        before = [
            torch.where(self._terminal, 0.0, soft_value(q, self._log_prior, self._temperature))
        ]
        for rate, total in zip(rates.unbind(-1), sums, strict=True):
            before.append(rate + self._discount * (policy * self._expected(total)).sum(1))
        largest = float(q.abs().max())
        return torch.stack(before).numpy(), q.numpy(), policy.numpy(), largest

    def _q(self, value: np.ndarray) -> torch.Tensor:
        return self._reward + self._discount * self._expected(value)

    def _expected(self, value: np.ndarray) -> torch.Tensor:
        product = torch.from_numpy(self._transition @ value)
        return product.reshape(self._states, self._actions)

    def _rates(self, policy: torch.Tensor) -> torch.Tensor:
        rates = policy_rates(policy, self._reward, self._log_prior)
        return torch.where(self._terminal.unsqueeze(-1), 0.0, rates)

    @cached_property
    def _backup(self) -> ControlBackup:
        transition, log_prior, terminal, row_mass = checked_tables(
            self._transition, self._log_prior.numpy(), self._terminal.numpy()
        )
        return ControlBackup(
            transition,
            self._reward.numpy(),
            log_prior,
            row_mass=row_mass,
            terminal=terminal,
            discount=self._discount,
            temperature=self._temperature,
            threads=False,  # other blocks have the other cores
        )

    # ---- the linear system (I - J) x = b of a policy ---------------------------------------------

    def linearise(self, policy: Literal["best", "concluded"]) -> None:
        """Set J: under the best policy against the value last backed up, or the one concluded."""
        if policy == "best":
            matrix = self._backup.derivative(self._value, self._backed_up)
        else:
            matrix = self._backup.evaluation(self._policy.numpy())
        self._matrix = StateBlocks(matrix, 1, threads=False)
        if self._factors.direct:
            self._factors.factorise(self._own(matrix))

    def multiply(self, halo: Parts) -> np.ndarray:
        """J x, (n,)."""
        return self._matrix.multiply(self._seen(halo))

    def begin(self, right: np.ndarray) -> float:
        """Set b, and x to zero; |b|²."""
        self._right = self._residual = right
        self._solution = np.zeros_like(right)
        self._basis = np.empty((BASIS, self._states))
        return float(right @ right)

    def direction(self, number: int, along: np.ndarray, norm: float) -> Parts:
        """Basis vector `number`: what is left of the last image without its share `along` those
        before, or of b; over its norm. What others need of it, with the factors applied.
        """
        left = self._image - along @ self._basis[:number] if number else self._residual
        self._basis[number] = left / norm
        self._count = number + 1
        return self.send(self._factors(self._basis[number]))

    def image(self, halo: Parts) -> np.ndarray:
        """Inner products of (I - J) times what was sent with the basis vectors so far."""
        self._image = self._sent - self.multiply(halo)
        return self._basis[: self._count] @ self._image

    def orthogonalise(self, along: np.ndarray) -> np.ndarray:
        """Take its share `along` the basis from it; what inner products are left, and its own."""
        basis = self._basis[: along.size]
        self._image = self._image - along @ basis
        return np.append(basis @ self._image, self._image @ self._image)

    def improve(self, coordinates: np.ndarray) -> Parts:
        """Add what has these coordinates to x; what others need of that."""
        step = self._factors(coordinates @ self._basis[: coordinates.size])
        self._solution = self._solution + step
        return self.send(self._solution)

    def leftover(self, halo: Parts) -> float:
        """|b - (I - J) x|²."""
        self._residual = self._right - self._solution + self.multiply(halo)
        return float(self._residual @ self._residual)

    def solution(self) -> np.ndarray:
        """x, (n,)."""
        return self._solution

    @cached_property
    def _factors(self) -> PartFactors:
        by_state = np.ascontiguousarray(self._transition.indptr[:: self._actions])
        shape = (self._states, self._width)
        graph = csr_array((self._transition.data, self._transition.indices, by_state), shape=shape)
        return PartFactors(self._own(graph))

    def _own(self, matrix: csr_array) -> csr_array:
        """What leads from own states to own ones, (n, n), of a matrix (n, width)."""
        inside = matrix.indices < self._states
        starts = np.concatenate([[0], np.cumsum(inside)])[matrix.indptr].astype(
            matrix.indices.dtype
        )
        shape = (self._states, self._states)
        return csr_array((matrix.data[inside], matrix.indices[inside], starts), shape=shape)


def _local(successors: np.ndarray, low: int, states: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each successor is among the states seen, own ones first; and those elsewhere."""
    inside = (successors >= low) & (successors < low + states)
    outside = np.unique(successors[~inside]).astype(np.int64)
    columns = successors.astype(np.int64) - low
    columns[~inside] = states + np.searchsorted(outside, successors[~inside])
    return columns, outside
