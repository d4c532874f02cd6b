"""The engine of every family of recurrences: from its dataclass to backends, autograd and `torch.compile`.

A family is a dataclass whose fields are the arguments of one call, and a name:

    @dataclass(slots=True, eq=False)
    class Problem(Recurrence):
        x: Tensor                          # tensors first: those that get gradients,
        initial_state: Tensor | None
        cu_seqlens: Tensor | None          # then those that do not, named in `constants`
        reverse: bool                      # then settings: float, int, str, bool

    FAMILY = Family("scan", Problem)
    o, final_state = FAMILY(x, initial_state, cu_seqlens, reverse, output_final_state=True, backend=backend, op="scan")

From the fields follow the operators that `torch.compile` sees (`fla::scan` and `fla::scan_backward`: schemas, fakes and
gradients) and the autograd function of eager calls, which skip the operators' overhead. The package or module
`fla.backends.<backend>.<name>` computes:

    forward(problem, output_final_state, keep) -> (o, final state or None, Saved or None)
    backward(problem, saved, do, dht, needs)   -> dict: name of a field -> its gradient, in any dtype

All tensors of a problem are contiguous, and a problem is never changed after it is made. `keep` says that a backward
will follow: what the forward keeps for it is `Saved`. `backward` finds `saved` empty where nothing was kept: always
under `torch.compile`, whose operators hand on inputs alone. `needs` are the names of the fields whose gradients are
wanted; a gradient that is missing from the result is that of an input without influence. Both run with autocast off,
and never on tensors without elements.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

DEAD_LOG_DECAY = -16.0  # nats a step: what survives such a decay is below float32's digits


@dataclass(slots=True, eq=False)  # not frozen: that makes it three times as slow to build
class Recurrence:
    """One call of a family. A subclass has the fields `initial_state` and `cu_seqlens`, and its first field is a tensor
    `[B, T, ...]` whose dtype and device are those of the call."""

    constants: ClassVar[tuple[str, ...]] = ("cu_seqlens",)  # tensors that get no gradient
    first: ClassVar[str]  # the first field

    @property
    def sizes(self) -> torch.Size:
        """Of the first tensor, `[B, T, ...]`."""
        return getattr(self, self.first).shape

    @property
    def num_states(self) -> int:
        """Sequences: the rows of the batch, or those of a pack."""
        bounds: Tensor | None = getattr(self, "cu_seqlens")  # noqa: B009 - a subclass has it
        return self.sizes[0] if bounds is None else bounds.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the initial and the final states, the number of sequences first."""
        raise NotImplementedError

    @property
    def output_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, and of the incoming gradient."""
        return getattr(self, self.first).dtype

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no tokens, or no channels."""
        return 0 in self.sizes or 0 in self.output_shape


class Saved(NamedTuple):
    """What a forward keeps for its backward: the problem as the backward takes it, in which tensors may be replaced by
    what the forward made of them in their shapes and dtypes, and further tensors that only the backend knows."""

    problem: Any
    tensors: tuple[Tensor | None, ...] = ()
