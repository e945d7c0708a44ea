"""Gymnasium's toy-text environments: tables against a second reading of `P`, and real steps."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
import pytest

from inference_rl import FiniteModel, load_target
from inference_rl.toy_text import from_toy_text

RANDOM_MAP = {"desc": None, "map_name": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "FrozenLake-v1": ("FrozenLake-v1", {}),
    "FrozenLake8x8-v1": ("FrozenLake8x8-v1", {}),
    "by map_name": ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}),
    "not square": ("FrozenLake-v1", {"desc": ["SFF", "FHG"]}),
    "several goals and starts": ("FrozenLake-v1", {"desc": ["SFG", "SHG"], "success_rate": 0.5}),
    "holes that cost": ("FrozenLake-v1", {"reward_schedule": [2, -1, -0.25]}),
    "a map at random": ("FrozenLake-v1", RANDOM_MAP),
    "CliffWalking-v1": ("CliffWalking-v1", {}),
    "Taxi-v4": ("Taxi-v4", {}),
    "rainy taxi": ("Taxi-v4", {"is_rainy": True}),
}
STEPS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}


def load(target: str, **kwargs: Any) -> FiniteModel:
    model = load_target(target, env_kwargs=kwargs)
    assert isinstance(model, FiniteModel)
    return model


def make(model: FiniteModel) -> gymnasium.Env[Any, Any]:
    assert model.gymnasium_id is not None
    return gymnasium.make(model.gymnasium_id, **model.gymnasium_kwargs)


def read(inside: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """P and P·r (S, A, S), which states end, and which live ones an episode can reach."""
    states, actions = len(inside.P), len(inside.P[0])
    transition, paid = np.zeros((2, states, actions, states))
    ends = np.zeros(states, dtype=bool)
    for s, by_action in inside.P.items():
        for a, entries in by_action.items():
            for p, n, r, terminated in entries:
                transition[s, a, n] += p
                paid[s, a, n] += p * r
                ends[n] |= bool(terminated) and p > 0
    reached = np.asarray(inside.initial_state_distrib) > 0
    for _ in range(states):
        reached = reached | (transition[reached & ~ends].sum((0, 1)) > 0)
    return transition, paid, ends, reached & ~ends


@pytest.mark.parametrize("case", CASES)
def test_the_tables_are_those_of_the_environment(case: str) -> None:
    target, kwargs = CASES[case]
    model = load(target, **kwargs)
    environment = make(model)
    transition, paid, ends, reached = read(environment.unwrapped)
    environment.close()
    states, actions = transition.shape[:2]
    found = model.csr.toarray().reshape(states, actions, states)
    live = ~ends[:, None, None]
    np.testing.assert_allclose(found, transition * live, rtol=0, atol=1e-15)
    earned = (model.probabilities * model.rewards).numpy()
    rows, columns = model.rows().numpy(), model.successors.numpy()
    table = np.zeros((states * actions, states))
    np.add.at(table, (rows, columns), earned)
    np.testing.assert_allclose(table.reshape(paid.shape), paid * live, rtol=0, atol=1e-14)
    assert model.is_terminal.numpy().tolist() == ends.tolist()
    assert ends.any()
    assert not ends[reached].any()
    inside: Any = environment.unwrapped
    np.testing.assert_array_equal(model.initial.numpy(), inside.initial_state_distrib)
    assert model.discount == 0.99
    assert model.horizon is None
    assert model.name == model.gymnasium_id == environment.spec.id


@pytest.mark.parametrize("case", CASES)
def test_nothing_follows_the_end_and_no_successor_is_listed_twice(case: str) -> None:
    target, kwargs = CASES[case]
    model = load(target, **kwargs)
    length = model.pointers.diff().reshape(model.num_states, model.num_actions)
    assert (length[model.is_terminal] == 0).all()
    assert (length[~model.is_terminal] > 0).all()
    pairs = list(zip(model.rows().tolist(), model.successors.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))


def test_repeated_next_states_are_added_up() -> None:
    model = load("FrozenLake-v1")
    inside: Any = make(model).unwrapped
    # Left from the corner: blocked, blocked upwards too, and down.
    assert [n for _, n, _, _ in inside.P[0][0]] == [0, 0, 4]
    step = slice(int(model.pointers[0]), int(model.pointers[1]))
    assert model.successors[step].tolist() == [0, 4]
    assert model.probabilities[step].tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("target", ["FrozenLake-v1", "FrozenLake8x8-v1"])
def test_the_goal_pays_on_entry_and_absorbs(target: str) -> None:
    model = load(target)
    goal = model.num_states - 1
    assert model.is_terminal[goal]
    assert set(model.successors[model.rewards == 1].tolist()) == {goal}
    assert model.rewards.sum() == (model.successors == goal).sum()


def test_taxi_ends_only_where_the_passenger_is_delivered() -> None:
    model = load("Taxi-v4")
    assert int(model.is_terminal.sum()) == 4
    assert set(model.successors[model.rewards == 20].tolist()) == set(
        model.is_terminal.nonzero().squeeze(-1).tolist()
    )


@pytest.mark.parametrize(
    "case", ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"]
)
def test_loads_within_a_second(case: str) -> None:
    load("FrozenLake-v1")  # whatever has to be imported
    started = time.perf_counter()
    load(case)
    assert time.perf_counter() - started < 1


# ------------------------------------------------------------------ labels and layout


def step_from(environment: Any, state: int, action: int) -> int:
    environment.reset(seed=0)
    environment.unwrapped.s = state
    return int(environment.step(action)[0])


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [
        ("FrozenLake-v1", {"is_slippery": False}),
        ("FrozenLake-v1", {"is_slippery": False, "desc": ["SFF", "FFG"]}),
        ("CliffWalking-v1", {}),
    ],
)
def test_arrows_and_labels_agree_with_what_the_real_environment_does(
    target: str, kwargs: dict[str, Any]
) -> None:
    model = load(target, **kwargs)
    layout, labels = model.layout, model.action_labels
    assert layout is not None
    assert labels is not None
    assert layout.rows * layout.columns == len(layout.cells) == model.num_states
    environment = make(model)
    moved = 0
    for state in (~model.is_terminal).nonzero().squeeze(-1).tolist():
        for action, (label, move) in enumerate(zip(labels, layout.moves, strict=True)):
            assert move == STEPS[label]
            row, column = state // layout.columns + move[0], state % layout.columns + move[1]
            inside = 0 <= row < layout.rows and 0 <= column < layout.columns
            there = row * layout.columns + column if inside else state
            if layout.cells[there] == "C":
                there = layout.cells.index("S")
            if layout.cells[state] == "C":
                continue  # nobody ever stands there
            assert step_from(environment, state, action) == there
            moved += there != state
    environment.close()
    assert moved > model.num_states


def test_cells_of_the_lake() -> None:
    layout = load("FrozenLake-v1").layout
    assert layout is not None
    assert (layout.rows, layout.columns) == (4, 4)
    assert layout.cells == "SFFFFHFHFFFHHFFG"


def test_cells_of_the_cliff() -> None:
    layout = load("CliffWalking-v1").layout
    assert layout is not None
    assert (layout.rows, layout.columns) == (4, 12)
    assert layout.cells == "." * 36 + "S" + "C" * 10 + "G"


def test_labels_of_the_taxi_agree_with_what_it_does() -> None:
    model = load("Taxi-v4")
    assert model.layout is None  # where it stands is a part of the state only
    assert model.state_labels is not None
    assert model.action_labels is not None
    assert len(set(model.state_labels)) == 500
    environment = make(model)
    names = {label: action for action, label in enumerate(model.action_labels)}
    inside: Any = environment.unwrapped

    def after(label: str, *place: int) -> str:
        assert model.state_labels is not None
        return model.state_labels[step_from(environment, inside.encode(*place), names[label])]

    # At the red stand in the corner (row 0, column 0), the passenger with it, to the yellow one.
    assert model.state_labels[inside.encode(0, 0, 0, 2)] == (
        "taxi (0, 0), passenger at red, to yellow"
    )
    assert after("pick up", 0, 0, 0, 2) == "taxi (0, 0), passenger in the taxi, to yellow"
    assert after("south", 0, 0, 4, 2) == "taxi (1, 0), passenger in the taxi, to yellow"
    assert after("north", 1, 0, 4, 2) == "taxi (0, 0), passenger in the taxi, to yellow"
    assert after("east", 0, 0, 4, 2) == "taxi (0, 1), passenger in the taxi, to yellow"
    assert after("west", 0, 1, 4, 2) == "taxi (0, 0), passenger in the taxi, to yellow"
    assert after("drop off", 4, 0, 4, 2) == "taxi (4, 0), passenger at yellow, to yellow"
    # The stands are where Gymnasium has them, in its order.
    stands = ["red", "green", "yellow", "blue"]
    for stand, (row, column) in zip(stands, inside.locs, strict=True):
        index = stands.index(stand)
        label = after("pick up", row, column, index, (index + 1) % 4)
        assert "in the taxi" in label
    environment.close()


# ------------------------------------------------------------------ what `P` does not say


def test_a_map_at_random_is_the_same_in_evaluation_and_when_loaded_again() -> None:
    model = load("FrozenLake-v1", **RANDOM_MAP)
    assert model.layout is not None
    environment = make(model)
    inside: Any = environment.unwrapped
    assert b"".join(inside.desc.flatten()).decode() == model.layout.cells
    assert model.origin is not None
    again = load_target(**model.origin)
    assert again.layout == model.layout


def test_a_fickle_passenger_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Taxi-v4: fickle_passenger is no part of .* table"):
        load("Taxi-v4", fickle_passenger=True)


def test_a_slippery_cliff_is_refused() -> None:
    """Back at the start after a fall (-100) or a bump (-1): one next state, two rewards."""
    with pytest.raises(ValueError, match=r"got several for \(36, \d, 36\)"):
        load("CliffWalking-v1", is_slippery=True)


class TornEnv(gymnasium.Env[Any, Any]):
    """State 1 ends the episode when entered by action 0, and does not by action 1."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)
    initial_state_distrib = np.array([1.0, 0.0])

    def __init__(self, entry: list[Any]) -> None:
        stay = [(1.0, 1, 0.0, True)]
        self.P = {0: {0: [(1.0, 1, 1.0, True)], 1: entry}, 1: {0: stay, 1: stay}}
        self.spec = gymnasium.envs.registration.EnvSpec("Torn-v0")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            [(1.0, 1, 1.0, False)],
            r"Torn-v0: expected every transition into a terminal state to end the episode, but "
            r"state 1 is also entered without ending it",
        ),
        (
            [(0.5, 1, 1.0, True), (0.5, 1, 2.0, True)],
            r"Torn-v0: expected one reward for each \(state, action, next state\), got several for "
            r"\(0, 1, 1\); write it as an EnvironmentModel in which the next state tells",
        ),
    ],
)
def test_tables_that_are_no_model_are_refused(entry: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_toy_text(TornEnv(entry), {}, 0.99)


def test_entries_of_probability_zero_do_not_count() -> None:
    model = from_toy_text(TornEnv([(1.0, 0, 0.5, False), (0.0, 1, 9.0, False)]), {}, 0.5)
    assert model.csr.toarray().tolist() == [[0, 1], [1, 0], [0, 0], [0, 0]]
    assert model.rewards.tolist() == [1.0, 0.5]
    assert (model.discount, model.layout, model.action_labels) == (0.5, None, None)
