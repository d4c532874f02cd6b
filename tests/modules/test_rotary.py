"""Rotary embedding: packing, offsets, the cached tables, XPos, and the functional forms."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fla.modules import RotaryEmbedding
from fla.modules.rotary import rotary_embedding, rotary_embedding_ref
from fla.testing import assert_within_budget, pack

B, T, H, D = 3, 7, 2, 8
LENGTHS = (0, 1, 5, 0, 9, 0)


def queries(batch=B, length=T, dtype=torch.float64):
    return torch.randn(batch, length, H, D, dtype=dtype), torch.randn(batch, length, 1, D, dtype=dtype)


def same(actual, expected):
    for y, z in zip(actual, expected, strict=True):
        assert_within_budget("rotary", y, z, z)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 11, -4, "tensor"])
def test_packed_is_separate(interleaved, offset):
    rotary, cu = RotaryEmbedding(D, interleaved=interleaved), pack(LENGTHS)
    q, k = queries(1, sum(LENGTHS))
    offsets = torch.tensor([3, -2, 0, 5, 100, 1]) if offset == "tensor" else torch.full((6,), offset)
    given = offsets if offset == "tensor" else offset
    parts = [rotary(q[:, a:b], k[:, a:b], int(offsets[n])) for n, (a, b) in enumerate(itertools.pairwise(cu.tolist()))]
    same(rotary(q, k, given, cu_seqlens=cu), [torch.cat(z, 1) for z in zip(*parts, strict=True)])


def test_offsets_per_row_also_negative_ones():
    rotary, (q, k) = RotaryEmbedding(D), queries()
    offsets = torch.tensor([0, -5, 4000], dtype=torch.int32)
    rows = [rotary(q[i : i + 1], k[i : i + 1], int(offsets[i])) for i in range(B)]
    actual = rotary(q, k, offsets)
    assert all(y.isfinite().all() for y in actual)
    same(actual, [torch.cat(z) for z in zip(*rows, strict=True)])


def test_scores_depend_on_distance_only():
    rotary, (q, k) = RotaryEmbedding(D), queries()
    scores = [torch.einsum("bthd,bsgd->bhts", *rotary(q, k, offset)) for offset in (0, 123, -50)]
    for moved in scores[1:]:
        torch.testing.assert_close(moved, scores[0], rtol=0, atol=1e-12)


def test_xpos_pieces_are_the_whole_after_the_table_has_grown():
    q, k = queries()
    whole, pieced = RotaryEmbedding(D, scale_base=4.0), RotaryEmbedding(D, scale_base=4.0)
    steps = [pieced(q[:, t : t + 1], k[:, t : t + 1], t) for t in range(T)]
    scores = [
        torch.einsum("bthd,bsgd->bhts", *pair).tril()
        for pair in (whole(q, k), [torch.cat(z, 1) for z in zip(*steps, strict=True)])
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-6)


def test_one_table_for_a_model_grown_in_steps():
    layers, (q, k) = [RotaryEmbedding(D) for _ in range(3)], queries(1, 1, torch.float32)
    layers.append(copy.deepcopy(layers[0]))
    layers.append(pickle.loads(pickle.dumps(layers[0])))
    layers[0](q, k)
    copies = [copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
    lengths = set()
    for position in range(0, 4000, 13):  # a decoding loop
        for rotary in layers + copies:
            rotary(q, k, position)
        (table,) = {rotary._table for rotary in layers + copies}
        lengths.add(len(table.rows[0]))
        assert max(lengths) <= (position + 1) * 9 / 8 + 1024
    assert len(lengths) <= 4
    fresh = RotaryEmbedding(D)(q, k, 3999)
    assert all(torch.equal(y, z) for y, z in zip(layers[0](q, k, 3999), fresh, strict=True))  # grown is made at once
    assert len(pickle.dumps(layers[0])) < 5000
    table = weakref.ref(table)
    del layers, copies, rotary
    gc.collect()
    assert table() is None  # and gone with its last module


def test_a_table_is_shared_by_equal_angles_dtypes_and_devices_only():
    q, k = queries()
    kinds = [
        {},
        {"base": 500.0},
        {"scale_base": 4.0},
        {"scale_base": 8.0},
        {"pos_idx_in_fp32": False},
    ]
    for dtype in (torch.float32, torch.float64):
        rotaries = [RotaryEmbedding(D, **kind) for kind in kinds] + [RotaryEmbedding(4)]
        outputs = [rotary(q.to(dtype), k.to(dtype))[0] for rotary in rotaries]
        assert len({id(rotary._table) for rotary in rotaries}) == len(rotaries)
        assert not any(torch.equal(outputs[0], y) for y in outputs[1:4])
        meta = RotaryEmbedding(D)
        assert meta(q.to("meta", dtype), k.to("meta", dtype))[0].is_meta
        assert meta(q.to(dtype), k.to(dtype))[0].equal(outputs[0])
    coarse = RotaryEmbedding(D, pos_idx_in_fp32=False)
    fine = coarse(q, k, 301)[0]
    assert not torch.equal(coarse.bfloat16()(q, k, 301)[0], fine)  # no table of the dtype that the buffers had before


def test_table_outlives_inference_mode_and_knows_no_fake_values():
    rotary, (q, k) = RotaryEmbedding(D), queries(dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rotary(mode.from_tensor(q), mode.from_tensor(k))
    with torch.inference_mode():
        first = rotary(q, k)
    with FakeTensorMode() as mode:
        rotary(mode.from_tensor(q), mode.from_tensor(k))
    q.requires_grad_()
    y, _ = rotary(q, k)
    y.sum().backward()
    assert torch.equal(y, first[0]) and q.grad.isfinite().all()
    rotary(q, k, max_seqlen=2000)
    assert len(rotary._table.rows[0]) == 2048


@pytest.mark.gpu
def test_a_cuda_graph_reads_no_table_that_grows():
    rotary, (q, k) = RotaryEmbedding(D), (x.cuda() for x in queries(dtype=torch.float32))
    expected, graph = rotary(q, k), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turned = rotary(q, k)
    rotary(q, k, 5000)
    graph.replay()
    assert all(torch.equal(y, z) for y, z in zip(turned, expected, strict=True))


def test_values_do_not_depend_on_what_happened_to_the_buffers():
    """Casting a model, or creating it on the meta device as checkpoint loading does, leaves buffers worthless."""
    q, k = queries(dtype=torch.bfloat16)
    expected = RotaryEmbedding(D)(q, k, 3000)
    meta = RotaryEmbedding(D, device="meta").to_empty(device="cpu")
    meta.inv_freq.fill_(float("nan"))
    for rotary in (RotaryEmbedding(D).bfloat16(), meta):
        assert all(torch.equal(y, z) for y, z in zip(rotary(q, k, 3000), expected, strict=True))


def test_positions_in_the_buffers_dtype_are_honoured():
    q, k = queries()
    exact, coarse = RotaryEmbedding(D), RotaryEmbedding(D, pos_idx_in_fp32=False).bfloat16()
    assert (exact(q, k, 301)[0] - coarse(q, k, 301)[0]).abs().max() > 0.1  # 301 is no bfloat16 number
    assert RotaryEmbedding(D).state_dict() == {}


@pytest.mark.parametrize("interleaved", [False, True])
def test_functional_form(interleaved):
    x, angle = torch.randn(2, T, H, D), torch.outer(torch.arange(20.0), torch.rand(3))
    cos, sin = angle.cos(), angle.sin()
    expected = rotary_embedding_ref(x.double(), cos.double(), sin.double(), interleaved)
    y = rotary_embedding(x, cos, sin, interleaved)
    assert_within_budget("y", y, expected, rotary_embedding_ref(x, cos, sin, interleaved))
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert torch.equal(
        rotary_embedding_ref(x[0], cos, sin, interleaved), rotary_embedding_ref(x, cos, sin, interleaved)[0]
    )
    back = rotary_embedding(y.flip(1), cos, sin, interleaved, seqlen_offsets=1 - T)  # the other way round: undone
    torch.testing.assert_close(back.flip(1), x)
    target = x.clone()
    assert rotary_embedding(target, cos, sin, interleaved, inplace=True) is target and torch.equal(target, y)


BAD = [
    (lambda r, q, k: RotaryEmbedding(D, base=0.0), ValueError, "base must"),
    (lambda r, q, k: RotaryEmbedding(D, base=float("nan")), ValueError, "base must"),
    (lambda r, q, k: RotaryEmbedding(D, base="10000"), TypeError, "base must"),
    (lambda r, q, k: RotaryEmbedding(D, scale_base=-1.0), ValueError, "scale_base must"),
    (lambda r, q, k: RotaryEmbedding(8.0), TypeError, "dim must"),
    (lambda r, q, k: r(q.tolist(), k), TypeError, "q must"),
    (lambda r, q, k: r(q, k.tolist()), TypeError, "k must"),
    (lambda r, q, k: r(q[:1], k[:1], cu_seqlens=[0, T]), TypeError, "cu_seqlens must"),
    (lambda r, q, k: RotaryEmbedding(5), ValueError, "dim"),
    (lambda r, q, k: r(q[..., :6], k), ValueError, "q must"),
    (lambda r, q, k: r(q, k[:, :3]), ValueError, "k must"),
    (lambda r, q, k: r(q[0], k), ValueError, "q must"),
    (lambda r, q, k: r(q, k, 1.5), TypeError, "offsets"),
    (lambda r, q, k: r(q, k, torch.ones(B)), ValueError, "offsets"),
    (lambda r, q, k: r(q, k, torch.ones(2, dtype=torch.long)), ValueError, "offsets"),
    (lambda r, q, k: r(q, k, cu_seqlens=pack((T,))), ValueError, "cu_seqlens"),
    (lambda r, q, k: r(q[:1], k[:1], cu_seqlens=pack((1, 1))), ValueError, "must end at"),
    (lambda r, q, k: rotary_embedding(q, q[0, :4, 0, :2], q[0, :4, 0, :2]), ValueError, "position 6"),
    (lambda r, q, k: rotary_embedding(q, q[0, :4, 0], q[0, :4, 0]), ValueError, "d >= 16"),
]


@pytest.mark.parametrize(("call", "error", "word"), BAD)
def test_errors_name_the_argument(call, error, word):
    with pytest.raises(error, match=word):
        call(RotaryEmbedding(D), *queries())
