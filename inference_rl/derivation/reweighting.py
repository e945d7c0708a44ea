"""Reweighting trajectories: relative entropy policy search, expectation maximisation."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from inference_rl.derivation import assumptions
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import (
    Assumption,
    Check,
    DoesNotApplyError,
    Side,
    Step,
    Twin,
)
from inference_rl.derivation.subject import Subject
from inference_rl.distributions import log_or_impossible
from inference_rl.duals import (
    EpisodicDual,
    episodic_dual,
    solve_episodic,
)
from inference_rl.finite_messages import first_step, posterior_messages


def _returns(subject: Subject) -> tuple[Array, Array]:
    """Returns of trajectories, (N,), and log q of them, which sums to one."""
    if subject.finite is None:
        rollouts = subject.rollouts("guide")
        reward = (subject.temperature * rollouts.log_weight).sum(0).numpy()
        return reward, np.full(len(reward), -np.log(len(reward)))
    log_q = subject.paths.log_chance(subject.some_policy(subject.excerpt))
    return subject.paths.rewards.sum(0), log_q


def _epsilon(subject: Subject) -> float:
    """Half of what the best weighting of all is away, nats."""
    returns, log_q = _returns(subject)
    best = returns >= returns.max() - 1e-9 * np.abs(returns).max()
    return -float(logsumexp(log_q[best])) / 2


def _reweighted(subject: Subject) -> EpisodicDual:
    returns, log_q = _returns(subject)
    if len(returns) < 2 or np.ptp(returns) <= 1e-9 * np.abs(returns).max():
        raise DoesNotApplyError("all trajectories earn the same, so that none is to be preferred")
    return solve_episodic(returns, _epsilon(subject), log_q)


def _primal(subject: Subject) -> float:
    """The mean return under the library's weights."""
    return float(_reweighted(subject).weights @ _returns(subject)[0])


def _least_dual(subject: Subject, *, normalised: bool = True) -> float:
    """The minimum of ηε + η log E_q e^{R/η} over η, by a search along a line."""
    returns, log_q = _returns(subject)
    epsilon, top = _epsilon(subject), returns.max()
    if not normalised:
        log_q = np.zeros_like(log_q)

    def dual(log_eta: float) -> float:
        eta = np.exp(log_eta)
        return float(top + eta * (epsilon + logsumexp(log_q + (returns - top) / eta)))

    # The minimum is where KL = ε, which lies between these temperatures for a bounded return.
    scale = np.log(np.ptp(returns))
    grid = scale + np.linspace(-9, 9, 400)
    start = int(np.argmin([dual(x) for x in grid]))
    low, high = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
    return float(
        minimize_scalar(dual, (low, high), bounds=(low, high), options={"xatol": 1e-10}).fun
    )


def _reps_check(need: Assumption) -> Check:
    return Check(
        needs=(need,),
        left=Side(
            "the mean return under the library's weights of trajectories, with ε half of what is "
            "possible",
            _primal,
        ),
        right=Side("the least value of the dual, by a search along a line", _least_dual),
        twin=Twin(
            "a sum for the mean in the dual: log N too much",
            "right",
            lambda subject: _least_dual(subject, normalised=False),
        ),
        tolerance=1e-8,
    )


REPS_DUAL = Step(
    id="reps-dual",
    title="REPS: reweighting within a divergence, and its dual",
    explanation=(
        "Relative entropy policy search asks for the weighting of a sample with the largest mean "
        "return, among those within ε nats of it. The answer is a posterior again, w ∝ q e^{R/η}, "
        "and its temperature η is not chosen but found: it minimises a convex dual, whose least "
        "value is the mean return that was looked for. So a bound on the divergence and a price on "
        "it are two ways to say the same."
    ),
    formulas=(
        r"\max_w \left\{ \mathbb{E}_w[R] \;:\; \mathrm{KL}(w \,\|\, q) \le \varepsilon \right\}"
        r" = \min_{\eta > 0} \left\{ \eta\, \varepsilon + \eta \log \mathbb{E}_q\left[ e^{R / \eta}"
        r" \right] \right\}",
        r"w(\tau) \propto q(\tau)\, e^{R(\tau) / \eta}",
    ),
    relation="=",
    unit="reward",
    checks=(
        _reps_check(assumptions.listable),
        _reps_check(assumptions.drawn),
    ),
    reference="Peters et al. (2010), AAAI; Deisenroth et al. (2013), §2.4.3",
    about=solve_episodic,
)


def _log_expected(subject: Subject) -> float:
    """log E_q e^{R/η} of some policy, from the library's dual, at η = α; nats."""
    returns, log_q = _returns(subject)
    if len(returns) < 2:
        raise DoesNotApplyError("there is but one trajectory")
    return episodic_dual(subject.temperature, returns, 1.0, log_q)[0] / subject.temperature - 1.0


def _maximised(subject: Subject, *, towards: bool = True) -> float:
    """The same of the policy that fits the weighted trajectories best, by messages; nats."""
    paths, model = subject.paths, subject.excerpt
    returns, log_q = _returns(subject)
    log_weight = log_q + returns / subject.temperature
    weight = np.exp(log_weight - logsumexp(log_weight))
    shape = (model.num_states, model.num_actions)
    cell = paths.states[:-1] * shape[1] + paths.actions
    counts = np.bincount(
        cell[paths.alive],
        np.broadcast_to(weight, cell.shape)[paths.alive],
        minlength=shape[0] * shape[1],
    ).reshape(shape)
    total, policy = counts.sum(-1, keepdims=True), subject.some_policy(model)
    fitted = np.where(total > 0, counts / np.where(total > 0, total, 1.0), policy)
    if not towards:
        fitted = policy**2 / np.maximum(fitted, 1e-100)
        fitted /= fitted.sum(-1, keepdims=True)
    refitted = model.replace(log_prior=log_or_impossible(torch.as_tensor(fitted)))
    messages = posterior_messages(refitted, subject.temperature)
    start = model.initial.log() + first_step(messages.v)
    return float(start[model.initial > 0].logsumexp(0))


def _same_returns(subject: Subject) -> str | None:
    returns, _ = _returns(subject)
    if np.ptp(returns) <= 1e-9 * max(np.abs(returns).max(), 1e-300):
        return "all trajectories earn the same"
    return assumptions.no_choice(subject)


EM = Step(
    id="expectation-maximisation",
    title="Expectation maximisation never loses",
    explanation=(
        "Weigh trajectories by e^{R/η}, and fit the policy to them by maximum likelihood: that is "
        "one round of expectation maximisation, for a policy that is a parameter and not a guide. "
        "The chance of success under the policy only grows. Without a price for leaving habits it "
        "goes on to the luckiest of policies, which is why REPS bounds every round."
    ),
    formulas=(
        r"w(\tau) \propto q_\pi(\tau)\, e^{R(\tau) / \eta}, \qquad \pi' ="
        r" \operatorname{argmax}_{\pi'} \sum_\tau w(\tau) \sum_t \log \pi'(a_t \mid s_t)",
        r"\log \mathbb{E}_{q_\pi}\left[ e^{R / \eta} \right]"
        r" \le \log \mathbb{E}_{q_{\pi'}}\left[ e^{R / \eta} \right]",
    ),
    relation="<=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "some policy: over every single trajectory, from the library's dual", _log_expected
            ),
            right=Side(
                "the policy fitted to weighted trajectories: by backward messages", _maximised
            ),
            twin=Twin(
                "the fit moves away from the weighted trajectories in place of towards them",
                "right",
                lambda subject: _maximised(subject, towards=False),
                blind=_same_returns,
            ),
        ),
    ),
    reference="Dayan and Hinton (1997), doi:10.1162/neco.1997.9.2.271; Levine (2018), §4.3",
    about=episodic_dual,
)


STEPS = (
    REPS_DUAL,
    EM,
)
