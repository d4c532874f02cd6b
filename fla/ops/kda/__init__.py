"""Kimi Delta Attention (KDA): the delta rule on a state that decays by key channels.

    S'_t = diag(exp(g_t)) S_{t-1}                                      S in R^{K x V}
    u_t  = beta_t * (v_t - S'_t^T k_t)
    S_t  = S'_t + k_t u_t^T
    o_t  = scale * S_t^T q_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g `[B, T, HV, K]`, beta `[B, T, HV]`, in the recurrent form also
`[B, T, HV, V]`, states `[N, HV, K, V]` in float32. HV is a multiple of H: value head h reads key head `h // (HV / H)`.
`g` is a natural-log decay, <= 0. Keys have length 1, made by the caller or with `use_qk_l2norm_in_kernel`. beta lies in
[0, 1], or in [0, 2] for negative eigenvalues. Family: `delta`.
Paper: https://arxiv.org/abs/2510.26692
"""

from collections.abc import Callable
from typing import Any

import torch
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
from fla.ops.kda.gate import check_lower_bound, naive_kda_gate, naive_kda_lowerbound_gate, of_elements
from fla.ops.kda.gate import fused_kda_gate as fused_kda_gate
from fla.shapes import check_chunk_size, check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T HV V",
    "g": "B T HV K",
    "beta": "B T HV",
    "A_log": "HV",
    "dt_bias": "HV K",
    "initial_state": "N HV K V",
}
SHAPES_V_FIRST = SHAPES | {"initial_state": "N HV V K"}
REQUIRED = ("q", "k", "v", "g", "beta")


def naive_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    return naive_recurrence(q, k, v, beta, None, g, None, scale, initial_state, output_final_state)


def naive_chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks of tokens, each of which solves for what it writes."""
    return naive_chunks(q, k, v, beta, g, chunk_size, scale, initial_state, output_final_state)


@current_names
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """KDA, parallel over chunks: for training and prefill. Returns `(o, final state or None)`.

    The arguments of `chunk_gated_delta_rule`, but

    Args:
        g: `[B, T, HV, K]`, the log decay (natural log, <= 0) of every key channel, of any float dtype.
        use_gate_in_kernel, A_log, dt_bias: g becomes `-exp(A_log) softplus(g + dt_bias)`, and with `lower_bound`
            `lower_bound sigmoid(exp(A_log) (g + dt_bias))`. HV and HV K elements, of any shape.
        safe_gate: a promise that g lies in `[lower_bound, 0)`; with `use_gate_in_kernel` that must lie in [-5, 0).
        return_intermediate_states: returns `(o, final state, h)`, h bfloat16 `[B, NT, HV, K, V]`, the states before
            each chunk of 64 tokens, with `cu_seqlens` of all sequences in succession. Under `torch.inference_mode()`.
        chunk_size, disable_recompute, use_graph, max_num_seqs: no effect on results.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    check_hints(None, disable_recompute, use_graph, max_num_seqs)
    if return_intermediate_states and not torch.is_inference_mode_enabled():
        raise ValueError("return_intermediate_states needs torch.inference_mode(): the states get no gradients")
    cu_seqlens = packing(cu_seqlens, cu_seq_lens_q, q, cu_seqlens_cpu)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    sizes = _check(SHAPES_V_FIRST if state_v_first else SHAPES, tensors, cu_seqlens, scale)
    check_options(use_beta_sigmoid_in_kernel, allow_neg_eigval, beta, cp_context)
    A_log, dt_bias, bound = _gate(use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias, q, sizes)
    options = (use_qk_l2norm_in_kernel, use_gate_in_kernel, bound, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    call: Callable[..., Any] = delta.chunk_states if return_intermediate_states else delta.chunk
    found = call(
        q,
        k,
        v,
        gk=g,
        beta=beta,
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=delta.Options(*options),
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_kda",
    )
    if not return_intermediate_states:
        return found
    o, state, states = found
    return o, state, states.to(torch.bfloat16)


@current_names
@steps_on_pools("q, k, v, g, beta", "HV, K, V")
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    safe_gate: bool = False,
    cu_seq_lens_q: Tensor | None = None,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """KDA token by token, for decoding and short inputs. The arguments of `chunk_kda`, but

    Args:
        beta: `[B, T, HV]`, or `[B, T, HV, V]` for one write strength per value channel.
    """
    cu_seqlens = packing(cu_seqlens, cu_seq_lens_q, q)
    shapes = shapes_of_beta(pool_shapes(SHAPES_V_FIRST if state_v_first else SHAPES, state_indices), beta, v)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    sizes = _check(shapes, tensors, cu_seqlens, scale)
    check_options(use_beta_sigmoid_in_kernel, allow_neg_eigval, beta)
    A_log, dt_bias, bound = _gate(use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias, q, sizes)
    options = (use_qk_l2norm_in_kernel, use_gate_in_kernel, bound, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return delta.recurrent(
        q,
        k,
        v,
        gk=g,
        beta=beta,
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=delta.Options(*options),
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_kda",
        called={"gk": "g"},
    )


def _check(shapes: dict[str, str], tensors: dict[str, Any], cu_seqlens: Tensor | None, scale) -> dict[str, int]:
    """The sizes of the axes. A gate of three axes is told what takes such a gate."""
    g, v = tensors["g"], tensors["v"]
    if isinstance(g, Tensor) and g.dim() == 3 and isinstance(v, Tensor) and v.dim() == 4:
        takes = "fused_kda_gate(g, A, head_k_dim) takes one row of H * K numbers per token"
        if g.shape[2] == v.shape[2]:
            takes = "chunk_gated_delta_rule takes one decay per head"
        raise ValueError(f"g must have shape [B, T, HV, K], got 3 axes: {list(g.shape)}; {takes}")
    sizes = check_shapes(shapes, required=REQUIRED, cu_seqlens=cu_seqlens, scale=scale, **tensors)
    check_heads(sizes)
    return sizes


def _gate(
    in_kernel: bool,
    safe_gate: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    q: Tensor,
    sizes: dict[str, int],
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """`A_log` `[HV]`, `dt_bias` `[HV, K]` and the lower bound, as far as the op makes the gate."""
    check_lower_bound(lower_bound)
    if not in_kernel:
        return None, None, None
    if safe_gate and (lower_bound is None or lower_bound < -5):
        raise ValueError(f"lower_bound must lie in [-5, 0) with safe_gate and use_gate_in_kernel, got {lower_bound}")
    if A_log is None and lower_bound is None:
        raise ValueError("A_log must be a tensor with use_gate_in_kernel and no lower_bound, got None")
    HV, K = sizes["HV"], sizes["K"]
    A_log, dt_bias = of_elements("A_log", A_log, (HV,)), of_elements("dt_bias", dt_bias, (HV, K))
    check_shapes(SHAPES, required=("q",), same_dtype=(), q=q, A_log=A_log, dt_bias=dt_bias)
    return A_log, dt_bias, None if lower_bound is None else float(lower_bound)


def _reference(
    q,
    k,
    v,
    g,
    beta,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    safe_gate=False,
    lower_bound=None,
):
    dtype = v.dtype
    if use_qk_l2norm_in_kernel:
        q, k = naive_l2norm(q), naive_l2norm(k)
    if use_gate_in_kernel:
        g = naive_gate(g, None if A_log is None else A_log[:, None], dt_bias, lower_bound)
    beta = naive_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    o, state = naive_recurrence(q, k, v, beta, None, g, None, scale, initial_state, output_final_state)
    return o.to(dtype), state


def _raw(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return x | {"A_log": x["A_log"] / 4, "dt_bias": x["dt_bias"] - 1.0}


_RAW = ("A_log", "dt_bias")
_BOUNDED = {"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -5.0}
_IN_OP = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}

SPEC = register(
    OpSpec(
        name="kda",
        family="delta",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_kda, "fused_recurrent": fused_recurrent_kda},
        inputs=lambda x: unit_keys(x) | {"g": F.logsigmoid(x["g"]) / 4},
        gates=("g", "A_log", "dt_bias"),
        flat=("A_log", "dt_bias"),
        required=REQUIRED,
        axes={"HV": ("2 H", "H", "3 H")},
        variants=(
            Variant("default", without=_RAW),
            Variant("all in the op", {"use_gate_in_kernel": True, **_IN_OP}, raw=("g", *_RAW), inputs=_raw),
            Variant("bounded", _BOUNDED, raw=("g", *_RAW), inputs=lambda x: unit_keys(_raw(x))),
            Variant("bounded alone", _BOUNDED, without=_RAW, raw=("g",), inputs=unit_keys),
            Variant("beta of channels", without=_RAW, forms=("fused_recurrent",), shapes={"beta": "B T HV V"}),
        ),
        also={"naive": (naive_kda_gate, naive_kda_lowerbound_gate)},
        paper="https://arxiv.org/abs/2510.26692",
        parameters=27,
    )
)
