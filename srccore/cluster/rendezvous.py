"""torchrun, with a rendezvous that runs no code from the network.

torchrun's processes meet through a key-value store that anyone who reaches its port may write to,
and read what they find there with `pickle`, which runs code. Here, only the classes of a rendezvous
are read: what else is there ends the rendezvous with an error.

    python -m srccore.cluster.rendezvous --nnodes 2 ...    # as python -m torch.distributed.run
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

__all__ = ["loads", "restrict"]

_STATE = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_KNOWN = {
    (_STATE, "_RendezvousState"),
    (_STATE, "_NodeDesc"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"The rendezvous contains an unexpected object, {module_name}.{global_name}, which "
                "another process on the network wrote."
            )
        return super().find_class(module_name, global_name)


def loads(data: bytes) -> Any:
    """Reads the state of a rendezvous.

    Args:
        data: What a process of torchrun wrote.

    Raises:
        pickle.UnpicklingError: It is something else.
    """
    return _Unpickler(io.BytesIO(data)).load()


def restrict() -> None:
    """Makes torchrun in this process read the states of rendezvous by `loads`."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    restricted = SimpleNamespace(dumps=pickle.dumps, loads=loads, PickleError=pickle.PickleError)
    # The only place where torchrun unpickles.
    setattr(dynamic_rendezvous, "pickle", restricted)  # noqa: B010  # a module, for mypy


if __name__ == "__main__":
    from torch.distributed.run import main

    restrict()
    main()
