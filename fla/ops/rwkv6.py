"""RWKV-6: linear attention with a decay per token and key channel, whose output reads the state before the update.

    o_t = scale * r_t^T (S_{t-1} + diag(u) k_t v_t^T)
    S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T          S in R^{K x V}

Shapes: r, k, w `[B, T, H, K]`, v `[B, T, H, V]`, the bonus u `[H, K]`, states `[N, H, K, V]` in float32. `w` is a
natural-log decay, <= 0: token t enters later outputs through the state, and its own through the bonus alone.
Paper: https://arxiv.org/abs/2404.05892

Family: `decay`, whose output reads the state after the update. Its query of token t is therefore `r_{t+1}`, and its
output of token t is the next token's, less the bonus. A sequence's first output reads the initial state.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fla.backends import decay
from fla.backends._reverse import refuse_steps, turned_around, turned_back
from fla.ops._packing import from_host
from fla.ops._pools import steps_on_pools
from fla.ops._spec import OpSpec, current_names, register
from fla.shapes import check_shapes, pool_shapes
from fla.varlen import check_cu_seqlens, prepare_sequence_ids

SHAPES = {
    "r": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "w": "B T H K",
    "u": "H K",
    "initial_state": "N H K V",
}
REQUIRED = ("r", "k", "v", "w", "u")
SAME_DTYPE = ("r", "k", "v")
CALLED = {"q": "r", "gk": "w"}  # the family's names -> the op's


def naive_recurrent_rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op. q is r."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, w, u = (x.to(dtype) for x in (q, k, v, w, u))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state + u[:, :, None] * written))
        state = state * w[:, t, :, :, None].exp() + written
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def naive_chunk_rwkv6(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, chunk_size: int = 32) -> Tensor:
    """The op's `o` with scale 1 and without states, by chunks of tokens in float32; `w` must be finite.

    o_i = (q_i exp(G_i - w_i))^T S + sum_{j < i} (sum_k q_ik k_jk exp(G_ik - w_ik - G_jk)) v_j + (q_i . u k_i) v_i

    G is the running sum of w inside the chunk, S the state in front of it.
    """
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(len(q), *q.shape[2:], v.shape[-1], dtype=dtype)
    outputs = [v[:, :0]]
    for start in range(0, q.shape[1], chunk_size):
        b_q, b_k, b_v, b_w = (x[:, start : start + chunk_size].to(dtype).transpose(1, 2) for x in (q, k, v, w))
        total = b_w.cumsum(2)
        before = (total - b_w)[:, :, :, None] - total[:, :, None]
        earlier = before.new_ones(before.shape[2:4], dtype=torch.bool).tril(-1)
        decays = before.masked_fill(~earlier[..., None], -torch.inf).exp()
        scores = torch.einsum("bhik,bhjk,bhijk->bhij", b_q, b_k, decays)
        o = scores @ b_v + (b_q * (total - b_w).exp()) @ state
        o = o + (b_q * u[:, None].to(dtype) * b_k).sum(-1, keepdim=True) * b_v
        state = state * total[:, :, -1, :, None].exp() + (b_k * (total[:, :, -1:] - total).exp()).mT @ b_v
        outputs.append(o.transpose(1, 2).to(out_dtype))
    return torch.cat(outputs, 1)


@current_names
def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6, parallel over chunks: for training and prefill.

    Args:
        r, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        w: `[B, T, H, K]`, log decay (natural log, <= 0) of every key channel, of any float dtype.
        u: `[H, K]`, the bonus: the factor of a token's own key in its output, of any float dtype.
        scale: factor of `r`, `K ** -0.5` by default (RWKV-6's layers use 1).
        initial_state: `[N, H, K, V]`, where N is B or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        cu_seqlens_cpu: `cu_seqlens` on the CPU; alone, it is used in place of `cu_seqlens`.
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if cu_seqlens_cpu is not None:
        cu_seqlens = from_host(cu_seqlens, cu_seqlens_cpu, r, "r")
    tensors = {"r": r, "k": k, "v": v, "w": w, "u": u, "initial_state": initial_state}
    check_shapes(SHAPES, same_dtype=SAME_DTYPE, required=REQUIRED, cu_seqlens=cu_seqlens, scale=scale, **tensors)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "backend": backend, "op": "chunk_rwkv6"}
    chunk = functools.partial(decay.chunk, output_final_state=output_final_state)
    return _by_shifting(chunk, r, k, v, w, u, initial_state, None, options)


@current_names
@steps_on_pools("r, k, v, w", beside="u")
def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
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
    """RWKV-6 token by token: for decoding and short inputs. The arguments of `chunk_rwkv6`, and

    Args:
        reverse: run from the last token of every sequence to the first.
    """
    tensors = {"r": r, "k": k, "v": v, "w": w, "u": u, "initial_state": initial_state}
    shapes = pool_shapes(SHAPES, state_indices)
    check_shapes(shapes, same_dtype=SAME_DTYPE, required=REQUIRED, cu_seqlens=cu_seqlens, scale=scale, **tensors)
    packed = cu_seqlens is not None
    if inplace_final_state or state_indices is not None:
        if reverse:
            refuse_steps(inplace_final_state)
        if torch.is_grad_enabled() and u.requires_grad:
            option = "inplace_final_state" if inplace_final_state else "state_indices"
            raise ValueError(
                f"{option} is for inference: u must not need a gradient, got requires_grad=True; call under "
                "torch.no_grad()"
            )
    if reverse:
        turned, initial_state, cu_seqlens = turned_around((r, k, v, w), initial_state, cu_seqlens)
        r, k, v, w = turned  # type: ignore[assignment]
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "backend": backend, "op": "fused_recurrent_rwkv6"}
    recurrent = functools.partial(
        decay.recurrent,
        output_final_state=output_final_state,
        inplace_final_state=inplace_final_state,
        state_indices=state_indices,
        called=CALLED,
    )
    o, state = _by_shifting(recurrent, r, k, v, w, u, initial_state, state_indices, options)
    return turned_back(o, state, packed) if reverse else (o, state)


def _by_shifting(
    recurrence: Callable[..., tuple[Tensor, Tensor | None]],
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    state_indices: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The op by a form of the family, as the top says. The first outputs are read before the states are written to."""
    bounds, T = options["cu_seqlens"], r.shape[1]
    starts = None
    if bounds is not None:
        if not is_compiling():
            check_cu_seqlens(bounds, T)
        starts = bounds[:-1].masked_fill(bounds.diff() == 0, T).long()
    first = None
    if initial_state is not None and T > 0:
        first = _read(r, v, initial_state, state_indices, starts, options)
    o, state = recurrence(_next(r, starts), k, v, gk=w, initial_state=initial_state, wide=True, **options)
    scale = r.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    weight = (r * (u.to(o.dtype) * scale) * k).sum(-1, keepdim=True)  # of a token's own value, the bonus
    o = torch.addcmul(_previous(o, first, starts), weight, v).to(v.dtype)
    if state_indices is not None:
        skipped = state_indices < 0
        skipped = skipped[:, None] if bounds is None else skipped[prepare_sequence_ids(bounds, T).long()][None]
        o = o.masked_fill(skipped[..., None, None], 0.0)
    return o, state


def _read(
    r: Tensor,
    v: Tensor,
    states: Tensor,
    state_indices: Tensor | None,
    starts: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """`scale * r^T S` of every sequence's first token, `[N, 1, H, V]`: a step that writes nothing to the state."""
    first = r[:, :1] if starts is None else r[0].index_select(0, starts.clamp(max=r.shape[1] - 1))[:, None]
    nothing, values = torch.zeros_like(first), v.new_zeros(*first.shape[:3], v.shape[-1])
    o, _ = decay.recurrent(
        first,
        nothing.detach(),
        values,
        initial_state=states,
        state_indices=state_indices,
        wide=True,
        called=CALLED,
        **options | {"cu_seqlens": None},
    )
    return o


def _next(r: Tensor, starts: Tensor | None) -> Tensor:
    """Every token's successor in its sequence; 0 at the last one. `starts` `[N]`: where packed sequences begin, T for
    an empty one."""
    if starts is None:
        return F.pad(r, (0, 0, 0, 0, -1, 1)) if r.shape[1] else r
    return F.pad(r, (0, 0, 0, 0, 0, 1)).index_fill(1, starts, 0.0)[:, 1:]


def _previous(o: Tensor, first: Tensor | None, starts: Tensor | None) -> Tensor:
    """Every token's predecessor in its sequence; at the first one `first` `[N, 1, H, V]`, or 0."""
    if starts is None:
        if o.shape[1] == 0:
            return o
        return F.pad(o, (0, 0, 0, 0, 1, -1)) if first is None else torch.cat((first, o[:, :-1]), 1)
    rows = F.pad(o, (0, 0, 0, 0, 1, 0))  # its last row, T, takes what empty sequences have
    rows = rows.index_fill(1, starts, 0.0) if first is None else rows.index_copy(1, starts, first.transpose(0, 1))
    return rows[:, :-1]


def _reference(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    return naive_recurrent_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state)


SPEC = register(
    OpSpec(
        name="rwkv6",
        family="decay",
        shapes=SHAPES,
        reference=_reference,
        forms={"chunk": chunk_rwkv6, "fused_recurrent": fused_recurrent_rwkv6},
        inputs=lambda x: x | {"w": F.logsigmoid(x["w"]) / 4},
        gates=("w",),
        required=REQUIRED,
        same_dtype=SAME_DTYPE,
        also={"recurrent_naive": (naive_recurrent_rwkv6,), "chunk_naive": (naive_chunk_rwkv6,)},
        paper="https://arxiv.org/abs/2404.05892",
    )
)
