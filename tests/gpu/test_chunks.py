"""The chunk kernels at real sizes: segments, slices, long sequences, CUDA graphs, compiles, bits and memory."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fla.backends.triton import _entry, _launch, _packs
from fla.backends.triton._sequence import segment_length
from fla.ops._spec import REGISTRY
from fla.testing import GPU, assert_within_budget, make_inputs
from fla.testing.contract import Case, whole
from tests.ops import suite
from tests.ops.suite import check_chunks

triton = pytest.importorskip("triton")
BF16, FP16 = torch.bfloat16, torch.float16
PACK = (1000, 0, 3000, 1, 95, 4096)
JOINED = (5, 1, 0, 58, 64, 70, 3, 2000, 1, 1, 130, 36, 700, 64, 128, 4)  # some end with a chunk


def chunk_cases(**changes) -> list[Case]:
    return suite.chunk_cases(GPU, **changes)


def evaluate(case: Case, leaves: dict[str, Tensor], incoming: list[Tensor] | None = None) -> list[Tensor]:
    """Output, final states and the gradients of all inputs; `incoming` by default noise."""
    output, state = whole(case)(leaves)
    results = [output, *state]
    incoming = [torch.randn_like(x) for x in results] if incoming is None else incoming
    return [*results, *torch.autograd.grad(results, list(leaves.values()), incoming)]


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in case.inputs().items()}


def noise_for(case: Case, leaves: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output, state = whole(case)(leaves)
    return [torch.randn_like(x) for x in (output, *state)]


JOINED_CASES = [
    case
    for gates in ("ordinary", "weak", "mixed")
    for case in chunk_cases(tokens=JOINED, heads=(2, 128, 64), state="none", gates=gates)
    if case.gated or gates == "ordinary"
]


@pytest.mark.parametrize(
    "case", chunk_cases(tokens=4096, heads=(2, 64, 64), dtype=BF16, batch=1, gates="weak"), ids=str
)
def test_segments(case):
    assert segment_length(4096, 2) < 4096
    check_chunks(case)


@pytest.mark.parametrize("case", chunk_cases(tokens=(2000, 0, 301), heads=(1, 128, 64), dtype=FP16), ids=str)
def test_segments_of_a_pack_with_strong_decays(case):
    """fp16's near range is 8 nats a chunk, a tenth of bf16's: ordinary decays leave it."""
    assert segment_length(2301, 2) < 2301
    check_chunks(case)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize("case", JOINED_CASES, ids=str)
def test_joined_packs(case, dtype):
    """Sequences without states share chunks, here in segments too."""
    assert segment_length(sum(JOINED), 2) < sum(JOINED) < _packs.SHORT_AVERAGE * len(JOINED)
    check_chunks(replace(case, dtype=dtype))


@pytest.mark.parametrize("heads", ((2, 64, 64), (1, 100, 33), (1, 256, 256), (1, 300, 144)), ids=str)
@pytest.mark.parametrize("case", chunk_cases(tokens=(70, 1, 0, 130, 64, 50), dtype=BF16, state="none"), ids=str)
def test_joined_packs_of_all_head_sizes(case, heads):
    check_chunks(replace(case, heads=heads))


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize("gates", (-1.2, -2.5, "uneven", "mixed"))
@pytest.mark.parametrize("case", [c for c in chunk_cases(tokens=300, heads=(4, 64, 64)) if c.gated], ids=str)
def test_strong_decays(case, gates, dtype):
    """Also of a constant decay that needs no gradient: it has kernels of its own."""
    check_chunks(replace(case, gates=gates, dtype=dtype))


@pytest.mark.parametrize("gates", ("ordinary", "weak"))
@pytest.mark.parametrize("op, gate", (("simple_gla", "g"), ("gla", "g")))
def test_gate_gradient_of_a_very_long_sequence(op, gate, gates):
    """A difference of sums over 65,536 tokens. Reference: the torch backend in float64; naive: the same in float32."""
    spec = REGISTRY[op]
    dims = {"B": 1, "T": 65536, "H": 2, "K": 64, "V": 64}
    made = make_inputs(spec, dims, BF16, "cuda", gates=gates)
    made = {name: made[name] for name in ("q", "k", "v", gate)}
    do = torch.randn_like(made["v"])

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaves = {name: x.to(dtype).requires_grad_(name == gate) for name, x in made.items()}
        o, _ = spec.forms["chunk"](**leaves, backend=backend)
        return torch.autograd.grad(o, leaves[gate], do.to(o.dtype))[0]

    exact, naive = gradient(torch.float64, "torch"), gradient(torch.float32, "torch").to(BF16)
    assert_within_budget(f"{op} d{gate}", gradient(BF16, "triton"), exact, naive, dtype=BF16, gate=True)


@pytest.mark.parametrize("case", chunk_cases(tokens=130, heads=(4, 128, 128), dtype=BF16), ids=str)
def test_cuda_graph_of_forward_and_backward(case):
    """Captured once, replayed on new values: the bits of eager calls."""
    static = leaves_of(case)
    incoming = noise_for(case, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            evaluate(case, static, incoming)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(case, static, incoming)
    for seed in (1, 2):
        other = leaves_of(replace(case, seed=case.seed + 100 * seed))
        with torch.no_grad():
            for name, x in static.items():
                x.copy_(other[name])
            for x in incoming:
                x.normal_()
        graph.replay()
        expected = evaluate(case, other, incoming)
        assert len(captured) == len(expected)
        for i, (a, b) in enumerate(zip(captured, expected, strict=True)):
            assert torch.equal(a, b), f"result {i} of {[*'os', *static]}"


@pytest.fixture
def compiles(monkeypatch):
    """Names of the kernels that Triton compiles from here on."""
    seen: list[str] = []
    function = triton.runtime.jit.JITFunction
    compile_one = function._do_compile

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        return compile_one(self, *args, **kwargs)

    monkeypatch.setattr(function, "_do_compile", counted)
    return seen


def packings(count: int, total: int):
    """Up to eight sequences of any lengths, empty ones too."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        cuts = torch.randint(total + 1, (i % 8,), generator=generator).sort().values.tolist()
        bounds = [0, *cuts, total]
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("case", chunk_cases(heads=(2, 64, 64), dtype=BF16, batch=1), ids=str)
def test_lengths_and_packings_compile_nothing_more(case, compiles):
    """After a chunk, a short and a long sequence and two packings: 200 other lengths and 50 other packings."""
    for tokens in (64, 100, 4096, (3000,), (1500, 0, 700, 800)):
        known = replace(case, tokens=tokens)
        evaluate(known, leaves_of(known))
    before = len(compiles)
    lengths = [*range(1, 101), *range(104, 4104, 40)]
    assert len(lengths) == 200
    for tokens in (*lengths, *packings(50, 3000)):
        other = replace(case, tokens=tokens)
        evaluate(other, leaves_of(other))
        assert compiles[before:] == [], tokens


@pytest.mark.parametrize("tokens", (8192, PACK), ids=("segments", "pack"))
@pytest.mark.parametrize("case", chunk_cases(heads=(4, 128, 128), dtype=BF16, batch=1), ids=str)
def test_a_hundred_repeats_are_bitwise_equal(case, tokens):
    case = replace(case, tokens=tokens)
    leaves = leaves_of(case)
    incoming = noise_for(case, leaves)
    first = evaluate(case, leaves, incoming)
    for i in range(100):
        again = evaluate(case, leaves, incoming)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), i


def working_memory(case: Case) -> int:
    """Bytes at the peak of forward and backward, beyond inputs, results and gradients."""
    leaves = leaves_of(case)
    incoming = noise_for(case, leaves)
    evaluate(case, leaves, incoming)  # compiles, and fills caches
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = evaluate(case, leaves, incoming)
    torch.cuda.synchronize()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return torch.cuda.max_memory_allocated() - before - sum(storages.values())


@pytest.mark.parametrize("op", ("retention", "simple_gla", "gla"))
def test_working_memory(op):
    """In units of one bf16 input: segments' states are half a unit; a decay per channel has Qn, Kn (1 each) and
    their gradients in float32 (2 each)."""
    T, H, D = 4096, 16, 128
    case = next(c for c in chunk_cases(tokens=T, heads=(H, D, D), dtype=BF16, batch=1) if c.spec.name == op)
    unit = 2 * T * H * D
    factors = T // 16 * H * 2 * D * 4
    bound = {"retention": unit, "simple_gla": unit, "gla": 7 * unit + factors}[op]
    assert working_memory(case) <= bound + 2**22  # and what the allocator rounds up


@pytest.mark.parametrize("op", ("simple_gla", "gla"))
@pytest.mark.parametrize("dims", ({"K": 513}, {"K": 600, "V": 16}), ids=str)
def test_heads_over_the_limit_name_the_torch_backend(op, dims):
    x = make_inputs(REGISTRY[op], {"T": 65, **dims}, BF16, "cuda")
    with pytest.raises(ValueError, match=rf"K = {dims['K']}.*backend='torch'"):
        REGISTRY[op].forms["chunk"](*(x[name] for name in ("q", "k", "v", "g")))


def test_launches_go_to_the_c_function():
    """Of the Triton whose launcher is known, every launch but the first of a signature."""
    from triton.backends.nvidia import driver

    if getattr(driver, "_BASE_ARGS_FORMAT", None) != _entry.ENTRY_FORMAT:
        pytest.skip(f"the launcher of Triton {triton.__version__} goes through its frame")
    for case in chunk_cases(tokens=130, heads=(2, 64, 64), dtype=BF16):
        evaluate(case, leaves_of(case))
    compiled = [made for launcher in _launch._launchers.values() for made in launcher._compiled.values()]
    assert compiled, "nothing was launched"
    assert all(made.entry is not None for made in compiled)
