"""The regression guard: it compares new records with earlier ones and fails if an op takes over a tenth longer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import _records as records
from benchmarks._progress import say

LOSS = 0.10  # an op whose time grew by more than this share has lost
NOISE = 0.03  # changes below this share are not listed


@dataclass(frozen=True)
class Change:
    """One row (an op at a shape, in a dtype and a mode) in the earlier records and in the new ones."""

    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def longer(self) -> float:
        """The share by which the time grew: 0.1 is a tenth longer, -0.5 half the time."""
        return self.after["ms"] / self.before["ms"] - 1

    @property
    def lost(self) -> bool:
        return self.longer > LOSS


def changes(base: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[Change]:
    """The rows that `base` and `new` both have, with the last number of each side.

    The greatest slowdown comes first.
    """
    before = {records.key(r): r for r in records.latest(base)}
    found = [Change(before[records.key(r)], r) for r in records.latest(new) if records.key(r) in before]
    return sorted(found, key=lambda change: -change.longer)


def table(found: list[Change]) -> str:
    """A table of the rows that became slower or faster, and a line that counts the others."""
    rows = [("op", "shape", "dtype", "mode", "before, ms", "commit", "now, ms", "commit", "change of time", "")]
    for change in found:
        if abs(change.longer) < NOISE:
            continue
        old, new = change.before, change.after
        verdict = "LOST" if change.lost else "slower" if change.longer > 0 else "faster"
        what = (new["op"], new["shape"], new["dtype"], new["mode"])
        times = (f"{old['ms']:.4g}", old["commit"], f"{new['ms']:.4g}", new["commit"], f"{change.longer:+.1%}")
        rows.append((*what, *times, verdict))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    quiet = sum(abs(change.longer) < NOISE for change in found)
    return "\n".join(
        [*(lines if len(lines) > 1 else []), f"{quiet} of {len(found)} rows changed by less than {NOISE:.0%}"]
    )


def guard(base: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    """Print the comparison and return the exit code: 1 if an op lost more than a tenth or no row could be compared."""
    found = changes(base, new)
    say("")
    if not found:
        say("nothing to compare: --base holds none of these rows (same gpu, op, shape, dtype, mode and backend)")
        return 1
    say(table(found))
    known = {records.key(change.after) for change in found}
    added = [r for r in records.latest(new) if records.key(r) not in known]
    if added:
        say(f"{len(added)} rows are not in --base")
    lost = [change for change in found if change.lost]
    say(f"LOST more than {LOSS:.0%}: {len(lost)} rows" if lost else f"no row lost more than {LOSS:.0%}")
    return int(bool(lost))
