"""Token shift, with which RWKV mixes a token and the one before: `delta[t] = x[t - 1] - x[t]` in every sequence.

Family: `fused`. Paper: https://arxiv.org/abs/2305.13048
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
    """`delta[t] = x[t - 1] - x[t]` for `x` [B, T, D]. Before a sequence's first token stands `cache` [N, D], or zero.

    With `output_cache` the result is `(delta, new_cache)`, where `new_cache` [N, D] is the last x of every sequence; an
    empty sequence keeps its cache. `chunk_indices` is accepted for compatibility and not used. Raises ValueError for
    shapes that do not fit.
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
