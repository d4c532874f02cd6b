"""The kernels of the family `decay` that are compiled without a GPU.

A backward launch holds three roles, and most launches two kinds of decay, of which a program runs one: each is compiled
alone, so that the budget holds per program. Where two programs of a launch are to fit on a multiprocessor, it is
compiled whole too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fla.backends.decay import Problem
from fla.backends.triton import decay
from fla.backends.triton.decay import chunk_backward, recurrent_forward
from fla.backends.triton.decay._decay import FAR_UNIT, JOINED
from tests.compile_check import recording
from tests.compile_check.recording import DTYPES, Kernels, descriptors, record

KINDS = ("none", "constant", "scalar", "vector", "short", "far-constant", "far-scalar")
ROLES = {"dq": chunk_backward.DQ.value, "dk": chunk_backward.DK.value, "dv": chunk_backward.DV.value}
NO_DOTS = (
    "begins",
    "running_sums",
    "centre",
    "scalar_gate_gradient",
    "sum_slices",
    "recurrent_forward",
    "recurrent_backward",
    "gate",
)
HEADS = ((64, 64), (100, 36), (128, 128), (256, 256))
ODD = (100, 36)
COMMON = (128, 128)  # the head size that is compiled in more ways
WIDE = (256, 256)
# how a problem is posed -> tokens and heads
ALL = "all"  # packed, with states, every gradient, and so many segments that they fill a GPU
FEW = "few"  # the same with so few programs that the launcher asks for more stages
PLAIN = "plain"  # gate gradients of all that, and heads that fill a GPU
LONG = "long"  # segments without packing
TOGETHER = "joined"  # a pack of short sequences without states, in segments
SIZES = {ALL: (65536, 4), FEW: (1024, 1), PLAIN: (256, 256), LONG: (65536, 4), TOGETHER: (65536, 4)}


@dataclass(frozen=True)
class Variant(recording.Variant):
    """`posed`: ALL, FEW, PLAIN, LONG or TOGETHER."""

    heads: tuple[int, int]
    posed: str
    family: str = "decay"

    def __str__(self) -> str:
        return "-".join(word for word in (self.base, *self._words(), "{}x{}".format(*self.heads)) if word)

    @property
    def role(self) -> str | None:
        """What of a backward launch it computes."""
        roles = self.constants.get("ROLES")
        if roles is None:
            return None
        return "whole" if self.is_whole else next(name for name, role in ROLES.items() if roles & role)

    def _words(self) -> Iterator[str]:
        given = self.constants
        yield self.kind or ""
        yield self.role or ""
        if given.get("REVERSE"):
            yield "reverse"
        if self.base == "gate":
            yield "scalar" if given["SCALAR"] else "value" if given["COLUMN"] else "key"
        if self.base == "recurrent_forward" and given["FLAGS"]:
            yield "pool_v_first" if given["FLAGS"] & recurrent_forward.V_FIRST else "pool"
        yield "" if self.posed == ALL else self.posed

    @property
    def kind(self) -> str | None:
        number = self.constants.get("KINDS", self.constants.get("KIND"))
        if number is None:
            return None
        number %= JOINED
        near, far = KINDS[number % FAR_UNIT], KINDS[number // FAR_UNIT]
        return f"{near}-or-{far}" if self.is_pair else near if number < FAR_UNIT else f"only-{near}"

    @property
    def is_pair(self) -> bool:
        """A launch of two kinds."""
        kinds = self.constants.get("KINDS", 0) % JOINED
        return kinds // FAR_UNIT not in (0, kinds % FAR_UNIT)

    @property
    def is_launched(self) -> bool:
        """As it is, not a part of a launch."""
        return self.constants.get("KINDS", 0) % JOINED >= FAR_UNIT or self.kind == "none"

    @property
    def is_matrix(self) -> bool:
        return self.base not in NO_DOTS

    @property
    def is_whole(self) -> bool:
        """A backward launch of all roles."""
        return "ROLES" in self.constants and all(self.constants["ROLES"] & role for role in ROLES.values())

    @property
    def is_wide(self) -> bool:
        """A backward launch of one role for wide heads."""
        return bool(self.constants.get("ROLES", 0) & chunk_backward.WIDE_SLICES.value)

    @property
    def operands(self) -> str:
        """Type of what dots read, or of what else the kernel is about."""
        return next(self.types[name] for name in ("qn", "x", "q", "parts", "g", "begins") if name in self.types)

    @property
    def uses_wgmma(self) -> bool:
        """Of chunks of 16 tokens only those into a state have them."""
        return self.is_matrix and not (self.kind == "short" and self.base == "finish_vector")

    @property
    def programs(self) -> int:
        return (3 if self.is_whole else 1) * (2 if self.is_pair else 1)

    @property
    def fits_twice(self) -> bool:
        """Whether two programs are to fit on a multiprocessor."""
        forward = self.base == "chunk_forward" and self.heads in (COMMON, WIDE)
        backward = self.is_wide or (self.is_whole and self.heads == COMMON)
        return (forward or backward) and self.is_launched and self.posed != FEW

    @property
    def traits(self) -> set[Any]:
        """Kernel with kind, with role, with the width of its heads, with how its problem is posed, with its dtype."""
        kind = "two" if self.is_pair else self.kind and self.kind.removeprefix("only-")
        width = {COMMON: "common", ODD: "odd"}.get(self.heads, "wide" if max(self.heads) >= 256 else "any")
        return {(self.base, part) for part in (kind, self.role, width, self.posed, self.operands)}


def problem(dtype: torch.dtype, K: int, V: int, posed: str, form: str, decays: tuple[str, ...]) -> Problem:
    T, H = SIZES[posed]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, v = empty(1, T, H, K), empty(1, T, H, V)
    gates = {"g": empty(1, T, H), "gk": q, "gv": v, "g_gamma": empty(H, dtype=torch.float64)}
    *given, g_gamma = (gates[name] if name in decays else None for name in gates)
    state = bounds = None
    if posed in (ALL, FEW, TOGETHER):
        bounds = empty(1001 if posed == TOGETHER else 2, dtype=torch.int32)
    if posed not in (PLAIN, TOGETHER):
        state = empty(1, H, K, V, dtype=torch.float32)
    return Problem(q, q, v, *given, state, g_gamma, bounds, 0.5, form)


def launched(dtype: str, K: int, V: int, posed: str = ALL) -> Iterator[Variant]:
    """What forward and backward of every decay launch, in both forms, and a decoding step on a pool."""

    def train(x: Problem) -> None:
        needs = [name for name in ("q", "k", "v", "g", "gk", "gv") if getattr(x, name) is not None]
        has_states = x.initial_state is not None
        decay.forward(x, has_states, False)
        decay.backward(x, (), x.v, torch.empty(x.state_shape, device="meta") if has_states else None, needs)

    for decays in ((), ("g_gamma",), ("g",), ("gk",)) if dtype != "fp32" else ():
        made = problem(DTYPES[dtype], K, V, posed, "chunk", decays)
        yield from described(record(lambda x=made: train(x)), K, V, posed)
    if posed in (PLAIN, LONG, TOGETHER):
        return
    made = problem(DTYPES[dtype], K, V, posed, "recurrent", ("g", "gk", "gv", "g_gamma"))
    yield from described(record(lambda: train(made)), K, V, posed)
    slots = torch.empty(1, dtype=torch.int32, device="meta")
    for v_first in (False, True):
        yield from described(record(lambda turn=v_first: decay.step(made, slots, True, True, turn)), K, V, posed)


def described(seen: list, K: int, V: int, posed: str) -> Iterator[Variant]:
    for kernel, types, constants, settings in seen:
        whole = Variant(kernel, types, constants, settings["num_warps"], settings["num_stages"], (K, V), posed)
        kinds, joined = constants.get("KINDS", 0) % JOINED, constants.get("KINDS", 0) // JOINED * JOINED
        for kind in (kinds % FAR_UNIT, kinds // FAR_UNIT) if whole.is_pair else ():
            yield from by_roles(replace(whole, constants=constants | {"KINDS": kind + joined}))
        if not whole.is_pair:
            yield from by_roles(whole)
        if (whole.is_pair or "ROLES" in constants) and ((K, V) == COMMON or posed == PLAIN):
            yield whole


def by_roles(variant: Variant) -> Iterator[Variant]:
    constants = variant.constants
    if "ROLES" not in constants:
        yield variant
        return
    others = constants["ROLES"] & ~chunk_backward.ALL_ROLES
    for role in ROLES.values():
        if constants["ROLES"] & role:
            yield replace(variant, constants=constants | {"ROLES": role | others})


def variants(dtype: str, heads: tuple[tuple[int, int], ...] = HEADS, tiled: bool = True) -> dict[str, Variant]:
    """Every kernel once by name: with all options, and at 128x128 and 256x256 in the other ways that forwards and whole
    backwards are launched. `tiled`: where there are tensor descriptors (Hopper)."""
    with descriptors(tiled):
        return _variants(dtype, heads)


def on_hopper(dtype: str) -> dict[str, recording.Variant]:
    """float32 has the recurrent kernels only, whose slices differ in the largest heads too."""
    return dict(variants(dtype, (*HEADS, (256, 512)) if dtype == "fp32" else HEADS))


def elsewhere() -> dict[str, recording.Variant]:
    """One program of every kernel; the constant kinds differ in a load."""
    found = variants("bf16", (COMMON,), tiled=False)
    kinds = (None, "none", "scalar", "vector", "short", "far-scalar")
    posed = (ALL, TOGETHER)
    return {name: x for name, x in found.items() if x.posed in posed and not x.is_whole and x.kind in kinds}


def _variants(dtype: str, heads: tuple[tuple[int, int], ...]) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for K, V in heads:
        several = {COMMON: (ALL, FEW, PLAIN, LONG, TOGETHER), WIDE: (ALL, PLAIN, TOGETHER)}.get((K, V), (ALL,))
        for posed in several:
            for variant in launched(dtype, K, V, posed):
                if posed == PLAIN and not variant.fits_twice:
                    continue
                if posed == LONG and variant.base != "segment_states":
                    continue
                if posed == TOGETHER and variant.base != "begins" and variant.constants.get("KINDS", 0) < JOINED:
                    continue
                if variant.base == "segment_states" and (K, V) not in (COMMON, ODD):
                    continue  # its tile is the same for all
                if posed == FEW and not variant.base.endswith("_forward"):
                    continue
                known = found.setdefault(str(variant), variant)
                assert known == variant, f"two variants are called {variant}"
    return found


# Two are to fit of forward and backward of four kinds of decay, with all options, with none and of joined packs, and of
# the launches of wide heads that are made for it.
KERNELS = Kernels(on_hopper, elsewhere, everywhere=("chunk_forward-vector-128x128",), fits_twice=36)
