"""Inference: `infer(model, routine)` fits a guide to the trajectory program of a model.

A routine is a frozen dataclass of settings with a method `run(model, prior, seed, progress)` that
returns an `InferenceResult`; each lives in a file of its own. This module imports no torch, so that
a command line can show the settings of every routine at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inference_rl import runs
from inference_rl.scale_out import Workers

if TYPE_CHECKING:
    import xarray
    from torch import Tensor

    from inference_rl.environment import EnvironmentModel
    from inference_rl.learned_prior import LearnedPrior
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior
    from inference_rl.simulate import Evaluation

ROUTINES = {
    "exact": "inference_rl.inference.exact:Exact",
    "sql": "inference_rl.inference.sql:SQL",
    "sac": "inference_rl.inference.sac:SAC",
    "policy-gradient": "inference_rl.inference.policy_gradient:PolicyGradient",
    "pcl": "inference_rl.inference.pcl:PCL",
    "reps": "inference_rl.inference.reps:REPS",
    "soft-ddpg": "inference_rl.inference.soft_ddpg:SoftDDPG",
    "soft-td3": "inference_rl.inference.soft_td3:SoftTD3",
}
"""Names on the command line, and where their settings live."""

NEGLIGIBLE_GAP = 1e-6
"""Nats. Below it the two readings of a model are the same for any use."""

OPTIMISM_WARNING = (
    "the posterior's policy assumes dynamics conditioned on success, which the environment does "
    "not have: it is optimistic by {}; to act, infer with target='control'"
)

Progress = Callable[[str], None]
"""Called now and then with a few words on how far inference has got; of learned routines it may be
a `learning.loop.Observer`, which is told of evaluations too."""


class Routine(Protocol):
    """Settings of a way to infer a policy."""

    def run(
        self,
        model: EnvironmentModel,
        *,
        prior: ActionPrior | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> InferenceResult: ...


def infer(
    model: EnvironmentModel,
    routine: Routine,
    *,
    prior: ActionPrior | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    directory: str | Path | None = None,
    workers: int | Workers | None = None,
) -> InferenceResult:
    """Infer a policy for `model`.

    :param routine: what to run, with its settings: `Exact(temperature=0.1)`.
    :param prior: the action prior, in place of the model's own.
    :param progress: called now and then with a few words on how far it has got.
    :param directory: where a learned routine saves checkpoints, and goes on from the last of them;
        nobody else may work in it meanwhile.
    :param workers: who steps the environments of a learned routine, this process if None: so many
        processes beside it, or what `Workers` says. The run is the same, whoever does. On Ray they
        may share the table of a finite model among them, for `Exact`.
    :warns UserWarning: the policy is the posterior's, and the environment's dynamics are not.
    :raises TypeError: `model` is no `EnvironmentModel`, or not of a kind the routine can work on.
    :raises ValueError: the model, the prior or the settings are faulty, or the answer is infinite.
    :raises ConnectionError: workers were lost that nothing could replace.
    :raises BlockingIOError: another process works in `directory`.
    """
    from inference_rl.environment import EnvironmentModel, WithPreviousAction

    if not isinstance(model, EnvironmentModel):
        raise TypeError(
            f"infer: expected an EnvironmentModel, got a {type(model).__name__}; "
            "load_target(...) makes one from a Gymnasium id"
        )
    if not hasattr(routine, "run"):
        raise TypeError(
            f"infer: expected a routine such as Exact(temperature=0.1), got {routine!r}"
        )
    if getattr(prior, "needs_previous_action", False):
        model = WithPreviousAction(model)
    where: dict[str, Any] = {}
    if workers is not None:
        where["workers"] = Workers(workers) if isinstance(workers, int) else workers
    if directory is not None:
        if not hasattr(routine, "save_every"):
            raise ValueError(
                f"directory: expected none with {type(routine).__name__}, which has no "
                "checkpoints; save its result with result.save(directory)"
            )
        where["directory"] = Path(directory)
    with contextlib.ExitStack() as stack:
        if directory is not None:
            is_new = not Path(directory).is_dir()
            stack.enter_context(runs.held(runs.directory_for(Path(directory))))
            if is_new:
                stack.enter_context(_no_empty_one_left(Path(directory)))
        result = routine.run(model, prior=prior, seed=seed, progress=progress, **where)
    warn_of_optimism(result, stacklevel=2)
    return result


@contextlib.contextmanager
def _no_empty_one_left(directory: Path) -> Iterator[None]:
    """Remove `directory` again if what is done within fails before anything is in it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            directory.rmdir()
        raise


@dataclasses.dataclass(frozen=True)
class ObjectiveParts:
    """What J(π) is made of; discounted sums along the policy's own trajectories.

    :ivar expected_return: E Σ γ^t r_t, reward units.
    :ivar entropy: E Σ γ^t H(π(·|s_t)), nats.
    :ivar divergence: E Σ γ^t KL(π(·|s_t) ‖ ρ(·|s_t)), nats.
    :ivar steps: E Σ γ^t over the steps taken.
    """

    expected_return: float
    entropy: float
    divergence: float
    steps: float


@dataclasses.dataclass(frozen=True)
class EvidenceGap:
    """log p(O) - max ELBO: what the control reading gives up by keeping the dynamics; in nats.

    :ivar log_evidence: log p(O_{1:T} = 1). :ivar max_elbo: E V_0 / temperature of control.
    :ivar start: KL(p(s_0) ‖ p(s_0 | O)). :ivar policy: E Σ γ^t KL(π* ‖ p(a | s, O)).
    :ivar dynamics: E Σ γ^t KL(p(s' | s, a) ‖ p(s' | s, a, O)), expectations along π*.

    The three parts add up to the gap, and vanish together exactly where start and dynamics are
    deterministic. Levine (2018), arXiv:1805.00909, §3 (the posterior is optimistic).
    """

    log_evidence: float
    max_elbo: float
    start: float
    policy: float
    dynamics: float

    @property
    def total(self) -> float:
        return self.log_evidence - self.max_elbo


@dataclasses.dataclass(frozen=True)
class EvidenceRate:
    """What every step of an endless episode adds, where neither side of the gap has a limit; nats.

    :ivar log_evidence: lim log p(O_{1:T+1}) - log p(O_{1:T}). :ivar max_elbo: of control, likewise;
        -inf where no policy keeps the cost of a step from growing.
    """

    log_evidence: float
    max_elbo: float

    @property
    def gap(self) -> float:
        return self.log_evidence - self.max_elbo


@dataclasses.dataclass(frozen=True)
class Evidence:
    """log p(O) and what control gives up of it.

    :ivar log_evidence: nats, differentiable; None where it is not defined. :ivar gap: likewise.
    :ivar reason: why there is none, where there is none.
    :ivar rate: what a step adds, where there is none because an episode has no end.
    """

    log_evidence: Tensor | None = None
    gap: EvidenceGap | None = None
    reason: str | None = None
    rate: EvidenceRate | None = None


@dataclasses.dataclass
class InferenceResult:
    """A policy and what is known about it.

    :ivar source: the model, or a function that loads it; see `model`. The parts and the evidence
        are likewise functions, called when they are first asked for: on a large model each costs as
        much again as the policy did.
    :ivar routine: the settings. :ivar seed: of the run.
    :ivar policy: π, called as `policy(state, t)`.
    :ivar q, v: the messages, reward units; None where there is none. Of `Exact` tensors (S, A) and
        (S,), with a leading T and T + 1 for a finite horizon, or quadratic forms. Those of an
        endless episode's posterior say how a state or an action compares with the start; see
        `LinearGaussianSolution`. Of learned routines modules, `v(state, t)` and `q(state, action,
        t)`, with t under a horizon only; V is of shape batch + (1,). policy-gradient with its
        baseline, pcl and step-based reps learn v, and no q. sac, sql, soft-ddpg and soft-td3 learn
        q, `ActionValues`, of which the least member counts, and v is made of it: the bound of the
        policy (sac, soft-ddpg and soft-td3, or what their backup makes of it), or the evidence
        (sql); in a box an estimate from fixed noise, and none in a loaded run of the three others
        whose prior nobody knows any more.
    :ivar objective: J(π) in KL form, reward units: E Σ γ^t [r - temperature · KL(π ‖ ρ)]. None,
        like its entropy form and its parts, for the posterior without a horizon, where the sum has
        no limit; `evidence.rate` says what a step adds to the evidence there.
    :ivar objective_standard_error: of `objective`, where that is an estimate from episodes; reward
        units.
    :ivar error_bound: certified sup-norm error of `v`, reward units; None where there is none.
    :ivar iterations: of the routine. :ivar residual: sup |TV - V| at the end, reward units.
    :ivar seconds: wall time. :ivar final_temperature: where a temperature that moves has got to,
        reward units. :ivar metrics: history, one dict an evaluation.
    :ivar prior_source: gives the prior that a learned policy was inferred under; None where nobody
        knows it any more.
    :ivar details: what this routine alone reports.
    :ivar workers_replaced: of those that collected, or held blocks, how many were lost; not saved,
        because it changed nothing.
    """

    source: EnvironmentModel | Callable[[], EnvironmentModel]
    routine: Any
    policy: Policy
    q: Any
    v: Any
    objective: Tensor | None
    parts_source: Callable[[], ObjectiveParts | None]
    evidence_source: Callable[[], Evidence]
    error_bound: float | None = None
    iterations: int = 0
    residual: float | None = None
    seconds: float = 0.0
    seed: int = 0
    final_temperature: float | None = None
    objective_standard_error: float | None = None
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prior_source: Callable[[], ActionPrior] | None = None
    details: Any = None
    workers_replaced: int = 0

    @functools.cached_property
    def model(self) -> EnvironmentModel:
        """What the policy was inferred on, as tables where the routine made tables of it."""
        return self.source() if callable(self.source) else self.source

    @functools.cached_property
    def parts(self) -> ObjectiveParts | None:
        """What the objective is made of: return, entropy, divergence from the prior."""
        return self.parts_source()

    @functools.cached_property
    def evidence(self) -> Evidence:
        """log p(O) of the model, and the gap between its two readings, or why there are none."""
        return self.evidence_source()

    @functools.cached_property
    def prior(self) -> ActionPrior | None:
        """ρ, under which the policy was inferred; None where a saved run does not hold it."""
        if self.prior_source is not None:
            return self.prior_source()
        return None if hasattr(self.routine, "total_steps") else self.model.action_prior

    @property
    def log_evidence(self) -> Tensor | None:
        """log p(O), nats; None where it is not defined."""
        return self.evidence.log_evidence

    @property
    def gap(self) -> EvidenceGap | None:
        """How far the two readings of the model are apart; None where that is not defined."""
        return self.evidence.gap

    @property
    def temperature(self) -> float:
        """Reward units; the last one, where it moved."""
        if self.final_temperature is not None:
            return self.final_temperature
        return as_number(self.routine.temperature)

    @functools.cached_property
    def objective_entropy_form(self) -> float | None:
        """E Σ γ^t [r + temperature · H(π)], reward units: what SAC and its kin report.

        Under a uniform prior it exceeds `objective` by temperature · log|A| for each (discounted)
        step; for other priors it leaves them out.
        """
        if self.parts is None:
            return None
        if self.temperature == 0:  # where a density's entropy may be -inf
            return self.parts.expected_return
        return self.parts.expected_return + self.temperature * self.parts.entropy

    def evaluate(
        self,
        episodes: int = 100,
        *,
        seed: int | None = None,
        deterministic: bool = False,
        max_steps: int | None = None,
        patience: float = Workers.patience,
    ) -> Evaluation:
        """Run the policy on the real environment; see `inference_rl.simulate.evaluate`.

        :param seed: of episodes that are none of those it was learned from; that of the run if
            not given.
        :param patience: seconds that a step may take; see `learning.patience.Limit`.
        :warns UserWarning: it is the posterior's, which counts on luck that is not there.
        """
        from inference_rl.learning.patience import Limit
        from inference_rl.randomness import derived
        from inference_rl.simulate import evaluate

        warn_of_optimism(self, stacklevel=3)

        with Limit(patience).kept() as limit:
            return evaluate(
                self.model,
                self.policy,
                episodes=episodes,
                seed=derived(self.seed if seed is None else seed, "evaluation"),
                deterministic=deterministic,
                max_steps=max_steps,
                watch=limit.on,
            )

    def sample(
        self, draws: int = 1000, *, horizon: int | None = None, seed: int | None = None
    ) -> xarray.DataTree:
        """Whole trajectories from the inferred distribution, as ArviZ reads them.

        For control q(τ): the policy in the environment's own dynamics. For the posterior p(τ | O):
        the posterior's start, policy and dynamics, which is not how the environment behaves.

        :param horizon: steps to draw; needed only where the model has none. There the tail's exact
            message stands for what follows.
        :returns: a DataTree of the groups

            - `posterior`: `state` (chain, draw, time + 1), `action`, `reward` and `alive` (chain,
              draw, time);
            - `sample_stats`: `log_weight` = log p(τ, O) - log q(τ) in nats, `return` and
              `discounted_return` (chain, draw), reward units;
            - `log_likelihood`: `optimality` (chain, draw, time) = reward / temperature, nats, of
              which the program weighs step t by discount^t; none at temperature 0;
            - `prior_predictive` and `posterior_predictive`: `return` (chain, draw) of whoever acts
              by the prior, and by the inferred policy, where dynamics are the environment's own;
            - `exact`, of finite models: `value` and `q` (reward units) and `policy` of control, by
              state, action and step, with `objective` (reward units) and `log_evidence` (nats).

        With a discount below 1 the two targets weigh differently, as their programs do: control
        scales step t by γ^t, so that weights average to J / temperature; the posterior lives on
        with probability γ, and exp(weights) average to p(O). Those of an endless episode's
        posterior are `evidence.rate.log_evidence` a step.

        Of a learned routine weights are Σ γ^t [r / temperature - log π/ρ] over the steps drawn,
        with nothing for what follows them. They are left out at temperature 0, and where a run
        was loaded whose prior was made in Python, which it does not hold.
        """
        from inference_rl.inference.sampling import complete

        seed = self.seed if seed is None else seed
        tree = self.routine.sample(self, draws, horizon=horizon, seed=seed)
        return complete(tree, self, seed)

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON: null where one does not apply."""
        origin, rate = self.model.origin or {}, self.evidence.rate
        return {
            "target": origin.get("target"),
            "routine": self.routine.name,
            "settings": settings_as_json(self.routine),
            "seed": self.seed,
            "temperature": self.temperature,
            "discount": float(self.model.discount),
            "objective": None if self.objective is None else as_number(self.objective),
            "objective_standard_error": self.objective_standard_error,
            "objective_entropy_form": self.objective_entropy_form,
            "log_evidence": None if self.log_evidence is None else as_number(self.log_evidence),
            "no_evidence_because": self.evidence.reason,
            "evidence_gap": None
            if self.gap is None
            else dataclasses.asdict(self.gap) | {"total": self.gap.total},
            "evidence_rate": None
            if rate is None
            else {
                name: _finite(getattr(rate, name)) for name in ("log_evidence", "max_elbo", "gap")
            },
            **{
                field.name: None if self.parts is None else _finite(getattr(self.parts, field.name))
                for field in dataclasses.fields(ObjectiveParts)
            },
            "error_bound": _finite(self.error_bound),
            "residual": _finite(self.residual),
            "iterations": self.iterations,
            "seconds": self.seconds,
        }

    def save(self, directory: str | Path) -> None:
        """Write the run into `directory`: policy and messages (safetensors) and numbers (JSON), and
        the prior, where that was learned.

        A model that `load_target` did not find, or whose prior was made in Python, is saved too, if
        it is finite.

        :raises FileExistsError: it holds another run. :raises OSError: it cannot be written.
        """
        from inference_rl.finite import FiniteModel

        tensors = {
            "policy": self.policy.state_dict(),
            "messages": self.routine.messages(self),
        }
        tabulated = isinstance(self.model, FiniteModel)
        if isinstance(self.model, FiniteModel):
            tables = {name: table.detach() for name, table in self.model.tensors().items()}
            tensors["prior"] = {"log_prior": tables.pop("log_prior")}
            if self.model.origin is None:
                tensors["model"] = tables
        learned = self._learned_prior()
        if learned is not None:
            tensors["learned_prior"] = learned.state_dict()
        manifest = {
            "policy": self.policy.kind,
            "policy_description": self.policy.description(),
            "origin": self.model.origin,
            **self.summary(),
            "horizon": self.model.horizon,
            "tabulated": tabulated,
            "remembers_action": self.model.remembers_action,
            "final_temperature": self.final_temperature,
            "prior_can_be_loaded": self._prior_can_be_loaded(),
            "learned_prior": None if learned is None else learned.actions,
            "metrics": self.metrics,
        }
        # What is timed is not the same twice, and a run that was resumed is to be.
        runs.write_seconds(directory, manifest.pop("seconds"))
        runs.write(directory, manifest, tensors)

    def _learned_prior(self) -> LearnedPrior | None:
        """The prior that was learned beside the policy, if one was."""
        if self.prior_source is None or not getattr(self.routine, "learn_prior", False):
            return None
        prior: Any = self.prior_source()
        found: LearnedPrior = prior
        return found

    def _prior_can_be_loaded(self) -> bool:
        """Whether it is the model's own, or one that has a name."""
        if self.prior_source is None or getattr(self.routine, "learn_prior", False):
            return False
        named = "prior" in (self.model.origin or {})
        return named or self.prior_source() == self.model.action_prior

    @classmethod
    def load(
        cls, directory: str | Path, *, model: EnvironmentModel | None = None
    ) -> InferenceResult:
        """A saved run. Its policy and numbers are read without running any code; the target is
        loaded when `model` is first asked for, and so is the prior, by a policy that must know
        which actions of a continuous state it forbids, when that is first called.

        :param model: in place of the target that the run was inferred on.
        :raises FileNotFoundError: no run there. :raises ValueError: it is damaged or too new.
        """
        import torch

        from inference_rl.learned_prior import load_learned_prior
        from inference_rl.policies import load_policy

        @functools.cache
        def prior() -> ActionPrior:
            return _saved_prior(directory, model)

        saved = runs.read_manifest(directory)
        policy = load_policy(directory, prior=lambda state: prior()(state))
        routine = routine_class(saved["routine"])(**made_of_json(saved["settings"]))
        gap, rate = saved["evidence_gap"], saved.get("evidence_rate")
        # Not finite for a density at temperature 0, or without end; and JSON has no word for it.
        names = [field.name for field in dataclasses.fields(ObjectiveParts)]
        unbounded = {"entropy": -math.inf, "divergence": math.inf, "steps": math.inf}
        parts, objective = None, None
        if saved["objective"] is not None:
            objective = torch.tensor(saved["objective"], dtype=torch.float64)
            parts = ObjectiveParts(
                **{n: unbounded[n] if saved[n] is None else saved[n] for n in names}
            )
        evidence = Evidence(
            log_evidence=None
            if saved["log_evidence"] is None
            else torch.tensor(saved["log_evidence"], dtype=torch.float64),
            gap=None if gap is None else EvidenceGap(**{k: gap[k] for k in gap if k != "total"}),
            reason=saved["no_evidence_because"],
            rate=None
            if rate is None
            else EvidenceRate(
                rate["log_evidence"],
                -math.inf if rate["max_elbo"] is None else rate["max_elbo"],
            ),
        )
        result = cls(
            source=model if model is not None else functools.partial(_saved_model, directory),
            routine=routine,
            policy=policy,
            **routine.read_messages(runs.read_tensors(directory, "messages"), policy),
            objective=objective,
            parts_source=lambda: parts,
            evidence_source=lambda: evidence,
            error_bound=saved["error_bound"],
            iterations=saved["iterations"],
            residual=saved["residual"],
            seconds=runs.read_seconds(directory),
            seed=saved["seed"],
            final_temperature=saved.get("final_temperature"),
            objective_standard_error=saved.get("objective_standard_error"),
            metrics=saved["metrics"],
        )
        if saved.get("prior_can_be_loaded"):
            result.prior_source = functools.cache(
                lambda: _named_prior(result.model, saved["origin"] or {})
            )
        elif saved.get("learned_prior") is not None:
            learned = load_learned_prior(directory)
            result.prior_source = lambda: learned
        if hasattr(routine, "value"):
            result.v = routine.value(result)
        return result


def warn_of_optimism(result: InferenceResult, stacklevel: int) -> None:
    """Warn whoever is about to act on a posterior's policy, if that differs from control."""
    if getattr(result.routine, "target", "control") != "posterior":
        return
    gap, rate = result.gap, result.evidence.rate
    nats = gap.total if gap is not None else rate.gap if rate is not None else 0.0
    if nats > NEGLIGIBLE_GAP:
        by = f"{nats:.3g} nats" + " a step" * (gap is None)
        warnings.warn(OPTIMISM_WARNING.format(by), stacklevel=stacklevel + 1)


def routine_class(name: str) -> Any:
    """The settings class of the routine called `name` on the command line.

    :raises ValueError: there is none.
    """
    if name not in ROUTINES:
        raise ValueError(f"unknown routine {name!r}: expected one of {', '.join(ROUTINES)}")
    module, _, attribute = ROUTINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _saved_model(directory: str | Path) -> EnvironmentModel:
    from inference_rl.environment import WithPreviousAction
    from inference_rl.finite import FiniteModel
    from inference_rl.tabulation import tabulate
    from inference_rl.targets import load_target

    saved = runs.read_manifest(directory)
    prior = runs.read_tensors(directory, "prior") if saved["tabulated"] else {}
    if saved["origin"] is not None:
        model = load_target(**{k: v for k, v in saved["origin"].items() if k != "prior"})
        if saved["remembers_action"]:
            model = WithPreviousAction(model)
        return tabulate(model).replace(**prior) if saved["tabulated"] else model
    if "model.safetensors" not in saved["files"]:
        raise ValueError(
            f"{directory} was inferred on a model made in Python and does not hold it; give it as "
            "InferenceResult.load(directory, model=...)"
        )
    return FiniteModel(
        **runs.read_tensors(directory, "model"),
        **prior,
        discount=saved["discount"],
        horizon=saved["horizon"],
    )


def _saved_prior(directory: str | Path, model: EnvironmentModel | None) -> ActionPrior:
    """The prior of a saved run whose policy needs it; `model` is the run's, if it has no origin."""
    saved = runs.read_manifest(directory)
    origin = saved["origin"] or {}
    if model is None or origin:
        model = _saved_model(directory)
    if saved["policy_description"]["support"] == "given" and "prior" not in origin:
        raise ValueError(
            f"{directory} was inferred under a prior made in Python, which a run does not hold and "
            "its policy needs; make the prior, and load the policy by load_policy(directory, "
            "prior=...)"
        )
    return _named_prior(model, origin)


def _named_prior(model: EnvironmentModel, origin: dict[str, Any]) -> ActionPrior:
    """The prior that a run names, or else that of its model."""
    from inference_rl.targets import load_prior

    if "prior" not in origin:
        return model.action_prior
    named = origin["prior"]
    return load_prior(named["name"], model, named["kwargs"], directory=origin["directory"])


def as_number(value: float | Tensor) -> float:
    """A number or a scalar tensor as a number, without torch's warning that a graph is left."""
    return value if isinstance(value, int | float) else float(value.item())


def settings_as_json(routine: Routine) -> dict[str, Any]:
    """The settings of a routine, by name."""
    assert dataclasses.is_dataclass(routine)
    fields = dataclasses.fields(routine)
    return {field.name: _plain(getattr(routine, field.name)) for field in fields}


def made_of_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were before `settings_as_json`: JSON has no tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return type(value).__name__ if callable(value) else as_number(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
