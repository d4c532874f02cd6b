"""The engine of every family of recurrences: it connects a family's dataclass to backends, autograd and
`torch.compile`.

A family is a name and a dataclass whose fields are the arguments of one call:

    @dataclass(slots=True, eq=False)
    class Problem(Recurrence):
        x: Tensor                          # first the tensors that get gradients
        initial_state: Tensor | None
        cu_seqlens: Tensor | None          # then the other tensors, which `constants` names
        reverse: bool                      # then the settings: float, int, str or bool

    FAMILY = Family("scan", Problem)
    o, final_state = FAMILY.call((x, initial_state, cu_seqlens, reverse), output_final_state, backend, op="chunk_scan")

The engine derives two things from the fields. `torch.compile` sees the operators `fla::scan` and `fla::scan_backward`,
with their schemas, fakes and gradients. Eager calls use an autograd function instead, which has less overhead.

A backend computes the family in the module or package `fla.backends.<backend>.<name>`:

    forward(problem, output_final_state, keep) -> (o, final state or None, Saved or None)
    backward(problem, saved, do, dht, needs)   -> dict: name of a field -> its gradient, in any dtype

- `problem`: an instance of the dataclass. Its tensors are contiguous, and it is never changed after it is made.
- `keep`: whether a backward will follow. If so, the forward returns what it keeps for the backward as `Saved`.
- `saved`: the tensors in that `Saved`. It is empty if the forward kept nothing, and always under `torch.compile`, whose
  operators pass only inputs to the backward.
- `do`, `dht`: the gradients of `o` and of the final state; `dht` may be None.
- `needs`: the names of the fields whose gradients are wanted. A name that is missing from the result stands for an
  input without influence on the outputs.

Both run with autocast off, and never on tensors without elements.
"""

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import compress
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fla.backends import family, resolve
from fla.backends._step import Stepping
from fla.varlen import check_cu_seqlens


@dataclass(slots=True, eq=False)  # not frozen: a frozen dataclass takes three times as long to construct
class Recurrence:
    """The arguments of one call of a family.

    A subclass has the fields `initial_state` and `cu_seqlens`. Its first field is a tensor `[B, T, ...]`, which gives
    the call its dtype and device.
    """

    constants: ClassVar[tuple[str, ...]] = ("cu_seqlens",)  # names of the tensors that get no gradient
    first: ClassVar[str]  # name of the first field; `Family` sets it

    @property
    def sizes(self) -> torch.Size:
        """Shape of the first tensor, `[B, T, ...]`."""
        return getattr(self, self.first).shape

    @property
    def num_states(self) -> int:
        """Number of sequences: the batch size, or with `cu_seqlens` the number of packed sequences."""
        bounds: Tensor | None = getattr(self, "cu_seqlens")  # noqa: B009 - subclasses have this field
        return self.sizes[0] if bounds is None else bounds.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the initial and final states, `[num_states, ...]`."""
        raise NotImplementedError

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of `o`, `[B, T, ...]`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first tensor. The engine casts the gradient `do` to it."""
        return getattr(self, self.first).dtype

    @property
    def device_type(self) -> str:
        return getattr(self, self.first).device.type

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the final states: float64 if the first tensor is float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute because there are no tokens or no channels."""
        return 0 in self.sizes or 0 in self.output_shape


class Saved(NamedTuple):
    """What a forward keeps for its backward.

    `problem` is the problem that the backward gets. In it the forward may replace a tensor by one that it computed from
    it, of the same shape and dtype. `tensors` are further tensors, whose meaning only the backend knows.
    """

    problem: Any
    tensors: tuple[Tensor | None, ...] = ()


class Family:
    """A family of recurrences. Calls take the values of the dataclass's fields as one tuple, in the fields' order."""

    def __init__(self, name: str, problem: type[Recurrence]) -> None:
        self.name, self.problem = name, problem
        self.types = _schema_types(problem)
        tensors = tuple(field for field, kind in self.types.items() if kind.startswith("Tensor"))
        self.names = tuple(field for field in tensors if field not in problem.constants)  # those that get gradients
        if tuple(self.types)[: len(tensors)] != tensors or tensors[: len(self.names)] != self.names:
            raise TypeError(f"the fields of {problem} must be tensors with gradients, other tensors, then settings")
        problem.first = tensors[0]
        self.num_tensors, self.num_differentiable = len(tensors), len(self.names)
        self.make = _constructor(problem, self.types)
        self._first_of = attrgetter(tensors[0])
        self._tensors_of = attrgetter(*tensors)
        self._differentiable_of = attrgetter(*self.names)
        self._function = _autograd_function(self)
        self._named: dict[str | None, Any] = {}  # op -> what has the `apply` of its own autograd function
        self._operator = _operator(self)
        self._stepping = Stepping(self)

    def call(
        self, values: tuple, output_final_state: bool, backend: str | None = None, op: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `o`, and the final state or None.

        `backend` is what the user asked for (`fla.backends.resolve`). `op` is the op's name in logs and messages.
        """
        backend = resolve(self.name, values[0], backend)
        if is_compiling():
            o, state = self._operator(*values, output_final_state, backend)
            return o, state if output_final_state else None
        if forward_ad._current_level >= 0 or _innermost_transform() is not None:
            _refuse_transforms(op or self.name, values[: self.num_differentiable])
        module = family(self.name, backend, op)
        if torch.is_grad_enabled():
            differentiable = values[: self.num_differentiable]
            for x in differentiable:
                if x is not None and x.requires_grad:
                    # autograd spends time on every argument: all that need no gradient travel as one tuple
                    function = self._named.get(op, self._function)
                    return function.apply(*differentiable, (values, output_final_state, module, op))
        o, state, _ = self.forward(self.make(*values), output_final_state, False, module)
        return o, state

    def name_function(self, op: str, name: str, apply: Callable) -> type[torch.autograd.Function]:
        """The autograd function of the op's calls as a class of its own, for programs that know it by that name.

        Its `apply` is theirs, and has the arguments of the op. The engine's is found above it, at every call, because
        some programs replace that of PyTorch for a while.
        """
        function = type(name, (self._function,), {"apply": staticmethod(apply), "__doc__": f"The gradient of {op}."})
        self._named[op] = super(function, function)
        return function

    def step(
        self,
        values: tuple,
        state_indices: Tensor | None,
        inplace_final_state: bool,
        output_final_state: bool,
        state_v_first: bool = False,
        backend: str | None = None,
        op: str | None = None,
        called: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor | None]:
        """As `call`, for decoding on states that the caller owns (`fla.backends._step`).

        `called`: fields that the op has under other names -> these names, for messages.
        """
        options = (state_indices, inplace_final_state, output_final_state, state_v_first, backend, op)
        return self._stepping(values, *options, called)

    def check_states(self, values: tuple, state_indices: Tensor | None, inplace_final_state: bool) -> None:
        """Raise ValueError or TypeError unless `step` can use the states as they are, without a copy."""
        self._stepping.check(values, state_indices, inplace_final_state)

    def forward(self, problem: Any, output_final_state: bool, keep: bool, module: Any) -> tuple:
        """Run the backend's forward. Packing is checked, and empty tensors and autocast are dealt with, here."""
        if problem.cu_seqlens is not None:
            check_cu_seqlens(problem.cu_seqlens, problem.sizes[1])
        if problem.is_empty:
            return self.zero_output(problem), self._unchanged_state(problem) if output_final_state else None, None
        x = self._first_of(problem)
        device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):  # entering the context always would cost more than the rest of a call
            with torch.autocast(device, enabled=False):  # backends choose their precision themselves
                return module.forward(problem, output_final_state, keep)
        return module.forward(problem, output_final_state, keep)

    def backward(
        self, problem: Any, kept: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...], module: Any
    ) -> list[Tensor | None]:
        """The gradient of every field in `names`, in the field's dtype; None where there is none or none is needed."""
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
            do = do.contiguous() if do.dtype is dtype else do.to(dtype).contiguous()
            dht = None if dht is None else dht.contiguous()
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    found = module.backward(problem, kept, do, dht, needs)
            else:
                found = module.backward(problem, kept, do, dht, needs)
        gradients: list[Tensor | None] = []
        for name, x in zip(self.names, inputs):  # noqa: B905 - `strict` takes its time, and both come from the fields
            d = found.get(name)
            if d is not None:
                d = None if x is None or name not in needs else d if d.dtype is x.dtype else d.to(x.dtype)
            gradients.append(d)
        return gradients

    def gradients(
        self, values: tuple, do: Tensor, dht: Tensor | None, backend: str | None = None, op: str | None = None
    ) -> dict[str, Tensor | None]:
        """The gradient of every field in `names`, for programs that call the backward of `call` themselves."""
        module = family(self.name, resolve(self.name, values[0], backend), op)
        given = zip(self.names, values, strict=False)
        needs = tuple(name for name, x in given if x is not None)
        with torch.no_grad():
            found = self.backward(self.make(*values), (), do, dht, needs, module)
        return dict(zip(self.names, found, strict=True))

    @staticmethod
    def zero_output(problem: Any) -> Tensor:
        """Zeros of the shape and dtype of the output, for a call without tokens or channels."""
        return getattr(problem, problem.first).new_zeros(problem.output_shape, dtype=problem.output_dtype)

    @staticmethod
    def _unchanged_state(problem: Any) -> Tensor:
        """The final state of a call without tokens, which is the initial state."""
        state = getattr(problem, problem.first).new_zeros(problem.state_shape, dtype=problem.state_dtype)
        return state if problem.initial_state is None else state + problem.initial_state


def _schema_types(problem: type[Recurrence]) -> dict[str, str]:
    """Name of every field -> its type in the schema of an operator."""
    known = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}
    hints, found = typing.get_type_hints(problem), {}
    for name in (field.name for field in fields(problem)):
        kind, suffix = hints[name], ""
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            (kind,), suffix = [part for part in typing.get_args(kind) if part is not type(None)], "?"
        found[name] = known[kind] + suffix
    return found


def _constructor(problem: type[Recurrence], kinds: dict[str, str]) -> Callable[..., Any]:
    """A function that makes a problem out of the values of the fields, with contiguous tensors.

    Its source is generated, as the constructor of a dataclass is, because a loop over the fields would slow every call.
    """
    converted = {"Tensor": "{0}.contiguous()", "Tensor?": "None if {0} is None else {0}.contiguous()"}
    values = ", ".join(converted.get(kind, "{0}").format(name) for name, kind in kinds.items())
    return eval(f"lambda {', '.join(kinds)}: problem({values})", {"problem": problem})


def _autograd_function(owner: Family) -> type[torch.autograd.Function]:
    """The autograd function of eager calls that need gradients."""
    count, num_tensors, make, tensors_of = owner.num_differentiable, owner.num_tensors, owner.make, owner._tensors_of

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            values, output_final_state, module, op = inputs[count]
            given = make(*values)
            o, state, saved = owner.forward(given, output_final_state, True, module)
            problem, kept = (given, ()) if saved is None else saved
            ctx.settings = values[num_tensors:], module, op, num_tensors + len(kept)
            if problem is not given:
                kept = (
                    *kept,
                    *_anchors_to_inputs(inputs, owner._differentiable_of(given), owner._differentiable_of(problem)),
                )
            ctx.save_for_backward(*tensors_of(problem), *kept)
            ctx.set_materialize_grads(False)
            return o, state

        @staticmethod
        def backward(ctx, do, dht):
            if not torch.is_grad_enabled():
                return input_gradients(ctx, do, dht)
            with torch.no_grad():
                found = input_gradients(ctx, do, dht)
            return _FirstDerivative.apply(
                ctx.settings[2] or owner.name, len(found), *found, do, dht, *ctx.saved_tensors
            )

    def input_gradients(ctx, do, dht):
        settings, module, _, end = ctx.settings
        tensors = ctx.saved_tensors
        problem = owner.problem(*tensors[:num_tensors], *settings)
        if do is None:
            do = owner.zero_output(problem)
        needs = tuple(compress(owner.names, ctx.needs_input_grad))
        return (*owner.backward(problem, tensors[num_tensors:end], do, dht, needs, module), None)

    Function.__name__ = Function.__qualname__ = f"{owner.name.capitalize()}Function"
    return Function


def _anchors_to_inputs(inputs: tuple, given: tuple, kept: tuple) -> list[Tensor]:
    """Empty slices of the inputs whose values are not kept.

    Saved beside what is kept, they connect the gradient to these inputs, so that a second derivative raises
    (`_FirstDerivative`) instead of being wrong.
    """
    with torch.enable_grad():
        pairs = zip(inputs, given, kept, strict=False)
        return [x.narrow_copy(0, 0, 0) for x, before, after in pairs if after is not before and x.requires_grad]


_innermost_transform = torch._C._functorch.peek_interpreter_stack  # of torch.func; None if no transform runs


def _refuse_transforms(op: str, tensors: tuple) -> None:
    """Raise RuntimeError in forward mode and in a transform of `torch.func`, which would lose derivatives silently."""
    found = _innermost_transform()
    if found is not None and found.key() in _REFUSED_TRANSFORMS:
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


_REFUSED_TRANSFORMS = tuple(getattr(torch._C._functorch.TransformType, name) for name in ("Grad", "Vmap", "Jvp"))


class _FirstDerivative(torch.autograd.Function):
    """Passes gradients through unchanged. Its own backward raises, so second derivatives are refused."""

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


def _operator(owner: Family) -> Any:
    """The operator `fla::<name>` that `torch.compile` sees, whose gradient is the operator `fla::<name>_backward`.

    Operators return tensors only, so an empty tensor stands for a missing state or gradient.
    """
    schema = ", ".join(f"{kind} {name}" for name, kind in owner.types.items())

    def forward(*arguments):
        *values, output_final_state, backend = arguments
        problem = owner.make(*values)
        o, state, _ = owner.forward(problem, output_final_state, False, family(owner.name, backend))
        return o, o.new_empty(0, dtype=problem.state_dtype) if state is None else state

    def forward_fake(*arguments):
        *values, output_final_state, _ = arguments
        problem = owner.problem(*values)
        shape = problem.state_shape if output_final_state else (0,)
        return owner.zero_output(problem), values[0].new_empty(shape, dtype=problem.state_dtype)

    def backward(do, dht, needs, *arguments):
        *values, backend = arguments
        chosen = tuple(needs)
        found = owner.backward(owner.make(*values), (), do, dht, chosen, family(owner.name, backend))
        return [
            _without_aliases(torch.zeros_like(x) if d is None else d, dht) if name in chosen else do.new_empty(0)
            for name, x, d in zip(owner.names, values, found, strict=False)
        ]

    def backward_fake(do, dht, needs, *arguments):
        pairs = zip(owner.names, arguments, strict=False)
        return [x.new_empty(x.shape) if name in needs else do.new_empty(0) for name, x in pairs]

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: owner.num_tensors])
        *ctx.settings, ctx.output_final_state, ctx.backend = inputs[owner.num_tensors :]

    def gradient(ctx, do, dht):
        needs = list(compress(owner.names, ctx.needs_input_grad))
        dht = dht if ctx.output_final_state else None
        found = operator_backward(do, dht, needs, *ctx.saved_tensors, *ctx.settings, ctx.backend)
        given = tuple(d if name in needs else None for name, d in zip(owner.names, found, strict=True))
        return given + (None,) * (len(owner.types) - len(owner.names) + 2)

    operator = torch.library.custom_op(
        f"fla::{owner.name}",
        forward,
        mutates_args=(),
        schema=f"({schema}, bool output_final_state, str backend) -> (Tensor, Tensor)",
    )
    operator_backward = torch.library.custom_op(
        f"fla::{owner.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor do, Tensor? dht, str[] needs, {schema}, str backend) -> Tensor[]",
    )
    operator.register_fake(forward_fake)
    operator_backward.register_fake(backward_fake)
    operator.register_autograd(gradient, setup_context=setup_context)
    return operator


def _without_aliases(result: Tensor, dht: Tensor | None) -> Tensor:
    """`result`, or a copy of it if it is `dht` or a part of a larger storage: an operator must not return aliases."""
    shares = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if shares or result is dht else result
