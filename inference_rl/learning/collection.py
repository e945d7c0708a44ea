"""Collection: what a policy does in a batch of environments, step by step or in whole episodes.

Sampling is a pure function of the policy and of the number of the episode: slot i of n plays
episodes i, i + n, i + 2n, ..., each from a seed of its own, and every action is drawn from noise
that depends on that seed and on the step alone. So it does not matter who collects, and a run that
is resumed goes on as if it had never stopped: the environments are put back where they were by
replaying the actions of their current episodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_rl.policies import Policy
from inference_rl.randomness import ACTIONS, Ahead, derived, draw, episode_seeds
from inference_rl.simulate import EnvironmentFault, Environments

_CHUNK = 1024
"""Episodes whose seeds are made at once."""

_STARTS = 1000
"""So often in a row an episode may end where it starts before that is taken for a mistake."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """What N slots went through in T steps; time first.

    :ivar state, next_state: (T, N, ...); `next_state` is what the action led to, never the start of
        the next episode. :ivar action: (T, N, ...). :ivar reward: (T, N), float64.
    :ivar terminated, truncated: (T, N) booleans. :ivar step: (T, N), t within the episode.
    :ivar valid: (T, N) booleans; False where a slot had nothing left to do.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    terminated: Tensor
    truncated: Tensor
    step: Tensor
    valid: Tensor

    @functools.cached_property
    def ended(self) -> Tensor:
        """(T, N): whether what follows in time is another episode."""
        return self.terminated | self.truncated

    @functools.cached_property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.valid.sum())

    def masked(self, values: Tensor) -> Tensor:
        """`values`, (T, N), and zero where a slot had nothing left to do."""
        is_whole = self.steps == self.valid.numel()
        return values if is_whole else values.masked_fill(~self.valid, 0.0)


@dataclasses.dataclass(frozen=True)
class Episode:
    """A finished episode: its number, the sum of its rewards, and its length."""

    number: int
    total: float
    length: int


_WATCHERS: ContextVar[tuple[Callable[[Segment], None], ...]] = ContextVar("_WATCHERS", default=())


@contextlib.contextmanager
def watched(see: Callable[[Segment], None]) -> Iterator[None]:
    """Show `see` every segment that is collected within, by whatever routine, as it comes."""
    token = _WATCHERS.set((*_WATCHERS.get(), see))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def _shown(data: Segment) -> Segment:
    for see in _WATCHERS.get():
        see(data)
    return data


class _EpisodeSeeds:
    """Seeds of episodes by number, made for many at once."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._chunks: dict[int, np.ndarray] = {}

    def of(self, episodes: np.ndarray) -> np.ndarray:
        return np.array([self._chunk(e // _CHUNK)[e % _CHUNK] for e in episodes.tolist()])

    def _chunk(self, number: int) -> np.ndarray:
        if number not in self._chunks:
            episodes = np.arange(number * _CHUNK, (number + 1) * _CHUNK)
            # The last two: slots are seldom further apart.
            self._chunks = dict([*self._chunks.items()][-1:])
            self._chunks[number] = episode_seeds(self._seed, episodes)
        return self._chunks[number]


class Collector:
    """A batch of environments at work.

    An episode that ends where it starts has no steps: it counts among the `finished`, and leaves
    nothing else behind.

    :param environments: its slots are this collector's alone.
    :param seed: of the run.
    :ivar finished: episodes that ended since this was last emptied, in the order of their ends.
    """

    def __init__(self, environments: Environments, seed: int) -> None:
        self.environments, size = environments, environments.size
        self._environment_seeds = _EpisodeSeeds(derived(seed, "environment"))
        self._policy_seeds = _EpisodeSeeds(derived(seed, "policy"))
        self._episode = np.arange(size)
        self._seeds = self._policy_seeds.of(self._episode)
        self._step = np.zeros(size, dtype=np.int64)
        self._ahead = Ahead(size)
        self._ones = torch.ones(size, dtype=torch.bool)
        self._total = np.zeros(size)
        self._taken: list[Tensor] = []
        """Actions of all slots, step by step: those of a slot's episode are its rows of the last
        `_step[slot]`."""
        self._state: Tensor | None = None
        self.finished: list[Episode] = []
        self._mark()

    def collect(self, policy: Policy, steps: int) -> Segment:
        """`steps` steps in every slot, whose episodes follow one another.

        :raises ValueError: all episodes end where they start.
        """
        every = np.arange(self.environments.size)
        self._mark()
        if self._state is None:
            self._state = self._begin_to_act(every)
        rows = []
        for _ in range(steps):
            row = self._advance(policy, every)
            rows.append(row)
            self._state = row["next_state"]
            if not self.environments.alive.all():
                over = np.flatnonzero(~self.environments.alive)
                self._finish(over)
                self._state = self._state.clone()
                self._state[torch.from_numpy(over)] = self._begin_to_act(over)
        return _shown(_stacked(rows))

    def collect_episodes(self, policy: Policy) -> Segment:
        """One whole episode in every slot; T is the length of the longest, at least 1.

        :raises RuntimeError: some slot is in the middle of an episode.
        :raises ValueError: all episodes end where they start.
        """
        every = np.arange(self.environments.size)
        if self._step.any():
            raise RuntimeError("whole episodes start together: expected every slot at its start")
        self._mark()
        start = self._state = self._begin(every)
        tried = 1
        while not (alive := self.environments.alive.copy()).any():
            start = self._state = self._begin_again(every, tried)
            tried += 1
        self._finish(every[~alive])
        rows, slots = [], every[alive]
        while slots.size:
            row = self._advance(policy, slots)
            over = (row["terminated"] | row["truncated"]).numpy()
            here = torch.from_numpy(slots)
            self._state = self._state.clone()  # the old one is part of what was collected
            self._state[here] = row["next_state"]
            rows.append({name: _spread(value, here, every.size) for name, value in row.items()})
            self._finish(slots[over])
            slots = slots[~over]
        self._state = None
        data = _stacked(rows)
        data.state[0] = start  # of those too that go no further
        return _shown(data)

    def _begin_to_act(self, slots: np.ndarray) -> Tensor:
        """Start episodes in `slots` until all of them have one that goes on."""
        state, tried = self._begin(slots), 1
        while (over := ~self.environments.alive[slots]).any():
            state = state.clone()
            state[torch.from_numpy(over)] = self._begin_again(slots[over], tried)
            tried += 1
        return state

    def _begin_again(self, slots: np.ndarray, tried: int) -> Tensor:
        """Count the episodes of `slots`, which ended where they started, and start the next."""
        if tried == _STARTS:
            raise ValueError(
                f"terminal: expected an episode that goes beyond its start, got {tried} in a row "
                "that end there; see to what initial_state and terminal of the model say"
            )
        self._finish(slots)
        return self._begin(slots)

    def _begin(self, slots: np.ndarray) -> Tensor:
        self._seeds[slots] = self._policy_seeds.of(self._episode[slots])
        return self.environments.reset(slots, self._environment_seeds.of(self._episode[slots]))

    def _advance(self, policy: Policy, slots: np.ndarray) -> dict[str, Tensor]:
        assert self._state is not None
        # Of all slots, whoever acts: the last bit of a matrix product depends on its size.
        every = torch.from_numpy(self._step.copy())
        with torch.no_grad():
            distribution = policy(self._state, every)
            drawn = draw(distribution, self._seeds, self._step, ACTIONS, self._ahead)
        row = {"state": self._state, "action": drawn, "step": every, "valid": self._ones}
        if slots.size < self._step.size:
            here = torch.from_numpy(slots)
            row = {name: value[here] for name, value in row.items()}
        outcome = self.environments.step(slots, row["action"])
        self._taken.append(drawn)
        self._step[slots] += 1
        self._total[slots] += outcome.reward.numpy()
        row["reward"], row["next_state"] = outcome.reward, outcome.next_state
        row["terminated"], row["truncated"] = outcome.terminated, outcome.truncated
        return row

    def _finish(self, slots: np.ndarray) -> None:
        for slot in slots:
            self.finished.append(
                Episode(int(self._episode[slot]), float(self._total[slot]), int(self._step[slot]))
            )
        self._episode[slots] += self.environments.size
        self._step[slots] = 0
        self._total[slots] = 0.0

    def _mark(self) -> None:
        """Remember where every slot is, should what is collected from here on be lost."""
        del self._taken[: len(self._taken) - self._step.max()]
        self._marked: dict[str, Any] = {
            "episode": self._episode.copy(),
            "step": self._step.copy(),
            "total": self._total.copy(),
            "taken": len(self._taken),
            "finished": len(self.finished),
            "state": self._state,
        }

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """Where every slot is: its episode, and the actions taken in it.

        :param before: as it was before the last collection, which failed.
        """
        if not before:
            self._mark()
        at = self._marked
        taken = self._taken[: at["taken"]]
        return {
            "episode": torch.from_numpy(at["episode"]),
            "total": torch.from_numpy(at["total"]),
            "actions": [
                torch.stack([action[slot] for action in taken[-steps:]]) if steps else None
                for slot, steps in enumerate(at["step"].tolist())
            ],
            "finished": [dataclasses.astuple(e) for e in self.finished[: at["finished"]]],
            "state": at["state"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken, by replaying the episodes that were going on.

        :raises EnvironmentFault: an environment does not do again what it did.
        """
        self._episode[:] = state["episode"].numpy()
        self.finished = [Episode(*episode) for episode in state["finished"]]
        self._step[:] = [0 if taken is None else len(taken) for taken in state["actions"]]
        self._total[:] = state["total"].numpy()
        self._taken = _side_by_side(state["actions"])
        if state["state"] is None:
            self._state = None
            return
        # Late starters last, so that all who have begun take every step together, as the parts of a
        # vector environment must.
        self._state, longest = torch.zeros_like(state["state"]), int(self._step.max(initial=0))
        total = np.zeros(self.environments.size)
        for t in range(longest + 1):
            late = np.flatnonzero(longest - self._step == t)
            if late.size:
                self._state[torch.from_numpy(late)] = self._begin(late)
            if t == longest:
                break
            slots = np.flatnonzero(longest - self._step <= t)
            outcome = self.environments.step(slots, self._taken[t][torch.from_numpy(slots)])
            if not self.environments.alive[slots].all():
                over = outcome.terminated | outcome.truncated
                raise self._strayed(int(slots[over.numpy()][0]))
            self._state[torch.from_numpy(slots)] = outcome.next_state
            total[slots] += outcome.reward.numpy()
        differs = self._state != state["state"]
        elsewhere = differs.reshape(self.environments.size, -1).any(1).numpy()
        if (strayed := elsewhere | (total != self._total)).any():
            raise self._strayed(int(np.flatnonzero(strayed)[0]))

    def _strayed(self, slot: int) -> EnvironmentFault:
        return EnvironmentFault(
            f"resume: episode {self._episode[slot]}, replayed from its seed, went another way than "
            "it did before; the environment does not depend on its seed and actions alone, and a "
            "run on it cannot be resumed exactly"
        )


def _side_by_side(taken: list[Tensor | None]) -> list[Tensor]:
    """The actions of each slot, (its steps, ...), step by step, so that all end together."""
    some = [actions for actions in taken if actions is not None]
    if not some:
        return []
    longest = max(map(len, some))
    whole = some[0].new_zeros((longest, len(taken), *some[0].shape[1:]))
    for slot, actions in enumerate(taken):
        if actions is not None:
            whole[longest - len(actions) :, slot] = actions
    return list(whole)


def _spread(value: Tensor, slots: Tensor, size: int) -> Tensor:
    whole = value.new_zeros((size, *value.shape[1:]))
    whole[slots] = value
    return whole


def _stacked(rows: list[dict[str, Tensor]]) -> Segment:
    return Segment(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
