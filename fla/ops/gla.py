"""Gated linear attention (GLA): linear attention with a decay per token and key channel.

    S_t = diag(exp(gk_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

Shapes: q, k, gk `[B, T, H, K]`, v, gv `[B, T, H, V]`, states `[N, H, K, V]` in float32. `gk` and `gv` are natural-log
decays, <= 0. The chunk form calls `gk` `g`, and only the recurrent form has `gv`. Family: `decay`.
Paper: https://arxiv.org/abs/2312.06635
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends import decay
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._same import same_as
from fla.ops._spec import OpSpec, Variant, current_names, register
from fla.shapes import check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "g": "B T H K",
    "gk": "B T H K",
    "gv": "B T H V",
    "initial_state": "N H K V",
}
SHAPES_V_FIRST = SHAPES | {"initial_state": "N H V K"}


def naive_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        if gk is not None:
            state = state * gk[:, t, :, :, None].to(dtype).exp()
        if gv is not None:
            state = state * gv[:, t, :, None, :].to(dtype).exp()
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


@current_names
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GLA, parallel over chunks: for training and prefill.

    Args:
        q, k, g: `[B, T, H, K]`; `g` is the log decay (natural log, <= 0) of every key channel, of any float dtype.
        v: `[B, T, H, V]`.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    shapes = SHAPES_V_FIRST if state_v_first else SHAPES
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, q)
    required = ("q", "k", "v", "g")
    check_shapes(
        shapes, required=required, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, g=g, initial_state=initial_state
    )
    return decay.chunk(
        q,
        k,
        v,
        gk=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_gla",
    )


@same_as(chunk_gla)
def fused_chunk_gla(*args, **keywords):
    """`chunk_gla` under another name; both compute the same in the same way."""


@current_names
@steps_on_pools("q, k, v, gk")
def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GLA token by token: for decoding and short inputs. The arguments of `chunk_gla`, and

    Args:
        gk: `[B, T, H, K]`, log decay of every key channel, or None.
        gv: `[B, T, H, V]`, log decay of every value channel, or None.
        reverse: run from the last token of every sequence to the first.
    """
    shapes = pool_shapes(SHAPES_V_FIRST if state_v_first else SHAPES, state_indices)
    check_shapes(shapes, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, gk=gk, gv=gv, initial_state=initial_state)
    return decay.recurrent(
        q,
        k,
        v,
        gk=gk,
        gv=gv,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_gla",
    )


def _reference(q, k, v, g=None, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False):
    return naive_recurrent_gla(q, k, v, g if gk is None else gk, initial_state, output_final_state, scale, gv)


SPEC = register(
    OpSpec(
        name="gla",
        family="decay",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_gla, "fused_chunk": fused_chunk_gla, "fused_recurrent": fused_recurrent_gla},
        same={"fused_chunk": "chunk"},
        inputs=lambda x: x | {name: F.logsigmoid(x[name]) / 4 for name in ("g", "gk", "gv") if name in x},
        gates=("g", "gk", "gv"),
        variants=(
            Variant("default", without=("gk", "gv"), forms=("chunk", "fused_chunk")),
            Variant("default", without=("g", "gv"), forms=("fused_recurrent",)),
            Variant("gk and gv", without=("g",), forms=("fused_recurrent",)),
            Variant("gv", without=("g", "gk"), forms=("fused_recurrent",)),
        ),
        paper="https://arxiv.org/abs/2312.06635",
    )
)
