"""Linear attention: softmax attention without the softmax. The layer, not the op, applies a feature map to q and k.

    S_t = S_{t-1} + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

With `normalize` the output is divided by the sum of its scores:

    z_t = z_{t-1} + k_t
    o_t <- o_t / (scale * q_t^T z_t + 1e-10)

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, S `[N, H, K, V]`, z `[N, 1, H, K]`, both states in float32. With
`normalize` the state is the pair (S, z), so that a sequence may be split anywhere. Family: `decay`, without a decay.
Paper: https://arxiv.org/abs/2006.16236
"""

from typing import Any

import torch
from torch import Tensor

from fla.backends import decay
from fla.ops._pools import steps_on_pools
from fla.ops._same import same_as
from fla.ops._spec import OpSpec, Variant, current_names, register
from fla.shapes import check_shapes, pool_shapes

SHAPES = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "initial_state": "N H K V", "z": "N 1 H K"}
Z = "z in initial_state"  # what errors call it: no argument has its name
CHECKED = SHAPES | {Z: SHAPES["z"]}
EPS = 1e-10
State = Tensor | tuple[Tensor | None, Tensor]


def naive_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, State | None]:
    """The formulas at the top, token by token in float32 (float64 for float64): the definition of the op."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state, z = initial_state if isinstance(initial_state, (tuple, list)) else (initial_state, None)
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if state is None else state.to(dtype)
    z = q.new_zeros(len(q), *k.shape[2:]) if z is None else z[:, 0].to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + k[:, t]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state)
        outputs.append(o / ((q[:, t] * scale * z).sum(-1, keepdim=True) + EPS) if normalize else o)
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    final: State = (state, z[:, None]) if normalize else state
    return o, final if output_final_state else None


def naive_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = False, chunk_size: int = 64
) -> Tensor:
    """The op chunk by chunk, for any T: attention inside a chunk, the state between chunks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, scale = v.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    state, outputs = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]), []
    for start in range(0, q.shape[1], chunk_size):
        cq, ck, cv = (x[:, start : start + chunk_size] for x in (q, k, v))
        inner = torch.einsum("bhij,bjhv->bihv", torch.einsum("bihk,bjhk->bhij", cq, ck).tril(), cv)
        outputs.append(inner + torch.einsum("bthk,bhkv->bthv", cq, state))
        state = state + torch.einsum("bthk,bthv->bhkv", ck, cv)
    o = torch.cat(outputs, 1)
    return (o / ((q * k.cumsum(1)).sum(-1, keepdim=True) + EPS) if normalize else o).to(out_dtype)


@current_names
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Linear attention, parallel over chunks, normalized by default (normalize=True): for training and prefill.

    The default of `fused_recurrent_linear_attn` is normalize=False: pass `normalize` where both must compute the same.

    Args:
        q, k: `[B, T, H, K]`; with `normalize` they must be positive features.
        v: `[B, T, H, V]`.
        scale: factor of the query, `K ** -0.5` by default.
        initial_state: S `[N, H, K, V]`, where N is B or the number of packed sequences; with `normalize` it may be the
            pair (S, z). None means zeros.
        output_final_state: whether to return the state after the last token: S, or (S, z) with `normalize`.
        normalize: divide by the sum of the scores plus 1e-10.
        cu_seqlens: int `[N + 1]`, bounds of sequences packed into one row (B = 1).
        backend: "triton", "torch", or None: Triton for GPU tensors, PyTorch otherwise.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    return _linear_attn(
        decay.chunk,
        q,
        k,
        v,
        initial_state,
        normalize,
        scale=scale,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="chunk_linear_attn",
    )


@same_as(chunk_linear_attn)
def fused_chunk_linear_attn(*args, **keywords):
    """`chunk_linear_attn` under another name, also with normalize=True by default; both compute the same."""


@current_names
@steps_on_pools("q, k, v")
def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Linear attention token by token, not normalized by default (normalize=False): for decoding and short inputs.

    The default of `chunk_linear_attn` is normalize=True: pass `normalize` where both must compute the same. The
    arguments of `chunk_linear_attn`, and

    Args:
        reverse: run from the last token of every sequence to the first.

    With `normalize` the states that the caller owns must be the pair (S, z). Both are used in the same way, so that a
    pool of z is `[P, 1, H, K]`.
    """
    if inplace_final_state or state_indices is not None:
        return _step_on_states(
            q,
            k,
            v,
            initial_state,
            normalize,
            scale=scale,
            output_final_state=output_final_state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            inplace_final_state=inplace_final_state,
            state_indices=state_indices,
            backend=backend,
            op="fused_recurrent_linear_attn",
        )
    return _linear_attn(
        decay.recurrent,
        q,
        k,
        v,
        initial_state,
        normalize,
        scale=scale,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        backend=backend,
        op="fused_recurrent_linear_attn",
    )


def _linear_attn(form, q, k, v, initial_state, normalize, **options):
    """The op in a form of the family: `decay.chunk` or `decay.recurrent`."""
    state, z = _split_state(initial_state, normalize)
    packing, scale = options["cu_seqlens"], options["scale"]
    tensors = {"q": q, "k": k, "v": v, "initial_state": state, Z: z}
    check_shapes(CHECKED, cu_seqlens=packing, scale=scale, **tensors)
    if not normalize:
        return form(q, k, v, initial_state=state, **options)
    # The normaliser is the same recurrence with v = 1. Both stay in a wide dtype until they are divided.
    options["wide"] = True
    if form is decay.recurrent and not _needs_gradient(q, k, v, state, z):  # two calls, as in `_step_on_states`
        o, state = form(q, k, v, initial_state=state, **options)
        column = None if z is None else z.transpose(1, 2).mT
        total, column = form(q, k, v.new_ones(*v.shape[:3], 1), initial_state=column, **options)
        o = (o / (total + EPS)).to(v.dtype)
        return o, (state, column.mT.transpose(1, 2)) if options["output_final_state"] else None
    # The normaliser is computed in columns that are added to v. In dk the gradients of numerator and normaliser nearly
    # cancel, and in one call they are summed before they are rounded. There are two columns, because the gradient of
    # the normaliser needs twice the digits of v's dtype (`_Quotient`).
    extended = torch.cat((v, v.new_ones(*v.shape[:3], 2)), -1)
    o, state = form(q, k, extended, initial_state=_state_with_z_columns(state, z), **options)
    o = _Quotient.apply(o, v.dtype)
    if not options["output_final_state"]:
        return o, None
    return o, (state[..., :-2].contiguous(), state[..., -2:-1].mT.transpose(1, 2).contiguous())


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _state_with_z_columns(state: Tensor | None, z: Tensor | None) -> Tensor | None:
    """S followed by z in two columns, `[N, H, K, V + 2]`."""
    if z is None:
        return None if state is None else torch.cat((state, state.new_zeros(*state.shape[:3], 2)), -1)
    columns = z.transpose(1, 2).mT.expand(-1, -1, -1, 2)
    assert state is not None  # `_split_state` refuses a pair with None
    return torch.cat((state, columns.to(state.dtype)), -1)


def _step_on_states(q, k, v, initial_state, normalize, **options) -> tuple[Tensor, State | None]:
    """The op on states that the caller owns. In memory, a pool of z `[P, 1, H, K]` is a pool of K x 1 states."""
    state, z = _split_state(initial_state, normalize)
    indices, cu_seqlens = options["state_indices"], options["cu_seqlens"]
    shapes = pool_shapes(CHECKED, indices)
    tensors: dict[str, Any] = {"q": q, "k": k, "v": v, "initial_state": state, Z: z}
    check_shapes(shapes, cu_seqlens=cu_seqlens, scale=options["scale"], **tensors)
    if not normalize:
        return decay.recurrent(q, k, v, initial_state=state, **options)
    if z is None:
        raise ValueError(
            "initial_state must be the pair (S, z) with normalize=True and inplace_final_state or state_indices, "
            "got S alone"
        )
    decay.check_states(q, k, v, z, cu_seqlens, indices, options["inplace_final_state"])
    o, final = decay.recurrent(q, k, v, initial_state=state, wide=True, **options)
    column = z.view(z.shape[0], *z.shape[2:], 1)
    total, last = decay.recurrent(q, k, v.new_ones(*v.shape[:3], 1), initial_state=column, wide=True, **options)
    o = (o / (total + EPS)).to(v.dtype)
    if options["inplace_final_state"]:
        return o, (state, z)
    return o, None if last is None else (final, last.mT.transpose(1, 2))


class _Quotient(torch.autograd.Function):
    """`o / (total + EPS)` in `dtype`. The input `[B, T, H, V + 2]` is `o` followed by two equal columns, each `total`.

    In dk the gradients of numerator and denominator nearly cancel, so rounding must not disturb their ratio. The
    gradient of the numerator is rounded to `dtype` first, and the gradient of the denominator is computed from the
    rounded one. It is then passed back as two numbers of `dtype` whose sum it is, one for each column.
    """

    @staticmethod
    def forward(ctx, o, dtype):
        total = o[..., -1:] + EPS
        o = o[..., :-2] / total
        ctx.save_for_backward(o, total)
        ctx.dtype = dtype
        # PyTorch 2.11 compiles a wrong gradient where what is saved is also the result
        return o.to(dtype, copy=torch.compiler.is_compiling())

    @staticmethod
    def backward(ctx, do):
        o, total = ctx.saved_tensors
        d_sum = (do / total).to(ctx.dtype).to(o.dtype)
        d_total = -(d_sum * o).sum(-1, keepdim=True)
        high = d_total.to(ctx.dtype).to(o.dtype)
        return torch.cat((d_sum, high, d_total - high), -1), None


def _split_state(initial_state, normalize: bool) -> tuple[Tensor | None, Tensor | None]:
    """S and z of an initial state. Raises ValueError if it is neither S nor, with `normalize`, a pair of tensors."""
    if not isinstance(initial_state, (tuple, list)):
        return initial_state, None
    if not normalize:
        raise ValueError("initial_state may be a pair (S, z) only with normalize=True; got a pair with normalize=False")
    if len(initial_state) != 2:
        raise ValueError(f"initial_state must be S or the pair (S, z), got {len(initial_state)} entries")
    if any(part is None for part in initial_state):
        raise ValueError("initial_state must be S or the pair (S, z), got a pair with None")
    return tuple(initial_state)


def _reference(q, k, v, z=None, scale=None, initial_state=None, output_final_state=False, normalize=False):
    return naive_recurrent_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize)


SPEC = register(
    OpSpec(
        name="linear_attn",
        family="decay",
        shapes=SHAPES,
        reference=_reference,
        forms={
            "chunk": chunk_linear_attn,
            "fused_chunk": fused_chunk_linear_attn,
            "fused_recurrent": fused_recurrent_linear_attn,
        },
        same={"fused_chunk": "chunk"},
        # positive features, so that the normaliser, a running sum of them, stays away from zero
        inputs=lambda x: x | {name: x[name].abs() for name in ("q", "k", "z") if name in x},
        variants=(
            Variant("default", settings={"normalize": False}, without=("z",)),
            Variant("normalized", settings={"normalize": True}, without=("z",), steps=False),
            Variant("resumed", settings={"normalize": True}),
        ),
        paper="https://arxiv.org/abs/2006.16236",
    )
)
