"""Toys as DESIGN.md asks for them: an op, a family with an op, a layer, models. Each is added to a copy of the tree."""

from tests.toys.family import SCAN_FAMILY, SCAN_LINE, SCAN_OP, SCAN_TORCH
from tests.toys.layer import LAYER, LAYER_LINE
from tests.toys.model import MODEL, MODEL_LINE
from tests.toys.op import OP, OP_LINE

__all__ = [
    "LAYER",
    "LAYER_LINE",
    "MODEL",
    "MODEL_LINE",
    "OP",
    "OP_LINE",
    "SCAN_FAMILY",
    "SCAN_LINE",
    "SCAN_OP",
    "SCAN_TORCH",
]
