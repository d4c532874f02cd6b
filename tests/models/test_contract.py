"""The contract of every registered model: shapes, losses, padding, packing, checkpointing, bad input."""

import copy

import pytest
import torch
from torch import nn

from fla.layers import Attention
from fla.models.utils import Cache
from fla.modules import ShortConvolution
from fla.testing import assert_within_budget

from .tiny import (
    HYBRID,
    REGISTRY,
    VOCAB,
    assert_same,
    build,
    every_case,
    every_side,
    every_type,
    exhaustive,
    padding_mask,
    tiny_config,
    tokens,
    types_where,
)


@every_case
def test_forward_and_backward(model_type, overrides):
    model, ids = build(model_type, overrides).train(), tokens(2, 70)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 70, VOCAB)
    assert output.past_key_values is None  # training keeps no cache
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_case
def test_what_reaches_every_layer(model_type, overrides):
    """Each mixer is called with its own value of `layer_inputs()`, and with the last carry that a layer returned."""
    model, ids, seen = build(model_type, overrides), tokens(1, 6), []
    body, names = model.base_model, model.block_cls.names
    mixers = [getattr(layer, names.mixer) for layer in body.layers]
    for mixer in mixers:
        mixer.register_forward_hook(lambda *call: seen.append((call[2], call[3])), with_kwargs=True)
    model(ids)
    carry = None
    for mixer, value, (keywords, result) in zip(mixers, body.layer_inputs(), seen, strict=True):
        own = [name for name in mixer.inputs if name != mixer.carry_name]
        values = () if value is None or not own else value if isinstance(value, tuple) else (value,)
        for name, expected in zip(own, values, strict=bool(values)):
            assert torch.equal(keywords[name], expected), name
        if mixer.carry_name is not None:
            assert keywords.get(mixer.carry_name) is carry
            carry = result[3]
            assert carry.shape[:2] == ids.shape


@every_type
def test_a_block_by_itself(model_type):
    """A block takes the mask and the cache by position, as other programs call it."""
    model, x, cache = build(model_type), torch.randn(2, 6, tiny_config(model_type).hidden_size), Cache()
    block, mask = model.base_model.layers[0], torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    o, attentions, filled, *carry = block(x, mask, cache, True)
    assert attentions is None and filled is cache and cache.get_seq_length() == 6
    assert len(carry) == (getattr(block, block.names.mixer).carry_name is not None)
    assert torch.equal(o, block(x, attention_mask=mask)[0])


@every_type
def test_outputs(model_type):
    model, ids = build(model_type), tokens(2, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert output.attentions is None
    assert output.past_key_values.get_seq_length() == 7
    assert model(ids, use_cache=False).past_key_values is None
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 7
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, output.logits)


@every_type
def test_logits_to_keep(model_type):
    model, ids = build(model_type), tokens(2, 9)
    full = model(ids).logits
    for keep in (None, 0):
        assert torch.equal(model(ids, logits_to_keep=keep).logits, full)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, num_logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
    kept = model(ids, labels=ids, logits_to_keep=1)
    torch.testing.assert_close(kept.logits, full[:, -1:])
    torch.testing.assert_close(kept.loss, model(ids, labels=ids).loss)


@every_type
def test_loss_paths_agree(model_type):
    ids = tokens(2, 33)
    labels = ids.clone()
    labels[0, 5:9] = -100
    losses, gradients = [], []
    for flags in ((False, False), (True, False), (False, True)):
        names = ("fuse_cross_entropy", "fuse_linear_cross_entropy")
        model = build(model_type, dict(zip(names, flags, strict=True)))
        output = model(ids, labels=labels)
        assert (output.logits is None) == flags[1]
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # position t predicts token t + 1; the last has nothing to predict
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits.double(), labels[:, 1:].flatten())
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, expected.float())
        torch.testing.assert_close(gradient, gradients[0])
    assert model(ids).logits is not None  # without labels there is nothing to fuse


@every_type
def test_loss_is_normalised_by_the_items_of_the_whole_batch(model_type):
    """Accumulating two halves with `num_items_in_batch` is the loss of the whole, though they differ in length."""
    model, ids = build(model_type), tokens(2, 12)
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    halves = sum(model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(2))
    torch.testing.assert_close(halves, whole)


@every_type
def test_own_criterion(model_type):
    model, ids = build(model_type), tokens(1, 5)
    model.criterion = nn.CrossEntropyLoss(reduction="sum", ignore_index=-100)
    torch.testing.assert_close(model(ids, labels=ids).loss / 4, build(model_type)(ids, labels=ids).loss)


@every_case
def test_packed_is_separate(model_type, overrides):
    model, lengths = build(model_type, overrides), [5, 0, 1, 70, 12]
    parts = [tokens(1, n, seed=n) for n in lengths]

    def separate(m):
        return torch.cat([m(part).logits for part in parts if part.shape[1]], 1)

    with torch.no_grad():
        reference, naive = separate(copy.deepcopy(model).double()), separate(model)
        for name, dtype in (("cu_seqlens", torch.int32), ("cu_seq_lens_q", torch.int64)):
            cu_seqlens = torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)
            logits = model(torch.cat(parts, 1), **{name: cu_seqlens}, use_cache=False).logits
            assert_within_budget(name, logits, reference, naive)


@every_case
@every_side
def test_padding_is_a_no_op(model_type, overrides, side):
    model, ids, mask = build(model_type, overrides), tokens(3, 13), padding_mask(side)
    real = mask.bool()
    assert_same(
        side,
        model,
        lambda m: m(ids, attention_mask=mask).logits[real],
        lambda m: torch.cat([m(row[keep][None]).logits[0] for row, keep in zip(ids, real, strict=True)]),
    )


@every_case
def test_row_alone_is_row_in_batch(model_type, overrides):
    model, ids = build(model_type, overrides), tokens(3, 20)
    assert_same("row", model, lambda m: m(ids).logits[1:2], lambda m: m(ids[1:2]).logits)


@every_type
def test_packing_wins_over_a_mask(model_type):
    model, ids, cu_seqlens = build(model_type), tokens(1, 8), torch.tensor([0, 3, 8])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    packed = model(ids, cu_seqlens=cu_seqlens, use_cache=False).logits
    assert torch.equal(model(ids, attention_mask=mask, cu_seqlens=cu_seqlens, use_cache=False).logits, packed)


@every_case
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(model_type, overrides, use_reentrant):
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    gradients = []
    for checkpointing in (False, True):
        model = build(model_type, overrides).train()
        if checkpointing:
            # transformers 5.24 warns of the older name
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
            with pytest.raises(ValueError, match="past_key_values must be None"):
                model(ids, past_key_values=Cache())
        model(ids, labels=ids, attention_mask=mask).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for (name, _), plain, checkpointed in zip(model.named_parameters(), *gradients, strict=True):
        assert checkpointed is not None and torch.equal(plain, checkpointed), name


@every_type
def test_tied_weights(model_type):
    model = build(model_type, {"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(tokens(1, 4)).logits.shape[-1] == 70
    ids = tokens(1, 6)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@types_where(lambda causal_lm: not hasattr(causal_lm, "reset_parameters"))
def test_fresh_weights(model_type):
    """normal(0, initializer_range), biases 0, norms 1, where a model has no rules of its own."""
    causal_lm = REGISTRY[model_type]
    config = tiny_config(model_type, hidden_size=128, vocab_size=500)
    model = causal_lm(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d) and module.weight.numel() > 4000:
            assert abs(module.weight.std() / config.initializer_range - 1) < 0.1, name
            assert abs(module.weight.mean()) < 0.1 * config.initializer_range, name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), name
        if "Norm" in type(module).__name__:
            assert (module.weight == 1).all(), name


@every_type
def test_a_model_without_memory(model_type):
    """On the meta device, where there is nothing to draw, a model has the same parameters."""
    causal_lm, config = REGISTRY[model_type], tiny_config(model_type)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in causal_lm(config).state_dict().items()}
    assert shapes == {k: v.shape for k, v in causal_lm(config).state_dict().items()}


def test_feature_maps_keep_their_own_initialisation():
    """Hedgehog's layer starts as the identity, whatever the rule for linear layers is."""
    config = tiny_config("linear_attn", feature_map="hedgehog")
    layer = REGISTRY["linear_attn"](config).model.layers[0].attn.feature_map_q.layer
    assert torch.equal(layer.weight, torch.eye(16))


@every_type
@pytest.mark.parametrize("packed", [False, *exhaustive(True)])
def test_training_step_is_one_graph(model_type, packed):
    one_graph(build(model_type, {"num_hidden_layers": 1}), packed)


def test_packed_training_step_of_a_hybrid_is_one_graph():
    linear = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True}
    one_graph(build("gla", {"num_hidden_layers": 2, "attn": HYBRID, **linear}), packed=True)


def one_graph(model, packed):
    ids, cu_seqlens = tokens(1 if packed else 2, 20), torch.tensor([0, 7, 20]) if packed else None
    inputs = {"input_ids": ids, "labels": ids, "cu_seqlens": cu_seqlens}
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(compiled.loss, model(**inputs).loss)
    compiled.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def exports_for_every_length(model):
    """Every batch size, and every number of tokens that is larger than the width of the short convolutions."""
    least = max((8 for module in model.modules() if isinstance(module, ShortConvolution)), default=2)
    sizes = {"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=least, max=512)}}
    with torch.no_grad():
        exported = torch.export.export(model, (tokens(2, 20),), dynamic_shapes=sizes).module()
        for shape in ((3, least), (2, 70)):
            ids = tokens(*shape)
            torch.testing.assert_close(exported(ids).logits, model(ids, use_cache=False).logits)


def has_an_op(causal_lm):
    """Whether the mixer calls an op: a loop over tokens in Python has no program for every length."""
    mixer = getattr(causal_lm.block_cls, "mixer_cls", None)
    return mixer is Attention or bool(getattr(mixer, "forms", None))


@types_where(has_an_op)
def test_exports_for_every_length(model_type):
    exports_for_every_length(build(model_type, {"num_hidden_layers": 1}))


def test_a_hybrid_exports_for_every_length():
    window = {"layers": [1], "num_heads": 4, "window_size": 30}
    exports_for_every_length(build("gla", {"num_hidden_layers": 2, "attn": window}))


BAD_CALLS = {
    "nothing": ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "both": ({"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, ValueError, "exactly one of"),
    "rank": ({"input_ids": tokens(4)}, ValueError, r"input_ids must have shape \[B, T\]"),
    "embeds_rank": ({"inputs_embeds": torch.zeros(4, 32)}, ValueError, "inputs_embeds must have shape"),
    "packed_batch": ({"input_ids": tokens(2, 4), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens"),
    "packed_end": ({"input_ids": tokens(1, 4), "cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must end"),
    "mask_rank": ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, ValueError, "attention_mask"),
    "mask_short": ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask"),
    "mask_long": ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 5)}, ValueError, "attention_mask"),
    "mask_values": (
        {"input_ids": tokens(1, 2), "attention_mask": torch.tensor([[0.0, -1e9]])},
        ValueError,
        "attention_mask must be 1 at a token and 0 at padding, got -1",
    ),
    "labels": ({"input_ids": tokens(1, 4), "labels": tokens(1, 3)}, ValueError, "labels must have shape"),
    "typo": (
        {"input_ids": tokens(1, 4), "atention_mask": None},
        TypeError,
        r"atention_mask \(did you mean attention_mask\?\)",
    ),
    "cache": ({"input_ids": tokens(1, 4), "past_key_values": ((),)}, ValueError, "past_key_values must be"),
    "lists": ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be an integer tensor .*got list"),
    "floats": ({"input_ids": torch.zeros(1, 4)}, TypeError, "input_ids must be an integer tensor"),
    "beyond": ({"input_ids": torch.tensor([[1, VOCAB]])}, ValueError, rf"input_ids must lie in \[0, {VOCAB}\)"),
    "embeds_list": ({"inputs_embeds": [[[1.0]]]}, TypeError, "inputs_embeds must be a tensor"),
    "embeds_width": (
        {"inputs_embeds": torch.zeros(1, 4, 7)},
        ValueError,
        "inputs_embeds must have shape .*hidden_size",
    ),
    "labels_list": ({"input_ids": tokens(1, 2), "labels": [[1, 2]]}, TypeError, "labels must be an integer tensor"),
    "labels_beyond": (
        {"input_ids": tokens(1, 2), "labels": torch.tensor([[1, VOCAB]])},
        ValueError,
        rf"labels must lie in \[0, {VOCAB}\) or be -100, got {VOCAB}",
    ),
    "packed_list": (
        {"input_ids": tokens(1, 4), "cu_seqlens": [0, 4]},
        TypeError,
        "cu_seqlens must be an int32 or int64",
    ),
    "packed_list_q": (
        {"input_ids": tokens(1, 4), "cu_seq_lens_q": [0, 4]},
        TypeError,
        "cu_seq_lens_q must be an int32",
    ),
    "positions_list": ({"input_ids": tokens(1, 2), "position_ids": [0, 1]}, TypeError, "position_ids must be"),
    "positions_floats": (
        {"input_ids": tokens(1, 2), "position_ids": torch.tensor([[0.0, 1.0]])},
        TypeError,
        "position_ids must be an integer tensor",
    ),
    "sequences_bools": (
        {"input_ids": tokens(1, 2), "seq_idx": torch.tensor([[True, False]])},
        TypeError,
        "seq_idx must be an integer tensor",
    ),
    "positions_short": (
        {"input_ids": tokens(1, 4), "position_ids": torch.tensor([[0, 1]])},
        ValueError,
        "position_ids must have shape",
    ),
    "two_caches": (
        {"input_ids": tokens(1, 4), "past_key_values": Cache(), "cache": Cache()},
        ValueError,
        "past_key_values and cache are two names",
    ),
}


@every_type
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(model_type, case):
    inputs, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        build(model_type)(**inputs)


@every_type
def test_redundant_keywords_are_accepted(model_type):
    model, ids = build(model_type), tokens(1, 6)
    assert torch.equal(model(ids, position_ids=torch.arange(6)[None]).logits, model(ids).logits)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    collated = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 4, "max_length_k": 4}
    logits = model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), use_cache=False, **collated).logits
    assert torch.equal(logits, model(ids, cu_seqlens=cu, use_cache=False).logits)
