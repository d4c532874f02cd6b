"""Options of the chunk forms of `dplr` and `rwkv7` that change nothing about results: what values they may have."""

from typing import Any

from fla.shapes import check_chunk_size


def check_options(
    op: str,
    chunk_size: int | None,
    lower_bound: float | None,
    cp_context: Any,
    safe_gate: bool,
    disable_recompute: bool,
) -> None:
    """TypeError or ValueError for a value that none of these may have.

    NotImplementedError for `cp_context`, sequences spread over several GPUs.
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    if lower_bound is not None:
        if isinstance(lower_bound, bool) or not isinstance(lower_bound, (int, float)):
            raise TypeError(f"lower_bound must be a negative number or None, got {type(lower_bound).__name__}")
        if not lower_bound < 0:
            raise ValueError(f"lower_bound must be negative, as log decays are, got {lower_bound}")
    for name, value in (("safe_gate", safe_gate), ("disable_recompute", disable_recompute)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    if cp_context is not None:
        raise NotImplementedError(
            f"{op} computes whole sequences on one device: cp_context, which spreads them over several, must be None"
        )
