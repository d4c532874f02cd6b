"""Launching a kernel without Triton's binder: the first call of a signature compiles, later ones go to the driver.

`kernel[grid](*args, **constants)` spends more time on types, alignments and cache keys than a small kernel runs. What
that work decides is remembered here per signature: the types of the arguments, their device, and that every pointer is
aligned to 16 bytes, as torch allocates them. Some calls always go Triton's own way: those with an unaligned pointer or
an integer of 64 bits; those with an argument that is not exactly a `Tensor` or `Parameter`, an `int`, a `float` or None
(a subclass may be anything: what it points to, or how Triton takes it, is not for us to guess); those that launch hooks
watch; those in the interpreter or on another vendor's GPU.

The call of a compiled kernel is the same in Triton 3.3 to 3.9:
`run(grid x, y, z, stream, function, packed metadata, launch metadata, enter hook, exit hook, *all arguments)`, where a
pointer may be a number. A Triton whose compiled kernels have no such parts is never short-cut. (The C function behind
`run` could be called without its frame: that saves a microsecond a launch, and knows too much of Triton for it.)
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fla.backends.triton._ahead import compilers, rehearsed, under_way

ALIGNMENT = 16  # bytes; Triton compiles other loads and stores for pointers that miss it
UNALIGNED = 1  # what stands for the pointers of a call that must go Triton's way
MIXED = object()  # in place of a device: the tensors of a call lie on more than one

_data_ptr, _get_device = Tensor.data_ptr, Tensor.get_device  # unbound: a fifth faster to call
_launchers: dict[tuple, "Launcher"] = {}
_allocation = getattr(triton.runtime, "_allocation", None)
_watched = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel  # where hooks are set


def has_tensor_descriptors(*tensors: Tensor) -> bool:
    """Whether kernels may load these contiguous tensors of 16-bit numbers through descriptors (TMA), which want starts
    and rows at multiples of 16 bytes. Tuned on Hopper; in the interpreter they may too."""
    first, bits = tensors[0], 0
    if not _has_descriptors(under_way.device if first.is_meta and under_way.device else first.device):
        return False
    for x in tensors:
        if x.dtype.itemsize != 2:
            return False
        bits |= _data_ptr(x) | 2 * x.shape[-1]
    return not bits % ALIGNMENT


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    if not hasattr(triton.language, "make_tensor_descriptor") or not hasattr(triton, "set_allocator"):
        return False  # before Triton 3.4
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of a launch for its programs' descriptors, on the current device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _provide_scratch() -> None:
    """Triton asks an allocator for the memory of descriptors. The user's own serves; where there is none, ours."""
    if _is_without_allocator():
        triton.set_allocator(_allocate)


def _is_without_allocator() -> bool:
    """Whether the user has set no allocator."""
    found = _allocation and _allocation._allocator
    if hasattr(found, "get"):  # a context variable since Triton 3.5
        found = found.get()
    return found is None or found is _allocate or type(found).__name__ == "NullAllocator"


def empty_as(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like`, by far the cheapest allocation. Of a tensor without memory it imports for 0.3 s."""
    return x.new_empty(x.shape, dtype=dtype) if x.is_meta else torch.empty_like(x, dtype=dtype)


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` on the host, which takes two microseconds for it."""
    return -(-a // b)


def launch(kernel, grid: int, args: tuple, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1) -> None:
    """`kernel[(grid,)](*args, **constants, num_warps=..., num_stages=...)` on the device of the tensors.

    `args`: the arguments before the constexpr ones: tensors, None, ints and floats. `constants`: the constexpr ones.
    """
    launcher_of(kernel, constants, num_warps, num_stages)(grid, args)


def launcher_of(kernel, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1) -> "Launcher":
    """The one launcher of these settings. What is launched often keeps it: this takes a microsecond."""
    # the types too, for 1, 1.0 and True are equal, but not to a kernel; the launcher keeps the kernel, so its id stays
    values = constants.values()
    key = (id(kernel), num_warps, num_stages, *constants, *values, *map(type, values))
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = Launcher(kernel, constants, num_warps, num_stages)
    return launcher


class Compiled(NamedTuple):
    """What a launch on one device needs of the compiled kernel."""

    run: Callable
    function: Any
    metadata: Any
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]
    tail: tuple  # the values of the arguments behind `args`
    scratch: int  # bytes of memory for its descriptors that a program needs
    owner: Any  # keeps the module of `function` loaded


class Launcher:
    """A kernel with its constants and settings, for a call site that launches it often: `launcher(grid, args)`."""

    __slots__ = ("_begun", "_compiled", "_constants", "_kernel", "_settings")

    def __init__(self, kernel, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1):
        self._kernel, self._constants = kernel, dict(constants)
        self._settings = {"num_warps": num_warps, "num_stages": num_stages}
        self._compiled: dict[tuple, Compiled] = {}
        self._begun: dict[tuple, Future | None] = {}  # what was compiled ahead of its launch

    def __call__(self, grid: int, args: tuple) -> None:
        device: Any = None
        bits, key, values = 0, [], []
        note, add = key.append, values.append
        for x in args:
            if x is None:
                add(x)
                note(x)
                continue
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                pointer = _data_ptr(x)
                bits |= pointer
                add(pointer)
                note(x.dtype)
                index = _get_device(x)
                if index != device:
                    device = index if device is None else MIXED
            else:
                add(x)
                note(kind)
                if kind is int:
                    if not -0x80000000 <= x <= 0x7FFFFFFF:  # would be 64 bits wide
                        bits = UNALIGNED
                elif kind is not float:
                    bits = UNALIGNED
                    if isinstance(x, Tensor):  # a subclass: Triton asks it what it needs, but for the device
                        index = x.get_device()
                        if index != device:
                            device = index if device is None else MIXED
        note(device)
        signature = tuple(key)
        compiled = None if bits % ALIGNMENT else self._compiled.get(signature)
        if compiled is None or _is_watched(self._kernel):
            compiled = self._launch_slowly(grid, args, device)
            if compiled is not None and not bits % ALIGNMENT:
                self._compiled[signature] = compiled
            return
        run, function, metadata, current_device, current_stream, tail, scratch, _ = compiled
        if current_device() != device:
            with torch.cuda.device(device):
                return self(grid, args)
        if scratch:
            _provide_scratch()
        run(grid, 1, 1, current_stream(device), function, metadata, None, None, None, *values, *tail)

    def _launch_slowly(self, grid: int, args: tuple, device: Any) -> Compiled | None:
        """Triton's own launch; what the next one of this signature can do without it, or None."""
        if under_way.seen is not None:
            under_way.seen.append((self, args))
            return None
        if isinstance(device, int) and device >= 0:
            _provide_scratch()
            self._await(args, device)
            with torch.cuda.device(device):
                return self._shortcut(self._launch_plainly(grid, args), args)
        self._launch_plainly(grid, args)  # no tensor, a mixture, or the interpreter
        return None

    def _launch_plainly(self, grid: int, args: tuple) -> Any:
        return self._kernel[(grid,)](*args, **self._constants, **self._settings)

    def _await(self, args: tuple, device: int) -> None:
        """Have all of the call under way compiled, each kernel in a thread of its own, and wait for this one."""
        key = _signature(args, device)
        if key not in self._begun:
            for launcher, others in rehearsed(device) if torch.version.hip is None else ():
                launcher._begin(others, device)
        begun = self._begun.setdefault(key, None)
        if begun is not None:
            wait([begun])  # its errors are met again in the launch

    def _begin(self, args: tuple, device: int) -> None:
        key = _signature(args, device)
        if key not in self._begun and isinstance(self._kernel, JITFunction) and not _is_watched(self._kernel):
            self._begun[key] = compilers().submit(self._compile, args, device)

    def _compile(self, args: tuple, device: int) -> None:
        """What a launch does before it runs, the host code's compilation included."""
        given = (x.dtype if isinstance(x, Tensor) else x for x in args)
        with torch.cuda.device(device):
            made = self._kernel.warmup(*given, grid=(1,), **self._constants, **self._settings)
            host = getattr(driver.active, "launcher_cls", None)
            if host is not None and hasattr(made, "src"):
                host(made.src, made.metadata)  # kept on disk, where the launch finds it

    def _shortcut(self, made: Any, args: tuple) -> Compiled | None:
        target = getattr(getattr(made, "metadata", None), "target", None)
        run, function, metadata = (getattr(made, name, None) for name in ("run", "function", "packed_metadata"))
        if not isinstance(self._kernel, JITFunction) or getattr(target, "backend", None) != "cuda":
            return None
        if run is None or function is None or metadata is None:
            return None
        for x, parameter in zip(args, self._kernel.params, strict=False):
            if not (x is None or isinstance(x, (Tensor, float)) or (type(x) is int and parameter.do_not_specialize)):
                return None  # compiled for this very value, or a kind of argument that the loop above cannot tell apart
        rest = self._kernel.params[len(args) :]
        tail = tuple(self._constants.get(parameter.name, parameter.default) for parameter in rest)
        active = driver.active
        current_device = active.get_current_device
        if current_device is torch.cuda.current_device:
            current_device = torch._C._cuda_getDevice  # the same, less the check that CUDA is up
        scratch = getattr(made.metadata, "global_scratch_size", 0)
        return Compiled(run, function, metadata, current_device, active.get_current_stream, tail, scratch, made)


def _signature(args: tuple, device: int) -> tuple:
    return device, *(x.dtype if isinstance(x, Tensor) else type(x) for x in args)


def _is_watched(kernel) -> bool:
    """Whether someone asked to see launches: such ones go through Triton, which calls the hooks."""
    enter, leave = _watched.launch_enter_hook, _watched.launch_exit_hook
    # up to 3.4 a hook or None, then a chain of hooks
    if enter is not None and getattr(enter, "calls", True):
        return True
    if leave is not None and getattr(leave, "calls", True):
        return True
    return bool(kernel.pre_run_hooks)
