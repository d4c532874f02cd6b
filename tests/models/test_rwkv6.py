"""What is special about RWKV-6's model: two token shifts, its weights' names and initial values."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fla.models import RWKV6Config, RWKV6ForCausalLM
from fla.models.utils import Cache
from fla.testing import assert_within_budget

from .test_loading import assert_equal_models
from .tiny import build, tiny_config, tokens


def test_greedy_after_prompts_of_all_lengths():
    """Every token is the likeliest one of a forward over all that stand before it, without a cache."""
    model = build("rwkv6", {"num_hidden_layers": 2})
    for length in (1, 2, 20):
        ids = model.generate(tokens(1, length), max_new_tokens=24)
        assert ids.shape == (1, length + 24)
        with torch.no_grad():
            likeliest = model(ids, use_cache=False).logits.argmax(-1)
        assert torch.equal(ids[:, length:], likeliest[:, length - 1 : -1]), length


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_a_pack_are_those_of_its_rows(use_reentrant):
    """Neither token shift looks over a border when gradient checkpointing runs each block twice."""
    lengths = [7, 1, 16]
    parts = [tokens(1, n, seed=n) for n in lengths]
    packed = build("rwkv6").train()
    # transformers 5.24 warns of the older name
    enable = getattr(packed, "activation_checkpointing_enable", packed.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.randn(1, sum(lengths), packed.config.vocab_size)
    (packed(torch.cat(parts, 1), cu_seqlens=cu_seqlens).logits * weights).sum().backward()

    def separate(dtype):
        model = build("rwkv6").to(dtype).train()
        pieces = zip(parts, weights.split(lengths, 1), strict=True)
        sum((model(part).logits * w).sum() for part, w in pieces).backward()
        return [p.grad for p in model.parameters()]

    for (name, p), wide, naive in zip(
        packed.named_parameters(), separate(torch.float64), separate(torch.float32), strict=True
    ):
        assert_within_budget(name, p.grad, wide, naive, gate="w_proj" in name)


def test_the_cache_has_the_last_inputs_of_both_mixes():
    model, ids, seen = build("rwkv6"), tokens(2, 6), {}
    block = model.model.layers[1]
    for name in ("attn", "ffn"):
        getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    cache = model(ids).past_key_values
    assert isinstance(cache, Cache) and {"recurrent_state", "attn_shift", "ffn_shift"} == set(cache[1])
    for name, x in seen.items():
        assert torch.equal(cache[1][f"{name}_shift"], x[:, -1])


@pytest.mark.parametrize("vocab_size", [200, 20])
def test_initial_weights(vocab_size):
    """The rules of the layers survive the model's own, which are for embeddings and head."""
    model = RWKV6ForCausalLM(tiny_config("rwkv6", vocab_size=vocab_size))
    embeddings, head = model.model.embeddings.weight, model.lm_head.weight.detach().double()
    assert 5e-5 < embeddings.abs().max() <= 1e-4
    square = head.T @ head if vocab_size > 32 else head @ head.T
    gain = 0.5 * max(1.0, (vocab_size / 32) ** 0.5)
    torch.testing.assert_close(square, gain**2 * torch.eye(len(square)).double(), rtol=0, atol=1e-5)
    for layer_idx, layer in enumerate(model.model.layers):
        left = 1 - layer_idx / 3
        ramp = 1 - (torch.arange(32) / 32) ** left
        for mu in (layer.attn.x_proj[0].mu, layer.ffn.key.mu, layer.ffn.receptance.mu):
            torch.testing.assert_close(mu, ramp)
        torch.testing.assert_close(layer.attn.g_norm.weight, torch.full((32,), ((layer_idx + 1) / 3) ** 0.7))
        assert layer.attn.w_proj.linear.lora[2].bias.std() > 1 and layer.attn.bonus.any()
        assert not layer.ffn.value.weight.any() and not layer.attn.o_proj.weight.any()
        assert layer.ffn.key.linear.weight.any() and (layer.ffn_norm.weight == 1).all()


def test_loading_draws_nothing(tmp_path, monkeypatch):
    """A new model draws every orthogonal matrix once. What comes from a checkpoint is not drawn at all."""
    drawn = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x, *args: drawn.append(x.device.type) or qr(x, *args))
    model = build("rwkv6")
    assert len(drawn) == 3 * (4 + 1) + 1  # r, k, v, g and the channel mix's keys; the head
    model.save_pretrained(tmp_path)
    drawn.clear()
    assert_equal_models(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert not [device for device in drawn if device != "meta"]


def test_number_of_parameters():
    """That of the reference's model of January 2025."""
    with torch.device("meta"):
        model = RWKV6ForCausalLM(RWKV6Config(num_hidden_layers=2, vocab_size=320))
    assert sum(p.numel() for p in model.parameters()) == 103_747_584


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fuse_swiglu": False}, ValueError, "fuse_swiglu must be True"),
        ({"group_norm_eps": "1e-5"}, TypeError, "group_norm_eps must be a number"),
        ({"proj_low_rank_dim": 0}, ValueError, "proj_low_rank_dim must be at least 1"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=f"^{message}"):
        RWKV6Config(**fields)
