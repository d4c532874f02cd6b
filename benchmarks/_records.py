"""Records: `benchmarks/results/<gpu>.jsonl`, one JSON object a line. Files are only appended to.

Whatever the documentation says about speed is read from here.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FIELDS = (
    *("date", "commit", "gpu", "torch", "triton", "op", "shape", "dtype", "mode"),
    *("ms", "floor_x", "peak_mb", "first_call_s", "peer", "peer_ms", "ratio", "note"),
    *("work_mb", "peer_work_mb"),
)
LATER = ("work_mb", "peer_work_mb")  # the oldest records lack these fields, which are then read as None
KEY = ("gpu", "op", "shape", "dtype", "mode")
_NUMBERS = ("ms", "floor_x", "peak_mb", "first_call_s", "peer_ms", "ratio", "work_mb", "peer_work_mb")
COLUMNS = {
    "op": "op",
    "shape": "shape",
    "dtype": "dtype",
    "mode": "mode",
    "ms": "ms",
    "floor_x": "floors",
    "peak_mb": "peak MiB",
    "work_mb": "work MiB",
    "peer_work_mb": "peer work MiB",
    "first_call_s": "first call s",
    "peer_ms": "peer ms",
    "ratio": "peer/ours",
    "note": "note",
}


def record(**fields: Any) -> dict[str, Any]:
    """A record with every field. Numbers have four digits; a field that is not given is None."""
    unknown = fields.keys() - set(FIELDS)
    if unknown:
        raise ValueError(f"a record has the fields {', '.join(FIELDS)}; got {', '.join(sorted(unknown))}")
    full = {name: fields.get(name) for name in FIELDS}
    for name in _NUMBERS:
        full[name] = None if full[name] is None else float(f"{full[name]:.4g}")
    return full


def slug(gpu: str) -> str:
    """The name of a GPU's file: "NVIDIA H200" -> "h200". All CPUs share "cpu"."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    return "cpu" if name.startswith("cpu") else name


def append(path: Path, fields: dict[str, Any]) -> None:
    """Append one record to a file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def read(path: Path, **where: Any) -> list[dict[str, Any]]:
    """The records of a file whose fields equal `where`.

    Raises ValueError naming the first line that is not a record.
    """
    unknown = where.keys() - set(FIELDS)
    if unknown:
        raise ValueError(f"a record has the fields {', '.join(FIELDS)}; got {', '.join(sorted(unknown))}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} line {number} is not a JSON object: {error}") from None
        if not isinstance(fields, dict) or set(fields) | set(LATER) != set(FIELDS):
            raise ValueError(f"{path.name} line {number} must have exactly the fields {', '.join(FIELDS)}")
        fields = {name: fields.get(name) for name in FIELDS}
        if all(fields[name] == value for name, value in where.items()):
            found.append(fields)
    return found


def read_all(path: Path) -> list[dict[str, Any]]:
    """The records of a file, or of every `.jsonl` in a folder. Raises ValueError where there is none."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(f"records must be a .jsonl file or a folder of such files, got {path}")
    return [fields for file in files for fields in read(file)]


def backend(fields: dict[str, Any]) -> str:
    """The backend that a record names in its note, or ""."""
    found = re.search(r"\b(\w+) backend\b", fields["note"] or "")
    return found[1] if found else ""


def key(fields: dict[str, Any]) -> tuple[str, ...]:
    """Records with an equal key are comparable: gpu, op, shape, dtype, mode and backend are the same."""
    return (*(fields[name] for name in KEY), backend(fields))


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of every key that has a time, in the order in which the keys first appear.

    A record with the peer's time is not replaced by a later one of the same commit without it.
    """
    last: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in records:
        before = last.get(key(r))
        lacks_peer = before is not None and before["commit"] == r["commit"] and before["peer_ms"] and not r["peer_ms"]
        if r["ms"] is not None and not lacks_peer:
            last[key(r)] = r
    return list(last.values())


def table(records: list[dict[str, Any]]) -> str:
    """A plain-text table of records, without the columns that are empty."""
    names = [name for name in COLUMNS if any(r[name] not in (None, "") for r in records)]
    rows = [[COLUMNS[name] for name in names]] + [[_cell(name, r[name]) for name in names] for r in records]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def line(fields: dict[str, Any]) -> str:
    """A record as one line of progress."""
    what = f"{fields['op']:<28} {fields['shape']:<24} {fields['dtype']:<9} {fields['mode']:<11}"
    parts = [f"{_cell('ms', fields['ms']):>9} ms" if fields["ms"] is not None else "not timed"]
    parts += [f"{_cell('floor_x', fields['floor_x'])} memory floors"] if fields["floor_x"] is not None else []
    parts += [f"peer {_cell('peer_ms', fields['peer_ms'])} ms"] if fields["peer_ms"] is not None else []
    parts += [f"peer's time over ours {_cell('ratio', fields['ratio'])}"] if fields["ratio"] is not None else []
    parts += [fields["note"]] if fields["note"] else []
    return f"{what} " + "; ".join(parts)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("ms", "peer_ms"):
        return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
    if name in ("floor_x", "first_call_s"):
        return f"{value:.1f}"
    if name == "ratio":
        return f"{value:.2f}"
    return f"{value:.0f}" if name.endswith("_mb") else str(value)
