"""Efficient linear-attention models: ops, modules, layers and Hugging Face models.

`import fla` is light: it imports neither Triton nor transformers and touches no GPU. transformers' Auto classes learn
our model types when transformers is imported (`fla/_auto.py`).
"""

from fla._auto import register_lazily
from fla._version import __version__
from fla.backends import use_backend
from fla.varlen import check_packing

__all__ = ["__version__", "check_packing", "use_backend"]

register_lazily()
