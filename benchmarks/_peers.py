"""How the peer, the other library that our ops are timed beside, computes an op.

The entries are data of each family: `PEERS` in `benchmarks/families/<family>.py`.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """The peer's module for an op, and the names that are not the same there as here.

    `functions` and `arguments` translate our names into the peer's; a name without an entry is the same in both.
    `settings` are added to those of the row; a setting that is None here is left out of the call.
    """

    module: str
    functions: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def call(self, function: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The request for the peer's call that corresponds to one of ours."""
        given = {self.arguments.get(name, name): value for name, value in (settings | self.settings).items()}
        left_out = {name for name, value in self.settings.items() if value is None}
        return {
            "module": self.module,
            "function": self.functions.get(function, function),
            "arguments": self.arguments,
            "settings": {name: value for name, value in given.items() if name not in left_out},
        }


def same_names(*ops: str) -> dict[str, Peer]:
    """Entries for ops whose module, functions and arguments have the same names in the peer."""
    return {op: Peer(f"fla.ops.{op}") for op in ops}
