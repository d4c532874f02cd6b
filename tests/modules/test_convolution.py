"""Short convolution and token shift with state: packed = separate, pieces = whole, and what is written to."""

import importlib
import itertools

import pytest
import torch

from fla.modules import ShortConvolution
from fla.modules.convolution import causal_conv1d, causal_conv1d_update, proj_then_conv1d
from fla.modules.token_shift import token_shift
from fla.testing import assert_within_budget, pack

D, W = 5, 4
LENGTHS = (0, 1, 6, 0, 2, 1, 9, 0)


@pytest.fixture
def conv():
    return ShortConvolution(D, W, bias=True).double()


def close(name, actual, expected):
    """Fail unless two results in float64 differ by a few roundings at most."""
    assert_within_budget(name, actual, expected, expected)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_is_separate(conv, index, with_state):
    cu, total, N = pack(LENGTHS, index), sum(LENGTHS), len(LENGTHS)
    x = torch.randn(1, total, D, dtype=torch.float64, requires_grad=True)
    state = torch.randn(N, D, W, dtype=torch.float64, requires_grad=True) if with_state else None
    leaves = [x, conv.weight, *([state] if with_state else [])]
    y, final = conv(x, cache=state, output_final_state=True, cu_seqlens=cu)
    alone = []
    for n, (a, b) in enumerate(itertools.pairwise(cu.tolist())):
        alone.append(conv(x[:, a:b], cache=state[n : n + 1] if with_state else None, output_final_state=True))
    ys, finals = torch.cat([p[0] for p in alone], 1), torch.cat([p[1] for p in alone])
    close("y", y, ys)
    close("state", final, finals)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    grads = torch.autograd.grad((y, final), leaves, (dy, dfinal))
    expected = torch.autograd.grad((ys, finals), leaves, (dy, dfinal))
    for name, grad, grad64 in zip(("x", "weight", "state"), grads, expected, strict=False):
        close(f"d{name}", grad, grad64)


@pytest.mark.parametrize("pieces", [(1,) * 8, (3, 5), (7, 1), (1, 0, 7), (2, 2, 4)])
def test_pieces_are_the_whole(conv, pieces):
    x = torch.randn(2, 8, D, dtype=torch.float64, requires_grad=True)
    whole, final = conv(x, output_final_state=True)
    ys, cache = [], None
    for piece in x.split(pieces, 1):
        y, cache = conv(piece, cache=cache, output_final_state=True)
        ys.append(y)
    close("y", torch.cat(ys, 1), whole)
    assert torch.equal(cache, final)
    dy, dfinal = torch.randn_like(whole), torch.randn_like(final)
    (grad,) = torch.autograd.grad((torch.cat(ys, 1), cache), x, (dy, dfinal))
    (expected,) = torch.autograd.grad((whole, final), x, (dy, dfinal))
    close("dx", grad, expected)


@pytest.mark.parametrize("T", [1, 3, 4, 9])
def test_state_is_the_last_inputs(conv, T):
    x = torch.randn(2, T, D, dtype=torch.float64)
    _, state = conv(x, output_final_state=True)
    expected = torch.zeros(2, D, W, dtype=torch.float64)
    expected[..., max(W - T, 0) :] = x[:, -W:].transpose(1, 2)
    assert torch.equal(state, expected) and state.is_contiguous()
    assert conv(x)[1] is None


def test_only_a_step_without_gradient_writes_to_the_cache(conv):
    cache = torch.randn(2, D, W, dtype=torch.float64)
    x, before = torch.randn(2, 3, D, dtype=torch.float64), cache.clone()
    with torch.no_grad():
        _, after = conv(x, cache=cache, output_final_state=True)
        assert torch.equal(cache, before) and not torch.equal(after, before)
    _, recorded = conv(x[:, :1], cache=cache, output_final_state=True)
    assert torch.equal(cache, before)
    with torch.no_grad():
        _, same = conv(x[:, :1], cache=cache, output_final_state=True)
        assert same is cache and torch.equal(cache, recorded)
        cache.copy_(before)
        assert conv(x[:, :1], cache=cache)[1] is None and torch.equal(cache, recorded)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 2, 1)])
def test_packed_decoding(conv, lengths):
    x, cache = torch.randn(1, 3, D, dtype=torch.float64), torch.randn(3, D, W, dtype=torch.float64)
    expected = causal_conv1d(x, conv.weight[:, 0], conv.bias, None, cache, True, "silu", cu_seqlens=pack(lengths))
    with torch.no_grad():
        y, state = conv(x, cache=cache, output_final_state=True, cu_seqlens=pack(lengths))
    close("y", y, expected[0])
    assert state is cache and torch.equal(cache, expected[1])


def test_update_takes_any_shape_of_one_token(conv):
    x, residual = torch.randn(3, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    weight, start = conv.weight.detach()[:, 0], torch.randn(3, D, W, dtype=torch.float64)
    expected, _ = causal_conv1d(x[:, None], weight, None, residual[:, None], start, activation="swish")
    for shape in ((3, D), (3, 1, D), (1, 3, D), (3, 1, D, 1)):
        cache = start.clone()
        y, same = causal_conv1d_update(x.view(shape), cache, residual.view(shape), weight, activation="swish")
        assert same is cache and y.shape == shape
        close("y", y, expected.view(shape))
        assert torch.equal(cache, torch.cat((start[..., 1:], x[..., None]), -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_step_and_continuation(dtype):
    conv = ShortConvolution(D, W).to(dtype).requires_grad_(False)
    x, cache = torch.randn(2, 3, D).to(dtype), torch.randn(2, D, W).to(dtype)
    for T in (1, 3):
        row = torch.cat((cache.transpose(1, 2), x[:, :T]), 1)
        reference, naive = (conv.to(wide)(row.to(wide))[0][:, W:] for wide in (torch.float64, torch.float32))
        y, state = conv.to(dtype)(x[:, :T], cache=cache.clone(), output_final_state=True)
        assert state.dtype == dtype
        assert_within_budget("y", y, reference, naive.to(dtype))


def test_wide_cache_stays_wide():
    conv, cache = ShortConvolution(D, W).bfloat16().requires_grad_(False), torch.randn(2, D, W)
    for T in (1, 3):
        y, state = conv(torch.randn(2, T, D).bfloat16(), cache=cache, output_final_state=True)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_mask_is_zero_input_and_leaves_x_alone(conv):
    x, mask = torch.randn(2, 6, D, dtype=torch.float64), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    before = x.clone()
    for m in (mask, mask.bool()):
        y, state = conv(x, mask=m, output_final_state=True)
        expected = conv(x * mask[..., None], output_final_state=True)
        assert torch.equal(y, expected[0]) and torch.equal(state, expected[1]) and torch.equal(x, before)


def test_projection_form(conv):
    x, proj = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(D, 7, dtype=torch.float64)
    cache = torch.zeros(2, D, W, dtype=torch.float64)
    y = proj_then_conv1d(x, proj, conv.weight.detach()[:, 0], conv.bias.detach(), cache)
    expected, state = conv(x @ proj.T, output_final_state=True)
    close("y", y, expected)
    close("state", cache, state)


@pytest.mark.parametrize("width", range(2, 9))
def test_every_width_in_pieces_shorter_than_it(width):
    conv = ShortConvolution(D, width, bias=True).double()
    x = torch.randn(1, 11, D, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.functional.conv1d(x.mT, conv.weight, conv.bias, padding=width - 1, groups=D)[..., :11]
    whole, final = conv(x, output_final_state=True)
    close("y", whole, torch.nn.functional.silu(padded).mT)
    ys, cache = [], None
    for piece in x.split([1, 2, 1, 3, 1, 3], 1):
        y, cache = conv(piece, cache=cache, output_final_state=True)
        ys.append(y)
    close("y in pieces", torch.cat(ys, 1), whole)
    assert torch.equal(cache, final)
    grads = [torch.autograd.grad(y.square().sum(), (x, conv.weight)) for y in (torch.cat(ys, 1), whole)]
    for name, grad, grad64 in zip(("dx", "dweight"), *grads, strict=True):
        close(name, grad, grad64)


def test_seq_idx_says_where_sequences_begin(conv):
    x, residual = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 6, D, dtype=torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2], [2, 5, 5, 5, 5, 5]], dtype=torch.int32)
    separate = [
        conv(row[:, a:b], res[:, a:b])[0]
        for row, res, bounds in zip(x.split(1), residual.split(1), ((0, 3, 5, 6), (0, 1, 6)), strict=True)
        for a, b in itertools.pairwise(bounds)
    ]
    close("y", conv(x, residual, seq_idx=seq_idx)[0].reshape(1, -1, D), torch.cat(separate, 1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])  # padding is a sequence of its own
    y, _ = conv(x, mask=mask, seq_idx=seq_idx)
    close("y", y[:, 3:], conv(x, seq_idx=seq_idx)[0][:, 3:])
    states = torch.randn(3, D, W, dtype=torch.float64)
    packed = conv(x[:1], cache=states, output_final_state=True, cu_seqlens=pack((3, 2, 1)))
    by_index = conv(x[:1], cache=states, output_final_state=True, seq_idx=seq_idx[:1])
    assert torch.equal(packed[0], by_index[0]) and torch.equal(packed[1], by_index[1])
    step = conv(x[:, :1], cache=states[:2], output_final_state=True, seq_idx=seq_idx[:, :1])
    assert torch.equal(step[0], conv(x[:, :1], cache=states[:2])[0])


def test_lengths_on_the_cpu_alone_pack_too(conv):
    x, cu = torch.randn(1, 6, D, dtype=torch.float64), pack((2, 4))
    expected = conv(x, output_final_state=True, cu_seqlens=cu)
    results = [
        conv(x, output_final_state=True, cu_seqlens_cpu=cu),
        causal_conv1d(x, conv.weight[:, 0], conv.bias, None, None, True, "silu", "cuda", None, cu),
    ]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def test_a_cache_of_inference_mode_serves_afterwards(conv):
    x = torch.randn(2, 3, D, dtype=torch.float64)
    whole = conv(x)[0].detach()
    for mode in (torch.no_grad, torch.enable_grad):
        with torch.inference_mode():
            _, cache = conv(x[:, :1], output_final_state=True)
        ys = []
        with mode():
            for t in (1, 2):
                y, cache = conv(x[:, t : t + 1], cache=cache, output_final_state=True)
                ys.append(y)
        close("y", torch.cat(ys, 1), whole[:, 1:])
        assert not cache.is_inference()


def test_names_that_programs_import():
    from fla.modules.conv.causal_conv1d import causal_conv1d as inner
    from fla.modules.conv.causal_conv1d import causal_conv1d_update as update
    from fla.modules.conv.short_conv import ShortConvolution as inner_short
    from fla.modules.conv.triton.ops import CausalConv1dFunction

    from fla.modules.conv import ShortConvolution as short
    from fla.modules.conv import causal_conv1d as function

    assert function is inner is causal_conv1d and update is causal_conv1d_update
    assert short is inner_short is ShortConvolution
    y, _ = causal_conv1d(torch.randn(1, 3, D, requires_grad=True), torch.randn(D, W))
    kinds, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        kinds.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert f"{CausalConv1dFunction.__name__}Backward" in kinds


def test_module_is_a_conv1d():
    conv = ShortConvolution(64, W)
    assert isinstance(conv, torch.nn.Conv1d) and conv.state_size == 64 * W
    assert conv.weight.shape == (64, 1, W) and conv.bias is None
    assert 0.25 < conv.weight.std() < 0.33 and conv.weight.abs().max() <= 0.5
    assert repr(conv).startswith("ShortConvolution(64, 64, kernel_size=(4,)") and "activation=silu" in repr(conv)
    with pytest.warns(DeprecationWarning, match="use_fast_conv1d"):
        ShortConvolution(D, W, use_fast_conv1d=False)


@pytest.mark.parametrize("with_cache", [False, True])
def test_token_shift_packed_is_separate(with_cache):
    cu, total, N = pack(LENGTHS), sum(LENGTHS), len(LENGTHS)
    x = torch.randn(1, total, D, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(N, D, dtype=torch.float64, requires_grad=True) if with_cache else None
    leaves = [x, *([cache] if with_cache else [])]
    delta, last = token_shift(x, cu, cache, output_cache=True)
    alone = [
        token_shift(x[:, a:b], None, cache[n : n + 1] if with_cache else None, True)
        for n, (a, b) in enumerate(itertools.pairwise(cu.tolist()))
    ]
    expected = torch.cat([p[0] for p in alone], 1), torch.cat([p[1] for p in alone])
    assert torch.equal(delta, expected[0]) and torch.equal(last, expected[1])
    assert torch.equal(last[2], x[0, 6]) and torch.equal(last[0], cache[0] if with_cache else torch.zeros_like(last[0]))
    upstream = torch.randn_like(delta), torch.randn_like(last)
    pairs = zip(
        torch.autograd.grad((delta, last), leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    )
    for grad, grad64 in pairs:
        close("grad", grad, grad64)


@pytest.mark.parametrize("total", [262_141, 262_144])
def test_token_shift_of_many_documents(total):
    """A pack of a quarter million tokens in documents of 752, with its gradient, is each document by itself."""
    ends = torch.cat((torch.arange(0, total, 752), torch.tensor([total])))
    x = torch.randn(1, total, 2, requires_grad=True)
    delta, last = token_shift(x, ends.int(), output_cache=True)
    before = torch.cat((torch.zeros(1, 1, 2), x[:, :-1]), 1)
    before = before.index_fill(1, ends[:-1], 0.0)
    assert torch.equal(delta, before - x) and torch.equal(last, x[0, ends[1:] - 1])
    upstream = torch.randn_like(delta)
    (dx,) = torch.autograd.grad(delta, x, upstream)
    (expected,) = torch.autograd.grad(before - x, x, upstream)
    assert torch.equal(dx, expected)


BAD = [
    (lambda c, x: c(x[..., :3]), ValueError, "x must"),
    (lambda c, x: c(x.tolist()), TypeError, "x must"),
    (lambda c, x: c(x, mask=[[1, 1, 1]] * 2), TypeError, "mask must"),
    (lambda c, x: c(x[:1], cu_seqlens=[0, 1, 3]), TypeError, "cu_seqlens must"),
    (lambda c, x: c(x[:1], cu_seqlens_cpu=[0, 1, 3]), TypeError, "cu_seqlens_cpu must"),
    (lambda c, x: c(x[:1], cache=torch.zeros(2, D, W), cu_seqlens=[0, 1, 3]), TypeError, "cu_seqlens must"),
    (lambda c, x: c(x, cache=[1]), TypeError, "cache must"),
    (lambda c, x: c(x, cu_seqlen=pack((1, 2))), TypeError, "cu_seqlen'"),
    (lambda c, x: c(x, seq_idx=[[0, 0, 1]]), TypeError, "seq_idx must"),
    (lambda c, x: c(x, seq_idx=torch.zeros(2, 2, dtype=torch.int)), ValueError, "seq_idx must"),
    (lambda c, x: c(x, seq_idx=torch.zeros(2, 3)), ValueError, "seq_idx must"),
    (lambda c, x: c(x, seq_idx=torch.zeros(2, 3).int(), output_final_state=True), ValueError, "seq_idx of one row"),
    (lambda c, x: c(x, cache=torch.zeros(2, D, W), seq_idx=torch.zeros(2, 3).int()), ValueError, "seq_idx of one row"),
    (lambda c, x: c(x[:1], seq_idx=torch.zeros(1, 3).int(), cu_seqlens=pack((1, 2))), ValueError, "seq_idx and cu_"),
    (lambda c, x: causal_conv1d(x), TypeError, "weight must"),
    (lambda c, x: causal_conv1d(None, c.weight[:, 0]), TypeError, "x must"),
    (lambda c, x: causal_conv1d_update(x[:, 0].tolist(), None, None, c.weight[:, 0]), TypeError, "x must"),
    (lambda c, x: token_shift(x.tolist()), TypeError, "x must"),
    (lambda c, x: token_shift(x[:1], [0, 1, 3]), TypeError, "cu_seqlens must"),
    (lambda c, x: c(x[0]), ValueError, "x must"),
    (lambda c, x: c(x.long()), TypeError, "x must"),
    (lambda c, x: c(x, residual=x[:, :2]), ValueError, "residual"),
    (lambda c, x: c(x, cache=torch.zeros(2, D, W - 1)), ValueError, "cache must"),
    (lambda c, x: c(x, cache=torch.zeros(3, D, W)), ValueError, "cache must"),
    (lambda c, x: c(x, mask=torch.ones(2, 5)), ValueError, "mask"),
    (lambda c, x: c(x[:1], mask=torch.ones(1, 3), cu_seqlens=pack((1, 2))), ValueError, "mask and cu_seqlens"),
    (lambda c, x: c(x, cu_seqlens=pack((1, 2))), ValueError, "batch size 1"),
    (lambda c, x: c(x[:1], cu_seqlens=pack((1, 1))), ValueError, "must end at"),
    (lambda c, x: c(x[:1], cu_seqlens=torch.tensor([0, 2, 1, 3])), ValueError, "never decrease"),
    (lambda c, x: c(x[:1], cu_seqlens=pack((1, 2)).float()), TypeError, "cu_seqlens"),
    (lambda c, x: token_shift(x, cache=torch.zeros(2, D + 1)), ValueError, "cache"),
    (lambda c, x: token_shift(x[:1], pack((1, 1))), ValueError, "must end at"),
    (lambda c, x: causal_conv1d(x, c.weight[:, 0], activation="gelu"), ValueError, "activation"),
    (lambda c, x: causal_conv1d(x, c.weight[:, 0], cp_context=object()), NotImplementedError, "cp_context"),
    (lambda c, x: causal_conv1d(x, c.weight[:, 0], backend="cudnn"), ValueError, "backend must"),
    (lambda c, x: causal_conv1d_update(x, torch.zeros(2, D, W), None, c.weight[:, 0]), ValueError, "one token"),
    (lambda c, x: causal_conv1d_update(x[:, 0], torch.zeros(2, D, W)), TypeError, "weight"),
    (lambda c, x: ShortConvolution(D, W, activation="relu"), ValueError, "activation"),
    (lambda c, x: ShortConvolution(D, W, False, "silu", True), ValueError, "backend must"),
    (lambda c, x: ShortConvolution(D, W, "silu"), TypeError, "bias must"),
]


@pytest.mark.parametrize(("call", "error", "word"), BAD)
def test_errors_name_the_argument(call, error, word):
    with pytest.raises(error, match=word):
        call(ShortConvolution(D, W), torch.randn(2, 3, D))


def test_exports_beside_the_names_of_other_programs():
    """`fla.modules.conv` gives the autograd function another `apply`, which must not be called from within itself."""
    importlib.import_module("fla.modules.conv")
    layer, T = ShortConvolution(8, 4, activation="silu"), torch.export.Dim("T", min=8, max=64)
    with torch.no_grad():
        x = torch.randn(2, 20, 8)
        exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: T}}).module()
        for tokens in (9, 33):
            x = torch.randn(2, tokens, 8)
            torch.testing.assert_close(exported(x), layer(x))
