"""RWKV-7: a state that decays per key channel and forgets along one direction before it is written to.

    S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          S in R^{K x V}
    o_t = scale * r_t^T S_t

Shapes: r, w, k, a, b `[B, T, H, K]`, v `[B, T, H, V]`, states `[N, H, K, V]` in float32. `w` is a natural-log decay,
in RWKV-7 between -0.6065 and 0. There `a = -kk` and `b = kk * (a learning rate in (0, 1))`, where `kk` has length 1.
The default scale is 1. It is the op `dplr` with other names. Family: `dplr`.
Paper: https://arxiv.org/abs/2503.14456
"""

import math
from typing import Any

from torch import Tensor

from fla.backends import dplr
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, current_names, register
from fla.ops.generalized_delta_rule._options import check_options
from fla.ops.generalized_delta_rule.dplr import bounded, dplr_recurrence
from fla.ops.rwkv7._elementwise import (
    channel_mixing_rwkv7,
    channel_mixing_rwkv7_torch,
    fused_addcmul_rwkv7,
    fused_k_rwkv7,
    gate_output_correction,
)
from fla.shapes import check_shapes, pool_shapes

SHAPES = {
    "r": "B T H K",
    "w": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
    "initial_state": "N H K V",
}
SHAPES_MUL = {("kk" if name == "b" else name): shape for name, shape in SHAPES.items()}
TENSORS = ("r", "k", "v", "a", "b")
TENSORS_MUL = ("r", "k", "v", "kk", "a")
CALLED = {"q": "r", "gk": "w"}


def naive_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    return dplr_recurrence(r, k, v, a, b, w, initial_state, output_final_state, 1.0 if scale is None else scale)


@current_names
def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: Any = None,
    lower_bound: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7, parallel over chunks: for training and prefill.

    Args:
        r, k, a, b: `[B, T, H, K]`.
        w: `[B, T, H, K]`, log decay (natural log, <= 0) of every key channel, of any float dtype.
        v: `[B, T, H, V]`.
        scale: factor of `r`; None means 1, the default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        safe_gate, disable_recompute: no effect on results.
        chunk_size: None, 16, 32, 64 or 128; it has no effect on results.
        cp_context: None; sequences spread over several devices are not computed yet (NotImplementedError).
        lower_bound: None, or a number < 0 that no `w` is below; it has no effect on results.
        backend: "triton", "torch", or None: Triton for GPU tensors where it computes the family, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_options("chunk_rwkv7", chunk_size, lower_bound, cp_context, safe_gate, disable_recompute)
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, r, "r")
    tensors = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b, "initial_state": initial_state}
    check_shapes(SHAPES, same_dtype=TENSORS, required=(*TENSORS, "w"), cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.chunk(
        r,
        k,
        v,
        a,
        b,
        gk=w,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_rwkv7",
    )


@current_names
@steps_on_pools("r, w, k, v, a, b")
def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7 for decoding and short inputs. The arguments of `chunk_rwkv7`; the final state is returned by default."""
    shapes = pool_shapes(SHAPES, state_indices)
    tensors = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b, "initial_state": initial_state}
    check_shapes(shapes, same_dtype=TENSORS, required=(*TENSORS, "w"), cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.recurrent(
        r,
        k,
        v,
        a,
        b,
        gk=w,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        called=CALLED,
        backend=backend,
        op="fused_recurrent_rwkv7",
    )


@current_names
@steps_on_pools("r, w, k, v, kk, a")
def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_rwkv7` with `-kk` as its a, and `kk * a` as its b. Its arguments, and

    Args:
        kk: `[B, T, H, K]`, the direction along which the state forgets, of length 1 in RWKV-7.
        a: `[B, T, H, K]`, the learning rate, how much it forgets there: between 0 and 1 in RWKV-7.
        reverse: run from the last token of every sequence to the first.
    """
    shapes = pool_shapes(SHAPES_MUL, state_indices)
    tensors = {"r": r, "w": w, "k": k, "v": v, "kk": kk, "a": a, "initial_state": initial_state}
    check_shapes(
        shapes, same_dtype=TENSORS_MUL, required=(*TENSORS_MUL, "w"), cu_seqlens=cu_seqlens, scale=scale, **tensors
    )
    return dplr.recurrent(
        r,
        k,
        v,
        -kk,
        kk * a,
        gk=w,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        called=CALLED | {"a": "kk", "b": "a"},
        backend=backend,
        op="fused_mul_recurrent_rwkv7",
    )


STRONGEST_DECAY = -math.exp(-0.5)  # of RWKV-7, whose layers compute log decays as this times a sigmoid

SPEC = register(
    OpSpec(
        name="rwkv7",
        family="dplr",
        shapes=SHAPES,
        reference=naive_recurrent_rwkv7,
        forms={"chunk": chunk_rwkv7, "fused_recurrent": fused_recurrent_rwkv7},
        inputs=lambda x: bounded(x) | {"w": STRONGEST_DECAY * x["w"].sigmoid()},
        gates=("w",),
        required=(*TENSORS, "w"),
        same_dtype=TENSORS,
        default_scale=1.0,
        also={
            "fused_recurrent": (fused_mul_recurrent_rwkv7,),
            "fused_addcmul": (fused_addcmul_rwkv7,),
            "fused_k_update": (fused_k_rwkv7,),
            "gate_output_correction": (gate_output_correction,),
            "channel_mixing": (channel_mixing_rwkv7, channel_mixing_rwkv7_torch),
        },
        parameters=17,
        paper="https://arxiv.org/abs/2503.14456",
    )
)
