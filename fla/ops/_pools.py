"""What every recurrent form says of states that its caller owns: `inplace_final_state` and `state_indices`."""

from collections.abc import Callable
from typing import TypeVar

Op = TypeVar("Op", bound=Callable)
POOLS = """
    States that the caller owns, for decoding:
        inplace_final_state: the final state overwrites `initial_state` (float32, contiguous, no gradient) and is
            returned as that same tensor, whether or not `output_final_state` asks for it.
        state_indices: int `[N]`; `initial_state` is then a pool, P slots in place of N (float32, contiguous). Sequence
            n reads slot `state_indices[n]`, and in place writes it. -1 skips a sequence: its outputs are 0, a fresh
            final state too, and no slot is touched. Not in place the final states are N fresh ones, if asked for.
            Slots must be distinct in place. On a CPU a slot outside the pool raises; on a GPU its outputs are NaN.

    Both are for inference: ValueError where a gradient is needed{not_for}.
    A serving loop owns one pool a layer and lets each step write it; every step may be captured in a CUDA graph:

        pool = torch.zeros(slots, {state}, device="cuda")     # a request takes a free slot: pool[i].zero_()
        slots_of = torch.full((batch,), -1, dtype=torch.int32, device="cuda")     # -1: an empty place of the batch
        with torch.no_grad():
            while serving:     # {inputs} [batch, 1, ...]: one token of every request
                o, _ = {name}(
                    {inputs}, initial_state=pool, state_indices=slots_of, inplace_final_state=True
                )
    """


def steps_on_pools(inputs: str, state: str = "H, K, V") -> Callable[[Op], Op]:
    """Ends the docstring of an op that takes both with what they mean; `inputs`: its tensors in their order."""

    def documented(function: Op) -> Op:
        if function.__doc__ is not None:  # python -OO has none
            not_for = ", and with `reverse`" if "reverse" in function.__annotations__ else ""
            text = POOLS.format(name=function.__name__, inputs=inputs, state=state, not_for=not_for)
            function.__doc__ = function.__doc__.rstrip() + "\n" + text
        return function

    return documented
