"""Launching a kernel without Triton's binder: the first call of a signature compiles, later ones go to the driver.

`kernel[grid](*args, **constants)` spends more time on types, alignments and cache keys than a small kernel runs. A
launcher remembers what that work decides per signature: the types of the arguments, their device, and that every
pointer is aligned to 16 bytes, as torch allocates them. These calls always go through Triton:

- a pointer is not aligned, or an integer has 64 bits;
- an argument is not exactly a `Tensor` or `Parameter`, an `int`, a `float` or None (only Triton knows what a subclass
  points to, and how to take it);
- a launch hook is set;
- the kernel runs in the interpreter, or on another vendor's GPU.

A compiled kernel is called in the same way in Triton 3.3 to 3.9, and a pointer may be passed as a number:

    run(grid x, y, z, stream, function, packed metadata, launch metadata, enter hook, exit hook, *all arguments)

If a Triton's compiled kernels lack one of these parts, every launch goes through Triton. (The C function behind `run`
could be called directly. That saves a microsecond a launch, but depends on too much of Triton's inside.)
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

from fla.backends.triton._ahead import compiler_threads, rehearse_current_call, thread_state

ALIGNMENT = 16  # bytes; Triton compiles other loads and stores for pointers that miss it
UNALIGNED = 1  # set among the address bits of a call that must go through Triton
MIXED = object()  # in place of a device: the arguments lie on more than one

_data_ptr, _get_device = Tensor.data_ptr, Tensor.get_device  # unbound methods are a fifth faster to call
_launchers: dict[tuple, "Launcher"] = {}
_allocation = getattr(triton.runtime, "_allocation", None)
_watched = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel  # has the launch hooks


def has_tensor_descriptors(*tensors: Tensor) -> bool:
    """Whether kernels may load these contiguous tensors through tensor descriptors (TMA).

    The numbers must have 16 bits, and tensors and rows must start at multiples of 16 bytes. The kernels are tuned for
    descriptors on Hopper; the interpreter takes them too.
    """
    first, offsets = tensors[0], 0  # all starts and row lengths in bytes, combined by `|`
    if not _has_descriptors(thread_state.device if first.is_meta and thread_state.device else first.device):
        return False
    for x in tensors:
        if x.dtype.itemsize != 2:
            return False
        offsets |= _data_ptr(x) | 2 * x.shape[-1]
    return not offsets % ALIGNMENT


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    if not hasattr(triton.language, "make_tensor_descriptor") or not hasattr(triton, "set_allocator"):
        return False  # before Triton 3.4
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current device for the descriptors of a launch's programs."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _provide_scratch() -> None:
    """Gives Triton an allocator for the memory of descriptors, unless the user has set one."""
    if _is_without_allocator():
        triton.set_allocator(_allocate)


def _is_without_allocator() -> bool:
    """Whether the user has set no allocator."""
    found = _allocation and _allocation._allocator
    if hasattr(found, "get"):  # a context variable since Triton 3.5
        found = found.get()
    return found is None or found is _allocate or type(found).__name__ == "NullAllocator"


def empty_as(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like`, which is by far the cheapest allocation.

    A tensor without memory goes another way, because `empty_like` of it imports modules for 0.3 s.
    """
    return x.new_empty(x.shape, dtype=dtype) if x.is_meta else torch.empty_like(x, dtype=dtype)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up. (On the host, `triton.cdiv` takes two microseconds.)"""
    return -(-a // b)


def launch(kernel, grid: int, args: tuple, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1) -> None:
    """`kernel[(grid,)](*args, **constants, num_warps=..., num_stages=...)` on the device of the tensors.

    `args`: the arguments before the constexpr ones (tensors, None, ints and floats). `constants`: the constexpr ones.
    """
    launcher_of(kernel, constants, num_warps, num_stages)(grid, args)


def launcher_of(kernel, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1) -> "Launcher":
    """The one launcher of these settings. This takes a microsecond, so what launches often keeps the launcher."""
    # The types belong to the key: 1, 1.0 and True are equal, but differ for a kernel. The id of the kernel stays valid,
    # because the launcher keeps the kernel.
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
    constant_values: tuple  # the arguments after `args`
    scratch: int  # bytes that a program needs for its descriptors
    owner: Any  # the compiled kernel: it keeps the module of `function` loaded


class Launcher:
    """A kernel with its constants and settings, for a call site that launches it often: `launcher(grid, args)`."""

    __slots__ = ("_ahead_of_launch", "_compiled", "_constants", "_kernel", "_settings")

    def __init__(self, kernel, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1):
        self._kernel, self._constants = kernel, dict(constants)
        self._settings = {"num_warps": num_warps, "num_stages": num_stages}
        self._compiled: dict[tuple, Compiled] = {}
        self._ahead_of_launch: dict[tuple, Future | None] = {}  # by signature: kernels in the compiler threads

    def __call__(self, grid: int, args: tuple) -> None:
        device: Any = None
        address_bits, key, values = 0, [], []
        add_type, add_value = key.append, values.append
        for x in args:
            if x is None:
                add_value(x)
                add_type(x)
                continue
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                pointer = _data_ptr(x)
                address_bits |= pointer
                add_value(pointer)
                add_type(x.dtype)
                index = _get_device(x)
                if index != device:
                    device = index if device is None else MIXED
            else:
                add_value(x)
                add_type(kind)
                if kind is int:
                    if not -0x80000000 <= x <= 0x7FFFFFFF:  # Triton takes it as 64 bits
                        address_bits = UNALIGNED
                elif kind is not float:
                    address_bits = UNALIGNED
                    if isinstance(x, Tensor):  # a subclass: Triton asks it for all but its device
                        index = x.get_device()
                        if index != device:
                            device = index if device is None else MIXED
        add_type(device)
        signature = tuple(key)
        compiled = None if address_bits % ALIGNMENT else self._compiled.get(signature)
        if compiled is None or _is_watched(self._kernel):
            compiled = self._launch_slowly(grid, args, device)
            if compiled is not None and not address_bits % ALIGNMENT:
                self._compiled[signature] = compiled
            return
        run, function, metadata, current_device, current_stream, constant_values, scratch, _ = compiled
        if current_device() != device:
            with torch.cuda.device(device):
                return self(grid, args)
        if scratch:
            _provide_scratch()
        run(grid, 1, 1, current_stream(device), function, metadata, None, None, None, *values, *constant_values)

    def _launch_slowly(self, grid: int, args: tuple, device: Any) -> Compiled | None:
        """Launches through Triton. Returns what later launches of this signature need to go without it, or None."""
        if thread_state.seen is not None:
            thread_state.seen.append((self, args))
            return None
        if isinstance(device, int) and device >= 0:
            _provide_scratch()
            self._wait_until_compiled(args, device)
            with torch.cuda.device(device):
                return self._shortcut(self._launch_plainly(grid, args), args)
        self._launch_plainly(grid, args)  # no tensors, tensors on several devices, or the interpreter
        return None

    def _launch_plainly(self, grid: int, args: tuple) -> Any:
        return self._kernel[(grid,)](*args, **self._constants, **self._settings)

    def _wait_until_compiled(self, args: tuple, device: int) -> None:
        """Has all kernels of the current call compiled in threads, and waits for this one."""
        key = _signature(args, device)
        if key not in self._ahead_of_launch:
            for launcher, others in rehearse_current_call(device) if torch.version.hip is None else ():
                launcher._compile_ahead(others, device)
        future = self._ahead_of_launch.setdefault(key, None)
        if future is not None:
            wait([future])  # its errors come again in the launch

    def _compile_ahead(self, args: tuple, device: int) -> None:
        key = _signature(args, device)
        if key not in self._ahead_of_launch and isinstance(self._kernel, JITFunction) and not _is_watched(self._kernel):
            self._ahead_of_launch[key] = compiler_threads().submit(self._compile, args, device)

    def _compile(self, args: tuple, device: int) -> None:
        """Does what a launch does before it runs. This includes compiling the host code."""
        given = (x.dtype if isinstance(x, Tensor) else x for x in args)
        with torch.cuda.device(device):
            made = self._kernel.warmup(*given, grid=(1,), **self._constants, **self._settings)
            host = getattr(driver.active, "launcher_cls", None)
            if host is not None and hasattr(made, "src"):
                host(made.src, made.metadata)  # goes to Triton's cache on disk, where the launch finds it

    def _shortcut(self, made: Any, args: tuple) -> Compiled | None:
        target = getattr(getattr(made, "metadata", None), "target", None)
        run, function, metadata = (getattr(made, name, None) for name in ("run", "function", "packed_metadata"))
        if not isinstance(self._kernel, JITFunction) or getattr(target, "backend", None) != "cuda":
            return None
        if run is None or function is None or metadata is None:
            return None
        for x, parameter in zip(args, self._kernel.params, strict=False):
            if not (x is None or isinstance(x, (Tensor, float)) or (type(x) is int and parameter.do_not_specialize)):
                return None  # Triton compiled for this very value, or `__call__` cannot tell this kind of argument
        rest = self._kernel.params[len(args) :]
        values = tuple(self._constants.get(parameter.name, parameter.default) for parameter in rest)
        active = driver.active
        current_device = active.get_current_device
        if current_device is torch.cuda.current_device:
            current_device = torch._C._cuda_getDevice  # does not check that CUDA is initialised: it is
        scratch = getattr(made.metadata, "global_scratch_size", 0)
        return Compiled(run, function, metadata, current_device, active.get_current_stream, values, scratch, made)


def _signature(args: tuple, device: int) -> tuple:
    return device, *(x.dtype if isinstance(x, Tensor) else type(x) for x in args)


def _is_watched(kernel) -> bool:
    """Whether launch hooks are set. Only Triton's own launch calls them."""
    enter, leave = _watched.launch_enter_hook, _watched.launch_exit_hook
    # up to Triton 3.4 this is a hook or None, later a chain of hooks
    if enter is not None and getattr(enter, "calls", True):
        return True
    if leave is not None and getattr(leave, "calls", True):
        return True
    return bool(kernel.pre_run_hooks)
