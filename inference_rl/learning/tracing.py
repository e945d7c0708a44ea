"""Tracing: a function that runs Pyro programs, as the tensor operations that it comes to.

`Graph` runs the function once under `make_fx`, which records every operation, gradients among them,
and from then on runs the record. Its random numbers are drawn first, from torch's generator on the
CPU, in the order in which the function draws them; the rest can then run at any time, on any
thread. On a GPU, where launching its operations one by one takes longer than they do, the rest is
captured and launched whole.

What is no tensor operation happens only while it is recorded: numbers from NumPy or Python's own
generators, or what a program reads from elsewhere, would be frozen. So the record is compared with
the function, on other inputs, parameters and noise, to the last bit, and whoever differs is run as
it is.
"""

from __future__ import annotations

import contextlib
import shutil
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
import torch._inductor
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from inference_rl.randomness import torch_seeded

Tensors = tuple[Tensor, ...]

PLACES = "on the same device", "not on the expected device"
"""What torch says of tensors of several devices."""


class DeviceError(ValueError):
    """A program computes with tensors that lie elsewhere than its inputs."""


class CompileError(ValueError):
    """What was recorded cannot be made machine code, or that does not run."""


class Graph:
    """`function(*inputs)`, recorded when it is first called.

    :param function: tensors in, a tuple of tensors out, pure but for torch's random numbers.
    :param modules: whose parameters and buffers it reads; they may change between calls.
    :param compiled: whether the record is compiled to machine code, which takes from seconds to a
        minute, and rounds differently.
    :ivar traced: whether the record runs; None before the first call.
    :ivar captured: whether it is launched whole, so that a call overwrites what the one before it
        gave.
    """

    def __init__(
        self, function: Callable[..., Tensors], modules: Sequence[nn.Module], *, compiled: bool
    ) -> None:
        self._program = _Program(function, modules)
        self.compiled = compiled
        self.traced: bool | None = None
        self.captured = False
        self._tensors: list[Tensor] = []
        self._noise: Callable[[], Tensors] | None = None
        self._rest: Callable[..., Tensors] | None = None

    def __call__(self, *inputs: Tensor) -> Tensors:
        return self.prepared(*inputs)()

    def prepared(self, *inputs: Tensor) -> Callable[[], Tensors]:
        """What gives the results when it is called: where the function was recorded, without
        another look at torch's generator."""
        self.record(*inputs)
        if self._rest is None or self._noise is None:
            return lambda: self._as_it_is(inputs)
        rest, given = self._rest, (*self._tensors, *inputs, *self._noise())
        return lambda: rest(*given)

    def record(self, *inputs: Tensor) -> None:
        """Record, and compile, what was not yet; noise is left for those who draw it.

        :raises DeviceError: tensors of the program lie elsewhere than its inputs.
        :raises CompileError: the record was to be compiled, and cannot be.
        """
        if self.traced is None:
            self._trace(inputs)

    def _as_it_is(self, inputs: Tensors) -> Tensors:
        device = inputs[0].device
        seeded: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if device.type != "cpu":  # whoever calls has seeded the CPU's generator alone
            seeded = torch_seeded(int(torch.randint(2**62, ())), device)
        # Validation asks questions about values, which cannot be recorded, and takes its time. What
        # programs make, they make where the inputs are.
        with seeded, pyro.validation_enabled(False), device:
            found: Tensors = self._program(*inputs)
            return found

    def _trace(self, inputs: Tensors) -> None:
        named = {
            **dict(self._program.named_parameters()),
            **dict(self._program.named_buffers()),
        }
        # The very tensors, without their place in a graph: whoever learns changes them in place.
        self._tensors = [tensor.detach() for tensor in named.values()]

        def function(*given: Tensor) -> Tensors:
            tensors, rest = given[: len(named)], given[len(named) :]
            for tensor, original in zip(tensors, named.values(), strict=True):
                tensor.requires_grad_(original.requires_grad)
            swapped = dict(zip(named, tensors, strict=True))
            found: Tensors = torch.func.functional_call(self._program, swapped, rest)
            return tuple(part.detach() for part in found)

        device = inputs[0].device
        try:
            with pyro.validation_enabled(False), torch_seeded(0, device), device:
                fresh = [tensor.clone() for tensor in self._tensors]
                recorded = make_fx(function)(*fresh, *inputs)
            noise, rest = _without_noise(recorded)
            _bring_constants(rest, device)
            with pyro.validation_enabled(False), device:
                others = [_another(tensor) for tensor in (*self._tensors, *inputs)]
                with torch_seeded(1, device):
                    expected = function(*(tensor.clone() for tensor in others))
                with torch_seeded(1, device):
                    found = rest(*others, *noise())
                noise = _drawn_on_the_cpu(noise, device)
                with torch_seeded(1):
                    noise()  # which on a GPU may fail for what the program holds there
            reason = "" if _same(expected, found) else "it gives other numbers than the program"
        except DeviceError:  # as it is it would fail as well
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason:
            self.traced = False
            warnings.warn(
                f"the program cannot be recorded as tensor operations ({reason}), and is run as it "
                "is, about half as fast; what it calls, such as the prior, should compute with "
                "torch alone, and without branches that depend on values",
                stacklevel=2,
            )
            return
        with torch_seeded(0):
            given = (*inputs, *noise())
        run: Callable[..., Tensors] = rest
        if self.compiled:
            run = _in_machine_code(rest, (*self._tensors, *given))
        self.traced, self._noise, self._rest = True, noise, run
        if device.type == "cuda":
            self._capture(run, given)

    def _capture(self, run: Callable[..., Tensors], given: Tensors) -> None:
        try:
            self._rest = _Captured(run, self._tensors, given)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"the program's operations cannot be captured on the GPU ({reason}), and are "
                "launched one by one, which is slower: what is captured may not bring values to "
                "the CPU, as priors that are functions make it do where the policy has their "
                "support",
                stacklevel=2,
            )
        else:
            self.captured = True


class _Program(nn.Module):
    """A function as a module that has what it reads."""

    def __init__(self, function: Callable[..., Tensors], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        # Each once, under one name, or torch would not find its way back from other parameters.
        self.parts = nn.ModuleList(dict.fromkeys(modules))
        self._function = (function,)

    def forward(self, *inputs: Tensor) -> Tensors:
        try:
            return self._function[0](*inputs)
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            if not any(words in said for words in PLACES):
                raise
            device = inputs[0].device
            raise DeviceError(
                f"device: expected all that the program calls, such as the prior, to compute on "
                f"{device}, where the states are, got tensors from elsewhere ({said})"
                f"{_place(error)}; make them there, with device=state.device, or bring them, with "
                ".to(state.device)"
            ) from error


def _place(error: Exception) -> str:
    """The last line outside torch, Pyro and this library that led to an error, if there is one."""
    ours = [*torch.__path__, *pyro.__path__, str(Path(__file__).parent.parent)]
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((*ours, "<")):
            return f" in line {frame.lineno} of {frame.filename}, {frame.name}"
    return ""


def _in_machine_code(record: fx.GraphModule, given: Tensors) -> Callable[..., Tensors]:
    """A record that was compiled, and that has run.

    :raises CompileError: either failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            # Not torch.compile, whose guards ask at every call whether anything has changed.
            run: Callable[..., Tensors] = torch._inductor.compile(record, list(given))
            run(*given)  # some of it is made and loaded no earlier
    except Exception as error:  # compilers may raise anything
        said = str(error).strip().partition("\n")[0]
        raise CompileError(
            "compile: expected torch to make machine code of the updates, got "
            f"{type(error).__name__} ({said}); mend its compiler, or set compile to 'off', which a "
            "run that was begun with compiled updates cannot change, because they round differently"
        ) from error
    return run


def _without_noise(recorded: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A record in two: what draws its random numbers, and the rest, which takes them after its
    inputs.

    :raises ValueError: what is drawn depends on the inputs.
    """
    graph = recorded.graph
    graph.eliminate_dead_code()
    by_input = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if by_input.intersection(node.all_input_nodes):
            by_input.add(node)
    drawn = [node for node in graph.nodes if _is_random(node)]
    if by_input.intersection(drawn):
        raise ValueError("it draws random numbers from distributions that depend on its inputs")
    noise, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in _ancestors(drawn, graph):
        copies[node] = noise.node_copy(node, copies.__getitem__)
    noise.output(tuple(copies[node] for node in drawn))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for i, node in enumerate(drawn):
            node.replace_all_uses_with(graph.placeholder(f"noise_{i}"))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(recorded, noise), fx.GraphModule(recorded, graph)


def _bring_constants(recorded: fx.GraphModule, device: torch.device) -> None:
    """Let what was recorded as a constant lie where it is used, so as not to be sent at each call.

    A tensor of numbers in a program is made on the CPU, whatever the device, and then sent.
    """
    for node in recorded.graph.find_nodes(op="get_attr"):
        if _is_sent(node, device):
            setattr(recorded, node.target, getattr(recorded, node.target).to(device))


def _is_sent(node: fx.Node, device: torch.device) -> bool:
    """Whether all that becomes of a constant is that it is sent to `device`."""
    aten = torch.ops.aten
    return bool(node.users) and all(
        torch.device(str(user.kwargs["device"])).type == device.type
        if user.target is aten._to_copy.default and "device" in user.kwargs
        else user.target is aten.lift_fresh_copy.default and _is_sent(user, device)
        for user in node.users
    )


class _Captured:
    """`function(*fixed, *given)` on a GPU, launched whole. `fixed` must stay where it is.

    What a call gives is overwritten by the next.
    """

    def __init__(
        self, function: Callable[..., Tensors], fixed: Sequence[Tensor], given: Tensors
    ) -> None:
        # The constants of the function are read where they lie: it has to live as long.
        self._function, self._fixed = function, fixed
        self._given = [tensor.clone() for tensor in given]
        before = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # libraries set themselves up, which cannot be captured
            for _ in range(3):
                function(*fixed, *self._given)
            with _no_waiting():
                function(*fixed, *self._given)
        before.wait_stream(aside)
        self._launch = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._launch, capture_error_mode="thread_local"):
                self._found = function(*fixed, *self._given)
        except BaseException:
            torch.cuda.set_stream(before)  # which a capture that fails does not see to
            raise

    def __call__(self, *tensors: Tensor) -> Tensors:
        torch._foreach_copy_(self._given, tensors[len(self._fixed) :])
        self._launch.replay()
        return self._found


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Within this context whoever waits for the GPU gets an error, and no capture is broken."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _drawn_on_the_cpu(noise: fx.GraphModule, device: torch.device) -> Any:
    """The same, by the CPU's generator, so that all devices see the same numbers."""
    if device.type == "cpu":
        return noise
    for node in noise.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cpu"))
    noise.recompile()
    return lambda: tuple(part.to(device) for part in noise())


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _ancestors(nodes: list[fx.Node], graph: fx.Graph) -> Iterator[fx.Node]:
    """`nodes` and all that they are made of, in the order of the graph."""
    needed, left = set(nodes), list(nodes)
    while left:
        found = [n for n in left.pop().all_input_nodes if n not in needed]
        needed.update(found)
        left.extend(found)
    return (node for node in graph.nodes if node in needed)


def _another(tensor: Tensor) -> Tensor:
    """Other numbers of the same kind: rows in another order, and what is no whole number moved.

    Inwards, so that actions stay in their box. Whole numbers stay: who knows what they count.
    """
    rolled = tensor.roll(1, 0) if tensor.dim() > 0 else tensor.clone()
    return 0.9 * rolled + 0.01 if tensor.is_floating_point() else rolled


def _same(left: Tensors, right: Tensors) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(*_zeroed(a, b)) for a, b in pairs)


def _zeroed(*tensors: Tensor) -> list[Tensor]:
    """NaN, which does not equal itself, as zero."""
    return [torch.where(tensor.isnan(), 0, tensor) for tensor in tensors]


def missing_to_compile() -> str:
    """What `compiled` needs on a CPU and is not there, and what to do about it; empty if all is."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "a C++ compiler, found none; install g++ or clang++"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"Python's headers, found no Python.h in {headers}; install python3-dev"
    return ""
