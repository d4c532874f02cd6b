"""Normalised linear attention: its state is the pair (S, z), so that a sequence may be split anywhere."""

import pytest
import torch

from fla.ops import chunk_linear_attn
from fla.ops._spec import REGISTRY
from fla.ops.linear_attn import naive_chunk_linear_attn
from fla.testing import Case, assert_within_budget, check_values, make_inputs
from fla.testing.contract import in_pieces

SPEC = REGISTRY["linear_attn"]
RESUMED = next(variant for variant in SPEC.variants if variant.name == "resumed")


@pytest.mark.parametrize("form", [form for form in SPEC.forms if form not in SPEC.same])
def test_split_and_resume(form):
    """A sequence goes on from its state and its normaliser. One of the pieces is exactly a chunk."""
    case = Case(SPEC, form, RESUMED, tokens=130)
    check_values(case, in_pieces(case, (1, 65)))


@pytest.mark.parametrize("normalize", (False, True))
def test_naive_chunk_is_the_recurrence(normalize):
    x = make_inputs(SPEC, {"T": 130}, variant=SPEC.variants[0])
    x = {name: x[name] for name in ("q", "k", "v")}
    wide = {name: value.double() for name, value in x.items()}
    exact, _ = SPEC.reference(**wide, normalize=normalize)
    naive, _ = SPEC.reference(**x, normalize=normalize)
    assert_within_budget("o", naive_chunk_linear_attn(**x, normalize=normalize), exact, naive)


def test_normalize_defaults():
    """The chunk forms normalise unless told otherwise, the recurrent one does not: the contract's defaults."""
    x = make_inputs(SPEC, {"T": 5}, variant=SPEC.variants[0])
    x = {name: x[name] for name in ("q", "k", "v")}
    assert torch.equal(chunk_linear_attn(**x)[0], chunk_linear_attn(**x, normalize=True)[0])
    recurrent = SPEC.forms["fused_recurrent"]
    assert torch.equal(recurrent(**x)[0], recurrent(**x, normalize=False)[0])
