"""Ops that other programs import by name and this library does not compute yet: a call says so.

A program that has several kinds of layers imports the ops of all of them. `fla.ops.<op>` and `fla.ops.<op>.chunk` exist
for these, so that it runs with the ops that there are.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from fla._names import make_module

_LATER = {"gdn2": "chunk_gdn2", "gated_delta_product": "chunk_gated_delta_product"}  # module -> function in it


def _absent(name: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not computed by this version of fla: it has the name alone")

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Raises NotImplementedError: {name} is not computed yet."
    return call


for _op, _name in _LATER.items():
    _held = {_name: _absent(_name)}
    make_module(f"fla.ops.{_op}", f"{_name}, which is not computed yet.", _held)
    make_module(f"fla.ops.{_op}.chunk", f"{_name}, which is not computed yet.", _held)
