"""The GPU suite: `make test-gpu`. Every test under this folder carries the marker `gpu`.

It runs in several processes, of which each takes the tests that no other has begun; that they compile no kernel twice
is the business of `compiling.py`.
"""

from pathlib import Path

import pytest
import torch

from tests.gpu.compiling import one_at_a_time
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


@pytest.fixture(autouse=True, scope="session")
def _compiled_once(_gpu, tmp_path_factory):
    import triton.compiler

    folder = tmp_path_factory.getbasetemp().parent  # the processes of a run have their folders side by side there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.compiler, "compile", one_at_a_time(triton.compiler.compile, folder / "locks"))
        yield


def pytest_terminal_summary(terminalreporter):
    """Which ops these kernels leave out."""
    for line in gaps("triton"):
        terminalreporter.write_line(line)
