"""`fla.models.utils.Cache`, the name under which other programs import the cache."""

from fla.models.cache import Cache

__all__ = ["Cache"]
