"""The recurrent kernels compiled: every head size and dtype, decoding on pools, CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from fla.backends.triton.decay import recurrent_backward, recurrent_forward
from fla.ops import fused_recurrent_gla, fused_recurrent_simple_gla
from fla.testing import GPU
from tests.ops.stepping import (
    DECAYS,
    Direct,
    Served,
    check_against_separate_calls,
    check_direct,
    check_served,
    step_cases,
)

SIZES = (*((size, size) for size in (16, 33, 64, 100, 128, 256, 512)), (256, 512), (128, 33), (33, 600))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUITE = replace(GPU, dtypes=DTYPES, heads=tuple((3, K, V) for K, V in SIZES))
TOKENS = (1, 2, 8, (5, 0, 1, 3))
EVERY_OP = step_cases(SUITE, tokens=(1,), heads=(4, 128, 64))


def direct_cases():
    """Every size with every dtype, decays and packings in turn; the long ones show errors that grow with T."""
    for i, (K, V) in enumerate(SIZES):
        for j, dtype in enumerate(DTYPES):
            turn = 3 * i + j
            tokens = (70, (65, 0, 1, 30), (0, 1, 33))[turn % 3]
            yield Direct(K, V, DECAYS[turn % len(DECAYS)], dtype, tokens, heads=2, device="cuda")
    for i, decays in enumerate(DECAYS):
        turned = {"decays": decays, "heads": 2, "device": "cuda"}
        yield Direct(64, 96, dtype=DTYPES[i % 2], tokens=(64, 0, 1, 40), index_dtype=torch.int64, **turned)
        yield Direct(64, 64, tokens=80, gates="extreme", **turned)
        yield Direct(64, 64, tokens=1024, states=False, **turned)


@pytest.mark.parametrize("case", list(direct_cases()), ids=str)
def test_forward_and_backward(case):
    check_direct(case, recurrent_forward.forward, recurrent_backward.backward)


def test_the_backward_repeats_bitwise():
    case = Direct(256, 300, ("gk", "gv"), torch.float32, (65, 0, 1, 30), heads=2, device="cuda")
    x = case.inputs()
    first, *others = (recurrent_backward.backward(case.problem(x), x["do"], x["dht"], True) for _ in range(10))
    for other in others:
        pairs = zip(first, other, strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in pairs)


@pytest.mark.parametrize("case", step_cases(SUITE, tokens=TOKENS), ids=str)
def test_pool(case):
    """Every size with every dtype: 32 cases over 10 sizes and 3 dtypes in turn."""
    check_served(Served(case))
    check_served(Served(case, indices=None))


@pytest.mark.parametrize("case", step_cases(SUITE, tokens=TOKENS, heads=(3, 128, 64)), ids=str)
def test_a_pool_is_separate_calls(case):
    check_against_separate_calls(Served(case, index_dtype=torch.int64))


@pytest.mark.parametrize("case", step_cases(SUITE, tokens=(1,), heads=(16, 128, 128)), ids=str)
def test_many_states(case):
    """So many that programs are as large as they get: 300 requests on a pool of 400."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:300]
    order[::7] = -1
    check_served(Served(replace(case, batch=300), slots=400, indices=tuple(order.tolist())))


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    check_served(Served(case), torch.compile(case.function, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_a_decoding_loop_in_a_cuda_graph(case):
    """One captured step, replayed with new tokens while requests come and go, is the loop of eager calls."""
    served = Served(case)
    owned, steps = served.owned(), [Served(replace(case, seed=case.seed + 10 * i)).tensors for i in range(1, 7)]
    keywords = served.keywords(owned, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        case.function(**keywords | {"state_indices": torch.full_like(keywords["state_indices"], -1)})  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(pool, before) for pool, before in zip(owned, served.owned(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured, _ = case.function(**keywords)
    eager = served.owned()
    for i, tensors in enumerate(steps):
        indices = torch.tensor(((5, -1, 0, 3), (5, 2, 0, -1), (-1, 2, 6, 4))[i // 2], dtype=torch.int32, device="cuda")
        keywords["state_indices"].copy_(indices)
        for name, x in tensors.items():
            keywords[name].copy_(x)
        graph.replay()
        changes = tensors | {"state_indices": indices, "initial_state": eager if len(eager) > 1 else eager[0]}
        with torch.no_grad():
            o, _ = case.function(**keywords | changes)
        assert torch.equal(captured, o)
    assert all(torch.equal(a, b) for a, b in zip(owned, eager, strict=True))


@pytest.mark.parametrize("tokens", (1, (2, 0, 1, 4)), ids=str)
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_never_waits_for_the_gpu(case, tokens):
    served = Served(replace(case, tokens=tokens))
    owned = served.owned()
    keywords = served.keywords(owned, True)
    served.run(True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            case.function(**keywords)
            case.function(**keywords | {"inplace_final_state": False})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("in_place", (False, True))
def test_a_slot_outside_the_pool_is_no_result(in_place):
    """Its values are not read on the host: nothing outside is read or written, and what comes out is NaN."""
    served = Served(replace(EVERY_OP[-1], tokens=2), indices=(5, 7, -1, 1_000_000))
    o, states, pools = served.run(in_place)
    assert o[[1, 3]].isnan().all() and not o[2].any() and o[0].isfinite().all()
    before = served.owned()[0]
    untouched = [i for i in range(7) if i != 5 or not in_place]
    assert torch.equal(pools[0][untouched], before[untouched])
    if not in_place:
        assert states[0][[1, 3]].isnan().all() and not states[0][2].any()


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
