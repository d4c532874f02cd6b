"""The Python around the kernels: what a call costs and does besides them, on a backend that computes nothing.

Costs are counted here, in operators and in lines of Python, which are the same on a busy machine; times are the
business of `benchmarks.host`.
"""

import dataclasses
import inspect
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fla.backends
from fla.backends import decay
from fla.ops import chunk_gla, chunk_linear_attn, chunk_retention, chunk_simple_gla
from fla.ops._spec import REGISTRY, current_names
from fla.shapes import _check_one_by_one, _match_axes, _sizes_if_valid


class Idle:
    """A backend of the family that returns at once: outputs as they come, gradients of 1."""

    def __init__(self):
        self.problems, self.autocast = [], []

    def forward(self, problem, output_final_state, keep):
        self.note(problem)
        o = torch.empty_like(problem.v)
        return o, problem.q.new_empty(problem.state_shape) if output_final_state else None, None

    def backward(self, problem, saved, do, dht, needs):
        self.note(problem)
        return {name: torch.ones_like(getattr(problem, name)) for name in needs}

    def note(self, problem):
        self.problems.append(problem)
        self.autocast.append(torch.is_autocast_enabled(problem.q.device.type))


@pytest.fixture
def idle(monkeypatch):
    made = Idle()
    monkeypatch.setitem(fla.backends._modules, ("torch", "decay"), made)
    return made


def inputs(grad: bool = False, tokens: int = 64, dtype=torch.bfloat16) -> SimpleNamespace:
    q, k, v, gk = (torch.randn(1, tokens, 1, 64, dtype=dtype) for _ in range(4))
    found = {"q": q, "k": k, "v": v, "gk": -gk.abs(), "g": -torch.randn(1, tokens, 1).abs()}
    return SimpleNamespace(**{name: x.requires_grad_(grad) for name, x in found.items()})


CALLS = {
    "simple_gla": (chunk_simple_gla, lambda x: (x.q, x.k, x.v, x.g), {}),
    "gla": (chunk_gla, lambda x: (x.q, x.k, x.v, x.gk), {}),
    "retention": (chunk_retention, lambda x: (x.q, x.k, x.v), {}),
    "linear_attn": (chunk_linear_attn, lambda x: (x.q, x.k, x.v), {"normalize": False}),
}
every_op = pytest.mark.parametrize("op", CALLS)


def lines_run(call) -> int:
    """Lines of Python that a call runs, PyTorch's own included."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@every_op
def test_a_call_runs_few_lines(idle, op):
    """About 150 forward and 450 with the gradient, most of these PyTorch's; bounds that only a mistake reaches."""
    function, arguments, options = CALLS[op]
    given, leaves = arguments(inputs()), arguments(inputs(grad=True))
    do = torch.ones_like(given[2])

    def train():
        torch.autograd.grad(function(*leaves, **options)[0], leaves, do)

    train()  # what is done once
    assert 50 < lines_run(lambda: function(*given, **options)) < 350
    assert lines_run(train) < 900


class Recorded(TorchDispatchMode):
    """The names of the operators that reach PyTorch: on a GPU each would be a launch or an allocation."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()


@every_op
def test_nothing_is_launched_or_allocated_beside_the_kernels(idle, op):
    function, arguments, options = CALLS[op]
    given = arguments(inputs(grad=True))
    function(*given, **options)  # constants are made once
    with torch.no_grad(), Recorded() as seen:
        function(*given, **options)
    assert seen.names == ["empty_like"]
    o, _ = function(*given, **options)
    with Recorded() as seen:
        torch.autograd.grad(o, given, torch.empty_like(o))
    made = [name for name in seen.names if name not in ("empty_like", "detach")]  # detach: PyTorch's own, of inputs
    assert made == ["ones_like"] * len(given)


def test_a_state_is_made_only_when_it_is_asked_for(idle):
    x = inputs()
    assert chunk_simple_gla(x.q, x.k, x.v, x.g)[1] is None
    assert chunk_simple_gla(x.q, x.k, x.v, x.g, output_final_state=True)[1].shape == (1, 1, 64, 64)
    x.q.requires_grad_()
    o, state = chunk_simple_gla(x.q, x.k, x.v, x.g)
    assert o.requires_grad and state is None


def test_gradients_of_dead_gates():
    """A gate below -16 has the gradient 0; what is left behind one of -15 counts."""
    x = inputs(grad=True, tokens=3, dtype=torch.float32)
    with torch.no_grad():
        x.g[0, 1], x.g[0, 2] = -17.0, -15.0
    dg = torch.autograd.grad(chunk_simple_gla(x.q, x.k, x.v, x.g)[0].square().sum(), x.g)[0]
    assert (dg.flatten()[1:] != 0).tolist() == [False, True]


def test_gradients_have_the_dtypes_of_their_inputs(idle, monkeypatch):
    backward = idle.backward
    monkeypatch.setattr(idle, "backward", lambda *args: {name: d.double() for name, d in backward(*args).items()})
    x = inputs(grad=True)
    state = torch.zeros(1, 1, 64, 64, dtype=torch.float16, requires_grad=True)
    o, _ = chunk_simple_gla(x.q, x.k, x.v, x.g, initial_state=state)
    given = (x.q, x.k, x.v, x.g, state)
    assert [d.dtype for d in torch.autograd.grad(o.sum(), given)] == [y.dtype for y in given]
    values = (x.q, x.k, x.v, x.g, None, None, state, None, None, 0.5, "chunk", False, False)
    needs = ["q", "k", "v", "g", "initial_state"]
    found = torch.ops.fla.decay_backward(torch.ones_like(o), None, needs, *values, "torch")
    empty = found.pop(4), found.pop(4)  # an operator's None
    assert [d.dtype for d in found] == [y.dtype for y in given] and not any(d.numel() for d in empty)


def test_strided_inputs_reach_a_backend_contiguous(idle):
    x = inputs(grad=True)
    q = torch.randn(1, 1, 64, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    v = x.v.expand(2, -1, -1, -1)[:1].flip(3)
    o, _ = chunk_gla(q, x.k, v, x.gk, initial_state=torch.zeros(1, 1, 64, 64).mT)
    o.sum().backward()
    for problem in idle.problems:
        tensors = (problem.q, problem.k, problem.v, problem.gk, problem.initial_state)
        assert all(y.is_contiguous() for y in tensors)
    assert len(idle.problems) == 2 and idle.problems[1].q.data_ptr() == idle.problems[0].q.data_ptr()


def test_a_problem_can_be_changed_by_replace():
    x = inputs()
    problem = decay.Problem(x.q, x.k, x.v, None, None, None, None, None, None, 0.5, "chunk")
    changed = dataclasses.replace(problem, scale=1.0, cu_seqlens=torch.tensor([0, 3, 64]))
    assert (changed.scale, changed.q, changed.wide) == (1.0, x.q, False) and problem.scale == 0.5
    assert problem.state_shape == (1, 1, 64, 64) and problem.num_states == 1
    assert changed.state_shape == (2, 1, 64, 64) and changed.num_states == 2


def test_kernels_run_outside_autocast(idle):
    x = inputs(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = chunk_simple_gla(x.q, x.k, x.v, x.g)
        o.sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert idle.autocast == [False, False]


def test_a_gradient_cannot_be_differentiated(idle):
    x = inputs(grad=True)
    o, _ = chunk_simple_gla(x.q, x.k, x.v, x.g)
    (dq,) = torch.autograd.grad(o, x.q, torch.ones_like(o, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives alone"):
        dq.sum().backward()


def test_an_input_changed_before_the_backward_is_noticed(idle):
    x = inputs(grad=True)
    o, _ = chunk_simple_gla(x.q, x.k, x.v, x.g)
    with torch.no_grad():
        x.k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def random_call(draw: random.Random) -> tuple:
    """Arguments of `check_shapes`, most of them right, some of them wrong in one or two ways."""
    shapes = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "g": "B T H", "s": "N H K V", "z": "N 1 H K", "w": "H"}
    sizes = {"B": draw.choice((1, 2)), "T": 3, "H": 2, "K": draw.choice((2, 4)), "V": 4, "1": 1}
    packed = sizes["B"] == 1 and draw.random() < 0.5
    sizes["N"] = 3 if packed else sizes["B"]
    tensors = {}
    for name, shape in shapes.items():
        if name in "qkv" or draw.random() < 0.5:
            tensors[name] = torch.zeros([sizes[axis] for axis in shape.split()])
        elif draw.random() < 0.5:
            tensors[name] = None
    bounds, scale = torch.tensor([0, 1, 1, 3]) if packed else None, draw.choice((None, 1.0, 2))
    for _ in range(draw.choice((0, 1, 2))):
        name = draw.choice(sorted(tensors))
        x = tensors[name]
        x = torch.zeros(2, 2) if not isinstance(x, torch.Tensor) or x.dim() == 0 else x
        wrong = (
            x.double(), x.long(), None, [1.0], x.to("meta"), x[0], x[None], x.narrow(0, 0, 1),
            x.transpose(0, -1), torch.cat((x, x), -1), x.clone(), torch.cat((x, x), 0),
            torch.cat((x, x), min(1, x.dim() - 1)),
        )  # fmt: skip
        tensors[name] = draw.choice(wrong)
        scale = draw.choice((scale, scale, float("nan"), "1"))
        bounds = draw.choice((bounds, bounds, torch.tensor([0.0, 3.0]), torch.tensor([0, 3])))
    if draw.random() < 0.05:
        tensors = {name: x.long() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    return shapes, ("q", "k", "v"), ("q", "k", "v"), bounds, scale, tensors


def test_the_fast_check_of_shapes_agrees_with_the_one_that_explains():
    draw, good = random.Random(0), 0
    for _ in range(3000):
        call = random_call(draw)
        try:
            expected = _check_one_by_one(*call)
        except (TypeError, ValueError):
            expected = None
        good += expected is not None
        assert _sizes_if_valid(*call) == expected, call
    assert 500 < good < 2500


def test_remembered_shapes_are_bounded_and_keep_no_tensor(monkeypatch):
    """One entry per sizes, whatever the tensors; a contradiction that was met once is met again."""
    _match_axes.cache_clear()
    x = inputs()
    for _ in range(3):
        assert chunk_linear_attn(x.q.clone(), x.k, x.v, normalize=False)[0].shape == x.v.shape
        with pytest.raises(ValueError, match="k must have shape"):
            chunk_linear_attn(x.q, x.k[:, 1:], x.v, normalize=False)
    assert _match_axes.cache_info().currsize == 2 and _match_axes.cache_info().maxsize == 4096


def test_shapes_may_be_symbols():
    """As they are where PyTorch traces an op without compiling it: a symbol cannot be remembered."""

    def call(q, k, v, g):
        return chunk_simple_gla(q, k, v, g, backend="torch")[0]

    x = inputs(tokens=8, dtype=torch.float32)
    traced = make_fx(call, tracing_mode="symbolic")(x.q, x.k, x.v, x.g)
    torch.testing.assert_close(traced(x.q, x.k, x.v, x.g), call(x.q, x.k, x.v, x.g))


every_form = pytest.mark.parametrize(
    "function", [f for spec in REGISTRY.values() for f in spec.forms.values()], ids=lambda f: f.__name__
)


@every_form
def test_old_names_of_arguments(function):
    x = inputs()
    given = [x.q, x.k, x.v] + ([x.gk] if "gla" in function.__name__ and "simple" not in function.__name__ else [])
    for value in (True, False):
        with pytest.raises(
            TypeError, match=rf"{function.__name__} takes no head_first \(got {value}\).*\[B, T, H, D\]"
        ):
            function(*given, head_first=value)
    with pytest.raises(TypeError, match=rf"{function.__name__} takes no offsets \(got Tensor\).*cu_seqlens"):
        function(*given, offsets=torch.tensor([0, 64]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads_first'"):
        function(*given, heads_first=True)


@every_form
def test_a_form_shows_its_own_signature(function):
    found = inspect.signature(function)
    tensors = next(list(spec.shapes) for spec in REGISTRY.values() if function in spec.forms.values())
    assert list(found.parameters)[:3] == tensors[:3] and found == inspect.signature(function.__wrapped__)
    assert function.__doc__ and function.__module__.startswith("fla.ops.")


def test_current_names_adds_two_lines():
    def plain(a, b=None):
        return a

    named = current_names(plain)
    assert named(1) == 1
    assert lines_run(lambda: named(1, b=2)) == lines_run(lambda: plain(1, b=2)) + 2


def test_names_are_checked_in_a_compiled_graph():
    """The decorator is traced through: one graph, and the error comes out of it."""
    x = inputs(dtype=torch.float32)
    compiled = torch.compile(chunk_simple_gla, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.q, x.k, x.v, x.g)[0], chunk_simple_gla(x.q, x.k, x.v, x.g)[0])
    with pytest.raises(Exception, match="head_first"):
        compiled(x.q, x.k, x.v, x.g, head_first=True)
