"""The gradient of the bound, by scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_rl.derivation import assumptions, sampled
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import Check, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.distributions import log_or_impossible
from inference_rl.inference.policy_gradient import advantages, score_loss

BATCHES = 40
"""Of drawn trajectories, from whose gradients a standard error is taken."""


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


STEPS = (POLICY_GRADIENT,)
