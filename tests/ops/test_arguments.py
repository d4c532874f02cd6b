"""Arguments that other programs' calls have: host copies of the packing, chunk sizes, former names. None is ignored."""

import ast
import inspect
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch

from fla import ops, varlen
from fla.ops import chunk_gla, fused_chunk_linear_attn, fused_recurrent_retention
from fla.ops._spec import REGISTRY
from fla.ops.attention import attention
from fla.shapes import merge_cu_seqlens
from fla.testing import TORCH, plain_cases
from fla.testing.contract import accepts
from fla.testing.errors import good_call

PUBLIC = [f for spec in REGISTRY.values() for f in spec.forms.values()]
every_form = pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)


def taking(argument, **changes):
    """For every form that has this parameter, one case."""
    cases = [case for spec in REGISTRY.values() for case in plain_cases(spec, TORCH, **changes)]
    found = {case.function: case for case in reversed(cases) if accepts(case, argument)}
    assert found, f"no form takes {argument}"
    return pytest.mark.parametrize("case", list(found.values()), ids=str)


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_form
def test_every_parameter_is_read(function):
    """A parameter that the function never reads would be ignored silently."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(inspect.signature(function).parameters) <= read


# ---- packing

PACK = (2, 0, 3)


@taking("cu_seqlens_cpu", tokens=PACK)
def test_the_host_copy_alone_is_the_packing(case):
    given = good_call(case)
    both = given | {"cu_seqlens_cpu": given["cu_seqlens"].clone()}
    alone = {name: x for name, x in both.items() if name != "cu_seqlens"}
    expected = case.function(**given)
    equal(case.function(**alone), expected)
    equal(case.function(**both), expected)
    stateless = {name: x for name, x in given.items() if name not in ("cu_seqlens", "initial_state")}
    assert not torch.equal(case.function(**stateless)[0], expected[0])


@taking("cu_seqlens_cpu", tokens=PACK)
@pytest.mark.parametrize(
    "bounds, error, says",
    (
        ([0, 2, 2, 5], TypeError, "got list"),
        (torch.tensor([0.0, 2, 2, 5]), TypeError, "float32"),
        (torch.tensor([[0, 2, 2, 5]]), ValueError, r"\[1, 4\]"),
        (torch.tensor([1, 2, 2, 5]), ValueError, "start at 0, got 1"),
        (torch.tensor([0, 2, 2, 4]), ValueError, "end at the number of tokens 5, got 4"),
        (torch.tensor([0, 3, 2, 5]), ValueError, "decrease"),
        (torch.tensor([0, 2, 2, 5], device="meta"), ValueError, "be on cpu, got meta"),
    ),
    ids=str,
)
def test_a_bad_host_copy_is_blamed_itself(case, bounds, error, says):
    given = good_call(case)
    alone = {name: x for name, x in given.items() if name != "cu_seqlens"}
    with pytest.raises(error, match=f"^cu_seqlens_cpu must .*{says}"):
        case.function(**alone, cu_seqlens_cpu=bounds)


@taking("cu_seqlens_cpu")
def test_a_host_copy_beside_a_batch_or_of_another_pack(case):
    given = good_call(replace(case, tokens=5, batch=2, state="none"))
    with pytest.raises(ValueError, match=r"^cu_seqlens_cpu packs .* batch size 1, got 2"):
        case.function(**given, cu_seqlens_cpu=torch.tensor([0, 2, 5]))
    packed = good_call(replace(case, tokens=PACK))
    with pytest.raises(ValueError, match=r"^cu_seqlens_cpu must have the shape \[4\] of cu_seqlens, got \[3\]"):
        case.function(**packed, cu_seqlens_cpu=torch.tensor([0, 2, 5]))


def test_a_list_says_how_to_make_the_tensor():
    x = torch.randn(1, 5, 2, 4)
    how = r"^cu_seqlens must be .*got list; make one with torch.tensor\(cu_seqlens, dtype=torch.int32, device='cpu'\)"
    for call in (
        lambda bounds: chunk_gla(x, x, x, x, cu_seqlens=bounds),
        lambda bounds: fused_recurrent_retention(x, x, x, cu_seqlens=bounds),
        lambda bounds: fused_chunk_linear_attn(x, x, x, cu_seqlens=bounds),
        lambda bounds: attention(x, x, x, cu_seqlens=bounds),
    ):
        with pytest.raises(TypeError, match=how):
            call([0, 2, 5])
    with pytest.raises(TypeError, match=r"cu_seq_lens_q must be a tensor, got list; make one with torch\.tensor"):
        merge_cu_seqlens(torch.tensor([0, 2, 5]), [0, 2, 5])


LISTS = {
    "prepare_lens": ("cu_seqlens",),
    "prepare_lens_from_mask": ("mask",),
    "prepare_cu_seqlens_from_lens": ("lens",),
    "prepare_cu_seqlens_from_mask": ("mask",),
    "prepare_sequence_ids": ("cu_seqlens",),
    "prepare_position_ids": ("cu_seqlens",),
    "prepare_token_indices": ("cu_seqlens",),
    "prepare_chunk_offsets": ("cu_seqlens", 64),
    "prepare_chunk_indices": ("cu_seqlens", 64),
    "get_max_num_splits": ("cu_seqlens", 64),
    "mask_indices": ("mask",),
    "check_cu_seqlens": ("cu_seqlens", 5),
}


@pytest.mark.parametrize("name", LISTS)
def test_helpers_of_packing_refuse_lists(name):
    argument, *rest = LISTS[name]
    with pytest.raises(TypeError, match=rf"^{argument} must be a tensor, got list; make one with torch\.tensor"):
        getattr(varlen, name)([0, 2, 5], *rest)


def test_a_reversed_pack_is_blamed_as_it_was_given():
    x = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, got 1"):
        fused_recurrent_retention(x, x, x, reverse=True, cu_seqlens=torch.tensor([1, 3, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens must never decrease, got \[0, 3, 2, 5\]"):
        fused_recurrent_retention(x, x, x, reverse=True, cu_seqlens=torch.tensor([0, 3, 2, 5]))


def test_a_pair_of_states_is_blamed_as_the_argument_that_it_is():
    x = torch.randn(2, 5, 2, 4)
    pair = torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 2, 3)
    with pytest.raises(ValueError, match=r"^z in initial_state must have shape \[N, 1, H, K\] with K = 4"):
        fused_chunk_linear_attn(x, x, x, initial_state=pair)


@pytest.mark.parametrize(
    "argument, value, error, says",
    (
        ("mask", [[1, 1, 1]], TypeError, "mask must be a tensor or None, got list"),
        ("window_size", "3", TypeError, "window_size must be an int or None, got str"),
        ("window_size", 2.0, TypeError, "window_size must be an int or None, got float"),
    ),
)
def test_attention_names_what_is_wrong(argument, value, error, says):
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(error, match=says):
        attention(x, x, x, **{argument: value})


# ---- chunk sizes


@taking("chunk_size", tokens=5)
def test_a_chunk_size_changes_nothing(case):
    given = good_call(case)
    expected = case.function(**given)
    for size in (None, 16, 32, 64, 128):
        equal(case.function(**given, chunk_size=size), expected)
    for size in (0, 8, 48, 256, -64, True):
        with pytest.raises(ValueError, match=f"chunk_size must be 16, 32, 64 or 128, .*got {size}"):
            case.function(**given, chunk_size=size)
    for size in ("64", 64.0):
        with pytest.raises(TypeError, match=r"chunk_size must be .*got (str|float)"):
            case.function(**given, chunk_size=size)
    parameter = inspect.signature(case.function).parameters["chunk_size"]
    by_position = case.function.__name__ in ("chunk_dplr_delta_rule", "chunk_rwkv7")  # other programs may give it so
    assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) is not by_position


def test_which_forms_take_a_chunk_size():
    names = {f.__name__ for f in PUBLIC if "chunk_size" in inspect.signature(f).parameters}
    assert names >= {f"{form}_{op}" for form in ("chunk", "fused_chunk") for op in ("retention", "simple_gla")}
    assert (
        "no effect on results" in ops.chunk_retention.__doc__ and "no effect on results" in ops.chunk_simple_gla.__doc__
    )


# ---- former spellings


def once(call):
    """The result of a call, which warns once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert [w.category for w in caught] == [DeprecationWarning]
    assert caught[0].filename == __file__, "the warning points to the caller"
    return result, str(caught[0].message)


@taking("state_v_first", tokens=5)
def test_transpose_state_layout_is_state_v_first(case):
    given = good_call(case)
    given["initial_state"] = given["initial_state"].mT.contiguous()
    expected = case.function(**given, state_v_first=True)
    result, message = once(lambda: case.function(**given, transpose_state_layout=True))
    equal(result, expected)
    assert message == f"{case.function.__name__}: transpose_state_layout is the former name of state_v_first"
    given["initial_state"] = given["initial_state"].mT.contiguous()
    result, _ = once(lambda: case.function(**given, transpose_state_layout=False))
    equal(result, case.function(**given))
    with pytest.raises(TypeError, match="state_v_first and transpose_state_layout, its former name, are both given"):
        case.function(**given, state_v_first=True, transpose_state_layout=True)


@every_form
def test_forms_without_it_refuse_transpose_state_layout(function):
    if "state_v_first" not in inspect.signature(function).parameters:
        with pytest.raises(TypeError, match="unexpected keyword argument 'transpose_state_layout'"):
            function(*[torch.zeros(1, 2, 1, 4)] * 3, transpose_state_layout=False)
    else:
        assert "transpose_state_layout" not in inspect.signature(function).parameters


def test_the_former_name_in_a_compiled_graph():
    x = torch.randn(1, 5, 2, 4)
    state = torch.zeros(1, 2, 4, 4)
    compiled = torch.compile(fused_recurrent_retention, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        o, _ = compiled(x, x, x, initial_state=state, transpose_state_layout=True)
    torch.testing.assert_close(o, fused_recurrent_retention(x, x, x)[0])


# ---- defaults


def test_normalize_is_said_first():
    """The default differs between the forms, as the programs that call them expect: each says so in its first line."""
    first = {f: f.__doc__.splitlines()[0] for f in REGISTRY["linear_attn"].forms.values()}
    for function, line in first.items():
        default = inspect.signature(function).parameters["normalize"].default
        assert f"normalize={default}" in line, f"{function.__name__}: {line}"
