"""`tabulate`: programs of every form of distribution against tables written by hand; refusals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, Space, Tuple
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import (
    CategoricalPrior,
    EnvironmentModel,
    FiniteModel,
    LinearGaussianModel,
    MaskPrior,
    PolicyPrior,
    SparseCategorical,
    StickyPrior,
    TabularPolicy,
    tabulate,
)
from inference_rl.environment import WithPreviousAction
from inference_rl.tabulation import CHUNK

S, A = 4, 2
END = 3


class Ring(EnvironmentModel):
    """Walk by 1 + action around a ring of four, with a slip that stays; the last place ends it."""

    state_space: Space[Any] = Discrete(S)
    action_space: Space[Any] = Discrete(A)
    discount = 0.9

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.tensor([0.5, 0.25, 0.25, 0.0]))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        there = torch.nn.functional.one_hot((state + action + 1) % S, S)
        return dist.Categorical(0.9 * there + 0.1 * torch.nn.functional.one_hot(state, S))

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return 10.0 * state + action + next_state / 8

    def terminal(self, state: Tensor) -> Tensor:
        return state == END


def ring_tables() -> tuple[Tensor, Tensor, Tensor]:
    """P, r (S, A, S) and terminal of `Ring`, by hand."""
    transition = torch.zeros(S, A, S, dtype=torch.float64)
    reward = torch.zeros(S, A, S, dtype=torch.float64)
    for s in range(S - 1):
        for a in range(A):
            transition[s, a, (s + a + 1) % S] += 0.9
            transition[s, a, s] += 0.1
            for n in range(S):
                reward[s, a, n] = 10 * s + a + n / 8
    return transition, reward, torch.arange(S) == END


def ring(**methods: Callable[..., Any]) -> EnvironmentModel:
    """A `Ring` with some methods (without `self`) or attributes replaced."""
    changed = {
        name: staticmethod(method) if callable(method) else method
        for name, method in methods.items()
    }
    return type("Ring", (Ring,), changed)()


def assert_same_tables(found: FiniteModel, expected: FiniteModel, tolerance: float = 1e-15) -> None:
    for name, table in expected.tensors().items():
        torch.testing.assert_close(
            found.tensors()[name].detach(),
            table.detach(),
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (found.discount, found.horizon) == (expected.discount, expected.horizon)


def by_hand(**changes: Any) -> FiniteModel:
    transition, reward, terminal = ring_tables()
    arguments = {
        "transition": transition,
        "reward": reward,
        "terminal": terminal,
        "initial": torch.tensor([0.5, 0.25, 0.25, 0.0]),
        "discount": 0.9,
    } | changes
    return FiniteModel.from_tables(**arguments)


# ------------------------------------------------------------------ forms of distributions


def test_categorical() -> None:
    assert_same_tables(tabulate(Ring()), by_hand())


def test_categorical_by_logits() -> None:
    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=Ring().transition(state, action).probs.log())

    assert_same_tables(tabulate(ring(transition=transition)), by_hand())


def test_sparse_categorical_with_repeated_states_out_of_order() -> None:
    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        there = (state + action + 1) % S
        states = torch.stack([there, state, there, state, state], dim=-1)
        probs = torch.tensor([0.6, 0.04, 0.3, 0.0, 0.06]).expand(states.shape)
        return SparseCategorical(states, probs)

    def initial_state() -> TorchDistribution:
        states = torch.tensor([2, 0, 1, 0])
        return SparseCategorical(states, torch.tensor([0.25, 0.25, 0.25, 0.25]))

    model = tabulate(ring(transition=transition, initial_state=initial_state))
    assert_same_tables(model, by_hand())


def test_delta() -> None:
    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta((state + action + 1) % S)

    tables = torch.zeros(S, A, S)
    for s in range(S):
        for a in range(A):
            tables[s, a, (s + a + 1) % S] = 1.0
    model = ring(transition=transition, initial_state=lambda: dist.Delta(torch.tensor(2)))
    initial = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert_same_tables(tabulate(model), by_hand(transition=tables, initial=initial))


def test_bernoulli_and_binomial() -> None:
    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Binomial(3, probs=(1.0 + action) / 4)

    binomial = {0: [27, 27, 9, 1], 1: [8, 24, 24, 8]}
    tables = torch.tensor([[[n / 64 for n in binomial[a]] for a in range(A)]] * S).double()
    model = ring(transition=transition, initial_state=lambda: dist.Bernoulli(torch.tensor(0.25)))
    initial = torch.tensor([0.75, 0.25, 0.0, 0.0])
    expected = by_hand(transition=tables, initial=initial)
    assert_same_tables(tabulate(model), expected, tolerance=1e-14)


@pytest.mark.parametrize("count", [S - 2, S + 1])
def test_fewer_or_more_categories_than_states(count: int) -> None:
    table = torch.nn.functional.one_hot(torch.tensor(0), count).double()
    message = rf"expected {S} categories, one for each of 0..{S - 1}, got {count}"
    with pytest.raises(ValueError, match=f"Ring.transition: {message}"):
        tabulate(ring(transition=lambda s, _: dist.Categorical(table.expand(*s.shape, count))))
    with pytest.raises(ValueError, match=f"Ring.initial_state: {message}"):
        tabulate(ring(initial_state=lambda: dist.Categorical(table)))


@pytest.mark.parametrize(
    "prior",
    [
        CategoricalPrior(probs=[[0.5, 0.5]] * (S + 1)),
        MaskPrior([[True, True]] * (S + 1)),
        PolicyPrior(TabularPolicy(torch.full((S + 1, A), 1 / A))),
    ],
)
def test_a_prior_over_the_states_of_another_model(prior: Any) -> None:
    message = rf"Prior: expected a table of the model's {S} states, got one of {S + 1}"
    with pytest.raises(ValueError, match=message):
        tabulate(Ring(), prior=prior)


def test_literals_are_exact_and_the_default_dtype_comes_back() -> None:
    assert torch.get_default_dtype() == torch.float32
    model = tabulate(Ring())
    assert sorted(set(model.probabilities.tolist())) == [0.1, 0.9]
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"Ring\.reward failed"):
        tabulate(ring(reward=lambda s, a, n: 1 / 0))
    assert torch.get_default_dtype() == torch.float32


def test_states_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tabulate(Ring())
    for chunk in (1, 9, 17):  # one and two states at a time
        monkeypatch.setattr("inference_rl.tabulation.CHUNK", chunk)
        said: list[str] = []
        assert_same_tables(tabulate(Ring(), progress=said.append), whole)
        assert said[-1] == "tabulating: 3 of 3 states"
    assert CHUNK > 1000


def test_terminal_states_are_never_asked_about() -> None:
    """Their transition and prior may be anything, even nonsense."""

    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        assert (state != END).all()
        return Ring().transition(state, action)

    def action_prior(state: Tensor) -> TorchDistribution:
        assert (state != END).all()
        return dist.Categorical(torch.tensor([0.25, 0.75]).expand(*state.shape, A))

    model = tabulate(ring(transition=transition, action_prior=action_prior))
    expected = torch.tensor([[0.25, 0.75]] * 3 + [[0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(model.log_prior.exp(), expected)


def test_every_state_terminal() -> None:
    model = tabulate(ring(terminal=lambda state: torch.ones_like(state, dtype=torch.bool)))
    assert model.is_terminal.all()
    assert model.expected_reward().tolist() == [[0.0] * A] * S


def test_description_is_kept() -> None:
    model = ring(action_labels=("one", "two"), gymnasium_id="Some-v0", name="a ring", horizon=7)
    finite = tabulate(model)
    assert (finite.name, finite.action_labels) == ("a ring", ("one", "two"))
    assert (finite.gymnasium_id, finite.horizon, finite.discount) == ("Some-v0", 7, 0.9)
    assert tabulate(finite) is finite


def test_gradients_to_the_programs_own_parameters_are_kept() -> None:
    slip = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    bonus = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def transition(state: Tensor, action: Tensor) -> TorchDistribution:
        states = torch.stack([(state + action + 1) % S, state, state], dim=-1)
        probs = torch.stack([1 - slip, slip / 2, slip / 2]).expand(states.shape)
        return SparseCategorical(states, probs)

    def reward(state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return bonus * (next_state == END)

    model = tabulate(ring(transition=transition, reward=reward))
    assert_same_tables(
        model, by_hand(reward=torch.tensor([0.0, 0, 0, 2]).expand(S, A, S) * ring_live())
    )
    # From state 1, action 1, and state 2, action 0, the end is entered unless one slips.
    model.expected_reward().sum().backward()
    assert slip.grad == -2 * 2
    assert bonus.grad == pytest.approx(2 * 0.9)


def ring_live() -> Tensor:
    return (torch.arange(S) != END).double()[:, None, None]


def test_1e5_states_in_seconds() -> None:
    size = 100_000

    class Long(EnvironmentModel):
        state_space, action_space, discount = Discrete(size), Discrete(4), 0.99

        def initial_state(self) -> TorchDistribution:
            return SparseCategorical(torch.tensor([0]), torch.ones(1))

        def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
            moves = torch.stack([state + action, state - action, state], dim=-1)
            return SparseCategorical(
                moves.clamp(0, size - 1), torch.tensor([0.5, 0.25, 0.25]).expand(moves.shape)
            )

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return (next_state == size - 1).double()

    started = time.perf_counter()
    model = tabulate(Long())
    assert time.perf_counter() - started < 10
    assert model.pointers[-1] == len(model.successors)
    # Action 0 leads to one state only, and the edges to two; the rest has three successors.
    count = model.pointers.diff().reshape(size, 4)
    assert (count[:, 0] == 1).all()
    assert (count[3:-3, 1:] == 3).all()
    assert count[0].tolist() == [1, 2, 2, 2]
    row = slice(int(model.pointers[4 * 50 + 2]), int(model.pointers[4 * 50 + 3]))
    assert model.successors[row].tolist() == [48, 50, 52]
    assert model.probabilities[row].tolist() == [0.25, 0.25, 0.5]


# ------------------------------------------------------------------ priors


def test_a_prior_in_place_of_the_models_own() -> None:
    own = ring(action_prior=lambda s: dist.Categorical(torch.tensor([0.9, 0.1]).expand(len(s), A)))
    assert tabulate(own).log_prior[0].exp().tolist() == pytest.approx([0.9, 0.1])
    other = tabulate(own, prior=CategoricalPrior([0.2, 0.8]))
    assert other.log_prior[0].exp().tolist() == pytest.approx([0.2, 0.8])
    assert_same_tables(other.replace(log_prior=tabulate(own).log_prior), tabulate(own))


@pytest.mark.parametrize(
    "prior",
    [
        MaskPrior([False, True]),
        CategoricalPrior([0.0, 1.0]),
        lambda s: dist.Delta(torch.ones_like(s)),
        lambda s: SparseCategorical(torch.ones((*s.shape, 1)).long(), torch.ones((*s.shape, 1))),
        lambda s: dist.Categorical(logits=torch.tensor([-torch.inf, 0.0]).expand(*s.shape, A)),
    ],
)
def test_a_forbidden_action_stays_forbidden(prior: Any) -> None:
    """Not merely improbable: torch's own clamp at 2e-16 would let a large reward buy it."""
    table = tabulate(Ring(), prior=prior).log_prior
    assert table[:END].tolist() == [[-torch.inf, 0.0]] * 3
    assert table[END].exp().tolist() == [0.5, 0.5]


def test_a_prior_below_the_smallest_float() -> None:
    logits = torch.tensor([-2000.0, 0.0])
    prior = lambda s: dist.Categorical(logits=logits.expand(*s.shape, A))  # noqa: E731
    assert tabulate(Ring(), prior=prior).log_prior[0, 0] == -2000.0


def test_a_prior_keeps_its_gradient() -> None:
    logits = torch.zeros(A, dtype=torch.float64, requires_grad=True)
    model = tabulate(Ring(), prior=lambda s: dist.Categorical(logits=logits.expand(*s.shape, A)))
    model.log_prior[1, 0].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.5, -0.5]


def test_a_model_whose_states_remember_the_previous_action() -> None:
    prior = StickyPrior(Discrete(A), stickiness=0.5)
    model = tabulate(WithPreviousAction(Ring()), prior=prior)
    assert model.num_states == S * (A + 1)
    assert model.log_prior.exp()[0 * 3 + 1].tolist() == [0.25, 0.75]  # place 0, after action 1
    assert model.log_prior.exp()[0 * 3 + 2].tolist() == [0.5, 0.5]  # at the start
    step = model.transition(torch.tensor(2), torch.tensor(1))
    assert dict(zip(step.states.tolist(), step.probs.tolist(), strict=True)) == {1: 0.1, 7: 0.9}


# ------------------------------------------------------------------ refusals


def shaped(*shape: int) -> Callable[..., TorchDistribution]:
    return lambda *_: dist.Categorical(torch.full((*shape, S), 1 / S))


def fixed(*probs: float) -> Callable[..., TorchDistribution]:
    """Whatever the arguments, these probabilities, in their batch shape."""
    return lambda *given: dist.Categorical(
        torch.tensor(probs).expand(*(given[0].shape if given else ()), -1)
    )


def sparse(states: list[int], probs: list[float]) -> Callable[..., TorchDistribution]:
    return lambda state, _: SparseCategorical(
        torch.tensor(states).expand(*state.shape, -1),
        torch.tensor(probs).expand(*state.shape, -1),
        validate_args=False,
    )


def failing(*_: Tensor) -> Any:
    raise RuntimeError("no such thing")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a sum above one, which torch would divide by": (
        {"transition": fixed(0.5, 0.6)},
        r"Ring.transition failed .* Categorical: probabilities must sum to one, got \[0.5, 0.6\]"
        r".*which sums to 1.1; divide by the sum if that is what you mean",
    ),
    "a sum below one": ({"transition": fixed(0.5, 0.4)}, r"sum to one, got \[0.5, 0.4\]"),
    "a sparse sum": (
        {"transition": sparse([0, 1], [0.5, 0.4])},
        r"Ring.transition: probabilities must sum to one, got \[0.5, 0.4\]",
    ),
    "negative": ({"transition": fixed(1.5, -0.5)}, r"must not be negative, got \[1.5, -0.5\]"),
    "NaN": ({"transition": fixed(torch.nan, 1.0)}, r"probabilities must be finite, got \[nan, 1\]"),
    "NaN logits": (
        {
            "transition": lambda s, _: dist.Categorical(
                logits=torch.full((*s.shape, S), torch.nan), validate_args=False
            )
        },
        r"Ring.transition: expected probabilities, got NaN",
    ),
    "no distribution": (
        {"transition": lambda s, a: s},
        r"Ring.transition: expected a Pyro distribution, got a Tensor",
    ),
    "no tensor": (
        {"reward": lambda s, a, n: 1.0},
        r"Ring.reward: expected a tensor of the batch shape of its arguments, .*, got a float",
    ),
    "batch shape lost": (
        {"transition": shaped()},
        r"Ring.transition: expected batch shape \(2,\) and event shape \(\), got \(\) and \(\)",
    ),
    "batch shape of the start": (
        {"initial_state": shaped(3)},
        r"Ring.initial_state: expected batch shape \(\) and event shape \(\), got \(3,\)",
    ),
    "an event": (
        {"transition": lambda s, _: dist.OneHotCategorical(torch.full((*s.shape, S), 1 / S))},
        r"Ring.transition: .* got \(2,\) and \(4,\)",
    ),
    "a density": (
        {"transition": lambda s, _: dist.Normal(s.double(), 1.0)},
        r"Ring.transition: expected a distribution over integers, got Normal",
    ),
    "out of range": (
        {"transition": fixed(0.0, 0.0, 0.0, 0.5, 0.5)},
        r"Ring.transition: expected 4 categories, one for each of 0..3, got 5",
    ),
    "out of range, sparse": (
        {"transition": sparse([0, 4], [0.5, 0.5])},
        r"Ring.transition: expected next states in 0..3, got 4 for state 0, action 0",
    ),
    "below range, sparse": (
        {"transition": sparse([-1, 0], [0.5, 0.5])},
        r"expected next states in 0..3, got -1",
    ),
    "out of range, a point": (
        {"transition": lambda s, a: dist.Delta(s + a + 1)},
        r"expected next states in 0..3, got 4 for state 2, action 1",
    ),
    "out of range, counted": (
        {"transition": lambda s, _: dist.Poisson(torch.ones(s.shape))},
        r"Ring.transition: expected a distribution over 0..3, but Poisson.* has probability 0.0",
    ),
    "a start out of range": (
        {"initial_state": lambda: SparseCategorical(torch.tensor([7]), torch.ones(1))},
        r"Ring.initial_state: expected values in 0..3, got 7",
    ),
    "a start that sums to more": (
        {"initial_state": fixed(0.5, 0.6)},
        r"Ring.initial_state failed when called with nothing: .* sum to one",
    ),
    "an exception": (
        {"transition": failing},
        r"Ring.transition failed when called with torch.int64 \(2,\), torch.int64 \(2,\): "
        r"RuntimeError: no such thing",
    ),
    "reward of a wrong shape": (
        {"reward": lambda s, a, n: torch.zeros(3, 1)},
        r"Ring.reward: expected a tensor of the batch shape of its arguments, \(\d+,\), got a "
        r"tensor of shape \(3, 1\)",
    ),
    "infinite reward": (
        {"reward": lambda s, a, n: torch.where(s == 1, -torch.inf, 0.0)},
        r"reward: expected finite numbers, got -inf for state 1, action 0",
    ),
    "NaN reward": (
        {"reward": lambda s, a, n: torch.where(s == 2, torch.nan, 0.0)},
        r"reward: expected finite numbers, got nan for state 2, action 0",
    ),
    "terminal of a wrong dtype": (
        {"terminal": lambda s: (s == END).double()},
        r"Ring.terminal: expected dtype torch.bool, got torch.float64",
    ),
    "terminal of a wrong shape": (
        {"terminal": lambda s: torch.tensor(False)},
        r"Ring.terminal: expected a tensor .*\(4,\), got a tensor of shape \(\)",
    ),
    "discount": ({"discount": 1.5}, r"discount: expected a number in \[0, 1\], got 1.5"),
    "a prior of zero everywhere": (
        {"action_prior": fixed(0.0, 0.0)},
        r"action prior .* sum to one, got \[0, 0\]",
    ),
    "a prior over too many actions": (
        {"action_prior": fixed(0.0, 0.5, 0.5)},
        r"action prior .*: expected 2 categories, one for each of 0..1, got 3",
    ),
    "a prior over actions that do not exist": (
        {
            "action_prior": lambda s: SparseCategorical(
                torch.full((*s.shape, 1), 2), torch.ones((*s.shape, 1))
            )
        },
        r"action prior .*: expected values in 0..1, got 2",
    ),
    "a prior that loses the batch": (
        {"action_prior": lambda s: dist.Categorical(torch.tensor([0.5, 0.5]))},
        r"action prior .*: expected batch shape \(3,\) and event shape \(\), got \(\)",
    ),
    "a prior that is no distribution": (
        {"action_prior": lambda s: torch.tensor([0.5, 0.5])},
        r"action prior .*: expected a Pyro distribution, got a Tensor",
    ),
    "a prior that is a density": (
        {"action_prior": lambda s: dist.Normal(torch.zeros(s.shape), 1.0)},
        r"action prior .*: expected a distribution over integers",
    ),
    "a prior that fails": (
        {"action_prior": failing},
        r"action prior .* failed when called with torch.int64 \(3,\): RuntimeError: no such thing",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    methods, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        tabulate(ring(**methods))


def test_silent_renormalisation_is_torchs_own_behaviour_outside() -> None:
    """What the refusal guards against, and that the guard is gone afterwards."""
    with pytest.raises(ValueError, match="sum to one"):
        tabulate(ring(transition=fixed(0.5, 0.6)))
    silent = dist.Categorical(torch.tensor([0.5, 0.6]))
    assert silent.probs.tolist() == pytest.approx([5 / 11, 6 / 11])


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("state", Box(-1, 1, (2,))),
        ("action", Box(-1, 1, (2,))),
        ("state", Discrete(S, start=1)),
        ("state", Tuple([Discrete(2), Discrete(2)])),
    ],
)
def test_other_spaces_are_refused_with_what_to_do(name: str, space: Space[Any]) -> None:
    message = (
        rf"^Ring: exact inference covers finite models \(Discrete .*\) and linear-Gaussian ones, "
        rf"got the {name} space (Box|Discrete|Tuple).*; write it as an EnvironmentModel with "
        r"Discrete spaces, such as a grid over its states, or as a LinearGaussianModel$"
    )
    with pytest.raises(TypeError, match=message):
        tabulate(ring(**{f"{name}_space": space}))


def test_a_linear_gaussian_model_is_no_table() -> None:
    model = LinearGaussianModel(
        [[1.0]], [[1.0]], state_cost=[[1.0]], action_cost=[[1.0]], discount=0.9
    )
    with pytest.raises(TypeError, match="LinearGaussianModel: exact inference covers finite"):
        tabulate(model)
