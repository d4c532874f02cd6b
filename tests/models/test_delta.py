"""What is special about the models over the delta rule: loading their decays, and decoding at the borders of chunks."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from fla.layers._decay import LearnedDecay
from fla.layers._delta import DeltaMixer
from fla.models import KDAConfig
from fla.models.utils import Cache
from fla.testing import assert_within_budget

from .tiny import REGISTRY, build, tiny_config, tokens, types_where

every_decaying = types_where(lambda causal_lm: issubclass(causal_lm.block_cls.mixer_cls, LearnedDecay))
every_delta = types_where(lambda causal_lm: issubclass(causal_lm.block_cls.mixer_cls, DeltaMixer))


def decays(model):
    return {name: p for name, p in model.named_parameters() if name.endswith((".A_log", ".dt_bias"))}


@every_decaying
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_are_loaded_and_never_drawn_again(model_type, dtype, tmp_path):
    """All weights as they were saved, in a model of either dtype; the decays in float32, without weight decay."""
    model = build(model_type)
    model.save_pretrained(tmp_path)
    for load, saved in ((AutoModelForCausalLM, model), (AutoModel, model.base_model)):
        loaded = load.from_pretrained(tmp_path, dtype=dtype)
        for (name, weight), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(weight.to(other.dtype), other), name
        assert decays(loaded) and all(p.dtype == torch.float32 for p in decays(loaded).values())
        assert all(p._no_weight_decay for p in decays(loaded).values())
        kept = {name: p.clone() for name, p in decays(loaded).items()}
        loaded.init_weights()
        assert all(torch.equal(p, kept[name]) for name, p in decays(loaded).items())


@every_decaying
def test_decays_of_a_bfloat16_model_are_drawn_in_float32(model_type):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and decays(model)
    for name, p in decays(model).items():
        assert p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, p.bfloat16().float()), name
    with torch.device("meta"):
        on_meta = decays(REGISTRY[model_type](tiny_config(model_type)))
    assert {name: p.dtype for name, p in on_meta.items()} == dict.fromkeys(decays(model), torch.float32)


def test_a_checkpoint_of_the_first_release_loads(tmp_path):
    """Which has `D`, a weight without effect, in every layer."""
    model = build("gated_deltanet")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    unused = {f"model.layers.{i}.attn.D": torch.ones(2) for i in range(3)}
    save_file(load_file(file) | unused, file, metadata={"format": "pt"})
    for load, saved in ((AutoModelForCausalLM, model), (AutoModel, model.base_model)):
        loaded = load.from_pretrained(tmp_path)
        assert all(torch.equal(x, y) for x, y in zip(saved.parameters(), loaded.parameters(), strict=True))
    save_file(load_file(file) | {"model.layers.0.attn.E": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected keys: model\.layers\.0\.attn\.E$"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@every_delta
@pytest.mark.parametrize("seen", [64, 128])
def test_one_token_after_whole_chunks(model_type, seen):
    """A restored state and one token, by the chunk and by the recurrent form: the token that the whole row gives."""
    model, ids = build(model_type), tokens(2, seen + 1)
    with torch.no_grad():
        reference, whole = (m(ids).logits[:, -1] for m in (copy.deepcopy(model).double(), model))
        snapshot = model(ids[:, :-1]).past_key_values.to_legacy_cache()
    for grad in (True, False):  # short calls that record no gradient take the recurrent form
        with torch.set_grad_enabled(grad):
            logits = model(ids[:, -1:], past_key_values=Cache.from_legacy_cache(snapshot, seen)).logits[:, -1]
        assert_within_budget("one token", logits.detach(), reference, whole)
        assert torch.equal(logits.argmax(-1), reference.argmax(-1))


def test_a_safe_gate_needs_a_bound():
    with pytest.raises(ValueError, match=r"^lower_bound must be of at least -5 and below 0"):
        KDAConfig(safe_gate=True)
    KDAConfig(safe_gate=True, lower_bound=-5.0)
