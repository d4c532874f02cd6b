"""What is special about RWKV-7's model: two token shifts, values that go between blocks, older keys, its weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from fla.models import RWKV7Config, RWKV7ForCausalLM
from fla.models.utils import Cache
from fla.testing import assert_within_budget

from .test_loading import FILE, assert_equal_models, rewrite
from .tiny import build, tiny_config, tokens

HYBRID = {"num_hidden_layers": 4, "attn": {"layers": [0, 2], "num_heads": 2}}


def test_greedy_after_prompts_of_all_lengths():
    """Every token is the likeliest one of a forward over all that stand before it, without a cache."""
    model = build("rwkv7", {"num_hidden_layers": 2})
    for length in (1, 2, 20):
        ids = model.generate(tokens(1, length), max_new_tokens=44)
        assert ids.shape == (1, length + 44)
        with torch.no_grad():
            likeliest = model(ids, use_cache=False).logits.argmax(-1)
        assert torch.equal(ids[:, length:], likeliest[:, length - 1 : -1]), length


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_a_pack_are_those_of_its_rows(use_reentrant):
    """Neither token shift looks over a border when gradient checkpointing runs each block twice."""
    lengths = [7, 1, 16]
    parts = [tokens(1, n, seed=n) for n in lengths]
    packed = build("rwkv7").train()
    # transformers 5.24 warns of the older name
    enable = getattr(packed, "activation_checkpointing_enable", packed.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.randn(1, sum(lengths), packed.config.vocab_size)
    (packed(torch.cat(parts, 1), cu_seqlens=cu_seqlens).logits * weights).sum().backward()

    def separate(dtype):
        model = build("rwkv7").to(dtype).train()
        pieces = zip(parts, weights.split(lengths, 1), strict=True)
        sum((model(part).logits * w).sum() for part, w in pieces).backward()
        return [p.grad for p in model.parameters()]

    for (name, p), wide, naive in zip(
        packed.named_parameters(), separate(torch.float64), separate(torch.float32), strict=True
    ):
        assert_within_budget(name, p.grad, wide, naive, gate="w_lora" in name or "x_w" in name)


def test_values_come_from_the_first_layer_that_has_some():
    layers = build("rwkv7", HYBRID).model.layers
    assert [hasattr(layer.attn, "v_lora") for layer in layers] == [False, True, False, True]
    assert layers[1].attn.v_lora is None and layers[3].attn.v_lora is not None
    assert [layer.attn.v_lora is None for layer in build("rwkv7").model.layers] == [True, False, False]


def test_the_first_norm_replaces_the_stream():
    model, ids = build("rwkv7"), tokens(1, 6)
    block = model.model.layers[0]
    x = block.pre_norm(model.model.embeddings(ids))
    x = x + block.attn(block.attn_norm(x))[0]
    x = x + block.ffn(block.ffn_norm(x))
    torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[1], x)
    assert not any("pre_norm" in key for key in build("rwkv7", {"norm_first": False}).state_dict())
    assert not any(
        "norm.bias" in key and "g_norm" not in key for key in build("rwkv7", {"norm_bias": False}).state_dict()
    )


def test_the_cache_has_the_last_inputs_of_both_mixes():
    model, ids, seen = build("rwkv7"), tokens(2, 6), {}
    block = model.model.layers[1]
    for name in ("attn", "ffn"):
        getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    cache = model(ids).past_key_values
    assert isinstance(cache, Cache) and {"recurrent_state", "attn_shift", "ffn_shift"} == set(cache[1])
    for name, x in seen.items():
        assert torch.equal(cache[1][f"{name}_shift"], x[:, -1])


def test_one_matrix_in_place_of_six_vectors_loads(tmp_path):
    """Keys of January 2025 load as later ones do, and saving writes the later ones."""
    model = build("rwkv7", HYBRID)
    model.save_pretrained(tmp_path)

    def older(tensors):
        for key in [key for key in tensors if key.endswith("attn.x_r")]:
            rows = [tensors.pop(f"{key[:-1]}{name}").flatten() for name in "rwkvag"]
            tensors[f"{key[:-1]}x"] = torch.stack(rows)

    written = set(load_file(tmp_path / FILE))
    rewrite(tmp_path, older)
    assert len(load_file(tmp_path / FILE)) == len(written) - 2 * 5
    for auto, ours in ((AutoModelForCausalLM, model), (AutoModel, model.base_model)):
        assert_equal_models(ours, auto.from_pretrained(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / FILE)) == written
    assert_equal_models(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    plain = build("rwkv7", HYBRID, seed=5)
    plain.load_state_dict(load_file(tmp_path / FILE))
    assert_equal_models(model, plain)
    rewrite(tmp_path, lambda t: t.update({k: v[:5].contiguous() for k, v in t.items() if k.endswith("x_x")}))
    with pytest.raises(ValueError, match=r"missing keys: .*attn\.x_w.*mismatched keys: .*attn\.x_r \[5, 32\] instead"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("vocab_size", [200, 20])
def test_initial_weights(vocab_size):
    """The rules of the layers survive the model's own, which are for embeddings and head."""
    model = RWKV7ForCausalLM(tiny_config("rwkv7", vocab_size=vocab_size))
    embeddings, head = model.model.embeddings.weight, model.lm_head.weight.detach().double()
    assert 5e-5 < embeddings.abs().max() <= 1e-4 and abs(embeddings.mean()) < 1e-5
    square = head.T @ head if vocab_size > 32 else head @ head.T
    gain = 0.5 * max(1.0, (vocab_size / 32) ** 0.5)
    torch.testing.assert_close(square, gain**2 * torch.eye(len(square)).double(), rtol=0, atol=1e-5)
    for layer_idx, layer in enumerate(model.model.layers):
        torch.testing.assert_close(layer.attn.g_norm.weight, torch.full((32,), ((layer_idx + 1) / 3) ** 0.7))
        assert (layer.attn.k_a == 1.02).all() and layer.attn.w_lora.lora[2].bias.std() > 1
        assert not layer.ffn.value.weight.any() and not layer.attn.o_proj.weight.any()
        assert layer.ffn.key.weight.any() and (layer.ffn_norm.weight == 1).all()


def test_loading_draws_nothing(tmp_path, monkeypatch):
    """A new model draws every orthogonal matrix once. What comes from a checkpoint is not drawn at all; the rest is."""
    drawn = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x, *args: drawn.append((x.shape, x.device.type)) or qr(x, *args))
    model = build("rwkv7")
    # r, k, v, the second matrices of three low-rank projections and of v's in two layers, keys; the head
    assert len(drawn) == 3 * (3 + 3 + 1) + 2 + 1
    model.save_pretrained(tmp_path)
    drawn.clear()
    assert_equal_models(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert not [shape for shape, device in drawn if device != "meta"]
    wider = AutoModelForCausalLM.from_pretrained(tmp_path, intermediate_size=64, ignore_mismatched_sizes=True)
    assert [shape for shape, device in drawn if device != "meta"] == [(64, 32)] * 3
    for layer, ours in zip(wider.model.layers, model.model.layers, strict=True):
        assert layer.ffn.key.weight.any() and not layer.ffn.value.weight.any()
        assert torch.equal(layer.ffn.x_k, ours.ffn.x_k) and torch.equal(
            layer.attn.o_proj.weight, ours.attn.o_proj.weight
        )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_heads": 4}, ValueError, r"head_dim \* num_heads must be hidden_size=2048, got 64 \* 4"),
        ({"head_dim": None}, ValueError, "head_dim or num_heads must be given"),
        ({"value_dim": [2048] * 23 + [4096]}, ValueError, "value_dim must be the same for every layer"),
        ({"value_dim": [2048.0] * 24}, TypeError, "value_dim must be an int"),
        ({"fuse_swiglu": False}, ValueError, "fuse_swiglu must be True"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=f"^{message}"):
        RWKV7Config(**fields)


def test_number_of_parameters():
    """That of the reference's model of January 2025."""
    with torch.device("meta"):
        model = RWKV7ForCausalLM(RWKV7Config(num_hidden_layers=2, vocab_size=320))
    assert sum(p.numel() for p in model.parameters()) == 104_220_672


def test_fields_that_follow_from_others():
    assert (RWKV7Config().num_heads, RWKV7Config(head_dim=None, num_heads=16).head_dim) == (32, 128)
    config = RWKV7Config(value_dim=[4096] * 24)
    assert config.value_dim == 4096 and RWKV7Config.from_dict(config.to_dict()).value_dim == 4096
    assert RWKV7Config(attn={"layers": [0, 1], "num_heads": 4}).v_first_layer == 2
