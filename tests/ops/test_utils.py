"""`fla.ops.utils`: sums over chunks and small functions, held to loops; packed, reversed, with gradients."""

import pytest
import torch

from fla.ops import utils
from fla.ops.utils import chunk_global_cumsum, chunk_local_cumsum, solve_tril

PACKS = ((5,), (1, 0, 7, 16, 3, 0), (33, 31))
each_pack = pytest.mark.parametrize("lengths", PACKS, ids=str)
both_ways = pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
shapes = pytest.mark.parametrize("shape", ((3,), (2, 4)), ids=("scalar", "vector"))


def bounds(lengths):
    return utils.prepare_cu_seqlens_from_lens(torch.tensor(lengths))


def loop(x, stretches, reverse):
    """Sums over each stretch of tokens, one after the other."""
    out, start = torch.zeros_like(x), 0
    for length in stretches:
        total = torch.zeros_like(x[:, 0])
        tokens = range(start, start + length)
        for t in reversed(tokens) if reverse else tokens:
            total = total + x[:, t]
            out[:, t] = total
        start += length
    assert start == x.shape[1]
    return out


def cut(length, size):
    return [min(size, length - start) for start in range(0, length, size)]


@each_pack
@both_ways
@shapes
def test_sums(lengths, reverse, shape):
    x = torch.randn(1, sum(lengths), *shape, dtype=torch.float64)
    pack, options = bounds(lengths), {"reverse": reverse, "scale": 0.5, "output_dtype": None}
    expected = loop(x * 0.5, lengths, reverse)
    torch.testing.assert_close(chunk_global_cumsum(x, cu_seqlens=pack, **options), expected)
    torch.testing.assert_close(chunk_global_cumsum(x, **options), loop(x * 0.5, [sum(lengths)], reverse))
    for size in (1, 4, 16, 64):
        chunks = [piece for length in lengths for piece in cut(length, size)]
        found = chunk_local_cumsum(x, size, cu_seqlens=pack, **options)
        torch.testing.assert_close(found, loop(x * 0.5, chunks, reverse))
        batch = torch.cat((x, x + 1))
        found = chunk_local_cumsum(batch, size, **options)
        torch.testing.assert_close(found, loop(batch * 0.5, cut(sum(lengths), size), reverse))


def test_dtypes_and_gradients_of_sums():
    x = torch.randn(1, 20, 2).bfloat16()
    for function in (lambda *a, **k: chunk_local_cumsum(*a, 8, **k), chunk_global_cumsum):
        assert function(x).dtype == torch.float32 and function(x, output_dtype=None).dtype == torch.bfloat16
        torch.testing.assert_close(function(x), function(x.float()), rtol=0, atol=0)
        assert function(x[:, :0]).shape == (1, 0, 2)
    x, pack = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True), bounds((4, 0, 5))
    double = {"cu_seqlens": pack, "output_dtype": torch.float64, "reverse": True}
    torch.autograd.gradcheck(lambda x: chunk_local_cumsum(x, 4, **double), (x,))
    torch.autograd.gradcheck(lambda x: chunk_global_cumsum(x, **double), (x,))


def test_what_sums_refuse():
    x = torch.randn(2, 8, 3)
    for size in (0, 3, -4, 2.0):
        with pytest.raises(ValueError, match="chunk_size must be a power of two, got"):
            chunk_local_cumsum(x, size)
    with pytest.raises(ValueError, match=r"s must have shape \[B, T, H\] or \[B, T, H, D\], got \[2, 8\]"):
        chunk_global_cumsum(x[..., 0])
    with pytest.raises(ValueError, match="g must have batch size 1, got 2"):
        chunk_local_cumsum(x, 4, cu_seqlens=bounds((3, 5)))
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of tokens 8, got 7"):
        chunk_global_cumsum(x[:1], cu_seqlens=bounds((3, 4)))


@each_pack
def test_solve_tril(lengths):
    """The inverse of each chunk's triangle, whatever stands above the diagonal."""
    C, T, H = 16, sum(lengths), 2
    A = torch.randn(1, T, H, C, dtype=torch.float64)
    found, start = solve_tril(A, bounds(lengths), output_dtype=None), 0
    for size in (piece for length in lengths for piece in cut(length, C)):
        block = A[0, start : start + size, :, :size].transpose(0, 1)
        inverse = torch.linalg.inv(torch.eye(size, dtype=A.dtype) + block.tril(-1))
        torch.testing.assert_close(found[0, start : start + size, :, :size].transpose(0, 1), inverse)
        start += size
    assert solve_tril(A.half()).dtype == torch.float32 and solve_tril(A.half(), output_dtype=None).dtype == torch.half


def test_small_functions():
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(5, 4)
    torch.testing.assert_close(utils.logsumexp_fwd(x, 0.3), (x * 0.3).exp().sum(-1).log())
    assert utils.logsumexp_fwd(x.half()).dtype == torch.float32
    assert utils.logsumexp_fwd(x, dtype=torch.float16).dtype == torch.float16
    p = utils.softmax_fwd(x)
    torch.testing.assert_close(p, x.exp() / x.exp().sum(-1, keepdim=True))
    assert utils.softmax_fwd(x.half()).dtype == torch.float32 and utils.softmax_fwd(x.half(), None).dtype == torch.half
    dp = torch.randn(3, 5)
    torch.testing.assert_close(utils.softmax_bwd(p, dp), torch.autograd.grad(p, x, dp)[0])
    product = x @ y
    torch.testing.assert_close(utils.matmul(x, y), product)
    torch.testing.assert_close(utils.matmul(x, y, "leaky_relu"), torch.where(product > 0, product, 0.01 * product))
    with pytest.raises(ValueError, match="activation must be '' or 'leaky_relu', got 'relu'"):
        utils.matmul(x, y, "relu")
    with pytest.raises(ValueError, match="a and b must be matrices"):
        utils.matmul(x[None], y)
    bias, alpha, beta = torch.randn(3, 4), torch.tensor([2.0]), torch.tensor(0.5)
    torch.testing.assert_close(utils.addmm(bias, x, y, alpha, beta), 0.5 * bias + 2 * product)
    torch.testing.assert_close(utils.addmm(bias, x, y), bias + product)
