"""Tracing: a function that runs Pyro programs, as the tensor operations that it comes to.

`Graph` runs the function once under `make_fx`, which records every operation, gradients among them,
and from then on runs the record. Random numbers are drawn anew at each run, from torch's generator.
What is no tensor operation happens only while it is recorded: numbers from NumPy or Python's own
generators, or what a program reads from elsewhere, would be frozen. So the record is compared with
the function, on other inputs, parameters and noise, to the last bit, and whoever differs is run as
it is.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., tuple[Tensor, ...]]


class Graph:
    """`function(*inputs)`, recorded when it is first called.

    :param function: tensors in, a tuple of tensors out, pure but for torch's random numbers.
    :param modules: whose parameters and buffers it reads; they may change between calls.
    :param compiled: whether the record is compiled to machine code, which takes from seconds to a
        minute, and rounds differently.
    :ivar traced: whether the record runs; None before the first call.
    """

    def __init__(
        self, function: Function, modules: Sequence[nn.Module], *, compiled: bool = False
    ) -> None:
        self._program = _Program(function, modules)
        self.compiled = compiled
        self.traced: bool | None = None
        self._run: Callable[..., tuple[Tensor, ...]] | None = None
        self._tensors: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.traced is None:
            self._trace(inputs)
        if self._run is None:
            with pyro.validation_enabled(False):
                found: tuple[Tensor, ...] = self._program(*inputs)
                return found
        return self._run(self._tensors, inputs)

    def _trace(self, inputs: tuple[Tensor, ...]) -> None:
        named = {
            **dict(self._program.named_parameters()),
            **dict(self._program.named_buffers()),
        }
        # The very tensors, without their place in a graph: whoever learns changes them in place.
        self._tensors = [tensor.detach() for tensor in named.values()]

        def function(tensors: list[Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            for tensor, original in zip(tensors, named.values(), strict=True):
                tensor.requires_grad_(original.requires_grad)
            swapped = dict(zip(named, tensors, strict=True))
            found: tuple[Tensor, ...] = torch.func.functional_call(self._program, swapped, given)
            return tuple(part.detach() for part in found)

        # Validation asks questions about values, which cannot be recorded.
        with pyro.validation_enabled(False), torch.random.fork_rng(devices=_devices(inputs)):
            try:
                fresh = [tensor.detach().clone() for tensor in self._tensors]
                graph = make_fx(function)(fresh, inputs)
                graph.graph.eliminate_dead_code()
                graph.recompile()
                differs = self._differs(graph, function, inputs)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            else:
                reason = "it gives other numbers than the program" if differs else ""
        self.traced = not reason
        if reason:
            warnings.warn(
                f"the program cannot be recorded as tensor operations ({reason}), and is run as it "
                "is, about a third slower; a prior should compute with torch alone, without "
                "branches that depend on values",
                stacklevel=2,
            )
            return
        self._run = _compile(graph, self._tensors, inputs) if self.compiled else graph

    def _differs(self, graph: Any, function: Any, inputs: tuple[Tensor, ...]) -> bool:
        """Whether record and function disagree on other inputs, parameters and noise."""
        others = tuple(_another(part) for part in inputs)
        tensors = [t * 1.01 if t.is_floating_point() else t.clone() for t in self._tensors]
        found = []
        for run in (graph, function):
            torch.manual_seed(1)
            found.append(run([tensor.clone() for tensor in tensors], others))
        return any(
            not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*found, strict=True)
        )


class _Program(nn.Module):
    """A function as a module that has what it reads."""

    def __init__(self, function: Function, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(*inputs)


def _another(tensor: Tensor) -> Tensor:
    """The rows of a batch in another order, or another number."""
    return tensor * 1.5 if tensor.dim() == 0 else tensor.roll(1, 0)


def _devices(inputs: tuple[Tensor, ...]) -> list[int]:
    return sorted({part.get_device() for part in inputs if part.is_cuda})


def _compile(graph: Any, tensors: list[Tensor], inputs: tuple[Tensor, ...]) -> Any:
    return torch.compile(graph, dynamic=False, options={"fallback_random": True})


def can_compile() -> bool:
    """Whether there is a C++ compiler, which `compiled` needs on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))
