"""RWKV-6's low-rank projection, which RWKV-7 uses too (https://arxiv.org/abs/2404.05892)."""

from __future__ import annotations

from torch import Tensor, nn

from fla.layers._mixer import check_positive

_ACTIVATIONS = {None: nn.Identity, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


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
