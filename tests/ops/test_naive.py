"""The naive functions that are not the recurrence agree with it, and are importable as `fla.ops.<op>.naive`."""

import importlib

import pytest
import torch

import fla.ops
from fla.ops._spec import REGISTRY
from fla.ops.retention import naive_retention
from fla.ops.simple_gla import naive_chunk_simple_gla, naive_parallel_simple_gla
from fla.testing import assert_within_budget, make_inputs


@pytest.mark.parametrize("name", REGISTRY)
def test_naive_alias(name):
    module = importlib.import_module(f"{REGISTRY[name].module}.naive")
    assert module.__all__ and all(callable(getattr(module, key)) for key in module.__all__)


def expected(spec, x):
    exact, state = spec.reference(**{name: value.double() for name, value in x.items()}, output_final_state=True)
    naive, naive_state = spec.reference(**x, output_final_state=True)
    return (exact, naive), (state, naive_state)


def test_parallel_retention():
    spec = REGISTRY["retention"]
    x = {name: value for name, value in make_inputs(spec, {"T": 130}).items() if name != "initial_state"}
    (exact, naive), _ = expected(spec, x)
    assert_within_budget("o", naive_retention(**x), exact, naive)


@pytest.mark.parametrize("gated", (True, False))
def test_simple_gla(gated):
    spec = REGISTRY["simple_gla"]
    x = make_inputs(spec, {"T": 130}, variant=spec.variants[0])
    x = {name: x[name] for name in ("q", "k", "v", "g", "initial_state") if gated or name != "g"}
    options = {} if gated else {"g": None}
    (exact, naive), (state, naive_state) = expected(spec, x)
    o, final = naive_chunk_simple_gla(**x, **options, output_final_state=True)
    assert_within_budget("o", o, exact, naive)
    assert_within_budget("state", final, state, naive_state)
    del x["initial_state"]
    (exact, naive), _ = expected(spec, x)
    o, matrix = naive_parallel_simple_gla(**x, **options)
    assert_within_budget("o", o, exact, naive)
    assert torch.equal(matrix, matrix.tril())


def test_public_forms_are_exported():
    """What is registered is what `from fla.ops import ...` gives."""
    for spec in REGISTRY.values():
        for function in spec.forms.values():
            assert getattr(fla.ops, function.__name__) is function


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_naive_functions_have_every_derivative(spec):
    """They have the derivatives for which the ops raise: second ones, those of torch.func, forward mode."""
    x = make_inputs(spec, {"T": 3, "K": 2, "V": 2}, torch.float64, variant=spec.variants[0])
    first = next(iter(x))

    def loss(value):
        return spec.reference(**x | {first: value})[0].square().sum()

    hessian = torch.autograd.functional.hessian(loss, x[first])
    assert hessian.count_nonzero() > 0
    torch.testing.assert_close(torch.func.hessian(loss)(x[first]), hessian)
    gradient = torch.func.grad(loss)(x[first])
    torch.testing.assert_close(torch.func.jvp(loss, (x[first],), (x[first],))[1], (gradient * x[first]).sum())
    torch.testing.assert_close(torch.vmap(loss)(x[first][None]), loss(x[first])[None])
