"""Which derivatives exist: first ones, in reverse mode. Every other one raises and names the op."""

import pytest
import torch
from torch.autograd import forward_ad

from fla.testing import TORCH, plain_cases
from fla.testing.errors import good_call
from tests.ops.suite import every_op

each_case = pytest.mark.parametrize("case", every_op(lambda spec: plain_cases(spec, TORCH, tokens=5), TORCH), ids=str)


def calling(case):
    """The case as a function of its first tensor, and that tensor."""
    keywords = good_call(case)
    first = next(iter(case.spec.shapes))
    x = keywords.pop(first)
    return lambda x: case.function(**{first: x}, **keywords)[0], x, case.function.__name__


@each_case
def test_a_second_derivative_that_reaches_the_op_raises(case):
    """It raises whether or not the loss is linear in the output, and whether or not the tensor is a leaf."""
    function, x, name = calling(case)
    x.requires_grad_()
    for loss in (torch.sum, lambda o: o.square().sum()):
        (dx,) = torch.autograd.grad(loss(function(x * 1)), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}.* cannot be differentiated again"):
            torch.autograd.grad(dx.sum(), x)
    with pytest.raises(RuntimeError, match=name):
        torch.autograd.functional.hessian(lambda x: function(x).square().sum(), x.detach())


def test_other_inputs_too():
    """The gradient of one input is a function of the others, for a backend that keeps something in their place too."""
    from fla.ops import chunk_gla

    x = [torch.randn(1, 5, 1, 4, requires_grad=True) for _ in range(3)]
    g = torch.full((1, 5, 1, 4), -0.1, requires_grad=True)
    for d in torch.autograd.grad(chunk_gla(*x, g)[0].sum(), x, create_graph=True):
        for other in (*x, g):
            with pytest.raises(RuntimeError, match="chunk_gla"):
                torch.autograd.grad(d.sum(), other, retain_graph=True)


def test_create_graph_alone_is_legal():
    """So are penalties on gradients that do not lead through the op."""
    from fla.ops import chunk_linear_attn

    x, w = torch.randn(1, 5, 1, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    loss = (chunk_linear_attn(x, x, x, normalize=False)[0] * w).tanh().sum()
    dx, dw = torch.autograd.grad(loss, (x, w), create_graph=True)
    assert dx.requires_grad
    (penalty,) = torch.autograd.grad(dw.square().sum(), w)
    assert penalty.abs().sum() > 0


@each_case
def test_transforms_and_forward_mode_name_the_op(case):
    function, x, name = calling(case)
    for transform, given in ((torch.func.grad(lambda x: function(x).sum()), x), (torch.vmap(function), x[None])):
        with pytest.raises(RuntimeError, match=f"{name} cannot be transformed by torch.func"):
            transform(given)
    with forward_ad.dual_level():
        function(x)  # no tangent: nothing is lost
        with pytest.raises(RuntimeError, match=f"{name} has reverse-mode derivatives alone"):
            function(forward_ad.make_dual(x, x))


def test_training_after_inference_mode():
    """Nothing that an op keeps between calls was made in inference mode."""
    from fla.backends.decay import _retention_decay
    from fla.ops import chunk_retention

    _retention_decay.cache_clear()
    x = torch.randn(1, 5, 3, 4)
    with torch.inference_mode():
        chunk_retention(x, x, x)
    x.requires_grad_()
    chunk_retention(x, x, x)[0].sum().backward()
    assert x.grad is not None
