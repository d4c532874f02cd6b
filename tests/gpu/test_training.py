"""The default GLA, RetNet and LinearAttention, but for two layers and a small vocabulary, learn on the GPU in bf16."""

import pytest
import torch

from fla import use_backend
from fla.backends.triton import decay
from fla.models import (
    GLAConfig,
    GLAForCausalLM,
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
    RetNetConfig,
    RetNetForCausalLM,
)
from fla.testing import assert_within_budget

MODELS = (
    (GLAConfig, GLAForCausalLM),
    (RetNetConfig, RetNetForCausalLM),
    (LinearAttentionConfig, LinearAttentionForCausalLM),
)
DECAY_GATES = ("gk_proj",)  # their gradient passes through that of a log decay, whose budget is wider


def gradients(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def forwards(monkeypatch):
    """A list of the problems that the Triton backend is given from here on."""
    seen: list = []
    forward = decay.forward
    monkeypatch.setattr(decay, "forward", lambda problem, *rest: (seen.append(problem), forward(problem, *rest))[1])
    return seen


@pytest.mark.parametrize("config_class, model_class", MODELS, ids=lambda x: x.__name__)
def test_default_heads_train(config_class, model_class, forwards):
    """Three steps on one batch: every loss is below the last. First, all gradients against the torch backend in
    float32, with the torch backend in bf16 as the naive result."""
    config = config_class(num_hidden_layers=2, vocab_size=256, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = model_class(config).to("cuda", torch.bfloat16)
    tokens = torch.randint(256, (2, 300), device="cuda")
    with use_backend("torch"):
        naive = gradients(model, tokens)
        assert not forwards
        wide = model_class(config).to("cuda")
        wide.load_state_dict(model.state_dict())
        exact = gradients(wide, tokens)
    found = gradients(model, tokens)
    assert len(forwards) == 2 and {x.q.dtype for x in forwards} == {torch.bfloat16}
    assert found.keys() == exact.keys() == naive.keys()
    for name, gradient in found.items():
        gate = any(part in name for part in DECAY_GATES)
        assert_within_budget(name, gradient, exact[name].double(), naive[name], dtype=torch.bfloat16, gate=gate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(model(input_ids=tokens, labels=tokens).loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0], losses
