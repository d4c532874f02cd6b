"""Heads wider than a program can hold are computed in slices.

The partial results of the slices are float32, and are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from fla.backends.triton._launch import ceil_div, empty_as, launch

BLOCK = tl.constexpr(2048)


@triton.jit(do_not_specialize=["count"])
def sum_slices_kernel(parts, out, count, SLICES: tl.constexpr, EVEN: tl.constexpr):
    """`out` `[count]` = the sum of `parts` `[SLICES, count]`. EVEN: `count` arrives divided by 16."""
    i_block = tl.program_id(0).to(tl.int64)
    if EVEN:  # the product tells the compiler that `count` is a multiple of 16, so that loads may be wide
        count = (i_block * 0 + count) * 16
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_sum = tl.load(parts + o, mask=mask, other=0.0)
    for i in tl.static_range(1, SLICES):
        b_sum += tl.load(parts + (tl.zeros([BLOCK], tl.int64) + i) * count + o, mask=mask, other=0.0)
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=mask)


def sum_slices(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the sum of `parts` over their first axis to `out`, rounded once to its dtype."""
    count = out.numel()
    even = count % 16 == 0
    arguments = (parts, out, count // 16 if even else count)
    launch(sum_slices_kernel, ceil_div(count, BLOCK.value), arguments, {"SLICES": len(parts), "EVEN": even})


def summed_slices(parts: torch.Tensor, slices: int, like: torch.Tensor) -> torch.Tensor:
    """The sum of partial results, one for each slice, in the dtype and shape of `like`."""
    if slices == 1 and parts.dtype == like.dtype:
        return parts.view(like.shape)
    out = empty_as(like)
    sum_slices(parts.view(slices, *like.shape), out)
    return out
