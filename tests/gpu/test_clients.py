"""Programs that call us, on the GPU: models of transformers in float32 and bfloat16, packed rows, trainers' calls."""

import pytest
import torch

from fla.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tests.clients import checks
from tests.clients.calls import CALLS
from tests.clients.test_transformers import CAUSAL, PACKED
from tests.clients.tiny import MODELS, marked


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """transformers' own convolution is cuDNN's, which rounds float32 to fewer digits by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", marked(MODELS))
def test_as_without_us(name):
    checks.check_padded(name, device="cuda")


@pytest.mark.parametrize("name", marked(["qwen3_5_text", "kimi_linear"]))
def test_bfloat16(name):
    checks.check_padded(name, device="cuda", tokens=130, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", marked(CAUSAL))
def test_greedy_tokens(name):
    checks.check_generation(name, device="cuda")


@pytest.mark.parametrize("name, packing", marked(PACKED))
def test_packed_is_separate(name, packing):
    checks.check_packed(name, packing, device="cuda")


@pytest.mark.touches("gated_delta_rule", "kda")
@pytest.mark.parametrize("client", CALLS)
def test_calls(client):
    CALLS[client]("cuda")


def test_the_convolution_provided():
    """As on a CPU, forward, backward and a step, with bounds and with numbers of sequences."""
    x, weight = torch.randn(1, 5, 10), torch.randn(5, 4)
    ids = torch.tensor([[4, 4, 4, 0, 7, 7, 7, 7, 7, 7]], dtype=torch.int32)
    packing = {"seq_idx": ids, "cu_seq_lens_q": torch.tensor([0, 3, 4, 10], dtype=torch.int32)}
    found = {}
    for device in ("cpu", "cuda"):
        leaf, state = x.to(device).requires_grad_(), torch.ones(1, 5, 4, device=device)
        rows = [
            causal_conv1d_fn(leaf, weight.to(device), activation="silu", **{name: value.to(device)})
            for name, value in packing.items()
        ]
        step = causal_conv1d_update(leaf[..., :1].detach(), state, weight.to(device))
        found[device] = [*rows, torch.autograd.grad(rows[0].sum(), leaf)[0], step, state]
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(one.cpu(), other)
