"""The cache by itself: slots, counters, windows, and the operations of beam search and batching."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache as TransformersCache

from fla.models.utils import Cache, FLACache, FLAGenerationMixin, FLALayer, LegacyFLACache

from .tiny import build, every_case, every_type, tiny_config, tokens


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
    assert cache.get_seq_length(None) == cache.get_seq_length(0)
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
    with pytest.raises(TypeError, match="number of a layer, got 'recurrent_state'"):
        cache["recurrent_state"]
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
    with pytest.raises(TypeError, match="one mapping of slot name to states per layer, got tuple for layer 0"):
        Cache.from_legacy_cache([(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))])


def in_storage(cache):
    """Where the memory of every stored tensor begins."""
    values = [value for slots in cache for value in slots.values()]
    return {x.untyped_storage().data_ptr() for v in values for x in (v if isinstance(v, tuple) else (v,))}


def changed(cache, method, *arguments):
    getattr(cache, method)(*arguments)
    return cache


COPIES = {
    "deepcopy": copy.deepcopy,
    "to_legacy": lambda cache: cache.to_legacy_cache(),
    "from_legacy": lambda cache: Cache.from_legacy_cache(list(cache)),
    "reordered": lambda cache: changed(cache, "reorder_cache", torch.arange(3)),
    "repeated": lambda cache: changed(cache, "batch_repeat_interleave", 1),
    "selected": lambda cache: changed(cache, "batch_select_indices", torch.ones(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_share_no_memory(name):
    cache = filled()
    before = [dict(slots) for slots in cache]  # which keeps the memory in use
    after = COPIES[name](cache)
    assert not in_storage(before) & in_storage(after)
    assert torch.equal(rows_of(after), rows_of(before))


def continued(model, cache, count=4):
    """Logits of some further tokens, one at a time."""
    new = tokens(2, count, seed=3)
    with torch.no_grad():
        return torch.cat([model(new[:, [t]], past_key_values=cache).logits for t in range(count)], 1)


def prompted(model, mode=torch.no_grad, cache=None):
    with mode():
        return model(tokens(2, 7), past_key_values=cache, use_cache=True).past_key_values


@every_case
def test_one_prompt_is_continued_many_times(model_type, overrides):
    """A prompt goes on from snapshots of either kind. What a cache does later changes no snapshot."""
    model = build(model_type, overrides)
    cache = prompted(model)
    expected = continued(model, prompted(model))
    states, copied = cache.to_legacy_cache(), copy.deepcopy(cache)
    for _ in range(2):
        assert torch.equal(continued(model, Cache.from_legacy_cache(states, seen_tokens=7)), expected)
        assert torch.equal(continued(model, copy.deepcopy(copied)), expected)
    assert torch.equal(continued(model, cache), expected)
    assert torch.equal(continued(model, Cache.from_legacy_cache(states, seen_tokens=7)), expected)


@every_case
def test_a_prompt_of_inference_mode_is_continued_outside(model_type, overrides):
    model = build(model_type, overrides)
    expected = continued(model, prompted(model))
    assert torch.equal(continued(model, prompted(model, torch.inference_mode)), expected)
    assert torch.equal(continued(model, copy.deepcopy(prompted(model, torch.inference_mode))), expected)
    cache = prompted(model, torch.inference_mode)
    with torch.inference_mode():
        cache.reorder_cache(torch.tensor([0, 1]))
    logits = model(tokens(2, 4, seed=3)[:, :1], past_key_values=cache).logits
    logits.sum().backward()  # nor does a graph mind where the states come from
    torch.testing.assert_close(logits[:, 0], expected[:, 0])


@every_type
@pytest.mark.parametrize("make", [DynamicCache, lambda config: DynamicCache(config=config)], ids=["bare", "by-config"])
def test_a_caller_s_empty_cache_is_filled(model_type, make):
    """Its object holds the past afterwards, and is copied and reset like ours. A second object holds another past."""
    model = build(model_type)
    expected = continued(model, prompted(model))
    mine = make(tiny_config(model_type)) if make is not DynamicCache else DynamicCache()
    prompted(model, cache=mine)
    other = make(tiny_config(model_type)) if make is not DynamicCache else DynamicCache()
    assert (mine.get_seq_length(), other.get_seq_length()) == (7, 0)
    saved = copy.deepcopy(mine)
    assert torch.equal(continued(model, mine), expected)
    assert mine.get_seq_length() == 11
    assert torch.equal(continued(model, saved), expected)
    mine.reset()
    assert torch.equal(continued(model, prompted(model, cache=mine)), expected)


@every_type
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # transformers 5.24: `cache`
def test_generation_goes_on_in_a_caller_s_cache(model_type):
    model, mine, ids = build(model_type), DynamicCache(), tokens(1, 5)
    settings = {"do_sample": False, "pad_token_id": 0}
    first = model.generate(ids, past_key_values=mine, max_new_tokens=3, **settings)
    both = torch.cat([first, tokens(1, 2, seed=4)], 1)
    again = model.generate(both, past_key_values=mine, max_new_tokens=3, **settings)
    assert torch.equal(again, model.generate(both, max_new_tokens=3, **settings))


def in_use():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    return cache


FOREIGN = {
    "DynamicCache with tokens in it": in_use,
    "DynamicCache with offloading": lambda: DynamicCache(offloading=True),
    "StaticCache": lambda: StaticCache(tiny_config("transformer"), max_cache_len=9),
    "EncoderDecoderCache": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "tuple": lambda: ((torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)),),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_caches_that_cannot_be_filled_are_named(name):
    with pytest.raises(ValueError, match=f"past_key_values must be a fla.models.utils.Cache or .*, got {name};"):
        build("gla")(tokens(1, 3), past_key_values=FOREIGN[name]())


def test_a_cache_of_another_batch_is_named():
    model = build("gla", {"use_short_conv": True})
    with pytest.raises(ValueError, match=r"past_key_values must hold the states of as many .* has, 3, got those of 2"):
        model(tokens(3, 1), past_key_values=prompted(model))


def test_other_names():
    assert FLACache is LegacyFLACache is Cache
    assert isinstance(filled().layers[0], FLALayer)
    assert isinstance(build("gla"), FLAGenerationMixin)


@every_case
def test_truncated_backpropagation(model_type, overrides):
    """Through a cache gradients reach the tokens of earlier calls; through a detached one they do not."""
    model, ids = build(model_type, overrides).train(), tokens(2, 10)
    weights = list(model.parameters())

    def second_half(detached):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        cache = cache.detach_() if detached else cache
        states = [
            x for slots in cache for value in slots.values() for x in ((value,) if torch.is_tensor(value) else value)
        ]
        assert {x.requires_grad for x in states} == {not detached}
        logits = model(ids[:, 6:], past_key_values=cache).logits
        return torch.autograd.grad(logits.square().mean(), weights, allow_unused=True, materialize_grads=True)

    whole = model(ids).logits[:, 6:].square().mean()
    expected = torch.autograd.grad(whole, weights, allow_unused=True, materialize_grads=True)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, right in zip(second_half(False), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4 * largest)
    cut = second_half(True)
    assert max(float((a - b).abs().max()) for a, b in zip(cut, expected, strict=True)) > 0.01 * largest


@every_type
def test_a_cache_of_another_model_is_refused(model_type):
    """The error names the cache: the user gave no `initial_state`."""
    ids = tokens(2, 5)
    model = build(model_type)
    narrower = build(model_type, {"head_dim": 4} if hasattr(model.config, "head_dim") else {"hidden_size": 16})
    with pytest.raises(ValueError, match="past_key_values must be of the same model"):
        model(ids, past_key_values=narrower(ids).past_key_values)
    deeper = build(model_type, {"num_hidden_layers": model.config.num_hidden_layers + 1})
    with pytest.raises(ValueError, match=r"past_key_values must be of the same model, which has \d layers, got"):
        deeper(ids, past_key_values=model(ids).past_key_values)


def test_a_cache_of_other_layers_is_refused():
    ids, plain, hybrid = tokens(2, 5), build("gla"), build("gla", {"attn": {"layers": [1], "num_heads": 2}})
    for model, other in ((plain, hybrid), (hybrid, plain)):
        with pytest.raises(ValueError, match=r"past_key_values must be of the same model: .* continues from"):
            model(ids, past_key_values=other(ids).past_key_values)
