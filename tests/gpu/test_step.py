"""Decoding on a GPU: on pools and in place, in CUDA graphs, without waiting."""

from dataclasses import replace

import pytest
import torch

from fla.testing import GPU
from fla.testing.cases import heads
from fla.testing.runs import initial_state
from tests.ops.stepping import Served, check_against_separate_calls, check_served, step_cases

SIZES = (*((size, size) for size in (16, 33, 64, 100, 128, 256, 512)), (256, 512), (128, 33), (33, 600))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUITE = replace(GPU, dtypes=DTYPES, sizes=heads(*((3, K, V) for K, V in SIZES)))
TOKENS = (1, 2, 8, (5, 0, 1, 3))
COMMON, MANY = {"H": 3, "K": 128, "V": 64}, {"H": 16, "K": 128, "V": 128}
EVERY_WAY = step_cases(SUITE, tokens=(1,), sizes=COMMON)
EVERY_OP = list({(case.spec.name, case.form): case for case in EVERY_WAY}.values())


@pytest.mark.parametrize("case", step_cases(SUITE, tokens=TOKENS, each=1), ids=str)
def test_pool(case):
    """Variants, sizes, dtypes and tokens in turn."""
    check_served(Served(case))
    check_served(Served(case, indices=None))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", step_cases(SUITE, tokens=TOKENS), ids=str)
def test_pools_of_all_tokens(case):
    check_served(Served(case))
    check_served(Served(case, indices=None))


@pytest.mark.parametrize("case", step_cases(SUITE, tokens=TOKENS, each=2, sizes=COMMON), ids=str)
def test_a_pool_is_separate_calls(case):
    check_against_separate_calls(Served(case, index_dtype=torch.int64))


@pytest.mark.parametrize("case", [case.resized(**MANY) for case in EVERY_WAY], ids=str)
def test_many_states(case):
    """With 300 requests on a pool of 400, programs have their largest tiles."""
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
        changes = tensors | {"state_indices": indices} | initial_state(eager)
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
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_a_slot_outside_the_pool_is_no_result(case, in_place):
    """Its values are not read on the host: nothing outside is read or written, and what comes out is NaN."""
    served = Served(replace(case, tokens=2), indices=(5, 7, -1, 1_000_000))
    o, states, pools = served.run(in_place)
    assert o[[1, 3]].isnan().all() and not o[2].any() and o[0].isfinite().all()
    before = served.owned()[0]
    untouched = [i for i in range(7) if i != 5 or not in_place]
    assert torch.equal(pools[0][untouched], before[untouched])
    if not in_place:
        assert states[0][[1, 3]].isnan().all() and not states[0][2].any()
