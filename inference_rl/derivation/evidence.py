"""From one decision to the evidence of a whole trajectory, and its bound."""

from __future__ import annotations

import numpy as np
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.special import logsumexp

from inference_rl.derivation import assumptions
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import posterior_messages
from inference_rl.policies import TabularPolicy
from inference_rl.trajectory import trajectory


def enumerated_bound(model: FiniteModel, policy: Array, temperature: float) -> float:
    """ELBO of a policy, nats, by Pyro: every site of model and guide is enumerated."""
    assert model.horizon is not None
    guide, steps = TabularPolicy(torch.as_tensor(policy)), model.horizon
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(
        lambda: trajectory(model, model.action_prior, steps, temperature=temperature),
        config_enumerate(lambda: trajectory(model, guide, steps)),
    )
    return -float(loss)


def log_joint(subject: Subject) -> Array:
    """log p(τ, O) of every trajectory of the excerpt, nats, (N,)."""
    paths, prior = subject.paths, subject.excerpt.log_prior.exp().numpy()
    return np.asarray(paths.log_chance(prior) + paths.rewards.sum(0) / subject.temperature)


def _log_evidence(subject: Subject) -> float:
    messages = posterior_messages(subject.excerpt, subject.temperature)
    start = subject.excerpt.initial.log() + messages.v[0]
    return float(start[subject.excerpt.initial > 0].logsumexp(0))


def _gap(subject: Subject) -> float:
    policy = subject.some_policy(subject.excerpt)
    return _log_evidence(subject) - enumerated_bound(subject.excerpt, policy, subject.temperature)


def _divergence(subject: Subject) -> float:
    log_q = subject.paths.log_chance(subject.some_policy(subject.excerpt))
    log_p = log_joint(subject)
    return float(np.exp(log_q) @ (log_q - (log_p - logsumexp(log_p))))


def _reversed_divergence(subject: Subject) -> float:
    log_q = subject.paths.log_chance(subject.some_policy(subject.excerpt))
    log_p = log_joint(subject)
    log_p = log_p - logsumexp(log_p)
    return float(np.exp(log_p) @ (log_p - log_q))


GAP = Step(
    id="elbo-gap",
    title="What the bound leaves is a divergence",
    explanation=(
        "The guide q(τ) is never better than the posterior p(τ | O). How much of the evidence its "
        "bound leaves is exactly the divergence of the two, whatever the guide is. So whoever "
        "raises the bound brings the guide closer to the posterior, and need not know the evidence."
    ),
    formulas=(
        r"\log p(O) - \mathrm{ELBO}(q) = \mathrm{KL}\left(q(\tau) \,\|\, p(\tau \mid O)\right)",
        r"\mathrm{KL}(q \,\|\, p) = \sum_\tau q(\tau) \log \frac{q(\tau)}{p(\tau \mid O)} \ge 0",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.finite,),
            left=Side(
                "log p(O) by backward messages, less the bound of some policy by Pyro, which "
                "enumerates every site of the program",
                _gap,
            ),
            right=Side(
                "a sum over every single trajectory of a few steps, from the tables of the model",
                _divergence,
            ),
            twin=Twin(
                "the divergence taken the other way round, KL(p ‖ q)", "right", _reversed_divergence
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2; Blei et al. (2017), arXiv:1601.00670, §2.2",
    about=trajectory,
)
