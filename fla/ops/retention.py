"""Retention (RetNet): linear attention with a fixed decay per head.

    S_t = gamma_h S_{t-1} + k_t v_t^T          gamma_h = 1 - 2^(-5 - h), h = 0 .. H - 1
    o_t = scale * q_t^T S_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, states `[N, H, K, V]` in float32. Family: `decay`.
Paper: https://arxiv.org/abs/2307.08621
"""

import torch
from torch import Tensor

from fla.backends import decay
from fla.ops._pools import steps_on_pools
from fla.ops._same import same_as
from fla.ops._spec import OpSpec, current_names, register
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

SHAPES = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "initial_state": "N H K V"}
SHAPES_V_FIRST = SHAPES | {"initial_state": "N H V K"}


def naive_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gamma = 1 - torch.exp2(-5.0 - torch.arange(q.shape[2], dtype=dtype, device=q.device))
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def naive_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The op as attention: `o = A v` with `A_ij = K^-0.5 (q_i . k_j) gamma_h^(i - j)` for `j <= i`, else 0."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    log_gamma = torch.log1p(-torch.exp2(-5.0 - torch.arange(q.shape[2], dtype=dtype, device=q.device)))
    steps = torch.arange(q.shape[1], dtype=dtype, device=q.device)
    ratio = ((steps[:, None] - steps).tril() * log_gamma[:, None, None]).exp()
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhv->bihv", (scores * ratio).tril(), v.to(dtype)).to(v.dtype)


@current_names
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention, parallel over chunks: for training and prefill.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        chunk_size: None, 16, 32, 64 or 128; it has no effect on results.
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, initial_state=initial_state)
    return decay.chunk(
        q,
        k,
        v,
        g_gamma=decay.retention_decay(q.shape[2], q.device),
        mild=True,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_retention",
    )


@same_as(chunk_retention)
def fused_chunk_retention(*args, **keywords):
    """`chunk_retention` under another name; both compute the same in the same way."""


@current_names
@steps_on_pools("q, k, v")
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Retention token by token: for decoding and short inputs. The arguments of `chunk_retention`, and

    Args:
        reverse: run from the last token of every sequence to the first.
        state_v_first: states are `[N, H, V, K]`.
    """
    shapes = pool_shapes(SHAPES_V_FIRST if state_v_first else SHAPES, state_indices)
    check_shapes(shapes, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, initial_state=initial_state)
    return decay.recurrent(
        q,
        k,
        v,
        g_gamma=decay.retention_decay(q.shape[2], q.device),
        mild=True,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_retention",
    )


@current_names
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention without states: `o`, and with `output_attentions` the matrix `A` `[B, H, T, T]` of `o = A v`.

        A_ij = scale (q_i . k_j) gamma_h^(i - j)          for j <= i, else 0

    `A` is for inspection and has no gradient. Packed sequences have no common `A` (ValueError).
    """
    check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v)
    return decay.parallel(
        q,
        k,
        v,
        g_gamma=decay.retention_decay(q.shape[2], q.device),
        mild=True,
        scale=scale,
        output_attentions=output_attentions,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="parallel_retention",
    )


SPEC = register(
    OpSpec(
        name="retention",
        family="decay",
        shapes=SHAPES,
        reference=naive_recurrent_retention,
        forms={
            "chunk": chunk_retention,
            "fused_chunk": fused_chunk_retention,
            "fused_recurrent": fused_recurrent_retention,
            "parallel": parallel_retention,
        },
        same={"fused_chunk": "chunk", "parallel": "chunk"},
        paper="https://arxiv.org/abs/2307.08621",
    )
)
