"""Which cases a suite runs: one `Suite` of levels per machine, combined so that every pair of levels meets."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fla.ops._spec import OpSpec, Variant
from fla.testing.contract import Case, accepts

PACKED = ((65, 0, 1, 62), (0, 1, 130), (1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Suite:
    """What a machine runs: `tokens` (a tuple is a pack), `heads` as (H, K, V), dtypes of q, k, v.

    `steps`: what recurrent forms, and float32 on Triton, take instead of each of `tokens` (default: the same), where a
    token is expensive.
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    tokens: tuple[int | tuple[int, ...], ...]
    heads: tuple[tuple[int, int, int], ...]
    steps: tuple[int | tuple[int, ...], ...] | None = None
    long: int = 130  # tokens of the checks that are not about sizes
    batch: int = 2
    thorough: bool = True  # False: every check on fewer combinations, where a call takes a second
    same: tuple[str, ...] = ()  # forms that call another one: the torch suite shows that, here they would run twice

    def tokens_of(self, form: str, tokens: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """`tokens`, or what stands for it in a recurrent form."""
        if self.steps is None or "recurrent" not in form:
            return tokens
        return self.steps[self.tokens.index(tokens)] if tokens in self.tokens else self.steps[-1]

    def shortened(self, case: Case) -> Case:
        """The case at the length for recurrent forms where its backend computes the chunk form token by token too."""
        if case.backend != "triton" or case.dtype != torch.float32 or self.steps is None or "recurrent" in case.form:
            return case
        return replace(case, tokens=self.tokens_of("recurrent", case.tokens))


TORCH = Suite(
    backend="torch",
    device="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    tokens=(1, 63, 64, 65, 130, *PACKED),
    heads=((2, 16, 16), (3, 33, 64), (2, 64, 33), (1, 100, 16), (3, 16, 100), (1, 64, 64)),
)
INTERPRETER = Suite(  # `tl.dot` of bfloat16 is wrong in the interpreter of Triton 3.6
    backend="triton",
    device="cpu",
    dtypes=(torch.float32, torch.float16),
    tokens=(1, 64, 65, (65, 0, 1, 62), 130),
    steps=(1, 2, 3, (5, 0, 1, 3), 9),
    heads=((2, 16, 16), (1, 33, 20), (1, 20, 65)),
    long=66,
    batch=1,
    thorough=False,
    same=("fused_chunk", "parallel"),
)
GPU = Suite(
    backend="triton",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    tokens=(1, 65, 300, PACKED[0], (257, 0, 64, 100)),
    heads=(
        *((4, size, size) for size in (16, 64, 96, 128)),
        *((3, 128, 64), (3, 33, 128), (2, 100, 33), (3, 192, 96)),
        *((2, 300, 72), (2, 256, 512), (1, 512, 512)),
    ),
    same=("fused_chunk", "parallel"),
)


def forms(spec: OpSpec, suite: Suite) -> Iterator[tuple[str, Variant]]:
    """Every form with every variant it has."""
    for form, variant in itertools.product(spec.forms, spec.variants):
        if form not in suite.same and (variant.forms is None or form in variant.forms):
            yield form, variant


def calling_variants(spec: OpSpec, form: str, variant: Variant) -> list[Variant]:
    """`variant`, and it with `reverse` and `state_v_first` switched on where the form has them."""
    found = [variant]
    for keyword in ("reverse", "state_v_first"):
        if accepts(Case(spec, form, variant), keyword) and keyword not in variant.settings:
            found += [
                replace(v, name=f"{v.name} {keyword}", settings={**v.settings, keyword: True}) for v in tuple(found)
            ]
    return found


def value_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """Cases in which every pair of levels (form and variant, tokens, heads, dtype, gates, scale, states, ...) meets."""
    factors: dict[str, Sequence[Any]] = {
        "form": list(forms(spec, suite)),
        "heads": suite.heads,
        "tokens": suite.tokens,
        "dtype": suite.dtypes,
        "gates": ("ordinary", "weak") if spec.gates else ("ordinary",),
        "gate_dtype": (None, torch.float32) if spec.gates else (None,),
        "calling": (0, 1, 2, 3),
        "state": ("both", "in", "out", "none"),
        "scale": (None, 0.3),
        "index_dtype": (torch.int32, torch.int64),
        "state_dtype": (None, torch.bfloat16),
    }
    cases = []
    for seed, row in enumerate(pairwise(factors)):
        form, variant = row.pop("form")
        variants = calling_variants(spec, form, variant)
        variant = variants[row.pop("calling") % len(variants)]
        row["tokens"] = suite.tokens_of(form, row["tokens"])
        if row["gate_dtype"] == row["dtype"] or not any(name not in variant.without for name in spec.gates):
            row["gate_dtype"] = None
        if row["state"] not in ("both", "in") or form in spec.stateless or row["dtype"] == torch.float64:
            row["state_dtype"] = None
        fixed: dict[str, Any] = {"batch": suite.batch, "device": suite.device, "backend": suite.backend, "seed": seed}
        cases.append(suite.shortened(enough_heads(Case(spec, form, variant, **row, **fixed))))
    return cases


def enough_heads(case: Case) -> Case:
    """The case with eight heads or more where a gradient has one number a head (that of a constant decay).

    Such a number is a sum over all tokens that may cancel, and then its relative error says nothing; the RMS over
    several does. In float64, and in the torch backend's float32, the sum is good anyway.
    """
    gates = [name for name in case.spec.gates if name not in case.variant.without]
    constant = any("T" not in case.spec.shapes[name].split() for name in gates)
    good = case.dtype == torch.float64 or (case.dtype == torch.float32 and case.backend == "torch")
    if not constant or good:
        return case
    return replace(case, heads=(max(8, case.heads[0]), *case.heads[1:]))


def plain_cases(spec: OpSpec, suite: Suite, *, all_callings: bool = False, **changes: Any) -> list[Case]:
    """One case of every form and variant, over more than two chunks; heads and dtypes in turn.

    `changes`: fields of `Case` that all get; `all_callings`: with `reverse` and `state_v_first` too.
    """
    cases: list[Case] = []
    for form, variant in forms(spec, suite):
        for way in calling_variants(spec, form, variant) if all_callings else [variant]:
            i = len(cases)
            turns: dict[str, Any] = {
                "heads": suite.heads[i % len(suite.heads)],
                "dtype": suite.dtypes[i % len(suite.dtypes)],
                "tokens": suite.long,
                "batch": suite.batch,
                "seed": i,
            }
            fields = turns | changes
            fields["tokens"] = suite.tokens_of(form, fields["tokens"])
            case = Case(spec, form, way, **fields, device=suite.device, backend=suite.backend)
            cases.append(suite.shortened(enough_heads(case)))
    return cases


def pairwise(factors: dict[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Rows, one value of every factor each, such that any two values of two factors meet in some row (greedy)."""
    names = sorted(factors, key=lambda name: -len(factors[name]))
    sizes = [len(factors[name]) for name in names]
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    turn = 0
    while open_pairs:
        a, i, b, j = min(open_pairs)
        row = {a: i, b: j}
        for c in range(len(names)):
            if c in row:
                continue
            turn += 1  # ties go round, so that levels without open pairs still vary
            gains = [
                (sum(_pair(c, level, d, row[d]) in open_pairs for d in row), -((level + turn) % sizes[c]), level)
                for level in range(sizes[c])
            ]
            row[c] = max(gains)[2]
        open_pairs -= {_pair(c, row[c], d, row[d]) for c, d in itertools.combinations(row, 2)}
        yield {names[c]: factors[names[c]][level] for c, level in row.items()}


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)
