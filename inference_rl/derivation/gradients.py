"""How routines climb the bound: policy gradients, soft policy iteration, SAC and SQL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_rl import decision
from inference_rl.backups import control_q
from inference_rl.backups import soft_policy as library_policy
from inference_rl.decision import decide
from inference_rl.derivation import assumptions, quadrature, sampled
from inference_rl.derivation.control import allowed, live
from inference_rl.derivation.evidence import action_names, decision_names, decisions
from inference_rl.derivation.independent import Array, divergence, soft_policy, soft_value
from inference_rl.derivation.step import Assumption, Check, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.distributions import log_or_impossible
from inference_rl.inference.off_policy import residual_loss, soft_target
from inference_rl.inference.policy_gradient import advantages, score_loss
from inference_rl.policies import TabularPolicy

BATCHES = 40
"""Of drawn trajectories, from whose gradients a standard error is taken."""

# --- The policy gradient --------------------------------------------------------------------------


def _logits(subject: Subject) -> Tensor:
    """Of some policy of the discounted excerpt, (S, A); a leaf."""
    policy = torch.as_tensor(subject.some_policy(subject.discounted_excerpt))
    return log_or_impossible(policy).clamp(min=-1e3).requires_grad_()


def _log_policy(subject: Subject, logits: Tensor) -> Tensor:
    forbidden = subject.discounted_excerpt.log_prior == -torch.inf
    return torch.where(forbidden, -torch.inf, logits).log_softmax(-1)


def _score_gradient(subject: Subject, *, with_entropy: bool = True) -> Array:
    """∂J/∂logits as the routine has it: scores of actions, weighted by what follows them."""
    model, paths, alpha = (
        subject.discounted_excerpt,
        subject.discounted_paths,
        subject.temperature,
    )
    logits = _logits(subject)
    alive = torch.as_tensor(paths.alive)
    state, action = torch.as_tensor(paths.states[:-1]), torch.as_tensor(paths.actions)
    log_prob = torch.where(alive, _log_policy(subject, logits)[state, action], 0.0)
    log_prior = torch.where(alive, model.log_prior[state, action], 0.0)
    gained = torch.as_tensor(paths.rewards).clone()
    if with_entropy:
        gained = gained - alpha * (log_prob.detach() - log_prior)
    nothing, over = torch.zeros_like(gained), torch.zeros_like(alive)
    over[-1] = True
    to_go = advantages(
        gained, nothing, nothing, over, over, discount=model.discount, trace_decay=1.0
    )
    policy = _log_policy(subject, logits).exp().detach().numpy()
    chance = torch.as_tensor(np.exp(paths.log_chance(policy)))
    powers = model.discount ** torch.arange(len(gained)).double()
    loss = score_loss(log_prob, to_go, powers.unsqueeze(-1) * chance)
    (gradient,) = torch.autograd.grad(loss, logits)
    return _acting(subject, -gradient)


def _differentiated(subject: Subject) -> Array:
    """∂J/∂logits by autodiff through the recursion V_t = E_π[r − α log π/ρ + γ V_{t+1}]."""
    model, alpha = subject.discounted_excerpt, subject.temperature
    logits = _logits(subject)
    log_policy = _log_policy(subject, logits)
    policy = log_policy.exp()
    possible = model.log_prior > -torch.inf
    ratio = torch.where(possible, log_policy, 0.0) - torch.where(possible, model.log_prior, 0.0)
    moves = torch.as_tensor(model.csr.toarray())
    gain = (moves * _dense_rewards(subject)).sum(-1).reshape(policy.shape)
    value = torch.zeros(model.num_states)
    for _ in range(model.horizon or 0):
        q = gain + model.discount * (moves @ value).reshape(policy.shape)
        value = torch.where(model.is_terminal, 0.0, (policy * (q - alpha * ratio)).sum(-1))
    (gradient,) = torch.autograd.grad(model.initial @ value, logits)
    return _acting(subject, gradient)


def _dense_rewards(subject: Subject) -> Tensor:
    model = subject.discounted_excerpt
    table = torch.zeros(model.csr.shape)
    table[model.rows(), model.successors.long()] = model.rewards
    return table


def _acting(subject: Subject, gradient: Tensor) -> Array:
    """Of states that act and actions that are allowed; the rest is left out."""
    model = subject.discounted_excerpt
    kept = (model.log_prior > -torch.inf) & ~model.is_terminal.unsqueeze(-1)
    return np.asarray(torch.where(kept, gradient, torch.nan))


def _excerpt_names(subject: Subject) -> Sequence[str]:
    labels = subject.discounted_excerpt.state_labels
    assert labels is not None
    return [str(label) for label in labels]


def _sampled_scores(subject: Subject, name: str, *, to_go: bool, sign: float = 1.0) -> Estimate:
    """Scores of drawn trajectories, weighted by what they gained, as a mean over trajectories.

    What other trajectories gain on average from step t on is subtracted, which changes no mean.
    """
    policy = sampled.SomePolicy(subject, "guide")
    policy.weights.requires_grad_()
    rollouts = sampled.draw(subject, policy, name)
    discount, horizon = float(subject.model.discount), len(rollouts.actions)
    alpha = subject.temperature
    powers = discount ** torch.arange(horizon).double().unsqueeze(-1)
    reward, log_guide, log_prior = sampled.simulate(subject, policy, f"baseline of {name}")
    others = (powers * (reward - alpha * (log_guide - log_prior))).mean(-1, keepdim=True)
    usual = others.flip(0).cumsum(0).flip(0) / powers
    gained = alpha * (rollouts.log_weight - rollouts.log_guide + rollouts.log_prior)
    if to_go:
        over = torch.zeros_like(gained, dtype=torch.bool)
        over[-1] = True
        baseline = usual.expand(gained.shape)
        following = torch.nn.functional.pad(usual[1:], (0, 0, 0, 1)).expand(gained.shape)
        weight = powers * advantages(
            gained, baseline, following, over, over, discount=discount, trace_decay=1.0
        )
    else:
        weight = ((powers * gained).sum(0) - usual[0]).expand(horizon, -1)
    batches = []
    # A gradient for each of a few batches, so that their mean has a standard error.
    for rows in torch.arange(gained.shape[1]).chunk(BATCHES):
        log_prob = torch.stack(
            [
                torch.where(
                    rollouts.alive[t, rows],
                    policy(rollouts.states[t][rows], t).log_prob(rollouts.actions[t][rows]),
                    0.0,
                )
                for t in range(horizon)
            ]
        )
        share = torch.full_like(log_prob, -sign / len(rows))
        loss = score_loss(log_prob, weight[:, rows], share)
        batches.append(torch.autograd.grad(loss, policy.weights)[0].flatten())
    return Estimate.of(torch.stack(batches))


def _weight_names(subject: Subject) -> Sequence[str]:
    rows, columns = sampled.SomePolicy(subject, "guide").weights.shape
    return [f"feature {i}, output {j}" for i in range(rows) for j in range(columns)]


POLICY_GRADIENT = Step(
    id="policy-gradient",
    title="The policy gradient",
    explanation=(
        "The bound has a gradient that needs no derivative of the dynamics: raise the log-"
        "probability of every action by what followed it. What came before an action does not "
        "depend on it and drops out; the score of log π itself averages to zero. What follows "
        "includes the divergence that is still to be paid, which an entropy bonus for the current "
        "state alone would forget."
    ),
    formulas=(
        r"\nabla J = \mathbb{E}_\pi \sum_t \gamma^t\, \nabla \log \pi(a_t \mid s_t)\, G_t",
        r"G_t = \sum_{k \ge t} \gamma^{k - t} \left[ r_k"
        r" - \alpha \log \frac{\pi(a_k \mid s_k)}{\rho(a_k \mid s_k)} \right]",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the library's score-function loss with its rewards to go, on every single "
                "trajectory of a few steps, weighted by its chance",
                _score_gradient,
            ),
            right=Side(
                "automatic differentiation through the recursion of the policy's value",
                _differentiated,
            ),
            twin=Twin(
                "the return of rewards alone: the divergence still to be paid is forgotten",
                "left",
                lambda subject: _score_gradient(subject, with_entropy=False),
                blind=assumptions.no_choice,
            ),
            over=(_excerpt_names, "action"),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "scores of drawn trajectories with the library's rewards to go",
                lambda subject: _sampled_scores(subject, "score", to_go=True),
            ),
            right=Side(
                "scores of other trajectories with the whole return, which has the same mean",
                lambda subject: _sampled_scores(subject, "other score", to_go=False),
            ),
            twin=Twin(
                "the sign of the loss is wrong: it descends",
                "left",
                lambda subject: _sampled_scores(subject, "score", to_go=True, sign=-1.0),
                blind=assumptions.too_coarse,
            ),
            over=(_weight_names,),
        ),
    ),
    reference="Williams (1992), Machine Learning 8; Levine (2018), arXiv:1805.00909, §4.1",
    about=score_loss,
)


# --- Soft policy iteration ------------------------------------------------------------------------


def _value_of_policy(subject: Subject) -> Array:
    return subject.tables.value(subject.policy, subject.temperature)


def _value_of_prior(subject: Subject) -> Array:
    return subject.tables.value(subject.tables.prior, subject.temperature)


def _improved(subject: Subject) -> Array:
    """The value of the library's policy against the Q of the prior."""
    q = control_q(subject.whole, torch.as_tensor(_value_of_prior(subject)))
    better = library_policy(q, subject.whole.log_prior, subject.temperature)
    return subject.tables.value(better.numpy(), subject.temperature)


def _worsened(subject: Subject) -> Array:
    """The same with the wrong sign; and tilted so little that episodes still end."""
    tables = subject.tables
    q = tables.action_value(_value_of_prior(subject))
    worse = soft_policy(-q, tables.prior, max(subject.temperature, _spread(subject)))
    return tables.value(worse, subject.temperature)


def _spread(subject: Subject) -> float:
    """By how much the Q of the prior varies over actions, at most."""
    tables = subject.tables
    q = np.where(tables.prior > 0, tables.action_value(_value_of_prior(subject)), np.nan)
    q = q[tables.live]
    return float((np.nanmax(q, axis=-1) - np.nanmin(q, axis=-1)).max())


def _no_better_action(subject: Subject) -> str | None:
    if _spread(subject) <= 1e-9 * subject.size("reward"):
        return "no action is better than another in any state"
    return None


POLICY_ITERATION = Step(
    id="soft-policy-iteration",
    title="Soft policy iteration only improves",
    explanation=(
        "Evaluate a policy, and take in every state the posterior of the one decision that its Q "
        "poses. The new policy is better in every state, or it was the best one already. Repeated, "
        "this is soft policy iteration, of which soft actor-critic is a version with networks and "
        "samples."
    ),
    formulas=(
        r"\pi'(a \mid s) \propto \rho(a \mid s)\, e^{Q^\pi(s, a) / \alpha}",
        r"V^\pi(s) \le V^{\pi'}(s) \le V^*(s)",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the value of the prior as a policy, and that of the improved one, by linear "
                "solves",
                lambda subject: np.array(
                    [live(subject, _value_of_prior(subject)), live(subject, _improved(subject))]
                ),
            ),
            right=Side(
                "the value of the policy that the library improves it to, and that of the best "
                "policy, by policy iteration to the end",
                lambda subject: np.array(
                    [live(subject, _improved(subject)), live(subject, subject.best_value)]
                ),
            ),
            twin=Twin(
                "a cost is taken for a reward: the sign of Q is wrong",
                "right",
                lambda subject: np.array(
                    [live(subject, _worsened(subject)), live(subject, subject.best_value)]
                ),
                blind=_no_better_action,
            ),
            tolerance=1e-9,
            over=(("after one improvement", "in the end"), "state"),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, lemma 2 and theorem 1",
    about=library_policy,
)


def _decide_everywhere(subject: Subject, q: Tensor, policy: Tensor) -> decision.Decision:
    """The program of one decision in every state of the whole."""
    return decide(
        torch.arange(subject.whole.num_states),
        TabularPolicy(policy),
        lambda state: TabularPolicy(subject.whole.log_prior.exp())(state),
        lambda _: q.mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.whole.action_space,
        actions=decision.every_action(subject.whole.action_space),
    )


def _bound_everywhere(subject: Subject, *, with_divergence: bool = True) -> Array:
    """E_π[Q^π − α log π/ρ] in every state, by Pyro."""
    q = control_q(subject.whole, torch.as_tensor(_value_of_policy(subject)))
    policy = torch.as_tensor(subject.policy)
    if not with_divergence:
        return live(subject, np.asarray((policy * torch.where(policy > 0, q, 0.0)).sum(-1)))
    return live(subject, np.asarray(decision.bound(_decide_everywhere(subject, q, policy))[0]))


CRITIC = Step(
    id="sac-critic",
    title="SAC's critic: the bound of one decision is the value",
    explanation=(
        "Cut the program after one step, and let Q stand for that step and all that follow. The "
        "bound of that one decision is the soft value of the policy: soft actor-critic's target "
        "for Q. So every update of its critic makes one small trajectory program agree with the "
        "next."
    ),
    formulas=(
        r"Q^\pi(s, a) = \bar r(s, a) + \gamma\, \mathbb{E}_{s'}\left[ V^\pi(s') \right]",
        r"V^\pi(s) = \mathbb{E}_\pi\left[ Q^\pi(s, a)"
        r" - \alpha \log \frac{\pi(a \mid s)}{\rho(a \mid s)} \right]",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the bound of some policy by the Pyro program of one decision, with its Q as "
                "message",
                _bound_everywhere,
            ),
            right=Side(
                "the value of that policy, by a linear solve over all states",
                lambda subject: live(subject, _value_of_policy(subject)),
            ),
            twin=Twin(
                "the mean of Q alone: the divergence is left out of the value",
                "left",
                lambda subject: _bound_everywhere(subject, with_divergence=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, eqs. 2 and 3",
    about=decision.bound,
)


def _actor_gradient(subject: Subject) -> Array:
    """∂/∂logits of the bound, by autograd through the program."""
    states, prior, policy, q = decisions(subject)
    logits = log_or_impossible(torch.as_tensor(policy)).clamp(min=-1e3).requires_grad_()
    forbidden = torch.as_tensor(prior) == 0
    probs = torch.where(forbidden, -torch.inf, logits).softmax(-1)
    found = decide(
        torch.arange(len(states)),
        TabularPolicy(probs),
        lambda state: TabularPolicy(torch.as_tensor(prior))(state),
        lambda _: torch.as_tensor(q).mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
        actions=decision.every_action(subject.model.action_space),
    )
    (gradient,) = torch.autograd.grad(decision.bound(found)[0].sum(), logits)
    return np.where(prior > 0, gradient.numpy(), np.nan)


def _projection_gradient(subject: Subject, *, with_divergence: bool = True) -> Array:
    """−α ∂KL(π ‖ ρ e^{Q/α} / Z)/∂logits, by hand."""
    _, prior, policy, q = decisions(subject)
    if not with_divergence:
        slope = q - (policy * q).sum(-1, keepdims=True)
        return np.where(prior > 0, policy * slope, np.nan)
    best = soft_policy(q, prior, subject.temperature)
    ratio = np.log(np.where(prior > 0, policy, 1.0)) - np.log(np.where(prior > 0, best, 1.0))
    slope = ratio - divergence(policy, best)[:, None]
    return np.where(prior > 0, -subject.temperature * policy * slope, np.nan)


def _decision_actions(subject: Subject) -> Sequence[str]:
    count = decisions(subject)[1].shape[1]
    if subject.finite is not None:
        return action_names(subject)
    return [f"action {a}" for a in range(count)]


ACTOR = Step(
    id="sac-actor",
    title="SAC's actor: projecting onto a posterior",
    explanation=(
        "Where the policy cannot simply be set, as with a network, its bound is raised by "
        "gradients. They are those of the divergence from the posterior of one decision: soft "
        "actor-critic projects its policy onto ρ e^{Q/α}. Without the divergence the same gradient "
        "climbs Q alone, and the policy collapses onto one action."
    ),
    formulas=(
        r"\nabla_\theta\, \mathbb{E}_{\pi_\theta}\left[ Q - \alpha \log \frac{\pi_\theta}{\rho}"
        r" \right] = -\alpha\, \nabla_\theta\, \mathrm{KL}\left( \pi_\theta \,\middle\|\,"
        r" \frac{\rho\, e^{Q / \alpha}}{Z} \right)",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "autograd through the Pyro program of one decision, by the logits of some policy",
                _actor_gradient,
            ),
            right=Side("the gradient of the divergence, by hand", _projection_gradient),
            twin=Twin(
                "the divergence is left out: the policy climbs Q alone",
                "right",
                lambda subject: _projection_gradient(subject, with_divergence=False),
                blind=assumptions.one_action,
            ),
            over=(decision_names, _decision_actions),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, eq. 10",
    about=decision.bound,
)


# --- Soft Q-learning ------------------------------------------------------------------------------


def _some_q(subject: Subject) -> Array:
    """Some Q (S, A) that solves no equation, reward units."""
    return subject.tables.action_value(subject.other_value)


def _residual_gradient(subject: Subject, *, soft: bool = True, paid: bool = True) -> Array:
    """∂/∂Q of SQL's loss with every transition in the batch, by autograd: (S, A)."""
    model = subject.whole
    q = torch.as_tensor(_some_q(subject)).clone().requires_grad_()
    with torch.no_grad():
        if soft:
            prior = model.log_prior.exp()
            value = decision.evidence(_decide_everywhere(subject, q, prior))
        else:
            value = torch.where(model.log_prior > -torch.inf, q, -torch.inf).amax(-1)
        value = torch.where(model.is_terminal, 0.0, value)
        target = soft_target(
            model.expected_reward().flatten() * paid,
            torch.ones(q.numel()),
            model.expected_value(value).flatten(),
            model.discount,
        )
    loss = residual_loss(q.flatten().unsqueeze(0), target)
    (gradient,) = torch.autograd.grad(loss, q)
    return allowed(subject, np.asarray(gradient * q.numel()))


def _residual(subject: Subject) -> Array:
    """Q − (r̄ + γ P V), by hand."""
    tables, q = subject.tables, _some_q(subject)
    value = np.where(tables.live, soft_value(q, tables.prior, subject.temperature), 0.0)
    return allowed(subject, q - tables.action_value(value))


def _sql_check(need: Assumption, twin: Twin) -> Check:
    return Check(
        needs=(need,),
        left=Side(
            "autograd through the library's loss and target, with V from the Pyro program of one "
            "decision, at some Q",
            _residual_gradient,
        ),
        right=Side("the residual of the equation at that Q, by hand", _residual),
        twin=twin,
        tolerance=1e-9,
        over=("state", "action"),
    )


SQL_UPDATE = Step(
    id="sql-update",
    title="Soft Q-learning: the residual of the equations",
    explanation=(
        "Soft Q-learning needs no policy to learn Q. It takes the soft Bellman equations for a "
        "regression: whatever Q is, move it towards reward plus the discounted log-mean-exp of "
        "what follows. The gradient is the residual of the equation, so it vanishes exactly at "
        "the solution. With a maximum for the log-mean-exp this is Q-learning."
    ),
    formulas=(
        r"\mathcal{L}(Q) = \frac{1}{2}\, \mathbb{E}\left[ \left( Q(s, a) - r - \gamma\, V(s')"
        r" \right)^2 \right], \qquad V(s') = \alpha \log \sum_{a'} \rho(a' \mid s')\,"
        r" e^{Q(s', a') / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        _sql_check(
            assumptions.sequential,
            Twin(
                "a maximum for the log-mean-exp: Q-learning",
                "left",
                lambda subject: _residual_gradient(subject, soft=False),
                blind=assumptions.one_action,
            ),
        ),
        _sql_check(
            assumptions.solvable,
            Twin(
                "the reward is left out of the target",
                "left",
                lambda subject: _residual_gradient(subject, paid=False),
                blind=assumptions.nothing_earned,
            ),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, §3.2",
    about=residual_loss,
)

DRAWS = (1, 2, 64)
"""Actions that a log-mean-exp is taken of."""

REPEATS = 1000

FEW_STATES = 4


def _few_decisions(subject: Subject) -> tuple[Array, Array]:
    """Prior and Q of the first states of `decisions`, (N, A)."""
    _, prior, _, q = decisions(subject)
    return prior[:FEW_STATES], q[:FEW_STATES]


def _few_names(subject: Subject) -> Sequence[str]:
    return decision_names(subject)[:FEW_STATES]


def _sampled_value(subject: Subject, draws: int, *, mean: bool = True) -> Estimate:
    """E of α log of the mean of e^{Q/α} over draws of the prior, by the program."""
    prior, q = _few_decisions(subject)
    rows = torch.arange(len(q)).repeat(REPEATS)
    habit = TabularPolicy(torch.as_tensor(prior))
    table = torch.as_tensor(q)
    found = decide(
        rows.expand(draws, -1),
        habit,
        lambda state: habit(state),
        lambda action: table[rows, action],
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
    )
    value = decision.evidence(found, found.log_guide)
    if not mean:
        value = value + subject.temperature * np.log(draws)
    return Estimate.of(value.reshape(REPEATS, len(q)))


def _pair_value(subject: Subject) -> Array:
    """E of the same for two draws, by a sum over all pairs of actions."""
    prior, q = _few_decisions(subject)
    alpha = subject.temperature
    both = alpha * (np.logaddexp(q[:, :, None] / alpha, q[:, None, :] / alpha) - np.log(2))
    chance = prior[:, :, None] * prior[:, None, :]
    return np.asarray((chance * both).sum((1, 2)))


def _few_draws(subject: Subject, *, mean: bool = True) -> Estimate:
    """Of one draw, two and 64: (3, N). The first two are sums, without an error."""
    prior, q = _few_decisions(subject)
    many = _sampled_value(subject, DRAWS[-1], mean=mean)
    one = (prior * q).sum(-1)
    nothing = np.zeros_like(one)
    return Estimate(
        np.array([one, _pair_value(subject), many.value]),
        np.array([nothing, nothing, many.standard_error]),
    )


def _more_draws(subject: Subject) -> Array:
    """Of two, of all, and of all: (3, N)."""
    prior, q = _few_decisions(subject)
    whole = soft_value(q, prior, subject.temperature)
    return np.array([_pair_value(subject), whole, whole])


def _box_draws(subject: Subject, *, mean: bool = True) -> Estimate:
    """Of two and 64 draws of a policy in a box, weighted by ρ/π: (2, N)."""
    found = [quadrature.small_evidence(subject, draws, REPEATS) for draws in DRAWS[1:]]
    shift = [0.0 if mean else subject.temperature * np.log(draws) for draws in DRAWS[1:]]
    return Estimate(
        np.array([part.value + more for part, more in zip(found, shift, strict=True)]),
        np.array([part.standard_error for part in found]),
    )


def _box_integrals(subject: Subject) -> Estimate:
    whole = quadrature.evidence(subject)
    return Estimate(np.array([whole.value] * 2), np.array([whole.standard_error] * 2))


SAMPLED_VALUE = Step(
    id="sampled-log-sum-exp",
    title="A log-mean-exp of few draws is too low",
    explanation=(
        "Where actions are too many to sum over, V is estimated from some of them. The mean of "
        "e^{Q/α} over draws is right on average, but its logarithm is not: by Jensen's inequality "
        "it is too low, by about one over their number. More draws only raise it, from the mean of "
        "Q for one draw to V for infinitely many."
    ),
    formulas=(
        r"V_K = \mathbb{E}\left[ \alpha \log \left( \frac{1}{K} \sum_{k = 1}^{K}"
        r" e^{Q(a_k) / \alpha} \right) \right], \qquad a_k \sim \rho",
        r"\mathbb{E}_\rho\left[ Q \right] = V_1 \le V_2 \le \cdots \le V",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "of one draw and of two by sums over all actions and pairs; of 64 by the program, "
                f"{REPEATS:,} times",
                _few_draws,
            ),
            right=Side("of two draws by a sum over all pairs, and V itself, twice", _more_draws),
            twin=Twin(
                "the sum over draws in place of their mean",
                "left",
                lambda subject: _few_draws(subject, mean=False),
            ),
            over=(("one draw", "two draws", "64 draws"), _few_names),
        ),
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                "of two draws and of 64 of some policy, weighted by ρ/π, by the program",
                _box_draws,
            ),
            right=Side("V itself, by Gauss-Legendre quadrature", _box_integrals),
            twin=Twin(
                "the sum over draws in place of their mean",
                "left",
                lambda subject: _box_draws(subject, mean=False),
            ),
            tolerance=1e-8,
            over=(("two draws", "64 draws"), quadrature.names),
        ),
    ),
    reference="Burda et al. (2016), arXiv:1509.00519, theorem 1; Haarnoja et al. (2017), §3.2",
    about=decision.evidence,
)

STEPS = (POLICY_GRADIENT, POLICY_ITERATION, CRITIC, ACTOR, SQL_UPDATE, SAMPLED_VALUE)
