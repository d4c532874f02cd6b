"""The delta rule (DeltaNet): linear attention that replaces what a key gave before by its new value.

    u_t = beta_t * (v_t - S_{t-1}^T k_t)
    S_t = S_{t-1} + k_t u_t^T                  S in R^{K x V}
    o_t = scale * S_t^T q_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta `[B, T, H]`, in the recurrent form also `[B, T, H, V]`, states
`[N, H, K, V]` in float32. Keys have length 1, made by the caller or with `use_qk_l2norm_in_kernel`. beta lies in
[0, 1], or in [0, 2] for negative eigenvalues. Family: `delta`.
Papers: https://arxiv.org/abs/2102.11174, https://arxiv.org/abs/2406.06484
"""

import torch
from torch import Tensor

from fla.backends import delta
from fla.ops._delta import naive_chunks, naive_l2norm, naive_recurrence, shapes_of_beta, unit_keys
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, Variant, current_names, register
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "beta": "B T H",
    "initial_state": "N H K V",
}
REQUIRED = ("q", "k", "v", "beta")


def naive_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    return naive_recurrence(q, k, v, beta, None, None, None, scale, initial_state, output_final_state)


def delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`naive_recurrent_delta_rule` with the scale `K ** -0.5`."""
    return naive_recurrent_delta_rule(q, k, v, beta, None, initial_state, output_final_state)


def delta_rule_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int = 32
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks of tokens, each of which solves for what it writes: `o` and the final state."""
    return naive_chunks(q, k, v, beta, None, chunk_size, output_final_state=True)


def delta_rule_parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, BM: int = 128, BN: int = 32
) -> tuple[Tensor, Tensor]:
    """The same as one matrix product: `o = A v`, and `A` `[B, H, T, T]`. `BM` and `BN` have no effect.

    A = scale tril(Q K^T) (I + diag(beta) stril(K K^T))^-1 diag(beta)
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value, strength = (x.to(dtype).transpose(1, 2) for x in (q, k, v, beta[..., None]))
    unit = torch.eye(q.shape[1], dtype=dtype, device=q.device)
    inverse = torch.linalg.inv(unit + strength * (key @ key.mT).tril(-1))
    matrix = (query @ key.mT).tril() * q.shape[-1] ** -0.5 @ inverse * strength.mT
    return (matrix @ value).transpose(1, 2).to(v.dtype), matrix


def naive_delta_rule_parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, BM: int = 128, BN: int = 32
) -> tuple[Tensor, Tensor]:
    """`delta_rule_parallel` under another name."""
    return delta_rule_parallel(q, k, v, beta, BM, BN)


@current_names
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule, parallel over chunks: for training and prefill.

    Args:
        q, k: `[B, T, H, K]`; keys of length 1, unless `use_qk_l2norm_in_kernel`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, how much of the new value is written, of any float dtype.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: q and k become `x / sqrt(sum x^2 + 1e-6)`.
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
    _check(SHAPES, cu_seqlens, scale, q, k, v, beta, initial_state, REQUIRED)
    return delta.chunk(
        q,
        k,
        v,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=delta.Options(use_qk_l2norm_in_kernel),
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_delta_rule",
    )


@current_names
def fused_chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` under another name; both compute the same in the same way."""
    return chunk_delta_rule(
        q,
        k,
        v,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        cu_seqlens_cpu,
        chunk_size=chunk_size,
        backend=backend,
    )


@current_names
@steps_on_pools("q, k, v, beta")
def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule token by token: for decoding and short inputs. The arguments of `chunk_delta_rule`, but

    Args:
        beta: `[B, T, H]`, or `[B, T, H, V]` for one write strength per value channel; None means ones.
    """
    shapes = shapes_of_beta(SHAPES, beta, v)
    _check(pool_shapes(shapes, state_indices), cu_seqlens, scale, q, k, v, beta, initial_state)
    return delta.recurrent(
        q,
        k,
        v,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=delta.Options(use_qk_l2norm_in_kernel),
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_delta_rule",
    )


@current_names
def parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule without states: `o`, and with `output_attentions` the matrix `A` `[B, H, T, T]` of `o = A v`.

        A = scale tril(Q K^T) (I + diag(beta) stril(K K^T))^-1 diag(beta)

    `A` is for inspection and has no gradient. Packed sequences have no common `A` (ValueError).
    """
    check_shapes(SHAPES, required=REQUIRED, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, beta=beta)
    return delta.parallel(
        q,
        k,
        v,
        beta,
        scale=scale,
        output_attentions=output_attentions,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="parallel_delta_rule",
    )


def _check(shapes, cu_seqlens, scale, q, k, v, beta, initial_state, required=("q", "k", "v")) -> None:
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "initial_state": initial_state}
    check_shapes(shapes, required=required, cu_seqlens=cu_seqlens, scale=scale, **tensors)


def _reference(
    q,
    k,
    v,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
):
    dtype = v.dtype
    if use_qk_l2norm_in_kernel:
        q, k = naive_l2norm(q), naive_l2norm(k)
    o, state = naive_recurrent_delta_rule(q, k, v, beta, scale, initial_state, output_final_state)
    return o.to(dtype), state


_ALONE = ("fused_recurrent",)

SPEC = register(
    OpSpec(
        name="delta_rule",
        family="delta",
        shapes=SHAPES,
        reference=_reference,
        forms={
            "chunk": chunk_delta_rule,
            "fused_chunk": fused_chunk_delta_rule,
            "fused_recurrent": fused_recurrent_delta_rule,
            "parallel": parallel_delta_rule,
        },
        same={"fused_chunk": "chunk", "parallel": "chunk"},
        inputs=unit_keys,
        variants=(
            Variant("default"),
            Variant(
                "l2norm in the op",
                {"use_qk_l2norm_in_kernel": True},
                forms=("chunk", "fused_chunk", "fused_recurrent"),
                inputs=lambda x: x | {"beta": x["beta"].sigmoid()},
            ),
            Variant("no beta", without=("beta",), forms=_ALONE),
            Variant("beta of channels", forms=_ALONE, shapes={"beta": "B T H V"}),
        ),
        also={
            "naive": (delta_rule_recurrence, delta_rule_chunkwise, delta_rule_parallel),
            "parallel": (naive_delta_rule_parallel,),
        },
        paper="https://arxiv.org/abs/2406.06484",
    )
)
