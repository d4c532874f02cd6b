"""The registry of layers that `test_contract.py` runs over: a layer is tested by having a line here."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fla import layers
from fla.testing import assert_within_budget
from tests.layers.naive import naive_layer

D = 32
LENGTHS = (70, 33, 1, 9)  # beyond one chunk of 64, and one token


@dataclass(frozen=True)
class Case:
    """A layer and its settings; `modes` are all its modes."""

    name: str
    cls: type[nn.Module]
    settings: tuple[tuple[str, object], ...]

    @property
    def modes(self) -> tuple[str | None, ...]:
        return tuple(self.cls.forms) or (None,)

    def build(self, **changes) -> nn.Module:
        """The layer with seeded weights that are not their initial values (norm weights and biases too)."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            layer = self.cls(**{"hidden_size": D, **dict(self.settings), **changes})
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return layer


def case(name: str, cls: type[nn.Module], **settings) -> Case:
    return Case(name, cls, tuple(settings.items()))


GLA, RetNet, Linear = layers.GatedLinearAttention, layers.MultiScaleRetention, layers.LinearAttention
SimpleGLA, Attention = layers.SimpleGatedLinearAttention, layers.Attention
CASES = {
    c.name: c
    for c in (
        case("gla", GLA, num_heads=2),
        case("gla-conv-gqa", GLA, num_heads=4, num_kv_heads=2, use_short_conv=True, conv_bias=True, clamp_min=-0.05),
        case("gla-sigmoid", GLA, num_heads=2, gate_fn="sigmoid", feature_map="relu", gate_logit_normalizer=8),
        case("gla-nogate", GLA, num_heads=2, use_output_gate=False, use_short_conv=True, conv_size=3),
        case("retnet", RetNet, num_heads=2),
        case("retnet-conv-gqa", RetNet, num_heads=4, num_kv_heads=1, use_short_conv=True, fuse_norm=False),
        case("linear", Linear, num_heads=2),
        case("linear-normalised", Linear, num_heads=2, feature_map="elu", do_feature_map_norm=True, norm_k=True),
        case(
            "linear-hedgehog-gqa", Linear, num_heads=4, num_kv_heads=2, feature_map="hedgehog", tie_feature_map_qk=True
        ),
        case("linear-bare", Linear, num_heads=2, feature_map="relu", norm_q=True, output_norm="identity", expand_v=2.0),
        case("simple-gla", SimpleGLA, num_heads=2),
        case("simple-gla-gqa", SimpleGLA, num_heads=4, num_kv_heads=2, use_short_conv=False, expand_k=0.5),
        case("attention", Attention, num_heads=2),
        case("attention-gqa", Attention, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True, rope_theta=100.0),
        case("attention-window", Attention, num_heads=2, window_size=6, max_position_embeddings=16),
    )
}
PLAIN = ("gla", "retnet", "linear", "simple-gla", "attention")  # one per layer


def rows_of(lengths=LENGTHS, seed=0) -> list[Tensor]:
    """One sequence `[T, D]` per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator) for n in lengths]


@functools.cache
def expected(name: str, lengths=LENGTHS, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    """The naive layer on every row of `rows_of`: in float64, and in float32."""
    case, layer = CASES[name], CASES[name].build()
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()
        return (
            [naive_layer(wide, row.double(), dict(case.settings)) for row in rows_of(lengths, seed)],
            [naive_layer(layer, row, dict(case.settings)) for row in rows_of(lengths, seed)],
        )


def check_rows(label: str, actual: list[Tensor], name: str, lengths=LENGTHS, seed=0) -> None:
    """Every row of a layer's output is the naive layer's, within the budget of all rows together."""
    reference, naive = (torch.cat(rows) for rows in expected(name, lengths, seed))
    assert [len(row) for row in actual] == list(lengths)
    assert_within_budget(f"{name}: {label}", torch.cat(actual), reference, naive)
