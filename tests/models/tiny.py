"""Small models of every registered type, for the contract suites. Only `VARIANTS` names models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fla.models  # noqa: F401 - registers them
from fla.models._decoder import DecoderConfig
from fla.models._loading import REGISTRY
from fla.modules.mlp import GatedMLP
from fla.testing import assert_within_budget

with torch.device("cpu"):
    torch.empty(0)  # PyTorch lists the functions that a device context redirects once: before a test replaces any

VOCAB = 61
# What the suites want of every model; its sizes are those that its config declares.
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
# What a type can do beyond its defaults, besides the `variants` of its config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gla": {
        "conv": {"use_short_conv": True},
        "hybrid": {"attn": HYBRID},
        "hybrid_window_conv": {"attn": {**HYBRID, "layers": [0, 2], "window_size": 4}, "use_short_conv": True},
        "split_norm": {"fuse_norm": False, "num_kv_heads": 1},
    },
    "retnet": {"conv": {"use_short_conv": True, "num_kv_heads": 1}},
    "linear_attn": {
        "normalised": {"feature_map": "elu", "norm_feature_map": True},
        "hedgehog": {"feature_map": "hedgehog"},
    },
    "transformer": {"window": {"window_size": 4, "num_kv_heads": 1}, "biased": {"qkv_bias": True, "qk_norm": True}},
}
TYPES = sorted(REGISTRY)


def types_where(condition: Callable[[Any], bool]) -> Any:
    """Run `test(model_type)` for every type whose causal LM class fulfils a condition."""
    return pytest.mark.parametrize("model_type", [name for name in TYPES if condition(REGISTRY[name])])


every_type = types_where(lambda causal_lm: True)
every_gated = types_where(lambda causal_lm: issubclass(causal_lm.block_cls.mlp_cls or object, GatedMLP))


def every_case(test: Callable[..., None]) -> Callable[..., None]:
    """Run `test(model_type, overrides)` for every type and variant."""
    cases = [pytest.param(model_type, {}, id=model_type) for model_type in TYPES]
    cases += [
        pytest.param(model_type, overrides, id=f"{model_type}-{name}")
        for model_type in TYPES
        for name, overrides in {**REGISTRY[model_type].config_class.variants, **VARIANTS.get(model_type, {})}.items()
    ]
    return pytest.mark.parametrize(("model_type", "overrides"), cases)(test)


def exhaustive(*values: Any) -> list[Any]:
    """Values of a parameter that only `make test-all` runs, where another value holds the same code to it."""
    return [pytest.param(value, marks=pytest.mark.exhaustive, id=str(value)) for value in values]


SIDES = {"left": range(4), "right": range(12, 7, -1), "interior": [0, 4, 5, 9]}
# Rows with padding on every side in one batch, and each side by itself.
every_side = pytest.mark.parametrize("side", ["mixed", *exhaustive(*SIDES)])


def padding_mask(side: str) -> Tensor:
    """A mask `[3, 13]` with padding on one side, more in the first row than in the others, or on another in each."""
    mask = torch.ones(3, 13, dtype=torch.long)
    for row, kind in enumerate(SIDES if side == "mixed" else [side] * 3):
        mask[row, list(SIDES[kind])[: None if row == 0 or side == "mixed" else row]] = 0
    return mask


def tiny_config(model_type: str, **overrides: Any) -> DecoderConfig:
    """The smallest config of a type, with `overrides`."""
    config_class = REGISTRY[model_type].config_class
    return config_class(**{**COMMON, **config_class.tiny, **overrides})


def build(model_type: str, overrides: dict[str, Any] | None = None, seed: int = 0) -> PreTrainedModel:
    """A causal LM in evaluation mode with weights that are far from symmetric."""
    torch.manual_seed(seed)
    model = REGISTRY[model_type](tiny_config(model_type, **(overrides or {})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    name: str, model: PreTrainedModel, run: Callable[[Any], Tensor], expected: Callable[[Any], Tensor]
) -> None:
    """`run(model)` is `expected(model)` within the error budget, whose reference is `expected` of the float64 model."""
    with torch.no_grad():
        reference = expected(copy.deepcopy(model).double())
        assert_within_budget(name, run(model), reference, expected(model))
