"""Every kernel x decay kind x dtype x head-size bucket of the `decay` family, all options on.

A backward launch holds three roles, of which a program runs one: each is compiled alone, so that the budget holds
per program.
"""

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

from fla.backends.triton._lib import sequence
from fla.backends.triton.decay import (
    _decay,
    chunk_backward,
    chunk_forward,
    gate_gradient,
    recurrent,
    step,
    vector_backward,
)

KINDS = {"none": _decay.NONE.value, "constant": _decay.CONSTANT.value, "scalar": _decay.SCALAR.value}
HEADS = ((64, 64), (100, 36), (128, 128))
STATES = "*fp32"

scalar_dq, scalar_dk, scalar_dv = chunk_backward._dq_role, chunk_backward._dk_role, chunk_backward._dv_role
vector_dq, vector_dk, vector_dv = vector_backward._dq_role, vector_backward._dk_role, vector_backward._dv_role


class Variant(NamedTuple):
    name: str
    kernel: object
    types: dict
    constants: dict
    stages: int = 1
    warps: int = 4
    is_matrix: bool = True
    uses_wgmma: bool = True
    is_odd: bool = False


@triton.jit(do_not_specialize=["T", "H"])
def scalar_role(
    q, k, v, g, do, h0, dht, dq, dk, dv, dh0, rows, cu_seqlens, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, ROLE: tl.constexpr,
):  # fmt: skip
    i_state, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = sequence(cu_seqlens, i_state // H, T)
    first = start * H + i_state % H
    if ROLE == "dq":
        scalar_dq(q, k, v, g, do, h0, dht, dq, rows, rows, first, length, scale, i_state, H, i, K, V, KIND)
    elif ROLE == "dk":
        scalar_dk(q, k, v, g, do, dht, dk, dh0, rows, first, length, scale, i_state, H, i, K, V, KIND)
    else:
        scalar_dv(q, k, g, do, dht, dv, first, length, scale, i_state, H, i, K, V, KIND)


@triton.jit(do_not_specialize=["T", "H"])
def vector_role(
    q, k, v, g, do, h0, dht, dq, dk, dv, dh0, rows, cu_seqlens, far, T, H,
    K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr, ROLE: tl.constexpr,
):  # fmt: skip
    i_state, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = sequence(cu_seqlens, i_state // H, T)
    scale = T * 0.5  # some run-time number
    first = start * H + i_state % H
    if ROLE == "dq":
        vector_dq(q, k, v, g, do, h0, dht, dq, rows, rows, far, first, length, scale, i_state, H, i, K, V, RANGE)
    elif ROLE == "dk":
        vector_dk(q, k, v, g, do, dht, dk, dh0, rows, far, first, length, scale, i_state, H, i, K, V, RANGE)
    else:
        vector_dv(q, k, g, do, dht, dv, far, first, length, scale, i_state, H, i, K, V, RANGE)


def variants(dtype: str) -> Iterator[Variant]:
    """`dtype`: "bf16" or "fp16"; gates in the same dtype."""
    for K, V in HEADS:
        for variant in (*_scalar(dtype, K, V), *_vector(dtype, K, V), *_recurrent(dtype, K, V)):
            yield variant._replace(name=f"{variant.name}-{K}x{V}", is_odd=K % 16 != 0)
    rest = {"is_matrix": False, "uses_wgmma": False}
    types = {"g": f"*{dtype}", "rows": STATES, "change": STATES, "dg": f"*{dtype}"}
    types |= {"cu_seqlens": "*i32", "T": "i32", "H": "i32"}
    kernel = gate_gradient.gate_gradient_kernel
    yield Variant("gate-scalar", kernel, types, {"D": 1, "BD": 1, "TILES": 2}, **rest)
    yield Variant("gate-vector", kernel, types, {"D": 128, "BD": 64, "TILES": 1}, **rest)


def _types(dtype: str) -> tuple[dict, dict]:
    """The argument types of a forward and of a backward."""
    p = f"*{dtype}"
    common = {"q": p, "k": p, "v": p, "h0": STATES, "cu_seqlens": "*i32", "scale": "fp32", "T": "i32", "H": "i32"}
    gradients = {"do": p, "dht": STATES, "dq": p, "dk": p, "dv": p, "dh0": STATES}
    return common | {"o": p, "ht": STATES}, common | gradients


def _scalar(dtype: str, K: int, V: int) -> Iterator[Variant]:
    forward, backward = _types(dtype)
    size = {"K": K, "V": V}
    for kind, code in KINDS.items():
        gate = {"none": {}, "constant": {"g": "*fp64"}, "scalar": {"g": f"*{dtype}"}}[kind]
        absent = {} if gate else {"g": None}
        constants = size | {"BK": _decay.padded(K), "KIND": code} | absent
        yield Variant(f"{kind}-fwd", chunk_forward.scalar_forward_kernel, forward | gate, constants, stages=2)
        rows = {"rows": STATES} if kind == "scalar" else {}
        absent |= {} if rows else {"rows": None}
        for role in ("dq", "dk", "dv"):
            constants = size | {"KIND": code, "ROLE": role} | absent
            yield Variant(f"{kind}-{role}", scalar_role, backward | gate | rows, constants, stages=2)


def _vector(dtype: str, K: int, V: int) -> Iterator[Variant]:
    forward, backward = _types(dtype)
    size, more = {"K": K, "V": V}, {"g": f"*{dtype}", "far": "*i32"}
    span = 8.0 if dtype == "fp16" else 80.0
    for name, stages, reach in (("vector", 1 if dtype == "fp16" else 2, span), ("short", 1, None)):
        wgmma = {"uses_wgmma": True}
        constants = size | {"BK": _decay.padded(K), "RANGE": reach}
        yield Variant(f"{name}-fwd", chunk_forward.vector_forward_kernel, forward | more, constants, **wgmma)
        for role in ("dq", "dk", "dv"):
            constants = size | {"RANGE": reach, "ROLE": role}
            yield Variant(f"{name}-{role}", vector_role, backward | more | {"rows": STATES}, constants, stages, **wgmma)


def _recurrent(dtype: str, K: int, V: int) -> Iterator[Variant]:
    """All decays at once. float32 has no variants of its own yet: it comes with bf16."""
    if dtype == "bf16":
        yield from (variant._replace(name=f"{variant.name}-fp32") for variant in _recurrent("fp32", K, V))
    forward, backward = _types(dtype)
    size, p = {"K": K, "V": V}, f"*{dtype}"
    rest = {"is_matrix": False, "uses_wgmma": False}
    gates = {"g": p, "gk": p, "gv": p, "g_gamma": "*fp64"}
    more = {"indices": "*i32", "P": "i32"}
    for name, states in (("", 4096), ("-few", 16)):
        BV, warps = step.tiles(states, K, V)
        for layout, flags in (("", step.IN_PLACE), ("-v-first", step.IN_PLACE | step.V_FIRST)):
            constants = size | {"BV": BV, "FLAGS": flags, "ht": None}
            types = {name: kind for name, kind in (forward | gates | more).items() if name != "ht"}
            kernel = step.recurrent_forward_kernel
            yield Variant(f"recurrent-fwd{name}{layout}", kernel, types, constants, **rest, warps=warps)
    del gates["g_gamma"]
    wide = STATES if dtype != "fp32" else "*fp64"
    types = backward | gates | {"ahead": wide, "back": wide, "change": wide}
    types = {name: kind for name, kind in types.items() if name not in ("dq", "dk", "dv")}
    kernel, warps = recurrent.recurrent_backward_kernel, 2 if wide == STATES else 4
    yield Variant("recurrent-bwd", kernel, types, size | {"WITH_O": True}, **rest, warps=warps)
    types = {"x": p, "ahead": wide, "y": p, "back": wide, "change": wide, "gate": p, "dg": p}
    types |= {"cu_seqlens": "*i32", "T": "i32", "H": "i32"}
    for name in ("scalar", "vector"):
        constants = {"COLUMN": 0, "D": K, "AHEAD": K, "BACK": K + V, "SLICES": 2, "SCALAR": name == "scalar"}
        yield Variant(f"recurrent-gate-{name}", recurrent.gate_kernel, types, constants, **rest)
