"""Collection divided among workers, each of which plays the episodes of some slots.

What comes of it is what one process collects, to the last bit: an episode is a function of its
number and of the policy, every worker asks the policy about the whole batch, and what they bring is
put together by slot. So a worker that is lost is replaced by another, which replays the episodes
that were going on and plays the round again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_rl.batch import Share
from inference_rl.environment import EnvironmentModel
from inference_rl.learning.collection import STARTS, Segment, nowhere, shown
from inference_rl.learning.whereabouts import Episode, Whereabouts
from inference_rl.policies import Policy
from inference_rl.scale_out import Workers, on_ray
from inference_rl.scale_out.local import LocalWorker
from inference_rl.scale_out.shard import Begin, Played, Round, kind_of_machine, known
from inference_rl.scale_out.transport import dumped, packed, registered
from inference_rl.scale_out.workers import Worker, WorkerLost, WorkersLost

MOST_LOSSES = 3
"""So often may the worker of a share be lost in one round before the run stops."""


@contextlib.contextmanager
def divided(
    model: EnvironmentModel,
    seed: int,
    workers: Workers,
    *,
    size: int,
    limit: int | None,
    total_steps: float = math.inf,
) -> Iterator[DividedCollector | AheadCollector]:
    """A collector of `size` slots whose `workers` are gone afterwards.

    :param limit: steps after which an episode is cut. :param total_steps: of the run.
    :raises ValueError: more workers than slots, a model that cannot be sent to them, no Ray.
    """
    with contextlib.ExitStack() as stack:
        start: Callable[[str], Worker] = LocalWorker
        if workers.on == "ray":
            stack.enter_context(on_ray.connected(workers.address, workers.count))
            start = on_ray.RayWorker
        collector = DividedCollector(
            model,
            seed,
            start,
            size=size,
            limit=limit,
            count=workers.count,
            patience=workers.patience,
        )
        stack.callback(collector.close)
        yield AheadCollector(collector, total_steps) if workers.ahead else collector


class DividedCollector:
    """As `Collector`, by `count` workers.

    :param start: makes a worker of a name.
    :param size: how many slots there are in all. :param limit: steps after which an episode is cut.
    :param patience: seconds that a step of the environments may take; a worker that takes longer is
        replaced.
    :ivar replaced: workers so far. :ivar lag: as of `Collector`.
    :raises ValueError: more workers than slots, or a model that cannot be sent to them.
    """

    lag = 0

    def __init__(
        self,
        model: EnvironmentModel,
        seed: int,
        start: Callable[[str], Worker],
        *,
        size: int,
        limit: int | None,
        count: int,
        patience: float,
    ) -> None:
        if not 1 <= count <= size:
            raise ValueError(
                f"workers: expected 1 to {size}, for that many environments are stepped side by "
                f"side, got {count}; raise environments, or ask for fewer workers"
            )
        self._start, self._patience, self._model = start, patience, model
        edges = np.linspace(0, size, count + 1).round().astype(int).tolist()
        shares = [Share(a, b - a, size) for a, b in itertools.pairwise(edges)]
        sent = packed((model, registered(model.gymnasium_id)), "model")
        path = [os.path.abspath(folder) for folder in sys.path]
        self._begin = [
            Begin(sent, share, limit, seed, path, torch.get_default_dtype(), kind_of_machine())
            for share in shares
        ]
        self._workers: list[Worker | None] = [None] * count
        self.at = Whereabouts(np.arange(size))
        self.replaced = 0

    @property
    def finished(self) -> list[Episode]:
        """Episodes that ended since this was last emptied; see `Whereabouts`."""
        return self.at.finished

    @finished.setter
    def finished(self, episodes: list[Episode]) -> None:
        self.at.finished = episodes

    def collect(self, policy: Policy, steps: int) -> Segment:
        """As `Collector.collect`. :raises WorkersLost: again and again."""
        self.ask(policy, steps)
        return self.asked_for()

    def ask(self, policy: Policy, steps: int) -> None:
        """Let the workers begin with what `collect` would give, and come back for it."""
        self.at.mark()
        self._ask(policy, steps)

    def asked_for(self) -> Segment:
        """What the workers were asked for, once they have it."""
        played = self._answers()
        data = _beside([part.data for part in played])
        self._note(played, data)
        self.at.sort()
        return shown(data)

    def collect_episodes(self, policy: Policy) -> Segment:
        """As `Collector.collect_episodes`. :raises WorkersLost: again and again."""
        self.at.mark()
        for _ in range(STARTS):
            self._ask(policy, None)
            played = self._answers()
            some = next((part.data for part in played if part.data is not None), None)
            if some is None:
                self._note(played, None)
                continue
            longest = max(0 if part.data is None else len(part.data.reward) for part in played)
            data = _beside([_filled(part, some, longest) for part in played])
            data.state[0] = torch.cat([part.start for part in played if part.start is not None])
            self._note(played, data)
            self.at.sort()
            return shown(data)
        raise nowhere(STARTS)

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """As `Collector.state_dict`: one process can go on from it, or other workers."""
        return self.at.state_dict(before=before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken; the workers do when they are next asked.

        They raise `EnvironmentFault` then, if an environment does not do again what it did.
        """
        self.close()
        self.at.load_state_dict(state)

    def close(self) -> None:
        """End the workers. They are started again where they are needed."""
        for i, worker in enumerate(self._workers):
            if worker is not None:
                worker.close()
                self._workers[i] = None

    def _ask(self, policy: Policy, steps: int | None) -> None:
        self._round = packed(policy, "policy", **known(self._model)), steps
        self._losses: dict[int, list[WorkerLost]] = {i: [] for i in range(len(self._workers))}
        self._asked = [i for i in self._losses if self._sent(i)]

    def _answers(self) -> list[Played]:
        """Of all of them; whoever is lost is replaced, and the other asked."""
        answers: dict[int, bytes] = {}
        while len(answers) < len(self._workers):
            for i in self._asked:
                worker = self._workers[i]
                assert worker is not None
                try:
                    answers[i] = worker.receive(self._patience)
                except WorkerLost as lost:
                    self._lose(i, lost)
            self._asked = [i for i in self._losses if i not in answers and self._sent(i)]
        return [self._read(answers[i]) for i in sorted(answers)]

    def _sent(self, i: int) -> bool:
        """Ask worker i, a new one if there is none; whether it was there to be asked."""
        begin = where = None
        worker = self._workers[i]
        if worker is None:
            share = self._begin[i].share
            name = f"the worker of slots {share.first} to {share.first + share.size - 1}"
            worker = self._workers[i] = self._start(name)
            begin, where = self._begin[i], self.at.of(share.slots)
        try:
            request = dumped(Round(begin, where, *self._round))
            worker.send(request, self._patience)
        except WorkerLost as lost:
            self._lose(i, lost)
            return False
        return True

    def _lose(self, i: int, lost: WorkerLost) -> None:
        """Count a worker that was lost. :raises WorkersLost: it is one too many."""
        self._workers[i], reasons = None, self._losses[i]
        reasons.append(lost)
        if len(reasons) == MOST_LOSSES:
            share = self._begin[i].share
            episodes = self.at.episode[share.slots].tolist()
            raise WorkersLost(
                f"workers: expected an answer from slots {share.first} to "
                f"{share.first + share.size - 1}, whose episodes are {episodes}, but "
                f"{MOST_LOSSES} workers were lost in the same round: "
                f"{'; '.join(map(str, reasons))}; see to what their environments do there, or "
                "whether there is enough memory"
            ) from lost
        self.replaced += 1
        warnings.warn(f"{lost}; another takes its place", stacklevel=5)

    def _read(self, answer: bytes) -> Played:
        kind, found = pickle.loads(answer)
        if kind == "raised":
            self.close()  # where the others are now is nowhere noted
            raise found
        assert isinstance(found, Played)
        return found

    def _note(self, played: list[Played], data: Segment | None) -> None:
        """Where the slots have got to."""
        at = self.at
        for name in ("episode", "step", "total"):
            getattr(at, name)[:] = np.concatenate([part.where[name] for part in played])
        states = [part.where["state"] for part in played]
        at.state = None if states[0] is None else torch.cat(states)
        if data is not None:
            at.taken += list(data.action)
        at.finished += [episode for part in played for episode in part.ended]


class AheadCollector:
    """Collects a round ahead: what it gives was begun with the policy of the call before.

    A run of it is as reproducible as any other, and goes on exactly where it was saved: what has
    been collected and not yet been given is saved with it. Not so where the round under way came to
    nothing, by a fault or because workers were lost for good: that is begun anew by the policy
    which has learned since, for nobody has the one that began it any more. Then nothing is lost,
    but the run comes out otherwise than one that met with no such thing.

    :param total_steps: of the run; no round is begun that goes beyond.
    :ivar lag: rounds of updates that the policy which collected has not seen. What the first call
        gives was collected by its own policy, and comes late.
    :ivar finished: episodes of what was given that ended since this was last emptied.
    """

    lag = 1

    def __init__(self, collector: DividedCollector, total_steps: float = math.inf) -> None:
        self._collector, self._total_steps = collector, total_steps
        self._given = 0
        self._is_under_way = False
        self._waiting: tuple[Segment, list[Episode]] | None = None
        self.finished: list[Episode] = []

    @property
    def replaced(self) -> int:
        return self._collector.replaced

    def collect(self, policy: Policy, steps: int) -> Segment:
        """As `Collector.collect`, by the policy of the last call."""
        if self._waiting is None and not self._is_under_way:
            self._begin(policy, steps)
        data, ended = self._collected()
        self._waiting = None
        self.finished += ended
        self._given += data.steps
        if self._given < self._total_steps:
            self._begin(policy, steps)
        return data

    def _begin(self, policy: Policy, steps: int) -> None:
        self._collector.ask(policy, steps)
        self._is_under_way = True

    def _collected(self) -> tuple[Segment, list[Episode]]:
        """What is to be given next, once it is there."""
        if self._waiting is None:
            self._is_under_way = False
            data = self._collector.asked_for()
            self._waiting = data, self._collector.finished
            self._collector.finished = []
        return self._waiting

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """Where every slot is, and what has been collected and not given.

        :param before: as it was before the round under way, which failed; it is begun anew.
        :raises EnvironmentFault, WorkersLost: the round under way fails.
        """
        if self._is_under_way and not before:
            self._collected()
        waiting = None
        if self._waiting is not None:
            data, ended = self._waiting
            waiting = {
                "data": {field.name: getattr(data, field.name) for field in _FIELDS},
                "ended": [dataclasses.astuple(episode) for episode in ended],
            }
        return {
            "ahead": waiting,
            "given": self._given,
            "collector": self._collector.state_dict(before=before),
            "finished": [dataclasses.astuple(episode) for episode in self.finished],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken.

        :raises ValueError: it was taken of a collector that collects nothing ahead.
        """
        if "ahead" not in state:
            raise ValueError(
                "workers: expected ahead=False (no --async), for the run was begun without, and "
                "would come out otherwise"
            )
        self._collector.load_state_dict(state["collector"])
        self._waiting, self._is_under_way, self._given = None, False, state["given"]
        if state["ahead"] is not None:
            ended = [Episode(*episode) for episode in state["ahead"]["ended"]]
            self._waiting = Segment(**state["ahead"]["data"]), ended
        self.finished = [Episode(*episode) for episode in state["finished"]]


_FIELDS = dataclasses.fields(Segment)


def _beside(parts: Iterable[Segment | None]) -> Segment:
    """Slots side by side."""
    names = [field.name for field in _FIELDS]
    return Segment(**{n: torch.cat([getattr(p, n) for p in parts], 1) for n in names})


def _filled(part: Played, like: Segment, steps: int) -> Segment:
    """What was played, and nothing for the rest of `steps`."""
    found, slots = {}, len(part.where["episode"])
    for field in _FIELDS:
        some: Tensor = getattr(like, field.name)
        found[field.name] = whole = some.new_zeros((steps, slots, *some.shape[2:]))
        if part.data is not None:
            whole[: len(part.data.reward)] = getattr(part.data, field.name)
    return Segment(**found)
