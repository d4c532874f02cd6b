"""The family `fused`, for every backend: the operations around a token mixer, none of which is a recurrence.

| function | computes | axes |
| --- | --- | --- |
| `norm`, `norm_linear` | RMS, layer or group norm of `x + residual`, times a gate; a linear map of that | `[..., D]` |
| `l2norm` | `x / sqrt(sum(x^2) + eps)` | `[..., D]` |
| `glu`, `glu_linear` | `activation(x) * y`; a linear map of that | `[..., D]` |
| `rotary` | channel pairs rotated by an angle per token | `[B, T, H, D]` |
| `conv`, `conv_step` | a causal depthwise convolution, with state `[N, D, W]` and packing | `[B, T, D]` |
| `token_shift` | `x[t - 1] - x[t]`, with state `[N, D]` and packing | `[B, T, D]` |
| `cross_entropy` | the loss of every row of logits | `[N, V]` |
| `linear_cross_entropy` | the loss of a linear map, whose logits are never held all at once | `[N, D]` |

Each function here checks its arguments, picks the backend and calls the function of the same name in
`fla.backends.<backend>.fused`. That function is differentiable and can be captured by
`torch.compile(fullgraph=True)`. Arithmetic is float32 (float64 for float64). A result has the dtype of `x`, a gradient
that of its input.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla.backends import family, resolve
from fla.shapes import check_shapes
from fla.varlen import check_cu_seqlens

FAMILY = "fused"
ACTIVATIONS = ("swish", "silu", "sigmoid")
CONV_ACTIVATIONS = (None, "swish", "silu")
CONV_BACKENDS = (None, "triton", "torch", "cuda")  # callers of other libraries say "cuda"; here it means None


@dataclass(frozen=True)
class CrossEntropy:
    """The settings of a cross entropy loss. With target class `y`, `s = label_smoothing` and `lse = logsumexp(z)`:

    z = softcap(logit_scale * logits)
    loss = lse - (1 - s) z[y] - s mean(z) + lse_square_scale * lse^2
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    lse_square_scale: float = 0.0
    logit_softcapping: float | None = None
    inplace_backward: bool = False  # the gradient may overwrite the logits

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "logit_scale", "lse_square_scale"):
            check_number(name, getattr(self, name))
        check_number("logit_softcapping", self.logit_softcapping, above=0, optional=True)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        if type(self.ignore_index) is not int:
            raise TypeError(f"ignore_index must be an int, got {type(self.ignore_index).__name__}")


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    is_rms: bool,
    group_size: int | None = None,
    activation: str = "swish",
    gate_first: bool = False,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """`y = (norm(x + residual) * weight + bias) * activation(gate)`, for `x` [..., D], `weight` and `bias` [D].

    `group_size`: normalise groups of that many channels instead of the whole last axis.
    `gate_first`: the gate multiplies the input of the norm instead of its output.
    `prenorm`: return `(y, x + residual)`, the second in the residual's dtype. Without a residual the second is `x`, in
    float32 if `residual_in_fp32`.
    """
    _check_norm(x, weight, bias, residual, gate, group_size, activation)
    options = {
        "eps": eps,
        "is_rms": is_rms,
        "group_size": group_size,
        "activation": activation,
        "gate_first": gate_first,
    }
    y = _backend("norm", x).norm(x, weight, bias, residual, gate, **options)
    return (y, _residual_stream(x, residual, residual_in_fp32)) if prenorm else y


def norm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    is_rms: bool,
    group_size: int | None = None,
    activation: str = "swish",
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """`norm(...) @ linear_weight.T + linear_bias`, with the arguments of `norm` and `linear_weight` [O, D].

    The normalised activation is recomputed in the backward pass. Under autocast the product runs in the autocast dtype.
    """
    _check_norm(x, weight, bias, residual, gate, group_size, activation)
    _check_linear(linear_weight, linear_bias, x)
    y = _backend("norm_linear", x).norm_linear(
        x,
        weight,
        bias,
        residual,
        gate,
        linear_weight,
        linear_bias,
        eps=eps,
        is_rms=is_rms,
        group_size=group_size,
        activation=activation,
        gate_first=False,
    )
    return (y, _residual_stream(x, residual, residual_in_fp32)) if prenorm else y


def l2norm(x: Tensor, eps: float, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in `output_dtype` (default: that of `x`)."""
    check_float("x", x)
    return _backend("l2norm", x).l2norm(x, eps, output_dtype)


def l2norm_fwd(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`l2norm(x)` and `r = 1 / sqrt(sum(x^2) + eps)` [...], both without a gradient; `l2norm_bwd` takes both."""
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return l2norm(x, eps, output_dtype), torch.rsqrt(wide.square().sum(-1) + eps)


def l2norm_bwd(y: Tensor, rstd: Tensor, dy: Tensor, eps: float = 1e-6) -> Tensor:
    """The gradient of `x`, `r (dy - y (y . dy))`, from the results `y` and `rstd` (r) of `l2norm_fwd`.

    `eps` has no effect: it is contained in `rstd`.
    """
    with torch.no_grad():
        u, du = (z.to(rstd.dtype) for z in (y, dy))
        return (rstd.unsqueeze(-1) * (du - u * (u * du).sum(-1, keepdim=True))).to(y.dtype)


def glu(x: Tensor, y: Tensor, activation: str) -> Tensor:
    """`activation(x) * y`."""
    check_float("x", x)
    _check_like("y", y, x)
    _check_choice("activation", activation, ACTIVATIONS)
    return _backend("glu", x).glu(x, y, activation)


def glu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`(activation(x) * y) @ weight.T + bias`, `weight` [O, D]. `activation(x) * y` is recomputed in the backward."""
    check_float("x", x)
    _check_like("y", y, x)
    _check_linear(weight, bias, x)
    _check_choice("activation", activation, ACTIVATIONS)
    return _backend("glu_linear", x).glu_linear(x, y, weight, bias, activation)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `2 R` channels of `x` [B, T, H, D] by the angles of `cos`, `sin` [T, R] or [B, T, R].

        y1 = x1 cos - x2 sin
        y2 = x1 sin + x2 cos

    The pairs `(x1, x2)` are `(x[i], x[i + R])`, or `(x[2i], x[2i + 1])` if `interleaved`.
    """
    check_float("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, T, H, D], got {list(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        _check_device(name, table, x)
    if cos.shape != sin.shape or tuple(cos.shape[:-1]) not in ((x.shape[1],), (x.shape[0], x.shape[1])):
        raise ValueError(
            f"cos and sin must have one row per token of x {list(x.shape)}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos must have at most {x.shape[-1] // 2} columns, half the channels of x {list(x.shape)}, "
            f"got {cos.shape[-1]}"
        )
    return _backend("rotary", x).rotary(x, cos, sin, interleaved)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`y[t] = activation(sum_j weight[:, j] x[t - (W - 1) + j] + bias) + residual`, for x [B, T, D], weight [D, W].

    `initial_state` [N, D, W] holds the W inputs before every sequence, oldest first; None stands for zeros. The second
    result is the final state or None. Packed sequences do not see each other. No input is written to.
    """
    check_shapes(
        {
            "x": "B T D",
            "weight": "D W",
            "bias": "D",
            "residual": "B T D",
            "initial_state": "N D W",
        },
        same_dtype=(),
        required=("x", "weight"),
        cu_seqlens=cu_seqlens,
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        initial_state=initial_state,
    )
    _check_choice("activation", activation, CONV_ACTIVATIONS)
    check_packing_values(cu_seqlens, x.shape[1])
    return _backend("causal_conv1d", x, _conv_backend(backend)).conv(
        x, weight, bias, residual, initial_state, output_final_state, activation, cu_seqlens
    )


def conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `conv` for x [N, D]. It updates `state` [N, D, W] IN PLACE: shifted by one token, `x` appended."""
    shapes = {"x": "B D", "state": "B D W", "weight": "D W", "bias": "D", "residual": "B D"}
    required = ("x", "state", "weight")
    check_shapes(
        shapes, same_dtype=(), required=required, x=x, state=state, weight=weight, bias=bias, residual=residual
    )
    _check_choice("activation", activation, CONV_ACTIVATIONS)
    module = _backend("causal_conv1d_update", x, _conv_backend(backend))
    return module.conv_step(x, state, weight, bias, residual, activation)


def token_shift(x: Tensor, cu_seqlens: Tensor | None = None, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x[t - 1] - x[t]` in every sequence of x [B, T, D], and the last x of every sequence [N, D].

    Before a sequence's first token stands its row of `cache` [N, D], or zeros.
    """
    shapes = {"x": "B T D", "cache": "N D"}
    check_shapes(shapes, same_dtype=(), required=("x",), cu_seqlens=cu_seqlens, x=x, cache=cache)
    check_packing_values(cu_seqlens, x.shape[1])
    return _backend("token_shift", x).token_shift(x, cu_seqlens, cache)


def cross_entropy(logits: Tensor, target: Tensor, options: CrossEntropy) -> tuple[Tensor, Tensor]:
    """The loss of every row [N], and the part of it that comes from `lse_square_scale` [N], which has no gradient.

    logits [N, V], target [N] of integers; both results are float32 (float64 for float64).
    """
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, V] with V >= 1, got {list(logits.shape)}")
    _check_target(target, logits, logits.shape[1], options.ignore_index)
    return _backend("cross_entropy", logits).cross_entropy(logits, target.long(), options)


def linear_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    num_chunks: int,
    wide_weight_grad: bool,
    mean: bool,
    options: CrossEntropy,
) -> Tensor:
    """The sum of the losses of `x @ weight.T + bias`, or their `mean` over the targets that are not ignored.

    x [N, D], target [N], weight [V, D]; the result is a float32 scalar, and 0 if all targets are ignored. Tokens are
    processed in `num_chunks` chunks, so that the logits of one chunk exist at a time. If gradients are recorded, they
    are computed in the forward pass, together with these logits.
    `wide_weight_grad`: sum the chunks' contributions to the weight's gradient in float32, not in the weight's dtype.
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, D], got {list(x.shape)}")
    _check_linear(weight, bias, x)
    _check_target(target, x, weight.shape[0], options.ignore_index)
    check_count("num_chunks", num_chunks)
    return _backend("linear_cross_entropy", x).linear_cross_entropy(
        x, target.long(), weight, bias, num_chunks, wide_weight_grad, mean, options
    )


def _backend(op: str, x: Tensor, backend: str | None = None) -> Any:
    return family(FAMILY, resolve(FAMILY, x, backend), op)


def _conv_backend(backend: str | None) -> str | None:
    _check_choice("backend", backend, CONV_BACKENDS)
    return None if backend == "cuda" else backend


def _residual_stream(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> Tensor:
    """The second result of a norm with `prenorm`: `x + residual`, or `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        return (x.to(wide) + residual).to(residual.dtype)
    return x.to(wide) if residual_in_fp32 else x


def check_float(name: str, x: Any) -> None:
    """Raise TypeError unless `x` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError unless `x` is a tensor or None."""
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_number(name: str, value: Any, above: float | None = None, optional: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number greater than `above`, or None if `optional`."""
    if optional and value is None:
        return
    kind = ("None or " if optional else "") + ("a finite number" if above is None else f"a finite number above {above}")
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or (above is not None and value <= above):
        raise ValueError(f"{name} must be {kind}, got {value}")


def check_count(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool. A number here is most likely another argument in the wrong place."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")


def _check_device(name: str, y: Tensor, x: Tensor) -> None:
    if y.device != x.device:
        hint = ": its values are not there (offloaded, or not loaded yet)" if y.is_meta else ""
        raise ValueError(f"{name} must be on {x.device} like the tensor it is applied to, got {y.device}{hint}")


def _check_like(name: str, y: Any, x: Tensor) -> None:
    check_float(name, y)
    if y.shape != x.shape or y.device != x.device:
        raise ValueError(
            f"{name} must have the shape and device of x ({list(x.shape)}, {x.device}), got {list(y.shape)}, {y.device}"
        )


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_norm(x, weight, bias, residual, gate, group_size, activation) -> None:
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one axis, the last not empty, got shape {list(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        check_tensor(name, p)
        if p.dim() != 1 or p.shape[0] != x.shape[-1]:
            raise ValueError(f"x must have as many channels as {name} {list(p.shape)}, got {list(x.shape)}")
        _check_device(name, p, x)
    if residual is not None:
        _check_like("residual", residual, x)
    if gate is not None:
        _check_like("the gate", gate, x)
    if group_size is not None and (group_size < 1 or x.shape[-1] % group_size):
        raise ValueError(f"the group size must divide the last axis of x ({x.shape[-1]}), got {group_size}")
    _check_choice("activation", activation, ACTIVATIONS)


def _check_linear(weight: Any, bias: Any, x: Tensor) -> None:
    check_float("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape [out, {x.shape[-1]}], got {list(weight.shape)}")
    _check_device("weight", weight, x)
    if bias is None:
        return
    check_float("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    _check_device("bias", bias, x)


def _check_target(target: Any, scores: Tensor, num_classes: int, ignore_index: int) -> None:
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target must be an integer tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != scores.shape[:1]:
        raise ValueError(f"target must have shape {list(scores.shape[:1])}, a class per row, got {list(target.shape)}")
    _check_device("target", target, scores)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU the check would wait for it
        wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
        if wrong.any():
            raise ValueError(
                f"target must lie in [0, {num_classes}) or be ignore_index={ignore_index}, got {int(target[wrong][0])}"
            )


def check_packing_values(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` runs from 0 to `num_tokens` without decreasing (`fla.varlen`)."""
    if cu_seqlens is not None and not torch.compiler.is_compiling():  # a compiled graph cannot branch on values
        check_cu_seqlens(cu_seqlens, num_tokens)


family(FAMILY, "torch")  # imported now, so that no capture of a graph has to import it
