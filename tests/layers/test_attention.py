"""The op behind `Attention`: against a dense softmax written out, for every combination of its options."""

import types

import pytest
import torch

from fla.layers import Attention
from fla.models.cache import Cache
from fla.ops import attention as op
from fla.testing import assert_within_budget


def dense(q, k, v, window=None, mask=None, bounds=None, scale=None):
    """One query at a time, one head at a time."""
    B, T, H, K = q.shape
    S, group = k.shape[1], H // k.shape[2]
    o = v.new_zeros(B, T, H, v.shape[-1])
    for b in range(B):
        for t in range(T):
            column = S - T + t
            keys = [s for s in range(column + 1) if mask is None or mask[b, s]]
            if mask is not None and not mask[b, column]:
                continue
            if bounds is not None:
                keys = [s for s in keys if s >= max(x for x in bounds if x <= column)]
            keys = keys[-window:] if window else keys
            for h in range(H):
                scores = k[b, keys, h // group] @ q[b, t, h] * (K**-0.5 if scale is None else scale)
                o[b, t, h] = scores.softmax(0) @ v[b, keys, h // group]
    return o


def inputs(T=9, S=9, H=4, G=4, K=8, V=8, B=2):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(B, n, h, d, generator=generator) for n, h, d in ((T, H, K), (S, G, K), (S, G, V)))


def check(tensors, settings, dense_settings):
    leaves = [
        [x.to(dtype).clone().requires_grad_() for x in tensors]
        for dtype in (torch.float32, torch.float64, torch.float32)
    ]
    outputs = [op.attention(*leaves[0], **settings)] + [dense(*x, **dense_settings) for x in leaves[1:]]
    for o in outputs:
        (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum().backward()
    assert_within_budget("o", *outputs)
    for name, *gradients in zip("qkv", *([x.grad for x in group] for group in leaves), strict=True):
        assert_within_budget(f"d{name}", *gradients)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_against_dense(T, S, groups, window):
    check(inputs(T, S, G=groups), {"window_size": window}, {"window": window})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("groups", [4, 2])
def test_padding(T, S, groups, window):
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1, 0, 0, 0]])
    check(inputs(T, S, G=groups), {"window_size": window, "mask": mask}, {"window": window, "mask": mask})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("compiling", [False, True], ids=["by-sequence", "by-mask"])
def test_packed(window, compiling, monkeypatch):
    """Both ways to run a pack without flash-attn: sequence by sequence, and with a mask where values cannot be read."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    bounds = [0, 0, 4, 5, 5, 9]
    settings = {"window_size": window, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    check(inputs(B=1, G=2), settings, {"window": window, "bounds": bounds})


def test_sizes_and_scale():
    check(inputs(K=8, V=5), {"scale": 0.3}, {"scale": 0.3})
    empty = torch.zeros(1, 0, 2, 4)
    assert op.attention(empty, empty, empty, cu_seqlens=torch.tensor([0, 0, 0])).shape == (1, 0, 2, 4)


def test_flash_attn_is_called_by_its_own_rules(monkeypatch):
    """A stand-in with flash-attn's signatures: windows as (left, right), packed tensors without a batch axis."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
        window = None if window_size[0] < 0 else window_size[0] + 1
        return dense(q, k, v, window, scale=softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        assert causal and cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == 5
        window = None if window_size[0] < 0 else window_size[0] + 1
        return dense(q[None], k[None], v[None], window, bounds=cu_q.tolist(), scale=softmax_scale)[0]

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(op, "_flash_attn", lambda: module)
    monkeypatch.setattr(op, "_flash_runs", lambda q, dims: True)
    check(inputs(4, 9, G=2), {}, {})
    check(inputs(4, 9, G=2), {"window_size": 3}, {"window": 3})
    settings = {"cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5, "window_size": 2}
    check(inputs(B=1), settings, {"window": 2, "bounds": [0, 4, 9]})
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    check(inputs(), {"mask": mask}, {"mask": mask})  # which flash-attn does not know: not handed to it


def test_flash_attn_runs_only_in_half_precision_on_a_gpu():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    assert not op._flash_runs(q, {"T": 2, "K": 8, "V": 8})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"window_size": 0}, ValueError, "window_size must be None or at least 1, got 0"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask must have shape \[B, S\] = \[2, 9\], got \[2, 3\]"),
        ({"k": torch.zeros(2, 9, 3, 8), "v": torch.zeros(2, 9, 3, 8)}, ValueError, "k must have a number of heads"),
        ({"k": torch.zeros(2, 5, 4, 8), "v": torch.zeros(2, 5, 4, 8)}, ValueError, "at least 9 tokens, got 5"),
        ({"v": torch.zeros(2, 8, 4, 8)}, ValueError, "v must have shape"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "batch size 1, got 2"),
        ({"q": torch.zeros(2, 9, 4, 8, dtype=torch.int64)}, TypeError, "q must be a floating-point tensor"),
    ],
)
def test_errors(changes, error, match):
    with pytest.raises(error, match=match):
        op.attention(**(dict(zip("qkv", inputs(), strict=True)) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must end at the number of tokens 9"),
        ({"cu_seqlens": torch.tensor([0, 9]), "mask": torch.ones(1, 9)}, "mask must be None when cu_seqlens is given"),
        ({"cu_seqlens": torch.tensor([0, 4]), "q": torch.zeros(1, 4, 4, 8)}, "cu_seqlens needs as many keys"),
    ],
)
def test_packing_errors(changes, match):
    with pytest.raises(ValueError, match=match):
        op.attention(**(dict(zip("qkv", inputs(B=1), strict=True)) | changes))


def test_the_cache_of_a_window_keeps_what_some_row_still_sees():
    layer, cache = Attention(32, 2, window_size=4, layer_idx=0).eval(), Cache()
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        layer(x[:, :10], past_key_values=cache)
        assert cache[0]["attn_state"][0].shape == (2, 4, 32)
        layer(x[:, 10:], past_key_values=cache)
        assert cache[0]["attn_state"][0].shape == (2, 4, 32)
        cache = Cache()
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :7] = 0
        layer(x, attention_mask=mask, past_key_values=cache)
        assert cache[0]["attn_state"][0].shape == (2, 4, 32)  # left padding takes no room
        cache = Cache()
        layer(x, attention_mask=mask.flip(1), past_key_values=cache)
        assert cache[0]["attn_state"][0].shape == (2, 11, 32)  # the last 4 tokens of row 0 and 7 columns of padding
