"""Which dtype the arithmetic runs in."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: the dtype in which sums and statistics of `x` are formed."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matrix product as `torch.autocast` would cast them (float64 stays).

    Needed in front of an autograd Function: inside one, autograd does not see the casts.
    """
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
