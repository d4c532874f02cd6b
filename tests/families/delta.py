"""The family `delta` in tests: its ops, and calls of them without a state."""

import pytest
import torch

from fla.ops import chunk_gated_delta_rule, chunk_kda, fused_recurrent_gated_delta_rule, fused_recurrent_kda
from fla.ops._spec import REGISTRY
from fla.testing import make_inputs

OPS = ("delta_rule", "gated_delta_rule", "kda")
GATED = {
    "gated_delta_rule": (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule),
    "kda": (chunk_kda, fused_recurrent_kda),
}
each_gated = pytest.mark.parametrize("op", GATED)


def variant(op, name):
    return next(v for v in REGISTRY[op].variants if v.name == name)


def inputs(op, name="default", T=7, dtype=torch.float32, **sizes):
    """Tensors of a call, without a state."""
    made = make_inputs(REGISTRY[op], {"T": T, **sizes}, dtype, variant=variant(op, name))
    return {key: x for key, x in made.items() if key != "initial_state"}


def same(one, other, dtype=torch.float64):
    """Equal but for rounding of this dtype."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def with_gradients(function, x, **settings):
    """The output, and the gradient of every tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    o, _ = function(**leaves, **settings)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    return o.detach(), dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), weights), strict=True))
