"""The engine of every family of recurrences: from its dataclass to backends, autograd and `torch.compile`.

A family is a dataclass whose fields are the arguments of one call, and a name:

    @dataclass(slots=True, eq=False)
    class Problem(Recurrence):
        x: Tensor                          # tensors first: those that get gradients,
        initial_state: Tensor | None
        cu_seqlens: Tensor | None          # then those that do not, named in `constants`
        reverse: bool                      # then settings: float, int, str, bool

    FAMILY = Family("scan", Problem)
    o, final_state = FAMILY.call((x, initial_state, cu_seqlens, reverse), output_final_state, backend, op="chunk_scan")

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

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import compress
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fla.backends import family, resolve
from fla.backends._step import Stepping
from fla.varlen import check_cu_seqlens


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
    def device_type(self) -> str:
        return getattr(self, self.first).device.type

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


class Family:
    """A family, by its name and its dataclass. It is called with a tuple of the values of the fields in their order."""

    def __init__(self, name: str, problem: type[Recurrence]) -> None:
        self.name, self.problem = name, problem
        self.types = _schema_types(problem)
        tensors = tuple(field for field, kind in self.types.items() if kind.startswith("Tensor"))
        self.names = tuple(field for field in tensors if field not in problem.constants)  # of what gets gradients
        if tuple(self.types)[: len(tensors)] != tensors or tensors[: len(self.names)] != self.names:
            raise TypeError(f"the fields of {problem} must be tensors with gradients, other tensors, then settings")
        problem.first = tensors[0]
        self.num_tensors, self.num_differentiable = len(tensors), len(self.names)
        self.make = _maker(problem, self.types)
        self._first_of = attrgetter(tensors[0])
        self._tensors_of = attrgetter(*tensors)
        self._differentiable_of = attrgetter(*self.names)
        self._function = _autograd_function(self)
        self._operator = _operator(self)
        self._stepping = Stepping(self)

    def call(
        self, values: tuple, output_final_state: bool, backend: str | None = None, op: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`o`, and the final state or None. `backend` as in `fla.backends.resolve`; `op` is its name in the log."""
        backend = resolve(self.name, values[0], backend)
        if is_compiling():
            o, state = self._operator(*values, output_final_state, backend)
            return o, state if output_final_state else None
        if forward_ad._current_level >= 0 or _transforms() is not None:
            _refuse_transforms(op or self.name, values[: self.num_differentiable])
        module = family(self.name, backend, op)
        if torch.is_grad_enabled():
            differentiable = values[: self.num_differentiable]
            for x in differentiable:
                if x is not None and x.requires_grad:  # autograd takes its time over every argument: the rest is one
                    return self._function.apply(*differentiable, (values, output_final_state, module, op))
        o, state, _ = self.forward(self.make(*values), output_final_state, False, module)
        return o, state

    def step(
        self,
        values: tuple,
        state_indices: Tensor | None,
        inplace_final_state: bool,
        output_final_state: bool,
        state_v_first: bool = False,
        backend: str | None = None,
        op: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same on states that the caller owns (`fla.backends._step`)."""
        options = (state_indices, inplace_final_state, output_final_state, state_v_first, backend, op)
        return self._stepping(values, *options)

    def check_states(self, values: tuple, state_indices: Tensor | None, inplace_final_state: bool) -> None:
        """ValueError or TypeError unless `step` can use the states as they are."""
        self._stepping.check(values, state_indices, inplace_final_state)

    def forward(self, problem: Any, output_final_state: bool, keep: bool, module: Any) -> tuple:
        """The backend's forward, and what it need not know of."""
        if problem.cu_seqlens is not None:
            check_cu_seqlens(problem.cu_seqlens, problem.sizes[1])
        if problem.is_empty:
            return self.idle_output(problem), self._idle_state(problem) if output_final_state else None, None
        x = self._first_of(problem)
        device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):  # asked first, for the context costs more than the rest of a call
            with torch.autocast(device, enabled=False):  # backends choose their precision themselves
                return module.forward(problem, output_final_state, keep)
        return module.forward(problem, output_final_state, keep)

    def backward(
        self, saved: Saved, do: Tensor, dht: Tensor | None, needs: tuple[str, ...], module: Any
    ) -> list[Tensor | None]:
        """The gradient of every field of `names` in its dtype, None where there is none or it is not needed."""
        problem, kept = saved
        inputs = self._differentiable_of(problem)
        if problem.is_empty:
            found = {
                name: None if x is None else torch.zeros_like(x) for name, x in zip(self.names, inputs, strict=True)
            }
            if dht is not None:
                found["initial_state"] = dht
        else:
            x = inputs[0]
            dtype, device = x.dtype, "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
            do = do.contiguous() if do.dtype == dtype else do.to(dtype).contiguous()
            dht = None if dht is None else dht.contiguous()
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    found = module.backward(problem, kept, do, dht, needs)
            else:
                found = module.backward(problem, kept, do, dht, needs)
        gradients: list[Tensor | None] = []
        for name, x in zip(self.names, inputs, strict=True):
            d = found.get(name) if x is not None and name in needs else None
            gradients.append(d if d is None or d.dtype == x.dtype else d.to(x.dtype))
        return gradients

    @staticmethod
    def idle_output(problem: Any) -> Tensor:
        """The output of a call without tokens or channels."""
        return getattr(problem, problem.first).new_zeros(problem.output_shape, dtype=problem.output_dtype)

    @staticmethod
    def _idle_state(problem: Any) -> Tensor:
        """The final state of a call without tokens: the initial one."""
        state = getattr(problem, problem.first).new_zeros(problem.state_shape, dtype=problem.state_dtype)
        return state if problem.initial_state is None else state + problem.initial_state


def _schema_types(problem: type[Recurrence]) -> dict[str, str]:
    """Name of every field -> its type in an operator's schema."""
    known = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}
    hints, found = typing.get_type_hints(problem), {}
    for name in (field.name for field in fields(problem)):
        kind, suffix = hints[name], ""
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            (kind,), suffix = [part for part in typing.get_args(kind) if part is not type(None)], "?"
        found[name] = known[kind] + suffix
    return found


def _maker(problem: type[Recurrence], kinds: dict[str, str]) -> Callable[..., Any]:
    """The function from the values of the fields to a problem whose tensors are contiguous. It is written out, as the
    constructor of a dataclass is, because it is part of the time of every call."""
    made = {"Tensor": "{0}.contiguous()", "Tensor?": "None if {0} is None else {0}.contiguous()"}
    values = ", ".join(made.get(kind, "{0}").format(name) for name, kind in kinds.items())
    return eval(f"lambda {', '.join(kinds)}: problem({values})", {"problem": problem})


def _autograd_function(made: Family) -> type[torch.autograd.Function]:
    """What eager calls with gradients go through."""
    count, num_tensors, make, tensors_of = made.num_differentiable, made.num_tensors, made.make, made._tensors_of

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            values, output_final_state, module, op = inputs[count]
            given = make(*values)
            o, state, saved = made.forward(given, output_final_state, True, module)
            problem, kept = (given, ()) if saved is None else saved
            ctx.settings = values[num_tensors:], module, op, num_tensors + len(kept)
            if problem is not given:
                kept = (*kept, *_anchors(inputs, made._differentiable_of(given), made._differentiable_of(problem)))
            ctx.save_for_backward(*tensors_of(problem), *kept)
            ctx.set_materialize_grads(False)
            return o, state

        @staticmethod
        def backward(ctx, do, dht):
            if not torch.is_grad_enabled():
                return input_gradients(ctx, do, dht)
            with torch.no_grad():
                found = input_gradients(ctx, do, dht)
            return _FirstDerivative.apply(ctx.settings[2] or made.name, len(found), *found, do, dht, *ctx.saved_tensors)

    def input_gradients(ctx, do, dht):
        settings, module, _, end = ctx.settings
        tensors = ctx.saved_tensors
        problem = made.problem(*tensors[:num_tensors], *settings)
        if do is None:
            do = made.idle_output(problem)
        needs = tuple(compress(made.names, ctx.needs_input_grad))
        saved = Saved(problem, tensors[num_tensors:end])
        return (*made.backward(saved, do, dht, needs, module), None)

    Function.__name__ = Function.__qualname__ = f"{made.name.capitalize()}Function"
    return Function


def _anchors(inputs: tuple, given: tuple, kept: tuple) -> list[Tensor]:
    """Tensors without elements that lead a second derivative to the inputs whose values are not kept."""
    with torch.enable_grad():
        pairs = zip(inputs, given, kept, strict=False)
        return [x.narrow_copy(0, 0, 0) for x, before, after in pairs if after is not before and x.requires_grad]


_transforms = torch._C._functorch.peek_interpreter_stack  # of torch.func: None outside of all


def _refuse_transforms(op: str, tensors: tuple) -> None:
    """RuntimeError where derivatives would be lost: forward mode, and what `torch.func` does by wrapping tensors."""
    found = _transforms()
    if found is not None and found.key() in _DERIVATIVES:
        raise RuntimeError(
            f"{op} cannot be transformed by torch.func (grad, vmap, jvp, ...): it has reverse-mode derivatives, by "
            "torch.autograd.grad and .backward(); the op's naive function can be transformed"
        )
    if forward_ad._current_level >= 0:
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{op} has reverse-mode derivatives alone, no forward mode; the op's naive function has both"
                )


_DERIVATIVES = tuple(getattr(torch._C._functorch.TransformType, name) for name in ("Grad", "Vmap", "Jvp"))


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, tied to all that they depend on: a second derivative that reaches them raises."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(x if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op} has first derivatives alone: its gradient cannot be differentiated again (as a Hessian does, or "
            "a penalty on gradients that reaches the op); the op's naive function has all derivatives"
        )


def _operator(made: Family) -> Any:
    """The operator `fla::<name>` that `torch.compile` sees, with its gradient `fla::<name>_backward`: tensors in,
    tensors out, where an empty tensor stands for none."""
    schema = ", ".join(f"{kind} {name}" for name, kind in made.types.items())

    def forward(*arguments):
        *values, output_final_state, backend = arguments
        problem = made.make(*values)
        o, state, _ = made.forward(problem, output_final_state, False, family(made.name, backend))
        return o, o.new_empty(0, dtype=problem.state_dtype) if state is None else state

    def forward_fake(*arguments):
        *values, output_final_state, _ = arguments
        problem = made.problem(*values)
        shape = problem.state_shape if output_final_state else (0,)
        return made.idle_output(problem), values[0].new_empty(shape, dtype=problem.state_dtype)

    def backward(do, dht, needs, *arguments):
        *values, backend = arguments
        saved, chosen = Saved(made.make(*values)), tuple(needs)
        found = made.backward(saved, do, dht, chosen, family(made.name, backend))
        return [
            _own(torch.zeros_like(x) if d is None else d, dht) if name in chosen else do.new_empty(0)
            for name, x, d in zip(made.names, values, found, strict=False)
        ]

    def backward_fake(do, dht, needs, *arguments):
        pairs = zip(made.names, arguments, strict=False)
        return [x.new_empty(x.shape) if name in needs else do.new_empty(0) for name, x in pairs]

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: made.num_tensors])
        *ctx.settings, ctx.output_final_state, ctx.backend = inputs[made.num_tensors :]

    def gradient(ctx, do, dht):
        needs = list(compress(made.names, ctx.needs_input_grad))
        dht = dht if ctx.output_final_state else None
        found = operator_backward(do, dht, needs, *ctx.saved_tensors, *ctx.settings, ctx.backend)
        given = tuple(d if name in needs else None for name, d in zip(made.names, found, strict=True))
        return given + (None,) * (len(made.types) - len(made.names) + 2)

    operator = torch.library.custom_op(
        f"fla::{made.name}",
        forward,
        mutates_args=(),
        schema=f"({schema}, bool output_final_state, str backend) -> (Tensor, Tensor)",
    )
    operator_backward = torch.library.custom_op(
        f"fla::{made.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor do, Tensor? dht, str[] needs, {schema}, str backend) -> Tensor[]",
    )
    operator.register_fake(forward_fake)
    operator_backward.register_fake(backward_fake)
    operator.register_autograd(gradient, setup_context=setup_context)
    return operator


def _own(result: Tensor, dht: Tensor | None) -> Tensor:
    """`result`, or a copy of it where it is an input or shares its memory: the results of an operator must not."""
    shares = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if shares or result is dht else result
