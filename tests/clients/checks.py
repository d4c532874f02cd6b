"""What must hold of a model of transformers whose mixers are ours, on any device."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from fla.models._generation import CACHE_NAME
from fla.testing import assert_within_budget
from tests.clients.providing import modeling, provided
from tests.clients.tiny import VOCABULARY, build, decorated, folder, implementation, own_path

GATES = ("A_log", "dt_bias", "in_proj_a", "in_proj_ba", "a_proj", "f_a_proj", "f_b_proj")
Results = dict[str, Tensor]


def assert_ours(module: Any, package: str = "fla") -> None:
    """Every function that the module has by the name of `package`'s is one of ours."""
    functions = decorated(module)
    own = ("causal_conv1d_fn", "causal_conv1d_update")
    ours = [x for name, x in functions.items() if (name in own) == (package == "causal_conv1d")]
    assert len(ours) == 2
    for function in ours:
        found, is_new = implementation(function)
        assert is_new and found.__module__.startswith("fla."), f"{function.__name__} is that of {found.__module__}"


def ids_of(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(3, VOCABULARY, shape, device=device)


def gradients(model: Any, loss: Tensor) -> Results:
    model.zero_grad()
    loss.backward()
    return {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def padded(model: Any, ids: Tensor, mask: Tensor) -> Results:
    """Loss, logits where tokens are (hidden states of a model without a head), and the gradient of every parameter."""
    labels = ids.masked_fill(mask == 0, -100)
    if not hasattr(model, "lm_head"):
        hidden = model(ids, attention_mask=mask, use_cache=False)[0]
        weight = torch.linspace(-1, 1, hidden.shape[-1], device=ids.device, dtype=hidden.dtype)
        loss = (hidden * weight * mask[..., None]).mean()
        return {"hidden": hidden[mask == 1].detach(), "loss": loss.detach(), **gradients(model, loss)}
    output = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    shown = {"logits": output.logits[mask == 1].detach(), "loss": output.loss.detach()}
    return shown | gradients(model, output.loss)


@torch.no_grad()
def continued(model: Any, ids: Tensor, cut: int) -> Results:
    """The rest of a row after a prefix whose states are in a cache."""
    first = model(ids[:, :cut], use_cache=True)
    second = model(ids[:, cut:], use_cache=True, **{CACHE_NAME: getattr(first, CACHE_NAME)})
    return {"continued": second[0]}


def compare(found: Results, exact: Results, plain: Results, dtype: torch.dtype) -> None:
    """`found` is as near to `exact`, transformers' recurrence in float64, as `plain`, its chunks, within the budget."""
    assert found.keys() == exact.keys() == plain.keys() and found
    found, exact, plain = (together(x) for x in (found, exact, plain))
    for name, value in found.items():
        gate = any(part in name.split(".") for part in GATES)
        assert exact[name].dtype == torch.float64
        assert_within_budget(name, value, exact[name], plain[name], dtype=dtype, backend="torch", gate=gate)


def together(results: Results) -> Results:
    """Results in which the gradients of small parameters are one tensor for all layers: the error of four numbers says
    little of what to expect of four others."""
    merged: dict[str, list[Tensor]] = {}
    for name, x in results.items():
        small = name.startswith("d ") and x.numel() < 64
        merged.setdefault(re.sub(r"\.\d+\.", ".*.", name) if small else name, []).append(x)
    return {name: parts[0] if len(parts) == 1 else torch.stack(parts) for name, parts in merged.items()}


def check_values(
    name: str,
    model: Any,
    run: Callable[[Any], Results],
    *,
    separate: Callable[[Any], Results] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """What `run` finds with ours is what `separate` (by default `run`) finds with transformers' own functions."""
    module, separate = modeling(folder(name)), separate or run
    assert_ours(module)
    found = run(model)
    with own_path(module):
        plain = separate(model)
    with own_path(module, exact=True):
        exact = separate(model.double())
    compare(found, exact, plain, dtype)


def check_padded(name: str, device: str = "cpu", tokens: int = 70, dtype: torch.dtype = torch.float32) -> None:
    """A batch with padding on the left, and rows that go on from a cache: values, loss and all gradients."""
    ids = ids_of(2, tokens, device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for run in (lambda model: padded(model, ids, mask), lambda model: continued(model, ids, tokens // 2)):
        check_values(name, build(name).to(device, dtype), run, dtype=dtype)


def check_generation(name: str, device: str = "cpu") -> None:
    """Greedy tokens after prompts of different lengths: a prefill in chunks, then steps from a state."""
    model, module, ids = build(name).to(device), modeling(folder(name)), ids_of(2, 9, device=device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert_ours(module)
    found = model.generate(ids, **greedy)
    with own_path(module):
        plain = model.generate(ids, **greedy)
    assert found.shape == (2, 15) and torch.equal(found, plain)


def packed(model: Any, rows: list[Tensor], given: tuple[str, ...]) -> Results:
    """Rows as transformers' collator packs them, or (nothing is given) each by itself."""
    device, weight = rows[0].device, torch.linspace(-1, 1, VOCABULARY, device=rows[0].device, dtype=model.dtype)
    if given:
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        batch = collator([{"input_ids": row.tolist()} for row in rows])
        common = ("input_ids", "position_ids", "cu_seq_lens_k", "max_length_q", "max_length_k")
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key in (*common, *given)
        }
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        logits = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    loss = (logits * weight).square().mean()
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients(model, loss)}


PACKINGS = {"cu_seq_lens_q": ("cu_seq_lens_q",), "with seq_idx": ("cu_seq_lens_q", "seq_idx")}


def check_packed(name: str, packing: str, device: str = "cpu") -> None:
    """Packed with our convolution: as transformers computes the rows one by one."""
    rows = [ids_of(length, device=device) for length in (30, 1, 40)]
    with provided("causal_conv1d"):
        assert_ours(modeling(folder(name)), "causal_conv1d")
        check_values(
            name,
            build(name).to(device),
            lambda model: packed(model, rows, PACKINGS[packing]),
            separate=lambda model: packed(model, rows, ()),
        )
