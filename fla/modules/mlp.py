"""The gated MLP of language models: `down(act(gate(x)) * up(x))`, where `act` is silu by default.

Paper: https://arxiv.org/abs/2002.05202
"""

from typing import Any

import torch
from torch import Tensor, nn

from fla.backends import fused
from fla.modules.activations import get_activation, swiglu, swiglu_linear

_WIDTH_MULTIPLE = 256  # a default `intermediate_size` is rounded up to a multiple of it


class GatedMLP(nn.Module):
    """`down_proj(act(gate) * up)` without biases, where one projection computes both gate and up.

    `gate_proj.weight` is [2I, D]: rows 0 to I-1 are the gate, rows I to 2I-1 the up projection. `down_proj.weight` is
    [D, I]. A state dict with separate `gate_proj` and `up_proj` [I, D] loads too.

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
        self.gate_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU() if self._is_swish else get_activation(hidden_act, "hidden_act")
        self.register_load_state_dict_pre_hook(_join_gate_and_up)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """`[..., D] -> [..., D]`. Keywords are for other parts of a block; they are accepted and not used."""
        gate, up = self.gate_proj(x).chunk(2, dim=-1)
        if not (self.fuse_swiglu and self._is_swish):
            return self.down_proj(self.act_fn(gate) * up)
        if _is_plain_linear(self.down_proj):
            return swiglu_linear(gate, up, self.down_proj.weight, self.down_proj.bias)
        return self.down_proj(swiglu(gate, up))


def _is_plain_linear(linear: nn.Module) -> bool:
    """Whether a call only multiplies: the class is no adapter or quantised layer, there are no hooks, no offloading."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and not hooks and "forward" not in vars(linear)


def _join_gate_and_up(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Join separate `gate_proj` and `up_proj` of a checkpoint. If one is missing, the loader reports it."""
    gate, up = prefix + "gate_proj.weight", prefix + "up_proj.weight"
    if gate in state_dict and up in state_dict:
        state_dict[gate] = torch.cat((state_dict[gate], state_dict.pop(up)))
