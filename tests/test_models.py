"""The bundled models: their probabilities and rewards against hand computation and Gymnasium."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyro
import pytest
import torch
from gymnasium.spaces import Discrete
from pyro import poutine
from torch import Tensor

from inference_rl.distributions import SparseCategorical, as_probs
from inference_rl.environment import EnvironmentModel
from inference_rl.models.chain import Chain
from inference_rl.models.grid_world import Cliff, FourRooms, GridWorld
from inference_rl.models.lottery import LOST, SAFE, UNDECIDED, WON, Lottery
from inference_rl.models.multigoal import GOALS, Multigoal
from inference_rl.models.pendulum import Pendulum
from inference_rl.models.tree import Tree
from inference_rl.trajectory import trajectory

LEFT, DOWN, RIGHT, UP = range(4)
BUNDLED = [GridWorld, Cliff, FourRooms, Lottery, Chain, Tree, Pendulum, Multigoal]
FINITE = [m for m in BUNDLED if m not in (Pendulum, Multigoal)]
VARIANTS: list[Callable[[], EnvironmentModel]] = [
    *BUNDLED,
    lambda: Cliff(slip=0.1),
    lambda: Tree(noise=0.3),
    lambda: Pendulum(process_noise=0.01),
    lambda: Multigoal(spread=0.0),
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------ independent helpers


def tables(model: EnvironmentModel) -> tuple[Tensor, Tensor, Tensor]:
    """Dense P(s'|s,a), r(s,a,s') and terminal(s), by calling the model on everything."""
    states, actions = int(model.state_space.n), int(model.action_space.n)
    s, a, n = torch.meshgrid(
        torch.arange(states), torch.arange(actions), torch.arange(states), indexing="ij"
    )
    moves = as_probs(model.transition(s[..., 0], a[..., 0]), states)
    return moves, model.reward(s, a, n), model.terminal(torch.arange(states))


def backup(
    model: EnvironmentModel, mean: Callable[[Tensor], Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    """Q and V after `sweeps` Bellman backups from zero; `mean` turns Q (S, A) into V (S,)."""
    moves, rewards, terminal = tables(model)
    value = torch.zeros(len(moves))
    for _ in range(sweeps):
        q = (moves * (rewards + model.discount * value)).sum(-1)
        value = torch.where(terminal, 0.0, mean(q))
    return q, value


def hardest(q: Tensor) -> Tensor:
    return q.amax(-1)


def softest(temperature: float) -> Callable[[Tensor], Tensor]:
    """Soft maximum under the uniform prior."""
    return lambda q: temperature * ((q / temperature).logsumexp(-1) - math.log(q.shape[-1]))


def arguments(model: EnvironmentModel, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Some states and actions of the given batch shape."""
    state = model.initial_state().sample(shape)
    if isinstance(model.action_space, Discrete):
        return state, torch.randint(int(model.action_space.n), shape)
    return state, torch.rand((*shape, *model.action_space.shape)) * 2 - 1


# ------------------------------------------------------------------ every model


@pytest.mark.parametrize("make", VARIANTS)
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_batch_shapes(make: Callable[[], EnvironmentModel], shape: tuple[int, ...]) -> None:
    model = make()
    assert model.initial_state().batch_shape == ()
    state, action = arguments(model, shape)
    step = model.transition(state, action)
    next_state = step.sample()
    assert step.batch_shape == shape
    assert next_state.shape == state.shape
    assert next_state.dtype == state.dtype
    assert step.log_prob(next_state).shape == shape
    assert step.log_prob(next_state).isfinite().all()
    assert model.reward(state, action, next_state).shape == shape
    assert model.terminal(next_state).shape == shape
    assert model.terminal(next_state).dtype == torch.bool


@pytest.mark.parametrize("make", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_of_the_default_dtype(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make()  # built under float64, as a model file is imported before anything is chosen
    torch.set_default_dtype(dtype)
    state, action = arguments(model, (2,))
    step = model.transition(state, action)
    assert model.reward(state, action, step.sample()).dtype == dtype
    if isinstance(step, SparseCategorical):
        assert step.probs.dtype == dtype
        assert step.states.dtype == torch.long
        assert model.initial_state().probs.dtype == dtype


@pytest.mark.parametrize("make", VARIANTS)
@pytest.mark.parametrize("paths", [None, 5])
def test_trajectories_run_in_a_plate_and_without(
    make: Callable[[], EnvironmentModel], paths: int | None
) -> None:
    model = make()
    horizon = min(4, model.horizon or 4)

    def program() -> Tensor:
        if paths is None:
            return trajectory(model, model.action_prior, horizon, temperature=0.5)
        with pyro.plate("paths", paths):
            return trajectory(model, model.action_prior, horizon, temperature=0.5)

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    batch = () if paths is None else (paths,)
    for t in range(horizon):
        assert trace.nodes[f"optimality_{t}"]["log_prob"].shape == batch
        assert trace.nodes[f"state_{t + 1}"]["value"].shape[: len(batch)] == batch
    assert torch.as_tensor(trace.log_prob_sum()).isfinite()


@pytest.mark.parametrize("make", [*FINITE, lambda: Cliff(slip=0.1), lambda: Tree(noise=0.3)])
def test_finite_models_are_consistent(make: Callable[[], Any]) -> None:
    model = make()
    states, actions = int(model.state_space.n), int(model.action_space.n)
    moves, rewards, _ = tables(model)
    torch.testing.assert_close(moves.sum(-1), torch.ones(states, actions))
    torch.testing.assert_close(as_probs(model.initial_state(), states).sum(), torch.tensor(1.0))
    assert rewards.isfinite().all()
    assert len(model.action_labels or range(actions)) == actions
    assert len(model.state_labels or range(states)) == states
    if model.layout is not None:
        assert len(model.layout.moves) == actions
        assert model.layout.rows * model.layout.columns == len(model.layout.cells) == states


@pytest.mark.parametrize("model", FINITE)
def test_an_episode_starts_alive(model: type[EnvironmentModel]) -> None:
    start = model().initial_state().sample((20,))
    assert not model().terminal(start).any()


# ------------------------------------------------------------------ grid worlds


@pytest.mark.parametrize(("success", "size"), [(1 / 3, "4x4"), (0.75, "4x4"), (1 / 3, "8x8")])
def test_grid_world_is_frozen_lake(success: float, size: str) -> None:
    lake: Any = gymnasium.make("FrozenLake-v1", map_name=size, success_rate=success).unwrapped
    text = "\n".join("".join(row) for row in lake.desc.astype(str)).replace("F", ".")
    model = GridWorld(text=text, slip=1 - success, hole_reward=0.0, step_reward=0.0)
    moves, rewards, terminal = tables(model)
    expected = torch.zeros_like(moves)
    ends = torch.zeros_like(terminal)
    for s, a in itertools.product(range(len(moves)), range(4)):
        for probability, n, reward, ended in lake.P[s][a]:
            expected[s, a, n] += probability
            ends[n] = ended
            if not terminal[s]:
                assert rewards[s, a, n] == reward
    torch.testing.assert_close(moves[~terminal], expected[~terminal])
    assert (terminal == ends).all()
    start = torch.as_tensor(lake.initial_state_distrib)
    torch.testing.assert_close(as_probs(model.initial_state(), len(moves)), start)


def test_default_grid_world_is_russell_and_norvig() -> None:
    # Their fig. 17.3, where the step into an exit costs 0.04 as well.
    model = GridWorld(goal_reward=0.96, hole_reward=-1.04, discount=1.0)
    _, value = backup(model, hardest, sweeps=200)
    expected = [[0.812, 0.868, 0.918, 0], [0.762, 0, 0.660, 0], [0.705, 0.655, 0.611, 0.388]]
    torch.testing.assert_close(value.reshape(3, 4), torch.tensor(expected), atol=5e-4, rtol=0)


def test_moves_stop_at_edges_and_walls() -> None:
    model = GridWorld(text="S#G\n. .", slip=0.0)
    #     0 S   1 #   2 G
    #     3 .   4     5 .
    moves = {(0, LEFT): 0, (0, UP): 0, (0, RIGHT): 0, (0, DOWN): 3, (4, UP): 4, (5, UP): 2}
    for (state, action), expected in moves.items():
        step = model.transition(torch.tensor(state), torch.tensor(action))
        assert step.states.tolist() == [expected]
        assert step.probs.tolist() == [1.0]
    assert model.terminal(torch.arange(6)).tolist() == [False, True, True, False, False, False]
    assert model.layout is not None
    assert model.layout.cells == "S#G. ."


def test_a_slip_goes_to_either_side() -> None:
    model = GridWorld(text="...\n.S.\n..G", slip=0.3)
    for action, (ahead, sides) in enumerate([(3, (1, 7)), (7, (3, 5)), (5, (1, 7)), (1, (3, 5))]):
        probs = as_probs(model.transition(torch.tensor(4), torch.tensor(action)), 9)
        expected = torch.zeros(9)
        expected[ahead], expected[list(sides)] = 0.7, 0.15
        torch.testing.assert_close(probs, expected)
    sideways = GridWorld(text="...\n.S.\n..G", slip=1.0)
    step = sideways.transition(torch.tensor(4), torch.tensor(LEFT))
    assert sorted(step.states.tolist()) == [1, 7]


def test_several_starts_are_equally_likely() -> None:
    start = as_probs(GridWorld(text="S.S\nSGS").initial_state(), 6)
    torch.testing.assert_close(start, torch.tensor([0.25, 0, 0.25, 0.25, 0, 0.25]))


def test_cliff_takes_thirteen_steps() -> None:
    q, value = backup(Cliff(), hardest, sweeps=60)
    assert value[36] == -13
    assert q[36, RIGHT] == -100 - 13  # a fall, and the whole way from the start
    assert q[36].argmax() == UP
    assert value[37] == value[36]  # a cliff cell is the start under another name


def test_cliff_agrees_with_gymnasium_once_cliff_cells_are_read_as_the_start() -> None:
    walking: Any = gymnasium.make("CliffWalking-v1").unwrapped
    theirs = {LEFT: 3, DOWN: 2, RIGHT: 1, UP: 0}
    model = Cliff()
    for s in range(37):
        for a in range(4):
            [(_, expected, reward, _)] = walking.P[s][theirs[a]]
            step = model.transition(torch.tensor(s), torch.tensor(a))
            [n] = step.states.tolist()
            assert (36 if 36 < n < 47 else n) == expected
            assert model.reward(torch.tensor(s), torch.tensor(a), torch.tensor(n)) == reward


def test_falling_and_bumping_into_the_edge_pay_differently_under_a_slip() -> None:
    # From the start both lead to the start: only by their names can they be told apart.
    model = Cliff(slip=0.2)
    step = model.transition(torch.tensor(36), torch.tensor(DOWN))
    rewards = model.reward(torch.tensor(36), torch.tensor(DOWN), step.states)
    outcomes = sorted(zip(step.states.tolist(), rewards.tolist(), step.probs.tolist(), strict=True))
    assert outcomes == [(36, -1.0, 0.1), (36, -1.0, 0.8), (37, -100.0, 0.1)]


def test_four_rooms_has_a_hundred_and_four_cells_and_a_goal_far_away() -> None:
    model = FourRooms(slip=0.0)
    assert model.layout is not None
    assert sum(cell != "#" for cell in model.layout.cells) == 104
    _, value = backup(model, hardest, sweeps=60)
    start = int(model.initial_state().sample())
    assert value[start].item() == pytest.approx(0.95**13)  # 14 steps: 6 down, 8 right
    assert (value[~model.ended] > 0).all()  # the goal is reachable from everywhere


def test_a_map_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "corridor.txt"
    file.write_text("\n#####\n#S G#\n#####\n\n")
    model = GridWorld.from_file(file, slip=0.0, discount=0.5)
    assert model.state_space == Discrete(15)
    _, value = backup(model, hardest, sweeps=10)
    assert value[6].item() == pytest.approx(-0.04 + 0.5)
    assert type(Cliff.from_file(file)) is GridWorld


def test_a_million_cells() -> None:
    cells = np.where(np.random.default_rng(0).random((1000, 1000)) < 0.2, "#", ".")
    cells[0, 0], cells[-1, -1] = "S", "G"
    model = GridWorld(text="\n".join("".join(row) for row in cells))
    states = torch.arange(400_000, 500_000)
    step = model.transition(states.unsqueeze(-1).expand(-1, 4), torch.arange(4).expand(100_000, 4))
    assert step.batch_shape == (100_000, 4)
    there, here = step.states, states.reshape(-1, 1, 1)
    distance = (there // 1000 - here // 1000).abs() + (there % 1000 - here % 1000).abs()
    assert (distance <= 1).all()
    open_ground = ~model.ended[states]
    assert not model.ended[there[open_ground]].any()  # nobody walks into a wall


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "S..\n.G"}, "row 2 has 2 characters and row 1 has 3"),
        ({"text": "S.\n.x\nGG"}, "unknown character 'x' in row 2, column 2 of the map"),
        ({"text": "map.txt"}, "unknown character 'm' in row 1, column 1 .*GridWorld.from_file"),
        ({"text": "S.\té\nG..."}, r"unknown character '\\t' in row 1, column 3"),
        ({"text": "..\n.G"}, "the map has no start; mark one cell or more with S"),
        ({"text": ""}, "the map has no start"),
        ({"text": "S."}, "the map has no goal; mark one cell or more with G"),
        ({"text": "SCG\nS.."}, r"cliff \(C\) needs exactly one start \(S\).* got 2"),
        ({"slip": 1.5}, r"slip must be a probability in \[0, 1\], got 1.5"),
        ({"slip": math.nan}, r"slip must be a probability in \[0, 1\], got nan"),
        ({"discount": -0.1}, r"discount must be in \[0, 1\], got -0.1"),
        ({"goal_reward": math.inf}, "goal_reward must be a finite number, got inf"),
        ({"step_reward": math.nan}, "step_reward must be a finite number, got nan"),
    ],
)
def test_grid_world_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GridWorld: .*{message}"):
        GridWorld(**settings)


# ------------------------------------------------------------------ lottery


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 20.0])
def test_lottery_closed_forms(temperature: float) -> None:
    model = Lottery(safe_reward=0.4, prize=2.0, win_probability=0.15)
    moves, rewards, _ = tables(model)
    probs, pay = moves[UNDECIDED], rewards[UNDECIDED]
    control = (probs * pay).sum(-1)
    posterior = temperature * ((probs * (pay / temperature).exp()).sum(-1)).log()
    torch.testing.assert_close(control, torch.tensor([0.4, 0.3]))
    ticket = temperature * math.log(0.85 + 0.15 * math.exp(2 / temperature))
    torch.testing.assert_close(posterior, torch.tensor([0.4, ticket]))


def test_lottery_targets_part_ways_by_default() -> None:
    q, value = backup(Lottery(), softest(0.1), sweeps=1)
    assert q[UNDECIDED].tolist() == pytest.approx([0.5, 0.3])
    assert value[UNDECIDED].item() == pytest.approx(0.1 * math.log((math.exp(5) + math.exp(3)) / 2))
    assert 0.1 * math.log(0.9 + 0.1 * math.exp(3.0 / 0.1)) > 0.5


def test_lottery_outcomes() -> None:
    step = Lottery().transition(torch.tensor([0, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(as_probs(step, 4), torch.tensor([[0, 1.0, 0, 0], [0, 0, 0.9, 0.1]]))
    assert not Lottery().terminal(torch.tensor(UNDECIDED))
    assert Lottery().terminal(torch.tensor([SAFE, LOST, WON])).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"win_probability": 2.0}, r"win_probability must be in \[0, 1\], got 2.0"),
        ({"prize": math.inf}, "prize must be a finite number, got inf"),
        ({"safe_reward": math.nan}, "safe_reward must be a finite number, got nan"),
    ],
)
def test_lottery_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Lottery: {message}"):
        Lottery(**settings)


# ------------------------------------------------------------------ chain


@pytest.mark.parametrize("length", [2, 5, 10, 60])
def test_chain_hard_values(length: int) -> None:
    model = Chain(length=length, bait=0.3, discount=0.9)
    _, value = backup(model, hardest, sweeps=2 * length)
    for s in range(1, length):
        expected = max(0.9 ** (s - 1) * 0.3, 0.9 ** (length - s - 1))
        assert value[s].item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 100.0])
def test_chain_soft_values_undiscounted(temperature: float) -> None:
    model = Chain(length=6, bait=0.2, prize=1.5, discount=1.0)
    _, value = backup(model, softest(temperature), sweeps=1500)
    share = torch.arange(1, 6) / 6
    bait, prize = math.exp(0.2 / temperature), math.exp(1.5 / temperature)
    expected = temperature * ((1 - share) * bait + share * prize).log()
    torch.testing.assert_close(value[1:6], expected)


def test_chain_ends_and_pays_at_both_ends_only() -> None:
    model = Chain(length=3)
    assert model.terminal(torch.arange(4)).tolist() == [True, False, False, True]
    here, action = torch.tensor(1), torch.tensor(0)
    assert model.reward(here, action, torch.arange(4)).tolist() == [0.1, 0, 0, 1]
    step = model.transition(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1]))
    assert step.states.squeeze(-1).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
        ({"length": 2.5}, "length must be an integer of at least 2, got 2.5"),
        ({"bait": math.inf}, "bait must be a finite number, got inf"),
        ({"prize": math.nan}, "prize must be a finite number, got nan"),
        ({"discount": 1.1}, r"discount must be in \[0, 1\], got 1.1"),
    ],
)
def test_chain_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Chain: {message}"):
        Chain(**settings)


# ------------------------------------------------------------------ tree


@pytest.mark.parametrize(("depth", "branching"), [(1, 1), (1, 4), (3, 3), (5, 2)])
def test_tree_brute_force(depth: int, branching: int) -> None:
    model = Tree(depth=depth, branching=branching, seed=3)
    returns = []
    for actions in itertools.product(range(branching), repeat=depth):
        state, total = torch.tensor(0), 0.0
        for action in torch.tensor(actions):
            assert not model.terminal(state)
            next_state = model.transition(state, action).sample()
            total += model.reward(state, action, next_state).item()
            state = next_state
        assert model.terminal(state)
        returns.append(total)
    every = torch.tensor(returns)
    assert len(set(returns)) == branching**depth  # every path has a leaf of its own
    assert model.horizon == depth
    assert backup(model, hardest, depth)[1][0].item() == pytest.approx(every.max().item())
    expected = 0.7 * (every / 0.7).exp().mean().log()
    torch.testing.assert_close(backup(model, softest(0.7), depth)[1][0], expected)


def test_tree_noise_moves_to_a_random_child() -> None:
    step = Tree(depth=2, branching=2, noise=0.2).transition(torch.tensor([0, 2]), torch.tensor(1))
    assert step.states.tolist() == [[1, 2], [5, 6]]
    torch.testing.assert_close(step.probs, torch.tensor([[0.1, 0.9], [0.1, 0.9]]))


def test_tree_rewards_come_from_their_own_seed() -> None:
    state = torch.random.get_rng_state()
    first, again, other = Tree(seed=1).pay, Tree(seed=1).pay, Tree(seed=2).pay
    assert (torch.random.get_rng_state() == state).all()
    assert (first == again).all()
    assert (first != other).any()
    big = Tree(depth=13, branching=2)
    leaves = big.pay[big.first_leaf :]
    assert abs(leaves.mean()) < 0.05
    assert abs(leaves.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"branching": 1.5}, "branching must be an integer of at least 1, got 1.5"),
        ({"noise": -0.1}, r"noise must be a probability in \[0, 1\], got -0.1"),
        ({"depth": 20}, "depth 20 and branching 3 make 5,230,176,601 states, more than the 10,000"),
    ],
)
def test_tree_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Tree: {message}"):
        Tree(**settings)


# ------------------------------------------------------------------ pendulum


@pytest.mark.parametrize("gravity", [10.0, 3.7])
def test_pendulum_steps_as_gymnasium_does(gravity: float) -> None:
    model = Pendulum(gravity=gravity)
    assert model.gymnasium_id is not None
    swing = gymnasium.make(model.gymnasium_id, **model.gymnasium_kwargs)
    observation, _ = swing.reset(seed=0)
    inner: Any = swing.unwrapped
    angle, speed = inner.state
    state = torch.tensor([math.cos(angle), math.sin(angle), speed])
    for t, action in enumerate(torch.rand((200, 1)) * 2 - 1):
        seen = model.observe(torch.as_tensor(observation), None)
        torch.testing.assert_close(seen.double(), state, atol=1e-6, rtol=1e-6)
        torque = (2 * action).numpy()
        observation, reward, _, truncated, _ = swing.step(torque)
        next_state = model.transition(state, action).sample()
        paid = model.reward(state, action, next_state)
        assert paid.item() == pytest.approx(float(reward), abs=1e-9)
        state = next_state
        assert truncated == (t + 1 == model.horizon)
    assert model.state_space == swing.observation_space


def test_pendulum_hits_its_speed_limit() -> None:
    state = torch.tensor([0.0, 1.0, 7.9])
    after = Pendulum().transition(state, torch.ones(1)).sample()
    assert after[2] == 8
    torch.testing.assert_close(after[:2].norm(), torch.tensor(1.0))


def test_pendulum_pays_for_the_angle_upright_and_hanging() -> None:
    upright, hanging = torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 1.0])
    reward = Pendulum().reward(torch.stack([upright, hanging]), torch.ones(2, 1), upright)
    expected = [-0.001 * 4, -(math.pi**2) - 0.1 - 0.001 * 4]
    torch.testing.assert_close(reward, torch.tensor(expected))


def test_pendulum_is_differentiable_through_time() -> None:
    model = Pendulum()
    start = torch.tensor([math.cos(2.0), math.sin(2.0), 0.3])

    def rollout(actions: Tensor) -> Tensor:
        state, total = start, torch.zeros(())
        for action in actions:
            next_state = model.transition(state, action).rsample()
            total, state = total + model.reward(state, action, next_state), next_state
        return total

    actions = torch.tensor([[0.5], [-0.2], [0.1], [0.9]], requires_grad=True)
    assert torch.autograd.gradcheck(rollout, (actions,))


def test_pendulum_start_is_uniform_on_the_cylinder() -> None:
    start = Pendulum().initial_state()
    drawn = start.sample((20_000,))
    torch.testing.assert_close(drawn[:, :2].norm(dim=-1), torch.ones(20_000))
    assert drawn.mean(0).abs().max() < 0.02
    assert drawn[:, 2].abs().max() <= 1
    density = -math.log(4 * math.pi)  # the cylinder's area: 2π radians times 2 radians per second
    torch.testing.assert_close(start.log_prob(drawn), torch.full((20_000,), density))


def test_pendulum_start_has_a_density_at_the_seam() -> None:
    # Half a turn is one place with two names, -π and π; in float32 each rounds to the far side.
    torch.set_default_dtype(torch.float32)
    angles = torch.tensor([math.pi, -math.pi, 3.1415925, -3.1415925])
    seam = torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], dim=-1)
    assert Pendulum().initial_state().log_prob(seam).isfinite().all()


def test_pendulum_noise_is_gaussian_on_the_cylinder_even_across_the_seam() -> None:
    model = Pendulum(process_noise=0.02)
    # Hanging down, so that the noise falls on either side of θ = π.
    state, action = torch.tensor([math.cos(3.14), math.sin(3.14), 0.0]), torch.zeros(1)
    step, mean = model.transition(state, action), Pendulum().transition(state, action).sample()
    drawn = step.sample((20_000,))
    sine_of_turn = drawn[:, 1] * mean[0] - drawn[:, 0] * mean[1]
    off = torch.stack([torch.asin(sine_of_turn), drawn[:, 2] - mean[2]], dim=-1)
    assert ((drawn[:, 1] > 0).double().mean() - 0.5).abs() < 0.1  # both sides are visited
    torch.testing.assert_close(off.std(0), torch.full((2,), 0.02), atol=1e-3, rtol=0)
    expected = torch.distributions.Normal(0.0, 0.02).log_prob(off).sum(-1)
    torch.testing.assert_close(step.log_prob(drawn), expected)
    assert math.isinf(model.state_space.high[2])


def test_pendulum_noise_is_reparametrised() -> None:
    action = torch.zeros(1, requires_grad=True)
    step = Pendulum(process_noise=0.1).transition(torch.tensor([1.0, 0.0, 0.0]), action)
    [gradient] = torch.autograd.grad(step.rsample()[2], action)
    assert gradient.item() == pytest.approx(3 * 2 * 0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gravity": math.inf}, "gravity must be a finite number, got inf"),
        ({"process_noise": -1.0}, r"process_noise must be in \[0, 0.5\), got -1.0"),
        ({"process_noise": 0.5}, r"process_noise must be in \[0, 0.5\), got 0.5"),
        ({"discount": 2}, r"discount must be in \[0, 1\], got 2"),
    ],
)
def test_pendulum_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Pendulum: {message}"):
        Pendulum(**settings)


# ------------------------------------------------------------------ multigoal


def test_multigoal_pays_as_in_the_authors_code() -> None:
    state = torch.tensor([[0.0, 0.0], [3.5, 0.0], [3.0, 0.1], [6.9, 6.5]])
    action = torch.tensor([[0.5, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    model = Multigoal()
    after = model.transition(state, action).sample()
    assert after.tolist() == [[0.5, 0.0], [4.5, 0.0], [2.0, 0.1], [7.0, 7.0]]
    expected = []
    for (x, y), (right, up) in zip(after.tolist(), action.tolist(), strict=True):
        nearest = min(math.dist((x, y), goal) for goal in GOALS)
        prize = 10.0 if nearest < 1.0 else 0.0
        expected.append(prize - nearest**2 - 30.0 * (right**2 + up**2))
    assert model.reward(state, action, after).tolist() == pytest.approx(expected)
    assert model.terminal(after).tolist() == [False, True, False, False]


def test_multigoal_is_symmetric_and_starts_at_the_centre() -> None:
    model = Multigoal()
    start = model.initial_state().sample((4000,))
    assert start.mean(0).abs().max() < 0.01
    assert start.std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    action = torch.rand(4000, 2) * 2 - 1
    turned = (
        torch.stack([-start[:, 1], start[:, 0]], -1),
        torch.stack([-action[:, 1], action[:, 0]], -1),
    )
    paid = [
        model.reward(s, a, model.transition(s, a).sample()) for s, a in ((start, action), turned)
    ]
    torch.testing.assert_close(*paid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spread": -0.1}, "spread must not be negative, got -0.1"),
        ({"action_cost": math.inf}, "action_cost must be a finite number, got inf"),
        ({"discount": 1.5}, r"discount must be in \[0, 1\], got 1.5"),
    ],
)
def test_multigoal_says_what_is_wrong(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multigoal(**settings)
