"""How likely demonstrated behaviour is, as a function of what the demonstrator may want.

1. A demonstrator with parameters θ and temperature α acts by π_{θ,α}, the exact policy of control:
   log p(episode | θ, α) = log p(s_0) + Σ_t [log π_{θ,α}(a_t | s_t) + log P(s_{t+1} | s_t, a_t)].
2. Episodes matter by counts alone: how often each action was taken in each state, and at each step
   if there is a horizon. So a likelihood is one solve and one inner product.
3. Where the start and the dynamics do not depend on θ they are the same for all θ, and cancel.
   Where they do, first and next states are counted as well: the program observes them too.
4. Rewards alone that depend on θ are the common case and the fast one (`repeated_control`); other
   tables are made anew for every θ, and differentiated through (`behaviour.log_policy`).
5. Where rewards are affine in θ, as those of features are, r̄ = base + matrix · θ, and `build` is
   not called again. That is found by its values at draws from the prior, and seen again at some
   from the posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from inference_rl.diagnostics.behaviour import Episode, log_policy
from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.repeated_control import RepeatedControl
from inference_rl.distributions import log_or_impossible
from inference_rl.environment import EnvironmentModel
from inference_rl.finite import FiniteModel
from inference_rl.tabulation import checked_tensor, default_float64, tabulate

Parameters = Mapping[str, Tensor]
Build = Callable[[dict[str, Tensor]], EnvironmentModel]

EXTRA = 20
"""Examples more than an affine map needs, to see whether rewards are one."""

AFFINE = 1e-11
"""Relative to the largest reward: how far rewards may be from an affine map, by rounding."""

LARGEST_MAP = 10**6
"""Numbers in the matrix of an affine map."""


class ParametricModel:
    """`build` as tables, of which only what depends on the parameters is made anew.

    :param build: from parameters, float64 tensors by name, to a finite model.
    :param examples: of parameters, (D, ...) by name: what depends on them is seen from these.
    :ivar only_rewards: whether nothing but rewards depends on them.
    :ivar affine: base (S, A) and matrix (S·A, p) of r̄ = base + matrix · θ, or None.
    :raises TypeError, ValueError: what `build` makes of these is no finite model, or of another
        size, end, discount or horizon each time.
    """

    def __init__(self, build: Build, examples: Parameters) -> None:
        self.build = build
        first, second = (self.tables(_tracked(_example(examples, i))) for i in range(2))
        for name, one, other in (
            ("states and actions", first.log_prior.shape, second.log_prior.shape),
            ("terminal states", first.is_terminal.tolist(), second.is_terminal.tolist()),
            ("discount", first.discount, second.discount),
            ("horizon", first.horizon, second.horizon),
        ):
            if one != other:
                raise ValueError(
                    "build: expected models that differ in rewards, dynamics or priors alone, got "
                    f"other {name} for other parameters; fix them"
                )
        self.only_rewards = all(
            not table.requires_grad and torch.equal(table, second.tensors()[name])
            for name, table in first.tensors().items()
            if name != "rewards"
        )
        self.fixed = first.replace(
            **{name: table.detach() for name, table in first.tensors().items()}
        )
        rows = self.fixed.rows()
        actions = self.fixed.num_actions
        self._along = (rows // actions, rows % actions, self.fixed.successors.long())
        self.affine: tuple[Tensor, Tensor] | None = None
        if self.only_rewards:
            self.affine = self._fitted(examples)

    def _fitted(self, examples: Parameters) -> tuple[Tensor, Tensor] | None:
        """base (S, A) and matrix (S·A, p) of r̄, or None if it is not affine in θ."""
        size = sum(values[0].numel() for values in examples.values())
        needed = size + 1 + EXTRA
        if size == 0 or size * self.fixed.log_prior.numel() > LARGEST_MAP:
            return None
        if needed > len(next(iter(examples.values()))):
            return None
        some = [_example(examples, i) for i in range(needed)]
        design = torch.stack([torch.cat([torch.ones(1).double(), _flat(p)]) for p in some])
        with torch.no_grad():
            rewards = torch.stack([self.expected_reward(p, anew=True).flatten() for p in some])
        if torch.linalg.matrix_rank(design) <= size:
            return None
        fit = torch.linalg.lstsq(design, rewards).solution
        if (design @ fit - rewards).abs().max() > AFFINE * rewards.abs().max().clamp(min=1):
            return None
        return fit[0].reshape(self.fixed.log_prior.shape), fit[1:].T.contiguous()

    def is_still_affine(self, examples: Parameters, number: int) -> bool:
        """Whether rewards at the first `number` examples are what the affine map says, if any.

        If not, there is none from now on.
        """
        if self.affine is None:
            return True
        with torch.no_grad():
            for example in (_example(examples, i) for i in range(number)):
                ours = self.expected_reward(example)
                theirs = self.expected_reward(example, anew=True)
                if (ours - theirs).abs().max() > AFFINE * theirs.abs().max().clamp(min=1):
                    self.affine = None
                    return False
        return True

    def expected_reward(self, parameters: Parameters, *, anew: bool = False) -> Tensor:
        """r̄(s, a) at `parameters`, where nothing else depends on them: (S, A), reward units.

        :param anew: by `build`, whatever is known of it.
        """
        if self.affine is not None and not anew:
            base, matrix = self.affine
            return base + (matrix @ _flat(parameters)).reshape(base.shape)
        return self.fixed.row_sum(self.fixed.probabilities * self._rewards(parameters))

    def _rewards(self, parameters: Parameters) -> Tensor:
        with default_float64():
            try:
                found = self.build(dict(parameters)).reward(*self._along)
                checked_tensor(found, self._along[0].shape, "reward")
                if not torch.isfinite(found).all():
                    raise ValueError("reward: expected finite numbers, got others")
            except Exception as error:
                raise no_model(parameters, error) from error
        return found.double()

    def tables(self, parameters: Parameters) -> FiniteModel:
        """The model at `parameters`, made anew.

        :raises TypeError: it is not finite. :raises ValueError: there is none.
        """
        with default_float64():
            try:
                model = self.build(dict(parameters))
                if not isinstance(model, EnvironmentModel):
                    raise TypeError(f"expected an EnvironmentModel, got a {type(model).__name__}")
                return tabulate(model)
            except TypeError as error:
                raise TypeError(f"build: {error}") from error
            except Exception as error:
                raise no_model(parameters, error) from error


def _example(examples: Parameters, i: int) -> dict[str, Tensor]:
    return {name: values[i] for name, values in examples.items()}


def _flat(parameters: Parameters) -> Tensor:
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def _tracked(parameters: Parameters) -> Parameters:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def no_model(parameters: Parameters, error: Exception) -> ValueError:
    """What to say where `build` fails."""
    values = ", ".join(
        f"{name} = {np.array2string(value.detach().numpy(), precision=4)}"
        for name, value in parameters.items()
    )
    return ValueError(
        f"build: no valid model at {values}, which the priors allow: {error}; narrow the priors, "
        "or let build take every number that they have mass on"
    )


class Counts:
    """What was demonstrated, of one kind: which outcome of which row of a table, how often.

    :ivar rows: (R,), the distinct rows. :ivar row, outcome, total: (K,), each distinct pair, and
        how often it was seen; `row` counts in `rows`. :ivar by_episode: (E, K), sparse.
    """

    def __init__(self, rows: Sequence[Tensor], outcomes: Sequence[Tensor]) -> None:
        row, outcome = torch.cat(list(rows)), torch.cat(list(outcomes))
        pairs, which = torch.unique(torch.stack([row, outcome], -1), dim=0, return_inverse=True)
        self.rows, self.row = torch.unique(pairs[:, 0], return_inverse=True)
        self.outcome = pairs[:, 1]
        self.total = torch.bincount(which, minlength=len(pairs)).double()
        episode = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        self.by_episode = scipy.sparse.csr_array(
            (np.ones(len(which)), (episode, which.numpy())), shape=(len(rows), len(pairs))
        )
        self.of_row = torch.zeros(len(self.rows), dtype=torch.float64).index_add(
            0, self.row, self.total
        )


class RewardLikelihood:
    """log p(episodes | θ, α), but for what does not depend on θ and α.

    :param model: of θ. :param episodes: all of them possible in it.
    :ivar counts: of actions in states (or in steps and states), and where tables depend on θ also
        of states after states and actions, and of first states.
    """

    def __init__(self, model: ParametricModel, episodes: Sequence[Episode]) -> None:
        self.model, fixed = model, model.fixed
        S, A = fixed.num_states, fixed.num_actions
        decisions = [e.before for e in episodes]
        if fixed.horizon is not None:
            decisions = [torch.arange(len(s)) * S + s for s in decisions]
        self.counts = {"action": Counts(decisions, [e.actions for e in episodes])}
        if model.only_rewards:
            self.control = RepeatedControl(fixed)
            counts = self.counts["action"]
            self._decided = counts.rows[counts.row] * A + counts.outcome
            shape = (S, A) if fixed.horizon is None else (fixed.horizon, S, A)
            self._times = np.zeros(shape)
            self._times.ravel()[self._decided] = counts.total.numpy()
            return
        after = [e.states[1:] for e in episodes]
        moves = [(e.before * A + e.actions)[: len(s)] for e, s in zip(episodes, after, strict=True)]
        starts = [e.states[:1] for e in episodes]
        self.counts["next_state"] = Counts(moves, after)
        self.counts["state_0"] = Counts([torch.zeros_like(s) for s in starts], starts)

    def tables(self, parameters: Parameters, temperature: Tensor) -> dict[str, Tensor]:
        """Log-probabilities of all outcomes of what was counted, nats, (R, ...) by kind."""
        if self.model.only_rewards:
            return {"action": self._seen("action", self._log_policy(parameters, temperature))}
        finite = self.model.tables(parameters)
        moves = torch.zeros(
            finite.num_states * finite.num_actions, finite.num_states, dtype=torch.float64
        )
        moves = moves.index_put((finite.rows(), finite.successors.long()), finite.probabilities)
        try:
            actions = log_policy(finite, temperature)
        except ValueError as error:
            raise no_model(parameters, error) from error
        return {
            "action": self._seen("action", actions),
            "next_state": log_or_impossible(self._seen("next_state", moves)),
            "state_0": log_or_impossible(finite.initial).unsqueeze(0),
        }

    def _log_policy(self, parameters: Parameters, temperature: Tensor) -> Tensor:
        reward = self.model.expected_reward(parameters)
        try:
            return self.control.log_policy(reward, temperature)
        except ValueError as error:
            raise no_model(parameters, error) from error

    def _seen(self, kind: str, table: Tensor) -> Tensor:
        return table.reshape(-1, table.shape[-1])[self.counts[kind].rows]

    def __call__(self, parameters: Parameters, temperature: Tensor) -> Tensor:
        """Of all episodes together, nats: a scalar with its gradient."""
        if self.model.only_rewards:
            table = self._log_policy(parameters, temperature)
            return table.reshape(-1)[self._decided] @ self.counts["action"].total
        tables = self.tables(parameters, temperature)
        parts = [(n.total * tables[k][n.row, n.outcome]).sum() for k, n in self.counts.items()]
        return torch.stack(parts).sum()

    def with_gradient(self, parameters: Array, temperature: float) -> tuple[float, Array]:
        """The same for rewards that are affine, at θ (p,), and its gradient in θ and α, (p + 1,).

        :raises ValueError: there is no finite value.
        """
        assert self.model.affine is not None
        base, matrix = (table.numpy() for table in self.model.affine)
        reward = base + (matrix @ parameters).reshape(base.shape)
        q, value = self.control.solve(reward, temperature)
        log_policy = self.control.log_prior + (q - value[..., None]) / temperature
        seen = self._decided.numpy()
        total = log_policy.ravel()[seen] @ self._times.ravel()[seen]
        along, slope = self.control.slopes(self._times, q, value, temperature)
        return float(total), np.append(along.ravel() @ matrix, slope)

    def of_episodes(self, parameters: Parameters, temperature: Tensor) -> Array:
        """Of each episode by itself, nats: (E,)."""
        with torch.no_grad():
            tables = self.tables(parameters, temperature)
        return sum(
            n.by_episode @ tables[k][n.row, n.outcome].numpy() for k, n in self.counts.items()
        )
