"""Shapes as command lines and records have them, "B4 T4096 H64 D128", and the sizes that an op takes from them.

A shape is written once for all ops. `fit` takes from it the sizes of the axes that the `OpSpec` of an op names.
"""

import re
from collections.abc import Iterable

SHAPES = {
    "targets": [
        "B4 T4096 H64 D128",
        "B8 T16384 H32 D128",
        "B2 T16384 H16 D128",
        "B4 T2048 H16 D128",
        "B8 T1024 H8 D64",
        "B8 T2048 H32 D256",
        "B1 T65536 H16 D128",
    ],
    "peer": [
        "B1 T8192 H96 D128",
        "B2 T16384 H16 D128",
        "B4 T2048 H16 D128",
        "B4 T4096 H64 D128",
        "B8 T1024 H8 D64",
        "B8 T2048 H32 D256",
    ],
    "seed": [f"B8 T{128 * 2**i} H32 D128" for i in range(8)],
    "small": ["B1 T512 H4 D64", "B1 T512 H16 D128", "B1 T512 H32 D128"],
    "cpu": ["B1 T2048 H4 D64"],
}
ORDER = ("B", "T", "H", "HV", "K", "V", "D")
FREE = ("B", "T", "H", "HV")  # axes whose size is no constant of a kernel: another size compiles nothing


def parse(text: str) -> dict[str, int]:
    """Axis -> size of a written shape, "B1 T512 H4 D64" or "B1 T512 H4 K64 V128".

    Raises ValueError for anything else.
    """
    words = text.split()
    found = [re.fullmatch(r"([A-Z]+)([1-9]\d*)", word) for word in words]
    if not all(found):
        raise ValueError(f"--shapes takes {', '.join(SHAPES)} or axes like 'B1 T512 H4 D64', got {text!r}")
    sizes = {match[1]: int(match[2]) for match in found if match}
    if len(sizes) != len(words):
        raise ValueError(f"--shapes must name an axis once, got {text!r}")
    return _in_order(sizes)


def show(sizes: dict[str, int]) -> str:
    """Sizes as records have them: K and V of one size are written as D, and HV is left out where it equals H."""
    shown = dict(sizes)
    if shown.get("HV") == shown.get("H"):
        shown.pop("HV", None)
    if "D" not in shown and "K" in shown and shown["K"] == shown.get("V"):
        shown["D"] = shown.pop("K")
        del shown["V"]
    return " ".join(f"{axis}{size}" for axis, size in _in_order(shown).items())


def _in_order(sizes: dict[str, int]) -> dict[str, int]:
    return {axis: sizes[axis] for axis in (*ORDER, *sorted(set(sizes) - set(ORDER))) if axis in sizes}


def expand(names: list[str]) -> list[dict[str, int]]:
    """The sizes of written shapes and of named sets of shapes, each once, in order."""
    texts = [text for name in names for text in SHAPES.get(name, [name])]
    found = {show(sizes): sizes for sizes in map(parse, texts)}
    return list(found.values())


def axes(shapes: Iterable[str]) -> list[str]:
    """The axes of tensors, each once, without N: the number of states follows from the batch or the pack."""
    letters = {axis for shape in shapes for axis in shape.split() if not axis.isdigit()} - {"N"}
    return list(_in_order(dict.fromkeys(letters, 0)))


def fit(written: dict[str, int], wanted: list[str], declared: dict[str, int], op: str) -> dict[str, int]:
    """The sizes of an op's axes (`wanted`) from a written shape. Raises ValueError for an axis without a size.

    Where they are not written, K and V equal D, and HV equals H. An op without heads gets as D the width of all heads,
    H times V. Axes that only this op has (slots, states a channel) get the size that it declares, unless written.
    """
    known = {axis: size for axis, size in declared.items() if axis not in ORDER}
    if "D" in written:
        known |= {"K": written["D"], "V": written["D"]}
    if "H" in written:
        known["HV"] = written["H"]
    known |= written
    if "H" in written and "H" not in wanted and "V" in known:
        known["D"] = written["H"] * known["V"]
    missing = [axis for axis in wanted if axis not in known]
    if missing:
        how = " (D stands for K and V)" if {"K", "V"} & set(missing) else ""
        raise ValueError(
            f"--shapes must give {', '.join(wanted)} of {op}{how}, got {show(written)!r} without {', '.join(missing)}"
        )
    return {axis: known[axis] for axis in wanted}


def sizes(shapes: dict[str, str], dims: dict[str, int]) -> dict[str, list[int]]:
    """The size of every tensor. Raises ValueError for an axis without a size."""
    missing = {axis for axis in axes(shapes.values()) if axis not in dims}
    if missing:
        raise ValueError(f"--shapes must give a size for {', '.join(sorted(missing))}, got {dims}")
    return {n: [int(a) if a.isdigit() else dims[a] for a in shape.split()] for n, shape in shapes.items()}


def with_few(dims: dict[str, int], batch: int, tokens: int, heads: int) -> dict[str, int]:
    """`dims` with another batch, number of tokens and number of heads, where it has such axes.

    HV stays in proportion to H.
    """
    changed = {"B": batch, "T": tokens, "H": heads}
    if "H" in dims and "HV" in dims:
        changed["HV"] = heads * dims["HV"] // dims["H"]
    return dims | {axis: size for axis, size in changed.items() if axis in dims}
