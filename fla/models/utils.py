"""What other programs import from here: the cache and generation, by their names there and here."""

from fla.models._generation import DecoderGenerationMixin
from fla.models.cache import Cache, StateLayer

FLACache = LegacyFLACache = Cache
FLALayer = StateLayer
FLAGenerationMixin = DecoderGenerationMixin

__all__ = ["Cache", "FLACache", "FLAGenerationMixin", "FLALayer", "LegacyFLACache"]
