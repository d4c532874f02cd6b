"""What an op is timed beside, as data of its family: `PEERS` in `benchmarks/families/<family>.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """How the peer computes an op: its module, and what is called otherwise there than here.

    A form without an entry in `functions`, and an argument without one in `arguments`, has our name there too.
    `settings` are added to those of the row; one that is None is left out of the call.
    """

    module: str
    functions: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def call(self, function: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What the peer's process is told of the call of one of our functions."""
        given = {self.arguments.get(name, name): value for name, value in (settings | self.settings).items()}
        left = {name for name, value in self.settings.items() if value is None}
        return {
            "module": self.module,
            "function": self.functions.get(function, function),
            "arguments": self.arguments,
            "settings": {name: value for name, value in given.items() if name not in left},
        }


def same_names(*ops: str) -> dict[str, Peer]:
    """Peers whose modules, functions and arguments are named as ours."""
    return {op: Peer(f"fla.ops.{op}") for op in ops}
