"""What learns on a GPU does what it does on the CPU; left out by name where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete

from inference_rl import (
    SAC,
    SQL,
    CategoricalPrior,
    EnvironmentModel,
    GaussianPrior,
    SoftDDPG,
    SoftTD3,
    infer,
    load_target,
)
from inference_rl.inference import off_policy, sac, soft_ddpg, soft_td3, sql
from inference_rl.learning.collection import Collector
from inference_rl.learning.tracing import Graph
from inference_rl.networks import example_states
from inference_rl.randomness import torch_seeded
from inference_rl.simulate import environments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SMALL: dict[str, Any] = {
    "total_steps": 600,
    "environments": 4,
    "steps_per_round": 8,
    "warmup_steps": 64,
    "batch_size": 32,
    "hidden": (32, 32),
    "replay_capacity": 1000,
    "evaluation_episodes": 2,
    "compile": "off",
}


class Pair(EnvironmentModel):
    """Two choices at once, the second of which pays."""

    state_space, action_space, discount = Box(-9.0, 9.0, (2,)), MultiDiscrete([2, 3]), 0.9
    horizon = 5

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def transition(self, state: torch.Tensor, action: torch.Tensor) -> Any:
        return dist.Delta(state + 0.2 * action, event_dim=1)

    def reward(
        self, state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor
    ) -> torch.Tensor:
        return action[..., 1] - state[..., 0].square()


def prior_of_pairs(state: torch.Tensor) -> Any:
    probs = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.3, 0.5]], device=state.device)
    return dist.Categorical(probs=probs.expand(*state.shape[:-1], 2, 3)).to_event(1)


PRIORS: dict[str, Any] = {
    "Pendulum-v1": lambda space: GaussianPrior(space, 0.2, 0.6),
    "CartPole-v1": lambda space: CategoricalPrior(probs=[0.3, 0.7]),
    "chain": lambda space: CategoricalPrior(probs=[0.3, 0.7]),
    "pair": lambda space: prior_of_pairs,
}
LEARN_PRIOR: dict[str, Any] = {"learn_prior": True, "learning_rate": 1e-2}

ROUTINES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sac": (SAC, sac._learner, {}),
    "sac, learned prior": (SAC, sac._learner, LEARN_PRIOR),
    "sql": (SQL, sql._learner, {}),
    "soft-ddpg": (SoftDDPG, soft_ddpg._learner, {}),
    "soft-td3": (SoftTD3, soft_td3._learner, {}),
}
CASES = [
    (routine, target)
    for routine in ROUTINES
    for target in PRIORS
    if target == "Pendulum-v1" or routine.startswith(("sac", "sql"))
]


def model_of(target: str) -> EnvironmentModel:
    return Pair() if target == "pair" else load_target(target)


def first_update(routine: str, target: str, device: str) -> dict[str, float]:
    model = model_of(target)
    torch.manual_seed(0)
    settings_class, make_learner, more = ROUTINES[routine]
    settings = settings_class(**SMALL | {"updates_per_step": 1 / 64} | more, device=device)
    prior = model.action_prior if more else PRIORS[target](model.action_space)
    learner = make_learner(settings, model, prior)
    collector = Collector(environments(model, 4), 0)
    numbers: dict[str, Any] = {}
    while learner.updates == 0:
        numbers = learner.update(learner.collect(collector))
    learner.settle()
    parameters = {
        f"{name}.{key}": parameter
        for name, part in learner.parts.items()
        for key, parameter in part.module.named_parameters()
    }
    sums = {key: float(value.detach().double().square().sum()) for key, value in parameters.items()}
    return {key: float(value) for key, value in numbers.items()} | sums


@pytest.mark.parametrize(("routine", "target"), CASES)
def test_the_first_update_is_that_of_the_cpu(routine: str, target: str) -> None:
    here, there = (first_update(routine, target, device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("routine", "target"), CASES)
def test_a_run_is_saved_and_resumed(routine: str, target: str, tmp_path: Path) -> None:
    settings_class, _, more = ROUTINES[routine]
    settings, model = settings_class(**SMALL | more, device="cuda"), model_of(target)
    whole = infer(model, settings, directory=tmp_path / "whole")
    modules: list[Any] = [whole.policy, whole.q]
    if more:
        assert whole.prior_source is not None
        modules.append(whole.prior_source())
    for module in modules:
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert whole.v(example_states(model.state_space, 3), 0).isfinite().all()
    halves = tmp_path / "halves"

    class Stopped(BaseException):
        pass

    update, count = off_policy.Learner.update, 0

    def stopping(self: Any, data: Any) -> Any:
        nonlocal count
        count += 1
        if count == 12:
            raise Stopped
        return update(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(off_policy.Learner, "update", stopping)
        with pytest.raises(Stopped):
            infer(model, settings, directory=halves)
    again = infer(model, settings, directory=halves)
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_operations_are_captured_constants_and_noise_among_them(compiled: bool) -> None:
    layer = torch.nn.Linear(4, 4, device="cuda")

    def program(state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(state.device)
        return (layer(state) * scale + torch.randn(4, device=state.device),)

    recorded = Graph(program, [layer], compiled=compiled)
    for seed in range(3):
        with torch.no_grad():
            layer.weight.mul_(1.1)
        state = torch.full((4,), float(seed), device="cuda")
        with torch_seeded(seed):
            (found,) = recorded(state)
        assert recorded.captured
        # What the capture does not keep alive is lost to whoever wants memory next.
        _ = [torch.full((4,), torch.nan, device="cuda") for _ in range(1000)]
        with torch_seeded(seed):
            noise = torch.randn(4).cuda()
        scale = torch.arange(1.0, 5.0, device="cuda")
        assert torch.allclose(found, layer(state) * scale + noise, rtol=1e-5, atol=1e-5)


def test_what_waits_for_values_is_launched_operation_by_operation() -> None:
    def program(state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (state[torch.nonzero(state > 0)].sum(),)

    recorded = Graph(program, [], compiled=False)
    with pytest.warns(UserWarning, match="cannot be captured on the GPU"):
        recorded(torch.ones(4, device="cuda"))
    for scale in (1.0, 2.0):
        assert recorded(torch.full((4,), scale, device="cuda"))[0] == 4 * scale
    assert not recorded.captured
    whole = Graph(lambda state: (2 * state,), [], compiled=False)
    assert whole(torch.ones(4, device="cuda"))[0].sum() == 8
    assert whole.captured


def test_what_cannot_be_recorded_draws_the_same_again() -> None:
    def by_value(state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sign = 1 if state.sum() > 0 else -1
        return (sign * torch.randn(4, device=state.device),)

    recorded, found = Graph(by_value, [], compiled=False), []
    with pytest.warns(UserWarning, match="cannot be recorded"):
        recorded.prepared(torch.ones(4, device="cuda"))
    for seed in (3, 3, 4):
        with torch_seeded(seed):
            found += recorded(torch.ones(4, device="cuda"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
