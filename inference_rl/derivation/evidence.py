"""From one decision to the evidence of a whole trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from gymnasium.spaces import Discrete
from pyro import poutine
from scipy.special import logsumexp
from torch import Tensor

from inference_rl import decision
from inference_rl.decision import decide
from inference_rl.derivation import assumptions, quadrature, regulator, sampled
from inference_rl.derivation.independent import (
    Array,
    Paths,
    divergence,
    soft_policy,
    soft_value,
)
from inference_rl.derivation.step import Check, DoesNotApplyError, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject, action_name, choices, state_name
from inference_rl.distributions import Optimality, as_probs
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import first_step, posterior_messages
from inference_rl.policies import TabularPolicy
from inference_rl.simulate import starting_states
from inference_rl.trajectory import trajectory

DECISIONS = 8
"""States in which one decision is looked at."""

LISTED = 400
"""Trajectories or transitions that are compared one by one."""

ENOUGH = 0.1
"""Share of the draws that have to count for their weights to be averaged."""

DRAWS = 4000
"""Trajectories of which weights are averaged."""


# --- One decision ---------------------------------------------------------------------------------


def decisions(subject: Subject) -> tuple[Tensor, Array, Array, Array]:
    """Some states (N,), their prior and some policy, (N, A), and some Q, (N, A), reward units."""
    space = subject.model.action_space
    assert isinstance(space, Discrete)
    if subject.finite is not None:
        model = subject.finite
        live = (~model.is_terminal).nonzero().squeeze(-1)
        several = live[choices(model)[live]]
        states = _spread(several if len(several) else live, DECISIONS)
        prior = model.log_prior.exp()[states].numpy()
    else:
        states = starting_states(subject.model, DECISIONS)
        prior = as_probs(subject.prior(states), int(space.n)).double().numpy()
    generator = subject.generator("decisions")
    q = 2 * subject.temperature * generator.normal(size=prior.shape)
    policy = soft_policy(generator.normal(size=prior.shape), prior, 1.0)
    return states, prior, policy, q


def decided(
    subject: Subject, states: Tensor, prior: Array, policy: Array, q: Array
) -> decision.Decision:
    """The program of one decision in every state, by all actions; tables as in `decisions`."""
    rows = torch.arange(len(states))
    return decide(
        rows,
        lambda state: TabularPolicy(torch.as_tensor(policy))(state),
        lambda state: TabularPolicy(torch.as_tensor(prior))(state),
        lambda _: torch.as_tensor(q).mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
        actions=decision.every_action(subject.model.action_space),
    )


def decision_names(subject: Subject) -> Sequence[str]:
    """What to call the states of `decisions`."""
    if subject.finite is None:
        return [f"start {i + 1}" for i in range(DECISIONS)]
    return [state_name(subject.finite, int(state)) for state in decisions(subject)[0]]


def _bound_and_gap(subject: Subject, sign: float) -> Array:
    states, prior, policy, q = decisions(subject)
    bound = decision.bound(decided(subject, states, prior, policy, q))[0].numpy()
    paid = (1 - sign) * divergence(policy, prior)
    best = soft_policy(q, prior, subject.temperature)
    return np.asarray(bound + subject.temperature * (divergence(policy, best) + paid))


DECISION = Step(
    id="one-decision",
    title="One decision",
    explanation=(
        "Suppose that action a is worth Q(a), and that being far from one's habits ρ has a price, "
        "the temperature for every nat. Whoever weighs both does best by the policy ρ e^{Q/α}, "
        "normalised, and what is best is the logarithm of its normaliser. Every other policy falls "
        "short of that by α times its divergence from the best one. So deciding is inferring: the "
        "best policy is a posterior, and V its log-evidence."
    ),
    formulas=(
        r"V = \alpha \log \sum_a \rho(a)\, e^{Q(a) / \alpha}",
        r"V = \mathbb{E}_\pi\left[ Q(a) - \alpha \log \frac{\pi(a)}{\rho(a)} \right]"
        r" + \alpha\, \mathrm{KL}(\pi \,\|\, \pi^*)",
        r"\pi^*(a) = \rho(a)\, e^{(Q(a) - V) / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "α times the log-mean-exp of some Q under the prior, by SciPy",
                lambda subject: soft_value(*_q_and_prior(subject), subject.temperature),
            ),
            right=Side(
                "the bound of some policy by the Pyro program of one decision, plus α times its "
                "divergence from the best one, by its definition",
                lambda subject: _bound_and_gap(subject, 1.0),
            ),
            twin=Twin(
                "the divergence from the prior is paid out in place of being paid for",
                "right",
                lambda subject: _bound_and_gap(subject, -1.0),
                blind=assumptions.one_action,
            ),
            over=(decision_names,),
        ),
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                "an integral of ρ e^{Q/α} over the box, by Gauss-Legendre quadrature, of some Q",
                quadrature.evidence,
            ),
            right=Side(
                "the program of one decision, by draws of a policy that are weighted by ρ/π",
                lambda subject: quadrature.weighted_evidence(subject, quadrature.MANY),
            ),
            twin=Twin(
                "the density of the draws is forgotten in their weights",
                "right",
                lambda subject: quadrature.weighted_evidence(
                    subject, quadrature.MANY, with_density=False
                ),
            ),
            tolerance=1e-8,
            over=(quadrature.names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3; Todorov (2009), doi:10.1073/pnas.0710743106",
    about=decide,
)


def _q_and_prior(subject: Subject) -> tuple[Array, Array]:
    _, prior, _, q = decisions(subject)
    return q, prior


# --- Reward as evidence ---------------------------------------------------------------------------


def _spread(indices: Tensor, count: int) -> Tensor:
    """So many of them, evenly spread, or all."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)
    return indices[np.unique(places)]


def _transitions(subject: Subject) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, action, next state and the place in the tables of some transitions, (N,)."""
    model = subject.finite
    assert model is not None
    possible = (model.probabilities > 0).nonzero().squeeze(-1)
    paid = possible[model.rewards[possible] != 0]
    chosen = torch.cat([_spread(paid, LISTED // 2), _spread(possible, LISTED // 2)]).unique()
    row = model.rows()[chosen]
    state, action = row // model.num_actions, row % model.num_actions
    return state, action, model.successors[chosen].long(), chosen


def _transition_names(subject: Subject) -> Sequence[str]:
    state, action, after, _ = _transitions(subject)
    assert subject.finite is not None
    model = subject.finite
    return [
        f"{state_name(model, s)}, {action_name(model, a)}, to {state_name(model, x)}"
        for s, a, x in zip(state.tolist(), action.tolist(), after.tolist(), strict=True)
    ]


def _optimality_of_transitions(subject: Subject) -> Tensor:
    """log p(O = 1) of one step as the program has it."""
    state, action, after, _ = _transitions(subject)
    program = poutine.condition(
        trajectory, data={"state_0": state, "action_0": action, "state_1": after}
    )
    with pyro.plate("transitions", len(state)):
        trace = poutine.trace(program).get_trace(
            subject.model, subject.prior, 1, temperature=subject.temperature
        )
    trace.compute_log_prob()
    found: Any = trace.nodes["optimality_0"]["log_prob"]
    return torch.as_tensor(found).expand(len(state))


def _paid(subject: Subject, sign: float = 1.0) -> Tensor:
    assert subject.finite is not None
    return sign * subject.finite.rewards[_transitions(subject)[3]] / subject.temperature


def some_rollouts(subject: Subject) -> sampled.Rollouts:
    """Trajectories that most of these steps look at."""
    return subject.rollouts("guide")


def _stepped(subject: Subject, sign: float = 1.0) -> Tensor:
    reward, _ = sampled.stepped(subject, some_rollouts(subject))
    return sign * reward[:, : LISTED // 4] / subject.temperature


def nothing_paid_on_the_way(subject: Subject) -> str | None:
    """Why a mistake about rewards does not show on trajectories that were drawn."""
    return None if bool(_stepped(subject).any()) else "nothing is paid in so few steps"


def _sampled_steps(subject: Subject) -> Sequence[str]:
    return [f"step {t}" for t in range(sampled.steps(subject))]


def _sampled_paths(subject: Subject) -> Sequence[str]:
    return [f"trajectory {i + 1}" for i in range(min(LISTED // 4, sampled.paths(subject)))]


REWARD = Step(
    id="reward-as-evidence",
    title="Reward as evidence",
    explanation=(
        "Every step has a variable O that is observed to be 1, “this step went well”, and reward "
        "is its log-likelihood in units of the temperature. So good steps are likely given that "
        "all went well, and a small temperature makes the evidence strong. It is a factor and not "
        "a probability: a positive reward is legal, because a constant changes no posterior."
    ),
    formulas=(r"\log p(O_t = 1 \mid s, a, s') = \frac{r(s, a, s')}{\alpha}",),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.finite,),
            left=Side(
                "log-probability of the site optimality_0 in a trace of the trajectory program",
                _optimality_of_transitions,
            ),
            right=Side("the rewards of the model as a table, over the temperature", _paid),
            twin=Twin(
                "a cost is taken for a reward: the sign is wrong",
                "right",
                lambda subject: _paid(subject, -1.0),
                blind=assumptions.nothing_paid,
            ),
            over=(_transition_names,),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "log-probabilities of the sites optimality_t of trajectories that the program drew",
                lambda subject: some_rollouts(subject).log_weight[:, : LISTED // 4],
            ),
            right=Side(
                "the same actions taken without the program, and what they were paid, over the "
                "temperature",
                _stepped,
            ),
            twin=Twin(
                "a cost is taken for a reward: the sign is wrong",
                "right",
                lambda subject: _stepped(subject, -1.0),
                blind=lambda subject: (
                    None if bool(_stepped(subject).any()) else "nothing is paid in so few steps"
                ),
            ),
            tolerance=1e-6,
            over=(_sampled_steps, _sampled_paths),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.2",
    about=Optimality,
)


# --- The joint ------------------------------------------------------------------------------------


def log_joint(subject: Subject) -> Array:
    """log p(τ, O) of every trajectory of the excerpt, nats, (N,)."""
    paths, prior = subject.paths, subject.excerpt.log_prior.exp().numpy()
    return np.asarray(paths.log_chance(prior) + paths.rewards.sum(0) / subject.temperature)


def listed(paths: Paths) -> Array:
    """Numbers of some trajectories, spread over all."""
    count = paths.states.shape[1]
    return np.unique(np.linspace(0, count - 1, LISTED).astype(int))


def listed_names(subject: Subject) -> Sequence[str]:
    return [f"trajectory {i + 1}" for i in listed(subject.paths)]


def traced(
    model: FiniteModel, paths: Paths, which: Array, factor: object, temperature: float | None
) -> Array:
    """log-probability of some trajectories under the program, nats, (N,)."""
    assert model.horizon is not None
    data = {f"state_{t}": torch.as_tensor(s) for t, s in enumerate(paths.states[:, which])}
    data |= {f"action_{t}": torch.as_tensor(a) for t, a in enumerate(paths.actions[:, which])}
    program = poutine.condition(trajectory, data=data)
    with pyro.plate("trajectories", len(which)):
        trace = poutine.trace(program).get_trace(
            model, factor, model.horizon, temperature=temperature
        )
    trace.compute_log_prob()
    sites = [node["log_prob"].expand(len(which)) for node in _sampled_nodes(trace)]
    return np.asarray(torch.stack(sites).sum(0))


def _sampled_nodes(trace: Any) -> list[dict[str, Tensor]]:
    return [node for node in trace.nodes.values() if "log_prob" in node]


def _joint(subject: Subject, *, with_prior: bool = True) -> Array:
    """The same by hand, with the idle actions after an end, which are uniform in the program."""
    paths = subject.paths
    idle = -np.log(subject.excerpt.num_actions) * (~paths.alive).sum(0)
    prior = subject.excerpt.log_prior.exp().numpy()
    log_p = log_joint(subject)
    if not with_prior:
        log_p = log_p - (paths.log_chance(prior) - paths.log_start - paths.log_dynamics.sum(0))
    return np.asarray((log_p + idle)[listed(paths)])


def _by_hand(subject: Subject, *, with_reward: bool = True) -> Tensor:
    """log p(τ, O) of what the program drew, from the model's own methods or a simulator."""
    rollouts = some_rollouts(subject)
    reward, alive = sampled.stepped(subject, rollouts)
    total = torch.zeros(sampled.paths(subject), dtype=torch.float64)
    for t, action in enumerate(rollouts.actions):
        state, after = rollouts.states[t], rollouts.states[t + 1]
        gained = subject.prior(state).log_prob(action).double()
        if with_reward:
            gained = gained + reward[t] / subject.temperature
        if not subject.simulated:
            gained = gained + subject.model.transition(state, action).log_prob(after).double()
        total = total + torch.where(alive[t], gained, 0.0)
    return total[:LISTED]


def _all_paths(subject: Subject) -> Sequence[str]:
    return [f"trajectory {i + 1}" for i in range(min(LISTED, sampled.paths(subject)))]


JOINT = Step(
    id="joint",
    title="A trajectory and its evidence, as one program",
    explanation=(
        "Start, habits, dynamics and evidence together make one probabilistic program: states and "
        "actions are drawn, and every O is observed. Its log-joint is a sum with one term for each "
        "site. All that follows, reinforcement learning included, is inference in this program."
    ),
    formulas=(
        r"\log p(\tau, O) = \log p(s_0) + \sum_t \left[ \log \rho(a_t \mid s_t)"
        r" + \log p(s_{t+1} \mid s_t, a_t) + \frac{r_t}{\alpha} \right]",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the trajectory program, conditioned on a trajectory and traced by Pyro",
                lambda subject: traced(
                    subject.excerpt,
                    subject.paths,
                    listed(subject.paths),
                    subject.excerpt.action_prior,
                    subject.temperature,
                ),
            ),
            right=Side("the terms of the sum, from the tables of the model", _joint),
            twin=Twin(
                "the action prior is left out",
                "right",
                lambda subject: _joint(subject, with_prior=False),
                blind=assumptions.no_choice,
            ),
            over=(listed_names,),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "trajectories that the program drew under some policy, replayed as the model",
                lambda subject: some_rollouts(subject).log_joint[:LISTED],
            ),
            right=Side(
                "the terms of the sum, by calling the model's own methods, or by stepping the "
                "simulator with the same actions",
                _by_hand,
            ),
            twin=Twin(
                "the evidence is left out: no reward",
                "right",
                lambda subject: _by_hand(subject, with_reward=False),
                blind=nothing_paid_on_the_way,
            ),
            tolerance=1e-6,
            over=(_all_paths,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.2",
    about=trajectory,
)


# --- Messages, posterior, evidence ----------------------------------------------------------------


def starts_of(subject: Subject) -> Array:
    """States (of the excerpt) in which its trajectories begin and in which there is a choice."""
    model = subject.excerpt
    return ((model.initial > 0) & ~model.is_terminal).nonzero().squeeze(-1).numpy()


def start_names(subject: Subject) -> Sequence[str]:
    labels = subject.discounted_excerpt.state_labels
    assert labels is not None
    return [str(labels[s]) for s in starts_of(subject)]


def action_names(subject: Subject) -> Sequence[str]:
    assert subject.finite is not None
    return [action_name(subject.finite, a) for a in range(subject.finite.num_actions)]


def _summed_from(subject: Subject, *, with_prior: bool = True) -> Array:
    """log p(O | s_0), by sums over the trajectories from each start."""
    paths, log_p = subject.paths, log_joint(subject)
    if not with_prior:
        log_p = paths.log_start + paths.log_dynamics.sum(0)
        log_p = log_p + paths.rewards.sum(0) / subject.temperature
    return np.array(
        [
            logsumexp(log_p[here]) - paths.log_start[here][0]
            for here in (paths.states[0] == s for s in starts_of(subject))
        ]
    )


MESSAGES = Step(
    id="posterior-messages",
    title="Messages that run backwards",
    explanation=(
        "How likely is it that all goes well from a state on? Nobody needs to look at whole "
        "trajectories to know: a message that is passed backwards, step by step, has it all. "
        "Actions are averaged by the prior, and outcomes by the dynamics, both inside the "
        "logarithm. A discount is read as the chance of surviving a step."
    ),
    formulas=(
        r"Q^x(s, a) = \log \mathbb{E}_{s'}\left[ e^{r / \alpha + V^x(s')} \right]",
        r"V^x(s) = \log \sum_a \rho(a \mid s)\, e^{Q^x(s, a)} = \log p(O_{t:T} = 1 \mid s_t = s)",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the library's posterior messages over a few steps",
                lambda subject: posterior_messages(subject.excerpt, subject.temperature).v[0][
                    starts_of(subject)
                ],
            ),
            right=Side(
                "a sum over every single trajectory from that state, from the tables of the model",
                _summed_from,
            ),
            twin=Twin(
                "actions are added up in place of averaged by the prior",
                "right",
                lambda subject: _summed_from(subject, with_prior=False),
                blind=assumptions.no_choice,
            ),
            over=(start_names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


def _share_of_actions(subject: Subject) -> Array:
    """p(a_0 | s_0, O), (starts, A), by sums over trajectories; NaN for what is forbidden."""
    paths, log_p = subject.paths, log_joint(subject)
    starts = starts_of(subject)
    table = np.full((len(starts), subject.excerpt.num_actions), np.nan)
    for i, s in enumerate(starts):
        here = paths.states[0] == s
        whole = logsumexp(log_p[here])
        for a in np.unique(paths.actions[0][here]):
            taken = here & (paths.actions[0] == a)
            table[i, a] = np.exp(logsumexp(log_p[taken]) - whole)
    return table


def _likelihood_ratio(subject: Subject) -> Tensor:
    messages = posterior_messages(subject.excerpt, subject.temperature)
    starts = starts_of(subject)
    return (messages.q[0][starts] - messages.v[0][starts].unsqueeze(-1)).exp()


def _no_choice_at_first(subject: Subject) -> str | None:
    model = subject.excerpt
    if bool(choices(model)[model.initial > 0].any()):
        return None
    return "there is but one action to choose where trajectories start"


POSTERIOR_POLICY = Step(
    id="posterior-policy",
    title="What was done, given that all went well",
    explanation=(
        "By Bayes' rule the posterior of an action is its prior times how much more likely success "
        "is after it. This is a policy, and where nothing is random but the actions it is the best "
        "one. Where dynamics are random it is not: it tells what was done by those who were lucky."
    ),
    formulas=(r"p(a \mid s, O) = \rho(a \mid s)\, e^{Q^x(s, a) - V^x(s)}",),
    relation="=",
    unit="",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the policy of the library's posterior messages",
                lambda subject: posterior_messages(subject.excerpt, subject.temperature).policy[0][
                    starts_of(subject)
                ],
            ),
            right=Side(
                "the share of the action among all trajectories, weighted by p(τ, O)",
                _share_of_actions,
            ),
            twin=Twin(
                "the prior in front is forgotten: the likelihood ratio alone",
                "left",
                _likelihood_ratio,
                blind=_no_choice_at_first,
            ),
            over=(start_names, action_names),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


def log_evidence(subject: Subject) -> float:
    """log p(O) of the excerpt by backward messages, nats."""
    messages = posterior_messages(subject.excerpt, subject.temperature)
    possible = subject.excerpt.initial > 0
    start = subject.excerpt.initial[possible].log() + first_step(messages.v)[possible]
    return float(start.logsumexp(0))


def _one_trajectory(subject: Subject) -> str | None:
    log_p = log_joint(subject)
    if len(log_p) == 1:
        return "there is but one trajectory"
    if logsumexp(log_p) - log_p.max() <= 1e-9 * subject.size("nats"):
        return "at so low a temperature one trajectory has all the weight"
    return None


EVIDENCE = Step(
    id="evidence",
    title="The evidence",
    explanation=(
        "The first message, averaged over the start, is the evidence: how likely it is that all "
        "goes well for someone who acts by habit. It sums over all ways in which that can happen, "
        "not over the best of them alone."
    ),
    formulas=(r"\log p(O) = \log \sum_\tau p(\tau, O) = \log \sum_{s_0} p(s_0)\, e^{V^x_0(s_0)}",),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side("the library's posterior messages over a few steps", log_evidence),
            right=Side(
                "a sum over every single trajectory, from the tables of the model",
                lambda subject: float(logsumexp(log_joint(subject))),
            ),
            twin=Twin(
                "the likeliest trajectory alone: a maximum in place of the sum",
                "right",
                lambda subject: float(log_joint(subject).max()),
                blind=_one_trajectory,
            ),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side(
                "the library's Riccati recursion for the posterior, over a few steps",
                regulator.log_evidence,
            ),
            right=Side(
                "one Gaussian integral over all actions and all noise at once, by its determinant",
                regulator.integrated_evidence,
            ),
            twin=Twin(
                "the exponent of the likeliest trajectory, without the determinant",
                "right",
                lambda subject: regulator.integrated_evidence(subject, with_volume=False),
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


# --- Weights --------------------------------------------------------------------------------------


def _proposal(subject: Subject) -> Array:
    """A guide (T, S, A) for weights: half the posterior's policy, half the prior."""
    messages = posterior_messages(subject.excerpt, subject.temperature)
    return (messages.policy.numpy() + subject.excerpt.log_prior.exp().numpy()) / 2


def _weights(subject: Subject, *, with_prior: bool = True) -> Estimate:
    """Mean of p(τ, O) / q(τ) over draws of the guide, relative to p(O)."""
    model, steps = subject.excerpt, int(subject.excerpt.horizon or 0)
    guide = TabularPolicy(torch.as_tensor(_proposal(subject)))
    with pyro.plate("trajectories", DRAWS):
        q = poutine.trace(trajectory).get_trace(model, guide, steps)
        replayed = poutine.replay(trajectory, q)
        p = poutine.trace(replayed).get_trace(
            model, model.action_prior, steps, temperature=subject.temperature
        )
    for trace in (q, p):
        trace.compute_log_prob()
    log_weight = torch.zeros(DRAWS, dtype=torch.float64)
    for sign, trace in ((1.0, p), (-1.0, q)):
        for name, node in trace.nodes.items():
            if "log_prob" in node and (with_prior or trace is q or not name.startswith("action")):
                log_weight = log_weight + sign * node["log_prob"]
    log_p = log_joint(subject)
    whole = float(logsumexp(log_p))
    # Of all trajectories, not of those that were drawn, which may have missed the heaviest.
    log_q = subject.paths.log_chance(_proposal(subject))
    variance = max(0.0, float(np.exp(2 * (log_p - whole) - log_q).sum()) - 1)
    weight = (log_weight - whole).exp()
    return Estimate(float(weight.mean()), np.sqrt(variance / DRAWS))


def _sampled_evidence(subject: Subject, name: str, *, with_guide: bool = True) -> Estimate:
    """p(O | s_0) by weights of a policy's draws, relative to that by another's."""
    rollouts = subject.rollouts(name)
    log_weight = rollouts.log_ratio
    if not with_guide:
        log_weight = log_weight + rollouts.log_guide.sum(0)
    return Estimate.of((log_weight - reference_weight(subject)).exp())


def reference_weight(subject: Subject) -> float:
    rollouts = some_rollouts(subject)
    return float(rollouts.log_ratio.logsumexp(0)) - np.log(sampled.paths(subject))


def some_weight_dominates(subject: Subject) -> str | None:
    """Why sampled evidence cannot be trusted, or None."""
    for name in ("guide", "other guide"):
        share = subject.rollouts(name).log_ratio.softmax(0)
        effective = float(1 / share.square().sum())
        if effective < ENOUGH * len(share):
            return (
                f"at this temperature {effective:.0f} of {len(share):,} draws have most of the "
                "weight, too few to average; a higher one would do"
            )
    return None


def trusted_evidence(subject: Subject, name: str, *, with_guide: bool = True) -> Estimate:
    """`_sampled_evidence`, where no few draws have all the weight."""
    if (reason := some_weight_dominates(subject)) is not None:
        raise DoesNotApplyError(reason)
    return _sampled_evidence(subject, name, with_guide=with_guide)


WEIGHTS = Step(
    id="importance-weights",
    title="Weights estimate the evidence without bias",
    explanation=(
        "Trajectories that a guide draws, each weighted by p(τ, O) / q(τ), average to the evidence "
        "whatever the guide is. A good guide makes the weights alike, and they are exactly alike "
        "where it is the posterior. Their logarithms average to less: that is the bound of the "
        "next step."
    ),
    formulas=(
        r"\mathbb{E}_{\tau \sim q}\left[ \frac{p(\tau, O)}{q(\tau)} \right] = p(O)",
        r"\frac{p(\tau, O)}{q(\tau)} = \prod_t"
        r" \frac{\rho(a_t \mid s_t)\, e^{r_t / \alpha}}{\pi(a_t \mid s_t)}",
    ),
    relation="=",
    unit="",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                f"the mean weight of {DRAWS:,} trajectories that the program drew, over the "
                "evidence; its standard error is from all trajectories",
                _weights,
            ),
            right=Side("one", lambda subject: 1.0),
            twin=Twin(
                "the action prior is left out of the weights",
                "left",
                lambda subject: _weights(subject, with_prior=False),
                blind=lambda subject: (
                    assumptions.one_action(subject) or assumptions.too_coarse(subject)
                ),
            ),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "the mean weight of trajectories that one policy drew, relative to a reference",
                lambda subject: trusted_evidence(subject, "guide"),
            ),
            right=Side(
                "the mean weight of trajectories of another policy, relative to the same",
                lambda subject: trusted_evidence(subject, "other guide"),
            ),
            twin=Twin(
                "the density of the policy is left out of the weights",
                "left",
                lambda subject: trusted_evidence(subject, "guide", with_guide=False),
                blind=assumptions.too_coarse,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3; Burda et al. (2016), arXiv:1509.00519, §3",
    about=trajectory,
)

STEPS = (DECISION, REWARD, JOINT, MESSAGES, POSTERIOR_POLICY, EVIDENCE, WEIGHTS)
