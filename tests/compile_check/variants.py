"""Every kernel x decay kind x dtype x head-size bucket of the `decay` family, all options on."""

from collections.abc import Iterator
from typing import NamedTuple

from fla.backends.triton.decay import _decay, chunk_backward, chunk_forward, gate_gradient, recurrent, vector_backward

KINDS = {"none": _decay.NONE.value, "constant": _decay.CONSTANT.value, "scalar": _decay.SCALAR.value}
HEADS = ((64, 64), (100, 100), (128, 128))
STATES, PACKING = "*fp32", "*i32"


class Variant(NamedTuple):
    name: str
    kernel: object
    types: dict
    constants: dict
    stages: int
    is_matrix: bool


def variants(dtype: str) -> Iterator[Variant]:
    """`dtype`: "bf16" or "fp16"; gates in the same dtype."""
    p = f"*{dtype}"
    common = {"cu_seqlens": PACKING, "scale": "fp32", "T": "i32", "H": "i32"}
    inputs = {"q": p, "k": p, "v": p}
    fwd = inputs | {"h0": STATES, "o": p, "ht": STATES} | common
    far = {"far": "*i32"}
    bwd = inputs | {"do": p, "h0": STATES, "dht": STATES, "dq": p, "dk": p, "dv": p, "dh0": STATES} | common
    span = 8.0 if dtype == "fp16" else 80.0
    for K, V in HEADS:
        size, pad = {"K": K, "V": V}, max(64, 1 << (K - 1).bit_length())
        for kind, code in KINDS.items():
            gate = {"none": {}, "constant": {"g": "*fp64"}, "scalar": {"g": p}}[kind]
            absent = {} if gate else {"g": None}
            rows = {"rows": STATES} if kind == "scalar" else {}
            no_rows = {} if rows else {"rows": None}
            constants = size | {"BK": pad, "KIND": code} | absent
            yield Variant(f"{kind}-fwd-{K}", chunk_forward.scalar_forward_kernel, fwd | gate, constants, 2, True)
            constants = size | {"KIND": code} | absent | no_rows
            yield Variant(
                f"{kind}-bwd-{K}", chunk_backward.scalar_backward_kernel, bwd | gate | rows, constants, 2, True
            )
        vector = {"g": p} | far
        for name, stages, reach in (("vector", 2, span), ("short", 1, None)):
            constants = size | {"BK": pad, "RANGE": reach}
            kernel = chunk_forward.vector_forward_kernel
            yield Variant(f"{name}-fwd-{K}", kernel, fwd | vector, constants, 1, True)
            kernel, types = vector_backward.vector_backward_kernel, bwd | vector | {"rows": STATES}
            yield Variant(f"{name}-bwd-{K}", kernel, types, size | {"RANGE": reach}, stages, True)
        gates = {"g": p, "gk": p, "gv": p}
        constants, kernel = size | {"BK": pad}, recurrent.recurrent_forward_kernel
        yield Variant(f"recurrent-fwd-{K}", kernel, fwd | gates | {"g_gamma": "*fp64"}, constants, 1, False)
        grads = {"dq": STATES, "dk": STATES, "dv": STATES}
        kernel = recurrent.recurrent_backward_kernel
        types = bwd | {"gk": p, "gv": p} | grads
        yield Variant(f"recurrent-bwd-{K}", kernel, types, size, 1, False)
    types = {"g": p, "rows": STATES, "change": STATES, "dg": p, "cu_seqlens": PACKING, "T": "i32", "H": "i32"}
    kernel = gate_gradient.gate_gradient_kernel
    yield Variant("gate-scalar", kernel, types, {"D": 1, "BD": 1, "TILES": 2}, 1, False)
    yield Variant("gate-vector", kernel, types, {"D": 128, "BD": 64, "TILES": 1}, 1, False)
