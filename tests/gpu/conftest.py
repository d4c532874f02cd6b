"""The GPU suite: `make test-gpu`. Every test under this folder carries the marker `gpu`."""

from pathlib import Path

import pytest
import torch

from tests.ops.suite import gaps


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def _gpu():
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a CUDA GPU; make test runs everything else", returncode=2)


@pytest.fixture(autouse=True)
def _synchronize():
    """A kernel that fails does so in its own test; a test that forbids waiting forbids it to no other."""
    torch.cuda.set_sync_debug_mode(0)
    yield
    torch.cuda.set_sync_debug_mode(0)
    torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter):
    """Which ops these kernels leave out."""
    for line in gaps("triton"):
        terminalreporter.write_line(line)
