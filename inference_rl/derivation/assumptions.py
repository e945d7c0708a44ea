"""What steps assume of a model, each with the test that says whether it holds."""

from __future__ import annotations

from inference_rl.derivation.step import Assumption
from inference_rl.derivation.subject import MOST_STATES, Subject


def _not_finite(subject: Subject) -> str | None:
    if subject.finite is not None:
        return None
    if subject.simulated:
        return f"{subject.model.name} is a simulator, whose transition probabilities nobody knows"
    return "its states and actions are not finite sets, so that nothing can be summed over"


def _too_large(subject: Subject) -> str | None:
    if (reason := _not_finite(subject)) is not None:
        return reason
    if subject.whole_states > MOST_STATES:
        return (
            f"it has {subject.whole_states:,} states (times steps), and the other side is solved "
            f"for at most {MOST_STATES:,}"
        )
    if not subject.tables.live.any():
        return "every state ends the episode"
    return None


def _undiscounted(subject: Subject) -> str | None:
    if subject.model.discount < 1:
        return None
    return "its discount is 1"


finite = Assumption("finite states and actions, known probabilities", _not_finite)
solvable = Assumption(f"finite, at most {MOST_STATES:,} states", _too_large)
discounted = Assumption("a discount below 1", _undiscounted)


def one_action(subject: Subject) -> str | None:
    """Why a mistake about choices makes no difference."""
    assert subject.finite is not None
    allowed = (subject.finite.log_prior.exp() > 0).sum(-1)[~subject.finite.is_terminal]
    return "there is but one action to choose" if bool((allowed <= 1).all()) else None
