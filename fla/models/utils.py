"""What other programs import from here: `fla.models.utils.Cache`."""

from fla.models.cache import Cache

__all__ = ["Cache"]
