"""Launches (`fla.backends.triton._launch`) where Triton interprets: they go its way."""

import torch

from fla.backends import interpreting
from fla.backends.triton._launch import launch
from tests.test_launch import SIZE, scaled_add_kernel


def test_the_interpreter_runs_launches():
    assert interpreting()
    for dtype in (torch.float32, torch.float32, torch.float16):
        x, y, out = torch.randn(100).to(dtype), torch.randn(100).to(dtype), torch.empty(100, dtype=dtype)
        launch(scaled_add_kernel, 2, (x, y, out, 0.5, 100, 1), SIZE)
        torch.testing.assert_close(out, x * 0.5 + y)
