"""The choice of the backend that computes a call.

A backend computes a family in the module `fla.backends.<backend>.<family>`, which is found by its name.
The backend is the first that is given of: the `backend=` argument, `with use_backend(...)`, the environment variable
`FLA_BACKEND`. If none is given, it is Triton for GPU tensors and PyTorch for others.
"""

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor  # not `import torch`: in this package that name is the subpackage fla.backends.torch
from torch.compiler import is_compiling

BACKENDS = ("triton", "torch")
logger = logging.getLogger("fla")
_modules: dict[tuple[str, str], ModuleType] = {}
_logged: set[tuple[str, str]] = set()  # (op, backend)


class _Chosen(threading.local):
    backend: str | None = None  # a class attribute: reading an attribute that a new thread lacks would be slow


_chosen = _Chosen()


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Use `backend` for every op in the block that is called without `backend=`.

    `backend`: "triton", "torch", or None for the default.
    """
    before = _chosen.backend
    _chosen.backend = _check(backend, "use_backend")
    try:
        yield
    finally:
        _chosen.backend = before


def resolve(name: str, tensor: Tensor, backend: str | None = None) -> str:
    """The name of the backend that computes the family `name` for `tensor`.

    Raises ValueError if `backend` is no backend, or if it is Triton and `tensor` is not on a GPU.
    """
    named = _check(backend, "backend")
    preferred = named or _chosen.backend or _from_environment()
    if preferred == "triton" and not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"backend='triton' needs GPU tensors, got a tensor on {tensor.device}; use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    chosen = preferred or ("triton" if tensor.is_cuda and _has_triton() else "torch")
    if named is None and chosen == "triton" and not computes("triton", name):
        return "torch"  # `use_backend` and FLA_BACKEND only prefer Triton: this family has no kernels yet
    return chosen


def family(name: str, backend: str, op: str | None = None) -> ModuleType:
    """The module in which `backend` computes the family `name`.

    Logs the backend of `op` the first time. Raises ValueError if the backend does not compute the family.
    """
    module = _modules.get((backend, name))
    if module is None:
        try:
            module = importlib.import_module(f"fla.backends.{backend}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fla.backends.{backend}.{name}":
                raise
            others = [other for other in BACKENDS if computes(other, name)]
            has = " or ".join(f"backend={other!r}" for other in others) or "no backend"
            raise ValueError(f"backend={backend!r} does not compute the family {name!r}: {has} does") from None
        _modules[backend, name] = module
    if op is not None and (op, backend) not in _logged and not is_compiling():
        _logged.add((op, backend))
        alone = not any(computes(other, name) for other in BACKENDS if other != backend)
        logger.info("%s: %s backend%s", op, backend, f", which alone computes the family {name!r}" if alone else "")
    return module


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


# `os.environ.get` raises and catches an exception if a variable is not set, which takes microseconds in every call.
# So the dict behind `os.environ` is asked first.
_variables = getattr(os.environ, "_data", {})
_FLA_BACKEND = os.environ.encodekey("FLA_BACKEND")


def _from_environment() -> str | None:
    if _variables and _FLA_BACKEND not in _variables and not is_compiling():
        return None
    return _check(os.environ.get("FLA_BACKEND") or None, "FLA_BACKEND")


def _check(backend: str | None, argument: str) -> str | None:
    if backend is None or backend in BACKENDS:
        return backend
    raise ValueError(f"{argument} must be None, 'triton' or 'torch', got {backend!r}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def computes(backend: str, name: str) -> bool:
    """Whether `backend` computes the family `name`."""
    return importlib.util.find_spec(f"fla.backends.{backend}.{name}") is not None
