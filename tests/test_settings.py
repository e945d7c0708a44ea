"""Settings of learned routines that are of another kind than their fields, and what is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from inference_rl import PCL, REPS, SAC, SQL, PolicyGradient, SoftDDPG, SoftTD3

TUNED = [SAC, SQL, PolicyGradient, PCL, REPS]
"""Their temperature may tune itself, and their policy be a module of one's own, but for SQL's."""

ROUTINES = [*TUNED, SoftDDPG, SoftTD3]

OF_ALL = [
    ({"activation": "gelu"}, r"activation: expected one of 'tanh', 'relu', 'silu', got 'gelu'"),
    ({"hidden": 64}, "hidden: expected a tuple in which each is a whole number, got 64"),
    ({"hidden": (64.0,)}, r"hidden: expected a tuple in .* got \(64\.0,\)"),
    ({"environments": True}, "environments: expected a whole number, got True"),
    ({"total_steps": 2.5}, "total_steps: expected a whole number, got 2.5"),
    ({"learning_rate": math.inf}, "^learning_rate: expected a finite number, got inf"),
    ({"learning_rate": 0}, "^learning_rate: expected a number > 0, got 0"),
    ({"learning_rate": "fast"}, "^learning_rate: expected a finite number, got 'fast'"),
    ({"learning_rate": None}, "^learning_rate: expected a finite number, got None"),
    ({"temperature": True}, "temperature: expected a finite number.* got True"),
    ({"tensorboard": 1}, "tensorboard: expected True or False, got 1"),
    ({"scale_observations": "no"}, "scale_observations: expected True or False, got 'no'"),
]
OF_TUNED = [
    ({"temperature_learning_rate": 0}, "temperature_learning_rate: expected a number > 0, got 0"),
    ({"temperature": True}, "temperature: expected a finite number or 'auto', got True"),
    ({"target_entropy": math.nan, "temperature": "auto"}, "target_entropy: .* or None, got nan"),
]
OF_ONE: list[tuple[Any, dict[str, Any], str]] = [
    (SAC, {"batch_size": 0}, "batch_size: expected a number >= 1, got 0"),
    (SAC, {"replay_capacity": 0}, "replay_capacity: expected a number >= 1, got 0"),
    (SAC, {"target_rate": 1.5}, r"target_rate: expected a number in \[0, 1\], got 1.5"),
    (SAC, {"target_rate": 0.0}, "target_rate: expected a number > 0, got 0.0"),
    (SAC, {"updates_per_step": 0.0}, "updates_per_step: expected a number > 0, got 0.0"),
    (SAC, {"compile": "yes"}, "compile: expected one of 'auto', 'on', 'off', got 'yes'"),
    (SAC, {"device": "tpu"}, "device: expected one of 'cpu', 'cuda', got 'tpu'"),
    (SAC, {"greatest_temperature": 0.5}, "initial_temperature: expected a number in .* got 1.0"),
    (PolicyGradient, {"estimator": "pathwse"}, "estimator: expected one of 'score', .*'pathwse'"),
    (PolicyGradient, {"baseline": "lerned"}, "baseline: expected one of 'learned', 'none', got"),
    (PolicyGradient, {"steps_per_round": 2.5}, "steps_per_round: expected a whole number, got 2.5"),
    (PolicyGradient, {"value_learning_rate": 0.0}, "value_learning_rate: expected a number > 0"),
    (PolicyGradient, {"max_gradient_norm": math.inf}, "max_gradient_norm: .* number or None, got"),
    (PCL, {"kind": "trustt"}, "kind: expected one of 'pcl', 'unified', 'trust', got 'trustt'"),
    (PCL, {"expectation": "modl"}, "expectation: expected one of 'sample', 'model', got 'modl'"),
    (PCL, {"window": 2.5}, "window: expected a whole number, got 2.5"),
    (PCL, {"replay_capacity": math.inf}, "replay_capacity: expected a whole number, got inf"),
    (PCL, {"trust_episodes": True}, "trust_episodes: expected a whole number, got True"),
    (SQL, {"target_rate": 0}, "target_rate: expected a number > 0, got 0"),
    (SQL, {"target_rate": 1.5}, r"target_rate: expected a number in \[0, 1\], got 1.5"),
    (SQL, {"batch_size": 0}, "batch_size: expected a number >= 1, got 0"),
    (SQL, {"updates_per_step": 0}, "updates_per_step: expected a number > 0, got 0"),
    (SQL, {"warmup_steps": -1}, "warmup_steps: expected a number >= 0, got -1"),
    (SQL, {"initial_temperature": 2e8}, r"initial_temperature: .* in \[1e-08, 1.*0\], got 2"),
    (SQL, {"least_temperature": 2}, r"initial_temperature: expected a .* in \[2, 1.*0\], got 1.0"),
    (REPS, {"kind": "steps"}, "kind: expected one of 'step', 'episodic', got 'steps'"),
    (REPS, {"form": "tabel"}, "form: expected one of 'auto', 'table', 'linear', 'neural', got"),
    (REPS, {"context": 3}, "context: expected a tuple in which each is a whole number, got 3"),
    (REPS, {"covariance": "whole"}, "covariance: expected one of 'diagonal', 'full', got"),
    (REPS, {"epsilon": math.inf}, "epsilon: expected a finite number, got inf"),
    (SoftDDPG, {"width": True}, "width: expected a finite number, got True"),
    (SoftDDPG, {"compile": "yes"}, "compile: expected one of 'auto', 'on', 'off', got 'yes'"),
    (SoftTD3, {"smoothing": None}, "smoothing: expected a finite number, got None"),
    (SoftTD3, {"policy_every": 1.5}, "policy_every: expected a whole number, got 1.5"),
]


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize(("settings", "said"), OF_ALL)
def test_what_all_have(routine: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routine(**settings)


@pytest.mark.parametrize("routine", TUNED)
@pytest.mark.parametrize(("settings", "said"), OF_TUNED)
def test_what_those_have_that_are_tuned(routine: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routine(**settings)


@pytest.mark.parametrize(("routine", "settings", "said"), OF_ONE)
def test_what_one_has(routine: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routine(**settings)


@pytest.mark.parametrize("routine", TUNED)
def test_what_is_meant_is_taken(routine: Any) -> None:
    routine(
        temperature="auto",
        target_divergence=1,
        hidden=[8],
        learning_rate=np.float64(0.1),
        **({"policy": lambda state: state} if hasattr(routine, "policy") else {}),
    )
