"""Every module once, with its formula: the table that `test_contract.py` runs.

A formula is plain PyTorch in the dtype of its arguments: in float64 it is the reference, in float32 the naive
implementation whose error sets the budget. It gets the module's parameters and the inputs by name, and is written from
the papers' equations, not from the library.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla import modules
from fla.modules import activations, feature_map
from fla.modules.fused_cross_entropy import FusedCrossEntropyLoss
from fla.modules.layernorm_gated import LayerNormGated, RMSNormGated

B, T, H, D, O, V = 2, 7, 3, 33, 5, 19  # odd on purpose


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    formula: Callable[..., Any]  # formula(parameters, **inputs)
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any] = field(default_factory=dict)  # further keywords of the call, of the formula too
    outputs: Callable[[Any], Any] = lambda result: result
    keys: tuple[str, ...] = ()
    printed: str | None = None


class Function(nn.Module):
    """A function of the library as a module, so that it fits the table."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def normalized(x: Tensor, rms: bool, eps: float = 1e-5, groups: int = 1) -> Tensor:
    x = x.unflatten(-1, (groups, -1))
    x = x if rms else x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def affine(p: dict[str, Tensor], y: Tensor) -> Tensor:
    y = y * p["weight"] if "weight" in p else y
    return y + p["bias"] if "bias" in p else y


def gate(name: str, g: Tensor) -> Tensor:
    return {"swish": g * torch.sigmoid(g), "sigmoid": torch.sigmoid(g)}[name]


def plain_norm(rms: bool, groups: int = 1):
    def formula(p, x, residual=None, prenorm=False):
        total = x if residual is None else x + residual
        y = affine(p, normalized(total, rms, groups=groups))
        return (y, total) if prenorm else y

    return formula


def linear_norm(rms: bool, groups: int = 1):
    def formula(p, x, weight, bias, residual):
        return affine(p, normalized(x + residual, rms, groups=groups)) @ weight.T + bias

    return formula


def gated_norm(rms: bool, activation: str):
    def formula(p, x, g, residual=None, weight=None, bias=None):
        y = affine(p, normalized(x if residual is None else x + residual, rms)) * gate(activation, g)
        return y if weight is None else y @ weight.T + bias

    return formula


def mamba_norm(rms: bool, groups: int, norm_first: bool):
    def formula(p, x, z):
        if norm_first:
            return affine(p, normalized(x, rms, groups=groups)) * gate("swish", z)
        return affine(p, normalized(x * gate("swish", z), rms, groups=groups))

    return formula


def norms() -> list[Case]:
    x, xr, w = {"x": (B, T, D)}, {"x": (B, T, D), "residual": (B, T, D)}, {"weight": (O, D), "bias": (O,)}
    xg, xz = {"x": (B, T, H, D), "g": (B, T, H, D)}, {"x": (B, T, D), "z": (B, T, D)}
    both = ("weight", "bias")
    swish = modules.FusedRMSNormSwishGate
    return [
        Case("LayerNorm", lambda: modules.LayerNorm(D, bias=True), plain_norm(False), x, keys=both),
        Case("RMSNorm", lambda: modules.RMSNorm(D), plain_norm(True), x, keys=("weight",), printed="(33, eps=1e-05)"),
        Case("RMSNorm-bias", lambda: modules.RMSNorm(D, bias=True), plain_norm(True), xr, keys=both),
        Case("RMSNorm-plain", lambda: modules.RMSNorm(D, elementwise_affine=False), plain_norm(True), x),
        Case("RMSNorm-prenorm", lambda: modules.RMSNorm(D), plain_norm(True), xr, {"prenorm": True}, keys=("weight",)),
        Case("GroupNorm", lambda: modules.GroupNorm(3, D, bias=True), plain_norm(False, 3), xr, keys=both),
        Case(
            "GroupNorm-rms",
            lambda: modules.GroupNorm(3, D, is_rms_norm=True),
            plain_norm(True, 3),
            x,
            keys=("weight",),
            printed="(3, 33, eps=1e-05, is_rms_norm=True)",
        ),
        Case("LayerNormLinear", lambda: modules.LayerNormLinear(D, bias=True), linear_norm(False), xr | w, keys=both),
        Case("RMSNormLinear", lambda: modules.RMSNormLinear(D), linear_norm(True), xr | w, keys=("weight",)),
        Case("GroupNormLinear", lambda: modules.GroupNormLinear(3, D), linear_norm(False, 3), xr | w, keys=("weight",)),
        Case(
            "FusedRMSNormGated", lambda: modules.FusedRMSNormGated(D), gated_norm(True, "swish"), xg, keys=("weight",)
        ),
        Case(
            "FusedRMSNormGated-sigmoid",
            lambda: modules.FusedRMSNormGated(D, activation="sigmoid"),
            gated_norm(True, "sigmoid"),
            xg | {"residual": (B, T, H, D)},
            keys=("weight",),
            printed="(33, eps=1e-05, activation=sigmoid)",
        ),
        Case(
            "FusedLayerNormGated",
            lambda: modules.FusedLayerNormGated(D, bias=True),
            gated_norm(False, "swish"),
            xg,
            keys=both,
        ),
        Case(
            "FusedRMSNormSwishGate",
            lambda: swish(D),
            gated_norm(True, "swish"),
            xg,
            printed="(33, eps=1e-05)",
            keys=("weight",),
        ),
        Case(
            "FusedRMSNormSwishGateLinear",
            lambda: modules.FusedRMSNormSwishGateLinear(D),
            gated_norm(True, "swish"),
            xg | w,
            keys=("weight",),
        ),
        Case(
            "FusedLayerNormGatedLinear",
            lambda: modules.FusedLayerNormGatedLinear(D, activation="sigmoid"),
            gated_norm(False, "sigmoid"),
            xg | w,
            keys=("weight",),
        ),
        Case("RMSNormGated", lambda: RMSNormGated(D), mamba_norm(True, 1, False), xz, keys=("weight",)),
        Case(
            "RMSNormGated-groups",
            lambda: RMSNormGated(D, group_size=11),
            mamba_norm(True, 3, False),
            xz,
            keys=("weight",),
        ),
        Case("LayerNormGated", lambda: LayerNormGated(D), mamba_norm(False, 1, True), xz, keys=both),
        Case(
            "L2Norm", lambda: modules.L2Norm(1e-2), lambda p, x: x / (x.square().sum(-1, keepdim=True) + 1e-2).sqrt(), x
        ),
    ]


def short_convolution(act: bool):
    def formula(p, x, residual=None):
        taps = p["weight"][:, 0]
        row = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
        y = sum(row[:, j : j + x.shape[1]] * taps[:, j] for j in range(taps.shape[1]))
        y = y + p["bias"] if "bias" in p else y
        y = gate("swish", y) if act else y
        return y if residual is None else y + residual

    return formula


def turned(x: Tensor, dim: int, first: int, interleaved: bool, power: Callable | None = None) -> Tensor:
    """Every pair of channels times `exp(i t f)`, as complex numbers in float64. The angles are the module's own."""
    at = torch.arange(first, first + x.shape[1], dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(at, frequency)
    size = torch.ones_like(angle) if power is None else power(at[:, None])
    phase = torch.polar(size, angle)[:, None]
    pairs = x[..., :dim].double()
    pairs = pairs.unflatten(-1, (-1, 2)) if interleaved else pairs.unflatten(-1, (2, -1)).transpose(-1, -2)
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
    y = y.flatten(-2) if interleaved else y.transpose(-1, -2).flatten(-2)
    return torch.cat((y.to(x.dtype), x[..., dim:]), -1)


def rotary_formula(dim: int, interleaved: bool = False):
    def formula(p, q, k, seqlen_offset=0):
        return tuple(turned(z, dim, seqlen_offset, interleaved) for z in (q, k))

    return formula


def xpos_formula(p, q, k):
    scale = (torch.arange(0, 12, 2, dtype=torch.float64) + 0.4 * 12) / (1.4 * 12)
    return tuple(
        turned(z, 12, 0, False, lambda t, s=sign: scale ** (s * (t - T // 2) / 8.0)) for z, sign in ((q, 1), (k, -1))
    )


def mlp_formula(p, x):
    return (gate("swish", x @ p["gate_proj.weight"].T) * (x @ p["up_proj.weight"].T)) @ p["down_proj.weight"].T


def mixing() -> list[Case]:
    qk = {"q": (B, T, H, 16), "k": (B, T, 1, 16)}
    mlp = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    first = {"outputs": lambda result: result[0]}
    x, xr = {"x": (B, T, D)}, {"x": (B, T, D), "residual": (B, T, D)}

    def conv(**kwargs):
        return lambda: modules.ShortConvolution(D, 4, **kwargs)

    return [
        Case("ShortConvolution", conv(), short_convolution(True), x, **first, keys=("weight",)),
        Case("ShortConvolution-bias", conv(bias=True), short_convolution(True), xr, **first, keys=("weight", "bias")),
        Case("ShortConvolution-linear", conv(activation=None), short_convolution(False), x, **first, keys=("weight",)),
        Case("ShortConvolution-short", conv(), short_convolution(True), {"x": (3, 2, D)}, **first, keys=("weight",)),
        Case("RotaryEmbedding", lambda: modules.RotaryEmbedding(16), rotary_formula(16), qk, printed="()"),
        Case(
            "RotaryEmbedding-interleaved",
            lambda: modules.RotaryEmbedding(16, interleaved=True),
            rotary_formula(16, True),
            qk,
        ),
        Case("RotaryEmbedding-partial", lambda: modules.RotaryEmbedding(12), rotary_formula(12), qk),
        Case(
            "RotaryEmbedding-offset",
            lambda: modules.RotaryEmbedding(16),
            rotary_formula(16),
            qk,
            {"seqlen_offset": 1000},
        ),
        Case(
            "RotaryEmbedding-negative",
            lambda: modules.RotaryEmbedding(16),
            rotary_formula(16),
            qk,
            {"seqlen_offset": -3},
        ),
        Case("RotaryEmbedding-xpos", lambda: modules.RotaryEmbedding(12, scale_base=8.0), xpos_formula, qk),
        Case("GatedMLP", lambda: modules.GatedMLP(D, intermediate_size=20), mlp_formula, x, keys=mlp),
        Case(
            "GatedMLP-unfused",
            lambda: modules.GatedMLP(D, intermediate_size=20, fuse_swiglu=False),
            mlp_formula,
            x,
            keys=mlp,
            printed="(\n  (gate_proj): Linear(in_features=33, out_features=40, bias=False)\n"
            "  (down_proj): Linear(in_features=20, out_features=33, bias=False)\n  (act_fn): SiLU()\n)",
        ),
        Case("TokenShift", modules.TokenShift, lambda p, x: F.pad(x, (0, 0, 1, 0))[:, :-1] - x, x),
    ]


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def pointwise() -> list[Case]:
    x, xy = {"x": (B, T, D)}, {"x": (B, T, D), "y": (B, T, D)}
    linear = xy | {"weight": (O, D), "bias": (O,)}

    def function(name, formula, shapes=x, **settings):
        return Case(name, lambda: Function(getattr(activations, name)), lambda p, **i: formula(**i), shapes, settings)

    def glu_linear(kind):
        return lambda x, y, weight, bias: (gate(kind, x) * y) @ weight.T + bias

    return [
        function("swish", lambda x: x / (1 + torch.exp(-x))),
        function("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
        function("logsigmoid", lambda x, temperature: -torch.log(1 + torch.exp(-x)) / temperature, temperature=3.0),
        function("sqrelu", lambda x: x.relu() * x.relu()),
        function("fast_gelu_impl", tanh_gelu),
        function("bias_gelu_impl", lambda x, bias: tanh_gelu(x + bias), {"x": (B, T, D), "bias": (D,)}),
        function("swiglu", lambda x, y: gate("swish", x) * y, xy),
        function("sigmoidglu", lambda x, y: gate("sigmoid", x) * y, xy),
        function("swiglu_linear", glu_linear("swish"), linear),
        function("sigmoidglu_linear", glu_linear("sigmoid"), linear),
    ]


def pairs_of(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x[..., i] * y[..., j] for i in range(x.shape[-1]) for j in range(i, x.shape[-1])]


def layer(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def hedgehog(p, x):
    u = layer(p, "layer", x)
    e = torch.cat((torch.exp(2 * u), torch.exp(-2 * u)), -1)
    return e / e.sum(-1, keepdim=True)


def dpfp(p, x):
    u = torch.cat((x.relu(), (-x).relu()), -1)
    return torch.cat([u * torch.cat((u[..., -j:], u[..., :-j]), -1) for j in (1, 2)], -1)


def poly_sketch(p, x):
    x = normalized(x, False) * p["gamma"] + p["beta"]
    for i in range(2):
        x = layer(p, f"sketches1.{i}", x) * layer(p, f"sketches2.{i}", x) * 6**-0.5
    return torch.stack(pairs_of(x, x), -1)


def taylor(p, x):
    d = x.shape[-1]
    square = [x[..., i] ** 2 / math.sqrt(2 * d) for i in range(d)]
    cross = [x[..., i] * x[..., j] / math.sqrt(d) for i in range(d) for j in range(i + 1, d)]
    return torch.stack([torch.ones_like(x[..., 0]), *(x / d**0.25).unbind(-1), *square, *cross], -1)


def rebased(p, x):
    x, d = normalized(x, False) * p["gamma"] + p["beta"], x.shape[-1]
    square = [x[..., i] ** 2 / math.sqrt(d) for i in range(d)]
    return torch.stack(
        [*square, *(x[..., i] * x[..., j] * math.sqrt(2 / d) for i in range(d) for j in range(i + 1, d))], -1
    )


def feature_maps() -> list[Case]:
    def case(name, formula, *args, keys=(), **kwargs):
        return Case(name, lambda: getattr(feature_map, name)(*args, **kwargs), formula, {"x": (B, T, H, 6)}, keys=keys)

    two = ("layer1.weight", "layer2.weight")
    sketch = ("gamma", "beta", *(f"sketches{i}.{j}.weight" for i in (1, 2) for j in (0, 1)))
    return [
        case("HedgehogFeatureMap", hedgehog, 6, keys=("layer.weight", "layer.bias")),
        case("T2RFeatureMap", lambda p, x: layer(p, "layer", x).relu(), 6, dot_dim=5, keys=("layer.weight",)),
        case("DPFPFeatureMap", dpfp, 6, nu=2),
        case(
            "HadamardFeatureMap",
            lambda p, x: layer(p, "layer1", x) * layer(p, "layer2", x),
            6,
            keys=("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"),
        ),
        case(
            "LearnableOuterProductFeatureMap",
            lambda p, x: torch.stack(pairs_of(layer(p, "layer1", x), layer(p, "layer2", x)), -1),
            6,
            4,
            keys=two,
        ),
        case("LearnablePolySketchNonNegativeFeatureMap", poly_sketch, 6, 4, 8, keys=sketch),
        case("TaylorFeatureMap", taylor, 6),
        case("RebasedFeatureMap", rebased, 6, keys=("gamma", "beta")),
        case("ReLUFeatureMap", lambda p, x: x.clamp(min=0)),
        case("SquaredReLUFeatureMap", lambda p, x: x.clamp(min=0) ** 2),
        case("GELUFeatureMap", lambda p, x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        case("SwishFeatureMap", lambda p, x: gate("swish", x)),
        case("SigmoidFeatureMap", lambda p, x: torch.sigmoid(x)),
    ]


TARGET = torch.tensor([0, 18, -100, 3, 3, 7, -100, 1, 12, 18, 5])


def entropy(logits, target, smoothing=0.0, scale=1.0, cap=None, square=0.0):
    z = logits * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    lse, valid = z.exp().sum(-1).log(), target >= 0
    loss = lse - (1 - smoothing) * z[torch.arange(len(z)), target.clamp(min=0)] - smoothing * z.mean(-1)
    return (loss + square * lse**2)[valid].sum() / valid.sum()


def losses() -> list[Case]:
    logits, linear = {"input": (11, V)}, {"x": (11, D), "weight": (V, D), "bias": (V,)}
    options = {"label_smoothing": 0.1, "logit_scale": 0.7, "logit_softcapping": 3.0}
    mine = {"smoothing": 0.1, "scale": 0.7, "cap": 3.0}

    def on_linear(**settings):
        return lambda p, x, target, weight, bias: entropy(x @ weight.T + bias, target, **settings)

    return [
        Case(
            "FusedCrossEntropyLoss",
            FusedCrossEntropyLoss,
            lambda p, input, target: entropy(input, target),
            logits,
            {"target": TARGET},
        ),
        Case(
            "FusedCrossEntropyLoss-options",
            lambda: FusedCrossEntropyLoss(**options, lse_square_scale=0.05),
            lambda p, input, target: entropy(input, target, **mine, square=0.05),
            logits,
            {"target": TARGET},
        ),
        Case(
            "FusedLinearCrossEntropyLoss",
            lambda: modules.FusedLinearCrossEntropyLoss(num_chunks=4),
            on_linear(),
            linear,
            {"target": TARGET},
        ),
        Case(
            "FusedLinearCrossEntropyLoss-options",
            lambda: modules.FusedLinearCrossEntropyLoss(**options, num_chunks=1),
            on_linear(**mine),
            linear,
            {"target": TARGET},
        ),
    ]


CASES = [*norms(), *mixing(), *pointwise(), *feature_maps(), *losses()]
