"""The layers that `test_contract.py` runs over: every class in `fla.layers`, with the settings that it declares itself.

`VARIANTS` has further settings. A layer is held to its naive form where `naive.py` has one or the layer defines
`naive()`, else to itself in float64, each sequence alone.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla import layers
from fla.layers._mixer import ChannelMixer, TokenMixer
from fla.testing import assert_within_budget
from tests.layers.naive import NAIVE

D = 32
LENGTHS = (70, 33, 1, 9)  # beyond one chunk of 64, and one token
IDX = 1  # a layer's place where it needs one: not 0, for which a model's first layer may have other weights


@dataclass(frozen=True)
class Case:
    """A layer and its settings; `modes` are all its modes."""

    name: str
    cls: type[TokenMixer]
    settings: Mapping[str, Any]

    @property
    def modes(self) -> tuple[str | None, ...]:
        return tuple(self.cls.forms) or (None,)

    def build(self, layer_idx: int | None = None, **changes) -> nn.Module:
        """The layer with seeded weights that are not their initial values (norm weights and biases too).

        They are those of layer `IDX`, whatever place the layer then takes. What its model would hand to it is handed to
        it in every call.
        """
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            layer = self.cls(**{"hidden_size": D, "layer_idx": IDX, **self.settings, **changes})
            layer.layer_idx = layer_idx
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        if layer.inputs:
            layer.handed = _numbers(layer)
            layer.register_forward_pre_hook(_hand_over, with_kwargs=True)
        return layer


def _numbers(layer: TokenMixer) -> dict[str, Tensor]:
    """Numbers between 0 and 1 for each of the layer's inputs; for the carry a matrix that makes it of the tokens."""
    generator, numbers = torch.Generator().manual_seed(3), {}
    for name in layer.inputs:
        sizes = [int(axis) for axis in layer.input_shapes[name].split() if axis.isdigit()]
        sizes = [D, *sizes] if name == layer.carry_name else sizes
        numbers[name] = torch.rand(sizes, generator=generator)
    return numbers


def _hand_over(layer, args, keywords):
    return args, handed_over(layer, *args) | keywords


def handed_over(layer: TokenMixer, hidden_states: Tensor) -> dict[str, Tensor]:
    """What a model could hand to the layer, the same in every call.

    A carry depends on each token alone, so that it is the same however the tokens are packed, padded or split.
    """
    handed = {}
    for name in layer.inputs:
        numbers = layer.handed[name].to(hidden_states.dtype)
        handed[name] = torch.tensordot(hidden_states, numbers - 0.5, 1) if name == layer.carry_name else numbers
    return handed


TYPES = {
    cls.__module__.rsplit(".", 1)[-1]: cls
    for cls in vars(layers).values()
    if isinstance(cls, type) and issubclass(cls, TokenMixer) and not issubclass(cls, ChannelMixer)
}
GQA = {"num_heads": 4, "num_kv_heads": 2}
# What a layer can do beyond its smallest settings: file name -> name -> settings.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gla": {
        "conv-gqa": {**GQA, "use_short_conv": True, "conv_bias": True, "clamp_min": -0.05},
        "sigmoid": {"gate_fn": "sigmoid", "feature_map": "relu", "gate_logit_normalizer": 8},
        "nogate": {"use_output_gate": False, "use_short_conv": True, "conv_size": 3},
    },
    "multiscale_retention": {
        "conv-gqa": {"num_heads": 4, "num_kv_heads": 1, "use_short_conv": True, "fuse_norm": False},
    },
    "linear_attn": {
        "normalised": {"feature_map": "elu", "do_feature_map_norm": True, "norm_k": True},
        "hedgehog-gqa": {**GQA, "feature_map": "hedgehog", "tie_feature_map_qk": True},
        "bare": {"feature_map": "relu", "norm_q": True, "output_norm": "identity", "expand_v": 2.0},
    },
    "simple_gla": {"gqa": {**GQA, "use_short_conv": False, "expand_k": 0.5}},
    "attn": {
        "gqa": {**GQA, "qkv_bias": True, "qk_norm": True, "rope_theta": 100.0},
        "window": {"window_size": 6, "max_position_embeddings": 16},
    },
}
PLAIN = tuple(sorted(TYPES))  # one per layer
CASES: dict[str, Case] = {}
for _type in PLAIN:
    _cls = TYPES[_type]
    CASES[_type] = Case(_type, _cls, _cls.tiny)
    for _name, _settings in {**_cls.variants, **VARIANTS.get(_type, {})}.items():
        CASES[f"{_type}-{_name}"] = Case(f"{_type}-{_name}", _cls, {**_cls.tiny, **_settings})


def rows_of(lengths=LENGTHS, seed=0) -> list[Tensor]:
    """One sequence `[T, D]` per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator) for n in lengths]


def naive_layer(layer: TokenMixer, x: Tensor, name: str) -> Tensor:
    """The layer `name` as formulas on one sequence `[T, D]`, in the dtype of `x`; without these the layer itself."""
    if type(layer) in NAIVE:
        return NAIVE[type(layer)](layer, x, dict(CASES[name].settings))
    if hasattr(layer, "naive"):
        return layer.naive(x[None], **handed_over(layer, x[None]))[0]
    return layer(x[None])[0][0]


@functools.cache
def expected(name: str, lengths=LENGTHS, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    """The naive layer on every row of `rows_of`: in float64, and in float32."""
    layer = CASES[name].build()
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()
        return (
            [naive_layer(wide, row.double(), name) for row in rows_of(lengths, seed)],
            [naive_layer(layer, row, name) for row in rows_of(lengths, seed)],
        )


def check_rows(label: str, actual: list[Tensor], name: str, lengths=LENGTHS, seed=0) -> None:
    """Every row of a layer's output is the naive layer's, within the budget of all rows together."""
    reference, naive = (torch.cat(rows) for rows in expected(name, lengths, seed))
    assert [len(row) for row in actual] == list(lengths)
    assert_within_budget(f"{name}: {label}", torch.cat(actual), reference, naive)
