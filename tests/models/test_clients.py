"""What other programs do with our models: the Trainer, pipelines, peft's prompts, loaders that set tensors by name.

None of those programs is needed: the tests do what they do.
"""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, load_model
from transformers import DynamicCache, TextGenerationPipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from fla.models._generation import CACHE_NAME
from fla.models.utils import Cache

from .tiny import REGISTRY, build, every_type, tiny_config, tokens


@every_type
def test_the_trainer_shifts_smoothed_labels(model_type):
    model, ids, smoothing = build(model_type), tokens(2, 9), 0.1
    trainer = SimpleNamespace(
        label_smoother=LabelSmoother(smoothing),
        compute_loss_func=None,
        model_accepts_loss_kwargs=True,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=1),
    )
    loss = Trainer.compute_loss(trainer, model, {"input_ids": ids, "labels": ids})
    log = model(ids).logits[:, :-1].log_softmax(-1)
    hit = log.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, -(1 - smoothing) * hit - smoothing * log.mean())


@every_type
def test_classes_are_in_the_tables_of_names(model_type, monkeypatch):
    causal_lm, said = REGISTRY[model_type], []
    assert causal_lm.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if model_type not in CONFIG_MAPPING_NAMES:  # else the Auto classes give transformers' own
        assert MODEL_FOR_CAUSAL_LM_MAPPING[causal_lm.config_class] is causal_lm
    pipeline = SimpleNamespace(model=build(model_type), task="text-generation")
    monkeypatch.setattr("transformers.pipelines.base.logger.error", said.append)
    TextGenerationPipeline.check_model_type(pipeline, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not said
    for names in (causal_lm._skip_keys_device_placement, causal_lm.config_class.keys_to_ignore_at_inference):
        assert {"past_key_values", "cache"} <= set(names)


def with_prompt(model, prompt, mask_dtype):
    """Make `generate` do what peft's prompt tuning does: embeddings before the first step's tokens, and a mask that
    covers them in the model's inputs but not in the loop's.
    """
    prepare = model.prepare_inputs_for_generation

    def prepare_with_prompt(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        cache, mask = inputs["past_key_values"], inputs["attention_mask"]
        rows = len(inputs["input_ids"])
        if cache is not None and cache.get_seq_length() >= inputs["input_ids"].shape[1]:
            inputs["input_ids"] = inputs["input_ids"][:, -1:]
        if mask is not None:
            inputs["attention_mask"] = torch.cat((torch.ones(rows, len(prompt), dtype=mask_dtype), mask), 1)
        if cache is None or not cache.get_seq_length():
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat((prompt.expand(rows, -1, -1), embeds), 1)
            inputs["input_ids"] = None
        return inputs

    model.prepare_inputs_for_generation = prepare_with_prompt
    return model


@every_type
@pytest.mark.parametrize("num_beams", [1, 2])
def test_prompt_tuning_with_a_cache_is_without(model_type, num_beams):
    model, ids = build(model_type), tokens(2, 4)
    with_prompt(model, torch.randn(5, model.config.hidden_size), torch.float32)
    for mask in (torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])):
        common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
        cached, whole = (model.generate(ids, use_cache=flag, pad_token_id=0, **common) for flag in (True, False))
        assert torch.equal(cached, whole)


def by_setting(model, tensors):
    """Load as accelerate does on the meta device: only keys that the model has, only tensors of the same shape."""
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        assert key in model.state_dict() and name in module._parameters
        assert getattr(module, name).shape == tensor.shape, key
        module._parameters[name] = torch.nn.Parameter(tensor)


def by_copying(model, tensors):
    """Load as vLLM does, and programs that read safetensors by hand."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            assert parameters[key].shape == tensor.shape, key
            parameters.pop(key).copy_(tensor)
    assert not parameters


def by_shards(model, tensors):
    """Load a file by several calls of `load_state_dict`, each with a part of the tensors."""
    for key, tensor in tensors.items():
        assert not model.load_state_dict({key: tensor}, strict=False).unexpected_keys


@every_type
@pytest.mark.parametrize("load", [by_setting, by_copying, by_shards, load_model], ids=lambda load: load.__name__)
def test_loaders_that_know_nothing_of_us(model_type, load, tmp_path):
    model, ids = build(model_type), tokens(2, 7)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with torch.device("meta" if load is by_setting else "cpu"):
        other = REGISTRY[model_type](tiny_config(model_type)).eval()
    load(other, file if load is load_model else load_file(file))
    assert torch.equal(other(ids).logits, model(ids).logits)


@every_type
def test_the_cache_has_two_names(model_type):
    """`past_key_values` until transformers 5.24, `cache` from then on: both are taken, everywhere."""
    model, ids = build(model_type), tokens(2, 6)
    prefix = getattr(model(ids[:, :4]), CACHE_NAME)
    expected, greedy = None, {"max_new_tokens": 3, "do_sample": False}
    for name in ("past_key_values", "cache"):
        for whole in (model, model.base_model):
            output = whole(ids[:, 4:], **{name: copy.deepcopy(prefix)})
            assert getattr(output, CACHE_NAME).get_seq_length() == 6
            if whole is model:
                expected = output.logits if expected is None else expected
                assert torch.equal(output.logits, expected)
        prepared = model.prepare_inputs_for_generation(ids, **{name: prefix})
        assert prepared["past_key_values"] is prefix and prepared["input_ids"].shape == (2, 2)
        given = model.generate(ids, **{name: copy.deepcopy(prefix)}, **greedy)
        assert torch.equal(given, model.generate(ids, use_cache=False, **greedy))
    with pytest.raises(ValueError, match="past_key_values and cache are two names"):
        model.generate(ids, cache=Cache(), past_key_values=DynamicCache(), **greedy)


@every_type
def test_positional_order(model_type):
    """The order is the reference's: its Transformer takes the cache before the embeddings, other models after them."""
    middle = ["inputs_embeds", "past_key_values"]
    if model_type == "transformer":
        middle.reverse()
    common = ["use_cache", "output_attentions", "output_hidden_states", "return_dict"]
    first = ["self", "input_ids", "attention_mask", *middle]
    causal_lm, ids = REGISTRY[model_type], tokens(1, 5)
    assert list(inspect.signature(causal_lm.model_cls.forward).parameters)[:9] == [*first, *common]
    orders = [*first, "labels", *common, "logits_to_keep"]
    assert list(inspect.signature(causal_lm.forward).parameters)[:11] == orders
    model = build(model_type)
    given = {"inputs_embeds": None, "past_key_values": getattr(model(ids[:, :3]), CACHE_NAME)}
    for whole in (model, model.base_model):
        cache = copy.deepcopy(given["past_key_values"])
        values = [cache if name == "past_key_values" else None for name in middle]
        named = whole(ids[:, 3:], past_key_values=copy.deepcopy(cache), return_dict=False)[0]
        assert torch.equal(whole(ids[:, 3:], None, *values, return_dict=False)[0], named)
