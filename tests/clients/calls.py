"""Calls as trainers and remote code write them, each beside what it stands for. For any device."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fla.ops.utils.index import prepare_chunk_indices
from torch import Tensor

from fla.layers.utils import get_unpad_data, index_first_axis, pad_input
from fla.modules import FusedRMSNormGated, ShortConvolution
from fla.modules.convolution import causal_conv1d
from fla.modules.l2norm import l2norm
from fla.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
)
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.gate import fused_kda_gate
from fla.testing import assert_within_budget

H, HV, K, V = 2, 4, 16, 24
BOUNDS = (0, 30, 31, 31, 70)  # one of the sequences is empty


def tensors(device: str, rows: int = 1, tokens: int = 70, **changes: Any) -> dict[str, Tensor]:
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV,), "beta": (HV,)} | changes
    made = {name: torch.randn(rows, tokens, *shape, device=device) for name, shape in shapes.items()}
    return made | {"g": F.logsigmoid(made["g"]), "beta": made["beta"].sigmoid()}


def bounds(device: str) -> Tensor:
    return torch.tensor(BOUNDS, dtype=torch.int32, device=device)


def same(found: Any, expected: Any) -> None:
    """The same computation under another name: bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        return
    assert (found is None) == (expected is None)
    for one, other in zip(found or (), expected or (), strict=True):
        same(one, other)


def gradients(results: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    results = [x for x in results if x is not None]
    torch.manual_seed(1)
    return torch.autograd.grad(results, leaves, [torch.randn_like(x) for x in results])


def leaves_of(given: dict[str, Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in given.values()]


def megatron(device: str) -> None:
    """All by keyword, the raw gate and the raw beta computed in the op."""
    x = tensors(device, rows=2)
    raw, strength = torch.randn(2, 2, 70, HV, device=device)
    A_log, dt_bias = torch.randn(2, HV, device=device)
    o, state = chunk_gated_delta_rule(
        q=x["q"],
        k=x["k"],
        v=x["v"],
        g=raw,
        beta=strength,
        initial_state=None,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=None,
    )
    q, k, g = l2norm(x["q"].double()), l2norm(x["k"].double()), -A_log.exp() * F.softplus(raw + dt_bias)
    narrow = naive_recurrent_gated_delta_rule(
        l2norm(x["q"]), l2norm(x["k"]), x["v"], strength.sigmoid(), g, None, None, True
    )
    wide = naive_recurrent_gated_delta_rule(
        q, k, x["v"].double(), strength.double().sigmoid(), g.double(), None, None, True
    )
    for name, found, exact, naive in zip(("o", "state"), (o, state), wide, narrow, strict=True):
        assert_within_budget(name, found, exact, naive, backend="torch")


def torchtitan(device: str) -> None:
    """By position but beta and what follows; documents by bounds here and on the host; key heads repeated before."""
    x, cu_seqlens = tensors(device), bounds(device)
    q, k = (x[name].repeat_interleave(HV // H, dim=2) for name in ("q", "k"))
    packing = {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens.cpu()}
    flags = {"use_qk_l2norm_in_kernel": True}
    chunked = chunk_gated_delta_rule(q, k, x["v"], x["g"], x["beta"], **flags, **packing)[0]
    steps = fused_recurrent_gated_delta_rule(q, k, x["v"], x["g"], beta=x["beta"], **flags, cu_seqlens=cu_seqlens)[0]
    shared = chunk_gated_delta_rule(**x, **flags, **packing)[0]
    torch.testing.assert_close(chunked, steps)
    torch.testing.assert_close(chunked, shared)
    rows, weight = torch.randn(1, 70, 6, device=device), torch.randn(6, 1, 4, device=device)
    y, state = causal_conv1d(x=rows, weight=weight.squeeze(1), bias=None, activation="silu", **packing)
    assert state is None
    for begin, end in itertools.pairwise(BOUNDS):
        alone = causal_conv1d(x=rows[:, begin:end], weight=weight.squeeze(1), bias=None, activation="silu")[0]
        torch.testing.assert_close(y[:, begin:end], alone)


def kimi_remote_code(device: str) -> None:
    """Padding taken out, the convolution with a cache, the former gate, both forms of KDA, the gated norm, padding."""
    mask = torch.ones(2, 40, dtype=torch.long, device=device)
    mask[0, :7] = 0
    hidden = torch.randn(2, 40, HV * K, device=device)
    indices, cu_seqlens, _ = get_unpad_data(mask[:, -40:])
    row = index_first_axis(hidden.flatten(0, 1), indices).unsqueeze(0)
    conv = ShortConvolution(hidden_size=HV * K, kernel_size=4, activation="silu", device=device)
    norm = FusedRMSNormGated(K, eps=1e-5, activation="sigmoid", device=device, dtype=torch.float32)
    A_log, dt_bias = torch.randn(1, 1, HV, 1, device=device), torch.randn(HV * K, device=device)
    with torch.no_grad():
        q, state = conv(x=row, cache=None, output_final_state=True, cu_seqlens=cu_seqlens)
        assert state.shape == (2, HV * K, 4)
        g = former_gate(row, A_log, K, g_bias=dt_bias)
        q, beta = q.unflatten(-1, (HV, K)), torch.rand(1, q.shape[1], HV, device=device)
        flags = {"initial_state": None, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        found = [
            op(q=q, k=q, v=q, g=g, beta=beta, **flags, cu_seqlens=cu_seqlens) for op in (chunk_kda, fused_recurrent_kda)
        ]
        o = norm(found[0][0], q)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    padded = pad_input(o.flatten(2).squeeze(0), indices, 2, 40)
    assert not padded[0, :7].any() and torch.equal(padded[1], o[0, 33:].flatten(1))


def former_gate(g: Tensor, *args: Any, **keywords: Any) -> Tensor:
    import pytest

    with pytest.warns(DeprecationWarning, match="former signature"):
        found = fused_kda_gate(g, *args, **keywords)
    A_log, K = args[0], args[1]
    same(found, fused_kda_gate(g.unflatten(-1, (-1, K)), A_log, dt_bias=keywords["g_bias"]))
    return found


def unsloth(device: str, packed: bool = False) -> None:
    """The two passes and those of the norm, put together as an operator of the trainer's own."""
    from fla.ops.gated_delta_rule import chunk as C

    x = tensors(device, rows=1 if packed else 2, v=(H, V), g=(H,), beta=(H,))
    packing = {"cu_seqlens": bounds(device)} if packed else {}
    named = inspect.signature(C.chunk_gated_delta_rule_fwd).parameters.keys()
    assert {"cu_seqlens", "chunk_indices"} <= named
    if packed:
        packing["chunk_indices"] = prepare_chunk_indices(packing["cu_seqlens"], 64)
    scale = K**-0.5
    (qn, q_rstd), (kn, k_rstd) = C.l2norm_fwd(x["q"]), C.l2norm_fwd(x["k"])
    others = {name: x[name] for name in ("v", "g", "beta")}
    g, o, A, *rest = C.chunk_gated_delta_rule_fwd(
        q=qn, k=kn, **others, scale=scale, initial_state=None, output_final_state=False, **packing
    )
    assert rest == [None, None, None] and not o.requires_grad
    kept = [(z.shape, z.dtype) for z in (qn, q_rstd, kn, k_rstd, g, A)]
    of_q, of_g, of_A = (x["q"].shape, torch.float32), (x["g"].shape, torch.float32), (*x["k"].shape[:-1], 64)
    row = (x["q"].shape[:-1], torch.float32)
    assert kept == [of_q, row, of_q, row, of_g, (of_A, torch.float32)]
    do = torch.randn_like(o)
    dq, dk, dv, dbeta, dg, *rest = C.chunk_gated_delta_rule_bwd(
        q=qn,
        k=kn,
        v=x["v"],
        g=g,
        beta=x["beta"],
        A=A,
        scale=scale,
        initial_state=None,
        do=do,
        dht=None,
        **packing,
    )
    assert rest == [None, None, None]
    found = (C.l2norm_bwd(qn, q_rstd, dq), C.l2norm_bwd(kn, k_rstd, dk), dv, dg, dbeta)
    leaves = leaves_of(x)
    expected = chunk_gated_delta_rule(*leaves, use_qk_l2norm_in_kernel=True, **packing)[0]
    torch.testing.assert_close(o, expected)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(one, other)


def stages_in_full(device: str) -> None:
    """States in and out, value heads that share keys, the gate in the op, a pack: every result of both passes."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    x = tensors(device)
    x |= {"g": torch.randn(1, 70, HV, device=device), "k": F.normalize(x["k"], dim=-1)}
    h0, packing = torch.randn(4, HV, V, K, device=device), {"cu_seqlens": bounds(device), "state_v_first": True}
    A_log, dt_bias = torch.randn(2, HV, device=device)
    raw = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    g, o, A, state, before, g_input = chunk_gated_delta_rule_fwd(*x.values(), 0.3, h0, True, **packing, **raw)
    assert before is h0 and g_input is x["g"] and A.shape == (1, 70, HV, 64)
    torch.testing.assert_close(g, -A_log.exp() * F.softplus(x["g"] + dt_bias))
    check_inverse(A[0, 31:], x["k"][0, 31:], g[0, 31:], x["beta"][0, 31:])
    leaves = leaves_of(x | {"h0": h0, "A_log": A_log, "dt_bias": dt_bias})
    expected = chunk_gated_delta_rule(
        *leaves[:5],
        scale=0.3,
        initial_state=leaves[5],
        output_final_state=True,
        use_gate_in_kernel=True,
        A_log=leaves[6],
        dt_bias=leaves[7],
        **packing,
    )
    same((o, state), expected)
    do, dht = torch.randn_like(o), torch.randn_like(state)
    dq, dk, dv, dbeta, dg, dh0, *of_gate = chunk_gated_delta_rule_bwd(
        *(x[name] for name in "qkv"), g, x["beta"], A, 0.3, h0, do, dht, **packing, **raw, g_input=g_input
    )
    exact = torch.autograd.grad(expected, leaves, (do, dht))
    for one, other in zip((dq, dk, dv, dg, dbeta, dh0, *of_gate), exact, strict=True):
        torch.testing.assert_close(one, other)


def check_inverse(A: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> None:
    """The inverse of one chunk, by its definition."""
    C = len(k)
    for head in range(HV):
        keys, total = k[:, head // (HV // H)].double(), g[:, head].double().cumsum(0)
        L = (beta[:, head, None] * (keys @ keys.T) * (total[:, None] - total).tril().exp()).tril(-1)
        unit = torch.eye(C, dtype=L.dtype, device=L.device)
        torch.testing.assert_close(A[:, head, :C].double() @ (unit + L), unit, rtol=0, atol=1e-5)
        assert not A[:, head, C:].any()


CALLS: dict[str, Callable[[str], None]] = {
    "megatron": megatron,
    "torchtitan": torchtitan,
    "kimi's remote code": kimi_remote_code,
    "unsloth": unsloth,
    "unsloth, packed": lambda device: unsloth(device, packed=True),
    "both passes": stages_in_full,
}
