"""The family `decay` on a GPU: its chunk kernels at real sizes (segments, slices, joined packs, strong decays, memory)
and its recurrent kernels on what no op combines.

Kinds of decay meet dtypes, gates and sizes in turn; every kind with all of them only in the exhaustive suite.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fla.backends.triton import _packs
from fla.backends.triton._sequence import segment_length
from fla.backends.triton.decay import recurrent_backward, recurrent_forward
from fla.ops import chunk_gla, chunk_simple_gla, fused_recurrent_gla, fused_recurrent_simple_gla
from fla.ops._spec import REGISTRY
from fla.testing import GPU, assert_within_budget, make_inputs, relative_rms
from fla.testing.contract import Case
from tests.families import decay
from tests.families.decay import DECAYS, Direct, check_chunks, check_direct, check_one_prefix
from tests.gpu.running import evaluate, leaves_of, noise_for
from tests.ops.suite import in_turn

BF16, FP16 = torch.bfloat16, torch.float16
JOINED = (5, 1, 0, 58, 64, 70, 3, 2000, 1, 1, 130, 36, 700, 64, 128, 4)  # some end with a chunk


def chunk_cases(H: int, K: int, V: int, **changes) -> list[Case]:
    return decay.chunk_cases(GPU, sizes={"H": H, "K": K, "V": V}, **changes)


def gated(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.gated]


JOINED_CASES = [
    cases if gates == "ordinary" else gated(cases)
    for gates in ("ordinary", "weak", "mixed")
    for dtype in (BF16, FP16)
    for cases in [chunk_cases(2, 128, 64, tokens=JOINED, state="none", gates=gates, dtype=dtype)]
]
JOINED_SIZES = [
    chunk_cases(*sizes, tokens=(70, 1, 0, 130, 64, 50), dtype=BF16, state="none")
    for sizes in ((2, 64, 64), (1, 100, 33), (1, 256, 256), (1, 300, 144))
]
STRONG = [
    gated(chunk_cases(4, 64, 64, tokens=300, gates=gates, dtype=dtype))
    for gates in (-1.2, -2.5, "uneven", "mixed")
    for dtype in (BF16, FP16)
]


@pytest.mark.parametrize("case", chunk_cases(2, 64, 64, tokens=4096, dtype=BF16, batch=1, gates="weak"), ids=str)
def test_segments(case):
    assert segment_length(4096, 2) < 4096
    check_chunks(case)


@pytest.mark.parametrize("case", chunk_cases(1, 128, 64, tokens=(2000, 0, 301), dtype=FP16), ids=str)
def test_segments_of_a_pack_with_strong_decays(case):
    """fp16's near range is 8 nats a chunk, a tenth of bf16's: ordinary decays leave it."""
    assert segment_length(2301, 2) < 2301
    check_chunks(case)


@pytest.mark.parametrize("case", in_turn(*JOINED_CASES[:2]) + in_turn(*JOINED_CASES[2:4], *JOINED_CASES[4:]), ids=str)
def test_joined_packs(case):
    """Sequences without states share chunks, here in segments too."""
    assert segment_length(sum(JOINED), 2) < sum(JOINED) < _packs.SHORT_AVERAGE * len(JOINED)
    check_chunks(case)


@pytest.mark.parametrize("case", in_turn(*JOINED_SIZES[:2]) + in_turn(*JOINED_SIZES[2:]), ids=str)
def test_joined_packs_of_all_head_sizes(case):
    check_chunks(case)


@pytest.mark.parametrize("case", in_turn(*STRONG[::2]) + in_turn(*STRONG[1::2]), ids=str)
def test_strong_decays(case):
    """A constant decay that needs no gradient has kernels of its own, and is tested too."""
    check_chunks(case)


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


PREFIXES = ((22, 21), (200, 100))
PREFIX_CASES = [
    case for dtype in (BF16, FP16, torch.float32) for case in chunk_cases(2, 128, 128, tokens=22, dtype=dtype)
]


@pytest.mark.parametrize("case", PREFIX_CASES, ids=str)
def test_later_tokens_change_nothing_before_them(case):
    """Outputs and gradients of a prefix, whatever later gates are, and where later tokens are cut off."""
    for tokens, count in PREFIXES:
        for gate in (None, 0.0, -5.0, -50.0):
            check_one_prefix(replace(case, tokens=tokens), count, gate)


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
    case = next(c for c in chunk_cases(H, D, D, tokens=T, dtype=BF16, batch=1) if c.spec.name == op)
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


RECURRENT_SIZES = (*((size, size) for size in (16, 33, 64, 100, 128, 256, 512)), (256, 512), (128, 33), (33, 600))
RECURRENT_DTYPES = (torch.float32, BF16, FP16)


def direct_cases():
    """Every size with every dtype, decays and packings in turn; the long ones show errors that grow with T."""
    for i, (K, V) in enumerate(RECURRENT_SIZES):
        for j, dtype in enumerate(RECURRENT_DTYPES):
            turn = 3 * i + j
            tokens = (70, (65, 0, 1, 30), (0, 1, 33))[turn % 3]
            yield Direct(K, V, DECAYS[turn % len(DECAYS)], dtype, tokens, heads=2, device="cuda")
    for i, decays in enumerate(DECAYS):
        turned = {"decays": decays, "heads": 2, "device": "cuda"}
        yield Direct(64, 96, dtype=RECURRENT_DTYPES[i % 2], tokens=(64, 0, 1, 40), index_dtype=torch.int64, **turned)
        yield Direct(64, 64, tokens=80, gates="extreme", **turned)
        yield Direct(64, 64, tokens=1024, states=False, **turned)


@pytest.mark.parametrize("case", list(direct_cases()), ids=str)
def test_recurrent_forward_and_backward(case):
    check_direct(case, recurrent_forward.forward, recurrent_backward.backward)


def test_the_recurrent_backward_repeats_bitwise():
    case = Direct(256, 300, ("gk", "gv"), torch.float32, (65, 0, 1, 30), heads=2, device="cuda")
    x = case.inputs()
    first, *others = (recurrent_backward.backward(case.problem(x), x["do"], x["dht"], True) for _ in range(10))
    for other in others:
        pairs = zip(first, other, strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in pairs)


@pytest.mark.parametrize("function, gate", ((chunk_gla, "g"), (fused_recurrent_gla, "gk")), ids=("chunk", "recurrent"))
def test_more_than_two_to_the_31_elements(function, gate):
    """Offsets are 64-bit: a row far behind 2^31 elements is what it is alone. (The recurrent form's tiles follow the
    number of states, and with them the order of its sums.)"""
    B, T, H, D = 9, 32768, 64, 128
    assert (B - 1) * T * H * D >= 2**31
    q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    g = torch.full((1, T, H, D), -0.1, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        alone, _ = function(q, q, q, **{gate: g})
        many = torch.cat([torch.zeros_like(q).expand(B - 1, -1, -1, -1), q])
        output, _ = function(many, many, many, **{gate: g.expand(B, -1, -1, -1)})
    assert torch.equal(output[-1], alone[0]) or (gate == "gk" and relative_rms(output[-1], alone[0]) < 2.0**-8)
    assert not output[:-1].any()


def test_other_gpu_tensors_are_refused():
    x = make_inputs(REGISTRY["simple_gla"], {"T": 65}, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="k must be on cuda"):
        chunk_simple_gla(x["q"], x["k"].cpu(), x["v"], x["g"])


def test_a_pool_of_more_than_two_to_the_31_elements():
    """Offsets of slots are 64-bit."""
    H, D = 64, 128
    slots = 2**31 // (H * D * D) + 2
    pool = torch.zeros(slots, H, D, D, device="cuda")
    assert pool.numel() > 2**31
    pool[-1].normal_()
    small = pool[-1:].clone()
    q, k, v = (torch.randn(1, 2, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = torch.full((1, 2, H), -0.1, device="cuda")
    last = torch.tensor([slots - 1], device="cuda")
    with torch.no_grad():
        o, _ = fused_recurrent_simple_gla(q, k, v, g, initial_state=pool, state_indices=last, inplace_final_state=True)
        expected, _ = fused_recurrent_simple_gla(q, k, v, g, initial_state=small, inplace_final_state=True)
    assert torch.equal(o, expected) and torch.equal(pool[-1:], small)
    assert not pool[:-1].any()


def test_keys_over_the_limit_name_the_torch_backend():
    x = torch.zeros(1, 1, 1, 513, device="cuda")
    v, pool = torch.zeros(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 513, 16, device="cuda")
    with pytest.raises(ValueError, match=r"K = 513.*backend='torch'"):
        fused_recurrent_gla(x, x, v, initial_state=pool, inplace_final_state=True)
