"""The rows of a run in order. What was asked for first is timed first, because a time limit drops the last rows."""

import math
from dataclasses import dataclass

from benchmarks._shapes import FREE, SHAPES, show
from benchmarks._targets import find

NAIVE_ELEMENTS = 2**26  # the naive loop is timed up to so many updates of state elements: more takes too long


@dataclass(frozen=True)
class Job:
    """One op, form, shape and dtype. Its modes are checked together, then timed one after the other."""

    op: str
    form: str  # "naive" for the loop over tokens, "" for softmax attention
    dims: tuple[tuple[str, int], ...]  # the op's own axes
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
        """Jobs with an equal key run the same compiled kernels of ours: the key has op, dtype and head sizes."""
        return (self.op, self.form, self.dtype, *(pair for pair in self.dims if pair[0] not in FREE))

    @property
    def tuning_key(self) -> tuple[object, ...]:
        """Jobs with an equal key need one tuning of the peer: the key has op, dtype, number of heads and head sizes."""
        return (self.op, self.form, self.dtype, *(pair for pair in self.dims if pair[0] not in ("B", "T")))


def jobs(
    ops: dict[str, list[str]],
    baselines: list[str],
    shapes: list[dict[str, int]],
    dtypes: list[str],
    naive_up_to: float = 0,
) -> list[Job]:
    """Every row in order of importance. `ops`: op -> forms.

    The ops come first, shape by shape in the order in which the shapes were asked for, and the baselines after them.
    Before each op comes its naive loop, if that updates at most `naive_up_to` elements of states over all tokens.
    """
    first: list[Job] = []
    last: list[Job] = []
    for dtype in dtypes:
        for written in shapes:
            for op, forms in ops.items():
                for form in ["naive", *forms]:
                    target = find(op, form)
                    dims = target.fit(written)
                    if form == "naive" and dims["B"] * dims["T"] * target.state_elements(dims) > naive_up_to:
                        continue
                    first.append(Job(op, form, tuple(dims.items()), dtype, form == "naive"))
            last += [Job(name, "", tuple(find(name, "").fit(written).items()), dtype, True) for name in baselines]
    last.sort(key=lambda job: job.shape not in SHAPES["seed"])  # the lengths at which the report compares them
    return list(dict.fromkeys(first + last))


def work(dims: dict[str, int]) -> int:
    """A measure of the work of sizes, for sorting rows of one op."""
    return math.prod(dims.values())
