"""What the routines share that learn Q from replay: their learner, and what they are told of it.

A routine brings `Part`s: what is learned, by which loss, how often. The learner collects, replays,
draws a batch, takes a step down each loss in turn, moves the temperature, and what lags follows.
Losses run their small Pyro programs; they are recorded as tensor operations, see `tracing`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from gymnasium.spaces import MultiDiscrete
from torch import Tensor, nn

from inference_rl.action_values import ActionValues, strides
from inference_rl.decision import Decision
from inference_rl.decision_value import DecisionValue
from inference_rl.environment import EnvironmentModel
from inference_rl.inference import InferenceResult, learned
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.replay import PathReplay
from inference_rl.learning.tracing import CompileError, Graph, Tensors, missing_to_compile
from inference_rl.policies import Policy
from inference_rl.priors import ActionPrior
from inference_rl.randomness import derived, torch_seeded

WORTH_COMPILING = 40_000
"""Updates from which compiling, which takes up to a minute, saves more than that: of the smallest
tables as of networks, for what small updates save is not arithmetic but the launching of many
operations, and that is most of their time."""


class Batch(NamedTuple):
    """N transitions that were drawn from replay.

    :ivar state, next_state: (N, ...). :ivar action: (N, d); of discrete actions their number among
        all, (N,). :ivar reward: (N,), reward units. :ivar goes_on: (N,), 0 where the transition
        terminated and nothing follows, else 1; an episode that was cut goes on.
    :ivar step: (N,), t within the episode. :ivar next_step: that of the next state; after the last
        step of a horizon, where nothing follows, the last.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    goes_on: Tensor
    step: Tensor
    next_step: Tensor


def residual_loss(q: Tensor, target: Tensor) -> Tensor:
    """½ Σ_i mean (Q_i − target)², of all Qs, (M, N), without the gradient of the target, (N,)."""
    return 0.5 * (q - target.detach()).square().mean(-1).sum()


def soft_target(reward: Tensor, goes_on: Tensor, value: Tensor, discount: float) -> Tensor:
    """r + γ V(s'), (N,), reward units; V counts for nothing once the episode has terminated."""
    return reward + discount * goes_on * value


Loss = Callable[[Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""From a batch and the temperature, a scalar, to a loss and numbers to log."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that is learned.

    :ivar module: whose parameters. :ivar loss: down whose gradient.
    :ivar reads: modules that the loss reads besides. :ivar learning_rate: of Adam.
    :ivar every: updates between its own.
    """

    module: nn.Module
    loss: Loss
    reads: Sequence[nn.Module]
    learning_rate: float
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Lag:
    """`behind` follows `ahead`: by `rate` of the way each time, every so many updates."""

    behind: nn.Module
    ahead: nn.Module
    rate: float
    every: int = 1


@dataclasses.dataclass(frozen=True)
class ByPrior:
    """Acts as the prior does."""

    prior: ActionPrior

    def __call__(self, state: Tensor, t: Tensor) -> Any:
        # Actions of the same precision as those of the policy, which may end the episode.
        if state.is_floating_point():
            state = state.to(torch.get_default_dtype())
        return self.prior(state)


class Learner:
    """The state of a run: parts, what lags behind them, replay, temperature.

    :param policy: the guide, on the device of the settings; its buffer `temperature`, if it has
        one, follows that of the run.
    :param parts: in the order of their updates. Together they log `divergence`, by which the
        temperature is tuned.
    :param q: the message, for the result.
    :param schedule: called with the environment steps so far, before the updates that follow them.
    :ivar policy: that which acts, on the CPU.
    """

    def __init__(
        self,
        settings: Any,
        model: EnvironmentModel,
        prior: ActionPrior,
        tempering: learned.Tempering,
        *,
        policy: Policy,
        q: nn.Module,
        parts: dict[str, Part],
        lags: dict[str, Lag],
        schedule: Callable[[int], None] | None = None,
    ) -> None:
        self.settings, self.model, self.prior, self.tempering = settings, model, prior, tempering
        self.parts, self.lags, self._q, self._learned = parts, lags, q, policy
        self._schedule = schedule
        self.policy = policy if settings.device == "cpu" else copy.deepcopy(policy).to("cpu")
        self.replay = PathReplay(
            settings.replay_capacity, dtype=torch.get_default_dtype(), device=settings.device
        )
        self._parameters = {name: _learned(part.module) for name, part in parts.items()}
        self.optimisers = {
            name: torch.optim.Adam(self._parameters[name], lr=part.learning_rate, fused=True)
            for name, part in parts.items()
        }
        self._followers = {
            name: [lag for lag in lags.values() if lag.ahead is part.module]
            for name, part in parts.items()
        }
        self._aside = _apart(parts, policy, prior) if settings.side_by_side else []
        self._pending: list[Future[None]] = []
        self._logged: dict[str, dict[str, Tensor | float]] = {name: {} for name in parts}
        """Of each part, what its latest update gave to log."""
        self.updates, self.steps, self.owed = 0, 0, 0.0
        self.seed = int(torch.randint(2**62, ()))
        self._strides: Tensor | None = None
        if isinstance(model.action_space, MultiDiscrete):
            self._strides = strides(model.action_space.nvec.tolist()).to(settings.device)
        self._threads = ThreadPoolExecutor(max(len(parts) - 1, 1))
        self._compile(self._wants_compiled())

    def _wants_compiled(self) -> bool:
        settings = self.settings
        if settings.compile != "auto":
            return bool(settings.compile == "on")
        updates = settings.total_steps * settings.updates_per_step
        return updates >= WORTH_COMPILING and not missing_to_compile()

    def _compile(self, compiled: bool) -> None:
        if compiled and (missing := missing_to_compile()):
            raise ValueError(
                f"compile: expected, for updates in machine code, {missing}, or set compile to "
                "'off', which a run that was begun with compiled updates cannot change, because "
                "they round differently"
            )
        self.compiled = compiled
        self._names: dict[str, list[str]] = {name: [] for name in self.parts}
        self._graphs = {
            name: Graph(
                _gradients(part, self._names[name]), [part.module, *part.reads], compiled=compiled
            )
            for name, part in self.parts.items()
        }

    def _record(self) -> None:
        """Record every part before any takes a step: a run is compiled from its first or not at
        all."""
        if all(graph.traced is not None for graph in self._graphs.values()):
            return
        batch = self._batch(derived(self.seed, f"update {self.updates + 1}"))
        given = (*batch, batch.reward.new_tensor(self.tempering.temperature))
        try:
            for graph in self._graphs.values():
                graph.record(*given)
        except CompileError as error:
            if self.settings.compile == "on" or self.updates > 0:
                raise
            reason = str(error.__cause__).strip().partition("\n")[0]
            warnings.warn(
                f"updates cannot be compiled ({type(error.__cause__).__name__}: {reason}), and are "
                "not in this run, which takes longer; mend the compiler, or set compile to 'off'",
                stacklevel=2,
            )
            self._compile(False)
            self._record()

    def collect(self, collector: Collector) -> Segment:
        warming_up = self.steps < self.settings.warmup_steps
        acts: Any = ByPrior(self.prior) if warming_up else self.policy
        return collector.collect(acts, self.settings.steps_per_round)

    def update(self, data: Segment) -> dict[str, Tensor | float]:
        modules = [part.module for part in self.parts.values()]
        learned.observe(data, *modules, *(lag.behind for lag in self.lags.values()))
        self.replay.add(data)
        self.steps += data.steps
        self.tempering.advance(data.steps)
        if self._schedule is not None:
            self._schedule(self.steps)
        if self.steps >= self.settings.warmup_steps:
            self.owed += data.steps * self.settings.updates_per_step
            due = int(self.owed)
            self.owed -= due
            if due:
                self._record()
            for _ in range(due):
                self._update()
        self._show()
        return {"temperature": self.tempering.temperature, **_together(self._logged.values())}

    def _show(self) -> None:
        """Let the policy that acts, and the prior, be those that were learned."""
        if isinstance(temperature := getattr(self._learned, "temperature", None), Tensor):
            temperature.fill_(self.tempering.temperature)
        if self.policy is not self._learned:
            self.policy.load_state_dict(self._learned.state_dict())
            if "prior" in self.parts and isinstance(self.prior, nn.Module):
                self.prior.load_state_dict(self.parts["prior"].module.state_dict())

    def _update(self) -> dict[str, Tensor | float]:
        """One step of every part whose turn it is, on one batch; numbers to log of those."""
        self.updates += 1
        seed = derived(self.seed, f"update {self.updates}")
        batch = self._batch(seed)
        given = (*batch, batch.reward.new_tensor(self.tempering.temperature))
        due = [name for name, part in self.parts.items() if self.updates % part.every == 0]
        self.settle()
        with torch_seeded(seed, "cpu"):
            found = self._side_by_side(due, given) if self.settings.side_by_side else {}
            for name in due:
                if name not in found:
                    found[name] = self._graphs[name](*given)
                    self._descend(name, found[name])
        self._log(found)
        numbers = _together(self._logged[name] for name in found)
        if "divergence" in numbers:
            self.tempering.update(torch.as_tensor(numbers["divergence"]), 0)
        left = found if self.settings.side_by_side else {}
        steps = {name: self._step(name, left.get(name)) for name in self.parts}
        self._pending = [self._threads.submit(steps.pop(name)) for name in self._aside]
        for step in steps.values():
            step()
        return numbers

    def _side_by_side(self, names: list[str], given: Tensors) -> dict[str, Tensors]:
        """What the graphs give, all but the first, which takes longest, on threads of their own."""
        runs = [self._graphs[name].prepared(*given) for name in names]
        if not all(self._graphs[name].traced for name in names):
            return {name: run() for name, run in zip(names, runs, strict=True)}
        waiting = [self._threads.submit(run) for run in runs[1:]]
        found = [run() for run in runs[:1]]
        found += [future.result() for future in waiting]
        return dict(zip(names, found, strict=True))

    def _step(self, name: str, found: Tensors | None) -> Callable[[], None]:
        """What takes a step of a part, if one is left to take, and then lets follow what lags."""
        following = [lag for lag in self._followers[name] if self.updates % lag.every == 0]

        def step() -> None:
            if found is not None:
                self._descend(name, found)
            for lag in following:
                _follow(lag)

        return step

    @property
    def q(self) -> nn.Module:
        """The message, for the result."""
        self.settle()
        return self._q

    def settle(self) -> None:
        """Wait for steps that are being taken still, while the policy acts already."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _descend(self, name: str, found: Tensors) -> None:
        """A step of a part by what its graph gave."""
        for parameter, gradient in zip(self._parameters[name], found, strict=False):
            parameter.grad = gradient
        self.optimisers[name].step()

    def _log(self, found: dict[str, Tensors]) -> None:
        """Keep what the graphs gave to log."""
        for name, tensors in found.items():
            names = f"{name}_loss", f"{name}_gradient_norm", *self._names[name]
            rest = tensors[len(self._parameters[name]) :]
            self._logged[name] = dict(zip(names, rest, strict=True))

    def _batch(self, seed: int) -> Batch:
        drawn = self.replay.sample(self.settings.batch_size, 1, seed)
        action = drawn.action[0]
        if self._strides is not None:
            action = (action * self._strides).sum(-1)
        reward, after = drawn.reward[0], drawn.step[0] + 1
        if self.model.horizon is not None:
            after = after.clamp(max=self.model.horizon - 1)
        return Batch(
            drawn.state[0],
            action,
            reward,
            drawn.next_state[0],
            (~drawn.terminated[0]).to(reward.dtype),
            drawn.step[0],
            after,
        )

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "modules": {name: part.module.state_dict() for name, part in self.parts.items()},
            "lagging": {name: lag.behind.state_dict() for name, lag in self.lags.items()},
            "optimisers": {name: it.state_dict() for name, it in self.optimisers.items()},
            "temperature": self.tempering.state_dict(),
            "replay": self.replay.state_dict(),
            "updates": self.updates,
            "steps": self.steps,
            "owed": self.owed,
            "logged": {
                name: {key: float(value) for key, value in logged.items()}
                for name, logged in self._logged.items()
            },
            "compiled": self.compiled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.settle()
        for name, part in self.parts.items():
            part.module.load_state_dict(state["modules"][name])
        for name, lag in self.lags.items():
            lag.behind.load_state_dict(state["lagging"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.tempering.load_state_dict(state["temperature"])
        self._show()
        self.replay.load_state_dict(state["replay"])
        self.updates, self.steps, self.owed = state["updates"], state["steps"], state["owed"]
        self._logged = state["logged"]
        self._compile(state["compiled"])


def _gradients(part: Part, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    """From a batch and the temperature to gradients, loss, their norm, and numbers to log.

    :param names: filled with the names of those numbers.
    """

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        batch, temperature = Batch(*given[:-1]), given[-1]
        loss, logged = part.loss(batch, temperature)
        names[:] = logged
        gradients = torch.autograd.grad(
            loss, _learned(part.module), allow_unused=True, materialize_grads=True
        )
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        return (*gradients, loss.detach(), norm, *(value.detach() for value in logged.values()))

    return run


def _together(logged: Iterable[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    """The numbers of some parts; where two have one of the same name, that of the last."""
    return {name: value for numbers in logged for name, value in numbers.items()}


def _learned(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _apart(parts: dict[str, Part], policy: Policy, prior: ActionPrior) -> list[str]:
    """Parts that neither the policy nor the prior, which act, read when they do, and which nobody
    copies to them."""
    learned_prior = [part.module for name, part in parts.items() if name == "prior"]
    acting = [m for m in (policy, prior, *learned_prior) if isinstance(m, nn.Module)]
    read = {id(parameter) for module in acting for parameter in module.parameters()}
    return [
        name
        for name, part in parts.items()
        if read.isdisjoint(id(parameter) for parameter in part.module.parameters())
    ]


def _follow(lag: Lag) -> None:
    with torch.no_grad():
        ahead = [parameter.detach() for parameter in lag.ahead.parameters()]
        torch._foreach_lerp_(list(lag.behind.parameters()), ahead, lag.rate)


def messages(tensors: dict[str, Tensor], policy: Policy, members: int) -> dict[str, Any]:
    """q from what `learned.messages` gave; of the policy's own architecture. `value` makes v."""
    from inference_rl.networks import NetworkPolicy

    parameters = {key[2:]: value for key, value in tensors.items() if key.startswith("q.")}
    if not parameters or not isinstance(policy, NetworkPolicy):
        return {"q": None, "v": None}
    q = ActionValues(policy.architecture, members)
    q.load_state_dict(parameters)
    return {"q": q.requires_grad_(False), "v": None}


def value(result: InferenceResult, how: Callable[[Decision], Tensor]) -> DecisionValue | None:
    """v of a result, made of its q; None where nobody knows q, or the prior, any more.

    :param how: see `DecisionValue`.
    """
    source = result.prior_source
    if result.q is None or source is None:
        return None
    return DecisionValue(
        result.policy, result.q, lambda state: source()(state), result.temperature, how
    )
