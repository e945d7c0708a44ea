"""Programs as recorded tensor operations: the same numbers, fresh noise, and what cannot be."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from inference_rl.learning import tracing
from inference_rl.learning.tracing import CompileError, DeviceError, Graph
from inference_rl.randomness import torch_seeded


class Loss(nn.Module):
    """Of a small guide by Pyro, with the noise of two sites."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, state: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        def program() -> Tensor:
            first = pyro.sample("first", dist.Normal(self.layer(state), 1.0).to_event(1))
            second = pyro.sample("second", dist.Uniform(0.0, 1.0).expand([len(state)]))
            return first.sum(-1) * second + self.shift

        trace = pyro.poutine.trace(program).get_trace()
        trace.compute_log_prob()
        loss = (weight * (trace.log_prob_sum() + trace.nodes["_RETURN"]["value"].sum())).sum()
        return (*torch.autograd.grad(loss, list(self.layer.parameters())), loss)


STATE, WEIGHT = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor(0.7)


def graph(module: nn.Module, *, compiled: bool = False) -> Graph:
    return Graph(module, [module], compiled=compiled)


def test_it_gives_the_numbers_of_the_program_with_whatever_noise_and_parameters() -> None:
    module = Loss()
    recorded = graph(module)
    recorded(STATE, WEIGHT)
    assert recorded.traced
    with torch.no_grad():
        module.layer.weight.mul_(2)
        module.shift.add_(1)
    seen = set()
    for seed in range(5):
        with torch_seeded(seed):
            expected = module(STATE + seed, WEIGHT * seed)
        with torch_seeded(seed):
            found = recorded(STATE + seed, WEIGHT * seed)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.detach(), b)
        seen.add(float(found[-1]))
    assert len(seen) == 5


def test_what_was_prepared_does_not_look_at_the_generator_again() -> None:
    module = Loss()
    recorded = graph(module)
    with torch_seeded(3):
        expected = recorded(STATE, WEIGHT)
    with torch_seeded(3):
        run = recorded.prepared(STATE, WEIGHT)
    torch.manual_seed(11)
    for a, b in zip(expected, run(), strict=True):
        assert torch.equal(a, b)


def test_tracing_takes_no_more_noise_than_the_program_and_leaves_the_parameters_alone() -> None:
    module = Loss()
    before, parameters = torch.get_rng_state(), [p.clone() for p in module.parameters()]
    graph(module).prepared(STATE, WEIGHT)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    graph(module)._as_it_is((STATE, WEIGHT))
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
    for a, b in zip(parameters, module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled_it_differs_by_rounding() -> None:
    module = Loss()
    with torch_seeded(3):
        expected = graph(module)(STATE, WEIGHT)
    with torch_seeded(3):
        found = graph(module, compiled=True)(STATE, WEIGHT)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


ELSEWHERE = torch.tensor(0.5)


def by_value(state: Tensor) -> tuple[Tensor, ...]:
    return (state.sum() if state.sum() > 0 else -state.sum(),)


def by_item(state: Tensor) -> tuple[Tensor, ...]:
    return (state * state.max().item(),)


def by_numpy(state: Tensor) -> tuple[Tensor, ...]:
    return (state * float(np.random.default_rng().normal()),)


def by_python(state: Tensor) -> tuple[Tensor, ...]:
    return (state * random.random(),)


def through_numpy(state: Tensor) -> tuple[Tensor, ...]:
    return (torch.from_numpy(np.sin(state.numpy())),)


def by_the_greatest(state: Tensor) -> tuple[Tensor, ...]:
    return (state * float(state.numpy().max()),)


def by_how_many_are_unknown(state: Tensor) -> tuple[Tensor, ...]:
    if state.max() > STATE.max() - 0.01:
        return (torch.zeros_like(state),)
    return (torch.full_like(state, torch.nan),)


def with_noise_of_the_state(state: Tensor) -> tuple[Tensor, ...]:
    return (torch.bernoulli(state.sigmoid()),)


@pytest.mark.parametrize(
    "function",
    [
        by_value,
        by_item,
        by_numpy,
        by_python,
        by_the_greatest,
        by_how_many_are_unknown,
        through_numpy,
        with_noise_of_the_state,
    ],
)
def test_what_cannot_be_recorded_is_run_as_it_is_with_one_warning(function) -> None:
    recorded = Graph(function, [], compiled=False)
    with pytest.warns(UserWarning, match="cannot be recorded as tensor .* run as it is") as said:
        recorded(STATE)
    assert len(said) == 1
    assert not recorded.traced
    if function in (by_value, by_item, through_numpy):
        for shift in (-3.0, 3.0):
            (found,) = recorded(STATE + shift)
            assert torch.equal(found, function(STATE + shift)[0])


class Chosen(nn.Module):
    """One of its rows, by a number that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("which", torch.tensor(3))
        self.register_buffer("reversed", torch.tensor(True))

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        row = state.index_select(0, self.which.reshape(1))
        return (torch.where(self.reversed, -row, row),)


def test_whole_numbers_and_truths_that_a_program_keeps_stay_such() -> None:
    module = Chosen()
    recorded = graph(module)
    assert torch.equal(recorded(STATE)[0], -STATE[3:])
    assert recorded.traced
    module.which.fill_(1)
    module.reversed.fill_(False)
    assert torch.equal(recorded(STATE)[0], STATE[1:2])


def test_constants_are_brought_where_all_they_do_is_to_be_sent_there() -> None:
    """On a device whose tensors have no numbers, there being no other one everywhere."""

    def function(state: Tensor) -> tuple[Tensor, ...]:
        sent = torch.tensor([1.0, 2.0]).to(state.device)
        used_here_first = (2 * torch.tensor([3.0, 4.0])).to(state.device)
        return (state * sent + used_here_first,)

    meta = torch.device("meta")
    recorded = make_fx(function)(torch.ones(2, device=meta))
    tracing._bring_constants(recorded, meta)
    where = [
        getattr(recorded, node.target).device.type
        for node in recorded.graph.find_nodes(op="get_attr")
    ]
    assert sorted(where) == ["cpu", "meta"]
    assert recorded(torch.ones(2, device=meta))[0].device.type == "meta"


def test_noise_that_cannot_be_drawn_on_the_cpu_is_found_out_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def elsewhere() -> tuple[Tensor, ...]:
        raise RuntimeError("Expected all tensors to be on the same device")

    monkeypatch.setattr(tracing, "_drawn_on_the_cpu", lambda noise, device: elsewhere)
    recorded = graph(Loss())
    with pytest.warns(UserWarning, match="cannot be recorded .*Expected all tensors to be on the "):
        recorded.prepared(STATE, WEIGHT)()
    assert not recorded.traced


def test_what_runs_as_it_is_elsewhere_draws_by_a_seed_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device whose tensors have no numbers, there being no other one everywhere."""
    seeds: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def noted(seed: int, device: torch.device) -> Iterator[None]:
        seeds.append((seed, device.type))
        yield

    monkeypatch.setattr(tracing, "torch_seeded", noted)
    recorded = Graph(lambda state: (state + torch.randn(4, 3),), [], compiled=False)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        (found,) = recorded._as_it_is((STATE.to("meta"),))
        assert found.device.type == "meta"
    assert seeds[0] == seeds[1] != seeds[2]
    assert {device for _, device in seeds} == {"meta"}


def test_tensors_of_a_program_that_lie_elsewhere_are_said_with_their_place() -> None:
    here = torch.ones(4, 3)

    def program(state: Tensor) -> tuple[Tensor, ...]:
        return (state + here,)

    said = (
        r"^device: expected all that the program calls, such as the prior, to compute on meta, "
        r"where the states are, got tensors from elsewhere \(.*meta!\) in line \d+ of "
        r".*test_tracing\.py, program; make them there, with device=state\.device, or bring them, "
    )
    with pytest.raises(DeviceError, match=said):
        Graph(program, [], compiled=False)._as_it_is((STATE.to("meta"),))
    assert torch.equal(Graph(program, [], compiled=False)(STATE)[0], STATE + here)


def test_what_fails_for_another_reason_is_not_said_to_lie_elsewhere() -> None:
    def program(state: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no such row")

    recorded = Graph(program, [], compiled=False)
    with (
        pytest.warns(UserWarning, match=r"cannot be recorded .*\(RuntimeError: no such row\)"),
        pytest.raises(RuntimeError, match="no such row"),
    ):
        recorded(STATE)


def broken(*given: object) -> Any:
    raise OSError("c++: out of memory\nand more")


@pytest.mark.parametrize("when", ["made", "run"])
def test_a_record_that_cannot_be_compiled_says_so(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = broken if when == "made" else lambda record, given: broken
    monkeypatch.setattr(torch._inductor, "compile", compiler)
    said = (
        r"^compile: expected torch to make machine code of the updates, got OSError \(c\+\+: out "
        r"of memory\); mend its compiler, or set compile to 'off'"
    )
    recorded = graph(Loss(), compiled=True)
    with pytest.raises(CompileError, match=said):
        recorded(STATE, WEIGHT)


def test_what_is_captured_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch reads constants where they lay. Without a GPU nothing is launched here."""

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    stands_in = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": object,
        "graph": lambda launch, **how: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    constant = torch.ones(3)
    left = weakref.ref(constant)
    captured = tracing._Captured(lambda x, c=constant: (x + c,), (), (torch.zeros(3),))
    del constant
    gc.collect()
    assert left() is not None
    del captured
    gc.collect()
    assert left() is None
