"""Causal softmax attention, which hybrid models use in some of their layers.

    o_t = sum_{s <= t} softmax_s(scale * q_t^T k_s) v_s

It supports grouped heads, a sliding window (a query sees the last `window_size` tokens, including itself), packed
sequences, padding and cached keys. It belongs to no family: PyTorch's `scaled_dot_product_attention` computes it, or
flash-attn if that is installed and the tensors are half precision on a GPU.
Paper: https://arxiv.org/abs/1706.03762
"""

import functools
import importlib
import importlib.util
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.shapes import check_shapes
from fla.varlen import check_cu_seqlens, prepare_sequence_ids

# G key heads, each shared by H // G query heads. S tokens have keys; the last T of them have queries.
SHAPES = {"q": "B T H K", "k": "B S G K", "v": "B S G V"}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal softmax attention `[B, T, H, V]` of the last `T` of `S` tokens. Differentiable in q, k and v.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, S, G, K]` and `[B, S, G, V]`; G divides H, and S > T if keys of earlier calls come first.
        scale: factor of the scores, `K ** -0.5` by default.
        window_size: how many tokens a query sees, not counting padding; None means all.
        mask: `[B, S]`, 0 at padding, which no query sees. The outputs of padded queries are 0.
        cu_seqlens: `[N + 1]`, bounds of sequences packed into one row (`B = 1`, `S = T`); not with `mask`.
        max_seqlen: an upper bound of the lengths of packed sequences, if known.

    Raises ValueError or TypeError, naming the argument, for what does not fit.
    """
    dims = check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v)
    _check(dims, window_size, mask, cu_seqlens)
    scale = dims["K"] ** -0.5 if scale is None else scale
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, dims["T"])
    flash = _flash_attn() if mask is None and _flash_runs(q, dims) else None
    if flash is not None:
        return _flash(flash, q, k, v, scale, window_size, cu_seqlens, max_seqlen)
    if cu_seqlens is not None and not q.is_cuda and not torch.compiler.is_compiling():
        # One sequence at a time needs no [T, T] mask and no work between sequences. On a CPU, reading bounds is free.
        spans = [slice(a, b) for a, b in pairwise(cu_seqlens.tolist()) if b > a]
        pieces = [_sdpa(q[:, s], k[:, s], v[:, s], scale, window_size) for s in spans]
        return torch.cat(pieces, 1) if pieces else q.new_zeros(1, 0, dims["H"], dims["V"])
    return _sdpa(q, k, v, scale, window_size, mask, cu_seqlens)


def _check(dims: dict[str, int], window_size: int | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if dims["H"] % dims["G"]:
        raise ValueError(f"k must have a number of heads that divides q's {dims['H']}, got {dims['G']}")
    if dims["S"] < dims["T"]:
        raise ValueError(f"k must hold the tokens of q and those before: at least {dims['T']} tokens, got {dims['S']}")
    if window_size is not None and not isinstance(window_size, int):
        raise TypeError(f"window_size must be an int or None, got {type(window_size).__name__}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be None or at least 1, got {window_size}")
    if cu_seqlens is not None and mask is not None:
        raise ValueError("mask must be None when cu_seqlens is given: packed sequences have no padding")
    if cu_seqlens is not None and dims["S"] != dims["T"]:
        raise ValueError(f"cu_seqlens needs as many keys as queries ({dims['T']}), got {dims['S']}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
    if mask is not None and tuple(mask.shape) != (dims["B"], dims["S"]):
        raise ValueError(f"mask must have shape [B, S] = [{dims['B']}, {dims['S']}], got {list(mask.shape)}")


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_size: int | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    # An exported program is for every length, so it must not depend on which of the two is larger.
    windowed = window_size is not None and (torch.compiler.is_exporting() or window_size < S)
    masked = mask is not None or cu_seqlens is not None or windowed
    causal = not masked and bool(T == S)  # PyTorch takes no symbolic bool
    visible = None
    if masked or (T > 1 and T < S):
        visible = _visible(T, S, window_size if windowed else None, mask, cu_seqlens, q.device)
    if groups > 1 and visible is not None and T > 1:
        # PyTorch's fused kernels, which hold no score matrix in memory, take a mask only without grouped heads.
        k, v, groups = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=groups > 1
    ).transpose(1, 2)
    return o if mask is None else o.masked_fill((mask[:, S - T :] == 0)[:, :, None, None], 0)


def _visible(
    T: int, S: int, window_size: int | None, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Whether a query sees a key: bool `[1, T, S]` or `[B, 1, T, S]`."""
    column = torch.arange(S, device=device)
    row = column[S - T :, None]
    visible = column <= row
    real = None if mask is None else mask != 0
    if window_size is not None:
        position = column if real is None else real.cumsum(-1)  # padding does not count in the window
        visible = visible & (position[..., S - T :, None] - position[..., None, :] < window_size)
    if real is not None:
        visible = (visible & real[:, None, :]) | (column == row)  # a padded query sees itself, so its softmax is finite
    if cu_seqlens is not None:
        sequence = prepare_sequence_ids(cu_seqlens, S)
        visible = visible & (sequence[:, None] == sequence)
    return visible.unsqueeze(-3)


@functools.cache
def _flash_attn() -> ModuleType | None:
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") is not None else None


def _flash_runs(q: Tensor, dims: dict[str, int]) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and dims["K"] == dims["V"] and dims["K"] <= 256 and dims["T"] > 0


def _flash(
    flash: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_size: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    window = (-1, -1) if window_size is None else (window_size - 1, 0)
    if cu_seqlens is None:
        return flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=window)
    bounds, longest = cu_seqlens.to(torch.int32), q.shape[1] if max_seqlen is None else max_seqlen
    packed = (q[0], k[0], v[0], bounds, bounds, longest, longest)
    return flash.flash_attn_varlen_func(*packed, softmax_scale=scale, causal=True, window_size=window).unsqueeze(0)
