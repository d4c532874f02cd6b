"""Token shift, RWKV's look at the token before: `delta[t] = x[t - 1] - x[t]` per sequence. Family `fused`.

Paper: https://arxiv.org/abs/2305.13048
"""

from typing import Any

from torch import Tensor, nn

from fla.backends import fused


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Any:
    """`x[t - 1] - x[t]` for `x` [B, T, D]; before a sequence's first token stands `cache` [N, D], or zero.

    With `output_cache` returns `(delta, new_cache)`, `new_cache` [N, D] the last x of every sequence (an empty sequence
    keeps its cache). `chunk_indices` is a hint that this implementation does not need. Raises ValueError for sizes that
    do not fit.
    """
    delta, last = fused.token_shift(x, cu_seqlens, cache)
    return (delta, last) if output_cache else delta


class TokenShift(nn.Module):
    """`token_shift` as a module without parameters."""

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Tensor | None = None,
        output_cache: bool = False,
        chunk_indices: Tensor | None = None,
    ) -> Any:
        """See `token_shift`."""
        return token_shift(x, cu_seqlens, cache, output_cache, chunk_indices)
