"""Every model on the GPU: the loss, every gradient and the greedy tokens of the same weights on the CPU."""

import copy

import pytest
import torch

from fla.testing import assert_within_budget
from tests.models.tiny import build, every_case, tokens


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@every_case
def test_as_on_the_cpu(model_type, overrides):
    model, ids = build(model_type, overrides), tokens(2, 70)
    exact, naive = gradients(copy.deepcopy(model).double(), ids), gradients(copy.deepcopy(model), ids)
    found = gradients(model.to("cuda"), ids.to("cuda"))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        # the errors of some ten operators add up, and a GPU rounds otherwise: eight times the constant of one op
        assert_within_budget(name, value.cpu(), exact[name], naive[name], 16.0, torch.float32, backend="triton")


@every_case
def test_greedy_tokens(model_type, overrides):
    model, ids = build(model_type, overrides).double(), tokens(2, 20)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **greedy)
    found = model.to("cuda").float().generate(ids.to("cuda"), **greedy)
    assert found.tolist() == expected.tolist()
