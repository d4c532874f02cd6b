"""The generalised delta rule without decays (IPLR): the state's transition is the identity plus a matrix of low rank.

    S_t = S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

Shapes: q, k, a, b `[B, T, H, K]`, v `[B, T, H, V]`, states `[N, H, K, V]` in float32. With `a = -beta k`, `b = k` and
`beta v` in place of v it is the delta rule. Family: `dplr`.
Papers: https://arxiv.org/abs/2406.06484, https://arxiv.org/abs/2503.14456
"""

from torch import Tensor

from fla.backends import dplr
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, current_names, register
from fla.ops.generalized_delta_rule import dplr as with_decays
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

TENSORS = ("q", "k", "v", "a", "b")
SHAPES = {name: with_decays.SHAPES[name] for name in (*TENSORS, "initial_state")}


def iplr_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op.

    `alpha` is a, `beta` is b. `scale`: `K ** -0.5` by default.
    """
    return with_decays.dplr_recurrence(q, k, v, alpha, beta, None, initial_state, output_final_state, scale)


def iplr_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int = 32,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The op chunk by chunk, for any T: `dplr_chunkwise` without decays."""
    return with_decays.dplr_chunkwise(q, k, v, alpha, beta, None, initial_state, output_final_state, chunk_size, scale)


@current_names
def chunk_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """IPLR, parallel over chunks: for training and prefill.

    Args:
        q, k, a, b: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        chunk_size: None, 16, 32, 64 or 128; it has no effect on results.
        backend: "triton", "torch", or None: Triton for GPU tensors where it computes the family, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, q)
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "initial_state": initial_state}
    check_shapes(SHAPES, same_dtype=TENSORS, required=TENSORS, cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.chunk(
        q,
        k,
        v,
        a,
        b,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_iplr_delta_rule",
    )


@current_names
@steps_on_pools("q, k, v, a, b")
def fused_recurrent_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """IPLR for decoding and short inputs. The arguments of `chunk_iplr_delta_rule`."""
    shapes = pool_shapes(SHAPES, state_indices)
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "initial_state": initial_state}
    check_shapes(shapes, same_dtype=TENSORS, required=TENSORS, cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.recurrent(
        q,
        k,
        v,
        a,
        b,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_iplr_delta_rule",
    )


def _reference(q, k, v, a, b, scale=None, initial_state=None, output_final_state=False):
    return iplr_recurrence(q, k, v, a, b, initial_state, output_final_state, scale)


SPEC = register(
    OpSpec(
        name="iplr",
        family="dplr",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_iplr_delta_rule, "fused_recurrent": fused_recurrent_iplr_delta_rule},
        inputs=with_decays.bounded,
        required=TENSORS,
        same_dtype=TENSORS,
        also={"naive": (iplr_recurrence, iplr_chunkwise)},
        paper="https://arxiv.org/abs/2406.06484",
    )
)
