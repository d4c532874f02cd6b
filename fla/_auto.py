"""Make our model types known to transformers' Auto classes without importing transformers.

A model type has the name of its module in `fla/models`. `import fla` adds a finder to `sys.meta_path`, which waits for
the import of the module of transformers that maps model types to configs. Once that module has run (at once, if it
already has), every model type of ours is registered there with a placeholder, `LazyConfig`. The first use of a
placeholder imports `fla.models`, which registers the real classes. A model type that transformers has itself is left
alone.
"""

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_MAPPING_MODULE = "transformers.models.auto.configuration_auto"
_MODELS = Path(__file__).with_name("models")
_NOT_MODELS = ("cache", "utils")


def model_types() -> list[str]:
    """Our model types: the public modules of `fla/models`."""
    names = (module.name for module in pkgutil.iter_modules([str(_MODELS)]))
    return [name for name in names if not name.startswith("_") and name not in _NOT_MODELS]


class LazyConfig:
    """Placeholder of a config class. Calling it or reading an attribute imports the real class."""

    __module__ = "fla.models"

    def __init__(self, model_type: str, mapping: Any) -> None:
        self.__name__ = f"LazyConfig({model_type})"  # transformers compares names of registered configs
        self._model_type = model_type
        self._mapping = mapping

    def _resolve(self) -> Any:
        importlib.import_module("fla.models")
        config_class = self._mapping[self._model_type]
        if config_class is self:
            raise ImportError(f"fla.models registers no config for the model type {self._model_type!r}")
        return config_class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._resolve(), name)


class _AfterImport(Loader):
    """Runs a module with the module's own loader, then registers our model types in it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _announce(module)


class _Finder(MetaPathFinder):
    """Finds the module that maps model types to configs as all other finders do, but with `_AfterImport` as loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MAPPING_MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _AfterImport(spec.loader)
                return spec
        return None


def _announce(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    for model_type in model_types():
        if model_type not in mapping:
            mapping.register(model_type, LazyConfig(model_type, mapping))


def register_lazily() -> None:
    """Register our model types now if transformers' mapping is loaded, else as soon as it is.

    The call is cheap and may be repeated.
    """
    module = sys.modules.get(_MAPPING_MODULE)
    if module is not None and hasattr(module, "CONFIG_MAPPING"):
        _announce(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
