"""What is special about RWKV-6: outputs that read the state before the update, the bonus, and how steps read a pool."""

import importlib

import pytest
import torch

from fla.ops import chunk_rwkv6, fused_recurrent_rwkv6
from fla.ops._spec import REGISTRY
from fla.ops.rwkv6 import naive_chunk_rwkv6, naive_recurrent_rwkv6
from fla.testing.contract import Case, check_values
from fla.testing.inputs import make_inputs, pack
from fla.varlen import prepare_sequence_ids

SPEC = REGISTRY["rwkv6"]
FORMS = {"chunk": chunk_rwkv6, "fused_recurrent": fused_recurrent_rwkv6, "naive": naive_recurrent_rwkv6}


def official(r, k, v, w, u, scale, state):
    """The loops of the official kernel, number by number: `state[i][j]` is of value channel i and key channel j.

    The official weights give `w = -exp(...)`, and the kernel multiplies by `exp(w)`.
    """
    B, T, H, K = r.shape
    V = v.shape[-1]
    o, final = torch.zeros_like(v), torch.zeros_like(state)
    for b in range(B):
        for h in range(H):
            s = [[state[b, h, j, i].item() for j in range(K)] for i in range(V)]
            for t in range(T):
                for i in range(V):
                    y = 0.0
                    for j in range(K):
                        x = k[b, t, h, j].item() * v[b, t, h, i].item()
                        y += scale * r[b, t, h, j].item() * (u[h, j].item() * x + s[i][j])
                        s[i][j] = s[i][j] * w[b, t, h, j].exp().item() + x
                    o[b, t, h, i] = y
            final[b, h] = torch.tensor(s, dtype=o.dtype).T
    return o, final


@pytest.mark.parametrize("form", FORMS)
def test_the_official_loops(form):
    x = make_inputs(SPEC, {"B": 2, "T": 6, "H": 2, "K": 3, "V": 4}, torch.float64)
    x["w"] = -torch.randn_like(x["w"]).exp()
    state = x.pop("initial_state")
    o, final = FORMS[form](*x.values(), scale=0.7, initial_state=state, output_final_state=True)
    expected, expected_final = official(*x.values(), 0.7, state)
    torch.testing.assert_close(o, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, expected_final, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tokens", (0, 1, 70))
def test_naive_chunks(tokens):
    x = make_inputs(SPEC, {"T": tokens, "V": 5}, torch.float64)
    del x["initial_state"]
    expected, _ = naive_recurrent_rwkv6(*x.values(), scale=1.0)
    torch.testing.assert_close(naive_chunk_rwkv6(*x.values()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(naive_chunk_rwkv6(*x.values(), chunk_size=64), expected, rtol=1e-12, atol=1e-12)


def test_places_where_other_programs_look():
    for place, name in (
        ("recurrent_naive", "naive_recurrent_rwkv6"),
        ("chunk_naive", "naive_chunk_rwkv6"),
        ("chunk", "chunk_rwkv6"),
        ("fused_recurrent", "fused_recurrent_rwkv6"),
    ):
        assert callable(getattr(importlib.import_module(f"fla.ops.rwkv6.{place}"), name))


@pytest.mark.parametrize("form", SPEC.forms)
def test_gradient_of_a_state_with_many_keys_and_few_values(form):
    check_values(Case(SPEC, form, SPEC.variants[0], sizes={"H": 2, "K": 64, "V": 16}, tokens=(65, 0, 1)))


@pytest.mark.parametrize("form", SPEC.forms)
@pytest.mark.parametrize("where", ("r", "k", "v", "w", "initial_state"))
def test_a_broken_sequence_breaks_no_other(form, where):
    """NaN in one sequence of a pack stays there: in outputs, final states and gradients."""
    lengths = (3, 0, 2, 1, 4)
    bounds = pack(lengths)
    x = make_inputs(SPEC, {"B": 1, "T": 10}, cu_seqlens=bounds)
    x[where][(2,) if where == "initial_state" else (0, slice(3, 5))] = float("nan")
    x = {name: value.requires_grad_() for name, value in x.items()}
    o, final = SPEC.forms[form](**x, output_final_state=True, cu_seqlens=bounds)
    good = prepare_sequence_ids(bounds) != 2
    rest = torch.tensor([0, 1, 3, 4])
    assert o[:, good].isfinite().all() and final[rest].isfinite().all()
    (o[:, good].sum() + final[rest].sum()).backward()
    for name in ("r", "k", "v", "w"):
        assert x[name].grad[:, good].isfinite().all(), name
    assert x["initial_state"].grad[rest].isfinite().all()


def test_steps_get_the_pool_itself(monkeypatch):
    """A decoding step reads the states where they are, then writes them there; neither goes through a copy."""
    from fla.backends.torch import decay

    x, pool, seen = make_inputs(SPEC, {"B": 3, "T": 1}), torch.randn(5, 2, 16, 16), []
    step = decay.step

    def recorded(problem, state_indices, output_final_state, in_place, v_first):
        seen.append((problem.initial_state.data_ptr(), state_indices.tolist(), in_place))
        return step(problem, state_indices, output_final_state, in_place, v_first)

    monkeypatch.setattr(decay, "step", recorded)
    indices = torch.tensor([4, -1, 0])
    with torch.no_grad():
        _, same = fused_recurrent_rwkv6(**x | {"initial_state": pool}, state_indices=indices, inplace_final_state=True)
    assert same is pool
    assert seen == [(pool.data_ptr(), [4, -1, 0], False), (pool.data_ptr(), [4, -1, 0], True)]
