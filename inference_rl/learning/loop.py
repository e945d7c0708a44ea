"""The loop that all learned routines share: collect, update, evaluate, log, save.

A round is one collection and the update that follows it. Everything is saved between rounds, so
that a run which is killed and resumed ends with the same bytes as one that is not: randomness is
counted, not drawn from a state, and what is timed is kept apart from what is learned.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from inference_rl import runs
from inference_rl.environment import RAISED, EnvironmentModel
from inference_rl.evaluation import Watch, evaluate
from inference_rl.learning import checkpoints, scalars
from inference_rl.learning.whereabouts import Episode
from inference_rl.policies import Policy
from inference_rl.randomness import derived

METRICS = "metrics.jsonl"

SAVE_SECONDS = 180.0
"""A run saves at least this often."""

SAY_SECONDS = 0.2

RECENT = 100
"""Episodes whose mean return is shown as a run goes on."""


class Observer(abc.ABC):
    """A `progress` that is told of every evaluation too, and may end the run there by raising."""

    @abc.abstractmethod
    def __call__(self, words: str) -> None:
        """A few words on how far the run has got."""

    @abc.abstractmethod
    def evaluated(self, row: dict[str, Any]) -> None:
        """A row of the metrics; those from before the run was resumed come first, again."""


class Learner(Protocol):
    """What a routine brings to the loop."""

    policy: Policy
    tempering: Any
    """Its `temperature` is where the temperature is, reward units; `targets`, by name, what that is
    tuned to, to log."""

    def collect(self, collector: Any) -> Any:
        """The data of a round, by a `Collector`, or what stands in for one."""

    def update(self, data: Any) -> dict[str, Any]:
        """Learn from it; numbers to log, `entropy` and `temperature` among them."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next round depends on: tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""


class Collector(Protocol):
    """What collects for a learner; see `learning.collection`."""

    finished: list[Episode]

    @property
    def lag(self) -> int:
        """Rounds by which the policy that collects is older than the one that learns."""

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """Where every slot is, or was before a collection that failed."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to there."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, and how often what; environment steps."""

    total_steps: int
    evaluate_every: int
    evaluation_episodes: int
    save_every: int


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    :ivar signal: the number of the signal that asked.
    """

    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.signal = number


def learn(
    model: EnvironmentModel,
    learner: Learner,
    collector: Collector,
    schedule: Schedule,
    *,
    seed: int,
    run: Path | None = None,
    setup: dict[str, Any] | None = None,
    tensorboard: bool = False,
    progress: Callable[[str], None] | None = None,
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """Run rounds until `total_steps` have been taken, from the last checkpoint in `run` on.

    A checkpoint comes before the evaluation at its step: whatever becomes of that, what was learned
    is saved, and whoever resumes evaluates first.

    :param run: where to save; nothing is saved without.
    :param progress: called now and then; an `Observer` hears of evaluations too.
    :param setup: what the run is, JSON; kept in its checkpoints, which those of no other run match.
    :param watch: within which evaluations are run, as `evaluate` says.
    :param tensorboard: write the metrics for TensorBoard too, in `run`.
    :returns: the metrics, one dict an evaluation.
    :raises Interrupted: SIGINT or SIGTERM came; the run was saved first.
    :raises ValueError: the checkpoints in `run` are of another setup.
    """
    steps, due, metrics = 0, False, []
    latest: dict[str, float] = {}
    if run is not None and checkpoints.exist(run):
        steps, state = checkpoints.load(run)
        checkpoints.check_same(run / "checkpoints", state["setup"], setup)
        learner.load_state_dict(state["learner"])
        collector.load_state_dict(state["collector"])
        metrics, latest, due = state["metrics"], state["latest"], state["due"]
    if run is not None:
        _log(run, metrics)  # what was logged after the checkpoint will be logged again
    if isinstance(progress, Observer):
        for row in metrics:
            progress.evaluated(row)

    started, begun, told = time.monotonic(), steps, 0.0
    saved_at = started

    def save(before: bool = False) -> None:
        nonlocal saved_at
        if run is not None:
            # Of those that collect ahead, a round may be under way, and fail.
            nothing = contextlib.nullcontext()
            with nothing if before else _saving_what_was_learned(save_what_came_before):
                collected = collector.state_dict(before=before)
            state = {
                "setup": setup,
                "learner": learner.state_dict(),
                "collector": collected,
                "metrics": metrics,
                "latest": latest,
                "due": due,
            }
            _check_numbers(state["learner"], steps)
            _check_parameters(learner, steps)
            checkpoints.save(run, steps, state)
        saved_at = time.monotonic()

    def save_what_came_before() -> None:
        if steps:
            save(before=True)

    with contextlib.ExitStack() as stack:
        write: Callable[[dict[str, Any]], None] | None = None
        if tensorboard and run is not None:
            write = stack.enter_context(scalars.writer(run, steps))
        asked_to_stop = stack.enter_context(_signals(run is not None))

        def stop_if_asked() -> None:
            if asked_to_stop.number:
                save()
                words = f"stopped at {_share(steps, schedule.total_steps)}"
                raise Interrupted(words, asked_to_stop.number)

        while True:
            if due:
                if progress is not None:
                    progress(f"{_share(steps, schedule.total_steps)} · evaluating")
                episodes = schedule.evaluation_episodes
                with asked_to_stop.at_once(stop_if_asked), _saving_what_was_learned(save):
                    found = _evaluations(model, learner.policy, episodes, seed, watch)
                aims = learner.tempering.targets
                row = {"steps": steps, **latest, **aims, **_training(collector), **found}
                metrics.append(row)
                due = False
                if run is not None:
                    with open(run / METRICS, "a", opener=runs.no_link) as file:
                        file.write(json.dumps(row, allow_nan=False) + "\n")
                if write is not None:
                    write(row)
                if isinstance(progress, Observer):
                    progress.evaluated(row)
                stop_if_asked()
            if steps >= schedule.total_steps:
                break
            with _saving_what_was_learned(save_what_came_before):
                data = learner.collect(collector)
            latest = _finite(learner.update(data), steps)
            before, steps = steps, steps + data.steps
            is_last = steps >= schedule.total_steps
            due = _passed(before, steps, schedule.evaluate_every) or is_last
            late = time.monotonic() - saved_at > SAVE_SECONDS
            if _passed(before, steps, schedule.save_every) or late or is_last:
                save()
            stop_if_asked()
            now = time.monotonic()
            if progress is not None and now - told > SAY_SECONDS:
                told = now
                rate = (steps - begun) / max(now - started, 1e-9)
                at = _latest_return(collector, metrics)
                progress(_words(steps, schedule.total_steps, rate, at, latest))
    if run is not None:
        # What is left must not depend on when it was saved, and what was logged must be there.
        checkpoints.keep(run, 1)
        _log(run, metrics)
    return metrics


@contextlib.contextmanager
def _saving_what_was_learned(save: Callable[[], None]) -> Iterator[None]:
    """Should something fail within, `save` first."""
    try:
        yield
    except RAISED:
        try:
            save()
        except OSError as failed:  # which must not hide why
            warnings.warn(f"the run could not be saved: {failed}", stacklevel=4)
        raise


def _check_numbers(tree: Any, steps: int, name: str = "") -> None:
    """:raises FloatingPointError: there is NaN in what was learned."""
    if isinstance(tree, dict):
        for key, part in tree.items():
            _check_numbers(part, steps, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Tensor) and tree.is_floating_point() and bool(tree.isnan().any()):
        raise FloatingPointError(
            f"{name}: expected numbers in what was learned up to step {steps:,}, got NaN; the run "
            "stops at its last checkpoint: lower the learning rate"
        )


def _check_parameters(learner: Learner, steps: int) -> None:
    """:raises FloatingPointError: one that was learned is infinite, as other numbers may be."""
    for name in ("policy", "value", "q"):
        module = getattr(learner, name, None)
        for key, parameter in module.named_parameters() if module is not None else ():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"{name}.{key}: expected finite numbers in what was learned up to step "
                    f"{steps:,}, got inf; the run stops at its last checkpoint: lower the learning "
                    "rate"
                )


def _log(run: Path, metrics: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in metrics)
    runs.write_durably(run / METRICS, lines.encode())


def _finite(numbers: dict[str, Any], steps: int) -> dict[str, float]:
    """:raises FloatingPointError: one of them is not finite."""
    found = {name: float(value) for name, value in numbers.items()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name}: expected a finite number in the update after step {steps:,}, got "
                f"{value}; the run stops at its last checkpoint: lower the learning rate, or look "
                "for a prior that forbids what the policy does"
            )
    return found


def _passed(before: int, after: int, every: int) -> bool:
    return before // every < after // every


def _training(collector: Collector) -> dict[str, float]:
    """Of the episodes that ended since the last time, and how old the policy is that acts."""
    ended, collector.finished = collector.finished, []
    lag = {"policy_lag": collector.lag} if collector.lag else {}
    if not ended:
        return {"episodes": 0, **lag}
    return {
        **lag,
        "episodes": len(ended),
        "training_return": math.fsum(e.total for e in ended) / len(ended),
        "training_length": sum(e.length for e in ended) / len(ended),
    }


def _evaluations(
    model: EnvironmentModel, policy: Policy, episodes: int, seed: int, watch: Watch | None
) -> dict[str, Any]:
    if not episodes:
        return {}
    return {
        name: evaluate(
            model,
            policy,
            episodes=episodes,
            seed=derived(seed, "evaluation"),
            deterministic=deterministic,
            watch=watch,
        ).summary()
        for name, deterministic in (("stochastic", False), ("deterministic", True))
    }


def _latest_return(collector: Collector, metrics: list[dict[str, Any]]) -> float | None:
    """Mean of the latest episodes' returns, those of training where there are any."""
    if latest := collector.finished[-RECENT:]:
        return math.fsum(episode.total for episode in latest) / len(latest)
    if metrics and "stochastic" in metrics[-1]:
        return float(metrics[-1]["stochastic"]["mean_return"])
    return None


def _share(steps: int, total: int) -> str:
    return f"{steps:,} of {max(total, steps):,} steps"


def _words(steps: int, total: int, rate: float, at: float | None, latest: dict[str, float]) -> str:
    """A line of progress: how far, how well, how fast. The last round may go beyond `total`."""
    total = max(total, steps)
    filled = round(20 * steps / total)
    left = (total - steps) / rate if rate > 0 else math.inf
    parts = [f"{'━' * filled}{'╌' * (20 - filled)} {_share(steps, total)}"]
    if at is not None:
        parts.append(f"return {at:.4g}")
    parts += [f"{name} {latest[name]:.3g}" for name in ("entropy", "temperature") if name in latest]
    parts.append(f"{rate:,.0f} steps/s")
    if left < math.inf:
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return " · ".join(parts)


class _Now(KeyboardInterrupt):
    """A signal came where nothing is lost by stopping at once."""


class _Asked:
    """Which of SIGINT and SIGTERM came; the first waits for the round's end, a second does not.

    :ivar number: of the first one, 0 for none.
    """

    def __init__(self) -> None:
        self.number, self._waits = 0, True

    def handle(self, number: int, frame: Any) -> None:
        if self.number:
            raise Interrupted("stopped at once, by a second signal, without saving", number)
        self.number = number
        if not self._waits:
            raise _Now

    @contextlib.contextmanager
    def at_once(self, stop: Callable[[], None]) -> Iterator[None]:
        """Within this context the first one does not wait either: what goes on is left, for
        `stop`, which raises."""
        try:
            self._waits = False
            if self.number:
                raise _Now
            yield
        except _Now:
            stop()
        finally:
            self._waits = True


@contextlib.contextmanager
def _signals(wanted: bool) -> Iterator[_Asked]:
    """What asks to stop, within this context."""
    asked = _Asked()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, asked.handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
