"""Packages that other programs look for, provided by ours where they are not installed.

    import fla.compat
    fla.compat.provide("causal_conv1d")     # before the modules that look for it are imported

Some packages have to be compiled for a GPU, and programs do without them where they are missing: transformers' models
then convolve packed sequences into each other. `provide` puts a module of that name into `sys.modules`, whose functions
are ours: they run on any machine, and keep packed sequences apart. Nothing does so by itself; `import fla` does not.

Each module here is such a package: its `VERSION`, and in `MODULES` the functions of every module that it has.
"""

import importlib
import importlib.util
import logging
import pkgutil
import sys
import warnings
from types import ModuleType

from fla._names import make_module

__all__ = ["provide"]

_OURS = "provided by fla"
_log = logging.getLogger("fla")


def provide(name: str) -> ModuleType:
    """Make the package `name` importable, by functions of ours if it is not installed; returns it.

    An installed package stays as it is, which one line of the log says. Calls may be repeated. Names: "causal_conv1d".

    Call it before the modules that use the package are imported: transformers' models look for its functions while
    they are imported. A model that is there already keeps its own, which a UserWarning says.

    Raises:
        ValueError: another name.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(map(repr, known))}, got {name!r}")
    found = sys.modules.get(name)
    if found is None and importlib.util.find_spec(name) is not None:
        found = importlib.import_module(name)
    if found is not None:
        if not getattr(found, "__doc__", None) or _OURS not in str(found.__doc__):
            _log.info("%s is installed: fla.compat.provide leaves it as it is", name)
        return found
    source = importlib.import_module(f"{__name__}.{name}")
    for module_name, functions in source.MODULES.items():
        module = make_module(module_name, f"{module_name}, {_OURS}.", {x.__name__: x for x in functions})
        module.__dict__.update(__version__=source.VERSION, __path__=[])
    _warn_of_early_imports(name, {x.__name__ for functions in source.MODULES.values() for x in functions})
    return sys.modules[name]


def _warn_of_early_imports(name: str, functions: set[str]) -> None:
    """Warn of transformers' models that looked for the functions before they were there."""
    models = [x for x in sys.modules if x.startswith("transformers.models.") and ".modeling_" in x]
    early = sorted(x.split(".")[2] for x in models if functions & set(vars(sys.modules[x])))
    if early:
        message = f"fla.compat.provide({name!r}) comes too late for models of transformers that are imported already"
        warnings.warn(f"{message}: {', '.join(early)}", stacklevel=3)
