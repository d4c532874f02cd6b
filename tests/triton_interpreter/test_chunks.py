"""The chunk kernels' ways of cutting a problem, on sizes that the interpreter can do: segments of a sequence, slices
of a head, and heads by the strength of their decays."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fla.backends.triton.decay import chunk_backward, chunk_forward, gate_gradient, segments
from fla.testing.cases import INTERPRETER
from tests.ops import suite
from tests.ops.suite import check_chunks


def chunk_cases(**changes):
    """In float16: float32 goes token by token."""
    return suite.chunk_cases(INTERPRETER, dtype=torch.float16, **changes)


def forget_plans() -> None:
    """What launchers remember about shapes."""
    for module in (segments, chunk_forward, chunk_backward):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of a chunk or two, so that a short sequence has several."""
    forget_plans()
    monkeypatch.setattr(segments, "SHORTEST", 1)
    yield
    forget_plans()


def launches_of(monkeypatch, kernel) -> list:
    """The launches of a kernel from `segments.py` from now on."""
    seen, launch = [], segments.launch
    monkeypatch.setattr(segments, "launch", lambda k, *rest: (seen.append(rest), launch(k, *rest))[1])
    return seen


SEGMENTED = [
    *chunk_cases(tokens=300, heads=(1, 16, 16), gates="weak"),
    *chunk_cases(tokens=(150, 0, 129, 1), heads=(1, 16, 16)),
    *chunk_cases(tokens=(130, 170), heads=(1, 16, 16), gates="mixed"),
]


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments(case, short_segments, monkeypatch):
    seen = launches_of(monkeypatch, segments.segment_states_kernel)
    check_chunks(case)
    assert seen, "nothing was cut"


@pytest.mark.parametrize("parts", (2, 16))
@pytest.mark.parametrize("case", [case for case in SEGMENTED if case.spec.name == "simple_gla"], ids=str)
def test_gate_gradients_in_parts(case, parts, monkeypatch):
    """Each part of a sequence, of one block or several, adds up what lies behind it."""
    monkeypatch.setattr(gate_gradient, "LONG", tl.constexpr(64))
    monkeypatch.setattr(gate_gradient, "PARTS", tl.constexpr(parts))
    check_chunks(case)


@pytest.mark.parametrize("case", chunk_cases(tokens=70, heads=(1, 300, 300), gates="weak"), ids=str)
def test_slices_of_keys_and_values(case):
    """Several slices of both at once: more than one program holds in the forward and in the backward."""
    check_chunks(case)


@pytest.mark.parametrize("case", chunk_cases(tokens=(30, 40), heads=(1, 300, 20), gates="mixed"), ids=str)
def test_slices_of_keys_with_strong_decays(case):
    check_chunks(case)


@pytest.mark.parametrize("case", chunk_cases(tokens=(30, 40), heads=(1, 20, 300), gates=-5.0), ids=str)
def test_slices_of_values_with_strong_decays(case):
    check_chunks(case)


UNEVEN = [
    *chunk_cases(tokens=200, heads=(2, 16, 16), batch=2),
    *chunk_cases(tokens=(100, 0, 70, 30), heads=(2, 16, 16)),
]


@pytest.mark.parametrize("case", [case for case in UNEVEN if case.gated], ids=str)
def test_near_and_far_heads_side_by_side(case):
    """What is stored for heads of one kind does not lie where another's of the other kind does."""
    check_chunks(replace(case, gates="uneven"))


@pytest.mark.parametrize("gates", ("weak", "ordinary", -1.5, -2.5, -5.0, "mixed"))
@pytest.mark.parametrize("case", [case for case in chunk_cases(tokens=130, heads=(2, 16, 20)) if case.gated], ids=str)
def test_every_strength_of_decay(case, gates):
    """Of fp16, halves of a chunk hold 8 nats (one decay a head) or 80 (a decay a channel): 64 steps of "weak" ones are
    under 1, of ordinary ones about 13, of -1.5 there are 96."""
    check_chunks(replace(case, gates=gates))
