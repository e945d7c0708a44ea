"""Targets for policies that were inferred on others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_rl.environment import EnvironmentModel
    from inference_rl.networks import Architecture
    from inference_rl.policies import Policy


def fitted(model: EnvironmentModel, policy: Policy, directory: Path) -> EnvironmentModel:
    """`model`, as `policy` sees it.

    :raises ValueError: the policy is for other states or actions.
    """
    from inference_rl.environment import WithPreviousAction
    from inference_rl.policies import TabularPolicy

    states, actions = model.state_space, model.action_space
    if (architecture := getattr(policy, "architecture", None)) is not None:
        return _fitted_to_network(model, architecture, directory)
    if isinstance(policy, TabularPolicy):
        size = tuple(policy.probs.shape[-2:])
        expected = "{} states and {} actions".format(*size)
        given = tuple(int(getattr(space, "n", 0)) for space in (states, actions))
        if size == (given[0] * (given[1] + 1), given[1]):  # inferred under a StickyPrior
            return WithPreviousAction(model)
    else:
        size = tuple(policy.gain.shape[-1:-3:-1])  # type: ignore[index]
        expected = "states in {} and actions in {} dimensions".format(*size)
        given = tuple(math.prod(space.shape or (0,)) for space in (states, actions))
    if size != given:
        raise _misfit(model, expected, directory)
    return model


def _fitted_to_network(
    model: EnvironmentModel, made_for: Architecture, directory: Path
) -> EnvironmentModel:
    from inference_rl.environment import WithPreviousAction
    from inference_rl.evaluation import episode_limit
    from inference_rl.networks import described

    states, actions = _layout(described(model.state_space)), _layout(described(model.action_space))
    wanted = _layout(made_for.states), _layout(made_for.actions)
    longest = episode_limit(model)
    if made_for.horizon is not None and longest > made_for.horizon:
        raise ValueError(
            f"{directory}: its policy depends on the step, of which it knows {made_for.horizon}, "
            f"and episodes of {model.name} may have {longest}"
        )
    if wanted == (states, actions):
        return model
    remembering = None
    if states[0] == actions[0] == "discrete":
        remembering = ("discrete", states[1] * (actions[1] + 1))
    if wanted == (remembering, actions):  # inferred under a StickyPrior
        return WithPreviousAction(model)
    words = "{1} {0} states and {3} {2} actions".format(*wanted[0], *wanted[1])
    raise _misfit(model, words, directory)


def _layout(description: dict[str, Any]) -> tuple[str, Any]:
    """Kind and size of a space: whether states have bounds is nothing to a network."""
    sizes = {name: value for name, value in description.items() if name not in ("kind", "bounded")}
    return description["kind"], *sizes.values()


def _misfit(model: EnvironmentModel, expected: str, directory: Path) -> ValueError:
    return ValueError(
        f"{directory}: its policy is for {expected}, and {model.name} has {model.state_space} and "
        f"{model.action_space}"
    )
