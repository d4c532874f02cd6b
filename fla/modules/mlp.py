"""The gated MLP of language models: `down(act(gate(x)) * up(x))`, where `act` is silu by default.

Paper: https://arxiv.org/abs/2002.05202
"""

from typing import Any

from torch import Tensor, nn

from fla.backends import fused
from fla.modules._linear import is_plain_linear
from fla.modules.activations import get_activation, swiglu, swiglu_linear

_WIDTH_MULTIPLE = 256  # a default `intermediate_size` is rounded up to a multiple of it


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))` without biases.

    `gate_proj.weight` and `up_proj.weight` are [I, D], `down_proj.weight` is [D, I]; checkpoints have the same keys.
    A state dict loads too in which `gate_proj.weight` [2I, D] holds both, the gate in rows 0 to I-1. While both are
    plain `nn.Linear`s they print as one `gate_proj` of 2I outputs, as in the reference of January 2025.

    Args:
        intermediate_size: I; by default `hidden_size * hidden_ratio * 2/3`, rounded up to a multiple of 256.
        hidden_ratio: 4 by default.
        hidden_act: a name in `fla.modules.activations.ACT2FN`.
        fuse_swiglu: with "swish" or "silu", recompute `act(gate) * up` in the backward pass instead of keeping it.
        powglu_power: accepted for compatibility; must be 3.0.

    Raises:
        ValueError, TypeError: a setting is unknown or out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: int | float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
        powglu_power: float = 3.0,
    ) -> None:
        super().__init__()
        if powglu_power != 3.0:
            raise ValueError(
                "powglu_power must be 3.0: it belongs to hidden_act='powlu', which does not exist yet, "
                f"got {powglu_power}"
            )
        hidden_ratio = 4 if hidden_ratio is None else hidden_ratio
        fused.check_number("hidden_ratio", hidden_ratio, above=0)
        if intermediate_size is None:
            intermediate_size = _WIDTH_MULTIPLE * -(-int(hidden_size * hidden_ratio * 2 / 3) // _WIDTH_MULTIPLE)
        self.hidden_size, self.hidden_ratio = hidden_size, hidden_ratio
        fused.check_count("intermediate_size", intermediate_size)
        self._is_swish = hidden_act in ("swish", "silu")
        self.intermediate_size, self.hidden_act, self.fuse_swiglu = intermediate_size, hidden_act, fuse_swiglu
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU() if self._is_swish else get_activation(hidden_act, "hidden_act")
        self.register_load_state_dict_pre_hook(_split_gate_and_up)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """`[..., D] -> [..., D]`. Keywords are for other parts of a block; they are accepted and not used."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not (self.fuse_swiglu and self._is_swish):
            return self.down_proj(self.act_fn(gate) * up)
        if is_plain_linear(self.down_proj, x):
            return swiglu_linear(gate, up, self.down_proj.weight, self.down_proj.bias)
        return self.down_proj(swiglu(gate, up))

    def __repr__(self) -> str:
        text, (gate, up) = super().__repr__(), (repr(self.gate_proj), repr(self.up_proj))
        if gate != up or type(self.gate_proj) is not nn.Linear:
            return text
        joined = gate.replace(f"out_features={self.intermediate_size}", f"out_features={2 * self.intermediate_size}")
        return text.replace(f"\n  (up_proj): {up}", "").replace(f"(gate_proj): {gate}", f"(gate_proj): {joined}")


def _split_gate_and_up(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Split a checkpoint's `gate_proj` that holds both projections. If one is missing, the loader reports it."""
    gate, up = prefix + "gate_proj.weight", prefix + "up_proj.weight"
    rows = module.intermediate_size
    if gate in state_dict and up not in state_dict and state_dict[gate].shape[0] == 2 * rows:
        state_dict[gate], state_dict[up] = (half.clone() for half in state_dict[gate].split(rows))
