"""`fla.varlen`: packed sequences, against loops over Python lists."""

import pytest
import torch

from fla import check_packing, varlen
from fla.testing import pack

LENGTHS = ((5,), (3, 0, 4, 1), (0, 0, 2), (64, 65, 1, 0))
CASES = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
INDEX = pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=("i32", "i64"))


def rows(pairs, dtype):
    return torch.tensor(pairs, dtype=dtype).reshape(-1, 2)


@CASES
@INDEX
def test_tables(lengths, dtype):
    bounds = pack(lengths, dtype)
    sequence = [n for n, length in enumerate(lengths) for _ in range(length)]
    position = [t for length in lengths for t in range(length)]
    chunks = [-(-length // 64) for length in lengths]
    expected = {
        "prepare_lens": torch.tensor(lengths, dtype=dtype),
        "prepare_sequence_ids": torch.tensor(sequence, dtype=dtype),
        "prepare_position_ids": torch.tensor(position, dtype=dtype),
        "prepare_token_indices": rows(list(zip(sequence, position, strict=True)), dtype),
    }
    for name, table in expected.items():
        torch.testing.assert_close(getattr(varlen, name)(bounds), table, rtol=0, atol=0, msg=name)
    offsets = torch.tensor([sum(chunks[:n]) for n in range(len(chunks) + 1)], dtype=dtype)
    torch.testing.assert_close(varlen.prepare_chunk_offsets(bounds, 64), offsets, rtol=0, atol=0)
    table = rows([(n, c) for n, count in enumerate(chunks) for c in range(count)], dtype)
    torch.testing.assert_close(varlen.prepare_chunk_indices(bounds, 64), table, rtol=0, atol=0)
    torch.testing.assert_close(varlen.prepare_chunk_indices(bounds, 64, bounds), table, rtol=0, atol=0)
    assert varlen.get_max_num_splits(bounds, 64) == max(chunks)


@INDEX
def test_from_lengths_and_masks(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    torch.testing.assert_close(varlen.prepare_lens_from_mask(mask), torch.tensor([2, 3, 0, 2], dtype=torch.int32))
    expected = torch.tensor([0, 2, 5, 5, 7], dtype=dtype)
    torch.testing.assert_close(varlen.prepare_cu_seqlens_from_mask(mask, dtype), expected)
    torch.testing.assert_close(varlen.prepare_cu_seqlens_from_lens(torch.tensor([2, 3, 0, 2]), dtype), expected)
    indices, bounds = varlen.mask_indices(mask)
    assert indices.tolist() == [1, 2, 3, 4, 5, 9, 11] and bounds.tolist() == expected.tolist()


def test_unpad_and_repad():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    indices, _ = varlen.mask_indices(mask)
    packed = varlen.unpad(x, indices)
    assert torch.equal(packed, torch.stack((x[0, 1], x[0, 2], x[1, 0], x[1, 2]))[None])
    assert torch.equal(varlen.repad(packed, indices, 2, 3), x * mask[..., None])
    torch.autograd.gradcheck(lambda y: varlen.repad(varlen.unpad(y, indices), indices, 2, 3), (x,))


@CASES
@pytest.mark.parametrize("side", ("left", "right"))
def test_pack_and_unpack(lengths, side):
    """`padding_side` is the side on which the padding stands."""
    bounds, size = pack(lengths), max(lengths)
    x = torch.randn(sum(lengths), 2, dtype=torch.float64)
    padded = varlen.unpack_sequence(x, bounds, side)
    assert padded.shape == (len(lengths), size, 2)
    for n, length in enumerate(lengths):
        start = size - length if side == "left" else 0
        assert torch.equal(padded[n, start : start + length], x[bounds[n] : bounds[n + 1]])
        assert padded[n].count_nonzero() == x[bounds[n] : bounds[n + 1]].count_nonzero()
    assert torch.equal(varlen.pack_sequence(padded, bounds, side), x)
    wider = varlen.unpack_sequence(x, bounds, side, desired_shape=(len(lengths), size + 3, 2))
    assert wider.shape[1] == size + 3 and torch.equal(varlen.pack_sequence(wider, bounds, side), x)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'middle'"):
        varlen.unpack_sequence(x, bounds, "middle")


@pytest.mark.parametrize(
    "bounds, message",
    (
        ((1, 5), "start at 0, got 1"),
        ((0, 4), "end at the number of tokens 5, got 4"),
        ((0, 6), "end at the number of tokens 5, got 6"),
        ((0, 3, 2, 5), r"never decrease, got \[0, 3, 2, 5\]"),
    ),
    ids=str,
)
def test_bad_bounds(bounds, message):
    with pytest.raises(ValueError, match=message):
        varlen.check_cu_seqlens(torch.tensor(bounds), 5)


def test_check_packing_nests_and_ends():
    with check_packing(), check_packing():
        assert varlen._check_on_device
    assert not varlen._check_on_device
