"""Reward as evidence, and the program of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference_rl.derivation import assumptions, sampled
from inference_rl.derivation.decisions import spread_out
from inference_rl.derivation.independent import (
    Array,
    Paths,
)
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject, action_name, state_name
from inference_rl.distributions import Optimality
from inference_rl.finite import FiniteModel
from inference_rl.trajectory import trajectory

LISTED = 400
"""Trajectories or transitions that are compared one by one."""


def _transitions(subject: Subject) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, action, next state and the place in the tables of some transitions, (N,)."""
    model = subject.finite
    assert model is not None
    possible = (model.probabilities > 0).nonzero().squeeze(-1)
    paid = possible[model.rewards[possible] != 0]
    chosen = torch.cat([spread_out(paid, LISTED // 2), spread_out(possible, LISTED // 2)]).unique()
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


def _stepped(subject: Subject, sign: float = 1.0) -> Tensor:
    reward, _ = sampled.stepped(subject, subject.rollouts("guide"))
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
                lambda subject: subject.rollouts("guide").log_weight[:, : LISTED // 4],
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
    rollouts = subject.rollouts("guide")
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
                lambda subject: subject.rollouts("guide").log_joint[:LISTED],
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


STEPS = (
    REWARD,
    JOINT,
)
