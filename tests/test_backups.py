"""One step of message passing: sixty digits, gradients at the extremes, and the NumPy operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import Tables
from torch import Tensor

from inference_rl.backups import (
    control_q,
    posterior_q,
    soft_policy,
    soft_value,
    survival_message,
)
from inference_rl.bellman_operators import ControlBackup, PosteriorBackup
from inference_rl.finite import FiniteModel

LIGHT = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TEMPERATURES = [1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9]
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def log(probs: Array) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.as_tensor(np.log(probs))


def mp_value(q: Array, prior: Array, temperature: float) -> Any:
    """The soft value in sixty digits, of the prior divided by its sum."""
    with mpmath.workdps(oracles.DIGITS):
        chances = [mpmath.mpf(float(p)) for p in prior]
        total = mpmath.fsum(chances)
        numbers = [mpmath.mpf(float(x)) for x in q]
        return oracles.mp_soft_backup(numbers, [p / total for p in chances], temperature)


def mp_policy(q: Array, prior: Array, temperature: float) -> list[float]:
    with mpmath.workdps(oracles.DIGITS):
        top = max(mpmath.mpf(float(x)) for x, p in zip(q, prior, strict=True) if p > 0)
        weights = [
            mpmath.mpf(float(p)) * mpmath.exp((mpmath.mpf(float(x)) - top) / temperature)
            for x, p in zip(q, prior, strict=True)
        ]
        return [float(w / mpmath.fsum(weights)) for w in weights]


# --- Values and policies --------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn) -> tuple[Array, Array]:
    """Q and a prior: ties, forbidden actions, priors down to 1e-300, any scale and offset."""
    count = draw(st.integers(1, 6))
    unit = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.1, 1.0, 2.0])
    scale = draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e3, 1e9]))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, -1e6])) * scale
    q = offset + scale * np.array(draw(st.lists(unit, min_size=count, max_size=count)))
    weight = st.sampled_from([0.0, 1e-300, 1e-20, 1e-3, 1.0, 3.0])
    prior = np.array(draw(st.lists(weight, min_size=count, max_size=count)))
    assume(prior.max() >= 1e-3)
    return q, prior / prior.sum()


@LIGHT
@given(choices(), st.sampled_from(TEMPERATURES))
def test_soft_value_in_sixty_digits(choice: tuple[Array, Array], temperature: float) -> None:
    q, prior = choice
    exact = mp_value(q, prior, temperature)
    got = float(soft_value(torch.as_tensor(q), log(prior), temperature))
    scale = np.abs(q[prior > 0]).max()
    # Rounding of Q itself, and of how far V lies below its maximum.
    drop = abs(float(q[prior > 0].max() - exact))
    assert abs(float(got - exact)) <= 2e-15 * scale + 1e-13 * drop
    assert q[prior > 0].min() - 1e-15 * scale <= got <= q[prior > 0].max()


@LIGHT
@given(choices(), st.sampled_from(TEMPERATURES))
def test_soft_policy_in_sixty_digits(choice: tuple[Array, Array], temperature: float) -> None:
    q, prior = choice
    exact = mp_policy(q, prior, temperature)
    got = soft_policy(torch.as_tensor(q), log(prior), temperature).numpy()
    np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-300)
    assert got.sum() == pytest.approx(1, abs=1e-14)
    assert (got[prior == 0] == 0).all()


@LIGHT
@given(choices())
def test_temperature_zero_is_the_maximum_over_what_is_allowed(choice: tuple[Array, Array]) -> None:
    q, prior = choice
    best = np.where(prior > 0, q, -np.inf)
    for temperature in (0.0, 0, torch.tensor(0.0)):
        value = soft_value(torch.as_tensor(q), log(prior), temperature)
        policy = soft_policy(torch.as_tensor(q), log(prior), temperature)
        assert float(value) == best.max()
        assert policy.tolist() == np.eye(len(q))[best.argmax()].tolist()


def test_infinite_temperature_is_the_prior() -> None:
    q, prior = torch.tensor([5.0, -3.0, 1.0]), np.array([0.5, 0.0, 0.5])
    np.testing.assert_allclose(soft_policy(q, log(prior), 1e12).numpy(), prior, atol=1e-11)
    assert float(soft_value(q, log(prior), 1e12)) == pytest.approx(3.0, rel=1e-11)


def test_any_leading_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((2, 5, 3, 4), generator=generator)
    log_prior = torch.randn((3, 4), generator=generator).log_softmax(-1)
    whole = soft_value(q, log_prior, 0.3), soft_policy(q, log_prior, 0.3)
    assert whole[0].shape == (2, 5, 3)
    for i, j in np.ndindex(2, 5):
        assert torch.equal(whole[0][i, j], soft_value(q[i, j], log_prior, 0.3))
        assert torch.equal(whole[1][i, j], soft_policy(q[i, j], log_prior, 0.3))


# --- Gradients ------------------------------------------------------------------------------------

FORBIDS = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1e-300, 1.0, 0.0]])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gradients_are_finite_and_the_policy(scale: float, temperature: float) -> None:
    """dV/dQ = π and dV/d(log ρ) = temperature · π; a forbidden action's is zero, not NaN."""
    generator = torch.Generator().manual_seed(1)
    q = (scale * torch.randn((4, 3), generator=generator)).requires_grad_()
    log_prior = log(FORBIDS).requires_grad_()
    alpha = torch.tensor(temperature, requires_grad=True)
    value = soft_value(q, log_prior, alpha)
    by_q, by_prior, by_alpha = torch.autograd.grad(value.sum(), [q, log_prior, alpha])
    policy = soft_policy(q, log_prior, alpha)
    inside = torch.autograd.grad(policy[..., 0].sum(), [q, log_prior, alpha])
    for gradient in (by_q, by_prior, by_alpha, *inside):
        assert torch.isfinite(gradient).all()
    np.testing.assert_allclose(by_q.numpy(), policy.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert (by_q[torch.as_tensor(FORBIDS) == 0] == 0).all()
    # ρ sums to one, and moving along that constraint is all that has a meaning.
    excess, mass = by_prior - temperature * policy.detach(), torch.as_tensor(FORBIDS)
    along = excess - excess.sum(-1, keepdim=True) * mass
    np.testing.assert_allclose(along.numpy(), 0.0, atol=1e-11 * temperature)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_gradient_by_the_temperature_is_minus_the_divergence(temperature: float) -> None:
    q = torch.tensor([1.0, 0.5, -2.0])
    prior = np.array([0.25, 0.25, 0.5])
    alpha = torch.tensor(temperature, requires_grad=True)
    (got,) = torch.autograd.grad(soft_value(q, log(prior), alpha), alpha)
    with mpmath.workdps(oracles.DIGITS):
        step = mpmath.mpf(10) ** -25
        high, low = (
            oracles.mp_soft_backup(
                [1, 0.5, -2], prior.tolist(), mpmath.mpf(temperature) + sign * step
            )
            for sign in (1, -1)
        )
        exact = float((high - low) / (2 * step))
    # It is a difference of order one at any temperature.
    assert float(got) == pytest.approx(exact, rel=1e-9, abs=1e-15)


def test_gradients_at_temperature_zero_belong_to_the_best_action() -> None:
    q = torch.tensor([[1.0, 3.0, 9.0]], requires_grad=True)
    value = soft_value(q, log(np.array([[0.5, 0.5, 0.0]])), 0.0)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert gradient.tolist() == [[0.0, 1.0, 0.0]]


@LIGHT
@given(oracles.finite_tables(scales=(1.0,)), st.sampled_from([0.5, 2.0]))
def test_backups_pass_gradcheck(tables: Tables, temperature: float) -> None:
    model = model_of(tables)
    v = torch.linspace(-1, 1, tables.states, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: control_q(model, v), (v,))

    def evidence(v: Tensor) -> Tensor:
        q = posterior_q(model, v, temperature)
        return torch.where(model.is_terminal.unsqueeze(-1), 0.0, q)

    assert torch.autograd.gradcheck(evidence, (v,))
    q = torch.where(model.is_terminal.unsqueeze(-1), 0.0, control_q(model, v)).detach()
    # A shared offset keeps ties tied, where the maximum alone would have no derivative.
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: soft_value(q, model.log_prior, temperature), (q,))
    assert torch.autograd.gradcheck(lambda q: soft_policy(q, model.log_prior, temperature), (q,))


# --- The message after a step, and the posterior --------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 1e-12, 0.3, 0.99, 1 - 1e-12, 1.0])
def test_survival_message_in_sixty_digits(discount: float) -> None:
    values = [-1e6, -800.0, -1.0, -0.4, -1e-9, 0.0, 1e-15, 0.4, 0.6, 30.0, 800.0, 1e6]
    v = torch.tensor(values, requires_grad=True)
    got = survival_message(v, discount)
    with mpmath.workdps(2000):  # exp(1e6) is added to one
        gamma = mpmath.mpf(discount)
        exact = [float(mpmath.log(1 - gamma + gamma * mpmath.exp(x))) for x in values[1:-1]]
    np.testing.assert_allclose(got.detach().numpy()[1:-1], exact, rtol=1e-14, atol=1e-300)
    with np.errstate(divide="ignore"):
        ends = [np.log1p(-discount) if discount < 1 else -1e6, 1e6 + np.log(discount)]
    if discount > 0:
        np.testing.assert_allclose(got.detach().numpy()[[0, -1]], ends, rtol=1e-15)
    if discount > 0:
        (gradient,) = torch.autograd.grad(got.sum(), v)
        assert torch.isfinite(gradient).all()
        chance = [
            float(mpmath.mpf(discount) * mpmath.exp(x) / mpmath.exp(e))
            for x, e in zip(values[1:-1], exact, strict=True)
        ]
        np.testing.assert_allclose(gradient.numpy()[1:-1], chance, rtol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_posterior_q_in_sixty_digits(discount: float, temperature: float) -> None:
    """Relative to the rewards, which at a high temperature are next to nothing in nats."""
    random = np.random.default_rng(0)
    transition = np.array([[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [2.0**-900, 1.0]]])
    reward, v = random.normal(size=(2, 2, 2)), random.normal(size=2) / temperature
    model = FiniteModel.from_tables(transition, reward, discount=discount)
    got = posterior_q(model, torch.as_tensor(v), temperature).numpy()
    with mpmath.workdps(oracles.DIGITS):
        gamma, alpha = mpmath.mpf(discount), mpmath.mpf(temperature)
        for s, a in np.ndindex(2, 2):
            terms = [
                mpmath.mpf(float(transition[s, a, x]))
                * mpmath.exp(mpmath.mpf(float(reward[s, a, x])) / alpha)
                * (1 - gamma + gamma * mpmath.exp(mpmath.mpf(float(v[x]))))
                for x in range(2)
            ]
            exact = mpmath.log(mpmath.fsum(terms))
            assert abs(float(got[s, a] - exact)) <= 1e-14 * 3 / temperature


def test_posterior_q_takes_rows_at_their_word() -> None:
    """Rows are checked to 1e-6 and never repaired: what is missing lowers the evidence."""
    transition = np.array([[[0.5, 0.5 - 4e-7]], [[0.0, 1.0]]])
    model = FiniteModel.from_tables(transition, np.array([[1.0], [0.0]]))
    got = posterior_q(model, torch.zeros(2), 2.0)
    assert float(got[0, 0]) == pytest.approx(0.5 + np.log1p(-4e-7), abs=1e-15)


# --- The NumPy operators --------------------------------------------------------------------------


def model_of(tables: Tables) -> FiniteModel:
    return FiniteModel.from_tables(
        tables.transition,
        tables.stopped().reward,
        discount=tables.discount,
        prior=tables.prior,
        terminal=tables.terminal,
    )


def operators(model: FiniteModel, temperature: float) -> tuple[ControlBackup, PosteriorBackup]:
    terminal, log_prior = model.is_terminal.numpy(), model.log_prior.numpy()
    log_prior = np.where(terminal[:, None], -np.log(model.num_actions), log_prior)
    mass = model.row_sum(model.probabilities).numpy()[~terminal]
    control = ControlBackup(
        model.csr,
        model.expected_reward().numpy(),
        log_prior,
        mass,
        terminal=terminal,
        discount=model.discount,
        temperature=temperature,
    )
    weight = (model.rewards / temperature).numpy() if temperature > 0 else model.rewards.numpy()
    posterior = PosteriorBackup(
        model.csr, weight, log_prior, terminal=terminal, discount=model.discount
    )
    return control, posterior


@LIGHT
@given(oracles.finite_tables(), st.sampled_from([0.0, *TEMPERATURES]), st.integers(0, 9))
def test_control_agrees_with_its_numpy_operator(
    tables: Tables, temperature: float, seed: int
) -> None:
    """T V within both roundings, and the derivative of T is the autodiff of ours."""
    assume(not tables.terminal.all())
    model = model_of(tables)
    scale = float(np.abs(tables.reward).max()) or 1.0
    start = scale * np.random.default_rng(seed).normal(size=tables.states)
    start[tables.terminal] = 0.0
    operator, _ = operators(model, temperature)
    theirs = operator(start)
    v = torch.tensor(start, requires_grad=True)
    q = control_q(model, v)
    ours = torch.where(model.is_terminal, 0.0, soft_value(q, model.log_prior, temperature))
    rounding = operator.rounding(start, theirs)
    np.testing.assert_allclose(theirs, ours.detach().numpy(), rtol=0, atol=2 * rounding)
    assert rounding <= 1e-12 * scale * (1 + tables.actions)
    if temperature >= 1e-3 * scale:  # below, rounding of Q decides between actions
        rows = [torch.autograd.grad(x, v, retain_graph=True)[0] for x in ours]
        jacobian = operator.derivative(start, theirs).toarray()
        live = np.ix_(~tables.terminal, ~tables.terminal)
        np.testing.assert_allclose(jacobian[live], torch.stack(rows).numpy()[live], atol=1e-11)


@LIGHT
@given(
    oracles.finite_tables(scales=(1e-3, 1.0, 100.0)),
    st.sampled_from([0.1, 1.0, 1e3]),
    st.integers(0, 9),
)
def test_posterior_agrees_with_its_numpy_operator(
    tables: Tables, temperature: float, seed: int
) -> None:
    assume(not tables.terminal.all())
    model = model_of(tables)
    start = np.random.default_rng(seed).normal(size=tables.states)
    start[tables.terminal] = 0.0
    _, operator = operators(model, temperature)
    theirs = operator(start)
    v = torch.tensor(start, requires_grad=True)
    q = torch.where(model.is_terminal.unsqueeze(-1), 0.0, posterior_q(model, v, temperature))
    ours = torch.where(model.is_terminal, 0.0, soft_value(q, model.log_prior, 1.0))
    rounding = operator.rounding(start, theirs)
    np.testing.assert_allclose(theirs, ours.detach().numpy(), rtol=0, atol=2 * rounding)
    expected = np.zeros((tables.states, tables.states))
    if tables.discount > 0:  # else nothing depends on V
        rows = [torch.autograd.grad(x, v, retain_graph=True)[0] for x in ours]
        expected = torch.stack(rows).numpy()
    jacobian = operator.derivative(start, theirs).toarray()
    live = np.ix_(~tables.terminal, ~tables.terminal)
    np.testing.assert_allclose(jacobian[live], expected[live], rtol=1e-9, atol=1e-11)
