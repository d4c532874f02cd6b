"""What the numbers among the demo's arguments count, and their ranges."""

import argparse
import math
from typing import Any

SIZES = {
    "steps": "optimizer steps",
    "hidden-size": "width of the model",
    "layers": "layers of the model",
    "heads": "heads of a layer",
    "seq-len": "bytes of a training sequence",
    "batch-size": "sequences of a step",
    "new-bytes": "bytes to generate",
}


def number(text: str, kind: type, low: float, high: float, expected: str) -> Any:
    """An argument's value; argparse puts the name of the argument before the error."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # nan is not either
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
    return value


def positive(text: str) -> int:
    return number(text, int, 1, math.inf, "an integer of at least 1")


def learning_rate(text: str) -> float:
    return number(text, float, 1e-30, 1e30, "a number between 1e-30 and 1e30")


def seed(text: str) -> int:
    return number(text, int, -(2**40), 2**40, "an integer between -2^40 and 2^40")
