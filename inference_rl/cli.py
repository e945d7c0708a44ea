"""The command `inference-rl`: infer, evaluate, check, derive, compare, sweep, list, doctor.

Nothing here imports torch before a command runs, so that `--help` answers at once. Results go to
stdout; progress, warnings and errors to stderr. Bad input is one sentence and exit code 2.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from inference_rl import runs
from inference_rl.command_context import (
    check_page,
    claimed,
    free_directory,
    one_sentence,
    one_sentence_of_sweep,
    reporting,
    write_page,
)
from inference_rl.command_line import closest, complaint, options
from inference_rl.inference import ROUTINES, routine_class

if TYPE_CHECKING:
    from inference_rl.diagnostics.guide import GuideQuality
    from inference_rl.diagnostics.temperature import TemperatureReport, TrustRegion
    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult
    from inference_rl.priors import ActionPrior
    from inference_rl.scale_out import Workers
    from inference_rl.sweeping.results import SweepResult

TRACEBACK = "INFERENCE_RL_TRACEBACK"
"""The environment variable that shows where an error came from that nothing foresaw."""

QUICK_STATES = 1_000
"""Of a finite model that `evaluate` solves besides, in a moment, to hold the guide against."""

Json = Annotated[
    dict[str, Any] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _object(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def _first_line(item: Any) -> str:
    return (item.__doc__ or "").strip().partition("\n")[0]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected a JSON object such as '{{\"slip\": 0.1}}': {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object such as '{{\"slip\": 0.1}}', got {text}")
    return value


Target = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="TARGET",
        help="A Gymnasium id, a bundled model, or a file path/model.py[:Name].",
    ),
]
Run = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN", help="The directory of a saved run."),
]
if TYPE_CHECKING:
    RoutineSettings = Any
else:  # made when this runs, which is too late for a type checker
    RoutineSettings = Annotated[
        tyro.extras.subcommand_type_from_defaults(
            {name: routine_class(name)() for name in ROUTINES},
            {name: _first_line(routine_class(name)) for name in ROUTINES},
        ),
        tyro.conf.arg(name=""),
    ]


@dataclasses.dataclass
class Problem:
    """What is asked of the target."""

    discount: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """In [0, 1], in place of the target's own (0.99 for Gymnasium's)."""
    env_kwargs: Json = None
    """Arguments for gymnasium.make, or for the model's constructor."""
    prior: Annotated[str | None, tyro.conf.arg(metavar="PRIOR")] = None
    """Action prior: a name from `inference-rl list`, or file.py:Name. Default: the model's own."""
    prior_kwargs: Json = None
    """Arguments for the prior's constructor."""

    def load(self, target: str) -> tuple[EnvironmentModel, ActionPrior | None]:
        """The model and, if one is named, its prior, which the model notes."""
        from inference_rl.targets import load_prior, load_target

        if self.prior is None and self.prior_kwargs:
            raise ValueError("--prior-kwargs was given without --prior: name a prior too")
        model = load_target(target, discount=self.discount, env_kwargs=self.env_kwargs)
        if self.prior is None:
            return model, None
        assert model.origin is not None
        model.origin["prior"] = {"name": self.prior, "kwargs": self.prior_kwargs or {}}
        return model, load_prior(self.prior, model, self.prior_kwargs)


@dataclasses.dataclass
class Dividing:
    """Among whom the work is divided."""

    workers: Annotated[str | None, tyro.conf.arg(metavar="N|ray")] = None
    """So many processes of this machine, or as many on a Ray cluster as --num-workers says."""
    num_workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """How many on Ray."""
    ray_address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Of the cluster. Default: RAY_ADDRESS, or one of this machine alone."""
    patience: Annotated[float | None, tyro.conf.arg(metavar="SECONDS")] = None
    """What a step of the environments may take, before a worker of a run is replaced, or else the
    run stops, or the trial of a sweep fails (these two where Python is at it). Default: 300."""

    def asked(self, alone: int = 0, **more: Any) -> Workers | None:
        """What these options say, and `more`. :raises ValueError: it makes no sense.

        :param alone: workers where none are asked for.
        """
        from inference_rl.scale_out import Workers

        if self.patience is not None:
            more["patience"] = self.patience
        if self.workers is None:
            for name in ("num_workers", "ray_address"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} was given without --workers")
            return Workers(alone, **more) if more else None
        if self.workers == "ray":
            if self.num_workers is None:
                raise ValueError("--workers ray: say how many, by --num-workers N")
            return Workers(self.num_workers, on="ray", address=self.ray_address, **more)
        if not self.workers.isdecimal():
            raise ValueError(f"--workers: expected a number, or 'ray', got {self.workers!r}")
        if self.num_workers is not None or self.ray_address is not None:
            raise ValueError("--num-workers and --ray-address go with --workers ray")
        return Workers(int(self.workers), **more)


@dataclasses.dataclass
class Collecting:
    """How the environments of a learned routine are stepped."""

    ahead: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="async")] = False
    """Let workers collect the next round while this process learns from the last one."""

    def asked(self, dividing: Dividing) -> Workers | None:
        """What this and those options say. :raises ValueError: it makes no sense."""
        if dividing.workers is None and self.ahead:
            raise ValueError("--async was given without --workers: somebody must collect")
        return dividing.asked(**({"ahead": True} if self.ahead else {}))


@dataclasses.dataclass
class Infer:
    """Infer a policy for a target, save it, and try it on the real environment; or
    `inference-rl infer --resume RUN`: go on with a run that was interrupted."""

    model: Annotated[Target, tyro.conf.arg(name="target")]
    routine: RoutineSettings
    problem: Problem = dataclasses.field(default_factory=Problem)
    episodes: int = 100
    """Episodes of the evaluation; 0 for none."""
    seed: int = 0
    """Of everything random."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the run. Default: a new one under runs/."""
    dividing: Dividing = dataclasses.field(default_factory=Dividing)
    collecting: Collecting = dataclasses.field(default_factory=Collecting)
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.inference import infer, setup
        from inference_rl.scale_out import Workers

        if self.episodes < 0:
            raise ValueError(f"--episodes: expected 0 or more, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected 0 or more, got {self.seed}")
        workers = self.collecting.asked(self.dividing)
        with reporting(self.json) as progress, contextlib.ExitStack() as stack:
            model, prior = self.problem.load(self.model)
            free = self.out or free_directory(model.name, self.routine.name, self.seed)
            out = stack.enter_context(claimed(free))
            where = {}
            if hasattr(self.routine, "save_every"):
                setup.write(
                    out,
                    self.routine,
                    model,
                    prior,
                    self.seed,
                    episodes=self.episodes,
                    ahead=workers is not None and workers.ahead,
                )
                where = {"directory": out}
            with one_sentence(out):
                result = infer(
                    model,
                    self.routine,
                    prior=prior,
                    seed=self.seed,
                    progress=progress,
                    workers=workers,
                    **where,
                )
                patience = Workers.patience if workers is None else workers.patience
                return _finish(result, out, self.episodes, patience, progress, self.json)


@dataclasses.dataclass
class Resume:
    """Go on with a learned run from its last checkpoint, as it was begun."""

    resume: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """The directory of the run."""
    dividing: Dividing = dataclasses.field(default_factory=Dividing)
    collecting: Collecting = dataclasses.field(default_factory=Collecting)
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.inference.setup import read, resume
        from inference_rl.scale_out import Workers

        workers = self.collecting.asked(self.dividing)
        noted = read(self.resume)["episodes"]
        with (
            runs.held(self.resume),
            reporting(self.json) as progress,
            one_sentence(self.resume),
        ):
            result = resume(self.resume, progress=progress, workers=workers)
            episodes = Infer.episodes if noted is None else noted
            patience = Workers.patience if workers is None else workers.patience
            return _finish(result, self.resume, episodes, patience, progress, self.json)


def _finish(
    result: InferenceResult,
    out: Path,
    episodes: int,
    patience: float,
    progress: Callable[[str], None],
    quiet: bool,
) -> dict[str, Any]:
    """Evaluate, save, draw and report what was inferred."""
    from inference_rl.diagnostics.pictures import can_be_drawn, draw_policy
    from inference_rl.report import print_inference

    progress("evaluating")
    evaluation = result.evaluate(episodes, patience=patience).summary() if episodes else None
    if evaluation is not None:
        result.metrics.append(evaluation)
    progress("saving")
    if can_be_drawn(result):
        draw_policy(result, out / "policy.png")
    result.save(out)
    report = result.summary() | {
        "out": str(out),
        "evaluation": evaluation,
        "workers_replaced": result.workers_replaced,
    }
    if hasattr(result.details, "bytes_exchanged"):
        report["blocks"] = result.details.summary()
    if not quiet:
        print_inference(result, report)
    return report


@dataclasses.dataclass
class Evaluate:
    """Run a saved policy on its target's real environment, or on another, and judge the guide."""

    run_directory: Annotated[Run, tyro.conf.arg(name="run")]
    target: Annotated[str | None, tyro.conf.arg(metavar="TARGET")] = None
    """Another target of the same states and actions."""
    env_kwargs: Json = None
    """Arguments for that target."""
    episodes: int = 100
    """How many."""
    deterministic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the most likely action instead of drawing one."""
    draws: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Trajectories to judge the guide by; 0 for none. Default: 1000 of a finite model, 200 of
    another program, none of a simulator, which would have to run them."""
    patience: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """What a step of the environments may take in the evaluation, before it stops."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Default: that of the run."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.diagnostics.terminal import (
            print_guide,
            print_temperature,
            print_trust_region,
        )
        from inference_rl.fitting import fitted
        from inference_rl.inference import InferenceResult
        from inference_rl.report import print_evaluation
        from inference_rl.targets import load_target

        if self.seed is not None and self.seed < 0:
            raise ValueError(f"--seed: expected 0 or more, got {self.seed}")
        if self.draws is not None and (self.draws < 0 or self.draws == 1):
            raise ValueError(f"--draws: expected 0, or at least 2, got {self.draws}")
        if not self.patience > 0:
            raise ValueError(
                f"--patience: expected a positive number of seconds, got {self.patience}"
            )
        if self.env_kwargs and self.target is None:
            raise ValueError("--env-kwargs was given without --target: name the target too")
        with reporting(self.json) as progress, one_sentence():
            model = None
            if self.target is not None:
                model = load_target(self.target, env_kwargs=self.env_kwargs)
            result = InferenceResult.load(self.run_directory, model=model)
            if model is not None:
                result.source = fitted(model, result.policy, self.run_directory)
            progress("evaluating")
            evaluation = result.evaluate(
                self.episodes,
                seed=self.seed,
                deterministic=self.deterministic,
                patience=self.patience,
            ).summary()
            progress("judging the guide")
            guide, no_guide_because = self._guide(result)
            tuned = self._temperature(result)
            region = self._trust_region(result)
        report = {
            "run": str(self.run_directory),
            "target": self.target or result.summary()["target"],
            "evaluation": evaluation,
            "guide": None if guide is None else guide.summary(),
            "no_guide_because": no_guide_because,
            "temperature_report": None if tuned is None else tuned.summary(),
            "trust_region": None if region is None else region.summary(),
        }
        if not self.json:
            print_evaluation(evaluation)
            if guide is not None:
                print_guide(guide)
            elif self.draws != 0:
                print(f"The guide was not judged: {no_guide_because}")
            if tuned is not None:
                print_temperature(tuned)
            if region is not None:
                print_trust_region(region)
        return report

    def _guide(self, result: InferenceResult) -> tuple[GuideQuality | None, str | None]:
        """How good the guide is, or why nobody can tell."""
        from inference_rl.diagnostics.guide import guide_quality

        if self.target is not None:
            return None, "a guide is judged on the target that it was inferred on"
        draws = self._draws(result)
        if draws is None:
            return None, "a simulator would have to be run for it; --draws N does"
        if draws == 0:
            return None, "no draws were asked for"
        try:
            return guide_quality(
                result, draws=draws, seed=self.seed, most_states=QUICK_STATES
            ), None
        except (ValueError, TypeError, OSError) as error:  # of its prior, which may be gone
            return None, str(error)

    def _draws(self, result: InferenceResult) -> int | None:
        """How many; None of a simulator, unless they were asked for."""
        from gymnasium.spaces import Discrete

        from inference_rl.simulate import GymnasiumModel

        if self.draws is not None:
            return self.draws
        if isinstance(result.model, GymnasiumModel):
            return None
        return 1000 if isinstance(result.model.state_space, Discrete) else 200

    def _trust_region(self, result: InferenceResult) -> TrustRegion | None:
        """Of a routine that has one, where trajectories are drawn to judge the guide by."""
        from inference_rl.diagnostics.temperature import trust_region

        draws = self._draws(result)
        if self.target is not None or not draws or not hasattr(result.routine, "epsilon"):
            return None
        seed = result.seed if self.seed is None else self.seed
        try:
            return trust_region(result, draws=draws, seed=seed)
        except (ValueError, TypeError, OSError):
            return None

    def _temperature(self, result: InferenceResult) -> TemperatureReport | None:
        """Where a temperature that was tuned should have got to; None of others."""
        from inference_rl.diagnostics.temperature import temperature_report

        if self.target is not None or getattr(result.routine, "temperature", None) != "auto":
            return None
        try:
            return temperature_report(result, most_states=QUICK_STATES)
        except (ValueError, TypeError, OSError):
            return None


@dataclasses.dataclass
class Check:
    """Validate a model, an environment or a prior: what is wrong, where, and how to fix it."""

    model: Annotated[Target, tyro.conf.arg(name="target")]
    problem: Problem = dataclasses.field(default_factory=Problem)
    target_entropy: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """A target for the temperature to examine, nats per step: whether it can be met, and where."""
    target_divergence: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """KL(π ‖ ρ), nats per step, in place of --target-entropy."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.diagnostics.temperature import temperature_report
        from inference_rl.diagnostics.terminal import print_temperature
        from inference_rl.testing import assert_model_valid

        with reporting(self.json) as progress:
            model, prior = self.problem.load(self.model)
            progress("checking")
            remarks = assert_model_valid(model, prior)
            tuned = None
            if self.target_entropy is not None or self.target_divergence is not None:
                progress("examining the target of the temperature")
                tuned = temperature_report(
                    model,
                    target_entropy=self.target_entropy,
                    target_divergence=self.target_divergence,
                    prior=prior,
                )
        report = {
            "target": self.model,
            "valid": True,
            "remarks": remarks,
            "state_space": str(model.state_space),
            "action_space": str(model.action_space),
            "discount": model.discount,
            "horizon": model.horizon,
            "temperature_report": None if tuned is None else tuned.summary(),
        }
        if not self.json:
            print(f"{self.model}: valid")
            for name in ("state_space", "action_space", "discount", "horizon"):
                print(f"  {name.replace('_', ' ')}: {report[name]}")
            for remark in remarks:
                print(f"  note: {remark}")
            if tuned is not None:
                print_temperature(tuned)
        return report


@dataclasses.dataclass
class Derive:
    """Check every step from evidence to reinforcement learning on a target, by two computations."""

    model: Annotated[Target, tyro.conf.arg(name="target")]
    temperature: Annotated[float, tyro.conf.arg(metavar="NUMBER")] = 1.0
    """> 0, reward units."""
    problem: Problem = dataclasses.field(default_factory=Problem)
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Check this step only, by its number in the ladder."""
    only: Annotated[Literal["failed"] | None, tyro.conf.arg(metavar="failed")] = None
    """Show the steps that failed, and no others."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page with all of it, which opens in a browser from disk."""
    seed: int = 0
    """Of everything random."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.derivation import derive
        from inference_rl.derivation.page import render
        from inference_rl.derivation.terminal import print_derivation

        if self.seed < 0:
            raise ValueError(f"--seed: expected 0 or more, got {self.seed}")
        check_page(self.html)
        with reporting(self.json) as progress, one_sentence():
            model, prior = self.problem.load(self.model)
            derivation = derive(
                model,
                temperature=self.temperature,
                prior=prior,
                seed=self.seed,
                step=self.step,
                with_curves=self.html is not None,
                progress=progress,
            )
            if self.html is not None:
                write_page(self.html, render(derivation))
        if not self.json:
            print_derivation(derivation, only_failed=self.only == "failed")
            if self.html is not None:
                print(f"\nWritten as a page to {self.html}")
        report = derivation.as_json() | {"html": None if self.html is None else str(self.html)}
        if self.only == "failed":
            report["steps"] = [s for s in report["steps"] if s["verdict"] == "fail"]
        return report


@dataclasses.dataclass
class Compare:
    """Measure on a target what is said of MaxEnt RL beside regular RL."""

    model: Annotated[Target, tyro.conf.arg(name="target")]
    routines: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ROUTINE ...]")
    ] = ()
    """Learned ones to measure learning by. Default: tables where the model is finite, or else sac
    or sql."""
    temperature: Annotated[tuple[float, ...], tyro.conf.arg(metavar="NUMBER [NUMBER ...]")] = ()
    """> 0, reward units; verdicts are about the one in the middle. Default: what fits the model."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Of each learner, at least 2. Default: 20 in tables, 3 of a routine."""
    total_steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Environment steps of each learner. Default: 20,000 in tables, 1,500 of a routine."""
    problem: Problem = dataclasses.field(default_factory=Problem)
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page with all of it, which opens in a browser from disk."""
    seed: int = 0
    """Of everything random."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.diagnostics import compare
        from inference_rl.diagnostics.comparison.page import render
        from inference_rl.diagnostics.comparison.terminal import print_comparison

        check_page(self.html)
        for name in self.routines:
            if name not in ROUTINES or name == "exact":
                learned = [known for known in ROUTINES if known != "exact"]
                raise ValueError(
                    f"unknown learned routine {name!r}: expected any of {', '.join(learned)}"
                    f"{closest(name, learned)}; exact policies are compared wherever they can be"
                )
        with reporting(self.json) as progress, one_sentence():
            model, prior = self.problem.load(self.model)
            comparison = compare(
                model,
                self.routines,
                temperatures=self.temperature or None,
                seeds=self.seeds,
                seed=self.seed,
                total_steps=self.total_steps,
                prior=prior,
                progress=progress,
            )
            if self.html is not None:
                write_page(self.html, render(comparison))
        if not self.json:
            print_comparison(comparison)
            if self.html is not None:
                print(f"\nWritten as a page to {self.html}")
        return comparison.as_json() | {"html": None if self.html is None else str(self.html)}


@dataclasses.dataclass
class Sweep:
    """Search the settings of a learned routine, over several seeds, for the highest return; or
    `inference-rl sweep --resume DIR`: go on with a sweep that was interrupted."""

    model: Annotated[Target, tyro.conf.arg(name="target")]
    routine: RoutineSettings
    """Settings that are given are the same for all trials."""
    trials: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Settings to try."""
    seeds: Annotated[int, tyro.conf.arg(metavar="K")] = 3
    """Runs of each, with the seeds SEED, SEED + 1, ..."""
    search: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME=LOW:HIGH[:log]|NAME=VALUE,VALUE,...")
    ] = ()
    """Spaces in place of those that the routine declares (see inference-rl list), or besides;
    widths of layers are 64x64. What is searched may be given as an option too, for a start that the
    other settings agree with."""
    prune: bool = True
    """End trials whose evaluations (--evaluate-every) stay below the median of those before."""
    dividing: Dividing = dataclasses.field(default_factory=Dividing)
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Of Optuna, noted in the directory, a password in it too. Default: a database there."""
    problem: Problem = dataclasses.field(default_factory=Problem)
    episodes: int = 100
    """Of the evaluation that a run is scored by, with actions drawn."""
    seed: int = 0
    """Of everything random; the first run of each trial has it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the sweep. Default: a new one under runs/."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> dict[str, Any]:
        from inference_rl.sweeping import sweep
        from inference_rl.sweeping.plan import PLAN
        from inference_rl.sweeping.spaces import parse, resolved

        names = {field.name for field in dataclasses.fields(self.routine)}
        if "search" in self.given and not self.search:
            raise ValueError(
                "--search: expected NAME=LOW:HIGH or NAME=VALUE,VALUE,... after it, got nothing"
            )
        asked = [parse(text, type(self.routine)) for text in self.search]
        for name, count in collections.Counter(name for name, _ in asked).items():
            if count > 1:
                raise ValueError(f"--search: expected one space for {name}, got {count}")
        spaces = dict.fromkeys(names.intersection(self.given)) | dict(asked)
        resolved(self.routine, spaces)  # before what takes seconds
        with reporting(self.json) as progress:
            model, prior = self.problem.load(self.model)
            name = f"sweep-{model.name}"
            out = self.out or free_directory(name, self.routine.name, self.seed)
            if (out / PLAN).exists():
                raise FileExistsError(
                    f"{out} holds a sweep; go on with it by inference-rl sweep --resume "
                    f"{shlex.quote(str(out))}, or choose another directory with --out"
                )
            with one_sentence_of_sweep(out):
                result = sweep(
                    model,
                    self.routine,
                    directory=out,
                    trials=self.trials,
                    seeds=self.seeds,
                    search=spaces,
                    prior=prior,
                    seed=self.seed,
                    episodes=self.episodes,
                    prune=self.prune,
                    storage=self.storage,
                    workers=self.dividing.asked(alone=1) or 1,
                    progress=progress,
                )
            return _swept(result, self.json)


@dataclasses.dataclass
class ResumeSweep:
    """Go on with a sweep, as it was begun."""

    resume: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Its directory."""
    trials: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Settings to try in all. Default: as it was begun."""
    dividing: Dividing = dataclasses.field(default_factory=Dividing)
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.sweeping import resume

        with reporting(self.json) as progress:
            with one_sentence_of_sweep(self.resume):
                result = resume(
                    self.resume,
                    trials=self.trials,
                    workers=self.dividing.asked(alone=1) or 1,
                    progress=progress,
                )
            return _swept(result, self.json)


def _swept(result: SweepResult, quiet: bool) -> dict[str, Any]:
    """Draw and report what came of a sweep."""
    from inference_rl.diagnostics.sweep_pictures import draw_sweep
    from inference_rl.sweeping.terminal import print_sweep

    draw_sweep(result, result.directory / "sweep.png")
    if not quiet:
        print_sweep(result)
    return result.summary() | {"out": str(result.directory)}


@dataclasses.dataclass
class List:
    """List routines, bundled models and priors, and what each accepts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.report import parameters, print_list
        from inference_rl.search_spaces import declared
        from inference_rl.targets import bundled

        groups = {
            "routines": {name: routine_class(name) for name in ROUTINES},
            "models": bundled("models"),
            "priors": bundled("priors"),
        }
        report: dict[str, dict[str, dict[str, Any]]] = {
            group: {
                name: {"what": _first_line(item), "accepts": parameters(item)}
                for name, item in items.items()
            }
            for group, items in groups.items()
        }
        for name, item in groups["routines"].items():
            spaces = {field: str(space) for field, space in declared(item).items()}
            report["routines"][name]["searches"] = spaces
        if not self.json:
            print_list(report)
        return report


@dataclasses.dataclass
class Doctor:
    """Say what is installed and free on this machine, and try whether it works, in seconds."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, and nothing else, on stdout."""

    def run(self) -> dict[str, Any]:
        from inference_rl.doctor import print_report, report

        with reporting(self.json) as progress:
            found = report(progress)
        if not self.json:
            print_report(found)
        return found


Command = (
    Annotated[Infer, tyro.conf.subcommand("infer")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Derive, tyro.conf.subcommand("derive")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> None:
    """The entry point. Exit code 0, 1 where a step of a derivation, every trial of a sweep or one
    of the doctor's fails, 2 with one sentence on stderr for bad input, or 128 + the number of the
    signal that stopped it.

    An error that nothing foresaw is one sentence too, that names its type and place; with the
    environment variable `INFERENCE_RL_TRACEBACK` set it is raised.
    """
    command = None
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        # What a user's own model prints would spoil the JSON.
        stdout = contextlib.redirect_stdout(sys.stderr) if command.json else None
        with stdout or contextlib.nullcontext():
            report = command.run()
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stderr.close()
        raise SystemExit(141) from None
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *filter(None, [str(stop)])]), file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    except (Exception, SystemExit) as error:  # of a model's or a prior's code, or of a bug
        if command is None or os.environ.get(TRACEBACK):  # `--help` ends here too
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join([f"{type(error).__name__}:", *str(error).split()])
        print(
            f"error: {said}, in {place.filename}, line {place.lineno}; mend it there, or set "
            f"{TRACEBACK}=1 to see how the command got there",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    if command.json:
        print(json.dumps(report, allow_nan=False))
    if isinstance(command, Derive) and report["counts"]["fail"]:
        raise SystemExit(1)
    if isinstance(command, Sweep | ResumeSweep) and report["best"] is None:
        raise SystemExit(1)
    if isinstance(command, Doctor) and report["failed"]:
        raise SystemExit(1)


def _parse(words: list[str]) -> Any:
    """The command that `words` spell.

    :raises ValueError: they spell none; tyro's box of an error, in one sentence.
    """
    box = io.StringIO()
    command: Any = Command
    resumed = {"infer": Resume, "sweep": ResumeSweep}.get((words or [""])[0])
    if options(words).count("--search") > 1:
        raise ValueError("--search: expected once, with all its spaces after it, got it again")
    if resumed is not None and "--resume" in options(words):
        command, words = resumed, words[1:]
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(
                command,
                prog="inference-rl",
                description="Reinforcement learning as probabilistic inference.",
                args=words,
                config=(
                    tyro.conf.CascadeSubcommandArgs,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.OmitArgPrefixes,
                ),
            )
        if isinstance(parsed, Sweep):
            names = (word.removeprefix("--").replace("-", "_") for word in options(words))
            parsed.given = tuple(name.removeprefix("no_") for name in names)
        return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
    if command is Resume:
        raise ValueError(
            f"infer {' '.join(words)}: expected inference-rl infer --resume RUN [--workers N|ray] "
            "[--num-workers N] [--ray-address ADDRESS] [--patience SECONDS] [--async] [--json] and "
            "nothing else; everything else is as the run was begun"
        )
    if command is ResumeSweep:
        raise ValueError(
            f"sweep {' '.join(words)}: expected inference-rl sweep --resume DIR [--trials N] "
            "[--workers N|ray] [--num-workers N] [--ray-address ADDRESS] [--patience SECONDS] "
            "[--json] and nothing else; everything else is as the sweep was begun"
        )
    commands = [_command_name(member) for member in get_args(Command)]
    raise ValueError(complaint(words, box.getvalue(), commands))


def _command_name(member: Any) -> str:
    return str(get_args(member)[0].__name__).lower()
