"""What the layers of RWKV share: the official rules for initial weights, sizes, and the base of the channel mixes.

The rules depend on where a layer stands among `num_hidden_layers`. Values are computed and drawn in float32, whatever
the dtype of the parameter, and parameters that were loaded from a checkpoint are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fla.layers._heads import split_width as split_width
from fla.layers._mixer import Call, ChannelMixer, check_positive
from fla.modules.activations import get_activation

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


def fill_(parameter: Tensor, values: Tensor | float) -> None:
    """Set a parameter to `values`, unless it was loaded from a checkpoint."""
    if not _is_loaded(parameter):
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))


def orthogonal_(parameter: Tensor, gain: float = 1.0) -> None:
    """Set a matrix to an orthogonal one times `gain`, drawn in float32, unless it was loaded from a checkpoint."""
    if not _is_loaded(parameter):
        fill_(parameter, nn.init.orthogonal_(torch.empty_like(parameter, dtype=torch.float32), gain))


def _is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)  # transformers marks what it has loaded


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
