"""Exact inference on finite models whose tables do not fit into one process: control, in blocks.

Each worker tabulates its own range of states and keeps the tables; see
`inference_rl.scale_out.sharded_control`. Gathered here are V, Q, the policy, and what the policy
brings from each state: 8 (2 A + 5) bytes a state, a finite horizon of T steps T times as much.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.finite import FiniteModel, check_time
from inference_rl.finite_messages import first_step, tied_actions
from inference_rl.inference import (
    Evidence,
    InferenceResult,
    ObjectiveParts,
    Progress,
    as_number,
)
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.policies import TabularPolicy
from inference_rl.priors import ActionPrior
from inference_rl.scale_out.crew import Crew, Recipe
from inference_rl.scale_out.sharded_control import (
    ShardedMessages,
    Shards,
    endless_messages,
    finite_messages,
)
from inference_rl.scale_out.state_block import StateBlock
from inference_rl.tabulation import check_countable, tabulate, tabulate_initial, tabulate_rows

if TYPE_CHECKING:
    from inference_rl.inference.exact import Exact
    from inference_rl.scale_out import Workers


@dataclasses.dataclass(frozen=True)
class ShardedDetails:
    """What exact inference in blocks reports besides.

    :ivar ties: as of `ExactDetails`. :ivar workers: blocks. :ivar exchanges: of halos between them.
    :ivar bytes_exchanged: between blocks. :ivar bytes_gathered: between blocks and this process.
    :ivar recoveries: blocks that were made again, because what held them was lost.
    :ivar seconds_to_tabulate: starting the workers included.
    """

    ties: Tensor | None
    workers: int
    exchanges: int
    bytes_exchanged: int
    bytes_gathered: int
    recoveries: int
    seconds_to_tabulate: float

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        names = ("workers", "exchanges", "bytes_exchanged", "bytes_gathered", "recoveries")
        return {name: getattr(self, name) for name in names}


def run(
    settings: Exact,
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None,
    seed: int,
    progress: Progress | None,
    workers: Workers,
) -> InferenceResult:
    """On a Ray cluster.

    :raises ValueError: the model is none of those covered; Ray or the cluster is not there.
    :raises WorkersLost: workers were lost that nothing could replace.
    """
    from inference_rl.scale_out.on_ray import connected
    from inference_rl.scale_out.sharded_on_ray import RayCrew

    if workers.on != "ray":
        raise ValueError(
            "workers: expected them on Ray (--workers ray --num-workers N), or none, with Exact, "
            "whose blocks of states send one another messages there; got processes of this "
            f"machine, {workers.count} of them"
        )
    if workers.ahead:
        raise ValueError(
            "workers: expected ahead=False (no --async) with Exact, which collects nothing that "
            "could be collected ahead"
        )
    _check(settings, model)
    with connected(workers.address, workers.count):
        return run_in_blocks(
            settings,
            model,
            prior=prior,
            seed=seed,
            progress=progress,
            count=workers.count,
            crew_of=RayCrew,
        )


def run_in_blocks(
    settings: Exact,
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None,
    seed: int,
    progress: Progress | None,
    count: int,
    crew_of: Callable[[Recipe, int], Crew],
) -> InferenceResult:
    """In so many blocks, or one for each state, held by whatever `crew_of` makes."""
    started = time.perf_counter()
    _check(settings, model)
    temperature, horizon = as_number(settings.temperature), model.horizon
    states = int(model.state_space.n)  # type: ignore[attr-defined]
    count = min(count, states)
    edges = np.linspace(0, states, count + 1).astype(np.int64)
    initial = tabulate_initial(model).detach()
    if progress is not None:
        progress(f"tabulating {states} states in {count} blocks")
    crew = crew_of(partial(_recipe, model, prior, edges, temperature), count)
    try:
        shards = Shards(crew, edges)
        tabulated = time.perf_counter() - started
        if horizon is None:
            messages = endless_messages(
                shards, temperature, settings.tolerance, _reporting(progress)
            )
        else:
            messages = finite_messages(shards, model.discount, horizon)
        ties = _ties(shards, messages) if temperature == 0 else None
    finally:
        crew.close()
    parts = ObjectiveParts(*(initial @ torch.from_numpy(messages.sums)).tolist())
    v = torch.from_numpy(messages.v)
    reason = (
        "a model that is cut into blocks is solved for control alone; infer without workers for "
        "its posterior"
    )
    in_memory = isinstance(model, FiniteModel)
    return InferenceResult(
        source=tabulate(model, prior=prior) if in_memory else model,
        routine=settings,
        policy=TabularPolicy(torch.from_numpy(messages.policy)),
        q=torch.from_numpy(messages.q),
        v=v,
        objective=initial @ first_step(v),
        parts_source=lambda: parts,
        evidence_source=lambda: Evidence(reason=reason),
        error_bound=messages.error_bound,
        iterations=messages.iterations,
        residual=messages.residual,
        seconds=time.perf_counter() - started,
        seed=seed,
        prior_source=None if in_memory else lambda: prior or model.action_prior,
        workers_replaced=shards.recoveries,
        details=ShardedDetails(
            ties=ties,
            workers=count,
            exchanges=shards.exchanges,
            bytes_exchanged=shards.bytes_exchanged,
            bytes_gathered=shards.bytes_gathered,
            recoveries=shards.recoveries,
            seconds_to_tabulate=tabulated,
        ),
    )


def _check(settings: Exact, model: EnvironmentModel) -> None:
    """Refuse what is not solved in blocks."""
    if isinstance(model, LinearGaussianModel):
        raise ValueError(
            "workers: expected a finite model, whose table of transitions they share, got a "
            "linear-Gaussian one, which has none; infer without workers"
        )
    check_countable(model)
    check_time(model.discount, model.horizon)
    if settings.target != "control":
        raise ValueError(
            f"target: expected 'control' with workers, got {settings.target!r}, whose messages are "
            "not computed in blocks; infer without workers"
        )
    if model.horizon is None and model.discount == 1:
        raise ValueError(
            "discount: expected below 1 with workers and no horizon, got 1, without which nothing "
            "proves in blocks that episodes end; give the model a horizon, lower the discount, or "
            "infer without workers"
        )
    tables = model.tensors().values() if isinstance(model, FiniteModel) else ()
    if any(isinstance(t, Tensor) and t.requires_grad for t in (*tables, settings.temperature)):
        raise ValueError(
            "workers: expected nothing to differentiate by, got a tensor that requires a gradient, "
            "which does not come back from a worker; detach it, or infer without workers"
        )


def _recipe(
    model: EnvironmentModel,
    prior: ActionPrior | None,
    edges: np.ndarray,
    temperature: float,
    number: int,
) -> Callable[[], StateBlock]:
    """What makes block `number`: of tables that are here, its rows and no others."""
    if not isinstance(model, FiniteModel):
        return partial(
            StateBlock.tabulated, model, prior, number=number, edges=edges, temperature=temperature
        )
    rows = tabulate_rows(model, int(edges[number]), int(edges[number + 1]), prior=prior)
    return partial(
        StateBlock,
        rows,
        number=number,
        edges=edges,
        discount=model.discount,
        temperature=temperature,
    )


def _reporting(progress: Progress | None) -> Callable[[int, float], None] | None:
    if progress is None:
        return None
    return lambda step, error: progress(f"control: Newton step {step}, error at most {error:.2g}")


def _ties(shards: Shards, messages: ShardedMessages) -> Tensor:
    allowed = torch.from_numpy(shards.surviving(shards.allowed))
    error = messages.error_bound if np.isfinite(messages.error_bound) else messages.residual
    tied = tied_actions(torch.where(allowed, 0.0, -torch.inf), torch.from_numpy(messages.q), error)
    return torch.where(torch.from_numpy(shards.terminal), 0, tied.sum(-1))
