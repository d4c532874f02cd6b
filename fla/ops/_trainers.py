"""What trainers import of the gated delta rule: its two passes as functions, and its autograd functions as classes.

Trainers make operators of their own out of the two passes, and hand what the forward returns to the backward:

    g, o, A, final_state, initial_state, raw = chunk_gated_delta_rule_fwd(q, k, v, g, beta, scale, None, True)
    dq, dk, dv, dbeta, dg, dh0, dA_log, ddt_bias = chunk_gated_delta_rule_bwd(
        q, k, v, g, beta, A, scale, initial_state, do, dht
    )

They register the autograd functions by their classes, and may call `ChunkGatedDeltaRuleFunction.apply` and
`FusedRecurrentFunction.apply` with the arguments of `chunk_gated_delta_rule` and `fused_recurrent_gated_delta_rule`.
All of it is found in `fla.ops.gated_delta_rule.chunk` and `.fused_recurrent`.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from fla.backends import delta
from fla.backends.fused import l2norm_bwd, l2norm_fwd
from fla.ops._delta import check_options, naive_gate, packing
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.utils import _chunked, solve_tril

_CHUNK = 64

ChunkGatedDeltaRuleFunction = delta.FAMILY.name_function(
    "chunk_gated_delta_rule", "ChunkGatedDeltaRuleFunction", chunk_gated_delta_rule
)
FusedRecurrentFunction = delta.FAMILY.name_function(
    "fused_recurrent_gated_delta_rule", "FusedRecurrentFunction", fused_recurrent_gated_delta_rule
)


@torch.no_grad()
def chunk_gated_delta_rule_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The forward of `chunk_gated_delta_rule`, whose arguments it has, without a gradient.

    Returns `(g, o, A, final state, initial state, raw gate)`:

        g: `[B, T, HV]` in float32, the log decays as the backward takes them: of every token, not their running sums.
        A: `[B, T, HV, 64]` in k's dtype, `(I + L)^-1` of each chunk, row by row, with
            `L_ij = beta_i (k_i . k_j) exp(g_{j+1} + ... + g_i)` for j < i.
        raw gate: `g` as it was given, with `use_gate_in_kernel`; else None.
    """
    cu_seqlens = packing(cu_seqlens, None, q, cu_seqlens_cpu)
    o, final_state = chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cp_context=cp_context,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
    )
    raw = g if use_gate_in_kernel else None
    g = naive_gate(g, A_log, dt_bias) if use_gate_in_kernel else g.to(torch.promote_types(g.dtype, torch.float32))
    return g, o, _inverses(k, g, beta, cu_seqlens), final_state, initial_state, raw


def chunk_gated_delta_rule_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    use_gate_in_kernel: bool = False,
    g_input: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The backward of `chunk_gated_delta_rule_fwd`: `(dq, dk, dv, dbeta, dg, dh0, dA_log, ddt_bias)`.

    `do` is the gradient of `o`, `dht` that of the final state or None. With `use_gate_in_kernel` `g_input` is the raw
    gate, and `dg` its gradient. `A` and `chunk_indices` have no effect: both follow from other arguments.
    """
    check_options(False, False, beta, cp_context)
    cu_seqlens = packing(cu_seqlens, None, q, cu_seqlens_cpu)
    if not use_gate_in_kernel:
        A_log, dt_bias = None, None
    elif g_input is None or A_log is None:
        raise ValueError("g_input and A_log must be tensors with use_gate_in_kernel, got None")
    gate = g_input if use_gate_in_kernel else g
    if state_v_first:
        initial_state, dht = (None if x is None else x.mT for x in (initial_state, dht))
    tensors = (q, k, v, gate, None, None, beta, A_log, dt_bias, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    settings = delta.Options(gate_in_op=use_gate_in_kernel)
    found = delta.FAMILY.gradients((*tensors, scale, "chunk", *settings), do, dht, op="chunk_gated_delta_rule")
    dh0 = found["initial_state"]
    dh0 = dh0.mT if state_v_first and dh0 is not None else dh0
    first = (found[name] for name in ("q", "k", "v", "beta", "g"))
    return (*first, dh0, found["A_log"], found["dt_bias"])


def _inverses(k: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`A` of `chunk_gated_delta_rule_fwd`."""
    shared, dtype = beta.shape[2] // max(k.shape[2], 1), g.dtype
    keys, slots = _chunked(k.to(dtype).repeat_interleave(shared, 2), _CHUNK, cu_seqlens)  # [B, chunks, C, HV, K]
    keys = keys.transpose(2, 3)
    total, strength = (_chunked(x.to(y), _CHUNK, cu_seqlens)[0].mT for x, y in ((g, torch.float64), (beta, dtype)))
    total = total.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril(-1).exp().to(dtype)
    lower = (keys @ keys.mT * between * strength[..., None]).tril(-1)  # [B, chunks, HV, C, C]
    rows = lower.transpose(2, 3).flatten(1, 2).index_select(1, slots)
    return solve_tril(rows, cu_seqlens, output_dtype=k.dtype)


_STAGES = (chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd, l2norm_fwd, l2norm_bwd)
for _form, _names in {
    "chunk": (ChunkGatedDeltaRuleFunction, *_STAGES),
    "fused_recurrent": (FusedRecurrentFunction,),
}.items():
    vars(sys.modules[f"fla.ops.gated_delta_rule.{_form}"]).update({x.__name__: x for x in _names})
