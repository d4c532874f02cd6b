"""Heads larger than a program can hold: slices whose float32 partial results are added in a fixed order."""

import torch
import triton
import triton.language as tl

from fla.backends.triton._launch import launch

BLOCK = tl.constexpr(2048)
WIDEST = 256  # key channels that one program of the forward holds
WIDEST_BACKWARD = 128  # channels of V (dq, dk) or of K (dv) that one program of the backward holds


@triton.jit(do_not_specialize=["count"])
def sum_slices_kernel(parts, out, count, SLICES: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_sum = tl.load(parts + o, mask=mask, other=0.0)
    for i in tl.static_range(1, SLICES):
        b_sum += tl.load(parts + i * count.to(tl.int64) + o, mask=mask, other=0.0)
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=mask)


def sum_slices(parts: torch.Tensor, out: torch.Tensor) -> None:
    """`out` = the sum of `parts` over their first axis, rounded once to `out`'s dtype."""
    launch(sum_slices_kernel, triton.cdiv(out.numel(), BLOCK.value), (parts, out, out.numel()), {"SLICES": len(parts)})
