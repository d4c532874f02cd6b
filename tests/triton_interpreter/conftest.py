"""The Triton kernels on the CPU, in a process of their own: Triton decides at import whether it interprets."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _interpreting():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.exit(
            "tests/triton_interpreter needs TRITON_INTERPRET=1 in the environment (make test sets it)", returncode=2
        )
