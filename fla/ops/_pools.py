"""The documentation of `inplace_final_state` and `state_indices`, which is the same for every recurrent form."""

from collections.abc import Callable
from typing import TypeVar

Op = TypeVar("Op", bound=Callable)
POOLS = """
    States that the caller owns, for decoding:
        inplace_final_state: the final state overwrites `initial_state` (float32, contiguous, no gradient), and that
            tensor is returned, whatever `output_final_state` says.
        state_indices: int `[N]`. `initial_state` is then a pool (float32, contiguous) with P slots in place of N
            states. Sequence n reads the slot `state_indices[n]`. With `inplace_final_state` it also writes that slot,
            and all slots must be distinct. Without it, `output_final_state` returns the final states in a new tensor
            `[N, ...]`. The index -1 skips a sequence: its outputs and its new final state are 0, and no slot is
            touched. An index outside the pool raises on a CPU; on a GPU the outputs of its sequence are NaN.

    Both are for inference: ValueError if a gradient is needed{not_for}.
    A serving loop owns one pool per layer, which every step updates; a step may be captured in a CUDA graph:

        pool = torch.zeros(slots, {state}, device="cuda")     # a new request takes a free slot: pool[i].zero_()
        slots_of = torch.full((batch,), -1, dtype=torch.int32, device="cuda")     # -1: no request at this place
        with torch.no_grad():
            while serving:     # {inputs} [batch, 1, ...]: one token of every request
                o, _ = {name}(
                    {inputs}{beside}, initial_state=pool, state_indices=slots_of, inplace_final_state=True
                )
    """


def steps_on_pools(inputs: str, state: str = "H, K, V", beside: str = "") -> Callable[[Op], Op]:
    """Decorator that appends this documentation to the docstring of an op.

    `inputs`: its first arguments, in order, those of tokens. `beside`: the arguments after them that it needs too.
    """

    def documented(function: Op) -> Op:
        if function.__doc__ is not None:  # python -OO has none
            not_for = ", and with `reverse`" if "reverse" in function.__annotations__ else ""
            beside_them = f", {beside}" if beside else ""
            text = POOLS.format(name=function.__name__, inputs=inputs, state=state, not_for=not_for, beside=beside_them)
            function.__doc__ = function.__doc__.rstrip() + "\n" + text
        return function

    return documented
