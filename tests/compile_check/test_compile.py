"""Without a GPU: every kernel compiles for the GPUs we name, on tensor cores, within registers and shared memory, and
as `tests/snapshots/kernels.txt` says (`tests.compile_check.snapshot`)."""

import pytest

from tests.compile_check import snapshot
from tests.compile_check.compiling import compile_kernel
from tests.compile_check.variants import COMMON, DTYPES, FEW, LONG, PLAIN, variants

# bytes a role may spill, by the width of what its dots read (kernels.md 7.13): fp16 operands that decays scale are wide
MAX_SPILL = {"*bf16": 512, "*fp16": 512, "*fp32": 1024, "*i32": 0}
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ELSEWHERE = (None, "none", "scalar", "vector", "short", "far-scalar")  # the constant kinds differ in a load
HALF_SHARED = 113 * 1024  # bytes of sm_90 that leave room for a second program: a compiler quirk once doubled them

CASES = {
    **{("sm_90", dtype, name): found for dtype in DTYPES for name, found in snapshot.variants_of(dtype).items()},
    **{
        (target, "bf16", name): variant
        for target in ("sm_80", "sm_100", "gfx942")
        for name, variant in variants("bf16", (COMMON,), tiled=False).items()
        if variant.posed not in (FEW, PLAIN, LONG) and not variant.is_whole and variant.kind in ELSEWHERE
    },
}


@pytest.mark.parametrize("target, dtype, name", CASES, ids=["-".join(case) for case in CASES])
def test_kernel_compiles_within_its_budget(target, dtype, name):
    variant = CASES[target, dtype, name]
    report = compile_kernel(variant.kernel, variant.types, variant.constants, target, variant.warps, variant.stages)
    assert report.shared <= MAX_SHARED[target], report
    assert bool(report.tensor_cores) == variant.is_matrix, report
    if target != "sm_90":  # the same tiles compile elsewhere, but are not tuned there
        return
    programs = (3 if variant.is_whole else 1) * (2 if variant.is_pair else 1)
    assert report.spilled <= programs * MAX_SPILL[variant.operands], report
    assert bool(report.wgmma) == variant.uses_wgmma, report
    if variant.fits_twice and dtype == "bf16":
        assert report.shared <= HALF_SHARED, report
    if snapshot.is_comparable():
        expected = snapshot.read().get((dtype, name))
        if expected != snapshot.line(variant, report):
            pytest.fail(
                f"{dtype} {name}\ncommitted: {expected}\nnow:       {snapshot.line(variant, report)}\n"
                "if meant, run `python -m tests.compile_check.snapshot` and review the diff"
            )


def test_the_snapshot_has_no_variants_that_are_gone():
    assert set(snapshot.read()) == {key[1:] for key in CASES if key[0] == "sm_90"}


def test_two_of_each_main_kernel_of_the_common_heads_are_to_fit():
    """The rule above means something: forward and backward of four kinds of decay, with all options, with none and of
    joined packs, and the launches of wide heads that are made for it."""
    assert sum(variant.fits_twice for variant in snapshot.variants_of("bf16").values()) == 36
