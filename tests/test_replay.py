"""Replayed stretches are what was collected, in the order of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from inference_rl.learning import memory
from inference_rl.learning.collection import Segment
from inference_rl.learning.replay import PathReplay, joined


def segment(first: int, steps: int = 4, slots: int = 3) -> Segment:
    """Rewards count the steps of a run, with the slot behind the point."""
    time = torch.arange(first, first + steps, dtype=torch.float64).unsqueeze(-1)
    reward = time + torch.arange(slots) / 10
    false = torch.zeros(steps, slots, dtype=torch.bool)
    return Segment(
        state=reward.unsqueeze(-1),
        action=reward.long(),
        reward=reward,
        next_state=reward.unsqueeze(-1) + 1,
        terminated=false,
        truncated=reward.long() % 5 == 0,
        step=reward.long() % 5,
        valid=~false,
    )


def filled(rounds: int, capacity: int = 36) -> PathReplay:
    replay = PathReplay(capacity)
    for number in range(rounds):
        replay.add(segment(4 * number))
    return replay


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 8])
def test_stretches_are_contiguous_and_of_what_is_kept(rounds: int) -> None:
    replay = filled(rounds)
    drawn = replay.sample(500, 4, seed=1)
    assert drawn.reward.shape == (4, 500)
    assert ((drawn.reward.diff(dim=0) - 1).abs() < 1e-12).all()  # one slot, one step after another
    assert (drawn.reward.long() % 5 == drawn.step).all()
    torch.testing.assert_close(drawn.next_state - 1, drawn.state)
    assert torch.equal(drawn.truncated, drawn.step == 0)
    kept = range(max(4 * rounds - 12, 0), 4 * rounds)
    assert replay._stored == len(kept)
    assert set(drawn.reward[0].long().tolist()) == set(kept[: len(kept) - 3])


def test_starts_and_slots_are_uniform() -> None:
    drawn = filled(5).sample(90_000, 4, seed=2).reward[0]
    counts = np.unique(drawn.numpy().round(1), return_counts=True)[1]
    assert len(counts) == 27
    expected = 90_000 / 27
    assert ((counts - expected) ** 2 / expected).sum() < 55  # 99.9% of chi-squared with 26


def test_choice_depends_on_the_seed_alone() -> None:
    first = filled(5)
    torch.manual_seed(0)
    here = first.sample(20, 4, seed=3).reward
    torch.manual_seed(1)
    assert torch.equal(here, filled(5).sample(20, 4, seed=3).reward)
    assert not torch.equal(here, filled(5).sample(20, 4, seed=4).reward)


def test_room_to_resume_is_asked_for_and_what_was_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """36 steps of five numbers of 8 bytes and three of one; a field is never larger than 288."""
    free = 36 * 43 + 288
    monkeypatch.setattr(memory, "available", lambda device: free)
    full = filled(5)
    state, read = full.state_dict(), 36 * 43
    ring = state["ring"]
    free -= read
    again = PathReplay(36)
    again.load_state_dict(state)
    assert ring == {}
    assert torch.equal(again.sample(50, 4, seed=0).state, full.sample(50, 4, seed=0).state)
    free += read - 1
    with pytest.raises(MemoryError, match=r"36 steps take .* of the memory of cpu, .* than 35 ste"):
        filled(1)
    state = full.state_dict()
    free -= read
    with pytest.raises(MemoryError, match=r"steps take .* with what it takes to resume, and"):
        PathReplay(36).load_state_dict(state)


@pytest.mark.parametrize("rounds", [0, 1, 3, 5])
def test_state_comes_back(rounds: int) -> None:
    replay, again = filled(rounds), PathReplay(36)
    again.load_state_dict(replay.state_dict())
    for number in range(rounds, rounds + 4):
        replay.add(segment(4 * number))
        again.add(segment(4 * number))
        left, right = (r.sample(50, 4, seed=number) for r in (replay, again))
        assert torch.equal(left.reward, right.reward)
        assert torch.equal(left.state, right.state)


def test_fewer_steps_if_fewer_are_stored() -> None:
    assert filled(1).sample(5, 10, seed=0).reward.shape == (4, 5)


def test_other_shapes_are_refused() -> None:
    replay = filled(1)
    with pytest.raises(ValueError, match="expected segments of 3 slots"):
        replay.add(segment(4, slots=2))
    with pytest.raises(ValueError, match="whose steps divide 12"):
        replay.add(segment(4, steps=5))


def test_joined_stand_side_by_side() -> None:
    both: Tensor = joined(segment(0), segment(100, slots=2)).reward
    assert torch.equal(both, torch.cat([segment(0).reward, segment(100, slots=2).reward], 1))
