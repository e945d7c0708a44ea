"""Priors that forbid actions in some continuous states: kept to, saved, loaded and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_rl import (
    PCL,
    SQL,
    CategoricalPrior,
    InferenceResult,
    MaskPrior,
    MixturePrior,
    PolicyGradient,
    PolicyPrior,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.cli import main
from inference_rl.inference import learned
from inference_rl.learning import loop
from inference_rl.learning.collection import Collector
from inference_rl.policies import load_policy
from inference_rl.simulate import environments

SMALL: dict[str, Any] = {"environments": 4, "evaluation_episodes": 0, "hidden": (16,)}
ROUTINES = {
    "policy-gradient": PolicyGradient(**SMALL, total_steps=3000),
    **{kind: PCL(kind=kind, **SMALL, total_steps=2000) for kind in ("pcl", "unified", "trust")},
    "sql": SQL(**SMALL, total_steps=400, warmup_steps=128, temperature=0.1, compile="off"),
}

SOURCE = """
import torch
from inference_rl import EnvironmentModel, MaskPrior
import pyro.distributions as dist
from gymnasium.spaces import Box, Discrete

def braked(state):
    return torch.stack([torch.ones_like(state[..., 0]) > 0, state[..., 0].abs() < 1], -1)

kept = MaskPrior(braked)

class Slide(EnvironmentModel):
    state_space, action_space, discount, horizon = Box(-9.0, 9.0, (4,)), Discrete(2), 0.9, 20
    def initial_state(self):
        return dist.Normal(torch.zeros(4), 1.0).to_event(1)
    def transition(self, state, action):
        return dist.Delta(state + 0.3 * (action.unsqueeze(-1) - 0.3), event_dim=1)
    def reward(self, state, action, next_state):
        return next_state[..., 0]
    def action_prior(self, state):
        return MaskPrior(braked)(state)
"""


def allowed_in(state: Tensor) -> Tensor:
    """Of CartPole's two pushes: none further right at its right, none left as it tilts right."""
    return torch.stack([state[..., 2] < 0.05, (state[..., 0] < 0.02) | (state[..., 2] >= 0.05)], -1)


PRIOR = MaskPrior(allowed_in)

# It looks at values, to see that some action is allowed.
pytestmark = pytest.mark.filterwarnings("ignore:the program cannot be recorded")


@pytest.mark.parametrize("name", list(ROUTINES))
def test_what_is_forbidden_somewhere_is_never_done_there(name: str, tmp_path: Path) -> None:
    model = load_target("CartPole-v1")
    result = infer(model, ROUTINES[name], prior=PRIOR, seed=1)
    assert result.objective is not None
    assert math.isfinite(result.objective)
    data = Collector(environments(model, 32), 5).collect_episodes(result.policy)
    some = ~allowed_in(data.state).all(-1) & data.valid
    assert some.sum() > 100
    assert PRIOR(data.state).log_prob(data.action)[data.valid].isfinite().all()
    assert PRIOR(data.state).log_prob(result.policy.mode(data.state)).isfinite().all()
    result.save(tmp_path)
    policy = load_policy(tmp_path, prior=PRIOR)
    assert torch.equal(policy(data.state).probs, result.policy(data.state).probs)
    loaded = InferenceResult.load(tmp_path)
    assert loaded.objective == result.objective
    with pytest.raises(ValueError, match=r"made in Python.*load_policy\(directory, prior="):
        loaded.policy(data.state)
    with pytest.raises(ValueError, match=r"a prior is code.*InferenceResult\.load\(directory\)"):
        load_policy(tmp_path)


@pytest.mark.parametrize("name", list(ROUTINES))
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, finite, rounds = load_target("CartPole-v1"), loop._finite, 0
    whole = infer(model, ROUTINES[name], prior=PRIOR, directory=tmp_path / "whole")

    def stopped(*given: Any) -> dict[str, float]:
        nonlocal rounds
        rounds += 1
        if rounds == 7:
            raise KeyboardInterrupt
        return finite(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_finite", stopped)
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            infer(model, ROUTINES[name], prior=PRIOR, directory=tmp_path / "run")
    again = infer(model, ROUTINES[name], prior=PRIOR, directory=tmp_path / "run")
    for folder, result in (("whole", whole), ("run", again)):
        result.save(tmp_path / folder)
    for file in ("run.json", "policy.safetensors", "messages.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("target", "prior", "support"),
    [("CartPole-v1", "kept", "given"), ("slide.py", None, "own"), ("slide.py", "kept", "given")],
)
def test_priors_that_a_run_names_are_loaded_when_the_policy_is_called(
    target: str, prior: str | None, support: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "slide.py", str(tmp_path / "run")
    file.write_text(SOURCE)
    words = ["infer", str(file) if target == "slide.py" else target, "policy-gradient", "--json"]
    words += ["--total-steps", "600", "--environments", "4", "--evaluation-episodes", "0"]
    words += ["--out", run, "--episodes", "3"]
    main(words if prior is None else [*words, "--prior", f"{file}:{prior}"])
    inferred = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = InferenceResult.load(run)
    assert loaded.policy.description()["support"] == support
    states = torch.tensor([[0.0] * 4, [1.5] * 4])
    distribution = loaded.policy(states, 0)
    assert (distribution.probs > 0).tolist() == [[True, True], [True, False]]
    main(["evaluate", run, "--episodes", "3", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["evaluation"] == inferred["evaluation"]


def test_who_made_the_prior_in_python_is_told_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routine = PolicyGradient(**SMALL, total_steps=200)
    infer(load_target("CartPole-v1"), routine, prior=PRIOR).save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "was inferred under a prior made in Python" in said[-1]


def test_priors_that_forbid_nothing_or_the_same_everywhere_are_not_asked() -> None:
    model = load_target("CartPole-v1")
    uniform = UniformPrior(model.action_space)
    free = learned.networks(PolicyGradient(), model, model.action_prior)[0]

    def found(prior: Any) -> tuple[bool, str | None]:
        made = learned.networks(PolicyGradient(), model, prior)[0].architecture
        return made.masked, made.support

    for prior in (model.action_prior, uniform, CategoricalPrior([0.1, 0.9]), PolicyPrior(free)):
        assert found(prior) == (False, None)
    for prior in (CategoricalPrior([0.0, 1.0]), MaskPrior([True, False])):
        assert found(prior) == (True, None)
    bound = learned.networks(PolicyGradient(), model, PRIOR)[0]
    assert found(MixturePrior([PRIOR, uniform])) == (False, None)
    for prior in (PRIOR, PolicyPrior(bound), MixturePrior([PRIOR, uniform], [1.0, 0.0])):
        assert found(prior) == (False, "given")
