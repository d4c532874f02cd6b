"""Compile a Triton kernel for a GPU that is not there, and read what the compiler says of it.

Needs a process without TRITON_INTERPRET. Registers and spills are what the assembler inside Triton's package reports.
"""

import contextlib
import io
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Report:
    registers: int
    spilled: int  # bytes stored to local memory
    shared: int  # bytes of shared memory
    tensor_cores: int  # tensor-core instructions in the assembly
    wgmma: int  # those of them that Hopper's warpgroups issue


def compile_kernel(
    kernel, types: dict[str, str], constants: dict, target: str, warps: int = 4, stages: int = 1
) -> Report:
    """`types`: argument -> Triton type; pointers are taken as aligned to 16 bytes, as torch allocates them."""
    names = kernel.arg_names
    types = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, constants, attributes)
    with _speaking_assembler() as said:
        compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly).group(1)) * 4
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1))
        return Report(registers, spilled, compiled.metadata.shared, len(re.findall(r"v_mfma_", assembly)), 0)
    assembly, log = compiled.asm["ptx"], said.getvalue()
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))
    cores = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", assembly))
    return Report(registers, spilled, compiled.metadata.shared, cores, len(re.findall("wgmma.mma_async", assembly)))


@contextlib.contextmanager
def _speaking_assembler():
    """Within it Triton compiles anew and passes on what its assembler says: as text in what this yields."""
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield said
