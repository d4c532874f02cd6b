"""The generalised delta rule with decays (DPLR): the state's transition is a diagonal plus a matrix of low rank.

    S_t = diag(exp(gk_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

Shapes: q, k, a, b, gk `[B, T, H, K]`, v `[B, T, H, V]`, states `[N, H, K, V]` in float32. gk is a natural-log decay,
<= 0. `a` reads the state as it is before the decay. The state stays bounded where `b = -c a` with `|a| = 1` and c in
[0, 1], as in RWKV-7; other `a` and `b` are computed too, and may grow. Family: `dplr`.
Paper: https://arxiv.org/abs/2503.14456
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends import dplr
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, current_names, register
from fla.ops.generalized_delta_rule._options import check_options
from fla.shapes import check_shapes, pool_shapes

SHAPES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
    "gk": "B T H K",
    "initial_state": "N H K V",
}
TENSORS = ("q", "k", "v", "a", "b")


def dplr_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op.

    `alpha` is a, `beta` is b. `gk=None` means no decay. `scale`: `K ** -0.5` by default.
    """
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, a, b = (x.to(dtype) for x in (q, k, v, alpha, beta))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        if gk is not None:
            state = state * gk[:, t, :, :, None].to(dtype).exp()
        state = state + b[:, t, :, :, None] * read[:, :, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def dplr_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int = 32,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The op chunk by chunk, for any T. `G` is the running sum of gk in a chunk, `E = G - gk`, `C` its last token:

    U = (I - A_ab)^-1 (exp(E) a S + A_ak V)               A_xy,ij = (x_i . y_j) exp(X_i - G_j),  j < i (j <= i for q)
    O = scale * (exp(G) q S + A_qk V + A_qb U)            X = E for a, G for q
    S <- exp(G_C) S + (exp(G_C - G) k)^T V + (exp(G_C - G) b)^T U
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gates = torch.zeros_like(k) if gk is None else gk
    state = initial_state
    if state is None:
        state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1])
    state, outputs = state.to(dtype), []
    for start in range(0, q.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        cq, ck, cv, ca, cb, cg = (x[:, part].transpose(1, 2).to(dtype) for x in (q, k, v, alpha, beta, gates))
        total = cg.cumsum(2)
        before, last = total - cg, total[:, :, -1:]

        def scores(x: Tensor, y: Tensor, decay: Tensor, diagonal: int, total: Tensor = total) -> Tensor:
            allowed = x.new_ones(x.shape[2], x.shape[2]).tril(diagonal).bool()[:, :, None]
            between = (decay[:, :, :, None] - total[:, :, None]).masked_fill(~allowed, -torch.inf)
            return torch.einsum("bhik,bhjk,bhijk->bhij", x, y, between.exp())

        right = (ca * before.exp()) @ state + scores(ca, ck, before, -1) @ cv
        eye = torch.eye(right.shape[2], dtype=dtype, device=q.device)
        u = torch.linalg.solve_triangular(eye - scores(ca, cb, before, -1), right, upper=False)
        o = (cq * total.exp()) @ state + scores(cq, ck, total, 0) @ cv + scores(cq, cb, total, 0) @ u
        outputs.append(scale * o.transpose(1, 2))
        kept = (last - total).exp()
        state = last.mT.exp() * state + (ck * kept).mT @ cv + (cb * kept).mT @ u
    o = torch.cat(outputs, 1).to(v.dtype) if outputs else v
    return o, state if output_final_state else None


@current_names
def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
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
    """DPLR, parallel over chunks: for training and prefill.

    Args:
        q, k, a, b, gk: `[B, T, H, K]`; `gk` is the log decay (natural log, <= 0) of every key channel, of any float
            dtype.
        v: `[B, T, H, V]`.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        safe_gate, disable_recompute: no effect on results.
        chunk_size: None, 16, 32, 64 or 128; it has no effect on results.
        cp_context: None; sequences spread over several devices are not computed yet (NotImplementedError).
        lower_bound: None, or a number < 0 that no `gk` is below; it has no effect on results.
        backend: "triton", "torch", or None: Triton for GPU tensors where it computes the family, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_options("chunk_dplr_delta_rule", chunk_size, lower_bound, cp_context, safe_gate, disable_recompute)
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, q)
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "gk": gk, "initial_state": initial_state}
    check_shapes(SHAPES, same_dtype=TENSORS, required=(*TENSORS, "gk"), cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.chunk(
        q,
        k,
        v,
        a,
        b,
        gk=gk,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_dplr_delta_rule",
    )


@current_names
@steps_on_pools("q, k, v, a, b, gk")
def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DPLR for decoding and short inputs. The arguments of `chunk_dplr_delta_rule`, and

    Args:
        reverse: run from the last token of every sequence to the first.
    """
    shapes = pool_shapes(SHAPES, state_indices)
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "gk": gk, "initial_state": initial_state}
    check_shapes(shapes, same_dtype=TENSORS, required=(*TENSORS, "gk"), cu_seqlens=cu_seqlens, scale=scale, **tensors)
    return dplr.recurrent(
        q,
        k,
        v,
        a,
        b,
        gk=gk,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        backend=backend,
        op="fused_recurrent_dplr_delta_rule",
    )


def _reference(q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False):
    return dplr_recurrence(q, k, v, a, b, gk, initial_state, output_final_state, scale)


def bounded(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """From noise, inputs whose state stays bounded: keys and `a` of length 1, `b = -c a` with c in (0, 1)."""
    a = F.normalize(x["a"], dim=-1)
    return x | {"k": F.normalize(x["k"], dim=-1), "a": a, "b": -a * x["b"].sigmoid()}


SPEC = register(
    OpSpec(
        name="dplr",
        family="dplr",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_dplr_delta_rule, "fused_recurrent": fused_recurrent_dplr_delta_rule},
        inputs=lambda x: bounded(x) | {"gk": F.logsigmoid(x["gk"]) / 4},
        gates=("gk",),
        required=(*TENSORS, "gk"),
        same_dtype=TENSORS,
        also={"naive": (dplr_recurrence, dplr_chunkwise)},
        parameters=17,
        paper="https://arxiv.org/abs/2503.14456",
    )
)
