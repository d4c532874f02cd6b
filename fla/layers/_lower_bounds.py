"""Forget gates with a lower bound that the model hands to its layers: the rule that HGRN and HGRN2 share.

    a_t = b + (1 - b) sigmoid(f_t)          what is kept of the state; b: the lower bound, from 0 to 1
    i_t = 1 - a_t                           what is written

Paper: https://arxiv.org/abs/2311.04823
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Below it `sigmoid(f)` is less than float32's smallest normal number, so that without a bound its logarithm would be
# -inf and the gradient NaN. What it changes in a state is far below rounding.
_LOWEST = -80.0


def bounded_gate(f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """`1 - a` and `log(a)` for `f` `[..., D]` and a bound `[D]`; no bound is the same as a bound of 0.

    Both are computed in float32, and in float64 for float64: in a narrower dtype a gate near 1 would round to 1, and
    the state would never be forgotten.
    """
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    if lower_bound is None:
        return (-f).sigmoid(), F.logsigmoid(f)
    f, bound = f.clamp(min=_LOWEST), lower_bound.to(f.dtype)
    return (1 - bound) * (-f).sigmoid(), (bound + (1 - bound) * f.sigmoid()).log()
