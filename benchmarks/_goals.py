"""Goals: numbers that the records of the ops must reach on an H200 in bfloat16, and better ones that are aimed at.

The goals themselves stand in `benchmarks/families/<family>.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GPU = "NVIDIA H200"
SOFTMAX = "sdpa_cudnn"

GROUPS = {
    "speed": "Against the peer and the memory floor",
    "softmax": "Against cuDNN's softmax attention (its time over ours)",
    "memory": "Working memory of forward and backward, over the peer's",
    "first call": "First call, forward and backward, on an empty compile cache",
    "host": "Host overhead of a tiny forward without autograd",
    "packing": "1,000 packed sequences of skewed lengths, over the time of one long sequence",
    "decode": "Decoding one token: share of copy bandwidth on the state, and time per call in a CUDA graph",
}
# quantity -> the unit that is written after a value
UNITS = {
    "ratio": "x",  # the peer's time over ours
    "floor_x": " floors",  # time over the memory floor
    "softmax_x": "x",  # time of cuDNN's softmax attention over ours
    "work_x": "x",  # working memory over the peer's
    "first_call_s": " s",
    "packed_x": "x",  # time of packed sequences over that of one sequence with as many tokens
    "us": " us",
    "bandwidth": " of copy",  # share of the copy bandwidth
}
LARGER_IS_BETTER = ("ratio", "softmax_x", "bandwidth")
Key = tuple[str, str, str]  # op, shape, mode
Records = Mapping[Key, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A quantity that must reach `must`, and is to reach `aim` if one is given."""

    group: str
    op: str
    shape: str
    mode: str
    quantity: str
    must: float
    aim: float | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        """The records from which its value is computed."""
        own = (self.op, self.shape, self.mode)
        second = self._second_key
        return (own,) if second is None else (own, second)

    @property
    def _second_key(self) -> Key | None:
        """A second record that the value needs: softmax attention's, or that of one long sequence. Else None."""
        if self.quantity == "softmax_x":
            return (SOFTMAX, self.shape, self.mode)
        return (self.op, self.shape, self.mode.replace("packed", "whole")) if self.quantity == "packed_x" else None

    def value(self, records: Records) -> float | None:
        """The measured value, or None if a record is missing."""
        own = records.get((self.op, self.shape, self.mode))
        if own is None or own["ms"] is None:
            return None
        if self.quantity in ("ratio", "floor_x", "first_call_s"):
            return own[self.quantity]
        if self.quantity == "us":
            return own["ms"] * 1e3
        if self.quantity == "bandwidth":
            return 1 / own["floor_x"] if own["floor_x"] else None
        if self.quantity == "work_x":
            return own["work_mb"] / own["peer_work_mb"] if own["peer_work_mb"] and own["work_mb"] is not None else None
        second = records.get(self._second_key) if self._second_key else None
        if second is None or not second["ms"]:
            return None
        return own["ms"] / second["ms"] if self.quantity == "packed_x" else second["ms"] / own["ms"]

    def verdict(self, records: Records) -> str:
        """One of "no record", "not met", "met" and, where there is an aim and it is reached, "met, and the aim"."""
        value = self.value(records)
        if value is None:
            return "no record"
        if not self._reached(value, self.must):
            return "not met"
        return "met, and the aim" if self.aim is not None and self._reached(value, self.aim) else "met"

    def _reached(self, value: float, bar: float) -> bool:
        return value >= bar if self.quantity in LARGER_IS_BETTER else value <= bar

    def shown(self, bar: float | None) -> str:
        """`must` or `aim` as it is written in tables: its direction, number and unit."""
        if bar is None:
            return ""
        sign = "≥" if self.quantity in LARGER_IS_BETTER else "≤"
        return f"{sign} {number(self.quantity, bar)}{UNITS[self.quantity]}"


def number(quantity: str, value: float | None) -> str:
    """A value as it is written in tables, without its unit."""
    if value is None:
        return "no record"
    return f"{value:.1%}" if quantity == "bandwidth" else f"{value:.4g}"


def speed(
    ops: Iterable[str],
    shape: str,
    forward: tuple[float, float | None],
    both: tuple[float, float | None],
    floors: tuple[float, float] | None = None,
) -> list[Goal]:
    """Goals of ops for one shape.

    `forward` and `both` (forward and backward) are ratios (must, aim) of the peer's time to ours; `floors` are how many
    times the memory floor each of the two may take at most.
    """
    made = []
    for op in ops:
        for number, (mode, (must, aim)) in enumerate((("fwd", forward), ("fwdbwd", both))):
            made.append(Goal("speed", op, shape, mode, "ratio", must, aim))
            if floors is not None:
                made.append(Goal("speed", op, shape, mode, "floor_x", floors[number]))
    return made
