"""Pictures: that what is drawn is what was inferred, for every kind of model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from inference_rl import Exact, FiniteModel, GridLayout, InferenceResult, infer, load_target
from inference_rl.diagnostics import grid_pictures, linear_gaussian_pictures, table_pictures
from inference_rl.diagnostics.pictures import draw_policy, policy_figure
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.models.chain import Chain
from inference_rl.models.double_integrator import DoubleIntegrator
from inference_rl.models.grid_world import GridWorld
from inference_rl.models.lottery import Lottery
from inference_rl.models.tree import Tree
from inference_rl.riccati import solve_linear_gaussian


def solved(model: Any, temperature: float = 0.1, **settings: Any) -> InferenceResult:
    return infer(model, Exact(temperature=temperature, **settings))


def quivers(figure: Figure) -> list[Quiver]:
    return [c for axes in figure.axes for c in axes.collections if isinstance(c, Quiver)]


def lengths(quiver: Quiver) -> np.ndarray:
    return np.hypot(quiver.U, quiver.V) / grid_pictures.REACH


def texts(figure: Figure) -> list[str]:
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    ticks = [
        label.get_text()
        for axes in figure.axes
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels())
    ]
    return [text.get_text() for text in figure.texts] + inside + ticks


def random_model(states: int, actions: int = 3, horizon: int | None = None) -> FiniteModel:
    generator = np.random.default_rng(0)
    transition = generator.dirichlet(np.ones(states), (states, actions))
    reward = generator.normal(size=(states, actions))
    return FiniteModel.from_tables(transition, reward, discount=0.9, horizon=horizon)


def linear_gaussian(states: int, horizon: int | None = None) -> LinearGaussianModel:
    eye = torch.eye(states)
    return LinearGaussianModel(
        0.9 * eye,
        eye[:, :1],
        state_cost=eye,
        action_cost=[[1.0]],
        noise_covariance=0.01 * eye,
        initial_mean=torch.ones(states),
        discount=0.9,
        horizon=horizon,
    )


# ---- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.01, 0.1])
def test_arrows_are_as_long_as_actions_are_likely(temperature: float) -> None:
    result = solved(load_target("FrozenLake-v1"), temperature)
    live = ~result.model.is_terminal.numpy()
    arrows = quivers(policy_figure(result))
    assert len(arrows) == 4
    for action, quiver in enumerate(arrows):
        assert len(quiver.U) == live.sum() == 11
        np.testing.assert_allclose(lengths(quiver), result.policy.probs[live, action], atol=1e-12)


def test_arrows_point_where_actions_move() -> None:
    result = solved(load_target("FrozenLake-v1"))
    for quiver, (row, column) in zip(
        quivers(policy_figure(result)), result.model.layout.moves, strict=True
    ):
        assert (np.sign(quiver.U) == column).all()
        assert (np.sign(quiver.V) == row).all()
        # Away from the centre of the cell, so that the arrows of one cell do not cross.
        centre = quiver.XY - grid_pictures.GAP * np.array([column, row])
        np.testing.assert_allclose(centre, centre.round(), atol=1e-12)


def test_rare_actions_fade() -> None:
    result = solved(load_target("FrozenLake-v1"), 0.01)
    for quiver in quivers(policy_figure(result)):
        opacity = quiver.get_facecolor()[:, 3]
        np.testing.assert_allclose(opacity, np.clip(lengths(quiver) / grid_pictures.FADE, 0, 1))


def test_an_action_that_stays_is_a_ring() -> None:
    model = random_model(6)
    model.layout = GridLayout(2, 3, (None, (0, 1), (0, 0)), "S.....")
    result = solved(model)
    axes = policy_figure(result).axes[0]
    rings = [c for c in axes.collections if isinstance(c, EllipseCollection)]
    assert len(rings) == 2
    probs = result.policy.probs.numpy()
    for ring, action in zip(rings, (0, 2), strict=True):
        np.testing.assert_allclose(ring.get_widths() / grid_pictures.REACH, probs[:, action])


def test_the_colours_are_the_values() -> None:
    result = solved(load_target("FrozenLake-v1"))
    shown = policy_figure(result).axes[0].images[1].get_array()
    ended = result.model.is_terminal.numpy()
    assert (np.ma.getmaskarray(shown).ravel() == ended).all()
    np.testing.assert_array_equal(shown.compressed(), result.v.numpy()[~ended])


def test_walls_and_cliffs_are_tiles_without_arrows() -> None:
    text = "S.G\n.#.\nCC."
    result = solved(GridWorld(text=text), 1.0)
    figure = policy_figure(result)
    assert all(len(quiver.U) == 5 for quiver in quivers(figure))
    tiles, values = figure.axes[0].images
    covered = np.array([[0, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=bool)
    assert ((tiles.get_array()[..., 3] > 0) == covered).all()
    assert (np.ma.getmaskarray(values.get_array()) == covered).all()
    letters = [t.get_text() for t in figure.axes[0].texts if t.get_text().isalpha()]
    assert sorted(letters) == ["C", "C", "G", "S"]


def test_a_header_says_what_was_inferred() -> None:
    result = solved(load_target("FrozenLake-v1"))
    words = " · ".join(texts(policy_figure(result)))
    for fact in ("FrozenLake-v1", "control", "temperature 0.1", "discount 0.99", "0.01929"):
        assert fact in words
    assert "V(s), reward units" in [a.get_ylabel() for a in policy_figure(result).axes]


@pytest.mark.filterwarnings("ignore:the posterior's policy")
def test_a_posterior_says_so() -> None:
    result = solved(Chain(length=4), 0.5, target="posterior")
    assert any("posterior" in text for text in texts(policy_figure(result)))


def test_a_finite_horizon_on_a_grid_shows_the_first_step() -> None:
    model = load_target("FrozenLake-v1").replace(horizon=3, discount=0.5)
    result = solved(model)
    figure = policy_figure(result)
    assert any("first of 3 steps" in text for text in texts(figure))
    live = ~model.is_terminal.numpy()
    shown = figure.axes[0].images[1].get_array()
    np.testing.assert_array_equal(shown.compressed(), result.v[0].numpy()[live])
    for action, quiver in enumerate(quivers(figure)):
        np.testing.assert_allclose(lengths(quiver), result.policy.probs[0][live, action])


def test_a_large_grid_shows_the_mean_move_of_blocks() -> None:
    side = 60
    text = "S" + "." * (side - 1) + ("\n" + "." * side) * (side - 2) + "\n" + "." * (side - 1) + "G"
    result = solved(GridWorld(text=text, slip=0.0), 0)
    (quiver,) = quivers(policy_figure(result))
    block = -(-side // grid_pictures.BLOCKS)
    assert len(quiver.U) == (side // block) ** 2
    probs, moves = result.policy.probs.numpy(), np.array(result.model.layout.moves)
    corner = [row * side + column for row in range(block) for column in range(block)]
    down, right = (probs[corner] @ moves).mean(0) * 0.88 * block
    np.testing.assert_allclose([quiver.V[0], quiver.U[0]], [down, right], atol=1e-12)


def test_a_long_corridor_is_a_curve() -> None:
    result = solved(Chain(length=100))
    curve, chances = policy_figure(result).axes[:2]
    drawn = curve.lines[0].get_ydata()
    assert np.isnan(drawn[[0, -1]]).all()
    np.testing.assert_array_equal(drawn[1:-1], result.v.numpy()[1:-1])
    np.testing.assert_array_equal(
        chances.images[0].get_array()[:, 1:-1], result.policy.probs.numpy().T[:, 1:-1]
    )
    assert [text.get_text() for text in curve.texts] == ["GS", "G"]


# ---- tables --------------------------------------------------------------------------------------


def test_few_states_are_a_table_with_bars() -> None:
    result = solved(random_model(5))
    result.model.state_labels = ("here", "there", "home", "work", "sea")
    result.model.action_labels = ("walk", "ride", "swim")
    figure = policy_figure(result)
    policy, value = figure.axes
    np.testing.assert_array_equal(policy.images[0].get_array(), result.policy.probs)
    np.testing.assert_allclose([bar.get_width() for bar in value.patches], result.v)
    assert {"here", "sea", "walk", "swim"} <= set(texts(figure))


def test_states_without_labels_are_numbers() -> None:
    policy = policy_figure(solved(random_model(5))).axes[0]
    assert [label.get_text() for label in policy.get_yticklabels()] == list("01234")


def test_terminal_states_have_no_policy() -> None:
    figure = policy_figure(solved(Lottery(), 0.5))
    shown = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert np.isnan(shown[1:]).all()
    assert np.isfinite(shown[0]).all()
    assert texts(figure).count("the episode ends") == 3


def test_a_finite_horizon_is_a_table_over_time() -> None:
    result = solved(Tree(depth=3, branching=2), 0.5)
    figure = policy_figure(result)
    policy, value = figure.axes[:2]
    shown = np.ma.filled(value.images[0].get_array(), np.nan)
    for state in range(7):
        step = (state + 1).bit_length() - 1  # the only one at which the tree is there
        assert np.flatnonzero(np.isfinite(shown[state])).tolist() == [step]
        assert shown[state, step] == result.v[step, state]
        np.testing.assert_array_equal(
            policy.images[0].get_array()[state], result.policy.probs[step, state]
        )
    left, right = (
        next(text for text in figure.texts if text.get_text().startswith(start)).get_window_extent()
        for start in ("π(a | s)", "V(s)")
    )
    assert left.x1 < right.x0


def test_terminal_states_are_left_out_where_they_would_fill_the_page() -> None:
    figure = policy_figure(solved(Tree(), 0.5))
    assert figure.axes[0].images[0].get_array().shape == (40, 3)
    assert any("81 states" in text for text in texts(figure))


def test_many_states_are_an_overview() -> None:
    result = solved(load_target("Taxi-v4"), 0.5)
    figure = policy_figure(result)
    values, entropies, bars, heat = figure.axes
    live = ~result.model.is_terminal
    assert sum(bar.get_height() for bar in values.patches) == live.sum()
    assert sum(bar.get_height() for bar in entropies.patches) == live.sum()
    top = [result.model.state_labels.index(t.get_text()) for t in bars.get_yticklabels()]
    assert len(top) == table_pictures.MOST_VISITED
    np.testing.assert_array_equal(heat.images[0].get_array(), result.policy.probs[top])
    tree = result.sample(2000, horizon=60).posterior
    states, alive = tree.state.values[0, :, :-1], tree.alive.values[0]
    visits = np.bincount(states[alive.astype(bool)], minlength=500) / 2000
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], visits[top], atol=0.06)


# ---- linear-Gaussian models ----------------------------------------------------------------------


def hand_built(model: LinearGaussianModel, temperature: float = 0.1) -> InferenceResult:
    """A result from the solver alone, whatever the routine makes of it."""
    solution = solve_linear_gaussian(model, temperature)
    return InferenceResult(
        source=model,
        routine=Exact(temperature=temperature),
        policy=solution.policy,
        q=solution.q,
        v=solution.v,
        objective=solution.objective,
        parts_source=lambda: pytest.fail("a picture needs no parts of the objective"),
        evidence_source=lambda: pytest.fail("a picture needs no evidence"),
    )


def test_two_coordinates_are_a_phase_portrait() -> None:
    result = hand_built(DoubleIntegrator())
    figure = policy_figure(result)
    portrait, _, *sweeps = figure.axes
    assert len(portrait.lines) == linear_gaussian_pictures.TRAJECTORIES + 3
    assert len(sweeps) == 2
    assert (portrait.get_xlabel(), portrait.get_ylabel()) == ("position", "velocity")
    assert {sweep.get_ylabel() for sweep in sweeps} == {"acceleration"}
    for coordinate, sweep in enumerate(sweeps):
        x, mean = sweep.lines[0].get_data()
        gain = result.policy.gain[0, coordinate].item()
        np.testing.assert_allclose(mean, gain * x, atol=1e-12)
        band = sweep.collections[0].get_paths()[0].get_extents()
        sd = result.policy.covariance.sqrt().item()
        assert band.height == pytest.approx(abs(gain) * np.ptp(x) + 4 * sd)


def test_the_mean_path_obeys_the_closed_loop() -> None:
    model = DoubleIntegrator()
    result = hand_built(model)
    path = np.stack(policy_figure(result).axes[0].lines[-2].get_data(), -1)
    loop = (model.A + model.B @ result.policy.gain).numpy()
    np.testing.assert_allclose(path[1:], path[:-1] @ loop.T, atol=1e-12)


@pytest.mark.parametrize(("states", "horizon"), [(1, None), (3, None), (3, 5), (9, None)])
def test_other_dimensions_are_motions_over_time(states: int, horizon: int | None) -> None:
    figure = policy_figure(hand_built(linear_gaussian(states, horizon)))
    assert len(figure.axes) == min(states, 6) + 1
    assert all(len(axes.lines) == linear_gaussian_pictures.TRAJECTORIES + 1 for axes in figure.axes)
    if horizon:
        assert figure.axes[0].get_xlim() == (0, horizon)


def test_a_portrait_over_a_finite_horizon_and_without_noise() -> None:
    figure = policy_figure(hand_built(linear_gaussian(2, horizon=4), temperature=0))
    assert any("horizon 4 steps" in text for text in texts(figure))
    assert figure.axes[1].get_xlabel() == "V at the first step, reward units"


def test_pictures_leave_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    policy_figure(hand_built(DoubleIntegrator()))
    assert torch.rand(1) == expected


# ---- files, and everything global ----------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: load_target("FrozenLake-v1"),
        Chain,
        lambda: random_model(5),
        lambda: random_model(70, 20),
        lambda: random_model(5, horizon=30),
        DoubleIntegrator,
    ],
)
def test_files_are_written_small(model: Any, tmp_path: Path) -> None:
    path = draw_policy(solved(model()), tmp_path / "new" / "picture.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 500_000


def test_styles_and_state_are_left_alone(tmp_path: Path) -> None:
    with matplotlib.rc_context({"figure.facecolor": "black", "text.color": "white"}):
        before = dict(matplotlib.rcParams)
        result = solved(Chain())
        figure = policy_figure(result)
        draw_policy(result, tmp_path / "picture.png")
        assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from inference_rl import Exact, infer, load_target\n"
        "from inference_rl.diagnostics import pictures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "result = infer(load_target('lottery'), Exact())\n"
        f"pictures.draw_policy(result, {str(tmp_path / 'picture.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_kind_of_result_is_refused() -> None:
    result = solved(Chain())
    result.model = load_target("CartPole-v1")
    with pytest.raises(TypeError, match="TabularPolicy over a GymnasiumModel"):
        policy_figure(result)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    result = solved(random_model(6))
    result.model.layout = GridLayout(2, 2, ((0, 1),) * 3, "....")
    with pytest.raises(ValueError, match="layout: expected rows"):
        policy_figure(result)
    result.model.layout = GridLayout(2, 3, ((0, 1),) * 2, "......")
    with pytest.raises(ValueError, match="expected 3 moves"):
        policy_figure(result)


def test_labels_that_do_not_fit_are_refused() -> None:
    result = solved(random_model(6))
    result.model.action_labels = ("one",)
    with pytest.raises(ValueError, match="action_labels: expected 3"):
        policy_figure(result)
