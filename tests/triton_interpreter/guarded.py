"""Memcheck without a GPU: cases on tensors that end, or begin, at memory that may not be touched.

`python -m tests.triton_interpreter.guarded` with TRITON_INTERPRET=1; an access outside of an input, an intermediate or
an output ends the process with SIGSEGV. With the word `stray` it does one, to show that. What runs are the
`guarded_cases` of the files beside this one: some, or with the word `everything` all.
"""

import ctypes
import importlib
import math
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.testing.contract import Case, whole
from tests.triton_interpreter.quick import hasten

PROT_NONE = 0
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_empty_like, _new_empty = torch.empty_like, Tensor.new_empty


def guarded(shape: Iterable[int], dtype: torch.dtype, at_end: bool) -> Tensor:
    """An uninitialised tensor between two such pages, right before the latter or right behind the former."""
    shape = tuple(shape)
    count = max(math.prod(shape), 1)
    size = count * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _mprotect(start + page * mmap.PAGESIZE, mmap.PAGESIZE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)[: math.prod(shape)].view(shape)


def allocating(at_end: bool):
    """Within it what launchers allocate is guarded too."""

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return _empty_like(x, dtype=dtype) if x.is_meta else guarded(x.shape, dtype or x.dtype, at_end)

    def new_empty(self: Tensor, *size, dtype: torch.dtype | None = None, **others) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if self.is_meta or others:  # others: the interpreter's own calls
            return _new_empty(self, shape, dtype=dtype, **others)
        return guarded(shape, dtype or self.dtype, at_end)

    return mock.patch.multiple(torch, empty_like=empty_like), mock.patch.multiple(Tensor, new_empty=new_empty)


def run(case: Case, at_end: bool) -> None:
    leaves = {}
    for name, x in case.inputs().items():
        leaves[name] = guarded(x.shape, x.dtype, at_end).copy_(x).requires_grad_(name != "g_gamma")
    likes, news = allocating(at_end)
    with likes, news:
        output, states = whole(case)(leaves)
        wanted = [x for x in leaves.values() if x.requires_grad]
        torch.autograd.grad([output, *states], wanted, [torch.ones_like(x) for x in (output, *states)])


def run_both(case: Case) -> None:
    for at_end in (True, False):
        run(case, at_end)
    print(case, flush=True)


@triton.jit
def _stray_kernel(x, out):
    tl.store(out + tl.arange(0, 8), tl.load(x + tl.arange(0, 8)))


def main(words: list[str]) -> int:
    if words == ["stray"]:
        _stray_kernel[(1,)](guarded((7,), torch.float32, True), torch.zeros(8))
        return 0
    hasten()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.triton_interpreter.{path.stem}")
        if hasattr(module, "guarded_cases"):
            for case in module.guarded_cases(words == ["everything"]):
                run_both(case)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
