"""Rotation of channel pairs by per-token angles."""

import torch
from torch import Tensor

from fla.backends.torch.fused._common import wide_dtype


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    cos, sin = (table.to(wide_dtype(x)).unsqueeze(-2) for table in (cos, sin))  # the same angle for every head
    turning, rest = x[..., : 2 * half].to(wide_dtype(x)), x[..., 2 * half :]
    if interleaved:
        first, second = turning.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = turning.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)
