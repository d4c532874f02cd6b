"""`fla.layers.utils`: the helpers that clients import too."""

import pytest
import torch

from fla.layers import utils
from fla.layers.utils import Padding

MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
TOKENS = [1, 2, 8, 9, 10, 11]


def test_get_unpad_data():
    indices, cu_seqlens, longest = utils.get_unpad_data(MASK)
    assert (indices.tolist(), cu_seqlens.tolist(), longest) == (TOKENS, [0, 2, 2, 6], 4)
    assert (indices.dtype, cu_seqlens.dtype, type(longest)) == (torch.int64, torch.int32, int)


def test_gather_and_pad_are_inverse_and_differentiable():
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor(TOKENS)
    kept = utils.index_first_axis(x, indices)
    assert torch.equal(kept, x[TOKENS])
    padded = utils.pad_input(kept, indices, 3, 4)
    assert torch.equal(padded, (x.view(3, 4, 3) * MASK[..., None]))
    assert torch.equal(utils.index_put_first_axis(kept, indices, 12), padded.flatten(0, 1))
    padded.sum().backward()
    assert torch.equal(x.grad, MASK.flatten()[:, None].expand(-1, 3).double())


@pytest.mark.parametrize("keepdim", [False, True])
def test_unpad_input(keepdim):
    q, k, v = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5), torch.randn(3, 4, 5)
    packed, (k_packed, v_packed), indices, (cu_q, cu_k), longest = utils.unpad_input(q, (k, v), MASK, 4, keepdim)
    real = MASK.bool()
    for got, x in ((packed, q), (k_packed, k), (v_packed, v)):
        assert torch.equal(got, x[real][None] if keepdim else x[real])
    assert torch.equal(cu_q, cu_k)
    assert (indices.tolist(), longest) == (TOKENS, (4, 4))


def test_unpad_input_of_a_decoding_step():
    q, k = torch.randn(3, 1, 2, 5), torch.randn(3, 4, 2, 5)
    packed, (k_packed,), indices, (cu_q, cu_k), longest = utils.unpad_input(q, (k,), MASK, 1)
    assert torch.equal(packed, q[:, 0])
    assert torch.equal(k_packed, k[MASK.bool()])
    assert (indices.tolist(), cu_q.tolist(), cu_k.tolist(), longest) == ([0, 1, 2], [0, 1, 2, 3], [0, 2, 2, 6], (1, 4))
    with pytest.raises(ValueError, match="q_len must be 1 or the length 4 of attention_mask, got 2"):
        utils.unpad_input(q, (k,), MASK, 2)


def test_unpad_and_repad_hidden_states():
    x = torch.randn(3, 2, 5)
    packed, indices, cu_seqlens = utils.unpad_hidden_states(x, None, MASK, 2)
    assert torch.equal(packed[0], x[MASK[:, 2:].bool()])
    assert cu_seqlens.tolist() == [0, 1, 1, 3]
    assert torch.equal(utils.repad_hidden_states(packed, indices, 3, 2), x * MASK[:, 2:, None])
    bounds = torch.tensor([0, 2])
    for arguments in ((bounds, MASK), (None, None)):
        same, indices, cu_seqlens = utils.unpad_hidden_states(x, *arguments, 2)
        assert same is x and indices is None and cu_seqlens is arguments[0]
    assert utils.repad_hidden_states(x, None, 3, 2) is x


def test_padding():
    padding = Padding.from_mask(MASK, 4)
    x = torch.randn(3, 4, 5)
    assert torch.equal(padding.unpad(x)[0], x[MASK.bool()])
    assert torch.equal(padding.repad(padding.unpad(x)), x * MASK[..., None])
    assert (padding.batch_size, padding.seq_len, padding.cu_seqlens.tolist()) == (3, 4, [0, 2, 2, 6])
    assert Padding.from_mask(MASK[2:], 4) is None
    assert Padding.from_mask(torch.ones(0, 4), 4) is None


def test_layer_cache():
    layer = torch.nn.Identity()
    assert utils.get_layer_cache(layer, None) is None
    assert utils.update_layer_cache(layer, None, offset=3) is None
    with pytest.raises(ValueError, match="layer_idx must be given"):
        utils.get_layer_cache(layer, {})
    assert utils.require_cache_layer_idx(layer, None) is None
    with pytest.raises(ValueError, match="layer_idx must be given when Identity is built"):
        utils.require_cache_layer_idx(layer, {})
    layer.layer_idx = 2
    assert utils.require_cache_layer_idx(layer, {}) == utils.require_cache_layer_idx(layer, None) == 2
    assert utils.get_layer_cache(layer, {}) is None
    assert utils.get_layer_cache(layer, {2: {"ffn_state": 1}}) == {"ffn_state": 1}
