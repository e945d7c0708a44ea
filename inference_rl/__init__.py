"""Reinforcement learning as probabilistic inference.

A trajectory is one Pyro program (`inference_rl.trajectory`); a policy is a factor of its guide; a
routine (`Exact`) is a way to fit the one to the other, and `infer(model, routine)` runs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_rl.distributions import Optimality, SparseCategorical
    from inference_rl.environment import EnvironmentModel, GridLayout
    from inference_rl.finite import FiniteModel
    from inference_rl.inference import InferenceResult, infer
    from inference_rl.inference.exact import Exact
    from inference_rl.inference.pcl import PCL
    from inference_rl.inference.policy_gradient import PolicyGradient
    from inference_rl.inference.reps import REPS
    from inference_rl.inference.sac import SAC
    from inference_rl.inference.soft_ddpg import SoftDDPG
    from inference_rl.inference.soft_td3 import SoftTD3
    from inference_rl.inference.sql import SQL
    from inference_rl.linear_gaussian import LinearGaussianModel
    from inference_rl.model_environment import as_gymnasium
    from inference_rl.policies import LinearGaussianPolicy, Policy, TabularPolicy
    from inference_rl.priors import (
        CategoricalPrior,
        GaussianPrior,
        MaskPrior,
        MixturePrior,
        PolicyPrior,
        StickyPrior,
        UniformPrior,
    )
    from inference_rl.scale_out import Workers
    from inference_rl.tabulation import tabulate
    from inference_rl.targets import load_target
    from inference_rl.truncated_normal import TruncatedNormal

__version__ = "0.1.0"

_HOME = {
    "Optimality": "distributions",
    "SparseCategorical": "distributions",
    "TruncatedNormal": "truncated_normal",
    "EnvironmentModel": "environment",
    "GridLayout": "environment",
    "FiniteModel": "finite",
    "InferenceResult": "inference",
    "infer": "inference",
    "Exact": "inference.exact",
    "PCL": "inference.pcl",
    "PolicyGradient": "inference.policy_gradient",
    "REPS": "inference.reps",
    "SAC": "inference.sac",
    "SoftDDPG": "inference.soft_ddpg",
    "SoftTD3": "inference.soft_td3",
    "SQL": "inference.sql",
    "LinearGaussianModel": "linear_gaussian",
    "as_gymnasium": "model_environment",
    "LinearGaussianPolicy": "policies",
    "Policy": "policies",
    "TabularPolicy": "policies",
    "CategoricalPrior": "priors",
    "GaussianPrior": "priors",
    "MaskPrior": "priors",
    "MixturePrior": "priors",
    "PolicyPrior": "priors",
    "StickyPrior": "priors",
    "UniformPrior": "priors",
    "tabulate": "tabulation",
    "load_target": "targets",
    "Workers": "scale_out",
}

__all__ = [
    "PCL",
    "REPS",
    "SAC",
    "SQL",
    "CategoricalPrior",
    "EnvironmentModel",
    "Exact",
    "FiniteModel",
    "GaussianPrior",
    "GridLayout",
    "InferenceResult",
    "LinearGaussianModel",
    "LinearGaussianPolicy",
    "MaskPrior",
    "MixturePrior",
    "Optimality",
    "Policy",
    "PolicyGradient",
    "PolicyPrior",
    "SoftDDPG",
    "SoftTD3",
    "SparseCategorical",
    "StickyPrior",
    "TabularPolicy",
    "TruncatedNormal",
    "UniformPrior",
    "Workers",
    "as_gymnasium",
    "infer",
    "load_target",
    "tabulate",
]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and `inference-rl --help` must not wait for it.
    if name not in _HOME:
        raise AttributeError(f"module 'inference_rl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"inference_rl.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
