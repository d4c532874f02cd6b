"""The gated delta rule (Gated DeltaNet): the delta rule on a state that decays.

    S'_t = diag(exp(g_t + gk_t)) S_{t-1} diag(exp(gv_t))               S in R^{K x V}
    u_t  = beta_t * (v_t - S'_t^T k_t)
    S_t  = S'_t + k_t u_t^T
    o_t  = scale * S_t^T q_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g, beta `[B, T, HV]`, states `[N, HV, K, V]` in float32. HV is a
multiple of H: value head h reads key head `h // (HV / H)`. The decays are natural logs, <= 0. Only the recurrent form
has `gk` `[B, T, HV, K]`, `gv` `[B, T, HV, V]` and a beta `[B, T, HV, V]` of value channels. Keys have length 1, made by
the caller or with `use_qk_l2norm_in_kernel`. beta lies in [0, 1], or in [0, 2] for negative eigenvalues. Family:
`delta`.
Paper: https://arxiv.org/abs/2412.06464
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fla.backends import delta
from fla.ops._delta import (
    check_heads,
    check_hints,
    check_options,
    naive_beta,
    naive_chunks,
    naive_gate,
    naive_l2norm,
    naive_recurrence,
    packing,
    shapes_of_beta,
    unit_keys,
)
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, Variant, current_names, register
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T HV V",
    "g": "B T HV",
    "gk": "B T HV K",
    "gv": "B T HV V",
    "beta": "B T HV",
    "A_log": "HV",
    "dt_bias": "HV",
    "initial_state": "N HV K V",
}
SHAPES_V_FIRST = SHAPES | {"initial_state": "N HV V K"}


def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    return naive_recurrence(q, k, v, beta, g, gk, gv, scale, initial_state, output_final_state)


def naive_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks of tokens, each of which solves for what it writes."""
    return naive_chunks(q, k, v, beta, g, chunk_size, scale, initial_state, output_final_state)


@current_names
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, parallel over chunks: for training and prefill.

    Args:
        q, k: `[B, T, H, K]`. v: `[B, T, HV, V]`.
        g, beta: `[B, T, HV]`, log decay (natural log, <= 0) and write strength, each of any float dtype.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, HV, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: q and k become `x / sqrt(sum x^2 + 1e-6)`.
        use_beta_sigmoid_in_kernel, allow_neg_eigval: beta becomes `sigmoid(beta)`; with both, `2 sigmoid(beta)`.
        state_v_first: states are `[N, HV, V, K]`.
        cu_seqlens, cu_seq_lens_q: int `[N + 1]`, bounds of sequences packed into one row (B = 1), under either name.
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        use_gate_in_kernel, A_log, dt_bias: g becomes `-exp(A_log) softplus(g + dt_bias)`; both are `[HV]`.
        chunk_size, chunk_indices: no effect on results. cp_context: None (else NotImplementedError).
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, HV, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    check_hints(chunk_indices)
    cu_seqlens = packing(cu_seqlens, cu_seq_lens_q, q, cu_seqlens_cpu)
    A_log, dt_bias = (A_log, dt_bias) if use_gate_in_kernel else (None, None)
    shapes, required = SHAPES_V_FIRST if state_v_first else SHAPES, ("q", "k", "v", "g", "beta")
    tensors: dict[str, Any] = {
        "v": v,
        "g": g,
        "beta": beta,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
    }
    check_heads(check_shapes(shapes, required=required, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, **tensors))
    check_options(use_beta_sigmoid_in_kernel, allow_neg_eigval, beta, cp_context)
    _check_gate(use_gate_in_kernel, g, A_log)
    return delta.chunk(
        q,
        k,
        **tensors,
        scale=scale,
        output_final_state=output_final_state,
        options=delta.Options(
            use_qk_l2norm_in_kernel, use_gate_in_kernel, None, use_beta_sigmoid_in_kernel, allow_neg_eigval
        ),
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_gated_delta_rule",
    )


@current_names
@steps_on_pools("q, k, v, g", "HV, K, V")
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token, for decoding and short inputs: as `chunk_gated_delta_rule`, but

    Args:
        g, gk, gv: log decays `[B, T, HV]`, `[B, T, HV, K]` and `[B, T, HV, V]`; those given are added up, None is 0.
        beta: `[B, T, HV]`, or `[B, T, HV, V]` for one write strength per value channel; None means ones.
    """
    cu_seqlens = packing(cu_seqlens, cu_seq_lens_q, q)
    A_log, dt_bias = (A_log, dt_bias) if use_gate_in_kernel else (None, None)
    shapes = shapes_of_beta(pool_shapes(SHAPES_V_FIRST if state_v_first else SHAPES, state_indices), beta, v)
    tensors: dict[str, Any] = {"v": v, "g": g, "gk": gk, "gv": gv, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    tensors["initial_state"] = initial_state
    check_heads(check_shapes(shapes, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, **tensors))
    check_options(use_beta_sigmoid_in_kernel, allow_neg_eigval, beta)
    _check_gate(use_gate_in_kernel, g, A_log)
    return delta.recurrent(
        q,
        k,
        **tensors,
        scale=scale,
        output_final_state=output_final_state,
        options=delta.Options(
            use_qk_l2norm_in_kernel, use_gate_in_kernel, None, use_beta_sigmoid_in_kernel, allow_neg_eigval
        ),
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_gated_delta_rule",
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def _check_gate(use_gate_in_kernel: bool, g: Tensor | None, A_log: Tensor | None) -> None:
    if not use_gate_in_kernel:
        return
    for name, x in (("g", g), ("A_log", A_log)):
        if x is None:
            raise ValueError(f"{name} must be a tensor with use_gate_in_kernel, got None")


def _reference(
    q,
    k,
    v,
    g=None,
    gk=None,
    gv=None,
    beta=None,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
):
    dtype = v.dtype
    if use_qk_l2norm_in_kernel:
        q, k = naive_l2norm(q), naive_l2norm(k)
    if use_gate_in_kernel:
        g = naive_gate(g, A_log, dt_bias)
    beta = naive_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    o, state = naive_recurrence(q, k, v, beta, g, gk, gv, scale, initial_state, output_final_state)
    return o.to(dtype), state


def _inputs(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return unit_keys(x) | {name: F.logsigmoid(x[name]) / 4 for name in ("g", "gk", "gv") if name in x}


def _raw(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return x | {"A_log": x["A_log"] / 4, "dt_bias": x["dt_bias"] - 1.0}


_RAW = ("A_log", "dt_bias")
_CHANNELS = ("gk", "gv")
_ALONE = ("fused_recurrent",)
_ALL_IN_OP = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
}

SPEC = register(
    OpSpec(
        name="gated_delta_rule",
        family="delta",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_gated_delta_rule, "fused_recurrent": fused_recurrent_gated_delta_rule},
        inputs=_inputs,
        gates=("g", "gk", "gv", "A_log", "dt_bias"),
        axes={"HV": ("2 H", "H", "3 H")},
        variants=(
            Variant("default", without=(*_CHANNELS, *_RAW)),
            Variant("all in the op", _ALL_IN_OP, without=_CHANNELS, raw=("g", *_RAW), inputs=_raw),
            Variant(
                "gate in the op",
                {"use_gate_in_kernel": True},
                without=(*_CHANNELS, "dt_bias"),
                raw=("g", *_RAW),
                inputs=lambda x: unit_keys(_raw(x)),
            ),
            Variant("every gate", without=_RAW, forms=_ALONE, shapes={"beta": "B T HV V"}),
            Variant("channels alone", without=("g", "gv", "beta", *_RAW), forms=_ALONE),
            Variant("ungated", without=("g", *_CHANNELS, *_RAW), forms=_ALONE),
        ),
        paper="https://arxiv.org/abs/2412.06464",
        parameters=24,
    )
)
