"""Checkpoints: save and load bitwise, both MLP layouts, and no key silently missing or left over."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fla.modules.mlp import GatedMLP

from .tiny import REGISTRY, build, every_case, every_gated, every_type, tokens

FILE = "model.safetensors"


def rewrite(folder, change):
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def assert_equal_models(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(a(tokens(2, 9))[0], b(tokens(2, 9))[0])


@every_case
def test_save_load_save_is_bitwise(model_type, overrides, tmp_path):
    model = build(model_type, overrides)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(model)
    assert_equal_models(model, again)
    again.save_pretrained(tmp_path / "b")
    for file in (FILE, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert type(config) is type(model.config)
    assert config.to_diff_dict() == model.config.to_diff_dict()
    assert_equal_models(model.base_model, AutoModel.from_pretrained(tmp_path / "a"))


@every_type
def test_shared_modules_and_tied_weights_survive(model_type, tmp_path):
    overrides = {"tie_word_embeddings": True}
    if hasattr(REGISTRY[model_type].config_class, "tie_feature_map_qk"):
        overrides |= {"tie_feature_map_qk": True, "feature_map": "hedgehog"}
    model = build(model_type, overrides)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(model, again)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@every_gated
def test_both_mlp_layouts_load_and_the_split_one_is_written(model_type, tmp_path):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    D, I = model.config.hidden_size, model.config.intermediate_size
    prefix = f"{model.base_model_prefix}.layers.0.{model.block_cls.names.mlp}"
    saved = load_file(tmp_path / FILE)
    assert saved[f"{prefix}.gate_proj.weight"].shape == saved[f"{prefix}.up_proj.weight"].shape == (I, D)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in saved.items()}
    fused = {k: v.clone() for k, v in model.state_dict().items() if ".up_proj." not in k}
    for name in list(fused):
        if ".gate_proj." in name:
            fused[name] = torch.cat((fused[name], saved[name.replace("gate", "up")]))
    for layout in (saved, fused):
        rewrite(tmp_path, lambda tensors, layout=layout: (tensors.clear(), tensors.update(layout)))
        for auto, ours in ((AutoModelForCausalLM, model), (AutoModel, model.base_model)):
            loaded = auto.from_pretrained(tmp_path)
            assert_equal_models(ours, loaded)
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        written = load_file(tmp_path / "again" / FILE)
        assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in saved.items()}
        plain = build(model_type, seed=5)  # and the plain load_state_dict
        plain.load_state_dict(layout)
        assert_equal_models(model, plain)


@every_type
def test_keys_that_do_not_fit_raise(model_type, tmp_path):
    model = build(model_type)
    final = f"{model.base_model_prefix}.{model.block_cls.names.norm}.weight"
    changes = {
        f"missing keys: {final}": lambda t: t.pop(final),
        "unexpected keys: extra.weight": lambda t: t.update({"extra.weight": torch.ones(1)}),
        f"mismatched keys: {final}": lambda t: t.update({final: torch.ones(7)}),
    }
    if isinstance(getattr(model.base_model.layers[1], model.block_cls.names.mlp, None), GatedMLP):
        head = f"{model.base_model_prefix}.layers.1.{model.block_cls.names.mlp}"
        changes[f"missing keys: {head}.up_proj.weight"] = lambda t: t.pop(f"{head}.up_proj.weight")
    changes["missing keys: lm_head.weight"] = lambda t: t.pop("lm_head.weight")
    for message, change in changes.items():
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(model.base_model, AutoModel.from_pretrained(tmp_path))  # the body needs no head
    rewrite(tmp_path, lambda t: t.pop(final))
    with pytest.raises(ValueError, match="missing keys: "):
        AutoModel.from_pretrained(tmp_path)


@every_type
def test_mismatched_sizes_can_be_asked_for(model_type, tmp_path):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    options = {"vocab_size": 70, "ignore_mismatched_sizes": True, "output_loading_info": True}
    wider, info = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert wider.lm_head.weight.shape[0] == 70
    assert {key[0] for key in info["mismatched_keys"]} == {"lm_head.weight", *wider_embeddings(wider)}
    kept = dict(model.named_parameters())
    for name, parameter in wider.named_parameters():
        assert parameter.shape[0] == 70 or torch.equal(parameter, kept[name]), name


def wider_embeddings(model):
    names = model.block_cls.names
    return [f"{names.model}.{names.embeddings}.weight"]


@pytest.mark.parametrize("model_type", ["gla", "retnet"])
@pytest.mark.parametrize("fuse_norm", [True, False])
def test_the_output_norm_loads_under_both_names(model_type, fuse_norm, tmp_path):
    model = build(model_type, {"fuse_norm": fuse_norm})
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, fuse_norm=not fuse_norm)
    name = "g_norm" if fuse_norm else "g_norm_swish_gate"
    assert getattr(other.model.layers[0].attn, name) is not None
    torch.testing.assert_close(other(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    other.save_pretrained(tmp_path / "other")
    assert f"model.layers.0.attn.{name}.weight" in load_file(tmp_path / "other" / FILE)


@every_type
def test_pickling(model_type):
    model = build(model_type)
    assert_equal_models(model, pickle.loads(pickle.dumps(model)))


@every_type
def test_low_precision(model_type, tmp_path):
    build(model_type).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = model(tokens(2, 9), labels=tokens(2, 9))
    assert output.logits.dtype == torch.bfloat16
    assert torch.isfinite(output.loss)
    output.loss.backward()
