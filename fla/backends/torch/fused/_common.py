"""What the parts of the family share: the dtype of the arithmetic, autocast, and second derivatives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums and statistics of `x` are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matrix product, cast as `torch.autocast` would cast them; float64 stays float64.

    An autograd Function needs its inputs cast beforehand, since autograd does not see casts inside it.
    """
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def creating_graph() -> bool:
    """Whether the running backward pass will be differentiated itself (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_with_graph(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `plain(*inputs)` that can be differentiated again.

    The backward of an autograd Function calls it if the Function's own formulas save memory but cannot be
    differentiated.
    """
    # views, because an input may have been computed from another one and must count as independent of it
    views = [x if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x, need in zip(views, needed, strict=True) if need and x is not None]
    grads = iter(torch.autograd.grad(plain(*views), wanted, upstream, create_graph=True))
    return tuple(next(grads) if need and x is not None else None for x, need in zip(views, needed, strict=True))
