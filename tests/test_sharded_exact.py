"""`Exact` in blocks of states: the answers of one process, whatever is cut, lost and made again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from gymnasium.spaces import Discrete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_crew import LocalCrew
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import EnvironmentModel, Exact, FiniteModel, Workers, infer, load_target
from inference_rl.cli import main
from inference_rl.diagnostics.pictures import can_be_drawn
from inference_rl.distributions import SparseCategorical, categorical
from inference_rl.environment import WithPreviousAction
from inference_rl.inference import InferenceResult
from inference_rl.inference.exact_sharded import run_in_blocks
from inference_rl.models.double_integrator import DoubleIntegrator
from inference_rl.models.grid_world import GridWorld
from inference_rl.priors import ActionPrior, CategoricalPrior, StickyPrior
from inference_rl.scale_out import on_ray, sharded_on_ray
from inference_rl.scale_out.crew import BlocksLost, Crew, Recipe
from inference_rl.scale_out.sharded_control import MOST_RECOVERIES
from inference_rl.scale_out.state_block import Parts, StateBlock
from inference_rl.scale_out.workers import WorkersLost
from inference_rl.tabulation import tabulate, tabulate_rows

CLOSE = 1e-10
"""Of V and Q relative to the largest |V|, and of the policy and J likewise."""


def in_blocks(
    model: EnvironmentModel,
    routine: Exact,
    count: int,
    prior: ActionPrior | None = None,
    crew_of: Callable[[Recipe, int], Crew] = LocalCrew,
) -> InferenceResult:
    return run_in_blocks(
        routine, model, prior=prior, seed=0, progress=None, count=count, crew_of=crew_of
    )


def assert_same(cut: InferenceResult, whole: InferenceResult, within: float = CLOSE) -> None:
    """V, Q, the policy, J and its parts; the policy where one action alone is best."""
    scale = max(1.0, float(whole.v.abs().max()))
    torch.testing.assert_close(cut.v, whole.v, rtol=0, atol=within * scale)
    torch.testing.assert_close(cut.q, whole.q, rtol=0, atol=within * scale)
    torch.testing.assert_close(cut.objective, whole.objective, rtol=0, atol=within * scale)
    ties = whole.details.ties
    difference = (cut.policy.probs - whole.policy.probs).abs()
    if ties is not None:
        assert torch.equal(cut.details.ties, ties)
        difference = difference[ties <= 1]
    assert float(difference.max() if difference.numel() else 0.0) <= within
    assert cut.error_bound is not None
    assert cut.error_bound <= max(2 * (whole.error_bound or 0.0), 1e-9 * scale)
    if ties is None:  # of tied policies each has its own
        for name, value in vars(whole.parts).items():
            assert getattr(cut.parts, name) == pytest.approx(value, rel=within, abs=within * scale)


def random_model(states: int = 40, seed: int = 0, **options: Any) -> FiniteModel:
    """Five successors of each state, a few terminal states, some actions forbidden, r(s, a, s')."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), size=(states, 3))
    transition *= transition >= np.sort(transition, axis=-1)[..., -5:-4]
    transition /= transition.sum(-1, keepdims=True)
    prior = rng.dirichlet(np.ones(3), size=states)
    prior[::4] = [0.5, 0.5, 0.0]
    terminal = np.arange(states) % 13 == 12
    reward = rng.normal(size=transition.shape)
    reward[terminal] = 0.0
    return FiniteModel.from_tables(
        transition,
        reward,
        initial=rng.dirichlet(np.ones(states)),
        prior=prior,
        terminal=terminal,
        **{"discount": 0.99, **options},
    )


def sheet(side: int, discount: float) -> GridWorld:
    """An open square with a goal in the far corner, and slippery."""
    rows = ["S" + "." * (side - 1), *["." * side] * (side - 2), "." * (side - 1) + "G"]
    return GridWorld(text="\n".join(rows), slip=0.2, step_reward=-1.0, discount=discount)


class Ring(EnvironmentModel):
    """Steps of random length around a ring; what a step pays depends on both its ends."""

    action_space = Discrete(3)

    def __init__(self, states: int, discount: float) -> None:
        self.states, self.discount = states, discount
        self.state_space = Discrete(states)
        self.seen: list[tuple[int, int]] = []

    def initial_state(self) -> TorchDistribution:
        return SparseCategorical(torch.arange(3), torch.tensor([0.5, 0.25, 0.25]), self.states)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        self.seen.append((int(state.min()), int(state.max())))
        steps = torch.tensor([-4, -1, 0, 1, 5])
        weight = 1 + torch.sin(state + 1.0).abs().unsqueeze(-1) + steps * (action - 1).unsqueeze(-1)
        probs = torch.softmax(weight, -1)
        return SparseCategorical((state.unsqueeze(-1) + steps) % self.states, probs, self.states)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return torch.cos(state * 0.7) + 0.1 * torch.sin(next_state * 1.3) - 0.05 * action

    def action_prior(self, state: Tensor) -> TorchDistribution:
        weights = torch.stack([1 + 0 * state, 1 + state % 3, state % 2], -1)
        return categorical(weights / weights.sum(-1, keepdim=True))


# ------------------------------------------------------------------ the same answers


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    oracles.finite_tables(max_states=7, discounts=(0.999, 0.9, 0.5, 0.0), scales=(1.0,)),
    st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    st.booleans(),
)
def test_random_models(tables: oracles.Tables, temperature: float, ends: bool) -> None:
    model = FiniteModel.from_tables(
        tables.transition,
        tables.stopped().reward,
        discount=tables.discount,
        initial=tables.initial,
        prior=tables.prior,
        terminal=tables.terminal,
        horizon=tables.horizon if ends else None,
    )
    routine = Exact(temperature=temperature, tolerance=1e-12)
    whole = infer(model, routine)
    for count in (1, 2, 3, 4):
        assert_same(in_blocks(model, routine, count), whole)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize("discount", [0.99, 0.999])
def test_frozen_lake(discount: float, temperature: float) -> None:
    model = load_target("FrozenLake8x8-v1", discount=discount)
    routine = Exact(temperature=temperature, tolerance=1e-12)
    whole = infer(model, routine)
    for count in (1, 2, 3, 4):
        assert_same(in_blocks(model, routine, count), whole)


@pytest.mark.parametrize(
    ("model", "temperature", "count"),
    [
        (Ring(10_000, 0.999), 0.1, 3),
        (Ring(10_000, 0.999), 0.0, 4),
        (sheet(100, 0.999), 0.1, 2),
    ],
    ids=["ring soft", "ring hard", "sheet"],
)
def test_ten_thousand_states(model: EnvironmentModel, temperature: float, count: int) -> None:
    routine = Exact(temperature=temperature, tolerance=1e-12)
    assert_same(in_blocks(model, routine, count), infer(model, routine))


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_horizon_gives_the_same_bits(temperature: float) -> None:
    model, routine = random_model(horizon=9, discount=0.97), Exact(temperature=temperature)
    whole = infer(model, routine)
    assert whole.q.shape == (9, 40, 3)
    for count in (1, 2, 3, 4):
        cut = in_blocks(model, routine, count)
        for name in ("q", "v", "objective", "error_bound", "iterations"):
            one, other = getattr(cut, name), getattr(whole, name)
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name
        assert torch.equal(cut.policy.probs, whole.policy.probs)
        assert_same(cut, whole, 1e-13)


def test_the_default_tolerance_is_certified() -> None:
    model, routine = Ring(3000, 0.999), Exact(temperature=0.1)
    whole, cut = infer(model, Exact(temperature=0.1, tolerance=1e-13)), in_blocks(model, routine, 4)
    assert cut.error_bound <= 1e-10 * float(cut.v.abs().max())
    apart = float((cut.v - whole.v).abs().max())
    assert apart <= cut.error_bound + whole.error_bound


def test_a_prior_by_itself_and_one_that_remembers() -> None:
    table = torch.tensor(np.random.default_rng(3).dirichlet(np.ones(3), size=40))
    sticky = StickyPrior(random_model().action_space, stickiness=0.7)
    cases: list[tuple[EnvironmentModel, ActionPrior]] = [
        (random_model(), CategoricalPrior(probs=table)),
        (Ring(40, 0.9), CategoricalPrior(probs=table)),
        (random_model(20), sticky),
    ]
    for model, prior in cases:
        routine = Exact(temperature=0.2, tolerance=1e-12)
        as_seen = WithPreviousAction(model) if prior is sticky else model  # as `infer` does
        assert_same(in_blocks(as_seen, routine, 3, prior), infer(model, routine, prior=prior))


def test_there_are_no_more_blocks_than_states() -> None:
    model = random_model(13)
    assert in_blocks(model, Exact(), 50).details.workers == 13


# ------------------------------------------------------------------ who holds what


def test_a_block_asks_the_program_about_its_own_states_only() -> None:
    model = Ring(103, 0.9)
    in_blocks(model, Exact(), 4)
    edges = [0, 25, 51, 77, 103]
    for low, high in model.seen:
        assert any(a <= low and high < b for a, b in pairwise(edges))


def test_rows_of_ranges_are_the_rows_of_the_table() -> None:
    for model in (Ring(53, 0.9), sheet(7, 0.9), tabulate(sheet(7, 0.9)), random_model(53)):
        whole = tabulate(model)
        edges = [0, 1, 20, 20, whole.num_states]
        parts = [tabulate_rows(model, *e) for e in pairwise(edges)]
        for name, table in whole.tensors().items():
            if name not in ("initial", "pointers"):
                assert torch.equal(torch.cat([getattr(p, name) for p in parts]), table), name
        lengths = torch.cat([p.pointers.diff() for p in parts])
        assert torch.equal(lengths, whole.pointers.diff())
        assert [p.first for p in parts] == edges[:-1]


def test_a_fault_is_named_by_the_number_of_its_state() -> None:
    class Leaky(Ring):
        def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
            step = super().transition(state, action)
            assert isinstance(step, SparseCategorical)
            far = torch.where(state == 37, 1000, step.states[..., 0])
            states = torch.cat([far.unsqueeze(-1), step.states[..., 1:]], -1)
            return SparseCategorical(states, step.probs, self.states)

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return torch.where(state == 31, torch.nan, super().reward(state, action, next_state))

    with pytest.raises(ValueError, match=r"next states in 0\.\.39, got 1000 for state 37"):
        in_blocks(Leaky(40, 0.9), Exact(), 4)
    with pytest.raises(ValueError, match="expected finite numbers, got nan for state 31, action 0"):
        tabulate_rows(Leaky(40, 0.9), 30, 35)


class CountingCrew(LocalCrew):
    """Adds up what is exchanged, entry by entry."""

    carried = 0

    def exchange(self, send: str, arguments: Sequence[tuple[Any, ...]], receive: str) -> list[Any]:
        sent = self.ask(send, arguments)
        got: list[Parts] = [{} for _ in sent]
        for source, route in enumerate(self.routes):
            for target in route:
                got[target][source] = sent[source][target]
                CountingCrew.carried += sent[source][target].nbytes
        return self.ask(receive, [(halo,) for halo in got])


@pytest.mark.parametrize("horizon", [None, 5])
def test_what_is_exchanged_is_counted_to_the_byte(horizon: int | None) -> None:
    CountingCrew.carried = 0
    details = in_blocks(random_model(horizon=horizon), Exact(), 3, crew_of=CountingCrew).details
    assert details.bytes_exchanged == CountingCrew.carried > 0


def test_only_what_successors_need_is_exchanged() -> None:
    # A ring of steps -4 to 5 in two blocks: nine entries at either seam, for each block.
    details = in_blocks(Ring(1000, 0.9), Exact(), 2).details
    assert details.bytes_exchanged == 8 * 18 * (details.exchanges + 1)
    alone = in_blocks(Ring(1000, 0.9), Exact(), 1).details
    assert alone.bytes_exchanged == 0


# ------------------------------------------------------------------ what the tests would notice


class StaleCrew(LocalCrew):
    """Delivers what was sent one exchange of values ago."""

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method == "back_up":
            kept = getattr(self, "_kept", arguments)
            self._kept, arguments = arguments, kept
        return super().ask(method, arguments)


class DeafBlock(StateBlock):
    """Takes the entries of other blocks for zero in its linear systems."""

    def multiply(self, halo: Parts) -> np.ndarray:
        return super().multiply({owner: 0 * part for owner, part in halo.items()})


def test_stale_values_are_noticed() -> None:
    model, routine = random_model(), Exact(temperature=0.1, tolerance=1e-12)
    cut = in_blocks(model, routine, 3, crew_of=StaleCrew)
    with pytest.raises(AssertionError):
        assert_same(cut, infer(model, routine))


def test_deaf_blocks_cannot_spoil_the_certificate_but_what_is_summed() -> None:
    def deaf(recipe: Recipe, count: int) -> LocalCrew:
        def make(number: int) -> Callable[[], StateBlock]:
            made = recipe(number)
            assert isinstance(made, partial)
            return partial(DeafBlock, *made.args, **made.keywords)

        return LocalCrew(make, count)

    model, routine = random_model(discount=0.9), Exact(temperature=0.1, tolerance=1e-12)
    whole, cut = infer(model, routine), in_blocks(model, routine, 3, crew_of=deaf)
    # A bad linear solver costs Newton's method steps. Its answer is certified from T alone.
    torch.testing.assert_close(cut.v, whole.v, rtol=0, atol=1e-10)
    assert cut.iterations > 2 * in_blocks(model, routine, 3).iterations
    assert cut.parts.steps != pytest.approx(whole.parts.steps, rel=1e-3)


# ------------------------------------------------------------------ workers that are lost


class MortalCrew(LocalCrew):
    """Loses a block at the questions whose numbers are in `fatal`, with all it knows."""

    fatal: frozenset[int] = frozenset()
    asked = 0

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        MortalCrew.asked += 1
        if MortalCrew.asked in self.fatal:
            number = MortalCrew.asked % self.count
            self._blocks.pop(number, None)
            raise BlocksLost([number], "it was killed")
        return super().ask(method, arguments)


@pytest.fixture
def mortal() -> Iterator[type[MortalCrew]]:
    MortalCrew.asked, MortalCrew.fatal = 0, frozenset()
    yield MortalCrew
    MortalCrew.asked, MortalCrew.fatal = 0, frozenset()


@pytest.mark.parametrize("horizon", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_a_lost_block_is_made_again_and_changes_no_bit(
    mortal: type[MortalCrew], temperature: float, horizon: int | None
) -> None:
    model, routine = random_model(discount=0.9, horizon=horizon), Exact(temperature=temperature)
    undisturbed = in_blocks(model, routine, 3, crew_of=mortal)
    questions, mortal.asked = mortal.asked, 0
    moments = range(1, questions + 1, 1 + questions // 8)
    for fatal in [{m} for m in moments] + [set(moments)]:
        mortal.fatal, mortal.asked = frozenset(fatal), 0
        with pytest.warns(UserWarning, match=r"lost and made again: \d \(it was killed\)"):
            result = in_blocks(model, routine, 3, crew_of=mortal)
        assert result.details.recoveries == result.workers_replaced == len(fatal)
        assert result.details.summary()["recoveries"] == len(fatal)
        for name in ("v", "q"):
            assert torch.equal(getattr(result, name), getattr(undisturbed, name))
        assert torch.equal(result.policy.probs, undisturbed.policy.probs)
        assert result.parts == undisturbed.parts


def test_a_command_reports_blocks_that_were_made_again(
    mortal: type[MortalCrew],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(on_ray, "connected", lambda *where: contextlib.nullcontext())
    monkeypatch.setattr(sharded_on_ray, "RayCrew", mortal)
    mortal.fatal = frozenset({7})
    words = ["infer", "cliff", "exact", "--discount=0.9", "--episodes=0", "--json"]
    main([*words, "--workers=ray", "--num-workers=2", f"--out={tmp_path / 'run'}"])
    shown = capsys.readouterr()
    assert "warning: workers: blocks lost and made again: " in shown.err
    report = json.loads(shown.out)
    assert report["workers_replaced"] == report["blocks"]["recoveries"] == 1
    assert report["blocks"]["workers"] == 2
    for name in ("exchanges", "bytes_exchanged", "bytes_gathered"):
        assert report["blocks"][name] > 0


def test_there_is_an_end_to_making_blocks_again(mortal: type[MortalCrew]) -> None:
    mortal.fatal = frozenset(range(5, 10_000))
    expected = f"at most {MOST_RECOVERIES} to be lost in one run, got {MOST_RECOVERIES + 1}"
    with (
        pytest.warns(UserWarning, match="lost and made again"),
        pytest.raises(WorkersLost, match=expected),
    ):
        in_blocks(random_model(), Exact(), 3, crew_of=mortal)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("model", "routine", "message"),
    [
        (random_model(), Exact(target="posterior"), "target: expected 'control' with workers"),
        (random_model(discount=1.0), Exact(), "discount: expected below 1 with workers and no hor"),
        (DoubleIntegrator(), Exact(), "workers: expected a finite model, whose table"),
        (
            random_model(),
            Exact(temperature=torch.tensor(0.5, requires_grad=True)),  # type: ignore[arg-type]
            "expected nothing to differentiate by, got a tensor that requires a gradient",
        ),
    ],
)
def test_what_is_not_solved_in_blocks(
    model: EnvironmentModel, routine: Exact, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        in_blocks(model, routine, 2)
    with pytest.raises(ValueError, match=message):  # before anything is started
        infer(model, routine, workers=Workers(2, on="ray"))


def test_blocks_are_on_ray() -> None:
    with pytest.raises(ValueError, match=r"expected them on Ray .* with Exact.* 2 of them"):
        infer(random_model(), Exact(), workers=2)
    with pytest.raises(ValueError, match=r"expected ahead=False .no --async. with Exact"):
        infer(random_model(), Exact(), workers=Workers(2, on="ray", ahead=True))
    with pytest.raises(ValueError, match="patience: expected none with Exact, got 5: it steps no"):
        infer(random_model(), Exact(), workers=Workers(0, patience=5.0))


def test_no_workers_are_this_process() -> None:
    model = random_model()
    assert torch.equal(infer(model, Exact(), workers=0).v, infer(model, Exact()).v)


# ------------------------------------------------------------------ the result


def test_a_program_solved_in_blocks_is_sampled_evaluated_and_saved(tmp_path: Any) -> None:
    model = load_target("cliff", discount=0.95)
    result = in_blocks(model, Exact(temperature=0.5), 2)
    assert result.model is model
    assert result.log_evidence is None
    assert "cut into blocks" in str(result.summary()["no_evidence_because"])
    assert not can_be_drawn(result)
    assert result.evaluate(20).summary()["mean_return"] < 0
    tree = result.sample(50, horizon=20)
    assert tree["posterior"]["state"].shape == (1, 50, 21)
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path)
    assert torch.equal(loaded.policy.probs, result.policy.probs)
    assert torch.equal(loaded.v, result.v)
    assert loaded.summary()["objective"] == result.summary()["objective"]


def test_in_memory_tables_keep_their_picture_and_samples() -> None:
    model = load_target("FrozenLake-v1")
    whole, cut = infer(model, Exact(temperature=0.1)), in_blocks(model, Exact(temperature=0.1), 2)
    assert can_be_drawn(cut)
    one, other = cut.sample(10, horizon=5), whole.sample(10, horizon=5)
    assert (one["posterior"]["state"] == other["posterior"]["state"]).all()
