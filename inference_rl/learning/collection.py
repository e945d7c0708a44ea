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

from inference_rl.learning.patience import Limit
from inference_rl.learning.whereabouts import Episode, Whereabouts
from inference_rl.policies import Policy
from inference_rl.randomness import ACTIONS, Ahead, derived, draw, episode_seeds
from inference_rl.simulate import EnvironmentFault, Environments, Share

_CHUNK = 1024
"""Episodes whose seeds are made at once."""

STARTS = 1000
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


_WATCHERS: ContextVar[tuple[Callable[[Segment], None], ...]] = ContextVar("_WATCHERS", default=())


@contextlib.contextmanager
def watched(see: Callable[[Segment], None]) -> Iterator[None]:
    """Show `see` every segment that is collected within, by whatever routine, as it comes."""
    token = _WATCHERS.set((*_WATCHERS.get(), see))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def shown(data: Segment) -> Segment:
    """`data`, once whoever watches has seen it."""
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
    :param share: which part of a larger batch the slots are. The policy is asked about the whole
        batch even so, in which others stand in for whoever is elsewhere: the last bit of a matrix
        product depends on its size.
    :param limit: to the time of a step.
    :ivar at: where every slot is.
    :ivar moves: how often the environments were stepped or reset, for whoever watches.
    :ivar lag: rounds by which the policy that collects is older than the one that learns.
    :ivar replaced: of workers, how many were lost; there are none.
    """

    lag = replaced = 0

    def __init__(
        self,
        environments: Environments,
        seed: int,
        share: Share | None = None,
        limit: Limit | None = None,
    ) -> None:
        self.environments, size = environments, environments.size
        self._share = Share(0, size, size) if share is None else share
        self._environment_seeds = _EpisodeSeeds(derived(seed, "environment"))
        self._policy_seeds = _EpisodeSeeds(derived(seed, "policy"))
        self.at = Whereabouts(self._share.first + np.arange(size))
        self._seeds = self._policy_seeds.of(self.at.episode)
        self._ahead = Ahead(self._share.of)
        self._ones = torch.ones(size, dtype=torch.bool)
        self._limit = limit
        self.moves = 0

    @property
    def finished(self) -> list[Episode]:
        """Episodes that ended since this was last emptied; see `Whereabouts`."""
        return self.at.finished

    @finished.setter
    def finished(self, episodes: list[Episode]) -> None:
        self.at.finished = episodes

    def collect(self, policy: Policy, steps: int) -> Segment:
        """`steps` steps in every slot, whose episodes follow one another.

        :raises ValueError: all episodes end where they start.
        """
        self.at.mark()
        with self._limited():
            rows = self._steps(policy, steps)
        self.at.sort()
        return shown(_stacked(rows))

    def _steps(self, policy: Policy, steps: int) -> list[dict[str, Tensor]]:
        at, every = self.at, np.arange(self.environments.size)
        if at.state is None:
            at.state = self._begin_to_act(every)
        rows = []
        for _ in range(steps):
            row = self._advance(policy, every)
            rows.append(row)
            at.state = row["next_state"]
            if not self.environments.alive.all():
                over = np.flatnonzero(~self.environments.alive)
                self._finish(over)
                at.state = at.state.clone()
                at.state[torch.from_numpy(over)] = self._begin_to_act(over)
        return rows

    def close(self) -> None:
        """Release what the environments hold, within the limit too.

        :warns UserWarning: of those that cannot be closed.
        """
        with self._limited():
            self.environments.close()

    def _limited(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._limit is None else self._limit.on(self._moved)

    def _moved(self) -> int:
        return self.moves

    def collect_episodes(self, policy: Policy) -> Segment:
        """One whole episode in every slot; T is the length of the longest, at least 1.

        Episodes that end where they start are played again if all of them do.

        :raises RuntimeError: some slot is in the middle of an episode.
        :raises ValueError: all episodes end where they start.
        """
        self.at.mark()
        for _ in range(STARTS):
            with self._limited():
                start, data = self.play(policy)
            if data is not None:
                self.at.sort()
                data.state[0] = start  # of those too that go no further
                return shown(data)
        raise nowhere(STARTS)

    def play(self, policy: Policy) -> tuple[Tensor, Segment | None]:
        """Where one episode in every slot starts, (N, ...), and the episodes; None where all end
        there.

        :raises RuntimeError: some slot is in the middle of an episode.
        """
        at, every = self.at, np.arange(self.environments.size)
        if at.step.any():
            raise RuntimeError("whole episodes start together: expected every slot at its start")
        start = at.state = self._begin(every)
        alive = self.environments.alive.copy()
        self._finish(every[~alive])
        rows, slots = [], every[alive]
        while slots.size:
            row = self._advance(policy, slots)
            over = (row["terminated"] | row["truncated"]).numpy()
            here = torch.from_numpy(slots)
            at.state = at.state.clone()  # the old one is part of what was collected
            at.state[here] = row["next_state"]
            rows.append({name: _spread(value, here, every.size) for name, value in row.items()})
            self._finish(slots[over])
            slots = slots[~over]
        at.state = None
        return start, _stacked(rows) if rows else None

    def _begin_to_act(self, slots: np.ndarray) -> Tensor:
        """Start episodes in `slots` until all of them have one that goes on."""
        state, tried = self._begin(slots), 1
        while (over := ~self.environments.alive[slots]).any():
            if tried == STARTS:
                raise nowhere(tried)
            self._finish(slots[over])
            state = state.clone()
            state[torch.from_numpy(over)] = self._begin(slots[over])
            tried += 1
        return state

    def _begin(self, slots: np.ndarray) -> Tensor:
        self.moves += 1
        episodes = self.at.episode[slots]
        self._seeds[slots] = self._policy_seeds.of(episodes)
        return self.environments.reset(slots, self._environment_seeds.of(episodes))

    def _advance(self, policy: Policy, slots: np.ndarray) -> dict[str, Tensor]:
        at = self.at
        assert at.state is not None
        # Of all slots, whoever acts: the last bit of a matrix product depends on its size.
        every = torch.from_numpy(at.step.copy())
        with torch.no_grad():
            drawn = self._drawn(policy, at.state, every)
        row = {"state": at.state, "action": drawn, "step": every, "valid": self._ones}
        if slots.size < at.step.size:
            here = torch.from_numpy(slots)
            row = {name: value[here] for name, value in row.items()}
        self.moves += 1
        outcome = self.environments.step(slots, row["action"])
        at.taken.append(drawn)
        at.step[slots] += 1
        at.total[slots] += outcome.reward.numpy()
        row["reward"], row["next_state"] = outcome.reward, outcome.next_state
        row["terminated"], row["truncated"] = outcome.terminated, outcome.truncated
        return row

    def _drawn(self, policy: Policy, state: Tensor, step: Tensor) -> Tensor:
        """An action for every slot."""
        share, seeds = self._share, self._seeds
        if share.size < share.of:
            own = share.slots
            state, some = state[:1].repeat(share.of, *[1] * (state.dim() - 1)), state
            state[own] = some
            step, some = step.new_zeros(share.of), step
            step[own] = some
            seeds = np.zeros(share.of, dtype=seeds.dtype)
            seeds[own] = self._seeds
        drawn = draw(policy(state, step), seeds, step.numpy(), ACTIONS, self._ahead)
        return drawn if share.size == share.of else drawn[share.slots]

    def _finish(self, slots: np.ndarray) -> None:
        at = self.at
        for slot in slots:
            at.finished.append(
                Episode(int(at.episode[slot]), float(at.total[slot]), int(at.step[slot]))
            )
        at.episode[slots] += self._share.of
        at.step[slots] = 0
        at.total[slots] = 0.0

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """Where every slot is: its episode, and the actions taken in it.

        :param before: as it was before the last collection, which failed.
        """
        return self.at.state_dict(before=before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken, by replaying the episodes that were going on.

        :raises EnvironmentFault: an environment does not do again what it did.
        """
        at = self.at
        at.load_state_dict(state)
        if (there := at.state) is None:
            return
        # Late starters last, so that all who have begun take every step together, as the parts of a
        # vector environment must.
        here, longest = torch.zeros_like(there), int(at.step.max(initial=0))
        total = np.zeros(self.environments.size)
        for t in range(longest + 1):
            late = np.flatnonzero(longest - at.step == t)
            if late.size:
                here[torch.from_numpy(late)] = self._begin(late)
            if t == longest:
                break
            slots = np.flatnonzero(longest - at.step <= t)
            self.moves += 1
            outcome = self.environments.step(slots, at.taken[t][torch.from_numpy(slots)])
            if not self.environments.alive[slots].all():
                over = outcome.terminated | outcome.truncated
                raise self._strayed(int(slots[over.numpy()][0]))
            here[torch.from_numpy(slots)] = outcome.next_state
            total[slots] += outcome.reward.numpy()
        elsewhere = (here != there).reshape(self.environments.size, -1).any(1).numpy()
        if (strayed := elsewhere | (total != at.total)).any():
            raise self._strayed(int(np.flatnonzero(strayed)[0]))

    def _strayed(self, slot: int) -> EnvironmentFault:
        return EnvironmentFault(
            f"slot {self._share.first + slot}: its episode {self.at.episode[slot]}, replayed from "
            "its seed where a run is resumed or a worker replaced, went another way than it did "
            "before; the environment does not depend on its seed and actions alone, and a run on "
            "it can neither be resumed exactly nor go on without a worker that was lost"
        )


def nowhere(tried: int) -> ValueError:
    """Of episodes that end where they start, `tried` times in a row."""
    return ValueError(
        f"terminal: expected an episode that goes beyond its start, got {tried} in a row "
        "that end there; see to what initial_state and terminal of the model say"
    )


def _spread(value: Tensor, slots: Tensor, size: int) -> Tensor:
    whole = value.new_zeros((size, *value.shape[1:]))
    whole[slots] = value
    return whole


def _stacked(rows: list[dict[str, Tensor]]) -> Segment:
    return Segment(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
