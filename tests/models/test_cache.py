"""The cache by itself: slots, counters, windows, and the operations of beam search and batching."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache

from fla.models.utils import Cache


def filled(rows=3):
    cache = Cache()
    for layer in range(2):
        state = torch.arange(rows).float().view(-1, 1, 1, 1).expand(rows, 2, 3, 4) + 10 * layer
        cache.update(recurrent_state=state, conv_state=(state[:, 0], state[:, 1]), layer_idx=layer, offset=5)
    kv = torch.arange(rows).float().view(-1, 1, 1).expand(rows, 5, 6)
    cache.update(attn_state=(kv, kv + 1), layer_idx=2, offset=5)
    return cache


def rows_of(cache):
    """What every stored tensor holds in its first element, row by row."""
    values = []
    for slots in cache:
        for value in slots.values():
            values += [x.flatten(1)[:, 0] for x in (value if isinstance(value, tuple) else (value,))]
    return torch.stack(values)


def test_slots_and_counters():
    cache = Cache()
    assert isinstance(cache, TransformersCache)
    assert (len(cache), cache.get_seq_length(), cache.get_seq_length(4)) == (0, 0, 0)
    with pytest.raises(KeyError, match="layer 0"):
        cache[0]
    state = torch.ones(2, 1, 3, 3)
    assert cache.update(recurrent_state=state, layer_idx=1, offset=7)["recurrent_state"] is state
    assert (len(cache), cache.get_seq_length(0), cache.get_seq_length(1)) == (2, 0, 7)  # counters are the layers' own
    with pytest.raises(KeyError, match="layer 0"):
        cache[0]
    assert set(cache[1]) == {"recurrent_state"}
    cache.update(ffn_state=state[:, 0, 0], layer_idx=1, offset=0)
    assert set(cache[1]) == {"recurrent_state", "ffn_state"}
    assert cache.batch_size == 2
    with pytest.raises(TypeError, match="unknown_state"):
        cache.update(unknown_state=state)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert cache.get_mask_sizes(3, 1) == (10, 0)
    assert not cache.is_compileable
    assert not cache.is_croppable


def test_window_keeps_the_tail_and_returns_everything():
    cache, text = Cache(), torch.randn(2, 20, 3)
    stored = 0
    for start, end in ((0, 9), (9, 10), (10, 13), (13, 20)):
        new = text[:, start:end]
        k, v = cache.update(attn_state=(new, -new), layer_idx=0, offset=end - start, cache_kwargs={"window_size": 4})[
            "attn_state"
        ]
        assert torch.equal(k, text[:, start - stored : end])  # a query sees all that was kept, and all that is new
        assert torch.equal(v, -k)
        stored = min(4, end)
        assert torch.equal(cache[0]["attn_state"][0], text[:, end - stored : end])
        assert cache.get_seq_length() == end
    with pytest.raises(ValueError, match="batch size 2"):
        cache.update(attn_state=(text[:1], text[:1]), layer_idx=0)


def test_rows_can_be_reordered_repeated_and_selected():
    cache = filled()
    before = rows_of(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(rows_of(cache), before[:, [2, 0, 0]])
    cache = filled()
    cache.batch_repeat_interleave(2)
    assert torch.equal(rows_of(cache), before[:, [0, 0, 1, 1, 2, 2]])
    cache.batch_select_indices(torch.tensor([5, 1]))
    assert torch.equal(rows_of(cache), before[:, [2, 0]])
    cache.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(rows_of(cache), before[:, [0]])
    assert cache.get_seq_length(2) == 5


def test_reset_copy_and_crop():
    cache = filled()
    saved = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache[0] == {}
    assert cache[0]["recurrent_state"] is None
    with pytest.raises(KeyError, match="other_state"):
        cache[0]["other_state"]
    with pytest.raises(KeyError, match="layer 3"):
        cache[3]
    assert torch.equal(rows_of(saved), rows_of(filled()))
    for target in (saved, saved.layers[0]):
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            target.crop(-1)


def test_offload_and_prefetch():
    cache = filled()
    for layer in range(3):
        cache.offload(layer)
        cache.layers[layer].prefetch()
    assert torch.equal(rows_of(cache), rows_of(filled()))


def test_legacy_form_and_foreign_caches():
    cache = filled()
    again = Cache.from_legacy_cache(cache.to_legacy_cache(), seen_tokens=5)
    assert torch.equal(rows_of(again), rows_of(cache))
    assert [again.get_seq_length(i) for i in range(3)] == [5, 5, 5]
    assert Cache.wrap(cache) is cache
    assert isinstance(Cache.wrap(DynamicCache()), Cache)
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="past_key_values must be a fla"):
        Cache.wrap(foreign)
