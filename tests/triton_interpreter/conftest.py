"""The Triton kernels on the CPU, in a process of their own: Triton decides at import whether it interprets."""

import os
from pathlib import Path

import pytest

from tests.ops.suite import gaps


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # what a mask throws away may be inf or NaN, and NumPy says so; every result is checked to be finite
            item.add_marker(pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"))


@pytest.fixture(autouse=True, scope="session")
def _interpreting():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.exit(
            "tests/triton_interpreter needs TRITON_INTERPRET=1 in the environment (make test sets it)", returncode=2
        )
    from tests.triton_interpreter.quick import hasten  # not before: Triton decides at import

    hasten()


def pytest_terminal_summary(terminalreporter):
    """Which ops these kernels leave out."""
    for line in gaps("triton"):
        terminalreporter.write_line(line)
