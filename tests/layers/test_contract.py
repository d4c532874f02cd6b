"""What every layer promises, over the cases of `cases.py`: values, gradients, packing, padding, caches, forms."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fla.layers._mixer import SHORT
from fla.models.cache import Cache
from fla.testing import assert_within_budget, relative_rms
from tests.layers.cases import CASES, IDX, LENGTHS, PLAIN, D, check_rows, naive_layer, rows_of

each_case = pytest.mark.parametrize("name", CASES)
each_plain = pytest.mark.parametrize("name", PLAIN)
MODES = [(name, mode) for name, case in CASES.items() for mode in case.modes]
each_mode = pytest.mark.parametrize(("name", "mode"), MODES)


def exhaustive(*values):
    """Values of a parameter that only `make test-all` runs, where another value holds the same code to it."""
    return [pytest.param(value, marks=pytest.mark.exhaustive, id=str(value)) for value in values]


# One batch with all kinds of padding, and each kind by itself.
SIDES = ["mixed", *exhaustive("left", "right", "between")]
each_side = pytest.mark.parametrize("side", SIDES)


def build(name: str, mode: str | None = None, layer_idx: int | None = None):
    layer = CASES[name].build(layer_idx=layer_idx)
    layer.mode = mode or layer.mode
    return layer


def pack(rows: list[Tensor], dtype=torch.int32) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(dtype)
    return torch.cat(rows)[None], bounds


def padded(rows: list[Tensor], side: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows in a batch with garbage at padding, and the mask; `side` "between": tokens at random columns, "mixed": every
    row on another side.
    """
    width = width or max(map(len, rows)) + 3
    generator = torch.Generator().manual_seed(7)
    x, mask = (
        100 * torch.randn(len(rows), width, D, generator=generator),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for b, row in enumerate(rows):
        n = len(row)
        columns = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "between": torch.randperm(width, generator=generator)[:n].sort().values,
        }[("left", "right", "between")[b % 3] if side == "mixed" else side]
        x[b, columns], mask[b, columns] = row, 1
    return x, mask


def unpadded(o: Tensor, mask: Tensor) -> list[Tensor]:
    assert torch.equal(o[mask == 0], torch.zeros_like(o[mask == 0])), "outputs at padding are not 0"
    return [o[b, mask[b] == 1] for b in range(len(o))]


# ---- values and gradients


@each_mode
def test_values(name, mode):
    layer = build(name, mode)
    check_rows(f"mode {mode}", [layer(row[None])[0][0] for row in rows_of()], name)


@pytest.mark.parametrize("how", ["padded", *exhaustive("alone")])
@each_mode
def test_gradients(name, mode, how):
    lengths = (20, 11, 67)
    layer, rows = build(name, mode), rows_of(lengths)
    upstream = rows_of(lengths, seed=5)

    def naive_gradients(dtype):
        naive, inputs = copy.deepcopy(layer).to(dtype), [row.to(dtype).clone().requires_grad_() for row in rows]
        outputs = [naive_layer(naive, row, name) for row in inputs]
        sum((o * up).sum() for o, up in zip(outputs, upstream, strict=True)).backward()
        return {"x": torch.cat([x.grad for x in inputs])} | {n: p.grad for n, p in naive.named_parameters()}

    reference, naive = naive_gradients(torch.float64), naive_gradients(torch.float32)
    if how == "alone":
        inputs = [row.clone().requires_grad_() for row in rows]
        sum((layer(x[None])[0][0] * up).sum() for x, up in zip(inputs, upstream, strict=True)).backward()
        dx = torch.cat([x.grad for x in inputs])
    else:
        x, mask = padded(rows, "mixed")
        x.requires_grad_()
        o = unpadded(layer(x, attention_mask=mask)[0], mask)
        sum((o * up).sum() for o, up in zip(o, upstream, strict=True)).backward()
        dx = torch.cat(unpadded(x.grad, mask))
    actual = {"x": dx} | {n: p.grad for n, p in layer.named_parameters()}
    for parameter, gradient in actual.items():
        assert gradient is not None, f"{parameter} has no gradient"
        assert_within_budget(
            f"{name}: d{parameter}",
            gradient,
            reference[parameter],
            naive[parameter],
            gate=parameter.startswith(layer.gate_names),
        )


@each_plain
def test_gradients_are_those_of_differences(name):
    layer = build(name).double()
    x = rows_of((5,))[0].double()[None].requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


# ---- packing and padding


@each_case
@pytest.mark.parametrize(("grad", "dtype"), [(True, torch.int32), (False, torch.int64)], ids=["training", "inference"])
def test_packed_is_separate(name, grad, dtype):
    x, cu_seqlens = pack(rows_of(), dtype)
    with torch.set_grad_enabled(grad):
        o = build(name)(x, cu_seqlens=cu_seqlens)[0]
    check_rows("packed", list(o[0].split(LENGTHS)), name)


@each_case
def test_empty_sequences_in_a_pack(name):
    rows = rows_of()
    x, _ = pack(rows)
    bounds = torch.tensor([0, 0, 70, 70, 103, 104, 113, 113])
    check_rows("packed with empty sequences", list(build(name)(x, cu_seqlens=bounds)[0][0].split(LENGTHS)), name)


@each_case
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@each_side
def test_padding_is_a_no_op(name, side, grad):
    x, mask = padded(rows_of(), side)
    with torch.set_grad_enabled(grad):
        o = build(name)(x, attention_mask=mask)[0]
    check_rows(f"padding {side}", unpadded(o, mask), name)


@each_plain
def test_a_row_of_padding_alone(name):
    x, mask = padded(rows_of((4, 0)), "right")
    o = build(name)(x, attention_mask=mask)[0]
    check_rows("beside an empty row", unpadded(o, mask)[:1], name, (4,))
    assert torch.equal(build(name)(x, attention_mask=mask * 0)[0], torch.zeros_like(x))


@each_case
def test_explicit_packing_wins_over_a_mask(name):
    x, cu_seqlens = pack(rows_of())
    o = build(name)(x, cu_seqlens=cu_seqlens, attention_mask=torch.zeros(1, x.shape[1]))[0]
    check_rows("packed, with a mask", list(o[0].split(LENGTHS)), name)


@each_plain
def test_the_other_name_of_cu_seqlens(name):
    x, cu_seqlens = pack(rows_of())
    o = build(name)(x, cu_seq_lens_q=cu_seqlens)[0]
    check_rows("cu_seq_lens_q", list(o[0].split(LENGTHS)), name)


@each_case
def test_a_row_alone_is_a_row_in_a_batch(name):
    layer, (row, other) = build(name), rows_of((40, 40))
    batch = layer(torch.stack([row, other, row]))[0]
    check_rows("in a batch", [batch[0], batch[1]], name, (40, 40))
    assert_within_budget("alone = in a batch", layer(row[None])[0][0], batch[2].double(), batch[0])


@each_plain
def test_masks_of_every_kind(name):
    layer, (x, mask) = build(name), padded(rows_of(), "left")
    expected = layer(x, attention_mask=mask)[0]
    for other in (mask.bool(), mask.float(), torch.cat([mask * 0, mask], 1)):
        assert torch.equal(layer(x, attention_mask=other)[0], expected)


# ---- caches

SPLITS = {"early": (1, 69), "chunks": (3, 64, 1, 2), "late": (69, 1), "halves": (35, 35)}


@each_case
@pytest.mark.parametrize("split", ["early", "chunks", *exhaustive("late", "halves")])
def test_pieces_are_the_whole(name, split):
    layer, cache, x = build(name, layer_idx=IDX).eval(), Cache(), rows_of((70, 70))
    pieces = torch.stack(x).split(SPLITS[split], 1)
    with torch.no_grad():
        o = torch.cat([layer(piece, past_key_values=cache, use_cache=True)[0] for piece in pieces], 1)
    assert cache.get_seq_length(IDX) == 70
    check_rows(f"split {SPLITS[split]}", list(o), name, (70, 70))


@each_case
def test_token_by_token(name):
    layer, cache, (row,) = build(name, layer_idx=IDX).eval(), Cache(), rows_of((20,))
    with torch.no_grad():
        o = [layer(token[None, None], past_key_values=cache, use_cache=True)[0][0] for token in row]
    check_rows("token by token", [torch.cat(o)], name, (20,))


@each_mode
@each_side
def test_padded_pieces_are_the_whole(name, mode, side):
    layer, cache = build(name, mode, layer_idx=IDX).eval(), Cache()
    x, mask = padded(rows_of(), side)
    stops = (5, 6, 40, 71, 72, 73)
    with torch.no_grad():
        o = [
            layer(x[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)[0]
            for start, stop in zip((0, *stops), stops, strict=False)
        ]
    check_rows(f"padded {side}, in pieces", unpadded(torch.cat(o, 1), mask), name)


@each_case
def test_gradients_through_a_cached_state(name):
    layer, (row,) = build(name, layer_idx=IDX), rows_of((12,))
    x = row[None].clone().requires_grad_()
    (whole,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    cache = Cache()
    o = torch.cat([layer(piece, past_key_values=cache)[0] for piece in x.split((5, 7), 1)], 1)
    (pieces,) = torch.autograd.grad(o.square().sum(), x)
    for label, gradient in (("whole", whole), ("pieces", pieces)):
        check_input_gradient(label, gradient[0], name, row)


def check_input_gradient(label, gradient, name, row):
    """The gradient of the squared output with respect to one row is the naive layer's."""

    def naive(dtype):
        x = row.to(dtype).clone().requires_grad_()
        naive_layer(build(name).to(dtype), x, name).square().sum().backward()
        return x.grad

    assert_within_budget(f"{name}: dx, {label}", gradient, naive(torch.float64), naive(torch.float32))


@each_plain
def test_packed_states_go_on_as_a_batch(name):
    """Linear mixers keep one state per packed sequence; layers with positions refuse to go on, and say so."""
    layer, cache, rows = build(name, layer_idx=IDX).eval(), Cache(), rows_of((10, 4, 7))
    x, cu_seqlens = pack([row[:-2] for row in rows])
    last = torch.stack([row[-2:] for row in rows])
    with torch.no_grad():
        first = layer(x, cu_seqlens=cu_seqlens, past_key_values=cache)[0][0].split((8, 2, 5))
        if layer.uses_positions:
            for keywords in ({}, {"cu_seqlens": torch.tensor([0, 2])}):
                with pytest.raises(ValueError, match="cu_seqlens must be None"):
                    layer(last[:1], past_key_values=cache, **keywords)
            return
        rest = layer(last, past_key_values=cache)[0]
    check_rows("packed, then a batch", [torch.cat(pair) for pair in zip(first, rest, strict=True)], name, (10, 4, 7))


@each_plain
def test_a_cache_needs_layer_idx(name):
    with pytest.raises(ValueError, match="layer_idx must be given"):
        build(name)(rows_of((3,))[0][None], past_key_values=Cache())


@each_plain
def test_without_a_cache_nothing_is_returned(name):
    o = build(name)(rows_of((3,))[0][None], use_cache=True)
    assert o[1:3] == (None, None)


# ---- forms


def with_form(form):
    return pytest.mark.parametrize("name", [name for name in PLAIN if form in CASES[name].cls.forms])


@with_form("fused_recurrent")
def test_the_recurrent_form_is_for_short_inference(name, monkeypatch):
    layer, used = build(name), []
    forms = {mode: lambda *a, m=mode, f=form, **k: used.append(m) or f(*a, **k) for mode, form in layer.forms.items()}
    monkeypatch.setattr(type(layer), "forms", forms)
    x = rows_of((SHORT + 1,))[0][None]
    layer(x[:, :5])
    with torch.no_grad():
        layer(x[:, :5])  # in training mode
    layer.eval()
    layer(x[:, :5])  # a gradient may be wanted
    with torch.no_grad():
        layer(x)
        layer(x[:, :SHORT])
    assert used == [*[layer.mode] * 4, "fused_recurrent"]


@with_form("parallel")
def test_parallel_with_a_state_takes_the_chunk_form(name):
    layer, cache, (row,) = build(name, "parallel", layer_idx=IDX), Cache(), rows_of((70,))
    o = torch.cat([layer(piece, past_key_values=cache)[0] for piece in row[None].split((66, 4), 1)], 1)
    check_rows("parallel, in pieces", [o[0]], name, (70,))


# ---- tensors


@each_case
def test_inputs_are_not_modified(name):
    layer, cache = build(name, layer_idx=IDX).eval(), Cache()
    x, mask = padded(rows_of(), "between")
    before, mask_before = x.clone(), mask.clone()
    with torch.no_grad():
        layer(x[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
        layer(x[:, 50:], attention_mask=mask, past_key_values=cache)
    assert torch.equal(x, before)
    assert torch.equal(mask, mask_before)


@each_plain
def test_strides(name):
    layer, rows = build(name), rows_of((30, 30))
    x = torch.stack(rows)
    strided = torch.empty(30, D, 2).permute(2, 0, 1).copy_(x)
    assert not strided.is_contiguous()
    check_rows("strided", list(layer(strided)[0]), name, (30, 30))
    repeated = layer(x[:1].expand(3, -1, -1))[0]
    check_rows("expanded", [repeated[2]], name, (30,))
    mask = torch.ones(30, 2, dtype=torch.int64).T
    check_rows("strided mask", list(layer(strided, attention_mask=mask)[0]), name, (30, 30))


@each_plain
def test_low_precision(name):
    """bfloat16 within its own budget; the state stays float32."""
    layer, cache, rows = build(name, layer_idx=IDX).bfloat16(), Cache(), rows_of((70,))
    wide = copy.deepcopy(layer)
    reference = naive_layer(wide.double(), rows[0].bfloat16().double(), name)
    naive = naive_layer(copy.deepcopy(layer), rows[0].bfloat16(), name)
    o = layer(rows[0].bfloat16()[None], past_key_values=cache)[0][0]
    assert_within_budget(f"{name}: bfloat16", o, reference, naive)
    state = cache[IDX].get("recurrent_state", ())
    assert all(x.dtype == torch.float32 for x in (state if isinstance(state, tuple) else (state,)))


@each_case
def test_autocast(name):
    """Mixed precision: float32 weights, bfloat16 arithmetic; forward and backward stay near the float32 result."""
    layer, (row,) = build(name), rows_of((30,))
    with torch.autocast("cpu", torch.bfloat16):
        o = layer(row[None])[0]
    o.float().square().sum().backward()
    reference = layer(row[None])[0]
    assert relative_rms(o, reference) < 2.0**-4  # some tens of roundings of 2^-8 each
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def compiled(layer):
    """The layer in one graph, with what its model hands to it."""
    torch.compiler.reset()  # each layer compiles the same forward: what others left would count as recompilations
    return torch.compile(lambda x, **keywords: layer(x, **keywords), fullgraph=True, backend="aot_eager", dynamic=False)


@each_plain
def test_compile_packed(name):
    rows = rows_of((12, 5))
    x, cu_seqlens = pack(rows)
    x.requires_grad_()
    o = compiled(build(name))(x, cu_seqlens=cu_seqlens)[0]
    check_rows("compiled, packed", list(o[0].split((12, 5))), name, (12, 5))
    o.square().sum().backward()
    check_input_gradient("compiled, packed", x.grad[0, :12], name, rows[0])


@pytest.mark.exhaustive  # the models compile such a call in their training step
@each_plain
def test_compile(name):
    rows = rows_of((12, 12))
    x = torch.stack(rows).requires_grad_()
    o = compiled(build(name))(x)[0]
    check_rows("compiled", list(o), name, (12, 12))
    o.square().sum().backward()
    check_input_gradient("compiled", x.grad[0], name, rows[0])


def test_layers_run_without_transformers_and_triton():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['triton'] = None\n"
        "import torch; from fla import layers\n"
        "for cls in map(vars(layers).get, sys.argv[1:]):\n"
        "    print(*cls(hidden_size=32, **cls.tiny)(torch.ones(1, 4, 32))[0].shape)"
    )
    classes = [CASES[name].cls.__name__ for name in PLAIN]
    done = subprocess.run([sys.executable, "-c", code, *classes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 4 32"] * len(classes)
