"""The chunk form of every op at real sizes: CUDA graphs, compiles, bits, and how its kernels are launched."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.gpu.running import chunk_cases, evaluate, leaves_of, noise_for

triton = pytest.importorskip("triton")
BF16 = torch.bfloat16
PACK = (1000, 0, 3000, 1, 95, 4096)
COMMON = {"H": 4, "K": 128, "V": 128}
SMALL = {"H": 2, "K": 64, "V": 64}


@pytest.mark.parametrize("case", chunk_cases(tokens=130, sizes=COMMON, dtype=BF16), ids=str)
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


@pytest.mark.parametrize("case", chunk_cases(sizes=SMALL, dtype=BF16, batch=1), ids=str)
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
@pytest.mark.parametrize("case", chunk_cases(sizes=COMMON, dtype=BF16, batch=1), ids=str)
def test_a_hundred_repeats_are_bitwise_equal(case, tokens):
    case = replace(case, tokens=tokens)
    leaves = leaves_of(case)
    incoming = noise_for(case, leaves)
    first = evaluate(case, leaves, incoming)
    for i in range(100):
        again = evaluate(case, leaves, incoming)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), i
