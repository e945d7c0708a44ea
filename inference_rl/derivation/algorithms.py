"""Other ways to the solution: path consistency, reweighting, a tuned temperature, fixed width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from inference_rl import decision
from inference_rl.derivation import assumptions, quadrature
from inference_rl.derivation.control import allowed, log_ratio
from inference_rl.derivation.evidence import some_rollouts
from inference_rl.derivation.independent import Array, divergence, soft_policy
from inference_rl.derivation.step import (
    Assumption,
    Check,
    DoesNotApplyError,
    Estimate,
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
from inference_rl.finite_messages import control_messages, first_step, posterior_messages
from inference_rl.inference.fixed_width import boltzmann, considered
from inference_rl.inference.pcl import path_residual, residual_loss
from inference_rl.squashed_normal import SquashedNormal
from inference_rl.temperature import Tuned

# --- Path consistency -----------------------------------------------------------------------------

WINDOW = 5
"""Steps of a path."""

WALKS = 40


def _log_ratio(subject: Subject, *, with_prior: bool = True) -> Array:
    """log π*/ρ of exact inference, (S, A), or log π*; zero for what is forbidden."""
    ratio, prior = log_ratio(subject), subject.tables.prior
    return ratio if with_prior else ratio + np.log(np.where(prior > 0, prior, 1.0))


def _walks(subject: Subject) -> tuple[Array, Array, Array]:
    """States (d + 1, N), actions (d, N) of walks at random, and whether they go on (d, N)."""
    tables, generator = subject.tables, subject.generator("walks")
    live = np.flatnonzero(tables.live)
    states = [live[generator.integers(len(live), size=WALKS)]]
    actions, alive = [], []
    for _ in range(WINDOW):
        here = states[-1]
        going = tables.live[here]
        noise = generator.uniform(size=tables.prior[here].shape)
        action = np.where(tables.prior[here] > 0, noise, -1.0).argmax(-1)
        first = tables.moves.indptr[here * tables.prior.shape[1] + action]
        reached = tables.moves.indices[np.where(going, first, 0)]
        after = np.where(going, reached, here)
        states.append(after)
        actions.append(action)
        alive.append(going)
    return np.stack(states), np.stack(actions), np.stack(alive)


def _walked_value(subject: Subject, *, with_prior: bool = True) -> Array:
    """V(s_0) by the library's path residual along walks, (N,): what was paid, and V at the end."""
    states, actions, alive = _walks(subject)
    tables, value = subject.tables, subject.control.v.numpy()
    ratio = _log_ratio(subject, with_prior=with_prior)
    rate = (tables.gain - subject.temperature * ratio)[states[:-1], actions]
    after = np.where(tables.live[states[1:]], value[states[1:]], 0.0)
    residual = path_residual(
        torch.as_tensor(np.where(alive, rate, 0.0)),
        torch.as_tensor(value[states[:-1]]),
        torch.as_tensor(after),
        torch.as_tensor(alive & ~tables.live[states[1:]]),
        discount=tables.discount,
        window=WINDOW,
    )
    return np.asarray(residual[0]) + value[states[0]]


def _expected_step(subject: Subject, *, with_prior: bool = True) -> Array:
    """E[r − α log π*/ρ + γ V(s')] of every action, with the library's V and π*: (S, A)."""
    tables = subject.tables
    ratio = _log_ratio(subject, with_prior=with_prior)
    step = tables.action_value(subject.control.v.numpy()) - subject.temperature * ratio
    return allowed(subject, step)


def _walk_names(subject: Subject) -> Sequence[str]:
    states, _, alive = _walks(subject)
    return [
        f"from {subject.label('state', int(s))}, {int(going.sum())} steps"
        for s, going in zip(states[0], alive.T, strict=True)
    ]


CONSISTENCY = Step(
    id="path-consistency",
    title="Every path has the same weight",
    explanation=(
        "At the solution it does not matter which actions are taken: what an action loses in value "
        "its low probability makes up for, to the last digit. So along any path, from wherever it "
        "came, reward less α log π/ρ, plus the value at its end, is the value at its start. Path "
        "consistency learning minimises the square of what is missing. Where outcomes are random "
        "it holds for one step, on average over them."
    ),
    formulas=(
        r"V(s_0) = \sum_{t < d} \gamma^t \left[ r_t - \alpha \log"
        r" \frac{\pi^*(a_t \mid s_t)}{\rho(a_t \mid s_t)} \right] + \gamma^d\, V(s_d)",
        r"V(s) = \mathbb{E}_{s'}\left[ r + \gamma\, V(s') \right]"
        r" - \alpha \log \frac{\pi^*(a \mid s)}{\rho(a \mid s)}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.deterministic,),
            left=Side(
                "the value of the first state, by soft policy iteration",
                lambda subject: subject.best_value[_walks(subject)[0][0]],
            ),
            right=Side(
                f"the library's path residual along {WALKS} walks at random of {WINDOW} steps, "
                "with V and the policy of exact inference",
                _walked_value,
            ),
            twin=Twin(
                "log π in place of log π/ρ: the prior is left out",
                "right",
                lambda subject: _walked_value(subject, with_prior=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=(_walk_names,),
        ),
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the value of the state, by soft policy iteration, whatever the action",
                lambda subject: allowed(
                    subject,
                    np.broadcast_to(subject.best_value[:, None], subject.tables.prior.shape),
                ),
            ),
            right=Side(
                "one step of every action, averaged over outcomes, with V and the policy of exact "
                "inference",
                _expected_step,
            ),
            twin=Twin(
                "log π in place of log π/ρ: the prior is left out",
                "right",
                lambda subject: _expected_step(subject, with_prior=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state", "action"),
        ),
    ),
    reference="Nachum et al. (2017), arXiv:1702.08892, §4 (theorem 1 and corollary 2)",
    about=path_residual,
)


def _some_step(subject: Subject) -> tuple[Array, Array, Array, Array]:
    """Of every non-zero of the whole: its row, its chance, r + γ V(s') and the rest of C, at some V
    and some policy, reward units."""
    whole, tables = subject.whole, subject.tables
    value = subject.other_value
    rows, chances = whole.rows().numpy(), whole.probabilities.numpy()
    after = whole.rewards.numpy() + tables.discount * value[whole.successors.numpy()]
    taken = np.where(tables.prior > 0, subject.policy, 1.0)
    habit = np.where(tables.prior > 0, tables.prior, 1.0)
    rest = -subject.temperature * np.log(taken / habit) - value[:, None]
    return rows, chances, after, rest


def _mean_loss(subject: Subject) -> Array:
    """E_{s'} ½C² of every action, by the library's loss on each outcome, (S, A)."""
    whole, tables = subject.whole, subject.tables
    rows, chances, _, _ = _some_step(subject)
    value = torch.as_tensor(subject.other_value)
    taken = np.where(
        tables.prior > 0, subject.policy / np.where(tables.prior > 0, tables.prior, 1), 1
    )
    cost = subject.temperature * torch.as_tensor(np.log(taken)).flatten()[torch.as_tensor(rows)]
    state = torch.as_tensor(rows) // tables.prior.shape[1]
    residual = path_residual(
        (whole.rewards - cost).unsqueeze(0),
        value[state].unsqueeze(0),
        value[whole.successors.long()].unsqueeze(0),
        torch.ones(1, len(rows), dtype=torch.bool),
        discount=tables.discount,
        window=1,
    )
    weight = torch.ones(residual.shape, requires_grad=True)
    # The loss adds up; its derivative by the weights has it of every outcome.
    (losses,) = torch.autograd.grad(residual_loss(residual, weight), weight)
    total = np.bincount(rows, chances * losses[0].numpy(), minlength=tables.prior.size)
    return allowed(subject, total.reshape(tables.prior.shape))


def _loss_of_mean(subject: Subject, *, with_variance: bool = True) -> Array:
    """½(E C)² + ½ Var C, by moments, (S, A)."""
    tables = subject.tables
    rows, chances, after, rest = _some_step(subject)
    size = tables.prior.size
    mean = np.bincount(rows, chances * after, minlength=size)
    spread = np.bincount(rows, chances * (after - mean[rows]) ** 2, minlength=size)
    centre = mean.reshape(rest.shape) + rest
    variance = spread.reshape(rest.shape) if with_variance else 0.0
    return allowed(subject, (centre**2 + variance) / 2)


PATH_NOISE = Step(
    id="path-noise",
    title="What a sampled outcome costs",
    explanation=(
        "Where outcomes are random, the residual of a sampled step is not zero even at the "
        "solution, and its square is too large on average by the variance of what comes next. So "
        "whoever minimises it pays for certainty too, and does not find the soft value. An average "
        "over outcomes inside the square would cure it, but needs to know them."
    ),
    formulas=(
        r"\mathbb{E}_{s'}\left[ \frac{1}{2} C^2 \right] = \frac{1}{2} \left( \mathbb{E}_{s'} C"
        r" \right)^2 + \frac{1}{2} \mathrm{Var}_{s'}\left[ r + \gamma\, V(s') \right]",
        r"C = r - \alpha \log \frac{\pi(a \mid s)}{\rho(a \mid s)} + \gamma\, V(s') - V(s)",
    ),
    relation="=",
    unit="",
    assumptions=(assumptions.noisy,),
    checks=(
        Check(
            left=Side(
                "the library's loss on every outcome of every action, weighted by its chance, at "
                "some V and some policy; reward units squared",
                _mean_loss,
            ),
            right=Side("the square of the mean, and the variance, by moments", _loss_of_mean),
            twin=Twin(
                "the variance is left out: the mean of squares is taken for the square of the mean",
                "right",
                lambda subject: _loss_of_mean(subject, with_variance=False),
                blind=lambda subject: (
                    None
                    if np.nanmax(_mean_loss(subject) - _loss_of_mean(subject, with_variance=False))
                    > 1e-9
                    else "all outcomes of an action are worth the same"
                ),
            ),
            tolerance=1e-9,
            over=("state", "action"),
        ),
    ),
    reference="Antos et al. (2008), doi:10.1007/s10994-007-5038-2, §3; Nachum et al. (2017), §4",
    about=residual_loss,
)


# --- Reweighting ----------------------------------------------------------------------------------


def _returns(subject: Subject) -> tuple[Array, Array]:
    """Returns of trajectories, (N,), and log q of them, which sums to one."""
    if subject.finite is None:
        rollouts = some_rollouts(subject)
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


# --- The temperature ------------------------------------------------------------------------------


def _slope(subject: Subject) -> float:
    """dJ/dα of exact inference, by autograd through the fixed point, nats."""
    temperature = torch.tensor(subject.temperature, requires_grad=True)
    objective: Any = subject.anywhere.initial @ control_messages(subject.whole, temperature).v
    if not objective.requires_grad:
        return 0.0
    (slope,) = torch.autograd.grad(objective, temperature)
    return float(slope)


def _paid_divergence(subject: Subject, temperature: float) -> float:
    """E Σ γ^t KL(π* ‖ ρ) along the best policy at a temperature, nats, by policy iteration."""
    tables = subject.tables
    value = subject.best_value_at(temperature)
    policy = soft_policy(tables.action_value(value), tables.prior, temperature)
    start = subject.anywhere.initial.numpy()
    return float(start @ tables.along(policy, divergence(policy, tables.prior)))


def _pays_nothing(subject: Subject) -> str | None:
    if (reason := assumptions.nothing_at_stake(subject)) is not None:
        return reason
    if _paid_divergence(subject, subject.temperature) <= 1e-9 * max(1.0, subject.size("nats")):
        return "at so high a temperature the policy is all but the prior"
    return None


SLOPE = Step(
    id="temperature-dual",
    title="The temperature is a dual variable",
    explanation=(
        "What does the best objective lose if the temperature rises a little? Exactly the nats "
        "that its policy pays, though the policy changes too: at the optimum, to first order, that "
        "costs nothing. So the temperature is the price of a constraint on the divergence from the "
        "prior, or, under a uniform prior, on the entropy."
    ),
    formulas=(
        r"\frac{\mathrm{d}}{\mathrm{d} \alpha}\, \mathbb{E}\left[ V_\alpha(s_0) \right] ="
        r" - \mathbb{E}_{\pi^*_\alpha} \sum_t \gamma^t\, \mathrm{KL}\left( \pi^*_\alpha \,\|\, \rho"
        r" \right)",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side("autograd through exact inference, by the implicit function theorem", _slope),
            right=Side(
                "the divergence of the best policy, summed along its trajectories by a linear "
                "solve, with the sign turned",
                lambda subject: -_paid_divergence(subject, subject.temperature),
            ),
            twin=Twin(
                "the sign is wrong: randomness is taken for a gain, as in the entropy form",
                "right",
                lambda subject: _paid_divergence(subject, subject.temperature),
                blind=_pays_nothing,
            ),
            tolerance=1e-9,
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1812.05905, §5 (eqs. 11 to 18)",
    about=control_messages,
)

TEMPERATURES = (0.5, 1.5, 2.5, 4.0)
"""In multiples of the temperature, around twice that, which is the best one."""


def _dual_at_best(subject: Subject) -> Array:
    """g(2α) with the divergence at 2α for a target, by policy iteration, reward units."""
    best = 2 * subject.temperature
    value = float(subject.anywhere.initial.numpy() @ subject.best_value_at(best))
    target = _paid_divergence(subject, best)
    return np.full(len(TEMPERATURES), value + best * target)


def _dual_elsewhere(subject: Subject, *, with_target: bool = True) -> Array:
    """g at other temperatures, with the same target, by the library."""
    target = _paid_divergence(subject, 2 * subject.temperature) if with_target else 0.0
    found = []
    for factor in TEMPERATURES:
        temperature = factor * subject.temperature
        value = subject.control_at(temperature).v
        found.append(float(subject.anywhere.initial @ value) + temperature * target)
    return np.array(found)


def _temperature_names(subject: Subject) -> Sequence[str]:
    return [f"temperature {factor * subject.temperature:.3g}" for factor in TEMPERATURES]


OPTIMUM = Step(
    id="temperature-optimum",
    title="Tuning the temperature to a target",
    explanation=(
        "Of all policies that pay at most a given number of nats, which earns most? The best one "
        "at some temperature, and that is where the dual is least: it is convex, and its slope is "
        "the target less what the policy pays. Soft actor-critic's automatic temperature descends "
        "on it. Here the target is what the best policy pays at twice the temperature, so that no "
        "other temperature can do better than that one."
    ),
    formulas=(
        r"g(\alpha) = \mathbb{E}\left[ V_\alpha(s_0) \right] + \alpha\, D, \qquad"
        r" g'(\alpha) = D - \mathbb{E}_{\pi^*_\alpha} \sum_t \gamma^t\, \mathrm{KL}\left("
        r" \pi^*_\alpha \,\|\, \rho \right)",
        r"g(\alpha^*) \le g(\alpha), \qquad \mathrm{KL}(\pi^*_{\alpha^*}) = D",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the dual where the target is met, by soft policy iteration and a linear solve",
                _dual_at_best,
            ),
            right=Side("the dual at other temperatures, by exact inference", _dual_elsewhere),
            twin=Twin(
                "the target is left out of the dual, and the temperature runs away",
                "right",
                lambda subject: _dual_elsewhere(subject, with_target=False),
                blind=assumptions.nothing_at_stake,
            ),
            tolerance=1e-9,
            over=(_temperature_names,),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1812.05905, §5; Boyd and Vandenberghe (2004), §5.2",
    about=Tuned.update,
)


# --- Guides of fixed width ------------------------------------------------------------------------

NARROW = 1e-4
"""Width of the guide where it is nearly a point."""

WIDE = 0.3


def _means(subject: Subject) -> Tensor:
    """Of some guide in a few states, before the tanh, (N, d)."""
    size = int(np.prod(subject.model.action_space.shape or ()))
    draws = subject.generator("means").normal(size=(quadrature.STARTS, size))
    return torch.as_tensor(draws / 2)


def _fixed_width(
    subject: Subject, mean: Tensor, width: float, temperature: float, draws: int
) -> decision.Decision:
    """The library's decision by draws of tanh N(mean, width²), (K, N)."""

    def guide(state: Tensor, step: Tensor) -> Any:
        return SquashedNormal(mean, torch.full_like(mean, width)).to_event(1)

    states = quadrature.states_of(subject)
    return considered(
        guide,  # type: ignore[arg-type]
        subject.prior,
        quadrature.SomeMessage(subject),
        states,
        torch.zeros(len(states), dtype=torch.long),
        temperature=torch.tensor(temperature),
        action_space=subject.model.action_space,
        draws=draws,
    )


def _narrow_gradient(subject: Subject) -> Tensor:
    """∂/∂μ of the mean Q under a guide that is nearly a point, at temperature zero, (N, d)."""
    mean = _means(subject).requires_grad_()
    found = _fixed_width(subject, mean, NARROW, 0.0, 2000)
    q = found.temperature * found.log_weight
    (gradient,) = torch.autograd.grad(q.mean(0).sum(), mean)
    return gradient


def _deterministic_gradient(subject: Subject, *, through_tanh: bool = True) -> Tensor:
    """∂ tanh μ · ∇_a Q at a = tanh μ, by hand: DDPG's, (N, d)."""
    message = quadrature.SomeMessage(subject)
    action = torch.tanh(_means(subject))
    size = action.shape[-1]
    slope = message.scale / size * (-3 * torch.sin(3 * action + message.phase) + message.slope)
    return slope * (1 - action.square()) if through_tanh else slope


def _coordinates(subject: Subject) -> Sequence[str]:
    size = int(np.prod(subject.model.action_space.shape or ()))
    return [f"coordinate {i + 1}" for i in range(size)]


WIDTH_LIMIT = Step(
    id="fixed-width-limit",
    title="Soft DDPG and TD3: guides of fixed width, and their limit",
    explanation=(
        "Let the guide be a Gaussian of fixed width, squashed into the box, and learn its mean "
        "only. Its bound is still a bound. As the width and the temperature go to zero the guide "
        "becomes a point, and the gradient of its bound becomes the deterministic policy gradient "
        "of DDPG and TD3. What they add, a second Q and noise on the target, is no part of the "
        "inference."
    ),
    formulas=(
        r"q(a \mid s) = \mathcal{L}\left( \tanh(\mu(s) + \sigma \varepsilon) \right), \qquad"
        r" \varepsilon \sim \mathcal{N}(0, 1)",
        r"\lim_{\sigma \to 0} \nabla_\mu\, \mathbb{E}_q\left[ Q(s, a) \right] ="
        r" \frac{\partial \tanh \mu}{\partial \mu} \cdot \nabla_a Q(s, a) \Big|_{a = \tanh \mu}",
    ),
    relation="=",
    unit="reward",
    assumptions=(assumptions.box,),
    checks=(
        Check(
            left=Side(
                f"autograd through the library's program of one decision, width {NARROW:g} and "
                "temperature zero, of some Q",
                _narrow_gradient,
            ),
            right=Side(
                "the deterministic policy gradient at the mean, by hand", _deterministic_gradient
            ),
            twin=Twin(
                "the derivative of the tanh is forgotten",
                "right",
                lambda subject: _deterministic_gradient(subject, through_tanh=False),
            ),
            # Of first order in the width, for few draws.
            tolerance=100 * NARROW,
            over=(quadrature.names, _coordinates),
        ),
    ),
    reference="Lillicrap et al. (2016), arXiv:1509.02971, §3; Silver et al. (2014), theorem 2",
    about=considered,
)


def _width_bounds(subject: Subject, *, mean_q: bool = False) -> Estimate:
    """E_q[Q − α log q/ρ] of two guides of fixed width, (2, N); or the posterior's mean of Q."""
    found = []
    for width in (WIDE / 3, WIDE):
        drawn = _fixed_width(subject, _means(subject), width, subject.temperature, 4000)
        gain = drawn.temperature * (drawn.log_weight - (drawn.log_guide - drawn.log_prior))
        estimate = Estimate.of(gain)
        if mean_q:
            estimate = Estimate(boltzmann(drawn, drawn.log_guide), estimate.standard_error)
        found.append(estimate)
    return Estimate(
        np.array([part.value for part in found]),
        np.array([part.standard_error for part in found]),
    )


def _evidence_twice(subject: Subject) -> Estimate:
    whole = quadrature.evidence(subject)
    return Estimate(np.array([whole.value] * 2), np.array([whole.standard_error] * 2))


WIDTH_BOUND = Step(
    id="fixed-width-bound",
    title="What a fixed width cannot reach",
    explanation=(
        "A guide of fixed width has a bound like any other, and it stays below the soft value by "
        "the temperature times its divergence from the posterior of the decision. A posterior with "
        "several hills, or of another width, is out of its reach. The mean of Q under the "
        "posterior, which some backups take, is no bound: it pays for no divergence and lies above."
    ),
    formulas=(
        r"\mathbb{E}_q\left[ Q - \alpha \log \frac{q}{\rho} \right]"
        r" = V - \alpha\, \mathrm{KL}\left( q \,\|\, \rho\, e^{(Q - V) / \alpha} \right)"
        r" \le V",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                f"the bound of guides of width {WIDE / 3:g} and {WIDE:g}, by draws of the "
                "library's program of one decision",
                _width_bounds,
            ),
            right=Side("V, by Gauss-Legendre quadrature", _evidence_twice),
            twin=Twin(
                "the posterior's mean of Q is taken for a bound (a Boltzmann backup)",
                "left",
                lambda subject: _width_bounds(subject, mean_q=True),
                blind=assumptions.too_coarse,
            ),
            tolerance=1e-8,
            over=((f"width {WIDE / 3:g}", f"width {WIDE:g}"), quadrature.names),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, §4; Pan et al. (2020), arXiv:2010.09177",
    about=boltzmann,
)

STEPS = (
    CONSISTENCY,
    PATH_NOISE,
    REPS_DUAL,
    EM,
    SLOPE,
    OPTIMUM,
    WIDTH_LIMIT,
    WIDTH_BOUND,
)
