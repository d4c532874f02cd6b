"""What the ops of the family `delta` share: checks of their options, naive preparations, and inputs for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.ops._packing import from_host
from fla.shapes import merge_cu_seqlens


def check_heads(sizes: dict[str, int]) -> None:
    """ValueError unless the value heads are a multiple of the key heads."""
    H, HV = sizes["H"], sizes["HV"]
    if HV != H and (H == 0 or HV % H):
        raise ValueError(f"v must have a multiple of the {H} heads of q and k, got {HV} heads")


def shapes_of_beta(shapes: dict[str, str], beta: Tensor | None, v: Tensor) -> dict[str, str]:
    """`shapes`, with a `beta` per value channel where it has the axes of v; ValueError if only their number fits."""
    if not isinstance(beta, Tensor) or beta.dim() != 4 or not isinstance(v, Tensor):
        return shapes
    if beta.shape != v.shape:
        one = shapes["beta"].replace(" ", ", ")
        raise ValueError(
            f"beta must have shape [{one}] or that of v, {list(v.shape)}, got {beta.dim()} axes: {list(beta.shape)}"
        )
    return shapes | {"beta": shapes["v"]}


def check_options(
    use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool, beta: Tensor | None, cp_context: object = None
) -> None:
    """ValueError for options that contradict each other, NotImplementedError for a context of several processes."""
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError(
            "allow_neg_eigval needs use_beta_sigmoid_in_kernel=True, got False: a beta made outside is doubled there"
        )
    if use_beta_sigmoid_in_kernel and beta is None:
        raise ValueError("beta must be a tensor with use_beta_sigmoid_in_kernel, got None")
    if cp_context is not None:
        raise NotImplementedError(
            f"cp_context must be None, got {type(cp_context).__name__}: sequences cut over several processes are not "
            "computed yet"
        )


def check_hints(
    chunk_indices: Tensor | None = None,
    disable_recompute: bool = False,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
) -> None:
    """TypeError unless these arguments, by which programs steer other kernels, are of their types: they do nothing."""
    if chunk_indices is not None and not isinstance(chunk_indices, Tensor):
        raise TypeError(f"chunk_indices must be a tensor or None, got {type(chunk_indices).__name__}")
    for name, flag in (("disable_recompute", disable_recompute), ("use_graph", use_graph)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if max_num_seqs is not None and not isinstance(max_num_seqs, int):
        raise TypeError(f"max_num_seqs must be an int or None, got {type(max_num_seqs).__name__}")


def packing(
    cu_seqlens: Tensor | None, cu_seq_lens_q: Tensor | None, q: Tensor, cu_seqlens_cpu: Tensor | None = None
) -> Tensor | None:
    """The packing of a call that takes it under two names, and as a copy on the CPU."""
    if cu_seq_lens_q is not None:
        cu_seqlens = merge_cu_seqlens(cu_seqlens, cu_seq_lens_q)
    return cu_seqlens if cu_seqlens_cpu is None else from_host(cu_seqlens, cu_seqlens_cpu, q)


def naive_l2norm(x: Tensor) -> Tensor:
    """`x / sqrt(sum x^2 + 1e-6)` over the last axis, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def naive_beta(beta: Tensor | None, sigmoid: bool, double: bool) -> Tensor | None:
    """`beta`, `sigmoid(beta)` or `2 sigmoid(beta)`, in at least float32."""
    if beta is None:
        return None
    beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
    return beta.sigmoid() * (2.0 if double else 1.0) if sigmoid else beta


def naive_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None = None) -> Tensor:
    """`-exp(A_log) softplus(g + dt_bias)`, or `lower_bound sigmoid(exp(A_log) (g + dt_bias))`, in at least float32.

    `A_log` and `dt_bias` have shapes that fit those of `g`.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    g = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    factor = 1.0 if A_log is None else A_log.to(dtype).exp()
    return -factor * F.softplus(g) if lower_bound is None else lower_bound * (factor * g).sigmoid()


def naive_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of the family, token by token in float32 (float64 for float64)."""
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = v.shape[2] // max(q.shape[2], 1)
    q, k, v = q.to(dtype).repeat_interleave(shared, 2), k.to(dtype).repeat_interleave(shared, 2), v.to(dtype)
    strength = None if beta is None else beta.to(dtype) if beta.dim() == 4 else beta.to(dtype)[..., None]
    decays = [(g, lambda x: x[..., None, None]), (gk, lambda x: x[..., None]), (gv, lambda x: x[..., None, :])]
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        for gate, shaped in decays:
            if gate is not None:
                state = state * shaped(gate[:, t].to(dtype)).exp()
        new = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        new = new if strength is None else strength[:, t] * new
        state = state + k[:, t, :, :, None] * new[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def naive_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    chunk_size: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks, in float32 (float64 for float64); `g` is `[B, T, HV]`, `[B, T, HV, K]` or None.

    With G the running sum of g in a chunk, `P_ij = sum_c q_ic k_jc exp(G_ic - G_jc)` for `j <= i`, `L` the same of k
    and k for `j < i`, S the state before the chunk and b beta as a diagonal matrix:

        X  = (I + b L)^-1 b (V - e^G K S)
        O  = scale (e^G Q S + P X)
        S' = e^{G_C} S + (e^{G_C - G} K)^T X
    """
    out_dtype, dtype = v.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = v.shape[2] // max(q.shape[2], 1)
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta[..., None]))
    q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    gate = torch.zeros_like(k[..., :1]) if g is None else (g if g.dim() == 4 else g[..., None]).to(dtype)
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    pieces = [x.transpose(1, 2).split(chunk_size, 2) for x in (q, k, v, beta, gate)]
    for query, key, value, strength, steps in zip(*pieces, strict=True) if q.shape[1] else ():
        total = steps.cumsum(2)
        between = (total[:, :, :, None] - total[:, :, None]).movedim(-1, 2).tril().exp().movedim(2, -1)
        reads = torch.einsum("bhic,bhjc,bhijc->bhij", query, key, between.expand(*between.shape[:4], key.shape[-1]))
        overlaps = torch.einsum("bhic,bhjc,bhijc->bhij", key, key, between.expand(*between.shape[:4], key.shape[-1]))
        unit = torch.eye(key.shape[2], dtype=dtype, device=key.device)
        new = strength * (value - (total.exp() * key) @ state)
        new = torch.linalg.solve_triangular(unit + strength * overlaps.tril(-1), new, upper=False)
        outputs.append(scale * ((total.exp() * query) @ state + reads.tril() @ new))
        end = total[:, :, -1:]
        state = end.exp().mT * state + ((end - total).exp() * key).mT @ new
    o = torch.cat(outputs, 2).transpose(1, 2).to(out_dtype) if outputs else v.to(out_dtype)
    return o, state if output_final_state else None


def unit_keys(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of length 1 and write strengths in (0, 1), out of noise."""
    return x | {"k": F.normalize(x["k"], dim=-1), "beta": x["beta"].sigmoid()}
