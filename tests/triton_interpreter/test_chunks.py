"""The chunk kernels' ways of cutting a problem, on sizes that the interpreter can do: segments of a sequence, slices
of a head, and heads by the strength of their decays."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton import _launch, _packs, _sequence
from fla.backends.triton.decay import chunk_backward, chunk_forward, gate_gradient, prepare
from fla.testing.cases import INTERPRETER
from tests.ops import suite
from tests.ops.suite import check_chunks


def chunk_cases(**changes):
    """In float16: float32 goes token by token."""
    return suite.chunk_cases(INTERPRETER, dtype=torch.float16, **changes)


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


SEGMENTED = [
    *chunk_cases(tokens=300, heads=(1, 16, 16), gates="weak"),
    *chunk_cases(tokens=(150, 0, 129, 1), heads=(1, 16, 16)),
    *chunk_cases(tokens=(130, 170), heads=(1, 16, 16), gates="mixed"),
]


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments(case, short_segments, kernels):
    check_chunks(case)
    assert "segment_states_kernel" in kernels, "nothing was cut"


def joined_cases(**changes):
    return chunk_cases(state="none", **changes)


# several sequences a chunk, ends that are a chunk's, one that fills several chunks, empty ones and single tokens
JOINED = [
    *joined_cases(tokens=(5, 1, 0, 58, 64, 70, 3, 1, 130), heads=(1, 16, 16)),
    *joined_cases(tokens=(40, 100, 0, 60), heads=(2, 16, 20), gates="mixed"),
    *joined_cases(tokens=(30, 1, 40), heads=(1, 20, 300), gates=-5.0),
]
JOINED_SEGMENTS = [
    *joined_cases(tokens=(200, 10, 1, 1, 30, 70), heads=(1, 16, 16), gates="weak"),
    *joined_cases(tokens=(0, 64, 64, 130, 62), heads=(1, 16, 16), gates="mixed"),
]


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


@pytest.mark.parametrize("case", JOINED, ids=str)
def test_joined_packs(case, vectors_in_float16, kernels):
    check_chunks(case)
    assert "begins_kernel" in kernels, "nothing was joined"


@pytest.mark.parametrize("case", JOINED_SEGMENTS, ids=str)
def test_joined_packs_in_segments(case, short_segments, vectors_in_float16, kernels):
    check_chunks(case)
    assert kernels >= {"begins_kernel", "segment_states_kernel"}, "nothing was joined, or cut"


@pytest.mark.parametrize("parts", (2, 16))
@pytest.mark.parametrize("case", [case for case in SEGMENTED if case.spec.name == "simple_gla"], ids=str)
def test_gate_gradients_in_parts(case, parts, monkeypatch):
    """Each part of a sequence, of one block or several, adds up what lies behind it."""
    monkeypatch.setattr(gate_gradient, "BLOCK", tl.constexpr(64))
    monkeypatch.setattr(gate_gradient, "MAX_PARTS", tl.constexpr(parts))
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
