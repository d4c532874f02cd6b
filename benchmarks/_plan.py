"""Named shape sets and the order of rows: what was asked for first comes first, because a time limit cuts the end."""

import re
from dataclasses import dataclass

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
NAIVE_ELEMENTS = 2**26  # T * H * K * V above which nobody waits for the naive loop


@dataclass(frozen=True)
class Job:
    """One op, form, shape and dtype. Its modes are checked together, then timed one after the other."""

    op: str
    form: str  # "naive" for the loop over time, "" for softmax attention
    dims: tuple[tuple[str, int], ...]
    dtype: str
    baseline: bool

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.dims)

    @property
    def shape(self) -> str:
        return show(self.sizes)

    @property
    def compile_key(self) -> tuple[object, ...]:
        """What ours compiles for: op and head sizes."""
        return (self.op, self.form, self.dtype, self.sizes["K"], self.sizes["V"])

    @property
    def tuning_key(self) -> tuple[object, ...]:
        """What the peer tunes for: op, head count and head sizes."""
        free = ("B", "T")
        return (self.op, self.form, self.dtype, *(pair for pair in self.dims if pair[0] not in free))


def parse(text: str) -> dict[str, int]:
    """ "B1 T512 H4 D64" or "B1 T512 H4 K64 V128" to sizes; further axes by their letters. Raises ValueError."""
    words = text.split()
    found = [re.fullmatch(r"([A-Z]+)([1-9]\d*)", word) for word in words]
    if not all(found):
        raise ValueError(f"--shapes takes {', '.join(SHAPES)} or axes like 'B1 T512 H4 D64', got {text!r}")
    sizes = {match[1]: int(match[2]) for match in found if match}
    if len(sizes) != len(words):
        raise ValueError(f"--shapes must name an axis once, got {text!r}")
    if "D" in sizes:
        sizes = {"K": sizes["D"], "V": sizes.pop("D")} | sizes
    missing = [axis for axis in "BTHKV" if axis not in sizes]
    if missing:
        raise ValueError(f"--shapes must give B, T, H and D (or K and V), got {text!r}")
    return {axis: sizes[axis] for axis in [*"BTHKV", *sorted(set(sizes) - set("BTHKV"))]}


def show(sizes: dict[str, int]) -> str:
    """Sizes as they are written in records; D stands for equal K and V."""
    if sizes["K"] == sizes["V"]:
        sizes = {axis: size for axis, size in sizes.items() if axis not in "KV"} | {"D": sizes["K"]}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items())


def expand(names: list[str]) -> list[dict[str, int]]:
    """Set names and written shapes to sizes, each once, in order."""
    texts = [text for name in names for text in SHAPES.get(name, [name])]
    found = {show(sizes): sizes for sizes in map(parse, texts)}
    return list(found.values())


def jobs(
    ops: dict[str, list[str]], baselines: list[str], shapes: list[dict[str, int]], dtypes: list[str], naive: bool
) -> list[Job]:
    """Every row in order of importance. `ops`: op -> forms. `naive`: a naive row before each op's own.

    The ops come first, shape by shape in the order in which the shapes were asked for; the baselines after them.
    """
    first: list[Job] = []
    last: list[Job] = []
    for dtype in dtypes:
        for sizes in shapes:
            dims = tuple(sizes.items())
            small = sizes["B"] * sizes["T"] * sizes["H"] * sizes["K"] * sizes["V"] <= NAIVE_ELEMENTS
            for op, forms in ops.items():
                for form in (["naive"] if naive and small else []) + forms:
                    first.append(Job(op, form, dims, dtype, form == "naive"))
            last += [Job(name, "", dims, dtype, True) for name in baselines]
    last.sort(key=lambda job: job.shape not in SHAPES["seed"])  # where softmax is compared with
    return first + last
