"""What trainers import and how they call it: positions, keywords, classes, and what is not there yet."""

import importlib

import pytest
import torch
from fla.modules.conv.triton.ops import CausalConv1dFunction
from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction
from fla.ops.gated_delta_rule.fused_recurrent import FusedRecurrentFunction

from fla.modules.convolution import causal_conv1d
from fla.modules.l2norm import l2norm, l2norm_fwd
from fla.ops.cp import FLACPContext, build_cp_context
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda
from fla.ops.kda.gate import fused_kda_gate
from tests.clients.calls import CALLS, gradients, leaves_of, same, tensors

pytestmark = pytest.mark.touches("gated_delta_rule", "kda")


@pytest.mark.parametrize("client", CALLS)
def test_calls(client):
    CALLS[client]("cpu")


def conv_leaves():
    return leaves_of({"x": torch.randn(2, 9, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)})


# class -> the op, its first arguments, and further ones in its order
FUNCTIONS = {
    ChunkGatedDeltaRuleFunction: (
        chunk_gated_delta_rule,
        lambda: leaves_of(tensors("cpu", rows=2)),
        (0.3, torch.randn(2, 4, 16, 24), True, True),
    ),
    FusedRecurrentFunction: (
        lambda q, k, v, g, beta, *rest: fused_recurrent_gated_delta_rule(q, k, v, g, None, None, beta, *rest),
        lambda: leaves_of(tensors("cpu", rows=2, tokens=9)),
        (None, None, True),
    ),
    CausalConv1dFunction: (causal_conv1d, conv_leaves, (None, torch.randn(2, 6, 4), True, "silu")),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)


@every_function
def test_functions_have_the_arguments_of_the_op(function):
    op, make, rest = FUNCTIONS[function]
    leaves = make()
    if function is FusedRecurrentFunction:
        q, k, v, g, beta = leaves
        found = function.apply(q, k, v, g, None, None, beta, *rest)
    else:
        found = function.apply(*leaves, *rest)
    same(gradients(found, leaves), gradients(op(*leaves, *rest), leaves))
    same(found, op(*leaves, *rest))


@every_function
def test_the_class_is_the_one_in_use(function, monkeypatch):
    """Trainers register the class, and replace PyTorch's `apply` to see what runs (`spmd_types` does)."""
    op, make, rest = FUNCTIONS[function]
    leaves, used, plain = make(), [], torch.autograd.Function.apply.__func__
    assert issubclass(function, torch.autograd.Function)

    def seen(cls, *args, **kwargs):
        used.append(cls)
        return plain(cls, *args, **kwargs)

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(seen))
    result = op(*leaves, *rest)[0]
    assert used == [function]
    nodes, names = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [after for after, _ in node.next_functions if after is not None]
    assert f"{function.__name__}Backward" in names


def test_other_ops_have_functions_of_their_own():
    leaves = leaves_of(tensors("cpu", g=(4, 16)))
    assert chunk_kda(*leaves)[0].grad_fn.name() != "ChunkGatedDeltaRuleFunctionBackward"


def test_the_former_gate_by_position():
    """All six of its arguments, with gradients."""
    g, A, bias = leaves_of({"g": torch.randn(2, 5, 8) * 3, "A": torch.randn(1, 1, 2, 1), "g_bias": torch.randn(8)})
    x = 2.0 * (g + bias).unflatten(-1, (2, 4))
    expected = -A.view(2, 1).exp() * torch.where(x > 1.5, x, torch.log1p(x.exp())) / 2.0
    with pytest.warns(DeprecationWarning, match="former signature"):
        found = [fused_kda_gate(g, A, 4, bias, 2.0, 1.5), fused_kda_gate(g, A, 4, g_bias=bias, beta=2.0, threshold=1.5)]
    exact = gradients([expected], [g, A, bias])
    for one in found:
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(gradients([one], [g, A, bias]), exact)


def test_l2norm_of_small_keys():
    """Zero keys and keys of length 1e-4: the 1e-6 stands inside the root."""
    x = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1) * torch.tensor([[0.0], [1e-4], [1.0]])
    x.requires_grad_()
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    for found in (l2norm(x), l2norm_fwd(x)[0]):
        torch.testing.assert_close(found, expected)
    dy = torch.randn(3, 16)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (l2norm(x), expected)))


LATER = {
    "fla.ops.gdn2.chunk": "chunk_gdn2",
    "fla.ops.gdn2": "chunk_gdn2",
    "fla.ops.gated_delta_product.chunk": "chunk_gated_delta_product",
    "fla.ops.gated_delta_product": "chunk_gated_delta_product",
}


@pytest.mark.parametrize("place", LATER)
def test_what_is_not_there_yet_says_so(place):
    function = getattr(importlib.import_module(place), LATER[place])
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(NotImplementedError, match=f"{LATER[place]} is not computed by this version"):
        function(x, x, x, g=x, beta=x)


def test_no_sequences_over_several_processes_yet():
    x, context = tensors("cpu"), FLACPContext(group=object(), cu_seqlens=torch.tensor([0, 3, 70]))
    assert context.is_cp_enabled and context.num_seqs == 2 and not FLACPContext().is_cp_enabled
    with pytest.raises(NotImplementedError, match="several processes"):
        build_cp_context(torch.tensor([0, 70]), None, conv1d_kernel_size=4)
    for call in (
        lambda: chunk_gated_delta_rule(**x, cp_context=context),
        lambda: chunk_kda(**tensors("cpu", g=(4, 16)), cp_context=context),
        lambda: causal_conv1d(torch.randn(1, 70, 6), torch.randn(6, 4), cp_context=context),
    ):
        with pytest.raises(NotImplementedError, match="cp_context must be None, got FLACPContext"):
            call()
