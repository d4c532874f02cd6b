"""What every module promises: values, gradients, dtypes, strides, keys and printed form."""

import copy

import pytest
import torch

from fla import modules
from tests.modules.cases import CASES
from tests.modules.running import as_tuple, assert_matches_formula, make, run_module, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case, dtype):
    module, inputs = make(case, dtype)
    actual = run_module(case, module, inputs)
    loss = "CrossEntropy" in case.name
    expected = torch.promote_types(dtype, torch.float32) if loss else dtype
    assert all(y.dtype == expected for y in actual[0])
    assert_matches_formula(case, module, inputs, actual, dtype)


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_on_a_gpu(case, dtype):
    module, inputs = make(case, dtype)
    assert_matches_formula(case, module, inputs, run_module(case, module, inputs, device="cuda"), dtype)


@each_case
def test_any_strides(case):
    module, inputs = make(case, torch.float32)
    upstream = [strided(u) for u in run_module(case, module, inputs)[2]]
    inputs = {name: strided(x) for name, x in inputs.items()}
    assert not all(x.is_contiguous() for x in inputs.values())
    assert_matches_formula(case, module, inputs, run_module(case, module, inputs, upstream), torch.float32)


@each_case
def test_gradcheck(case):
    module, inputs = make(case, torch.float64)
    names, parameters = list(inputs), dict(module.named_parameters())

    def apply(*leaves):
        own = dict(zip(parameters, leaves[len(names) :], strict=True))
        given = dict(zip(names, leaves, strict=False))
        return case.outputs(torch.func.functional_call(module, own, (), given | case.settings))

    leaves = [x.detach().requires_grad_() for x in (*inputs.values(), *parameters.values())]
    assert torch.autograd.gradcheck(apply, leaves, fast_mode=True)
    if not case.name.startswith("FusedLinearCrossEntropyLoss"):  # it refuses: test_losses.py
        assert torch.autograd.gradgradcheck(apply, leaves, fast_mode=True)


@each_case
def test_repeated_runs_are_bitwise_equal_and_inputs_unchanged(case):
    module, inputs = make(case, torch.bfloat16)
    before = {name: x.clone() for name, x in inputs.items()}
    (first, first_grads, _), (second, second_grads, _) = (run_module(case, module, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@each_case
def test_keys_printed_form_and_copies(case):
    module, inputs = make(case, torch.float32)
    assert tuple(module.state_dict()) == case.keys
    if case.printed is not None:
        assert repr(module) == type(module).__name__ + case.printed
    other = case.build()
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module)):
        results = [as_tuple(case.outputs(m(**inputs, **case.settings))) for m in (module, twin)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_table_covers_the_public_modules():
    covered = {type(case.build()).__name__ for case in CASES}
    older_names = {"FusedLayerNormSwishGate", "FusedLayerNormSwishGateLinear", "FusedRMSNormGatedLinear"}
    classes = {name for name in modules.__all__ if isinstance(getattr(modules, name), type)}
    assert classes - older_names <= covered
