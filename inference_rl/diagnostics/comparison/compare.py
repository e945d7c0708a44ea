"""Regular RL beside MaxEnt RL on one model: `compare`, and the `Comparison` it comes to."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from gymnasium.spaces import Box, Discrete

from inference_rl.diagnostics.comparison import (
    exact,
    guides,
    robustness,
    routines,
    runs,
    sampled,
    tables,
    tabular,
)
from inference_rl.diagnostics.comparison.findings import Claim, Table
from inference_rl.environment import EnvironmentModel, WithPreviousAction
from inference_rl.finite import FiniteModel
from inference_rl.inference.learned import is_uniform
from inference_rl.priors import ActionPrior
from inference_rl.simulate import GymnasiumModel
from inference_rl.tabulation import tabulate

MOST_STATES = 5_000
"""Of models whose policies are compared exactly."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is said of MaxEnt RL beside regular RL, and what a model has to say about it.

    :ivar target: what the model is called. :ivar exact: whether the policies are exact.
    :ivar temperatures: of MaxEnt RL, reward units. :ivar reference: the one of verdicts.
    :ivar learned_by: routines, or the table, that the claims about learning are of.
    :ivar seeds: of each learner. :ivar total_steps: of each run. :ivar seed: of everything random.
    :ivar guides: how good soft policies are as guides, where they are exact: their bound, the
        evidence, and whether weights p(τ, O) / q(τ) can be trusted.
    :ivar learned_guides: the same of what routines learned, over seeds, with the divergence from
        the exact policy where that is known, and R̂ of the returns of seeds.
    """

    target: str
    discount: float
    horizon: int | None
    state_space: str
    action_space: str
    prior: str
    exact: bool
    temperatures: tuple[float, ...]
    reference: float
    learned_by: tuple[str, ...]
    seeds: int
    total_steps: int
    seed: int
    claims: tuple[Claim, ...]
    guides: Table | None
    learned_guides: Table | None
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many claims there are of every verdict."""
        verdicts = [claim.verdict for claim in self.claims]
        return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}

    def claim(self, name: str) -> Claim:
        """The claim of that id.

        :raises KeyError: there is none.
        """
        for claim in self.claims:
            if claim.id == name:
                return claim
        raise KeyError(f"{name}: expected one of {', '.join(c.id for c in self.claims)}")

    def as_json(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("claims", "guides", "learned_guides")
        } | {
            "counts": self.counts,
            "claims": [claim.as_json() for claim in self.claims],
            "guides": None if self.guides is None else self.guides.as_json(),
            "learned_guides": None
            if self.learned_guides is None
            else self.learned_guides.as_json(),
        }


def compare(
    model: EnvironmentModel,
    routines: Sequence[Any] = (),
    *,
    temperatures: Sequence[float] | None = None,
    seeds: int | None = None,
    seed: int = 0,
    total_steps: int | None = None,
    prior: ActionPrior | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure on `model` what is said of MaxEnt RL beside regular RL.

    Where the model is finite and has up to `MOST_STATES` states (and not too many steps), policies
    are exact, and what is said of learning is measured by Q-learning in a table; else by a learned
    routine.

    :param routines: learned ones to measure the latter by: names, which are run with small networks
        and batches, or settings such as `SAC()`, whose temperature and learning rates are varied.
    :param temperatures: > 0, reward units; verdicts are about the one in the middle, the higher of
        two. None chooses: `exact.usual_temperature`, or `routines.SHARES`.
    :param seeds: of each learner, at least 2; None for 20 in tables and 3 of routines.
    :param total_steps: environment steps of each run; None for 20,000 in tables, 1,500 of routines.
    :param prior: the action prior, in place of the model's own.
    :param progress: called now and then with a few words on how far it has got.
    :returns: the same for the same arguments, but for `seconds`.
    :raises ValueError: numbers out of their ranges, no learned routine of a name, a box of actions
        without bounds, or a model on which there is nothing to compare, because no episode goes
        beyond its start.
    """
    return _Comparing(model, routines, seeds, seed, total_steps, prior, progress).run(temperatures)


class _Comparing:
    """The arguments of `compare`, checked."""

    def __init__(
        self,
        model: EnvironmentModel,
        named: Sequence[Any],
        seeds: int | None,
        seed: int,
        total_steps: int | None,
        prior: ActionPrior | None,
        progress: Progress | None,
    ) -> None:
        if seeds is not None and seeds < 2:
            raise ValueError(
                f"seeds: expected at least 2, for an interval needs several, got {seeds}"
            )
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if total_steps is not None and total_steps < 640:
            raise ValueError(
                "total_steps: expected at least 640 environment steps, to learn anything from, got "
                f"{total_steps}"
            )
        if getattr(prior, "needs_previous_action", False):
            model = WithPreviousAction(model)
        self.started = time.perf_counter()
        self.seeds, self.seed, self.total_steps = seeds, seed, total_steps
        self.prior = prior if prior is not None else model.action_prior
        self.say: Progress = progress or (lambda words: None)
        self.finite: FiniteModel | None = None
        if _is_small(model):
            self.finite = tabulate(model, prior=prior, progress=progress)
            if not ((self.finite.initial > 0) & ~self.finite.is_terminal).any():
                raise ValueError(
                    "terminal: expected an episode that goes beyond its start, got none; see to "
                    "what initial_state and terminal of the model say"
                )
        self.model = model
        space = model.action_space
        if self.finite is None and isinstance(space, Box) and not space.is_bounded():
            raise ValueError(
                "action_space: expected discrete actions or a box with bounds, in which entropies "
                f"of learned policies can be told, got {space} of {model.name}; give it bounds"
            )
        if self.finite is None and not named:
            named = (routines.usual(model),)
        budget = total_steps or routines.STEPS
        self.settings = [
            routines.small(given, model, budget)
            if isinstance(given, str)
            else routines.shortened(given, total_steps or given.total_steps)
            for given in named
        ]
        names = [settings.name for settings in self.settings]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"routines: expected each once, got {name!r} twice, whose claims would have "
                    "the same names; compare them one after the other"
                )

    def run(self, temperatures: Sequence[float] | None) -> Comparison:
        if temperatures is not None:
            temperatures = sorted(set(temperatures))
            if not temperatures or not all(t > 0 and math.isfinite(t) for t in temperatures):
                raise ValueError(
                    "temperatures: expected finite numbers > 0 in reward units, got "
                    f"{list(temperatures)}; regular RL, at 0, is compared anyway"
                )
        known = scene = None
        if self.finite is not None:
            self.say("inferring exact policies")
            known = exact.policies(self.finite, temperatures)
            grid, reference = known.temperatures, known.temperatures[known.reference]
        if self.settings:
            self.say("looking at the model under its prior")
            scene = routines.scene(self.model, self.prior, self.seed)
        if known is None:
            assert scene is not None
            wanted = temperatures or [float(f"{s * scene.spread:.2g}") for s in routines.SHARES]
            grid = tuple(wanted)
            reference = grid[len(grid) // 2]
        claims = [] if known is None else self._exact_claims(known)
        courses = []
        if self.settings:
            assert scene is not None
            courses = self._courses(known, scene, grid, reference)
            claims += self._learned_claims(courses, sampled_too=known is None)
        else:
            assert known is not None
            claims += self._table_claims(known)
        default = (routines.SEEDS, routines.STEPS)
        if not self.settings:
            default = (tables.SEEDS, tables.STEPS)
        return Comparison(
            target=self.model.name,
            discount=float(self.model.discount),
            horizon=self.model.horizon,
            state_space=str(self.model.state_space),
            action_space=str(self.model.action_space),
            prior=self._prior_name(),
            exact=known is not None,
            temperatures=grid,
            reference=reference,
            learned_by=tuple(s.name for s in self.settings) or ("table",),
            seeds=self.seeds or default[0],
            total_steps=self.total_steps
            or (self.settings[0].total_steps if self.settings else default[1]),
            seed=self.seed,
            claims=tuple(sorted(claims, key=_order)),
            guides=None if known is None else guides.guides(known, self.seed, self.say),
            learned_guides=guides.learned_guides(courses) if courses else None,
            seconds=time.perf_counter() - self.started,
        )

    def _prior_name(self) -> str:
        is_known = is_uniform(self.model, self.prior)
        if self.finite is not None:
            allowed = self.finite.log_prior[~self.finite.is_terminal]
            is_known = bool((allowed - allowed.mean()).abs().max() < 1e-12)
        return "uniform" if is_known else _called(self.prior)

    def _exact_claims(self, known: exact.Policies) -> list[Claim]:
        self.say("measuring exact policies")
        claims = [exact.randomness(known), exact.trade(known), exact.cost(known)]
        self.say("changing the world")
        return [*claims, robustness.robustness(known, self.seed)]

    def _table_claims(self, known: exact.Policies) -> list[Claim]:
        course = tables.course(
            known,
            seeds=self.seeds or tables.SEEDS,
            steps=self.total_steps or tables.STEPS,
            seed=self.seed,
            progress=self.say,
        )
        return self._about_learning(course)

    def _courses(
        self,
        known: exact.Policies | None,
        scene: routines.Scene,
        grid: tuple[float, ...],
        reference: float,
    ) -> list[runs.Course]:
        return [
            routines.course(
                self.model,
                settings,
                self.prior,
                scene,
                temperatures=grid,
                reference=reference,
                known=known,
                seeds=self.seeds or routines.SEEDS,
                seed=self.seed,
                suffix=settings.name if len(self.settings) > 1 else "",
                progress=self.say,
            )
            for settings in self.settings
        ]

    def _learned_claims(self, courses: list[runs.Course], *, sampled_too: bool) -> list[Claim]:
        claims = []
        for course in courses:
            if sampled_too:
                parts = (sampled.randomness, sampled.trade, sampled.robustness, sampled.cost)
                claims += [part(course) for part in parts]
            claims += self._about_learning(course)
        return claims

    def _about_learning(self, course: runs.Course) -> list[Claim]:
        self.say("weighing what was learned")
        return [runs.exploration(course), runs.stability(course, self.seed), runs.automatic(course)]


ORDER = ("randomness", "trade", "exploration", "robustness", "stability", "cost", "automatic")


def _order(claim: Claim) -> int:
    return ORDER.index(claim.id.partition("-")[0])


def _is_small(model: EnvironmentModel) -> bool:
    """Whether it is finite, and there is room for all of its exact policies at once."""
    spaces: Any = model.state_space, model.action_space
    if isinstance(model, GymnasiumModel) or not all(
        isinstance(space, Discrete) and space.start == 0 for space in spaces
    ):
        return False
    states, actions = (int(space.n) for space in spaces)
    entries = states * actions * (model.horizon or 1) * exact.POINTS
    return states <= MOST_STATES and entries <= tabular.MOST_ENTRIES


def _called(prior: ActionPrior) -> str:
    name = getattr(prior, "__name__", type(prior).__name__)
    return "the model's own" if name == "action_prior" else name
