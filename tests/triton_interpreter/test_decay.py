"""The family `decay` in the interpreter: its chunk kernels' ways of cutting a problem (segments of a sequence, slices
of a head, heads by the strength of their decays), and its recurrent kernels on what no op combines.

Kinds of decay meet sizes and gates in turn; every kind with all of them only in the exhaustive suite.
"""

from dataclasses import replace
from itertools import chain

import pytest
import torch
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton import _launch, _packs, _sequence
from fla.backends.triton.decay import (
    chunk_backward,
    chunk_forward,
    gate_gradient,
    prepare,
    recurrent_backward,
    recurrent_forward,
)
from fla.testing.cases import INTERPRETER
from tests.families import decay
from tests.families.decay import DECAYS, Direct, check_chunks, check_direct, check_one_prefix
from tests.ops.suite import diagonal, in_turn


def chunk_cases(H: int, K: int, V: int, **changes):
    """In float16: float32 goes token by token."""
    return decay.chunk_cases(INTERPRETER, dtype=torch.float16, sizes={"H": H, "K": K, "V": V}, **changes)


def forget_plans() -> None:
    """What launchers remember about shapes."""
    for module in (_sequence, chunk_forward, chunk_backward):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of a chunk or two, so that a short sequence has several."""
    forget_plans()
    monkeypatch.setattr(_sequence, "MIN_SEGMENT_CHUNKS", 1)
    yield
    forget_plans()


@pytest.fixture
def kernels(monkeypatch) -> set[str]:
    """Names of the kernels that are launched."""
    seen, launch = set(), _launch.Launcher.__call__

    def watched(self, *arguments) -> None:
        seen.add(self._kernel.fn.__name__)
        launch(self, *arguments)

    monkeypatch.setattr(_launch.Launcher, "__call__", watched)
    return seen


SEGMENTED = (
    chunk_cases(1, 16, 16, tokens=150, gates="weak"),
    chunk_cases(1, 16, 16, tokens=(129, 0, 70, 1)),
    chunk_cases(1, 16, 16, tokens=(70, 130), gates="mixed"),
)


@pytest.mark.parametrize("case", in_turn(*SEGMENTED), ids=str)
def test_segments(case, short_segments, kernels):
    check_chunks(case)
    assert "segment_states_kernel" in kernels, "nothing was cut"


def joined_cases(H: int, K: int, V: int, **changes):
    return chunk_cases(H, K, V, state="none", **changes)


# several sequences a chunk, ends that are a chunk's, one that fills several chunks, empty ones and single tokens
JOINED = (
    joined_cases(1, 16, 16, tokens=(5, 1, 0, 58, 130, 3, 1)),
    joined_cases(2, 16, 20, tokens=(40, 100, 0, 60), gates="mixed"),
    joined_cases(1, 20, 300, tokens=(30, 1, 40), gates=-5.0),
)
JOINED_SEGMENTS = (
    joined_cases(1, 16, 16, tokens=(130, 10, 1, 1, 30, 28), gates="weak"),
    joined_cases(1, 16, 16, tokens=(0, 64, 130, 62), gates="mixed"),
)


def guarded_cases(everything: bool):
    """What `guarded.py` runs."""
    chosen = chain if everything else diagonal
    prepare.JOINED_VECTORS = (torch.float16,)  # bfloat16 on a GPU, which the interpreter cannot do
    yield from chosen(*JOINED)
    _sequence.MIN_SEGMENT_CHUNKS = 1
    forget_plans()
    yield from chosen(*JOINED_SEGMENTS)


def pack_of(lengths: list[int], dtype: torch.dtype = torch.float16, **changes) -> Problem:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.zeros(1, int(bounds[-1]), 1, 4, dtype=dtype)
    given = dict.fromkeys(("g", "gk", "gv", "g_gamma", "initial_state")) | changes
    return Problem(q, q, q, **given, cu_seqlens=bounds.to(torch.int32), scale=1.0, form="chunk")


def test_what_is_joined():
    """Packs without states in or out, unless they are of long sequences or fp16's decays per channel."""
    long = _packs.SHORT_AVERAGE + 1
    state = torch.zeros(2, 1, 4, 4)
    for problem, has_states, joined in (
        (pack_of([5, 3]), False, True),
        (pack_of([long, long - 2]), False, True),
        (pack_of([long, long]), False, False),
        (pack_of([5, 3]), True, False),
        (pack_of([5, 3], initial_state=state), False, False),
        (pack_of([5, 3], gk=state), False, False),
        (pack_of([5, 3], torch.bfloat16, gk=state), False, True),
        (replace(pack_of([5, 3]), cu_seqlens=None), False, False),
    ):
        prepared = prepare.prepare(problem, has_states)
        assert (prepared.begins is not None) == joined
        assert prepared.state_shape[0] == (1 if joined or problem.cu_seqlens is None else 2)
        assert prepared.pack is (prepared.begins if joined else problem.cu_seqlens)
        assert prepared.lengths is (None if joined else problem.cu_seqlens)


@pytest.mark.parametrize("lengths", ([1], [0, 3, 0, 0, 2, 1, 0], [64, 64], [1] * 70, [1500, 0, 800]), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_first_tokens_of_a_joined_pack(lengths, dtype):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    begins = _packs.join(bounds.to(dtype), sum(lengths), False)
    starts = bounds[:-1]
    assert torch.equal(begins.long(), starts.repeat_interleave(torch.tensor(lengths)))


@pytest.fixture
def vectors_in_float16(monkeypatch):
    """The interpreter cannot do what is joined of them on a GPU, bfloat16."""
    monkeypatch.setattr(prepare, "JOINED_VECTORS", (torch.float16,))


@pytest.mark.parametrize("case", in_turn(*JOINED), ids=str)
def test_joined_packs(case, vectors_in_float16, kernels):
    check_chunks(case)
    assert "begins_kernel" in kernels, "nothing was joined"


@pytest.mark.parametrize("case", in_turn(*JOINED_SEGMENTS), ids=str)
def test_joined_packs_in_segments(case, short_segments, vectors_in_float16, kernels):
    check_chunks(case)
    assert kernels >= {"begins_kernel", "segment_states_kernel"}, "nothing was joined, or cut"


SCALAR = [[case for case in cases if case.spec.name == "simple_gla"] for cases in SEGMENTED]
IN_PARTS = [[(case, parts) for case in cases for parts in (2, 16)] for cases in SCALAR]


@pytest.mark.parametrize("case, parts", in_turn(*IN_PARTS), ids=str)
def test_gate_gradients_in_parts(case, parts, monkeypatch):
    """Each part of a sequence, of one block or several, adds up what lies behind it."""
    monkeypatch.setattr(gate_gradient, "BLOCK", tl.constexpr(64))
    monkeypatch.setattr(gate_gradient, "MAX_PARTS", tl.constexpr(parts))
    check_chunks(case)


SLICED = (
    chunk_cases(1, 300, 300, tokens=70, gates="weak"),
    chunk_cases(1, 300, 20, tokens=(30, 40), gates="mixed"),
    chunk_cases(1, 20, 300, tokens=(30, 40), gates=-5.0),
)


@pytest.mark.parametrize("case", in_turn(*SLICED), ids=str)
def test_slices_of_keys_and_values(case):
    """More keys or values than one program holds, or both at once: in the forward and in the backward."""
    check_chunks(case)


UNEVEN = [
    [replace(case, gates="uneven") for case in cases if case.gated]
    for cases in (chunk_cases(2, 16, 16, tokens=130, batch=2), chunk_cases(2, 16, 16, tokens=(70, 0, 66, 30)))
]


# running sums of decays are stored head by head, in every row of a batch
ROWS = [replace(case, tokens=70) for case in UNEVEN[0] if case.spec.name == "simple_gla"][:1]


@pytest.mark.parametrize("case", in_turn(*UNEVEN) + ROWS, ids=str)
def test_near_and_far_heads_side_by_side(case):
    """What is stored for heads of one kind does not lie where another's of the other kind does."""
    check_chunks(case)


STRENGTHS = [
    [case for case in chunk_cases(2, 16, 20, tokens=130, gates=gates) if case.gated]
    for gates in ("weak", "ordinary", -1.5, -2.5, -5.0, "mixed")
]


@pytest.mark.parametrize("case", in_turn(*STRENGTHS[:3]) + in_turn(*STRENGTHS[3:]), ids=str)
def test_every_strength_of_decay(case):
    """Of fp16, halves of a chunk hold 8 nats (one decay a head) or 80 (a decay a channel): 64 steps of "weak" ones are
    under 1, of ordinary ones about 13, of -1.5 there are 96."""
    check_chunks(case)


# tokens, those of them that must not change, gates of the others (None: cut off)
PREFIXES = ((22, 21, -50.0), (70, 10, -5.0), (130, 90, None), (70, 40, 0.0), (200, 100, -5.0))
PREFIX_CASES = [
    [(case, count, gate) for case in chunk_cases(1, 16, 16, tokens=tokens, batch=1)] for tokens, count, gate in PREFIXES
]


@pytest.mark.parametrize("case, count, gate", in_turn(*PREFIX_CASES[:2]) + in_turn(*PREFIX_CASES[2:]), ids=str)
def test_later_tokens_change_nothing_before_them(case, count, gate):
    """Whatever their gates are: a head that they make far computes the tokens before them as a near one."""
    check_one_prefix(case, count, gate)


NARROW = [Direct(8, 20, decays, tokens=(3, 0, 1)) for decays in DECAYS]
HALVES = [Direct(20, 8, decays, dtype=torch.float16, tokens=3) for decays in DECAYS]
EXTREME = [Direct(8, 8, decays, gates="extreme", tokens=6, heads=2) for decays in DECAYS if decays]
SPECIAL = [
    *(Direct(K, V, ("g", "gk", "gv"), tokens=(2, 1), index_dtype=torch.int64) for K, V in ((36, 130), (130, 36))),
    Direct(260, 4, ("gk",), tokens=2),
    Direct(4, 260, ("g",), tokens=2),
    Direct(16, 16, ("gk", "gv"), tokens=3, states=False),
    Direct(8, 8, ("g", "gk"), torch.bfloat16, tokens=(2, 1, 0)),  # no dots, so the interpreter computes it right
]


@pytest.mark.parametrize("case", in_turn(NARROW, HALVES) + EXTREME + SPECIAL, ids=str)
def test_recurrent_forward_and_backward(case):
    check_direct(case, recurrent_forward.forward, recurrent_backward.backward)
