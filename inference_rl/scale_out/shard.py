"""A worker's part of a batch: what it is asked, and what it answers."""

from __future__ import annotations

import dataclasses
import pickle
import socket
import sys
import traceback
from typing import Any

import torch

from inference_rl import runs
from inference_rl.batch import Share
from inference_rl.environment import RAISED
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.whereabouts import Episode
from inference_rl.policies import Policy
from inference_rl.scale_out.transport import dumped, register, unpacked
from inference_rl.simulate import environments


@dataclasses.dataclass(frozen=True)
class Begin:
    """What a worker is told first.

    :ivar model: packed, with what Gymnasium knows of its id, once `path` can be imported from.
    :ivar limit: steps after which an episode is cut. :ivar seed: of the run.
    :ivar machine: whose arithmetic it must have; see `kind_of_machine`.
    """

    model: bytes
    share: Share
    limit: int | None
    seed: int
    path: list[str]
    dtype: torch.dtype
    machine: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Round:
    """What a worker is asked, again and again.

    :ivar begin, where: of a worker that is new: what it is, and where its slots are.
    :ivar policy: packed, with the model and its prior known.
    :ivar steps: in every slot; None for a whole episode.
    """

    begin: Begin | None
    where: dict[str, Any] | None
    policy: bytes
    steps: int | None


@dataclasses.dataclass(frozen=True)
class Played:
    """What a worker answers.

    :ivar start: (n, ...), where whole episodes began. :ivar data: None where all ended there.
    :ivar where: its slots are now. :ivar ended: the episodes that did.
    """

    start: torch.Tensor | None
    data: Segment | None
    where: dict[str, Any]
    ended: list[Episode]


def kind_of_machine() -> dict[str, str]:
    """What the last bit of an episode depends on besides its seed and the policy."""
    return {"arithmetic": torch.backends.cpu.get_cpu_capability()} | runs.versions()


def check_machine(asking: dict[str, str]) -> None:
    """:raises ValueError: the process that asks is of another kind than this one."""
    own = kind_of_machine()
    if differing := [name for name in own if own[name] != asking.get(name)]:
        name = differing[0]
        raise ValueError(
            f"workers: expected {name} {asking.get(name)}, as in the process that asks, got "
            f"{own[name]} on {socket.gethostname()}; what comes of it would not be the same there"
        )


class Shard:
    """The other end of a worker: a collector of its share of the slots."""

    def __init__(self) -> None:
        self._model: Any = None
        self._collector: Collector | None = None

    @property
    def moves(self) -> int:
        """Steps and resets so far, by which a worker that hangs is told from one that works."""
        return 0 if self._collector is None else self._collector.moves

    def answer(self, request: bytes) -> bytes:
        """A pickled pair of what came of a pickled `Round`: its name, and it.

        "played" and a `Played`, "raised" and an exception.
        """
        if torch.get_num_threads() != 1:  # each thread of a process has its own count
            torch.set_num_threads(1)
        try:
            reply: tuple[str, Any] = "played", self._played(pickle.loads(request))
        except RAISED as error:
            reply = "raised", _sendable(error)
        return dumped(reply)

    def close(self) -> None:
        """Release what the environments hold."""
        if self._collector is not None:
            self._collector.close()

    def _played(self, asked: Round) -> Played:
        if asked.begin is not None:
            self._start(asked.begin)
        assert self._collector is not None
        collector = self._collector
        if asked.where is not None:
            collector.load_state_dict(asked.where)
        policy: Policy = unpacked(asked.policy, **known(self._model))
        start = None
        collector.at.mark()
        if asked.steps is None:
            start, data = collector.play(policy)
        else:
            data = collector.collect(policy, asked.steps)
        at, ended = collector.at, collector.finished
        collector.finished = []
        where = {"episode": at.episode, "step": at.step, "total": at.total, "state": at.state}
        return Played(start, data, where, ended)

    def _start(self, begin: Begin) -> None:
        check_machine(begin.machine)
        sys.path += [folder for folder in begin.path if folder not in sys.path]
        torch.set_default_dtype(begin.dtype)
        self._model, spec = unpacked(begin.model)
        register(spec)
        share = begin.share
        batch = environments(self._model, share.size, begin.limit, share=share)
        self._collector = Collector(batch, begin.seed, share)


def known(model: Any) -> dict[str, Any]:
    """What both sides have, and no policy takes along."""
    return {"model": model}


def _sendable(error: BaseException) -> Exception:
    """`error` as it arrives elsewhere, with a note of where it came from."""
    place = f"in a worker on {socket.gethostname()}:\n{traceback.format_exc()}"
    try:
        found = pickle.loads(pickle.dumps(error))
        if isinstance(error, SystemExit) or str(found) != str(error):
            raise TypeError
    except Exception:
        found = RuntimeError(f"{type(error).__name__}: {error}")
    found.add_note(place)
    return found
