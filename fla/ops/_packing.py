"""The host copy of `cu_seqlens` that other programs hand to some ops."""

from torch import Tensor
from torch.compiler import is_compiling

from fla.shapes import check_bounds
from fla.varlen import check_cu_seqlens


def from_host(cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor, x: Tensor, name: str = "q") -> Tensor | None:
    """The packing of a call that gives a host copy of it: `cu_seqlens`, or the copy on the device of `x` where that
    alone is given.

    `x` is the first tensor of the call, `name` what it is called. TypeError or ValueError naming `cu_seqlens_cpu` where
    that is wrong; its values are checked where it stands alone.
    """
    if not isinstance(x, Tensor):
        return cu_seqlens  # the check of the shapes says so
    check_bounds("cu_seqlens_cpu", cu_seqlens_cpu, x, name, "cpu")
    if cu_seqlens_cpu.device.type != "cpu":
        raise ValueError(f"cu_seqlens_cpu must be on cpu, got {cu_seqlens_cpu.device}")
    if cu_seqlens is None:
        if not is_compiling():
            check_cu_seqlens(cu_seqlens_cpu, x.shape[1], "cu_seqlens_cpu")
        return cu_seqlens_cpu.to(x.device)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.shape != cu_seqlens_cpu.shape:
        raise ValueError(
            f"cu_seqlens_cpu must have the shape {list(cu_seqlens.shape)} of cu_seqlens, "
            f"got {list(cu_seqlens_cpu.shape)}"
        )
    return cu_seqlens
