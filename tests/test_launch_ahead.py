"""Kernels compiled ahead of their launches (`fla.backends.triton._ahead`), on the driver of `test_launch.py`."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime._allocation import NullAllocator
from triton.runtime.jit import JITFunction

from fla.backends.decay import Problem, retention_decay
from fla.backends.triton import _ahead, _launch, decay
from tests.test_launch import SIZE, arguments, instead_of_compiling, machine, scaled_add_kernel  # noqa: F401

DECAYS = {
    "linear_attn": (None, None, None),
    "retention": (None, None, retention_decay(2, torch.device("cpu"))),
    "simple_gla": (torch.zeros(1, 2112, 2), None, None),
    "gla": (None, torch.zeros(1, 2112, 2, 64), None),
}


class Compiled(list):
    """(kernel, thread) of everything compiled."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="fla-compile")
        self.begun: list = []

    def submit(self, *call):
        self.begun.append(self.threads.submit(*call))
        return self.begun[-1]

    def settle(self) -> None:
        """Wait for what was begun: a call waits for its own kernels alone, and a thread's turn may come late."""
        for future in self.begun:
            future.result()

    def forget(self) -> None:
        self.settle()
        self.clear()


@pytest.fixture
def compiled(machine, monkeypatch):  # noqa: F811
    """What was compiled, in the call or ahead of it. Nothing really is."""
    found = Compiled()

    def see(kernel):
        found.append((kernel.fn.__name__, threading.current_thread().name))

    monkeypatch.setattr(_launch, "compiler_threads", lambda: found)
    monkeypatch.setattr(JITFunction, "_do_compile", instead_of_compiling(machine, see))
    monkeypatch.setattr(_launch, "_get_device", lambda x: -1 if x.is_meta else machine.tensors_on)
    monkeypatch.setattr(_launch, "_has_descriptors", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield found
    found.threads.shutdown()


def problem(op: str, form: str = "chunk", T: int = 2112) -> Problem:
    g, gk, g_gamma = (x if x is None or x.dim() == 1 else x[:, :T].contiguous() for x in DECAYS[op])
    q = torch.zeros(1, T, 2, 64, dtype=torch.bfloat16)
    return Problem(q, q, q, g, gk, None, None, g_gamma, None, 0.5, form, mild=op == "retention")


def train(given: Problem) -> None:
    _, _, saved = decay.forward(given, False, True)
    needs = [name for name in ("q", "k", "v", "g", "gk") if getattr(given, name) is not None]
    decay.backward(saved.problem, saved.tensors, given.q, None, needs)


@pytest.mark.parametrize("form", ("chunk", "recurrent"))
@pytest.mark.parametrize("op", DECAYS)
def test_the_first_launch_of_a_call_has_all_of_it_compiled_in_threads(machine, compiled, op, form):  # noqa: F811
    """Forward with its segments, and backward: each kernel once, and none again when it is launched."""
    train(problem(op, form=form))
    compiled.settle()
    kernels = Counter(name for name, _ in compiled)
    assert all(thread.startswith("fla-compile") for _, thread in compiled)
    assert sum(kernels.values()) <= len(machine.launches)
    if form == "chunk":
        assert kernels["chunk_forward_kernel"] == kernels["chunk_backward_kernel"] == 1
        assert kernels["segment_states_kernel"] == 2  # forward and reverse
    assert _ahead.thread_state.call is None, "the call's tensors are kept alive"
    compiled.forget()
    decay.forward(problem(op, form=form), False, True)
    compiled.settle()
    assert not compiled


def test_wide_heads_have_their_roles_compiled_side_by_side(machine, compiled):  # noqa: F811
    q = torch.zeros(1, 128, 2, 256, dtype=torch.bfloat16)
    train(Problem(q, q, q, None, None, None, None, None, None, 0.5, "chunk"))
    compiled.settle()
    assert Counter(name for name, _ in compiled) == {"chunk_forward_kernel": 1, "chunk_backward_kernel": 3}
    assert all(thread.startswith("fla-compile") for _, thread in compiled)


def test_a_forward_that_no_backward_follows_compiles_no_backward(machine, compiled):  # noqa: F811
    decay.forward(problem("gla"), False, False)
    compiled.settle()
    assert {name for name, _ in compiled} == {"centre_kernel", "segment_states_kernel", "chunk_forward_kernel"}


def test_what_a_rehearsal_does_not_foresee_is_compiled_when_it_is_launched(machine, compiled):  # noqa: F811
    given = problem("retention", T=128)
    _, _, saved = decay.forward(given, True, True)
    compiled.forget()
    dht = torch.zeros(given.state_shape)
    decay.backward(saved.problem, saved.tensors, given.q, dht, ("q", "k", "v"))
    compiled.settle()
    assert compiled == [("chunk_backward_kernel", threading.current_thread().name)]


def test_nothing_is_compiled_ahead_while_a_graph_is_captured(machine, compiled, monkeypatch):  # noqa: F811
    """Another thread's calls could end a capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    decay.forward(problem("retention", T=128), False, True)
    assert compiled == [("chunk_forward_kernel", threading.current_thread().name)]


def test_a_rehearsal_that_fails_does_no_harm(machine, compiled, monkeypatch):  # noqa: F811
    monkeypatch.setattr(_ahead, "rehearse", lambda *_: 1 / 0)
    decay.forward(problem("retention", T=128), False, True)
    assert compiled == [("chunk_forward_kernel", threading.current_thread().name)] and len(machine.launches) == 1


def test_errors_of_the_compiler_reach_the_call(machine, compiled, monkeypatch):  # noqa: F811
    def fail(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(JITFunction, "_do_compile", fail)
    with pytest.raises(RuntimeError, match="no such instruction"):
        decay.forward(problem("retention", T=128), False, True)


def test_an_allocator_is_provided_where_there_is_none(machine, monkeypatch):  # noqa: F811
    """Descriptors take memory that Triton asks its allocator for: the user's own is left in place."""
    seen: list = []
    monkeypatch.setattr(triton, "set_allocator", seen.append)
    allocation = SimpleNamespace(_allocator=SimpleNamespace(get=NullAllocator))
    monkeypatch.setattr(_launch, "_allocation", allocation)
    _launch.launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert seen == [_launch._allocate]
    allocation._allocator = SimpleNamespace(get=lambda: torch.empty)
    _launch.launch(scaled_add_kernel, 1, arguments(), SIZE | {"SIZE": 32})
    assert seen == [_launch._allocate]
