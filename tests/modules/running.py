"""Running a case of the table: its module, its formula, and the comparison of the two."""

import torch
from torch import Tensor

from fla.testing import assert_within_budget
from tests.modules.cases import Case


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def make(case: Case, dtype: torch.dtype):
    """The module and its inputs; parameters that start as ones or zeros are moved, so that each of them matters."""
    module = case.build().to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return module, {name: torch.randn(shape).to(dtype) for name, shape in case.shapes.items()}


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of memory in reversed axis order."""
    reverse = tuple(range(x.dim()))[::-1]
    spread = torch.zeros([*x.permute(reverse).shape, 2], dtype=x.dtype)
    spread[..., 1] = x.permute(reverse)
    return spread[..., 1].permute(reverse)


def evaluate(call, leaves: dict[str, Tensor], upstream=None):
    """Outputs, and gradients of every leaf for fixed upstream gradients; moved to the CPU."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = as_tuple(call(leaves))
    if upstream is None:
        upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), [u.to(outputs[0].device) for u in upstream])
    grads = {name: grad.cpu() for name, grad in zip(leaves, grads, strict=True)}
    return tuple(y.cpu() for y in outputs), grads, upstream


def run_module(case: Case, module, inputs, upstream=None, device="cpu"):
    parameters = {f"module.{name}": p for name, p in module.named_parameters()}
    settings = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.settings.items()}

    def apply(leaves):
        own = {name.removeprefix("module."): leaves[name] for name in parameters}
        given = {name: leaves[name] for name in inputs}
        return case.outputs(torch.func.functional_call(module, own, (), given | settings))

    return evaluate(apply, {name: x.to(device) for name, x in (inputs | parameters).items()}, upstream)


def run_formula(case: Case, module, inputs, upstream, dtype: torch.dtype):
    """The formula in `dtype`, everything cast back to the dtypes of the module's own run."""
    parameters = {f"module.{name}": p for name, p in module.named_parameters()}
    everything = inputs | parameters

    def apply(leaves):
        own = {name.removeprefix("module."): leaves[name] for name in parameters}
        return case.formula(own, **{name: leaves[name] for name in inputs}, **case.settings)

    outputs, grads, _ = evaluate(
        apply, {n: x.to(dtype) for n, x in everything.items()}, [u.to(dtype) for u in upstream]
    )
    return outputs, grads


def assert_matches_formula(case: Case, module, inputs, actual, dtype: torch.dtype):
    outputs, grads, upstream = actual
    reference = run_formula(case, module, inputs, upstream, torch.float64)
    naive_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    naive = run_formula(case, module, inputs, upstream, naive_dtype)
    for i, y in enumerate(outputs):
        assert_within_budget(f"output {i}", y, reference[0][i], naive[0][i].to(y.dtype), dtype=dtype)
    for name, grad in grads.items():
        source = inputs[name] if name in inputs else module.get_parameter(name.removeprefix("module."))
        assert grad.dtype == source.dtype
        assert_within_budget(f"d{name}", grad, reference[1][name], naive[1][name].to(grad.dtype), dtype=dtype)
