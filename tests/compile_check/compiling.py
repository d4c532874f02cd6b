"""Compile a Triton kernel for a GPU that is not there, and read what the compiler says of it.

Needs a process without TRITON_INTERPRET. Registers and spills come from the `ptxas` inside Triton's package.
"""

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly).group(1)) * 4
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1))
        return Report(registers, spilled, compiled.metadata.shared, len(re.findall(r"v_mfma_", assembly)), 0)
    assembly = compiled.asm["ptx"]
    registers, spilled = _ptxas(assembly, target)
    cores = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", assembly))
    return Report(registers, spilled, compiled.metadata.shared, cores, len(re.findall("wgmma.mma_async", assembly)))


@functools.cache
def _tool(name: str) -> str:
    found = sorted(Path(os.path.dirname(triton.__file__)).glob(f"backends/nvidia/bin/{name}"))
    if not found:
        raise FileNotFoundError(f"{name} is not in Triton's package")
    return str(found[0])


def _ptxas(ptx: str, target: str) -> tuple[int, int]:
    arch = re.search(r"\.target\s+(\w+)", ptx).group(1)
    tool = _tool("ptxas-blackwell" if target == "sm_100" else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", f"-arch={arch}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    return registers, spilled
