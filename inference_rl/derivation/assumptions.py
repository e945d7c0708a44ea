"""What steps assume of a model, each with the test that says whether it holds.

And what makes a mistake harmless: why a twin cannot differ.
"""

from __future__ import annotations

import math

import numpy as np
from gymnasium.spaces import Box, Discrete

from inference_rl.derivation.step import Assumption
from inference_rl.derivation.subject import MOST_STATES, Subject, choices

SMALL_BOX = 2
"""Dimensions of actions over which a density is integrated on a grid."""


def _not_finite(subject: Subject) -> str | None:
    if subject.finite is None:
        if subject.simulated:
            return f"{subject.model.name} is a simulator, whose transition probabilities are hidden"
        return "its states or actions are not a finite set, so that they cannot be summed over"
    if bool(subject.finite.is_terminal.all()):
        return "every state ends the episode, so that there is nothing to decide"
    return None


def _not_listable(subject: Subject) -> str | None:
    if (reason := _not_finite(subject)) is not None:
        return reason
    if subject.has_excerpt:
        return None
    return "one step of it has too many outcomes to list all trajectories"


def _too_large(subject: Subject) -> str | None:
    if (reason := _not_finite(subject)) is not None:
        return reason
    if subject.whole_states > MOST_STATES:
        return (
            f"it has {subject.whole_states:,} states (times steps), and the other side is solved "
            f"for {MOST_STATES:,} at most"
        )
    return None


def _certain(subject: Subject) -> str | None:
    if (reason := _too_large(subject)) is not None:
        return reason
    if _fans_out(subject):
        return None
    return "nothing is random here but the actions"


def _random(subject: Subject) -> str | None:
    if (reason := _too_large(subject)) is not None:
        return reason
    if not _fans_out(subject):
        return None
    return "where an action leads is random here"


def _fans_out(subject: Subject) -> bool:
    """Whether an action that is allowed may lead to several states."""
    fan = np.diff(subject.tables.moves.indptr).reshape(subject.tables.prior.shape)
    return bool(((fan > 1) & (subject.tables.prior > 0)).any())


def _certain_excerpt(subject: Subject) -> str | None:
    if (reason := _not_listable(subject)) is not None:
        return reason
    chances = np.exp(subject.paths.log_dynamics)
    if (chances < 1 - 1e-12).any():
        return None
    return (
        "nothing is random here but the actions, so that the posterior keeps the model's own "
        "dynamics and the price is 0 nats"
    )


def _one_choice(subject: Subject) -> str | None:
    if (reason := _too_large(subject)) is not None:
        return reason
    if subject.tables.discount == 0:
        return "its discount is 0, so that nothing counts that follows a choice"
    if (subject.tables.moves @ subject.tables.live).any():
        return None
    return "every action ends the episode, so that no choice follows another"


def _not_uniform(subject: Subject) -> str | None:
    if (reason := _too_large(subject)) is not None:
        return reason
    uniform = np.abs(subject.tables.prior[subject.tables.live] * subject.tables.prior.shape[1] - 1)
    return None if uniform.max() < 1e-12 else "its action prior is not uniform"


def _forbids(subject: Subject) -> str | None:
    if (reason := _too_large(subject)) is not None:
        return reason
    if (subject.tables.prior[subject.tables.live] > 0).all():
        return None
    return "its action prior forbids actions, which would take a reward of −∞"


def _listed(subject: Subject) -> str | None:
    if subject.finite is None:
        return None
    return _not_finite(subject) or "its trajectories are listed one by one in place of drawn"


def _undiscounted(subject: Subject) -> str | None:
    if subject.model.discount < 1:
        return None
    return "its discount is 1"


def _not_linear(subject: Subject) -> str | None:
    return None if subject.linear is not None else "it is not linear-Gaussian"


def _not_discrete(subject: Subject) -> str | None:
    if subject.finite is not None and bool(subject.finite.is_terminal.all()):
        return "every state ends the episode, so that there is nothing to decide"
    if isinstance(subject.model.action_space, Discrete):
        return None
    return f"its actions, {subject.model.action_space}, cannot be summed over one by one"


def _no_box(subject: Subject) -> str | None:
    space = subject.model.action_space
    if isinstance(space, Box) and space.is_bounded():
        return None
    if isinstance(space, Box):
        return "its actions have no bounds, and a guide of fixed width lives in a box"
    return "its actions are discrete: there is no width to fix"


def _no_small_box(subject: Subject) -> str | None:
    if (reason := _no_box(subject)) is not None:
        return reason
    size = math.prod(subject.model.action_space.shape or ())
    if size <= SMALL_BOX:
        return None
    return f"its actions have {size} dimensions, too many to integrate over on a grid"


finite = Assumption("finite states and actions, known probabilities", _not_finite)
listable = Assumption("finite, with few outcomes of every step", _not_listable)
drawn = Assumption("states or actions that cannot be listed", _listed)
solvable = Assumption(f"finite, at most {MOST_STATES:,} states", _too_large)
noisy = Assumption("finite, with random transitions", _certain)
sequential = Assumption("finite, with one choice after another", _one_choice)
deterministic = Assumption("finite, with deterministic transitions", _random)
luck = Assumption("something random besides the actions", _certain_excerpt)
uniform = Assumption("finite, with a uniform action prior", _not_uniform)
permissive = Assumption("finite, with an action prior that forbids nothing", _forbids)
discounted = Assumption("a discount below 1", _undiscounted)
linear = Assumption("linear dynamics, Gaussian noise, quadratic reward", _not_linear)
discrete = Assumption("discrete actions", _not_discrete)
box = Assumption("actions in a box", _no_box)
small_box = Assumption(f"actions in a box of at most {SMALL_BOX} dimensions", _no_small_box)


def one_action(subject: Subject) -> str | None:
    """Why a mistake about choices makes no difference."""
    if subject.finite is None or bool(choices(subject.finite).any()):
        return None
    return "there is but one action to choose"


def no_choice(subject: Subject) -> str | None:
    """Why a mistake about choices makes no difference in the excerpt."""
    assert subject.finite is not None
    model = subject.discounted_excerpt
    counts = choices(model)
    if model.discount == 0:
        counts = counts & (model.initial > 0)
    return None if bool(counts.any()) else "there is but one action to choose"


def nothing_at_stake(subject: Subject) -> str | None:
    """Why a mistake about what actions are worth makes no difference."""
    if (reason := one_action(subject)) is not None:
        return reason
    tables, q = subject.tables, subject.control.q.numpy()
    high = np.where(tables.prior > 0, q, -np.inf).max(-1)[tables.live]
    low = np.where(tables.prior > 0, q, np.inf).min(-1)[tables.live]
    if (high - low).max() <= 1e-9 * subject.size("reward"):
        return "no action is better than another in any state"
    return None


def nothing_paid(subject: Subject) -> str | None:
    """Why a mistake about rewards makes no difference."""
    assert subject.finite is not None
    paid = subject.finite.rewards[subject.finite.probabilities > 0]
    return "nothing is ever paid" if not bool(paid.any()) else None


def nothing_earned(subject: Subject) -> str | None:
    """Why a mistake about what is paid on average makes no difference."""
    tables = subject.tables
    paid = np.where(tables.prior > 0, np.abs(tables.gain), 0.0)[tables.live]
    return "nothing is paid on average" if paid.max() <= 1e-9 * subject.size("reward") else None


def too_coarse(subject: Subject) -> str | None:
    """Why a mistake is not found by sampling."""
    return "the mistake is smaller than what so few draws can tell"
