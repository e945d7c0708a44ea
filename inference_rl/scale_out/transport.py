"""What goes to a worker: models and policies, classes of the user's own files included.

Classes that only this process can import, of a script or of a model file, travel with their code.
What comes back are arrays and errors. This connects processes of one run; nothing here reads files.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

import cloudpickle
from gymnasium.envs.registration import EnvSpec, registry

from inference_rl.targets import FILE_MODULES


class _Pickler(cloudpickle.Pickler):
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


def packed(value: Any, what: str, **known: Any) -> bytes:
    """`value` for another process.

    :param what: it is, for messages.
    :param known: what the other side has by these names, and is not sent again.
    :raises ValueError: something in it cannot be sent.
    """
    for name, module in sys.modules.items():
        if name.startswith(FILE_MODULES):
            cloudpickle.register_pickle_by_value(module)
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


def registered(environment_id: str | None) -> EnvSpec | None:
    """What Gymnasium knows of an id, which in another process may be nothing."""
    return None if environment_id is None else registry.get(environment_id.rpartition(":")[2])


def register(spec: EnvSpec | None) -> None:
    """Let Gymnasium know it here too."""
    if spec is not None:
        registry.setdefault(spec.id, spec)
