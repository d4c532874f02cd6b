"""Caches and `generate`: any split of a text gives the logits of the whole, and decoding with a cache is decoding
without.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from fla.models.utils import Cache

from .tiny import assert_same, build, every_case, every_side, every_type, exhaustive, padding_mask, tokens


def in_pieces(model, ids, sizes, mask=None):
    """Logits of `ids` fed to the model in pieces, with one cache."""
    cache, logits, start = Cache(), [], 0
    for size in sizes:
        end = start + size
        given = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=given, past_key_values=cache)
        assert output.past_key_values is cache
        assert {cache.get_seq_length(i) for i in range(len(cache))} == {end}
        logits.append(output.logits)
        start = end
    return torch.cat(logits, 1)


@every_case
@pytest.mark.parametrize("sizes", [(1, 1, 9, 1), (70, 5, 1, 1), *exhaustive((1,) * 12, (11, 1), (1, 11))], ids=str)
def test_pieces_are_the_whole(model_type, overrides, sizes):
    model, ids = build(model_type, overrides), tokens(2, sum(sizes))
    assert_same("pieces", model, lambda m: in_pieces(m, ids, sizes), lambda m: m(ids, use_cache=False).logits)


@every_case
@every_side
def test_pieces_of_a_padded_batch(model_type, overrides, side):
    # seed 2: with seed 1 a row's first q . k all but vanishes, and RetNet's norm divides by it: its digits are noise
    model, ids, mask = build(model_type, overrides), tokens(3, 13, seed=2), padding_mask(side)
    real = mask.bool()
    assert_same(
        side,
        model,
        lambda m: in_pieces(m, ids, (6, 1, 1, 5), mask)[real],
        lambda m: torch.cat([m(row[keep][None]).logits[0] for row, keep in zip(ids, real, strict=True)]),
    )


@torch.no_grad()
def greedy(model, ids, steps):
    """What greedy decoding means: the likeliest token of a full forward, again and again."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@every_case
def test_greedy(model_type, overrides):
    model, ids = build(model_type, overrides), tokens(2, 9)
    expected = greedy(model, ids, 6)
    common = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **common), expected)
    if not overrides:  # what does not depend on the layers
        assert torch.equal(model.generate(ids, use_cache=False, **common), expected)
        assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **common), expected)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, **common), expected[:, 9:])


@every_case
def test_batch_with_left_padding(model_type, overrides):
    model = build(model_type, overrides)
    rows = [tokens(1, n, seed=n) for n in (3, 9, 6)]
    ids = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - row.shape[1] for row in rows]).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, generated in zip(rows, out, strict=True):
        assert torch.equal(generated[9:], greedy(model, row, 6)[0, row.shape[1] :])


@every_case
def test_beam_search_with_cache_is_without(model_type, overrides):
    model, ids = build(model_type, overrides), tokens(2, 7)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    with_cache, without = (model.generate(ids, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores)


@every_type
def test_sampling_with_cache_is_without(model_type):
    model, ids, drawn = build(model_type), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, do_sample=True, top_k=5, max_new_tokens=8, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], greedy(model, ids, 8))


@every_case
def test_continuing_from_a_cache(model_type, overrides):
    model, ids = build(model_type, overrides), tokens(2, 12)
    expected = greedy(model, ids, 5)
    prefix = model(ids[:, :8]).past_key_values
    common = {"max_new_tokens": 5, "do_sample": False}
    saved = copy.deepcopy(prefix)
    assert torch.equal(model.generate(ids, past_key_values=prefix, **common), expected)
    assert prefix.get_seq_length() == 16  # everything but the last token
    assert saved.get_seq_length() == 8  # a copy is a snapshot
    new, mask = ids[:, 8:], torch.ones(2, 12, dtype=torch.long)
    out = model.generate(new, attention_mask=mask, past_key_values=saved, **common)
    assert torch.equal(out[:, 4:], expected[:, 12:])
    few = model(ids[:, :2]).past_key_values  # more new tokens than seen ones
    out = model.generate(ids[:, 2:], attention_mask=mask, past_key_values=few, **common)
    assert torch.equal(out[:, 10:], expected[:, 12:])
    with pytest.raises(ValueError, match="input_ids must hold every token"):
        model.generate(new, past_key_values=model(ids[:, :8]).past_key_values, **common)


def test_a_mask_that_is_too_short_is_refused():
    model, ids, mask = build("gla"), tokens(2, 6), torch.ones(2, 5, dtype=torch.long)
    mask[0, 0] = 0  # transformers 5.24 drops a mask of ones
    with pytest.raises(ValueError, match="attention_mask must have a column for each of the 6 tokens, got 5"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


@every_case
def test_packed_prefill_goes_on_as_a_batch(model_type, overrides):
    """One packed row leaves one state per sequence; a layer that needs positions cannot go on from it and says so."""
    model, ids, cu_seqlens = build(model_type, overrides), tokens(3, 6), torch.tensor([0, 5, 10, 15])
    mixers = [getattr(layer, layer.names.mixer) for layer in model.base_model.layers]

    def packed(m):
        cache = m(ids[:, :5].reshape(1, -1), cu_seqlens=cu_seqlens, use_cache=True).past_key_values
        return m(ids[:, 5:], past_key_values=cache).logits

    if any(mixer.uses_positions for mixer in mixers):
        with pytest.raises(ValueError, match="cu_seqlens must be None"):
            packed(model)
    else:
        assert_same("packed", model, packed, lambda m: m(ids, use_cache=False).logits[:, 5:])
    with pytest.raises(ValueError, match="cu_seqlens must be None in generate"):
        model.generate(ids, cu_seqlens=cu_seqlens, max_new_tokens=1)


@every_type
def test_first_step_is_told_by_what_the_cache_has_seen(model_type):
    model, ids = build(model_type), tokens(1, 6)
    prepare = model.prepare_inputs_for_generation
    assert prepare(ids, past_key_values=Cache())["input_ids"].shape == (1, 6)
    cache = model(ids[:, :4]).past_key_values
    assert torch.equal(prepare(ids, past_key_values=cache)["input_ids"], ids[:, 4:])
    assert torch.equal(prepare(ids, past_key_values=cache, attention_mask=torch.ones(1, 6))["input_ids"], ids[:, 4:])


REFUSED = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": None},
}


@every_type
@pytest.mark.parametrize("mode", REFUSED)
def test_decoding_that_rewinds_is_refused(model_type, mode):
    model = build(model_type)
    settings = {key: model if value is None else value for key, value in REFUSED[mode].items()}
    with pytest.raises(ValueError, match="cannot be rewound"):
        model.generate(tokens(1, 4), max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")
