"""Sampled trajectories in the form that ArviZ and xarray read."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.policies import Policy
from inference_rl.priors import ActionPrior
from inference_rl.simulate import GymnasiumModel, discounted_steps, evaluate

if TYPE_CHECKING:
    import xarray

    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult


def effective_horizon(model: EnvironmentModel, draws: int, horizon: int | None) -> int:
    """How many steps to draw: `horizon`, the model's own, or its `discounted_steps`.

    :raises ValueError: no draws, or more steps than the model has.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least one, got {draws}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon: expected at least one step, got {horizon}")
    if model.horizon is not None:
        if horizon is not None and horizon > model.horizon:
            raise ValueError(f"horizon: the model ends after {model.horizon} steps, got {horizon}")
        return horizon or model.horizon
    return horizon or discounted_steps(model.discount)


def trajectories_tree(columns: dict[str, Tensor], attributes: dict[str, Any]) -> xarray.DataTree:
    """A DataTree of one chain: `posterior` (states, actions, rewards) and `sample_stats`.

    :param columns: `state` (draws, T + 1, ...), `action` (draws, T, ...), `reward` and `alive`
        (draws, T), and optionally `log_weight` (draws,), nats.
    :param attributes: numbers and strings to keep with the draws; others are left out.
    """
    import xarray

    paths = {}
    for name in ("state", "action", "reward", "alive"):
        array = columns[name].numpy()[np.newaxis]
        time = "time_and_end" if name == "state" else "time"
        extra = [f"{name}_dim_{i}" for i in range(array.ndim - 3)]
        paths[name] = (["chain", "draw", time, *extra], array)
    stats = {"return": (["chain", "draw"], columns["reward"].sum(1).numpy()[np.newaxis])}
    if "log_weight" in columns:
        stats["log_weight"] = (["chain", "draw"], columns["log_weight"].numpy()[np.newaxis])
    kept = {k: v for k, v in attributes.items() if isinstance(v, str | int | float)}
    tree = xarray.DataTree.from_dict(
        {"posterior": xarray.Dataset(paths), "sample_stats": xarray.Dataset(stats)}
    )
    tree.attrs.update(kept)
    return tree


def complete(tree: xarray.DataTree, result: InferenceResult, seed: int) -> xarray.DataTree:
    """`tree`, the draws of `result`, with what else is known: see `InferenceResult.sample`."""
    import xarray

    from inference_rl.inference.reference import reference

    reward, stats = tree["posterior"]["reward"], tree["sample_stats"]
    weight = float(result.model.discount) ** np.arange(reward.sizes["time"])
    stats["discounted_return"] = (reward * weight).sum("time")
    groups = {}
    if result.temperature > 0:
        alive = tree["posterior"]["alive"]
        log_likelihood = (reward / result.temperature).where(alive, 0.0)
        groups["log_likelihood"] = xarray.Dataset({"optimality": log_likelihood})
    draws, steps = stats.sizes["draw"], reward.sizes["time"]
    acting = stats.to_dataset()["return"].values[0]
    if getattr(result.routine, "target", "control") == "posterior":
        acting = _returns(result.model, result.policy, draws, steps, seed)
    groups["posterior_predictive"] = _predictive(acting)
    prior, model = result.prior, result.model
    improper = isinstance(model, LinearGaussianModel) and model.prior_covariance is None
    if prior is not None and not improper:
        acting = _returns(model, _ByPrior(prior), draws, steps, seed)
        groups["prior_predictive"] = _predictive(acting)
    exact = reference(result)
    if not isinstance(exact, str):
        groups["exact"] = exact.as_dataset()
    for name, group in groups.items():
        tree[name] = xarray.DataTree(group)
    return tree


class _ByPrior(Policy):
    """Acting as the prior does."""

    kind = "prior"

    def __init__(self, prior: ActionPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        return self.prior(state)

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        raise NotImplementedError("actions of a prior are drawn")


def _returns(
    model: EnvironmentModel, policy: Policy, draws: int, steps: int, seed: int
) -> np.ndarray:
    """Sums of rewards, (draws,), of `policy` in `program_of` a model."""
    from inference_rl.randomness import derived

    seed = derived(seed, f"{policy.kind} predictive")
    return evaluate(program_of(model), policy, episodes=draws, seed=seed, max_steps=steps).returns


def program_of(model: EnvironmentModel) -> EnvironmentModel:
    """`model` apart from any real environment, whose limit on time is none of the program's; as it
    is where it is nothing but a simulator."""
    if isinstance(model, GymnasiumModel):
        return model
    program = copy.copy(model)
    program.gymnasium_id = None
    return program


def _predictive(returns: np.ndarray) -> xarray.Dataset:
    import xarray

    return xarray.Dataset({"return": (["chain", "draw"], returns[np.newaxis])})
