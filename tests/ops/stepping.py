"""What `inplace_final_state` and `state_indices` must do, for every suite; and recurrences held to float64 directly."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fla.backends.decay import Problem
from fla.ops._spec import REGISTRY, Variant
from fla.testing import Case, assert_within_budget, call_reference
from fla.testing.inputs import EXTREME_GATES, pack, state_names

V_FIRST = {"state_v_first": True}
WAYS = {
    "linear_attn": (
        Variant("default", {"normalize": False}, without=("z",)),
        Variant("normalized", {"normalize": True}),
    ),
    "retention": (Variant("default"), Variant("v_first", V_FIRST)),
    "simple_gla": (Variant("g", without=("g_gamma",)), Variant("g_and_g_gamma_v_first", V_FIRST)),
    "gla": (Variant("gk", without=("g", "gv")), Variant("gk_and_gv_v_first", V_FIRST, without=("g",))),
}
TOKENS = (1, 3, (2, 0, 1, 4))


def step_cases(suite, tokens=TOKENS, **changes: Any) -> list[Case]:
    """Every op and layout with every kind of `tokens`, dtypes and heads in turn."""
    found = []
    for op, variants in WAYS.items():
        for variant in variants:
            for T in tokens:
                i = len(found)
                turns = {"dtype": suite.dtypes[i % len(suite.dtypes)], "heads": suite.heads[i % len(suite.heads)]}
                fields = {**turns, "tokens": T, "batch": 4, "seed": i, **changes}
                case = Case(REGISTRY[op], "fused_recurrent", variant, **fields)
                found.append(replace(case, device=suite.device, backend=suite.backend))
    return found


@dataclass
class Served:
    """A case on a pool of seven slots; `indices` by default skips the second sequence, the others are out of order."""

    case: Case
    slots: int = 7
    indices: tuple[int, ...] | None = (5, -1, 0, 3)
    index_dtype: torch.dtype = torch.int32

    def __post_init__(self):
        case, inputs = self.case, self.case.inputs()
        names = state_names(case.spec, case.variant)
        self.tensors = {name: x for name, x in inputs.items() if name not in names}
        generator = torch.Generator(case.device).manual_seed(case.seed + 1)
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        P = len(inputs[names[0]]) if self.indices is None else self.slots
        self.pools = [
            torch.randn(P, *inputs[name].shape[1:], generator=generator, device=case.device, dtype=wide)
            for name in names
        ]
        if len(self.pools) > 1:
            self.pools[1] = self.pools[1].abs()  # a normaliser stays away from zero
        self.names = names

    @property
    def v_first(self) -> bool:
        return self.case.variant.settings.get("state_v_first", False)

    @property
    def state_indices(self) -> Tensor | None:
        if self.indices is None:
            return None
        return torch.tensor(self.indices, dtype=self.index_dtype, device=self.case.device)

    def owned(self) -> tuple[Tensor, ...]:
        """Fresh copies of the pools, in the layout of the call."""
        return tuple(
            (pool.mT if self.v_first and pool.dim() == 4 else pool).clone().contiguous() for pool in self.pools
        )

    def keywords(self, owned: tuple[Tensor, ...], in_place: bool) -> dict[str, Any]:
        case = self.case
        keywords = {**self.tensors, **case.variant.settings, "scale": case.scale, "backend": case.backend}
        if case.cu_seqlens is not None:
            keywords["cu_seqlens"] = case.cu_seqlens
        keywords["initial_state"] = owned if len(owned) > 1 else owned[0]
        return keywords | {
            "output_final_state": True,
            "inplace_final_state": in_place,
            "state_indices": self.state_indices,
        }

    def run(self, in_place: bool, function: Callable | None = None, owned: tuple[Tensor, ...] | None = None):
        """Output, final states as returned, and the pools afterwards, all in the layout of the call."""
        owned = self.owned() if owned is None else owned
        with torch.no_grad():
            o, final = (function or self.case.function)(**self.keywords(owned, in_place))
        return o, final if isinstance(final, tuple) else (final,), owned

    def turned(self, state: Tensor) -> Tensor:
        return state.mT if self.v_first and state.dim() == 4 else state

    def live(self) -> list[int]:
        """The sequences that are not skipped."""
        N = len(self.pools[0]) if self.indices is None else len(self.indices)
        return [n for n in range(N) if self.indices is None or self.indices[n] >= 0]

    def reference(self, dtype: torch.dtype | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and final states of all sequences by the naive recurrence (in `dtype` if given), 0 where skipped."""
        case = self.case
        rows = slice(None) if self.indices is None else [max(i, 0) for i in self.indices]
        inputs = self.tensors | {name: pool[rows] for name, pool in zip(self.names, self.pools, strict=True)}
        if dtype is not None:
            inputs = {name: x.to(dtype) for name, x in inputs.items()}
        o, states = call_reference(case.spec, inputs, case.variant, cu_seqlens=case.cu_seqlens, scale=case.scale)
        bounds = None if case.cu_seqlens is None else case.cu_seqlens.tolist()
        for n in set(range(len(states[0]))) - set(self.live()):
            if bounds is None:
                o[n] = 0
            else:
                o[:, bounds[n] : bounds[n + 1]] = 0
            for state in states:
                state[n] = 0
        return o, states


def check_served(served: Served, function: Callable | None = None) -> None:
    """Fresh and in place: results within the budget, the same bits, and nothing else written.

    Triton lays a V-first tile out as it is stored, so in place its sums over K run in another order and its products
    and sums are fused in other places: there both results only hold the budget.
    """
    o, states, pools = served.run(False, function)
    here, returned, written = served.run(True, function)
    hold(served, o, states)
    same_bits = not (served.v_first and served.case.backend == "triton")
    if same_bits:
        assert torch.equal(o, here)
    live = served.live()
    slots = live if served.indices is None else [served.indices[n] for n in live]
    there = []
    for i, (state, pool, before) in enumerate(zip(states, pools, served.owned(), strict=True)):
        assert torch.equal(pool, before), "a pool was written to without being asked for"
        assert returned[i] is written[i], "in place returns the tensor that it was given"
        there.append(state.index_copy(0, torch.tensor(live, dtype=torch.long, device=state.device), written[i][slots]))
        if same_bits:
            assert torch.equal(there[i], state)
        before[slots] = written[i][slots]
        assert torch.equal(written[i], before), "a slot was written to that no sequence has"
    hold(served, here, tuple(there))


def hold(served: Served, o: Tensor, states: tuple[Tensor, ...]) -> None:
    """Outputs and final states of all sequences to the budget."""
    case = served.case
    exact, exact_states = served.reference(torch.float64)
    naive, naive_states = served.reference(torch.float32 if case.dtype == torch.float64 else None)
    budget: dict[str, Any] = {"dtype": case.dtype, "backend": case.backend}
    assert_within_budget(f"{case}: o", o, exact, naive, **budget)
    for i, parts in enumerate(zip(states, exact_states, naive_states, strict=True)):
        assert_within_budget(f"{case}: state {i}", served.turned(parts[0]), *parts[1:], **budget)


def check_against_separate_calls(served: Served) -> None:
    """Every sequence alone, through the ordinary path from the state in its slot: within the same budget, and the same
    bits where a program computes one sequence in one way (Triton, one state, in one layout)."""
    assert served.indices is not None
    case, (o, states, _) = served.case, served.run(False)
    bounds = None if case.cu_seqlens is None else case.cu_seqlens.tolist()
    apart, finals = torch.zeros_like(o), tuple(torch.zeros_like(state) for state in states)
    for n in served.live():
        row, tokens = (n, slice(None)) if bounds is None else (0, slice(bounds[n], bounds[n + 1]))
        alone = replace(served, indices=None)
        alone.tensors = {name: x[row : row + 1, tokens] if x.dim() > 1 else x for name, x in served.tensors.items()}
        alone.case = replace(case, tokens=o[row, tokens].shape[0], batch=1)
        owned = tuple(pool[served.indices[n]][None].contiguous() for pool in served.owned())
        keywords = alone.keywords(owned, False)
        del keywords["inplace_final_state"], keywords["state_indices"]
        with torch.no_grad():
            apart[row : row + 1, tokens], final = case.function(**keywords)
        for part, found in zip(finals, final if isinstance(final, tuple) else (final,), strict=True):
            part[n : n + 1] = found
    hold(served, apart, finals)
    if case.backend == "triton" and not served.v_first and len(served.names) == 1:
        assert torch.equal(apart, o)
        assert all(torch.equal(*pair) for pair in zip(finals, states, strict=True))


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
