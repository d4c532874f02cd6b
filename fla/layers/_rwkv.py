"""What the layers of RWKV share: what their initial weights depend on, projections of low rank and of tokens that are
mixed with the ones before, and the base of the channel mixes.

The official rules for initial weights (`_initial.py` sets them) depend on where a layer stands among
`num_hidden_layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fla.layers._mixer import Call, ChannelMixer, check_positive
from fla.modules.activations import get_activation
from fla.modules.token_shift import token_shift

_ACTIVATIONS = {None: nn.Identity, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
_WIDTH_MULTIPLE = 32  # a default `intermediate_size` is rounded up to a multiple of it


def depth(layer_idx: int | None, num_hidden_layers: int | None) -> tuple[float, float, float]:
    """Where layer i of L stands: `i / (L - 1)`, which is 0 in a model of one layer, `1 - i / L` and `(i + 1) / L`.

    Without an index the layer is taken for the first one, and without a number of layers for the last one.
    """
    index = layer_idx or 0
    layers = index + 1 if num_hidden_layers is None else num_hidden_layers
    return index / max(layers - 1, 1), 1 - index / layers, (index + 1) / layers


def channels(parameter: Tensor) -> Tensor:
    """The number of every channel of the last axis, 0, 1, 2, ..., in float32."""
    return torch.arange(parameter.shape[-1], dtype=torch.float32, device=parameter.device)


class LoRA(nn.Module):
    """A projection of low rank, `W2 activation(W1 x) + b`, `[..., input_dim] -> [..., output_dim]`.

    `lora.0.weight` is W1 `[low_rank_dim, input_dim]`, `lora.2.weight` is W2 `[output_dim, low_rank_dim]`, and
    `lora.2.bias` is b, which is only there with `bias`.

    Args:
        activation: "tanh", "sigmoid", "relu" or None.

    Raises ValueError or TypeError, naming the argument.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        low_rank_dim: int,
        bias: bool | None = True,
        activation: str | None = "tanh",
    ) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, output_dim=output_dim, low_rank_dim=low_rank_dim)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'tanh', 'sigmoid', 'relu' or None, got {activation!r}")
        self.input_dim, self.output_dim, self.low_rank_dim = input_dim, output_dim, low_rank_dim
        self.lora = nn.Sequential(
            nn.Linear(input_dim, low_rank_dim, bias=False),
            _ACTIVATIONS[activation](),
            nn.Linear(low_rank_dim, output_dim, bias=bool(bias)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.lora(x)


class DDLerpLinear(nn.Module):
    """A projection `W (x_t + d_t mu)` of a token mixed with the one before by the factors `mu` of the call.

    `linear` is W: a matrix, or with `low_rank_dim` a `LoRA`.
    """

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int | None = None) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, output_dim=output_dim)
        self.input_dim, self.output_dim, self.low_rank_dim = input_dim, output_dim, low_rank_dim
        self.linear: nn.Module
        if low_rank_dim is None:
            self.linear = nn.Linear(input_dim, output_dim, bias=False)
        else:
            self.linear = LoRA(input_dim, output_dim, low_rank_dim)

    def forward(self, x: Tensor, mu: Tensor, delta: Tensor | None = None) -> Tensor:
        """`[B, T, input_dim] -> [B, T, output_dim]`; `delta` is d, by default of rows that are a sequence each."""
        return self.linear(torch.addcmul(x, token_shift(x) if delta is None else delta, mu))


class LerpLinear(DDLerpLinear):
    """`DDLerpLinear` with factors `mu` `[input_dim]` that are a parameter, at first zero."""

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int | None = None) -> None:
        super().__init__(input_dim, output_dim, low_rank_dim)
        self.mu = nn.Parameter(torch.zeros(input_dim))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """See `DDLerpLinear`."""
        return super().forward(x, self.mu, delta)


class ChannelMix(ChannelMixer):
    """Base of RWKV's MLPs, which see the token before. A subclass defines `transform(x, delta)`.

    Args:
        hidden_ratio: I as a factor of `hidden_size`, rounded up to a multiple of 32.
        intermediate_size: I itself; None: by `hidden_ratio`.
        hidden_act: a name in `fla.modules.activations.ACT2FN`.
        layer_idx, num_hidden_layers: the layer's place in a model, for the cache and the initial weights.

    State: the last input `[B, D]` of every sequence.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float,
        intermediate_size: int | None,
        hidden_act: str,
        layer_idx: int | None,
        num_hidden_layers: int | None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if intermediate_size is None:
            intermediate_size = _WIDTH_MULTIPLE * -(-int(hidden_size * hidden_ratio) // _WIDTH_MULTIPLE)
        check_positive(intermediate_size=intermediate_size)
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.act_fn: Any = get_activation(hidden_act, "hidden_act")

    def transform(self, x: Tensor, delta: Tensor) -> Tensor:
        """`[B, T, D] -> [B, T, D]`, where `delta` is `x[t - 1] - x[t]`."""
        raise NotImplementedError(f"{type(self).__name__} must define transform()")

    def mix(self, x: Tensor, call: Call) -> Tensor:
        delta = self.shift(x, call, "ffn_shift")
        self.remember(call)
        return self.transform(x, delta)

    def recurrent_size(self) -> int:
        """Elements of a sequence's token shift."""
        return self.hidden_size
