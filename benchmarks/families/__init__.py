"""What the benchmarks know about each family of ops: a file per family, found by the family's name.

`benchmarks/families/<family>.py` may hold `GOALS`, a tuple of `Goal`, and `PEERS`, a dict from op to `Peer`: how the
peer, the library that the ops are timed beside, computes it. A family without `GOALS` is reported without targets, and
one without `PEERS` is timed without a peer.
"""

import importlib
from typing import Any

from benchmarks._goals import Goal
from benchmarks._peers import Peer
from fla.ops._spec import REGISTRY


def goals(family: str) -> tuple[Goal, ...]:
    """The goals of a family's ops."""
    return _declared(family, "GOALS") or ()


def peer(op: str) -> Peer | None:
    """How the peer computes an op, or None where that is not declared."""
    return (_declared(REGISTRY[op].family, "PEERS") or {}).get(op) if op in REGISTRY else None


def why_no_peer(op: str) -> str:
    """The note of a row that is timed without the peer."""
    return f"no function is declared for {op} in PEERS of benchmarks/families/{REGISTRY[op].family}.py"


def _declared(family: str, name: str) -> Any:
    try:
        module = importlib.import_module(f"{__name__}.{family}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{family}":
            raise
        return None
    return getattr(module, name, None)
