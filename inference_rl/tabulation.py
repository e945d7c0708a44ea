"""From a program to tables: `tabulate` calls a model's own methods on all states, in batches.

Everything that comes back is checked, and the first thing wrong is named with the method, what was
expected and what came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import (
    SparseCategorical,
    as_discrete,
    check_probabilities,
    checked_categoricals,
)
from inference_rl.environment import RAISED, EnvironmentModel
from inference_rl.finite import FiniteModel, check_time, index_dtype, uniform_log_prior
from inference_rl.priors import ActionPrior
from inference_rl.state_rows import StateRows

CHUNK = 5_000_000
"""How many entries of a table are computed at a time. Their 40 MB are returned to the system when
they are freed, which glibc does from 32 MB on."""

BYTES_OF_A_ROW = 16
"""What every state and action takes, however few successors it has: where its row begins, and how
long it is."""


def tabulate(
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None = None,
    progress: Callable[[str], None] | None = None,
) -> FiniteModel:
    """Any model with Discrete states and actions as a `FiniteModel`.

    :param prior: the action prior, in place of the model's own.
    :param progress: called now and then with a few words on how far it has got.
    :raises TypeError: the model is not discrete. :raises ValueError: a method fails, or returns a
        wrong shape, dtype or support, probabilities that do not sum to one, or NaN; or the tables
        are larger than this machine's memory.

    The program runs with float64 as torch's default, so that its literals are exact. Gradients to
    the program's own parameters are kept.
    """
    check_countable(model)
    if isinstance(model, FiniteModel):
        if not hasattr(model, "pointers"):
            raise TypeError(
                f"{model.name}: expected a FiniteModel with its tables, got one without; call "
                "super().__init__ with them, or subclass EnvironmentModel to write a program"
            )
        finite = model
    else:
        with default_float64(), checked_categoricals():
            finite = _Tabulation(model).run(progress).described_like(model)
    if prior is None:
        return finite
    return finite.replace(log_prior=_tabulate_prior(prior, finite.is_terminal, finite.num_actions))


def tabulate_rows(
    model: EnvironmentModel, low: int, high: int, *, prior: ActionPrior | None = None
) -> StateRows:
    """The tables of the states low, ..., high - 1, without those of any other.

    Arguments and errors are those of `tabulate`.
    """
    check_countable(model)
    check_time(model.discount, model.horizon)
    if isinstance(model, FiniteModel):
        rows = model.part(low, high)
    else:
        with default_float64(), checked_categoricals():
            rows = _Tabulation(model).rows(low, high)
    if prior is not None:
        actions, states = rows.log_prior.shape[1], int(model.state_space.n)  # type: ignore[attr-defined]
        log_prior = _tabulate_prior(prior, rows.terminal, actions, first=low, states=states)
        rows = dataclasses.replace(rows, log_prior=log_prior)
    rows.check()
    return rows


def tabulate_initial(model: EnvironmentModel) -> Tensor:
    """The probabilities of the first state, (S,); errors are those of `tabulate`."""
    check_countable(model)
    if isinstance(model, FiniteModel):
        return model.initial
    with default_float64(), checked_categoricals():
        return _Tabulation(model).initial()


def check_countable(model: EnvironmentModel) -> None:
    """:raises TypeError: states or actions are not Discrete, or do not count from 0."""
    for name, space in (("state", model.state_space), ("action", model.action_space)):
        if not isinstance(space, Discrete) or space.start != 0:
            raise TypeError(
                f"{model.name}: exact inference covers finite models (Discrete spaces that count "
                f"from 0) and linear-Gaussian ones, got the {name} space {space}; write it as an "
                "EnvironmentModel with Discrete spaces, such as a grid over its states, or as a "
                "LinearGaussianModel"
            )


class _Tabulation:
    """One pass over states of a program, in chunks, that fills tables."""

    def __init__(self, model: EnvironmentModel) -> None:
        self.model, self.name = model, model.name
        assert isinstance(model.state_space, Discrete)
        assert isinstance(model.action_space, Discrete)
        self.states, self.actions = int(model.state_space.n), int(model.action_space.n)

    def run(self, progress: Callable[[str], None] | None) -> FiniteModel:
        rows = self.rows(0, self.states, progress)
        return FiniteModel(
            pointers=rows.pointers,
            successors=rows.successors,
            probabilities=rows.probabilities,
            rewards=rows.rewards,
            initial=self.initial(),
            log_prior=rows.log_prior,
            terminal=rows.terminal,
            discount=self.model.discount,
            horizon=self.model.horizon,
        )

    def rows(self, low: int, high: int, progress: Callable[[str], None] | None = None) -> StateRows:
        """Of the states low, ..., high - 1."""
        self._check_size(high - low)
        ended = self._call("terminal", torch.arange(low, high), dtype=torch.bool)
        live = (~ended).nonzero().squeeze(-1)
        lengths = torch.zeros(high - low, self.actions, dtype=torch.long)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        at, size = 0, 1  # the first state alone tells how wide a row is
        while at < len(live):
            chunk = live[at : at + size]
            count, *part = self._chunk(low + chunk)
            lengths[chunk] = count
            parts.append((part[0], part[1], part[2]))
            at += size
            size = max(1, CHUNK // (self.actions * self.width))
            if progress is not None:
                progress(f"tabulating: {min(at, len(live))} of {len(live)} states")
        empty = torch.zeros(0, dtype=torch.float64)
        successors, probabilities, rewards = (
            (torch.cat(column) for column in zip(*parts, strict=True))
            if parts
            else (empty.to(index_dtype(self.states)), empty, empty)
        )
        pointers = torch.zeros(lengths.numel() + 1, dtype=torch.long)
        pointers[1:] = lengths.flatten().cumsum(0)
        return StateRows(
            first=low,
            pointers=pointers,
            successors=successors,
            probabilities=probabilities,
            rewards=rewards,
            log_prior=self._log_prior(ended, low),
            terminal=ended,
        )

    def _check_size(self, states: int) -> None:
        """Refuse at once what the machine would fill its memory with first."""
        needed = BYTES_OF_A_ROW * states * self.actions
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise ValueError(
                f"{self.name}: expected tables that fit into memory, got {states:,} states "
                f"with {self.actions:,} actions, which take {needed / 2**30:,.0f} GiB at least of "
                f"{there / 2**30:,.0f}; make the model smaller, or learn from samples of it"
            )

    def _chunk(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row lengths (n, A), and successors, probabilities and rewards of `states`, row by row."""
        state = states.repeat_interleave(self.actions)
        action = torch.arange(self.actions).repeat(len(states))
        step = self._discrete("transition", (state, action), self.states)
        probs = step.probs.double()
        if isinstance(step, SparseCategorical):
            successors, probs = _merge_repeats(step.states, probs)
        else:
            successors = torch.arange(probs.shape[-1]).expand(probs.shape)
        self.width = probs.shape[-1]
        present = probs > 0
        outside = present & ((successors < 0) | (successors >= self.states))
        if outside.any():
            row = int(outside.any(-1).nonzero()[0])
            raise ValueError(
                f"{self.name}.transition: expected next states in 0..{self.states - 1}, got "
                f"{successors[outside][0].item()} for state {state[row].item()}, action "
                f"{action[row].item()}"
            )
        count = present.sum(-1)
        next_state = successors[present]
        reward = self._call(
            "reward",
            state.repeat_interleave(count),
            action.repeat_interleave(count),
            next_state,
            dtype=None,
        )
        kept = next_state.to(index_dtype(self.states))
        return count.reshape(-1, self.actions), kept, probs[present], reward.double()

    def initial(self) -> Tensor:
        start = self._discrete("initial_state", (), self.states)
        if isinstance(start, SparseCategorical):
            return _dense(start, self.states, f"{self.name}.initial_state")
        return torch.nn.functional.pad(
            start.probs.double(), (0, self.states - start.probs.shape[-1])
        )

    def _log_prior(self, ended: Tensor, first: int) -> Tensor:
        if type(self.model).action_prior is EnvironmentModel.action_prior:
            return uniform_log_prior(len(ended), self.actions)
        prior = self.model.action_prior
        return _tabulate_prior(prior, ended, self.actions, first=first, states=self.states)

    def _call(self, method: str, *arguments: Tensor, dtype: torch.dtype | None) -> Tensor:
        where = f"{self.name}.{method}"
        result = call(where, getattr(self.model, method), *arguments)
        return checked_tensor(result, arguments[0].shape, where, dtype)

    def _discrete(self, method: str, arguments: tuple[Tensor, ...], size: int) -> TorchDistribution:
        where = f"{self.name}.{method}"
        result = call(where, getattr(self.model, method), *arguments)
        shape = arguments[0].shape if arguments else torch.Size()
        return checked_discrete(result, shape, size, where)


def call(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; whatever it raises becomes a ValueError that says `where`."""
    try:
        return function(*arguments)
    except RAISED as error:
        shapes = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in arguments) or "nothing"
        raise ValueError(
            f"{where} failed when called with {shapes}: {type(error).__name__}: {error}"
        ) from error


def checked_tensor(
    result: Any, shape: torch.Size, where: str, dtype: torch.dtype | None = None
) -> Tensor:
    """`result`, if it is a tensor of this batch shape (and dtype).

    :raises ValueError: it is none; says what was expected and what came.
    """
    if not isinstance(result, Tensor) or result.shape != shape:
        got = (
            f"a tensor of shape {tuple(result.shape)}"
            if isinstance(result, Tensor)
            else f"a {type(result).__name__}"
        )
        raise ValueError(
            f"{where}: expected a tensor of the batch shape of its arguments, {tuple(shape)}, got "
            f"{got}"
        )
    if dtype is not None and result.dtype != dtype:
        raise ValueError(f"{where}: expected dtype {dtype}, got {result.dtype}")
    return result


def checked_discrete(result: Any, shape: torch.Size, size: int, where: str) -> TorchDistribution:
    """`result` as a discrete distribution of batch shape `shape` over {0, ..., size - 1}.

    :raises ValueError: it is none; says what was expected and what came.
    """
    if not isinstance(result, torch.distributions.Distribution):
        raise ValueError(f"{where}: expected a Pyro distribution, got a {type(result).__name__}")
    if result.batch_shape != shape or result.event_shape != ():
        raise ValueError(
            f"{where}: expected batch shape {tuple(shape)} and event shape (), got "
            f"{tuple(result.batch_shape)} and {tuple(result.event_shape)} from {result}"
        )
    if not (isinstance(result, dist.Delta) or result.support.is_discrete):  # type: ignore[union-attr]
        raise ValueError(f"{where}: expected a distribution over integers, got {result}")
    if isinstance(result, SparseCategorical):
        check_probabilities(result.probs.detach(), where)
    try:
        discrete = as_discrete(result, size)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    probs = discrete.probs
    if not isinstance(discrete, SparseCategorical) and probs.shape[-1] != size:
        raise ValueError(
            f"{where}: expected {size} categories, one for each of 0..{size - 1}, got "
            f"{probs.shape[-1]}"
        )
    if probs.isnan().any():
        raise ValueError(f"{where}: expected probabilities, got NaN")
    return discrete


def prior_name(prior: ActionPrior) -> str:
    """What messages call it."""
    return f"action prior {getattr(prior, '__qualname__', type(prior).__qualname__)}"


def check_table_size(prior: ActionPrior, states: int) -> None:
    """:raises ValueError: `prior` is a table of another number of states."""
    given = getattr(prior, "num_states", None)
    if given not in (None, states):
        raise ValueError(
            f"{prior_name(prior)}: expected a table of the model's {states} states, got one of "
            f"{given}"
        )


def _tabulate_prior(
    prior: ActionPrior,
    ended: Tensor,
    actions: int,
    *,
    first: int = 0,
    states: int | None = None,
) -> Tensor:
    """log ρ as a table (n, A); uniform at terminal states, where nobody acts.

    :param ended: (n,), which states are terminal, from `first` on. :param states: of the whole
        model; n if not given.
    """
    live = (~ended).nonzero().squeeze(-1)
    table = uniform_log_prior(len(ended), actions)
    check_table_size(prior, len(ended) if states is None else states)
    where = prior_name(prior)
    rows = []
    with default_float64(), checked_categoricals():
        for chunk in live.split(max(1, CHUNK // actions)):
            chosen = call(where, prior, first + chunk)
            chosen = checked_discrete(chosen, chunk.shape, actions, where)
            rows.append(_log_table(chosen, actions, where))
    return table.index_copy(0, live, torch.cat(rows)) if rows else table


def _dense(chosen: SparseCategorical, size: int, where: str) -> Tensor:
    """The probabilities of 0, ..., size - 1: batch + (size,)."""
    states, possible = chosen.states, chosen.probs > 0
    outside = possible & ((states < 0) | (states >= size))
    if outside.any():
        raise ValueError(
            f"{where}: expected values in 0..{size - 1}, got {states[outside][0].item()}"
        )
    dense = torch.zeros((*chosen.batch_shape, size), dtype=torch.float64)
    return dense.scatter_add(-1, torch.where(possible, states, 0), chosen.probs.double())


def _log_table(chosen: TorchDistribution, size: int, where: str) -> Tensor:
    # Whichever parameter was given: torch clamps the other at 2e-16, which would allow what is
    # forbidden, or loses logits below the smallest float.
    if isinstance(chosen, SparseCategorical):
        return _dense(chosen, size, where).log()
    given_probs = chosen._param is vars(chosen).get("probs")
    table = chosen.probs.double().log() if given_probs else chosen.logits.double()
    return torch.nn.functional.pad(table, (0, size - table.shape[-1]), value=-torch.inf)


def _merge_repeats(states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by state and add up the probabilities of repeated states."""
    if not (states[:, 1:] > states[:, :-1]).all():
        states, order = states.sort(dim=-1)
        probs = probs.gather(-1, order)
        repeated = states[:, 1:] == states[:, :-1]
        if repeated.any():
            slot = torch.zeros_like(states)
            slot[:, 1:] = (~repeated).cumsum(-1)
            probs = torch.zeros_like(probs).scatter_add(-1, slot, probs)
            states = states.scatter(-1, slot, states)
    return states, probs


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """Within this context floats are float64 unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
