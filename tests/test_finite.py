"""`FiniteModel`: tables in every accepted form, the model as a program, and every refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl import Exact, FiniteModel, infer
from inference_rl.distributions import as_probs
from inference_rl.environment import GridLayout

S, A = 4, 2
END = 3
"""The terminal state of `tables()`."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tables(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random P (S, A, S) with exact zeros, r (S, A, S), nothing at the end, and terminal."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(S), size=(S, A))
    transition[0, :, 2] = 0.0
    transition[2, 1] = [1.0, 0.0, 0.0, 0.0]
    transition /= transition.sum(-1, keepdims=True)
    reward = rng.normal(size=(S, A, S))
    reward[END] = 0.0
    return torch.tensor(transition), torch.tensor(reward), torch.arange(S) == END


def dense(model: FiniteModel) -> tuple[Tensor, Tensor]:
    """P and P·r, (S, A, S) each, read off the sparse tables one entry at a time."""
    states, actions = model.log_prior.shape
    transition = torch.zeros(states, actions, states)
    paid = torch.zeros(states, actions, states)
    for row in range(states * actions):
        for k in range(int(model.pointers[row]), int(model.pointers[row + 1])):
            at = (*divmod(row, actions), int(model.successors[k]))
            transition[at] += model.probabilities[k].detach()
            paid[at] += (model.probabilities[k] * model.rewards[k]).detach()
    return transition, paid


def assert_holds(model: FiniteModel, transition: Tensor, reward: Tensor, terminal: Tensor) -> None:
    live = ~terminal[:, None, None]
    probabilities, paid = dense(model)
    torch.testing.assert_close(probabilities, transition * live, rtol=0, atol=0)
    torch.testing.assert_close(paid, transition * reward * live, rtol=0, atol=0)
    assert model.probabilities.dtype == model.rewards.dtype == torch.float64
    assert (model.probabilities > 0).all()


# ------------------------------------------------------------------ from_tables


def torch_coo(matrix: np.ndarray) -> Tensor:
    return torch.tensor(matrix).to_sparse_coo()


def torch_csr(matrix: np.ndarray) -> Tensor:
    import warnings

    with warnings.catch_warnings():  # torch calls its CSR support a beta, once
        warnings.simplefilter("ignore")
        return torch.tensor(matrix).to_sparse_csr()


STORED = {
    "scipy csr": scipy.sparse.csr_array,
    "scipy csr_matrix": scipy.sparse.csr_matrix,
    "scipy csc": scipy.sparse.csc_array,
    "scipy coo": scipy.sparse.coo_array,
    "torch coo": torch_coo,
    "torch csr": torch_csr,
}


@pytest.mark.parametrize("kind", ["torch", "numpy", "list"])
def test_dense_tables(kind: str) -> None:
    transition, reward, terminal = tables()
    convert = {"torch": lambda x: x, "numpy": Tensor.numpy, "list": Tensor.tolist}[kind]
    model = FiniteModel.from_tables(
        convert(transition), convert(reward), terminal=convert(terminal), discount=0.9, horizon=3
    )
    assert_holds(model, transition, reward, terminal)
    assert (model.discount, model.horizon) == (0.9, 3)
    assert model.state_space == Discrete(S)
    assert model.action_space == Discrete(A)
    torch.testing.assert_close(model.initial, torch.full((S,), 1 / S))
    torch.testing.assert_close(model.log_prior.exp(), torch.full((S, A), 1 / A))


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("shape", ["(S, A)", "(S, A, S)", "entries"])
def test_sparse_tables_and_the_three_shapes_of_reward(kind: str, shape: str) -> None:
    transition, reward, terminal = tables()
    if shape == "(S, A)":
        reward = reward[..., :1].expand(S, A, S)
    stored = STORED[kind](transition.reshape(S * A, S).numpy())
    given: Any = reward[..., 0] if shape == "(S, A)" else reward
    if shape == "entries":
        if isinstance(stored, Tensor):
            rows, columns = stored.to_sparse_coo().indices().numpy()
        else:
            coo = stored.tocoo()
            rows, columns = coo.row, coo.col
        given = reward.reshape(S * A, S)[rows, columns]
    model = FiniteModel.from_tables(stored, given, terminal=terminal)
    assert_holds(model, transition, reward, terminal)


@pytest.mark.parametrize("kind", ["scipy coo", "scipy csr", "torch coo"])
def test_rewards_follow_their_entries_whatever_the_order_of_storage(kind: str) -> None:
    transition, reward, terminal = tables()
    flat = scipy.sparse.coo_array(transition.reshape(S * A, S).numpy())
    order = np.random.default_rng(1).permutation(flat.nnz)
    if kind == "scipy csr":  # rows in order, columns within them backwards
        order = np.lexsort((-flat.col, flat.row))
    rows, columns, values = flat.row[order], flat.col[order], flat.data[order]
    stored: Any = scipy.sparse.coo_array((values, (rows, columns)), shape=flat.shape)
    if kind == "scipy csr":
        pointers = np.append(0, np.bincount(rows, minlength=S * A).cumsum())
        stored = scipy.sparse.csr_array((values, columns, pointers), shape=flat.shape)
        assert not stored.has_sorted_indices
    if kind == "torch coo":
        index = torch.tensor(np.stack([rows, columns]))
        stored = torch.sparse_coo_tensor(
            index, torch.tensor(values), flat.shape, check_invariants=True
        )
        assert not stored.is_coalesced()
    model = FiniteModel.from_tables(
        stored, reward.reshape(S * A, S)[rows, columns], terminal=terminal
    )
    assert_holds(model, transition, reward, terminal)


def test_rewards_of_impossible_transitions_are_dropped() -> None:
    transition, reward, terminal = tables()
    reward[transition == 0] = torch.inf
    model = FiniteModel.from_tables(transition, reward, terminal=terminal)
    assert model.rewards.isfinite().all()


def test_initial_and_prior_are_kept() -> None:
    transition, reward, terminal = tables()
    initial = torch.tensor([0.1, 0.2, 0.7, 0.0])
    prior = torch.tensor([[0.25, 0.75]] * 3 + [[0.0, 1.0]])
    model = FiniteModel.from_tables(
        transition, reward, initial=initial, prior=prior, terminal=terminal
    )
    torch.testing.assert_close(model.initial, initial)
    torch.testing.assert_close(model.log_prior.exp(), prior)
    assert model.log_prior[END, 0] == -torch.inf


@pytest.mark.parametrize("kind", ["dense", "coo", "csr"])
def test_gradients_reach_the_given_tables(kind: str) -> None:
    transition, reward, terminal = tables()
    transition.requires_grad_()
    reward.requires_grad_()
    given: Tensor = transition
    if kind != "dense":
        given = transition.reshape(S * A, S).to_sparse_coo()
    if kind == "csr":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = given.to_sparse_csr()
    model = FiniteModel.from_tables(given, reward, terminal=terminal)
    model.expected_reward().sum().backward()
    live = ~terminal[:, None, None] & (transition > 0)
    assert transition.grad is not None
    assert reward.grad is not None
    torch.testing.assert_close(transition.grad.to_dense(), (reward * live).detach())
    torch.testing.assert_close(reward.grad, (transition * live).detach())


# ------------------------------------------------------------------ refusals


def bad(**changes: Any) -> dict[str, Any]:
    transition, reward, terminal = tables()
    return {"transition": transition, "reward": reward, "terminal": terminal} | changes


def changed(which: int, at: Any, value: float) -> Tensor:
    table = tables()[which]
    table[at] = value
    return table


REFUSALS = {
    "shape of a dense transition": (
        bad(transition=torch.ones(S, A)),
        r"transition: expected shape \(S, A, S\), or a sparse matrix \(S·A, S\), got \(4, 2\)",
    ),
    "not square": (bad(transition=torch.ones(S, A, S + 1)), r"got \(4, 2, 5\)"),
    "no states": (bad(transition=torch.ones(0, A, 0)), r"got \(0, 2, 0\)"),
    "shape of a sparse transition": (
        bad(transition=scipy.sparse.csr_array(np.ones((S * A + 1, S)))),
        r"expected a sparse matrix of shape \(S·A, S\), got \(9, 4\)",
    ),
    "repeated entries": (
        bad(transition=scipy.sparse.coo_array(([0.5, 0.5], ([0, 0], [1, 1])), shape=(S * A, S))),
        r"stores every entry once; .*sum_duplicates\(\)",
    ),
    "repeated entries in torch": (
        bad(
            transition=torch.sparse_coo_tensor(
                [[0, 0], [1, 1]], [0.5, 0.5], (S * A, S), check_invariants=True
            )
        ),
        r"stores every entry once; .*coalesce\(\)",
    ),
    "shape of the reward": (
        bad(reward=torch.ones(S)),
        r"reward: expected shape \(4, 2\), \(4, 2, 4\) or one value for each of 32 entries of the "
        r"transition, got \(4,\)",
    ),
    "infinite reward": (
        bad(reward=changed(1, (1, 1), -torch.inf)),
        r"reward: expected finite numbers, got -inf for state 1, action 1; forbid an action by a "
        r"prior of zero",
    ),
    "NaN reward": (
        bad(reward=changed(1, (2, 0), torch.nan)),
        r"reward: expected finite numbers, got nan for state 2, action 0",
    ),
    "a sum that is not one": (
        bad(transition=changed(0, (1, 0, 1), 0.5)),
        r"transition: expected probabilities that sum to one, got \d.* for state 1, action 0",
    ),
    "an empty row": (
        bad(transition=changed(0, (0, 1), 0.0)),
        r"sum to one, got 0 for state 0, action 1",
    ),
    "a negative probability": (
        bad(transition=changed(0, (2, 1, 1), -0.5)),
        r"transition: expected probabilities, got -0.5 \(negative\) for state 2, action 1",
    ),
    "a NaN probability": (
        bad(transition=changed(0, (1, 1, 0), torch.nan)),
        r"transition: expected probabilities, got nan \(NaN\) for state 1, action 1",
    ),
    "a terminal state that pays": (
        bad(reward=changed(1, (END, 1, 0), 2.5)),
        r"reward: state 3 is terminal, but action 1 there pays 2.5; pay on the step that enters it",
    ),
    "shape of initial": (
        bad(initial=torch.ones(S + 1)),
        r"initial: expected shape \(4,\), got \(5,\)",
    ),
    "initial does not sum to one": (
        bad(initial=torch.full((S,), 0.3)),
        r"initial state: probabilities must sum to one, got .*1.2",
    ),
    "a negative start": (
        bad(initial=torch.tensor([1.5, -0.5, 0, 0])),
        r"initial state: probabilities must not be negative",
    ),
    "a NaN start": (
        bad(initial=torch.tensor([torch.nan, 1, 0, 0])),
        r"initial state: probabilities must be finite",
    ),
    "shape of the prior": (bad(prior=torch.ones(S)), r"prior: expected shape \(4, 2\), got \(4,\)"),
    "prior does not sum to one": (
        bad(prior=torch.ones(S, A)),
        r"prior: probabilities must sum to one, got \[1, 1\] in row 0",
    ),
    "a prior of zero everywhere": (
        bad(prior=torch.zeros(S, A)),
        r"prior: probabilities must sum to one, got \[0, 0\]",
    ),
    "shape of terminal": (
        bad(terminal=torch.tensor(True)),
        r"terminal: expected shape \(4,\), got \(\)",
    ),
    "dtype of terminal": (
        bad(terminal=torch.zeros(S, dtype=torch.int64)),
        r"terminal: expected booleans, got torch.int64",
    ),
    "discount above one": (bad(discount=1.5), r"discount: expected a number in \[0, 1\], got 1.5"),
    "negative discount": (bad(discount=-0.1), r"discount: .* got -0.1"),
    "NaN discount": (bad(discount=float("nan")), r"discount: .* got nan"),
    "no steps": (bad(horizon=0), r"horizon: expected a whole number of steps >= 1 or None, got 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        FiniteModel.from_tables(**arguments)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_terminal_state_that_pays_is_refused_even_without_transitions(form: str) -> None:
    transition, reward, terminal = tables()
    transition[END] = 0.0
    given = transition if form == "dense" else torch_coo(transition.reshape(S * A, S).numpy())
    expected = reward.sum(-1)
    FiniteModel.from_tables(given, expected, terminal=terminal)
    expected[END, 1] = 1.0
    with pytest.raises(ValueError, match="state 3 is terminal, but action 1 there pays 1"):
        FiniteModel.from_tables(given, expected, terminal=terminal)


def test_a_log_prior_that_sums_to_anything_else_is_refused() -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(transition, reward, terminal=terminal)
    log_prior = model.log_prior.clone()
    log_prior[2] = -torch.inf
    message = r"action prior: expected probabilities over 2 actions .* got a sum of 0 in state 2"
    with pytest.raises(ValueError, match=message):
        model.replace(log_prior=log_prior)
    with pytest.raises(ValueError, match="got a sum of nan in state 0"):
        model.replace(log_prior=torch.full_like(log_prior, torch.nan))


# ------------------------------------------------------------------ as a program


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_as_a_program_it_says_what_its_tables_say(batch: tuple[int, ...]) -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(
        transition, reward, terminal=terminal, prior=torch.tensor([[0.3, 0.7]] * S)
    )
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(S, batch, generator=generator)
    action = torch.randint(A, batch, generator=generator)
    successor = torch.randint(S, batch, generator=generator)
    step = model.transition(state, action)
    assert step.batch_shape == batch
    stays = torch.nn.functional.one_hot(state, S).double()
    expected = torch.where(terminal[state].unsqueeze(-1), stays, transition[state, action])
    torch.testing.assert_close(as_probs(step, S), expected)
    possible = (transition[state, action, successor] > 0) & ~terminal[state]
    paid = model.reward(state, action, successor)
    assert paid.shape == batch
    torch.testing.assert_close(paid, reward[state, action, successor] * possible)
    assert model.terminal(state).shape == batch
    assert torch.equal(model.terminal(state), terminal[state])
    prior = model.action_prior(state)
    assert prior.batch_shape == batch
    torch.testing.assert_close(prior.probs, torch.tensor([0.3, 0.7]).expand(*batch, A))
    assert model.initial_state().batch_shape == ()
    assert model.can_end
    assert not FiniteModel.from_tables(transition, reward).can_end


def test_an_empty_batch() -> None:
    model = FiniteModel.from_tables(*tables()[:2])
    nobody = torch.zeros(0, dtype=torch.long)
    assert model.transition(nobody, nobody).batch_shape == (0,)
    assert model.reward(nobody, nobody, nobody).shape == (0,)


def test_a_model_of_terminal_states_only() -> None:
    model = FiniteModel.from_tables(
        torch.ones(1, 2, 1), torch.zeros(1, 2), terminal=torch.tensor([True])
    )
    zero = torch.tensor(0)
    assert as_probs(model.transition(zero, zero), 1).tolist() == [1.0]
    assert model.reward(zero, zero, zero) == 0


# ------------------------------------------------------------------ as tables


def test_sums_along_rows() -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(transition, reward, terminal=terminal)
    live = (~terminal).double()[:, None]
    value = torch.arange(S).double() - 1.5
    torch.testing.assert_close(model.expected_reward(), (transition * reward).sum(-1) * live)
    torch.testing.assert_close(model.expected_value(value), transition @ value * live)
    matrix = model.csr.toarray().reshape(S, A, S)
    torch.testing.assert_close(torch.tensor(matrix), transition * live[:, None])
    rows = [row for row in range(S * A) for _ in range(int(model.pointers.diff()[row]))]
    assert model.rows().tolist() == rows


@pytest.mark.parametrize("offset", [0.0, 800.0, -800.0])  # beyond what exp can hold
def test_log_mean_exp_along_rows(offset: float) -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(transition, reward, terminal=terminal)
    expected = (transition * reward.exp()).sum(-1).log() + offset
    expected[END] = -torch.inf
    torch.testing.assert_close(model.row_log_mean_exp(model.rewards + offset), expected)


def test_expected_value_is_differentiable() -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(transition, reward, terminal=terminal)
    value = torch.ones(S, requires_grad=True)
    model.expected_value(value)[0, 1].backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, transition[0, 1])


def test_a_copy_keeps_the_description() -> None:
    model = FiniteModel.from_tables(*tables()[:2], discount=0.5)
    model.name, model.action_labels = "mine", ("left", "right")
    model.layout = GridLayout(2, 2, (None, (0, 1)), "S..G")
    copy = model.replace(discount=0.25)
    assert (copy.name, copy.action_labels, copy.layout) == (
        "mine",
        ("left", "right"),
        model.layout,
    )
    assert (copy.discount, model.discount) == (0.25, 0.5)
    assert FiniteModel(**model.tensors(), discount=0.5, horizon=None).csr.nnz == model.csr.nnz


# ------------------------------------------------------------------ discount as survival


def test_with_survival_every_state_has_a_terminal_copy() -> None:
    transition, reward, terminal = tables()
    model = FiniteModel.from_tables(transition, reward, terminal=terminal, discount=0.75)
    survival = model.with_survival()
    assert survival.num_states == 2 * S
    assert survival.discount == 1
    assert survival.is_terminal.tolist() == [*terminal.tolist(), *[True] * S]
    probabilities, paid = dense(survival)
    live = ~terminal
    torch.testing.assert_close(probabilities[:S, :, :S][live], 0.75 * transition[live])
    torch.testing.assert_close(probabilities[:S, :, S:][live], 0.25 * transition[live])
    # The step is paid whether it is survived or not.
    expected = (transition * reward)[live]
    torch.testing.assert_close((paid[:S, :, :S] + paid[:S, :, S:])[live], expected)
    assert survival.initial[S:].sum() == 0


@pytest.mark.parametrize("target", ["control", "posterior"])
@pytest.mark.filterwarnings("ignore:the posterior's policy")
def test_with_survival_infers_the_same(target: Any) -> None:
    transition, reward, terminal = tables()
    reward = torch.where(terminal[:, None, None], 0.0, reward - 2)  # or the evidence is infinite
    model = FiniteModel.from_tables(transition, reward, terminal=terminal, discount=0.75)
    routine = Exact(temperature=0.7, target=target)
    discounted, undiscounted = infer(model, routine), infer(model.with_survival(), routine)
    torch.testing.assert_close(discounted.v, undiscounted.v[:S])
    torch.testing.assert_close(discounted.policy.probs[:END], undiscounted.policy.probs[:END])
