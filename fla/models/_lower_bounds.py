"""Models that hand to every layer a lower bound of its forget gates, so that later layers remember longer.

    b_i = sum_{0 < j <= i} softmax(w)_j          w: a row per layer, softmax over the layers; b_0 = 0

Paper: https://arxiv.org/abs/2311.04823
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from fla.models._decoder import DecoderConfig, DecoderModel


class LowerBoundModel(DecoderModel):
    """Base of models whose mixers take a `lower_bound` `[D]`. The config's `use_lower_bound` says whether they get it.

    The parameter `lower_bounds` `[layers, D]` is 0 at first: every layer's bound is then higher by `1 / layers`.
    """

    def add_parameters(self, config: DecoderConfig) -> None:
        """Create `lower_bounds`, if the config says so."""
        settings: Any = config
        bounds = torch.empty(config.num_hidden_layers, config.hidden_size)
        self.lower_bounds = nn.Parameter(bounds) if settings.use_lower_bound else None

    def reset_parameters(self) -> None:
        """Set `lower_bounds` to 0, unless they were loaded."""
        if self.lower_bounds is not None:
            init.zeros_(self.lower_bounds)

    def layer_inputs(self) -> Sequence[Tensor | None]:
        """Every layer's bound, or None for every layer."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        weights = self.lower_bounds.to(torch.promote_types(self.lower_bounds.dtype, torch.float32)).softmax(0)
        # The first bound is 0 as a product, so that the parameter has a gradient in a model of one layer too. The
        # difference of two sums would lose the gradients of other layers beside that of the first.
        return torch.cat((0 * weights[:1], weights[1:].cumsum(0))).unbind()
