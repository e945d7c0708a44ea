"""What goes to a worker: models and policies, classes of the user's own files included.

Classes that only this process can import, of a script or of a model file, travel with their code.
What comes back are arrays and errors. This connects processes of one run; nothing here reads files.

Tensors travel as arrays, several times as fast as by their own way, and are laid where torch lays
what it makes: the last bit of a product of matrices may depend on that.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections import ChainMap
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, registry
from torch import Tensor, nn

from inference_rl.targets import FILE_MODULES

_ARRAYS = {torch.float32, torch.float64, torch.int64, torch.bool}


def _reduced(tensor: Tensor) -> Any:
    is_plain = (
        tensor.dtype in _ARRAYS
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.is_leaf
        and not tensor._backward_hooks
        and not tensor.__dict__
    )
    if not is_plain:
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return _tensor, (tensor.detach().numpy(), tensor.requires_grad, type(tensor) is nn.Parameter)


def _tensor(array: np.ndarray, requires_grad: bool, is_parameter: bool) -> Tensor:
    found = torch.from_numpy(array).clone()
    if is_parameter:
        return nn.Parameter(found, requires_grad)
    return found.requires_grad_(requires_grad)


_TENSORS: dict[Any, Any] = {Tensor: _reduced, nn.Parameter: _reduced}


class _Pickler(cloudpickle.Pickler):
    dispatch_table: ClassVar[Any] = ChainMap(_TENSORS, cloudpickle.Pickler.dispatch_table)

    def __init__(self, file: io.BytesIO, known: dict[str, Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._known = {id(value): name for name, value in known.items()}

    def persistent_id(self, value: Any) -> str | None:
        return self._known.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: dict[str, Any]) -> None:
        super().__init__(file)
        self._known = known

    def persistent_load(self, name: str) -> Any:
        return self._known[name]


_looked_at: set[str] = set()


def packed(value: Any, what: str, **known: Any) -> bytes:
    """`value` for another process.

    :param what: it is, for messages.
    :param known: what the other side has by these names, and is not sent again.
    :raises ValueError: something in it cannot be sent.
    """
    for name in sys.modules.keys() - _looked_at:
        if name.startswith(FILE_MODULES):
            cloudpickle.register_pickle_by_value(sys.modules[name])
        _looked_at.add(name)
    file = io.BytesIO()
    try:
        _Pickler(file, known).dump(value)
    except Exception as error:
        raise ValueError(
            f"workers: expected a {what} that can be sent to another process, got one that holds "
            f"what cannot ({type(error).__name__}: {error}); make that where it is used, or run "
            "without workers"
        ) from error
    return file.getvalue()


def unpacked(data: bytes, **known: Any) -> Any:
    """What `packed` was given."""
    return _Unpickler(io.BytesIO(data), known).load()


def dumped(value: Any) -> bytes:
    """`value`, of classes of this library alone, for another process, which has `pickle.loads`."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_TENSORS}
    pickler.dump(value)
    return file.getvalue()


def registered(environment_id: str | None) -> EnvSpec | None:
    """What Gymnasium knows of an id, which in another process may be nothing."""
    return None if environment_id is None else registry.get(environment_id.rpartition(":")[2])


def register(spec: EnvSpec | None) -> None:
    """Let Gymnasium know it here too."""
    if spec is not None:
        registry.setdefault(spec.id, spec)
