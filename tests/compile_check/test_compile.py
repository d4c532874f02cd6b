"""Without a GPU: every kernel compiles for the GPUs we name, on tensor cores, within registers and shared memory, and
as `tests/snapshots/kernels.txt` says (`tests.compile_check.snapshot`).

`make test` compiles examples of every trait (`recording.Variant.traits`), `make test-all` everything.
"""

import pytest

from tests.compile_check import snapshot
from tests.compile_check.compiling import compile_kernel
from tests.compile_check.recording import DTYPES, examples, families, variants_of

# bytes a role may spill, by the width of what its dots read: fp16 operands that decays scale are wide
MAX_SPILL = {"*bf16": 512, "*fp16": 512, "*fp32": 1024, "*i32": 0}
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
HALF_SHARED = 113 * 1024  # bytes of sm_90 that leave room for a second program: a compiler quirk once doubled them

HOPPER = {("sm_90", dtype, name): found for dtype in DTYPES for name, found in variants_of(dtype).items()}
ELSEWHERE = {
    (target, "bf16", name): variant
    for kernels in families().values()
    for name, variant in kernels.elsewhere().items()
    for target in ("sm_80", "sm_100", "gfx942")
}
EVERYWHERE = {name for kernels in families().values() for name in kernels.everywhere}
CASES = HOPPER | ELSEWHERE
CHOSEN = examples(HOPPER) | {case for case in ELSEWHERE if case[2] in EVERYWHERE}


def marked(case: tuple[str, str, str]):
    marks = () if case in CHOSEN else pytest.mark.exhaustive
    return pytest.param(*case, CASES[case], marks=marks, id="-".join(case))


@pytest.mark.parametrize("target, dtype, name, variant", [marked(case) for case in CASES])
def test_kernel_compiles_within_its_budget(target, dtype, name, variant):
    report = compile_kernel(variant.kernel, variant.types, variant.constants, target, variant.warps, variant.stages)
    assert report.shared <= MAX_SHARED[target], report
    assert bool(report.tensor_cores) == variant.is_matrix, report
    if target != "sm_90":  # the same tiles compile elsewhere, but are not tuned there
        return
    assert report.spilled <= variant.programs * MAX_SPILL[variant.operands], report
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
    assert set(snapshot.read()) == {key[1:] for key in HOPPER}


@pytest.mark.parametrize("family", families())
def test_two_of_each_main_kernel_of_the_common_heads_are_to_fit(family):
    """As many variants are to fit twice as the family declares: the rule above is never empty."""
    kernels = families()[family]
    assert sum(variant.fits_twice for variant in kernels.variants("bf16").values()) == kernels.fits_twice
