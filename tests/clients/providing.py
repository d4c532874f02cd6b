"""Packages that `fla.compat` provides for a test's length, and models of transformers imported anew to see them."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from fla.compat import provide

HOME = "transformers.models"


def modeling(folder: str) -> ModuleType:
    """The module in which transformers has the models of a folder."""
    return importlib.import_module(f"{HOME}.{folder}.modeling_{folder}")


@contextmanager
def provided(name: str) -> Iterator[ModuleType]:
    """The package `name` by ours. Modules of models are imported anew inside, and are the former ones afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for module in [x for x in sys.modules if x.startswith(f"{HOME}.") and ".modeling_" in x]:
            patch.delitem(sys.modules, module)
            folder, _, leaf = module.rpartition(".")
            patch.delattr(sys.modules[folder], leaf, raising=False)
        for module in [x for x in sys.modules if x.split(".")[0] == name]:
            patch.delitem(sys.modules, module)
        before = set(sys.modules)
        try:
            yield provide(name)
        finally:
            for module in set(sys.modules) - before:
                if module.startswith((f"{HOME}.", name)):
                    del sys.modules[module]
