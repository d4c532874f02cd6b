"""What every test gets: seeds, one thread, and allocation by `fla` that is NaN until written."""

import pytest
import torch
import torch._dynamo
import torch._functorch.aot_autograd  # both keep functions of torch when they are imported: before any is replaced

from fla.testing import poisoned_allocation
from tests import times
from tests.times import pytest_addoption, pytest_collection_modifyitems  # noqa: F401


def pytest_configure(config):
    torch.set_num_threads(1)  # the suite runs as one process per core
    times.pytest_configure(config)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocation():
    with poisoned_allocation():
        yield
