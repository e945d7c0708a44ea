"""Collection: episodes depend on their numbers alone, and go on as if they had not stopped."""

from __future__ import annotations

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from pyro.distributions.torch_distribution import TorchDistribution

from inference_rl import EnvironmentModel, evaluation, load_target
from inference_rl.learning.collection import Collector, Segment
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.simulate import VectorEnvironments, environments


def policy_for(model) -> NetworkPolicy:
    torch.manual_seed(1)
    architecture = Architecture(
        described(model.state_space), described(model.action_space), horizon=model.horizon
    )
    policy = NetworkPolicy(architecture)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0.0, 0.3)
    return policy


def episodes_of(data: Segment) -> dict[tuple[int, int], torch.Tensor]:
    """Rewards by slot and how many episodes ended in it before, whole episodes only."""
    found = {}
    for slot in range(data.reward.shape[1]):
        ends = data.ended[:, slot].nonzero().flatten().tolist()
        for i, (start, end) in enumerate(zip([-1, *ends], ends, strict=False)):
            span = slice(start + 1, end + 1)
            found[slot, i] = torch.cat(
                [data.reward[span, slot], data.action[span, slot].double().flatten()]
            )
    return found


@pytest.mark.parametrize("target", ["CartPole-v1", "grid-world", "Pendulum-v1"])
def test_segments_and_whole_episodes_are_the_same_episodes(target: str) -> None:
    model = load_target(target)
    policy = policy_for(model)
    whole = Collector(environments(model, 3, 60), 5).collect_episodes(policy)
    parts = Collector(environments(model, 3, 60), 5)
    joined = [parts.collect(policy, steps) for steps in (7, 60, 13)]
    long = Segment(*(torch.cat([getattr(p, n) for p in joined]) for n in Segment.__annotations__))
    first = episodes_of(long)
    for slot in range(3):
        valid = whole.valid[:, slot]
        again = torch.cat([whole.reward[valid, slot], whole.action[valid, slot].double().flatten()])
        torch.testing.assert_close(first[slot, 0], again, rtol=0, atol=0)


def test_what_follows_a_step_is_never_the_next_episode() -> None:
    model = load_target("CartPole-v1")
    data = Collector(environments(model, 4, 30), 0).collect(policy_for(model), 200)
    inside = ~data.ended[:-1]
    torch.testing.assert_close(data.next_state[:-1][inside], data.state[1:][inside])
    assert data.ended.any()
    start = data.state[1:][data.ended[:-1]]
    assert start.abs().max() <= 0.05  # where CartPole starts
    assert (data.step[1:][data.ended[:-1]] == 0).all()
    cut = data.truncated.nonzero()
    assert (data.step[cut[:, 0], cut[:, 1]] == 29).all()
    assert not (data.terminated & data.truncated).any()


def test_whole_episodes_end_once_and_are_nothing_after() -> None:
    model = load_target("CartPole-v1")
    data = Collector(environments(model, 5), 0).collect_episodes(policy_for(model))
    assert (data.ended.sum(0) == 1).all()
    lengths = data.valid.sum(0)
    ends = data.ended.int().argmax(0)
    assert torch.equal(lengths, ends + 1)
    assert not data.reward[~data.valid].any()


@pytest.mark.parametrize("target", ["CartPole-v1", "grid-world"])
@pytest.mark.parametrize("before", [0, 1, 17, 64])
def test_goes_on_where_it_was(target: str, before: int) -> None:
    model = load_target(target)
    policy = policy_for(model)
    one = Collector(environments(model, 3), 2)
    if before:
        one.collect(policy, before)
    two = Collector(environments(model, 3), 2)
    two.load_state_dict(one.state_dict())
    for steps in (5, 40):
        left, right = one.collect(policy, steps), two.collect(policy, steps)
        for name in Segment.__annotations__:
            assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert one.finished == two.finished


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_environment_goes_on_where_it_was(mode: AutoresetMode) -> None:
    model = load_target("CartPole-v1")
    policy = policy_for(model)

    def collector() -> Collector:
        made = [lambda: gymnasium.make("CartPole-v1")] * 3
        return Collector(VectorEnvironments(SyncVectorEnv(made, autoreset_mode=mode)), 2)

    one, single = collector(), Collector(environments(model, 3), 2)
    assert torch.equal(one.collect(policy, 61).reward, single.collect(policy, 61).reward)
    two = collector()
    two.load_state_dict(one.state_dict())
    left, right = one.collect(policy, 40), two.collect(policy, 40)
    for name in Segment.__annotations__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    # Whatever steps them, the same episodes come of the same seeds.
    assert torch.equal(left.state, single.collect(policy, 40).state)


def test_what_a_failed_collection_took_can_be_undone() -> None:
    model = load_target("CartPole-v1")
    policy = policy_for(model)
    batch = environments(model, 3)
    one = Collector(batch, 2)
    one.collect(policy, 23)
    expected = one.state_dict()
    step, calls = batch.step, 0

    def failing(*given):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise RuntimeError("broken")
        return step(*given)

    batch.step = failing
    with pytest.raises(RuntimeError, match="broken"):
        one.collect(policy, 50)
    found = one.state_dict(before=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value)
    assert found["finished"] == expected["finished"]
    for left, right in zip(found["actions"], expected["actions"], strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_an_environment_that_does_not_heed_its_seed_is_told() -> None:
    model = load_target("CartPole-v1")
    policy = policy_for(model)
    batch = environments(model, 2)
    rng = np.random.default_rng()
    reset = batch.reset
    batch.reset = lambda slots, seeds: reset(slots, rng.integers(2**62, size=len(seeds)))
    one = Collector(batch, 0)
    one.collect(policy, 9)
    # The replayed episode is another one: CartPole pays the same until it ends, so wait for that.
    state = one.state_dict()
    state["actions"] = [torch.zeros(40, dtype=torch.long) for _ in range(2)]
    said = r"slot \d: its episode \d+, .* resumed or a worker replaced, went another way than"
    with pytest.raises(RuntimeError, match=said):
        one.load_state_dict(state)


class Doors(EnvironmentModel):
    """Starts behind one of four doors, of which some lead out at once; then two steps to the end.

    Pays one a step.
    """

    state_space, action_space, discount = Discrete(6), Discrete(2), 0.9

    def __init__(self, out: int) -> None:
        self.out = out

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))

    def transition(self, state: torch.Tensor, action: torch.Tensor) -> TorchDistribution:
        return dist.Delta(torch.where(state < 4, 4, 5))

    def reward(self, state, action, next_state) -> torch.Tensor:
        return torch.ones(state.shape, dtype=torch.float64)

    def terminal(self, state: torch.Tensor) -> torch.Tensor:
        return (state == 5) | (state < self.out)


def test_episodes_that_end_where_they_start_count_and_have_no_steps() -> None:
    model = Doors(out=2)
    one = Collector(environments(model, 3), 0)
    data = one.collect(policy_for(model), 300)
    assert data.valid.all()
    assert not model.terminal(data.state).any()
    lengths = np.array([episode.length for episode in one.finished])
    assert set(lengths) == {0, 2}
    assert len({episode.number for episode in one.finished}) == len(lengths)
    assert abs((lengths == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(lengths))
    assert all(episode.total == episode.length for episode in one.finished)
    found = evaluation.evaluate(model, policy_for(model), episodes=500)
    assert abs((found.lengths == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(500)


def test_whole_episodes_that_end_where_they_start_have_no_valid_step() -> None:
    model = Doors(out=2)
    one = Collector(environments(model, 40), 0)
    data = one.collect_episodes(policy_for(model))
    empty = ~data.valid.any(0)
    assert 0 < empty.sum() < 40
    assert torch.equal(model.terminal(data.state[0]), empty)
    assert len(one.finished) == 40
    assert torch.equal(data.reward.sum(0), 2.0 * ~empty)


def test_where_episodes_end_at_their_start_collection_goes_on_where_it_was() -> None:
    model = Doors(out=3)
    policy = policy_for(model)
    one = Collector(environments(model, 3), 2)
    one.collect(policy, 5)
    two = Collector(environments(model, 3), 2)
    two.load_state_dict(one.state_dict())
    left, right = one.collect(policy, 20), two.collect(policy, 20)
    assert torch.equal(left.state, right.state)
    assert one.finished == two.finished


@pytest.mark.parametrize("how", ["collect", "collect_episodes"])
def test_a_model_whose_episodes_all_end_at_their_start_is_refused(how: str) -> None:
    model = Doors(out=4)
    one = Collector(environments(model, 3), 0)
    given = (5,) if how == "collect" else ()
    with pytest.raises(
        ValueError, match="terminal: expected an episode that goes beyond its start"
    ):
        getattr(one, how)(policy_for(model), *given)


def test_whole_episodes_start_together() -> None:
    model = load_target("CartPole-v1")
    one = Collector(environments(model, 2), 0)
    one.collect(policy_for(model), 3)
    with pytest.raises(RuntimeError, match="expected every slot at its start"):
        one.collect_episodes(policy_for(model))
