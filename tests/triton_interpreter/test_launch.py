"""Launches (`fla.backends.triton._launch`) where Triton interprets, and what `quick` makes of its interpreter."""

import sys

import torch

from fla.backends import interpreting
from fla.backends.triton._launch import launch
from fla.backends.triton.decay import recurrent_backward, recurrent_forward
from tests.families.decay import Direct
from tests.test_launch import SIZE, scaled_add_kernel
from tests.triton_interpreter.quick import unhastened


def test_the_interpreter_runs_launches():
    assert interpreting()
    for dtype in (torch.float32, torch.float32, torch.float16):
        x, y, out = torch.randn(100).to(dtype), torch.randn(100).to(dtype), torch.empty(100, dtype=dtype)
        launch(scaled_add_kernel, 2, (x, y, out, 0.5, 100, 1), SIZE)
        torch.testing.assert_close(out, x * 0.5 + y)


def computed() -> tuple[dict[str, torch.Tensor], int]:
    """What the recurrent kernels compute, and how many functions were called for it."""
    case, calls = Direct(8, 4, ("g", "gk"), tokens=(2, 1)), 0
    x = case.inputs()

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call"

    watching = sys.getprofile()
    sys.setprofile(count)
    try:
        problem = case.problem(x)
        o, state = recurrent_forward.forward(problem, True)
        gradients = recurrent_backward.backward(problem, x["do"], x["dht"], True)
    finally:
        sys.setprofile(watching)
    return {"o": o, "state": state, **gradients}, calls


def test_the_quick_interpreter_gives_the_same_bits():
    computed()  # the first call rewrites the kernels
    quick, few = computed()
    with unhastened():
        slow, many = computed()
    again, as_few = computed()
    assert quick.keys() == slow.keys() == again.keys()
    for name, x in slow.items():
        assert torch.equal(quick[name], x) and torch.equal(again[name], x), name
    assert max(few, as_few) < many / 2
