"""Modules that other programs import by name, without a file each."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def make_module(name: str, doc: str, values: dict[str, Any]) -> ModuleType:
    """Make `name` importable as a module that holds `values`, and an attribute of the package or module it is under.

    That one, if there is one, is imported already, or being imported: Python imports it before it looks for what is
    under it. A function that it has under this name keeps its place.
    """
    module = ModuleType(name, doc)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(values, __all__=sorted(values))
    parent, _, leaf = name.rpartition(".")
    above = vars(sys.modules[parent]) if parent else {}
    if isinstance(above.get(leaf, module), ModuleType):
        above[leaf] = module
    sys.modules[name] = module
    return module
