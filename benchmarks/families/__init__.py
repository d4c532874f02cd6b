"""What the benchmarks know of a family of ops, a file each, found by the family's name.

`benchmarks/families/<family>.py` may hold `GOALS`, a tuple of `Goal`, and `PEERS`, a dict from op to `Peer`. A family
without a file, or without one of the two, is timed and reported without targets or without a peer.
"""

import importlib
from typing import Any

from benchmarks._goals import Goal
from benchmarks._peers import Peer
from fla.ops._spec import REGISTRY


def goals(family: str) -> tuple[Goal, ...]:
    """What the ops of a family have to reach."""
    return _declared(family, "GOALS") or ()


def peer(op: str) -> Peer | None:
    """How the peer computes an op, or None where that is not declared."""
    return (_declared(REGISTRY[op].family, "PEERS") or {}).get(op) if op in REGISTRY else None


def why_no_peer(op: str) -> str:
    """The note of a row that is timed alone."""
    return f"no function is declared for {op} in PEERS of benchmarks/families/{REGISTRY[op].family}.py"


def _declared(family: str, name: str) -> Any:
    try:
        module = importlib.import_module(f"{__name__}.{family}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{family}":
            raise
        return None
    return getattr(module, name, None)
