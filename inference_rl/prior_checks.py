"""Checks of an action prior against the actions of a model, on states it may be asked about."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import ROW_SUM_TOLERANCE, as_probs, checked_categoricals
from inference_rl.environment import EnvironmentModel
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.priors import ActionPrior
from inference_rl.simulate import starting_states
from inference_rl.tabulation import call, check_table_size, checked_discrete, prior_name

SAMPLES = 10_000
"""Draws from which the mass of a density outside the box is estimated."""

NEGLIGIBLE_MASS = 1e-3
"""Mass outside the box that goes unmentioned; the most that `SAMPLES` draws can tell from none."""


FEW = 1000
"""Discrete states of which a fingerprint is taken."""


def states_to_act_in(model: EnvironmentModel) -> Tensor:
    """All discrete states, or some that episodes start in, that do not end the episode; (n, ...).

    :raises EnvironmentFault: an environment failed.
    """
    if isinstance(model.state_space, Discrete):
        states = torch.arange(int(model.state_space.n))
    else:
        states = starting_states(model)
    return states[~model.terminal(states)]


def fingerprint(prior: ActionPrior, model: EnvironmentModel) -> str:
    """SHA-256 of log ρ, to six digits, at some states and actions: another prior has another.

    :raises ValueError: it is none for the actions of `model`.
    """
    states = states_to_act_in(model)
    if not len(states):
        return ""
    check_prior(prior, model, states)
    space, states = model.action_space, states[:: -(-len(states) // FEW)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        chosen = prior(states)
        if isinstance(space, Discrete):
            log_prob = as_probs(chosen, int(space.n)).log()
        elif isinstance(space, MultiDiscrete):
            numbers = torch.arange(len(states)).unsqueeze(-1)
            log_prob = chosen.log_prob(numbers % torch.as_tensor(space.nvec))
        else:
            dtype = states.dtype if states.is_floating_point() else torch.get_default_dtype()
            along = torch.linspace(-0.9, 0.9, len(states), dtype=dtype)
            log_prob = chosen.log_prob(along.unsqueeze(-1).expand(-1, *(space.shape or ())))
    rounded = log_prob.double().round(decimals=6) + 0.0  # which has no negative zero
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()


def check_prior(prior: ActionPrior, model: EnvironmentModel, states: Tensor) -> None:
    """Check ρ(a | s) against the action space of `model`, at some states (n, ...).

    The global random state of torch is left as it was.

    :raises ValueError: no distribution, a wrong shape, mass that does not sum to one or that mostly
        lies outside the action space, a density that is not finite on the closed box.
    :warns UserWarning: a density with some of its mass outside the box.
    """
    where, space = prior_name(prior), model.action_space
    if not isinstance(space, Discrete | MultiDiscrete | Box):
        raise ValueError(
            f"{where}: expected a Discrete, MultiDiscrete or Box action space, got {space}"
        )
    batch = states.shape[: states.dim() - len(model.state_space.shape or ())]
    if isinstance(model.state_space, Discrete):
        check_table_size(prior, int(model.state_space.n))
    with torch.random.fork_rng(devices=[]), checked_categoricals():
        torch.manual_seed(0)
        result = call(where, prior, states)
        if isinstance(space, Discrete):
            checked_discrete(result, batch, int(space.n), where)
        elif isinstance(space, MultiDiscrete):
            _check_choices(result, batch, space, where)
        else:
            if _is_discrete(result):
                raise ValueError(f"{where}: expected a density over {space}, got {result}")
            chosen = checked_vectors(result, batch, space, where)
            # Actions of these range over all of R^d, and there may be nothing to sample.
            if not isinstance(model, LinearGaussianModel):
                _check_inside(chosen, len(states), where)


def checked_vectors(
    result: Any, batch: torch.Size, space: Space[Any], where: str
) -> TorchDistribution:
    """`result`, if it is a distribution over vectors of `space`, of this batch shape.

    :raises ValueError: it is none; says what was expected and what came.
    """
    if not isinstance(result, torch.distributions.Distribution):
        raise ValueError(f"{where}: expected a Pyro distribution, got a {type(result).__name__}")
    if result.batch_shape != batch or result.event_shape != space.shape:
        raise ValueError(
            f"{where}: expected batch shape {tuple(batch)} and event shape {space.shape}, got "
            f"{tuple(result.batch_shape)} and {tuple(result.event_shape)}; .to_event(1) makes the "
            "last dimension an event"
        )
    return result  # type: ignore[return-value]


def _is_discrete(distribution: Any) -> bool:
    try:
        return bool(distribution.support.is_discrete)
    except (AttributeError, NotImplementedError):  # it is none, or does not say
        return False


def _check_choices(result: Any, batch: torch.Size, space: MultiDiscrete, where: str) -> None:
    """Several discrete choices at once, each padded to the categories of the largest."""
    chosen: Any = checked_vectors(result, batch, space, where)
    if not _is_discrete(chosen):
        raise ValueError(f"{where}: expected a distribution over integers, got {result}")
    sizes = torch.as_tensor(space.nvec)
    base = getattr(chosen, "base_dist", None)
    if isinstance(base, torch.distributions.Categorical):
        known = base.probs.shape[-1]
        if known < int(sizes.max()):
            raise ValueError(
                f"{where}: expected categories for each of the {sizes.tolist()} values of "
                f"{space}, got {known}"
            )
        outside = (base.probs * (torch.arange(known) >= sizes.unsqueeze(-1))).sum(-1)
        most = float(outside.max())
    else:
        drawn = chosen.sample((max(SAMPLES // batch.numel(), 1),))
        most = float(((drawn < 0) | (drawn >= sizes)).double().mean())
    if not most <= ROW_SUM_TOLERANCE:
        raise ValueError(
            f"{where}: expected its mass on the {sizes.tolist()} values of {space}, got "
            f"probability {most:.3g} elsewhere"
        )


def _check_inside(chosen: TorchDistribution, states: int, where: str) -> None:
    """A density on [-1, 1]^d."""
    drawn = chosen.sample((max(SAMPLES // states, 1),))
    outside = float(((drawn.abs() > 1).any(-1)).double().mean())
    if outside > 0.5:
        raise ValueError(
            f"{where}: expected its mass inside the action box [-1, 1]^d, got {outside:.0%} of it "
            "outside; actions are scaled to [-1, 1] inside this library"
        )
    if outside > NEGLIGIBLE_MASS:
        warnings.warn(
            f"{where}: {outside:.1%} of its mass lies outside the action box [-1, 1]^d, where no "
            "policy can go; GaussianPrior truncates and renormalises",
            stacklevel=5,
        )
    edges = [torch.full_like(drawn[:1], edge) for edge in (-1.0, 1.0)]
    for actions in (*edges, drawn.clamp(-1, 1)):
        density = chosen.log_prob(actions)
        wrong = ~torch.isfinite(density)
        if wrong.any():
            at = ", ".join(f"{x:.3g}" for x in actions.expand_as(drawn[: len(actions)])[wrong][0])
            raise ValueError(
                f"{where}: expected a finite density on the whole closed box, got log-density "
                f"{density[wrong][0].item()} at [{at}]; saturated actions do reach its edges, "
                "where GaussianPrior and UniformPrior are finite"
            )
