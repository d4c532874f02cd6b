"""Efficient linear-attention models: ops, modules, layers and Hugging Face models.

`import fla` is light: it imports neither Triton nor transformers and touches no GPU. transformers' Auto classes learn
our model types when transformers is imported (`fla/_auto.py`). Layers and models are names of this package too, such as
`fla.GLAForCausalLM`: the first use of one imports the package that it is in.
"""

import importlib
from typing import Any

from fla._auto import register_lazily
from fla._version import __version__
from fla.backends import use_backend
from fla.varlen import check_packing

__all__ = ["__version__", "check_packing", "use_backend"]

register_lazily()


def __getattr__(name: str) -> Any:
    """A class of `fla.layers` or `fla.models`. Other names, such as those of submodules, import nothing."""
    is_class, of_a_model = name[:1].isupper(), name.endswith(("Config", "Model", "ForCausalLM"))
    for package in ("layers", "models") if is_class and of_a_model else ("layers",) if is_class else ():
        found = vars(importlib.import_module(f"fla.{package}")).get(name)
        if isinstance(found, type):
            return found
    raise AttributeError(f"module 'fla' has no attribute {name!r}")
