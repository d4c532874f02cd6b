"""Without a GPU: every kernel compiles for the GPUs we name, on tensor cores, within registers and shared memory."""

import pytest

from tests.compile_check.compiling import compile_kernel
from tests.compile_check.variants import variants

MAX_SPILL = 512  # bytes a 16-bit kernel may spill per role (kernels.md 7.13)
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

CASES = [
    pytest.param(target, dtype, variant, id=f"{target}-{dtype}-{variant.name}")
    for target, dtype in (
        ("sm_90", "bf16"),
        ("sm_90", "fp16"),
        ("sm_80", "bf16"),
        ("sm_100", "bf16"),
        ("gfx942", "bf16"),
    )
    for variant in variants(dtype)
    if target == "sm_90" or not variant.is_odd
]


@pytest.mark.parametrize("target, dtype, variant", CASES)
def test_kernel_compiles_within_its_budget(target, dtype, variant):
    report = compile_kernel(variant.kernel, variant.types, variant.constants, target, variant.warps, variant.stages)
    assert report.shared <= MAX_SHARED[target], report
    if target == "sm_90":  # elsewhere the same tiles compile, but are not tuned
        assert report.spilled <= MAX_SPILL, report
        assert bool(report.wgmma) == variant.uses_wgmma, report
    assert bool(report.tensor_cores) == variant.is_matrix, report
