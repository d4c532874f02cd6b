"""Sequences that a model finds itself: in `position_ids` that start anew inside a row, and in `seq_idx`."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from fla.models._inputs import lay_out

from .tiny import REGISTRY, assert_same, build, every_case, every_type, exhaustive, tokens

Rows = list[list[int]]  # the lengths of the sequences of every row
LENGTHS: dict[str, Rows] = {
    "one_token_first": [[1, 4]],
    "row": [[3, 1, 70, 2]],
    "batch": [[5, 4], [9], [1, 8]],
}


def positions(rows: Rows) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def separate(model, ids: Tensor, rows: Rows) -> Tensor:
    """Logits `[tokens, vocab]` of every sequence by itself."""
    parts = [part for row, lengths in zip(ids, rows, strict=True) for part in row.split(lengths)]
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])


@every_case
@pytest.mark.parametrize("case", ["batch", *exhaustive("row", "one_token_first")])
def test_positions_that_start_anew_pack(model_type, overrides, case):
    """They pack under a mask of ones too, which says nothing of sequences."""
    model, rows = build(model_type, overrides), LENGTHS[case]
    ids = tokens(len(rows), sum(rows[0]))
    for mask in (None, torch.ones_like(ids)):
        inputs = {"position_ids": positions(rows), "attention_mask": mask, "use_cache": False}
        assert_same(case, model, lambda m, i=inputs: m(ids, **i).logits.flatten(0, 1), lambda m: separate(m, ids, rows))


@every_type
def test_the_first_sequence_may_be_one_token(model_type):
    model, ids = build(model_type), tokens(1, 5)
    packed = model(ids, cu_seqlens=torch.tensor([0, 1, 5]), use_cache=False).logits
    given = torch.tensor([[0, 0, 1, 2, 3]])
    for position_ids in (given, given[0], given + 2):  # transformers' collator can count from another number
        assert torch.equal(model(ids, position_ids=position_ids, use_cache=False).logits, packed)
    assert torch.equal(model(ids, seq_idx=torch.tensor([[0, 1, 1, 1, 1]]), use_cache=False).logits, packed)


@every_case
def test_packed_rows_with_padding(model_type, overrides):
    """The positions at padding do not matter. Hidden states come back in the rows of the input."""
    model, ids, mask = build(model_type, overrides), tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :2] = mask[0, 6] = mask[1, 9:] = 0
    position_ids = torch.tensor([[1, 1, 0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]])
    rows, real = [[4, 4], [9]], mask.bool()

    def padded(m):
        output = m(ids, attention_mask=mask, position_ids=position_ids, output_hidden_states=True, use_cache=False)
        assert {x.shape[:2] for x in output.hidden_states} == {ids.shape}
        return output.logits[real]

    def each(m):
        return torch.cat([separate(m, row[keep][None], [n]) for row, keep, n in zip(ids, real, rows, strict=True)])

    assert_same("padded", model, padded, each)


def by_flash_attention(position_ids: Tensor) -> list[int]:
    """The bounds that transformers' flash attention makes of `position_ids` `[B, T]`, rows one after the other."""
    rows, new = position_ids.shape
    if not _is_packed_sequence(position_ids, rows):
        return list(range(0, rows * new + 1, new))
    return prepare_fa_kwargs_from_position_ids(position_ids)[0][0].tolist()


def by_masks(position_ids: Tensor) -> list[int]:
    """The bounds that transformers' attention masks make of them."""
    rows, new = position_ids.shape
    found = find_packed_sequence_indices(position_ids)
    ids = torch.zeros_like(position_ids) if found is None else found
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids.diff(dim=-1) != 0
    return [*begins.flatten().nonzero().flatten().tolist(), rows * new]


def by_us(position_ids: Tensor) -> list[int]:
    rows, new = position_ids.shape
    layout = lay_out(torch.zeros(rows, new, 1), None, None, position_ids, None, 0)
    return list(range(0, rows * new + 1, new)) if layout.cu_seqlens is None else layout.cu_seqlens.tolist()


@pytest.mark.parametrize(
    ("position_ids", "bounds", "flash", "masks"),
    [
        ([[0, 1, 2, 3]], [0, 4], True, True),
        ([[7, 8, 9]], [0, 3], True, True),  # a piece of a text that goes on from a cache
        ([[0, 1, 0, 1, 2]], [0, 2, 5], True, True),
        ([[2, 3, 2, 2, 3]], [0, 2, 3, 5], True, True),  # the collator may count from another number
        ([[0, 0, 0]], [0, 1, 2, 3], True, True),
        ([[0]], [0, 1], True, True),
        ([[0, 1, 2], [0, 1, 2]], [0, 3, 6], True, True),
        ([[0, 1, 5, 6]], [0, 4], True, False),
        ([[0, 1, 2, 1, 2]], [0, 3, 5], False, True),
        ([[0, 0, 1], [0, 1, 2]], [0, 1, 3, 6], False, True),
    ],
    ids=str,
)
def test_packing_is_found_where_transformers_finds_it(position_ids, bounds, flash, masks):
    given = torch.tensor(position_ids)
    assert by_us(given) == bounds
    assert (by_flash_attention(given) == bounds, by_masks(given) == bounds) == (flash, masks)


@every_type
def test_positions_of_one_sequence_change_nothing(model_type):
    model, ids = build(model_type), tokens(2, 6)
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for mask, given in (
        (None, torch.arange(6)),
        (None, torch.arange(6)[None] + 7),
        (left, (left.cumsum(-1) - 1).masked_fill(left == 0, 1)),
        (left, torch.arange(6).expand(2, 6)),
    ):
        plain = model(ids, attention_mask=mask)
        positioned = model(ids, attention_mask=mask, position_ids=given)
        assert torch.equal(positioned.logits, plain.logits)
        assert positioned.past_key_values.get_seq_length() == 6
        for new in (1, 2):  # and what continues from a cache is no packing
            steps = []
            for position_ids in (None, given[..., 6 - new :]):
                before = None if mask is None else mask[:, :-new]
                cache = model(ids[:, :-new], attention_mask=before).past_key_values
                step = {"attention_mask": mask, "past_key_values": cache, "position_ids": position_ids}
                steps.append(model(ids[:, -new:], **step).logits)
            assert torch.equal(*steps)


@every_type
def test_no_new_sequence_inside_a_continuation(model_type):
    model, ids = build(model_type), tokens(1, 8)
    for inputs in ({"position_ids": torch.tensor([[4, 5, 0, 1]])}, {"seq_idx": torch.tensor([[0, 0, 1, 1]])}):
        with pytest.raises(ValueError, match="must not start anew inside a row of a call that continues"):
            model(ids[:, 4:], past_key_values=model(ids[:, :4]).past_key_values, **inputs)
        with pytest.raises(ValueError, match=f"{next(iter(inputs))} must"):
            model.generate(ids[:, 4:], max_new_tokens=1, **inputs)


@pytest.mark.parametrize("flash", [True, False])
def test_the_flattening_collator(flash):
    """Each of the ways in which transformers' collator can tell of sequences gives the losses of separate rows."""
    model, rows = build("gla"), [tokens(1, n, seed=n)[0] for n in (5, 1, 9)]
    features = [{"input_ids": row.tolist()} for row in rows]
    counted = [(len(row) - 1, row[None]) for row in rows if len(row) > 1]
    expected = sum(n * model(row, labels=row).loss for n, row in counted) / sum(n for n, _ in counted)
    for kwargs in ({"return_seq_idx": True}, {"return_seq_idx": True, "return_position_ids": False}, {}):
        if flash:
            kwargs["return_flash_attn_kwargs"] = True
        batch = DataCollatorWithFlattening(**kwargs)(features)
        torch.testing.assert_close(model(**batch, use_cache=False).loss, expected)


class Waits(TorchDispatchMode):
    """Counts the operators whose result's size, or Python value, is read from a tensor's values."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in ("nonzero", "item", "_local_scalar_dense", "equal", "is_nonzero"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_looking_at_positions_waits_once():
    model, cu = build("gla"), torch.tensor([0, 2, 6])
    counts = []
    with torch.no_grad():
        for inputs in ({}, {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])}):
            for packing in ({"cu_seq_lens_q": cu}, {}):
                with Waits() as waits:
                    model.base_model(inputs_embeds=torch.zeros(1, 6, 32), use_cache=False, **inputs, **packing)
                counts.append(len(waits.names))
    packed, plain, packed_with_positions, positions_alone = counts
    assert packed_with_positions == packed
    assert positions_alone == packed + 1 and plain <= packed


def test_positions_are_columns_that_the_trainer_keeps():
    for causal_lm in REGISTRY.values():
        names = inspect.signature(causal_lm.forward).parameters
        assert {"labels", "position_ids", "seq_idx", "cu_seqlens", "logits_to_keep", "cache"} <= set(names)
