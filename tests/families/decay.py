"""The family `decay` in tests: its chunk forms, and problems given to its recurrent kernels themselves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fla.backends.decay import Problem
from fla.ops._spec import REGISTRY, OpSpec
from fla.testing import assert_within_budget
from fla.testing.cases import Suite, plain_cases
from fla.testing.contract import Case, check_prefix, check_values
from fla.testing.inputs import EXTREME_GATES, pack


def chunk_cases(suite: Suite, **changes: Any) -> list[Case]:
    """The chunk form of every op with each kind of decay: none, constant, per token and head, per channel.

    `changes` as in `plain_cases`; sizes stay as given (`check_chunks` wants no gradient that needs many heads).
    """

    def of(spec: OpSpec) -> list[Case]:
        gates = changes.get("gates", "ordinary") if spec.gates else "ordinary"
        return plain_cases(spec, suite, **changes | {"gates": gates})

    cases = [case for spec in REGISTRY.values() if spec.family == "decay" for case in of(spec)]
    cases = [case for case in cases if case.form == "chunk" and case.variant.name not in ("g and g_gamma", "resumed")]
    return [replace(case, sizes=changes.get("sizes", case.sizes)) for case in cases]


def check_chunks(case: Case) -> None:
    """Values and gradients, but not that of a constant decay: one that needs its gradient is computed per token."""
    check_values(case, needs=tuple(name for name in case.inputs() if name != "g_gamma"))


def check_one_prefix(case: Case, count: int, gate: float | None) -> None:
    """`check_prefix`: bits, but within a rounding where later tokens make a head with a decay per channel far.

    That head is then computed in shorter chunks, all of it (`docs/index.md`). 80 nats in 64 tokens make it far.
    """
    gates = [case.spec.shapes[name].split() for name in case.spec.gates if name not in case.variant.without]
    in_chunks = case.backend == "triton" and case.dtype != torch.float32 and any("K" in shape for shape in gates)
    assert isinstance(case.tokens, int)
    decay = min(case.tokens - count, 64) * min(-(gate or 0.0), 20.0)  # of a chunk
    check_prefix(case, count, gate, rounded=in_chunks and decay > 80.0)


DECAYS = ((), ("g",), ("gk",), ("gv",), ("g_gamma",), ("g", "gk", "gv"), ("g_gamma", "gk"), ("gk", "gv"))


@dataclass(frozen=True)
class Direct:
    """A problem given to the recurrent kernels themselves: head sizes and decays that no op combines."""

    K: int
    V: int
    decays: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    tokens: int | tuple[int, ...] = 5
    heads: int = 1
    device: str = "cpu"
    gates: str = "ordinary"
    scale: float = 0.3
    states: bool = True
    index_dtype: torch.dtype = torch.int32
    family: str = "decay"

    def __str__(self) -> str:
        decays = "+".join(self.decays) or "none"
        return f"K{self.K}V{self.V}-{decays}-{str(self.dtype)[6:]}-{self.tokens}-{self.gates}-{self.states}"

    def inputs(self) -> dict[str, Tensor]:
        packed = isinstance(self.tokens, tuple)
        B, T = (1, sum(self.tokens)) if isinstance(self.tokens, tuple) else (2, self.tokens)
        N, H, K, V = len(self.tokens) if packed else B, self.heads, self.K, self.V
        generator = torch.Generator(self.device).manual_seed(K + 7 * V)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        made = {"q": noise(B, T, H, K), "k": noise(B, T, H, K), "v": noise(B, T, H, V)}
        shapes = {"g": (B, T, H), "gk": (B, T, H, K), "gv": (B, T, H, V), "g_gamma": (H,)}
        for name in self.decays:
            gate = torch.nn.functional.logsigmoid(noise(*shapes[name])) / 4
            if self.gates == "extreme" and name != "g_gamma":
                extreme = torch.tensor(EXTREME_GATES, device=self.device)
                pick = torch.randint(len(extreme), gate.shape, generator=generator, device=self.device)
                taken = torch.rand(gate.shape, generator=generator, device=self.device) < 0.3
                gate = torch.where(taken, extreme[pick], gate)
            made[name] = gate
        made = {name: x if name == "g_gamma" else x.to(self.dtype) for name, x in made.items()}
        made |= {"do": noise(B, T, H, V).to(self.dtype)}
        if self.states:
            made |= {"initial_state": noise(N, H, K, V), "dht": noise(N, H, K, V)}
        return made

    def problem(self, x: dict[str, Tensor]) -> Problem:
        names = ("q", "k", "v", "g", "gk", "gv", "initial_state", "g_gamma")
        bounds = pack(self.tokens, self.index_dtype, self.device) if isinstance(self.tokens, tuple) else None
        return Problem(*(x.get(name) for name in names), bounds, self.scale, "recurrent")


def naive(case: Direct, x: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`o` and the final states, all decays at once, token by token in `dtype`."""
    lengths = case.tokens if isinstance(case.tokens, tuple) else (case.tokens,) * 2
    y = {name: value.to(dtype) for name, value in x.items()}
    packed, outputs, finals, at = isinstance(case.tokens, tuple), [], [], 0
    for n, length in enumerate(lengths):
        b, start = (0, at) if packed else (n, 0)
        at += length
        zero = y["q"].new_zeros(case.heads, case.K, case.V)
        state, rows = y["initial_state"][n] if case.states else zero, []
        for t in range(start, start + length):
            if "g" in y:
                state = state * y["g"][b, t, :, None, None].exp()
            if "g_gamma" in y:
                state = state * y["g_gamma"][:, None, None].exp()
            if "gk" in y:
                state = state * y["gk"][b, t, :, :, None].exp()
            if "gv" in y:
                state = state * y["gv"][b, t, :, None, :].exp()
            state = state + y["k"][b, t, :, :, None] * y["v"][b, t, :, None, :]
            rows.append(torch.einsum("hk,hkv->hv", y["q"][b, t] * case.scale, state))
        outputs.append(torch.stack(rows) if rows else zero[None, :, 0, :][:0])
        finals.append(state)
    o = torch.cat(outputs)[None] if packed else torch.stack(outputs)
    return o, torch.stack(finals)


def check_direct(case: Direct, forward: Callable, backward: Callable) -> None:
    """Outputs, states and all gradients of the backend's own functions within the budget."""
    x = case.inputs()
    names = [name for name in x if name not in ("do", "dht", "g_gamma")]

    def solve(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: value.to(dtype).requires_grad_(name in names) for name, value in x.items()}
        o, final = naive(case, leaves, dtype)
        results, incoming = [o], [x["do"].to(dtype)]
        if case.states:
            results, incoming = [o, final], [*incoming, x["dht"].to(dtype)]
        found = torch.autograd.grad(results, [leaves[name] for name in names], incoming)
        return {"o": o.detach(), "ht": final.detach()} | {f"d{name}": d for name, d in zip(names, found, strict=True)}

    exact, rounded = solve(torch.float64), solve(torch.float32)
    problem = case.problem(x)
    o, ht = forward(problem, True)
    gradients = backward(problem, x["do"], x.get("dht"), any(name in x for name in ("g", "gk", "gv")))
    actual = {"o": o, "ht": ht} | {f"d{name}": gradients[name] for name in names}
    for name, got in actual.items():
        source = x.get(name[1:], x["v"]) if name.startswith("d") else x["v"]
        wide = torch.float32 if name in ("ht", "dinitial_state") else source.dtype
        expected, close, gate = exact[name], rounded[name].to(wide), name in ("dg", "dgk", "dgv")
        if gate:
            dead = source < -16.0
            assert not got[dead].any(), f"{case}: {name} must be 0 below -16"
            expected, close = expected.masked_fill(dead, 0.0), close.masked_fill(dead, 0.0)
        assert_within_budget(
            f"{case}: {name}", got.to(wide), expected, close, dtype=case.dtype, backend="triton", gate=gate
        )
