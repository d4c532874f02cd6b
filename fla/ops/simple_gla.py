"""Simple GLA: linear attention with one scalar decay per head and token (the recurrence of Mamba-2).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g `[B, T, H]`, g_gamma `[H]`, states `[N, H, K, V]` in float32.
`g` and `g_gamma` are natural-log decays, <= 0; `g_gamma` is the same for all tokens. If both are given, they add.
Family: `decay`.
Papers: https://arxiv.org/abs/2405.21060, https://arxiv.org/abs/2103.02143, https://arxiv.org/abs/2405.05254
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends import decay
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, Variant, current_names, register
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "g": "B T H",
    "g_gamma": "H",
    "initial_state": "N H K V",
}
SHAPES_V_FIRST = SHAPES | {"initial_state": "N H V K"}


def naive_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t, :, None, None].to(dtype).exp()
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def naive_parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The op as attention: `o = A v` and `A` `[B, H, T, T]`.

    A_ij = scale (q_i . k_j) exp(G_i - G_j)          for j <= i, else 0; G is the running sum of g
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if g is not None:
        total = g.to(dtype).transpose(1, 2).cumsum(-1)
        scores = scores * (total[..., :, None] - total[..., None, :]).tril().exp()
    scores = scores.tril()
    return torch.einsum("bhij,bjhv->bihv", scores, v.to(dtype)).to(v.dtype), scores


def naive_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The op chunk by chunk, for any T: attention inside a chunk, the state between chunks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = (
        q.new_zeros(len(q), *k.shape[2:], v.shape[-1], dtype=dtype)
        if initial_state is None
        else initial_state.to(dtype)
    )
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        cq, ck, cv, cg = (None if x is None else x[:, start : start + chunk_size].to(dtype) for x in (q, k, v, g))
        assert cq is not None and ck is not None and cv is not None
        total = cq.new_zeros(cq.shape[:3]) if cg is None else cg.cumsum(1)
        inner, _ = naive_parallel_simple_gla(cq, ck, cv, cg, scale)
        outputs.append(inner + torch.einsum("bthk,bhkv->bthv", cq * total.exp()[..., None] * scale, state))
        kept = (total[:, -1:] - total).exp()[..., None]
        state = state * total[:, -1, :, None, None].exp() + torch.einsum("bthk,bthv->bhkv", ck * kept, cv)
    return torch.cat(outputs, 1).to(v.dtype), state if output_final_state else None


@current_names
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple GLA, parallel over chunks: for training and prefill.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H]`, log decay (natural log, <= 0) of any float dtype; None means no decay.
        g_gamma: `[H]`, log decay that is the same for all tokens; it is added to `g` if both are given.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        chunk_size: None, 16, 32, 64 or 128; it has no effect on results.
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, q)
    shapes = SHAPES_V_FIRST if state_v_first else SHAPES
    check_shapes(
        shapes, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, g=g, g_gamma=g_gamma, initial_state=initial_state
    )
    g, g_gamma = decay.combine(g, g_gamma)
    return decay.chunk(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_simple_gla",
    )


@current_names
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` under another name; both compute the same in the same way."""
    return chunk_simple_gla(
        q,
        k,
        v,
        g,
        g_gamma,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


@current_names
@steps_on_pools("q, k, v, g")
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
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
    """Simple GLA token by token: for decoding and short inputs. The arguments of `chunk_simple_gla`, and

    Args:
        reverse: run from the last token of every sequence to the first.
    """
    shapes = pool_shapes(SHAPES_V_FIRST if state_v_first else SHAPES, state_indices)
    check_shapes(
        shapes, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, g=g, g_gamma=g_gamma, initial_state=initial_state
    )
    g, g_gamma = decay.combine(g, g_gamma)
    return decay.recurrent(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_simple_gla",
    )


@current_names
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple GLA without states: `o`, and with `output_attentions` the matrix `A` `[B, H, T, T]` of `o = A v`.

        A_ij = scale (q_i . k_j) exp(G_i - G_j)          for j <= i, else 0; G is the running sum of g

    `A` is for inspection and has no gradient. Packed sequences have no common `A` (ValueError).
    """
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, q)
    check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, g=g)
    return decay.parallel(
        q,
        k,
        v,
        g=g,
        scale=scale,
        output_attentions=output_attentions,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="parallel_simple_gla",
    )


def _reference(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    if g_gamma is not None:
        g = (0 if g is None else g) + g_gamma.expand(q.shape[:3])
    return naive_recurrent_simple_gla(q, k, v, g, scale, initial_state, output_final_state)


_WITH_GAMMA = ("chunk", "fused_chunk", "fused_recurrent")

SPEC = register(
    OpSpec(
        name="simple_gla",
        family="decay",
        shapes=SHAPES,
        reference=_reference,
        forms={
            "chunk": chunk_simple_gla,
            "fused_chunk": fused_chunk_simple_gla,
            "fused_recurrent": fused_recurrent_simple_gla,
            "parallel": parallel_simple_gla,
        },
        same={"fused_chunk": "chunk", "parallel": "chunk"},
        inputs=lambda x: x | {name: F.logsigmoid(x[name]) / 4 for name in ("g", "g_gamma") if name in x},
        gates=("g", "g_gamma"),
        variants=(
            Variant("default", without=("g_gamma",)),
            Variant("no gate", without=("g", "g_gamma")),
            Variant("g_gamma", without=("g",), forms=_WITH_GAMMA),
            Variant("g and g_gamma", forms=_WITH_GAMMA),
        ),
        paper="https://arxiv.org/abs/2405.21060",
    )
)
