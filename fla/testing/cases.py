"""Which cases a suite runs: one `Suite` of levels per machine, combined so that every pair of levels meets."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fla.ops._spec import OpSpec, Variant
from fla.testing.contract import Case, accepts
from fla.testing.inputs import sizes_of

PACKED = ((65, 0, 1, 62), (0, 1, 130), (1, 1, 1, 1, 1))
STATES = ("both", "in", "out", "none")
Tokens = int | tuple[int, ...]


def heads(*rows: tuple[int, int, int]) -> tuple[dict[str, int], ...]:
    """Sizes of the axes H, K and V, a dict for each row. Other axes follow from these, or the op declares them."""
    return tuple(dict(zip("HKV", row, strict=True)) for row in rows)


@dataclass(frozen=True)
class Suite:
    """What a machine runs: numbers of `tokens` (a tuple is the lengths of a pack), `sizes` of the axes, and `dtypes`.

    `instead_of`: a backend whose families are left out, because another suite runs them. `steps`: what recurrent forms,
    and float32 on Triton, take instead of each of `tokens` (default: the same), where a token is expensive.
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    tokens: tuple[Tokens, ...]
    sizes: tuple[dict[str, int], ...]
    steps: tuple[Tokens, ...] | None = None
    long: int = 66  # tokens in checks that are not about sizes: a chunk, and two tokens of the next
    packed: tuple[int, ...] = (65, 0, 1, 30)  # lengths of the packed sequences in such checks
    batch: int = 2
    exhaustive: bool = False  # products of what is otherwise taken in turn: before a kernel lands
    same: bool = False  # also the forms that only call another one
    instead_of: str | None = None
    every_way: bool = False  # every way of calling with every variant, where a call is cheap; else these in turn

    def tokens_of(self, form: str, tokens: Tokens) -> Tokens:
        """`tokens`, or what stands for it in a recurrent form; what is as short already stays."""
        if self.steps is None or "recurrent" not in form or tokens in self.steps:
            return tokens
        if tokens in self.tokens:
            return self.steps[self.tokens.index(tokens)]
        longest = max(step for step in self.steps if isinstance(step, int))
        return min(tokens, longest) if isinstance(tokens, int) else longest

    def shortened(self, case: Case) -> Case:
        """The case with fewer tokens (`Suite.steps`) if its backend computes even the chunk form token by token."""
        if case.backend != "triton" or case.dtype != torch.float32 or self.steps is None or "recurrent" in case.form:
            return case
        return replace(case, tokens=self.tokens_of("recurrent", case.tokens))


TORCH = Suite(
    backend="torch",
    device="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    tokens=(1, 64, 66, (65, 0, 1, 30), (0, 1, 66), (1, 1, 1, 1, 1)),
    sizes=heads((2, 16, 16), (3, 33, 20), (1, 20, 100), (1, 1, 1), (1, 256, 16)),
    every_way=True,
)
TORCH_EXHAUSTIVE = replace(
    TORCH,
    tokens=(1, 63, 64, 65, 130, *PACKED),
    sizes=heads((2, 16, 16), (3, 33, 64), (2, 64, 33), (1, 100, 16), (3, 16, 100), (1, 64, 64)),
    long=130,
    packed=PACKED[0],
    exhaustive=True,
    same=True,
)
INTERPRETER = Suite(  # `tl.dot` of bfloat16 is wrong in the interpreter of Triton 3.6
    backend="triton",
    device="cpu",
    dtypes=(torch.float32, torch.float16),
    tokens=(1, (65, 0, 1), 66),
    steps=(1, (2, 0, 1), 4),
    packed=(65, 0, 1),
    sizes=heads((2, 16, 16), (1, 33, 20), (1, 20, 65)),
    batch=1,
)
INTERPRETER_EXHAUSTIVE = replace(
    INTERPRETER,
    tokens=(1, 64, 65, PACKED[0], 130),
    steps=(1, 2, 3, (5, 0, 1, 3), 9),
    packed=PACKED[0],
    exhaustive=True,
    every_way=True,
)
GPU = Suite(
    backend="triton",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.bfloat16, torch.float32),  # bfloat16 is what models train in
    tokens=(1, 65, 300, PACKED[0]),
    sizes=heads((4, 64, 64), (4, 128, 128), (3, 33, 128), (2, 256, 512)),
    long=130,
    packed=PACKED[0],
)
TORCH_ON_GPU = replace(
    TORCH,
    device="cuda",
    tokens=(1, 66, (65, 0, 1, 30)),
    sizes=heads((4, 64, 64), (3, 33, 20), (1, 256, 16)),
    every_way=False,
    instead_of="triton",
)
GPU_EXHAUSTIVE = replace(
    GPU,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    tokens=(1, 65, 300, PACKED[0], (257, 0, 64, 100)),
    sizes=heads(
        *((4, size, size) for size in (16, 64, 96, 128)),
        *((3, 128, 64), (3, 33, 128), (2, 100, 33), (3, 192, 96)),
        *((2, 300, 72), (2, 256, 512), (1, 512, 512)),
    ),
    exhaustive=True,
    every_way=True,
)


def forms_of(spec: OpSpec, variant: Variant, suite: Suite) -> list[str]:
    """The forms that have a variant, without those that only call another one unless the suite has `same`."""
    found = spec.forms if variant.forms is None else variant.forms
    return [form for form in spec.forms if form in found and (suite.same or form not in spec.same)]


def forms(spec: OpSpec, suite: Suite) -> Iterator[tuple[str, Variant]]:
    """Every form with every variant that it has; the forms of one variant follow each other."""
    for variant in spec.variants:
        for form in forms_of(spec, variant, suite):
            yield form, variant


def calling_variants(spec: OpSpec, form: str, variant: Variant) -> list[Variant]:
    """`variant`, and it with `reverse` and `state_v_first` switched on where the form has them."""
    found = [variant]
    for keyword in ("reverse", "state_v_first"):
        if takes(spec, form, variant, keyword):
            found += [switched(v, keyword) for v in tuple(found)]
    return found


def takes(spec: OpSpec, form: str, variant: Variant, keyword: str) -> bool:
    """Whether the form has this parameter, and the variant leaves it open."""
    return accepts(Case(spec, form, variant), keyword) and keyword not in variant.settings


def switched(variant: Variant, keyword: str) -> Variant:
    return replace(variant, name=f"{variant.name} {keyword}", settings={**variant.settings, keyword: True})


def value_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """Cases in which every pair of levels (variant, tokens, sizes, dtype, gates, scale, states, ...) meets.

    Each problem is given to every form that can compute it, so that they share its reference. In an exhaustive suite
    every form has problems of its own, so that each form meets each level.
    """
    gated = bool(spec.gates)
    factors: dict[str, Sequence[Any]] = {
        "variant": list(forms(spec, suite))
        if suite.exhaustive
        else [v for v in spec.variants if forms_of(spec, v, suite)],
        "sizes": [sizes_of(spec, level, turn) for turn, level in enumerate(suite.sizes)],
        "tokens": suite.tokens,
        "dtype": suite.dtypes,
        "gates": ("ordinary", "weak") if gated else ("ordinary",),
        "gate_dtype": (None, torch.float32) if gated else (None,),
        # off twice as often as on, since forms that lack it can share only a problem without it
        "reverse": (False, True) if suite.exhaustive else (False, True, False),
        "state_v_first": (False, True),
        "state": STATES if suite.exhaustive else (None,),  # None: the next two factors decide
        "takes_state": (True, False),
        "returns_state": (True, False),
        "scale": (None, 0.3) if any(_has_scale(spec, form) for form in spec.forms) else (None,),
        "index_dtype": (torch.int32, torch.int64),
        "state_dtype": (None, torch.bfloat16),
    }
    cases = []
    for seed, row in enumerate(pairwise(factors)):
        chosen, called = row.pop("variant"), [name for name in ("reverse", "state_v_first") if row.pop(name)]
        state = STATES[2 * (not row.pop("takes_state")) + (not row.pop("returns_state"))]
        row["state"] = row["state"] or state
        pairs = [chosen] if suite.exhaustive else [(form, chosen) for form in forms_of(spec, chosen, suite)]
        made = [_value_case(spec, suite, form, variant, called, row, seed) for form, variant in pairs]
        cases += distinct(made, suite, seed)
    return cases


def distinct(cases: list[Case], suite: Suite, turn: int) -> list[Case]:
    """The same problem in several forms: one of them, in turn, where all are computed token by token (`shortened`).

    Where that is so of float32 alone, recurrent forms get every second of the other problems.
    """
    if suite.steps is None or suite.exhaustive:
        return cases
    if cases[0].dtype == torch.float32:
        return [cases[turn % len(cases)]]
    found = [case for case in cases if "recurrent" not in case.form]
    return cases if turn % 2 or not found else found


def _value_case(spec, suite: Suite, form: str, variant: Variant, called: list[str], row: dict, seed: int) -> Case:
    row = row | {"tokens": suite.tokens_of(form, row["tokens"])}
    if row["gate_dtype"] == row["dtype"] or not any(name not in variant.without for name in spec.gates):
        row["gate_dtype"] = None
    if row["state"] not in ("both", "in") or form in spec.stateless or row["dtype"] == torch.float64:
        row["state_dtype"] = None
    if not _has_scale(spec, form):
        row["scale"] = None
    for keyword in called:
        if takes(spec, form, variant, keyword):
            variant = switched(variant, keyword)
    fixed: dict[str, Any] = {"batch": suite.batch, "device": suite.device, "backend": suite.backend, "seed": seed}
    return suite.shortened(enough_heads(Case(spec, form, variant, **row, **fixed)))


def _has_scale(spec: OpSpec, form: str) -> bool:
    return accepts(Case(spec, form, spec.variants[0]), "scale")


def enough_heads(case: Case) -> Case:
    """The case, with at least eight heads (interpreted: four) if it has the gradient of a constant decay.

    That gradient has one number a head, a sum over all tokens that may cancel. Then its relative error says nothing,
    and the RMS over several heads does. In float64, and in the torch backend's float32, the sum is accurate anyway.
    """
    gates = [name for name in case.spec.gates if name not in case.variant.without]
    constant = any("T" not in case.spec.shapes[name].split() for name in gates)
    good = case.dtype == torch.float64 or (case.dtype == torch.float32 and case.backend == "torch")
    if not constant or good or "H" not in case.dims:
        return case
    interpreted = case.backend == "triton" and case.device == "cpu"
    return case.resized(H=4, K=16, V=16) if interpreted else case.resized(H=max(8, case.dims["H"]))


def plain_cases(spec: OpSpec, suite: Suite, *, turn: int = 0, all_callings: bool = False, **changes: Any) -> list[Case]:
    """One case of every form and variant, over more than a chunk. Sizes and dtypes take turns, from the `turn`-th on.

    `changes`: fields that every `Case` gets. `all_callings`: also cases with `reverse` and `state_v_first`. All forms
    of a variant get the same problem.
    """
    cases: list[Case] = []
    for i, variant in enumerate(spec.variants):
        for form in forms_of(spec, variant, suite):
            for way in calling_variants(spec, form, variant) if all_callings else [variant]:
                at = turn + (len(cases) if suite.exhaustive else i)
                level = suite.sizes[at % len(suite.sizes)]
                turns: dict[str, Any] = {
                    "sizes": sizes_of(spec, level, at),
                    "dtype": suite.dtypes[at % len(suite.dtypes)],
                    "tokens": suite.long,
                    "batch": suite.batch,
                    "seed": at,
                }
                made = turns | changes
                made["tokens"] = suite.tokens_of(form, made["tokens"])
                case = Case(spec, form, way, **made, device=suite.device, backend=suite.backend)
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
            turn += 1  # ties are broken in turn, so that levels whose pairs have all met still vary
            gains = [
                (sum(_pair(c, level, d, row[d]) in open_pairs for d in row), -((level + turn) % sizes[c]), level)
                for level in range(sizes[c])
            ]
            row[c] = max(gains)[2]
        open_pairs -= {_pair(c, row[c], d, row[d]) for c, d in itertools.combinations(row, 2)}
        yield {names[c]: factors[names[c]][level] for c, level in row.items()}


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)
