"""The contract of an op as checks over one `Case`: what every form must do on every backend.

All checks hold a result to the op's float64 reference by `assert_within_budget`; they differ in how the op is called
(`whole`, `in_pieces`, `by_rows`, `compiled`) and in what they do to its inputs (strides, strong gates).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fla.ops._spec import OpSpec, Variant
from fla.testing.budget import GATE_C, assert_within_budget, relative_rms, rounding_step
from fla.testing.inputs import STRONG_GATE, USUAL_AXES, make_inputs, pack, sizes_of, state_names
from fla.testing.runs import CALLING, Result, call, call_reference, parameters, run, seeded_cotangent, slice_axis

Inputs = dict[str, Tensor]
Evaluate = Callable[[Inputs], tuple[Tensor, tuple[Tensor, ...]]]
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
REMEMBERED = 64  # how many references are kept for further calls of the same problem


@dataclass(frozen=True)
class Case:
    """One call of one form, as data. `tokens`: T, or the lengths of packed sequences; `sizes`: of the op's other axes,
    which may be given in part (`sizes_of`) and are kept as pairs.

    `state`: "both" (initial state in, final state out), "in", "out" or "none". `gate_dtype`: None is `dtype`.
    """

    spec: OpSpec
    form: str
    variant: Variant
    tokens: int | tuple[int, ...] = 65
    sizes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    dtype: torch.dtype = torch.float32
    gates: str | float = "ordinary"
    gate_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    index_dtype: torch.dtype = torch.int32
    scale: float | None = None
    state: str = "both"
    batch: int = 2
    device: str = "cpu"
    backend: str = "torch"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.spec.of(self.variant))
        object.__setattr__(self, "sizes", tuple(sizes_of(self.spec, dict(self.sizes)).items()))

    def __str__(self) -> str:
        packed = isinstance(self.tokens, tuple)
        tokens = "pack" + ".".join(map(str, self.tokens)) if isinstance(self.tokens, tuple) else f"T{self.tokens}"
        words = [self.spec.name, self.form, self.variant.name.replace(" ", "_"), tokens]
        words += ["".join(f"{axis}{size}" for axis, size in self.dims.items()), _SHORT[self.dtype]]
        words += ["i64"] if packed and self.index_dtype == torch.int64 else []
        words += [f"g={self.gates}"] if self.gated and self.gates != "ordinary" else []
        words += [f"g{_SHORT[self.gate_dtype]}"] if self.gated and self.gate_dtype else []
        words += [f"S{_SHORT[self.state_dtype]}"] if self.state_dtype else []
        words += ["scaled"] if self.scale is not None else []
        words += [] if self.state == "both" or not self.stateful else [f"state={self.state}"]
        return "-".join(words)

    @property
    def function(self) -> Callable:
        return self.spec.forms[self.form]

    @property
    def dims(self) -> dict[str, int]:
        """The size of every axis except rows, tokens and sequences."""
        return dict(self.sizes)

    def resized(self, **sizes: int) -> "Case":
        """The case with other sizes. An axis that is defined by others, such as "2 H", is computed anew."""
        rules = USUAL_AXES | self.spec.axes
        follow = {axis for axis, rule in rules.items() if "H" in str(rule)}
        return replace(self, sizes={axis: size for axis, size in self.dims.items() if axis not in follow} | sizes)

    @property
    def gated(self) -> bool:
        return bool(self.spec.log_decays(self.variant))

    @property
    def stateful(self) -> bool:
        return self.form not in self.spec.stateless

    @property
    def cu_seqlens(self) -> Tensor | None:
        return pack(self.tokens, self.index_dtype, self.device) if isinstance(self.tokens, tuple) else None

    def inputs(self) -> Inputs:
        packed = isinstance(self.tokens, tuple)
        tokens = sum(self.tokens) if isinstance(self.tokens, tuple) else self.tokens
        made = make_inputs(
            self.spec,
            {"B": 1 if packed else self.batch, "T": tokens, **self.dims},
            self.dtype,
            self.device,
            self.seed,
            self.variant,
            self.cu_seqlens,
            gate_dtype=self.gate_dtype,
            state_dtype=self.state_dtype,
            gates=self.gates,
        )
        states = () if self.takes_state else state_names(self.spec, self.variant)
        return {name: x for name, x in made.items() if name not in states}

    @property
    def takes_state(self) -> bool:
        return self.stateful and self.state in ("both", "in")

    @property
    def returns_state(self) -> bool:
        return self.stateful and self.state in ("both", "out")


def whole(case: Case, function: Callable | None = None) -> Evaluate:
    """The plain call: all tokens, all rows."""
    packing: dict[str, Any] = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}

    def evaluate(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, state = call(
            case.spec,
            function or case.function,
            inputs,
            case.variant,
            output_final_state=case.returns_state,
            scale=case.scale,
            backend=case.backend,
            **packing,
        )
        if not case.returns_state and state:
            raise AssertionError(f"{case}: a second result without being asked for it")
        return output, state

    return evaluate


def in_pieces(case: Case, cuts: tuple[int, ...]) -> Evaluate:
    """The tokens between two cuts are a call of their own, which continues from the final state of the one before."""
    assert isinstance(case.tokens, int) and case.returns_state
    bounds = list(zip((0, *cuts), (*cuts, case.tokens), strict=True))
    if case.variant.settings.get("reverse", False):
        bounds.reverse()

    def evaluate(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs, state = {}, None
        for start, end in bounds:
            piece = slice_axis(case.spec, inputs, "T", start, end - start)
            outputs[start], state = call(
                case.spec, case.function, piece, case.variant, state=state, scale=case.scale, backend=case.backend
            )
        return torch.cat([outputs[start] for start in sorted(outputs)], 1), state or ()

    return evaluate


def by_rows(case: Case) -> Evaluate:
    """Every row of the batch in a call of its own."""

    def evaluate(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = []
        for b in range(case.batch):
            row = slice_axis(case.spec, slice_axis(case.spec, inputs, "B", b, 1), "N", b, 1)
            rows.append(whole(case)(row))
        outputs, parts = zip(*rows, strict=True)
        return torch.cat(outputs), tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return evaluate


def compiled(case: Case) -> Evaluate:
    """The public function under `torch.compile(fullgraph=True)`."""
    torch._dynamo.reset()
    return whole(case, torch.compile(case.function, fullgraph=True, backend="aot_eager"))


def rounded_cotangent(case: Case) -> Callable[[int, Tensor], Tensor]:
    """Incoming gradients that the reference gets too: rounded to the tested dtype for the output."""
    return lambda i, x: seeded_cotangent(i, x, case.dtype if i == 0 else None)


_remembered: dict[tuple, tuple[Result, Result]] = {}


def references(case: Case, use: tuple[str, ...] = ("output", "state")) -> tuple[Result, Result]:
    """The exact results of the case on its own inputs, and naive ones, with the gradients of all inputs.

    The last few are remembered: they cost more than what they are compared with, and other forms, backends and ways of
    calling have the same.
    """
    settings = {
        name: value for name, value in case.variant.settings.items() if name not in CALLING or name == "reverse"
    }
    called = ("form", "variant", "backend", "index_dtype", "state")
    key = (
        *(getattr(case, field.name) for field in fields(case) if field.name not in ("spec", *called)),
        *(case.spec.name, case.spec.reference, case.spec.inputs, repr(settings), case.variant.without),
        repr(case.spec.shapes),
        *(case.takes_state, case.returns_state, use),
    )
    if key not in _remembered:
        while len(_remembered) >= REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = _references(case, case.inputs(), None, use, rounded_cotangent(case))
    return _remembered[key]


def _references(case, inputs, needs, use, cotangents) -> tuple[Result, Result]:
    def reference(x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, state = call_reference(case.spec, x, case.variant, cu_seqlens=case.cu_seqlens, scale=case.scale)
        return output, state if case.returns_state else ()

    wide = {name: x.double() for name, x in inputs.items()}
    exact = run(reference, wide, needs=needs, use=use, cotangents=cotangents)
    narrow = {name: x.float() if x.dtype == torch.float64 else x for name, x in inputs.items()}
    rounding = torch.float32 if case.dtype == torch.float64 else case.dtype
    return exact, run(reference, narrow, needs=needs, use=use, cotangents=cotangents, dtype=rounding)


def check_values(
    case: Case,
    evaluate: Evaluate | None = None,
    *,
    inputs: Inputs | None = None,
    needs: tuple[str, ...] | None = None,
    use: tuple[str, ...] = ("output", "state"),
    cotangents: Callable[[int, Tensor], Tensor] | None = None,
    eps: float | None = None,
) -> Result:
    """Output, final state and all gradients of `evaluate` (default: the plain call) within the budget. Returns them.

    `inputs` and `cotangents`: others than the case's own, of other values.
    """
    own = inputs is None and cotangents is None
    inputs = case.inputs() if inputs is None else inputs
    cotangents = cotangents or rounded_cotangent(case)
    use = use if case.returns_state else ("output",)
    actual = run(evaluate or whole(case), inputs, needs=needs, use=use, cotangents=cotangents)
    exact, naive = references(case, use) if own else _references(case, inputs, needs, use, cotangents)
    compare(case, inputs, actual, exact, naive, eps)
    return actual


def compare(case: Case, inputs: Inputs, actual: Result, exact: Result, naive: Result, eps: float | None = None) -> None:
    """Hold every tensor of `actual` to the budget that `exact` and `naive` give."""

    def within(name: str, x: Tensor, x64: Tensor, rounded: Tensor, gate: bool = False) -> None:
        assert_within_budget(
            f"{case}: {name}", x, x64, rounded, dtype=case.dtype, backend=case.backend, gate=gate, eps=eps
        )

    within("o", actual.output, exact.output, naive.output)
    if len(actual.state) != len(exact.state):
        raise AssertionError(f"{case}: {len(actual.state)} parts of the final state, expected {len(exact.state)}")
    for i, parts in enumerate(zip(actual.state, exact.state, naive.state, strict=True)):
        within(f"final state {i}", *parts)
    for name, got in actual.grads.items():
        expected, rounded = exact.grads[name], naive.grads[name]
        if expected is None or rounded is None:
            if got is not None and got.count_nonzero():
                raise AssertionError(f"{case}: d{name} is not zero, but nothing depends on {name}")
            continue
        if got is None:
            raise AssertionError(f"{case}: {name} got no gradient")
        if name in case.spec.log_decays(case.variant):
            # no gradient there by definition (float64 may have the true one, below e^-16 of scale)
            strong = inputs[name] < STRONG_GATE
            if case.dtype != torch.float64 and got[strong].count_nonzero():
                raise AssertionError(f"{case}: d{name} must be 0 where {name} < {STRONG_GATE}")
            expected, rounded = expected.masked_fill(strong, 0.0), rounded.masked_fill(strong, 0.0)
        if case.gates not in ("ordinary", "weak") and expected.abs().max() < math.exp(STRONG_GATE):
            # strong gates leave less than e^-16 of it, and kernels may round that to 0
            expected, rounded = torch.zeros_like(expected), torch.zeros_like(rounded)
        within(f"d{name}", got, expected, rounded, name in case.spec.gates)


def restride(x: Tensor, kind: str) -> Tensor:
    """`x` with other strides: "transposed" memory, "sliced" out of a larger tensor full of NaN, or "expanded".

    "expanded" repeats the first entry of axis -2 without copying it, so it alone changes the values.
    """
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "expanded" and x.dim() > 1:
        return x.narrow(-2, 0, 1).expand(x.shape)
    if kind == "sliced":
        larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        larger[..., 1::2] = x
        return larger[..., 1::2]
    return x


def check_strides(case: Case, kind: str) -> None:
    """Inputs and incoming gradients of any strides give what contiguous ones give."""
    inputs = {name: restride(x, kind) for name, x in case.inputs().items()}
    made = rounded_cotangent(case)

    def cotangents(i: int, x: Tensor) -> Tensor:
        return restride(made(i, x), kind)

    if kind == "expanded":
        check_values(case, inputs=inputs, cotangents=cotangents)
        return
    actual = run(whole(case), inputs, cotangents=cotangents)
    compare(case, inputs, actual, *references(case, ("output", "state") if case.returns_state else ("output",)))


def check_repeats(case: Case) -> None:
    """Two runs give the same bits: outputs, states and gradients. They write neither to the inputs nor to the incoming
    gradients."""
    inputs, given = case.inputs(), []

    def keep(i: int, x: Tensor) -> Tensor:
        given.append((rounded_cotangent(case)(i, x), i, x))
        return given[-1][0]

    before = {name: (x.clone(), x._version) for name, x in inputs.items()}
    first, second = (run(whole(case), inputs, cotangents=keep) for _ in range(2))
    _assert_same(case, "the second run", first, second)
    for name, (values, version) in before.items():
        if inputs[name]._version != version or not torch.equal(inputs[name], values):
            raise AssertionError(f"{case}: {name} was written to")
    for incoming, i, x in given:
        if incoming._version or not torch.equal(incoming, rounded_cotangent(case)(i, x)):
            raise AssertionError(f"{case}: incoming gradient {i} was written to")


def check_same_form(case: Case) -> None:
    """A form that only calls another one (`OpSpec.same`) gives its bits."""
    state = case.state if case.stateful else "none"
    other = replace(case, form=case.spec.same[case.form], state=state)
    inputs, cotangents = replace(case, state=state).inputs(), rounded_cotangent(case)
    results = [run(whole(x), inputs, cotangents=cotangents) for x in (other, case)]
    _assert_same(case, f"the form {other.form}", *results)


def check_index_dtypes(case: Case) -> None:
    """int32 and int64 `cu_seqlens` give the same bits."""
    inputs, cotangents = case.inputs(), rounded_cotangent(case)
    results = [
        run(whole(replace(case, index_dtype=dtype)), inputs, cotangents=cotangents)
        for dtype in (torch.int32, torch.int64)
    ]
    _assert_same(case, "int64 cu_seqlens", *results)


def _assert_same(case: Case, what: str, first: Result, second: Result) -> None:
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {"o": (first.output, second.output)}
    pairs |= {f"final state {i}": pair for i, pair in enumerate(zip(first.state, second.state, strict=True))}
    pairs |= {f"d{name}": (first.grads[name], second.grads[name]) for name in first.grads}
    for name, (a, b) in pairs.items():
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            raise AssertionError(f"{case}: {name} of {what} differs")


def check_prefix(case: Case, count: int, gate: float | None, *, rounded: bool = False) -> None:
    """Outputs and gradients of the first `count` tokens do not depend on the tokens after them: they are the same bits.

    The later tokens get other values and gates of `gate`, or are cut off if it is None. Nothing flows back from them.
    With `reverse` it is the last `count` tokens, on which those before them have no influence. `rounded`: the same
    within the rounding steps of the budget in place of bits, for what the docs of an op say is rounded otherwise.
    """
    case = replace(case, state="in" if case.takes_state else "none")
    tokens, inputs, states = case.tokens, case.inputs(), state_names(case.spec, case.variant)
    assert isinstance(tokens, int) and 0 < count < tokens
    first = tokens - count if case.variant.settings.get("reverse", False) else 0

    def kept(name: str, x: Tensor) -> Tensor:
        axes = case.spec.shapes[name].split()
        return x.narrow(axes.index("T"), first, count) if "T" in axes else x

    if gate is None:
        changed = slice_axis(case.spec, inputs, "T", first, count)
    else:
        changed = replace(case, seed=case.seed + 1).inputs()
        gates = [name for name in case.spec.gates if name in inputs]
        changed |= {name: torch.full_like(inputs[name], gate) for name in gates}
        changed = {name: x if "T" in case.spec.shapes[name].split() else inputs[name] for name, x in changed.items()}
        for name, x in changed.items():
            if x is not inputs[name]:
                kept(name, x).copy_(kept(name, inputs[name]))

    def cotangents(i: int, x: Tensor) -> Tensor:
        incoming = rounded_cotangent(case)(i, x.new_empty(x.shape[0], tokens, *x.shape[2:]))
        if x.shape[1] == count:
            return incoming.narrow(1, first, count)
        incoming.narrow(1, 0, first).zero_()
        incoming.narrow(1, first + count, tokens - first - count).zero_()
        return incoming

    results = []
    for given in (inputs, changed):
        found = run(whole(case), given, cotangents=cotangents)
        cut = given is changed and gate is None
        output = found.output if cut else found.output.narrow(1, first, count)
        grads = {name: x if x is None or cut else kept(name, x) for name, x in found.grads.items()}
        if gate is None:  # the order of a sum over all tokens follows their number
            grads = {name: x for name, x in grads.items() if "T" in case.spec.shapes[name].split() or name in states}
        results.append(Result(output, (), grads))
    what = f"the {count} tokens when the others " + ("are cut off" if gate is None else f"change to gates of {gate}")
    if rounded:
        _assert_close(case, what, *results)
    else:
        _assert_same(case, what, *results)


def _assert_close(case: Case, what: str, first: Result, second: Result) -> None:
    """Each result within the rounding steps that the budget grants beside a naive result's own error."""
    for name, a, b in (("o", first.output, second.output), *((n, a, second.grads[n]) for n, a in first.grads.items())):
        is_gate = name in case.spec.gates
        steps = GATE_C.get(case.dtype, 2.0) if is_gate else 2.0
        bound = steps * rounding_step(case.dtype, case.backend, is_gate)
        if (a is None) != (b is None) or (a is not None and b is not None and not relative_rms(b, a) <= bound):
            raise AssertionError(f"{case}: {name} of {what} differs by more than {bound:.3g}")


def check_attentions(case: Case) -> None:
    """`output_attentions=True` returns the matrix `A` `[B, H, T, T]` of `o = A v`, and the same `o` as without.

    The reference gives A column by column: it is the output for the values `v = I`.
    """
    inputs, options = case.inputs(), {"scale": case.scale, "backend": case.backend}
    heads = case.dims.get("HV", case.dims["H"])
    output, matrix = case.function(**inputs, **case.variant.settings, **options, output_attentions=True)
    plain, nothing = case.function(**inputs, **case.variant.settings, **options)
    if nothing is not None or not torch.equal(output, plain):
        raise AssertionError(
            f"{case}: output_attentions changes the output, or without it the second result is not None"
        )
    columns = torch.eye(case.tokens, device=case.device, dtype=case.dtype)[None, :, None]  # type: ignore[arg-type]
    unit = inputs | {"v": columns.expand(case.batch, -1, heads, -1)}
    wide = {name: x.double() for name, x in unit.items()}
    exact, naive = (
        call_reference(case.spec, x, case.variant, scale=case.scale)[0].transpose(1, 2) for x in (wide, unit)
    )
    assert_within_budget(f"{case}: A", matrix.double(), exact, naive.double(), dtype=case.dtype, backend=case.backend)


def check_gradients_numerically(case: Case) -> None:
    """`torch.autograd.gradcheck` in float64: the backward is the derivative of the forward."""
    inputs = {name: x.requires_grad_() for name, x in replace(case, dtype=torch.float64).inputs().items()}
    names = tuple(inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        output, state = whole(case)(dict(zip(names, tensors, strict=True)))
        return (output, *state)

    torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


def accepts(case: Case, keyword: str) -> bool:
    """Whether the case's form has this parameter."""
    return keyword in parameters(case.function)
