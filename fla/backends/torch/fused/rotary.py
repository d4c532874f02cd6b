"""Rotation of channel pairs by per-token angles."""

import torch
from torch import Tensor

from fla.backends.torch.fused._common import wide_dtype


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    cos, sin = (table.to(wide_dtype(x)).unsqueeze(-2) for table in (cos, sin))  # the same angle for every head
    x_rotary, rest = x[..., : 2 * half].to(wide_dtype(x)), x[..., 2 * half :]
    if interleaved:
        first, second = x_rotary.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = x_rotary.chunk(2, -1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    y = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)
