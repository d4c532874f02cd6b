"""The loss of a causal LM: any head, any number of targets, any criterion."""

import copy

import pytest
import torch
from torch import nn

from fla.models import _loss
from fla.modules import FusedLinearCrossEntropyLoss

from .tiny import build, every_type, tokens

PATHS = {
    "unfused": {"fuse_cross_entropy": False},
    "fused": {},
    "linear": {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True},
}


class Adapter(nn.Module):
    """What peft puts in the place of a head: it has the attributes of the head, and adds a product of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def adapt(model):
    torch.manual_seed(3)
    model.lm_head = Adapter(model.lm_head)


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def offload(model):
    """Offload as accelerate does: the weight is on the meta device except during a call."""
    head, weight = model.lm_head, model.lm_head.weight
    del head._parameters["weight"]
    head.register_parameter("weight", nn.Parameter(torch.empty(weight.shape, device="meta")))
    head.kept = [weight]
    head.forward = lambda x: x @ weight.T


class Quantised(torch.Tensor):
    """A tensor class of its own, such as DTensor or those of quantisation."""


def subclass(model):
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.detach().as_subclass(Quantised))


def criterion_of(path):
    return FusedLinearCrossEntropyLoss if path == "linear" else nn.CrossEntropyLoss


def loss_and_gradients(model, **inputs):
    loss = model(**inputs).loss
    loss.backward()
    kept = getattr(model.lm_head, "kept", [])
    return loss.detach(), [p.grad for p in [*model.parameters(), *kept] if p.device.type != "meta"]


@pytest.mark.parametrize("head", [adapt, hook, offload, subclass], ids=lambda head: head.__name__)
def test_the_head_decides(head, monkeypatch):
    """A module in the place of a plain head is called, not bypassed; the log says that the fused loss is not used."""
    said, ids, results = [], tokens(2, 9), []
    monkeypatch.setattr(_loss.logger, "warning_once", said.append)
    for path in ("fused", "linear"):
        model = build("gla", PATHS[path])
        head(model)
        assert not said
        results.append(loss_and_gradients(model, input_ids=ids, labels=ids))
    assert model(ids, labels=ids).logits is None  # as the config asks for
    assert said and said[0].startswith("fuse_linear_cross_entropy has no effect: lm_head is more than an nn.Linear")
    (expected, expected_gradients), (loss, gradients) = results
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("unit", ["head", "model"])
def test_sharded_by_fsdp2(unit):
    """A head that is a unit of its own gathers its weight only while it is called; the model's root unit all along."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    ids, gradients = tokens(2, 9), []
    expected, wanted = loss_and_gradients(build("gla"), input_ids=ids, labels=ids)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), build("gla", PATHS["linear"])
        if unit == "head":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss, gradients = loss_and_gradients(model, input_ids=ids, labels=ids)
        assert isinstance(model.lm_head.weight, DTensor)
        torch.testing.assert_close(loss, expected)
        for gradient, plain in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient.full_tensor(), plain)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5), torch.tensor(0)], ids=str)
def test_no_target_is_a_loss_of_zero(path, items):
    """A micro-batch without a target adds nothing to its step, rather than 0 / 0."""
    ids = tokens(2, 6)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 3  # predicted by nothing
    for criterion in (None,) if items is None else (None, criterion_of(path)()):  # a caller's mean is the caller's
        model = build("gla", PATHS[path])
        model.criterion = criterion
        loss, gradients = loss_and_gradients(model, input_ids=ids, labels=labels, num_items_in_batch=items)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients)


@every_type
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_of_items_is_a_sum(model_type, path):
    model, ids = build(model_type, PATHS[path]), tokens(2, 9)
    labels = ids.clone()
    labels[0, 4:] = -100
    mean, mean_gradients = loss_and_gradients(model, input_ids=ids, labels=labels)
    targets = int((labels[:, 1:] != -100).sum())
    for criterion in (None, criterion_of(path)(reduction="mean"), criterion_of(path)(reduction="sum")):
        other = build(model_type, PATHS[path])
        other.criterion = criterion
        loss, gradients = loss_and_gradients(other, input_ids=ids, labels=labels, num_items_in_batch=2 * targets)
        torch.testing.assert_close(loss, mean / 2)
        for gradient, whole in zip(gradients, mean_gradients, strict=True):
            torch.testing.assert_close(gradient, whole / 2)


def test_own_criterion_of_a_head_that_must_be_called():
    model, ids = build("gla", PATHS["linear"]), tokens(1, 6)
    model.criterion = FusedLinearCrossEntropyLoss(label_smoothing=0.1, logit_scale=0.5, logit_softcapping=3.0)
    expected = model(ids, labels=ids).loss
    called = copy.deepcopy(model)
    called.lm_head.register_forward_hook(lambda module, args, output: output + 0)
    torch.testing.assert_close(called(ids, labels=ids).loss, expected)
    called.criterion = nn.Identity()
    with pytest.raises(ValueError, match=r"criterion must be .* lm_head \(Linear\) has to be called, got Identity"):
        called(ids, labels=ids)
