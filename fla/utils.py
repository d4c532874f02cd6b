"""What the layers and kernels of other programs import from here: decorators, the device, a comparison.

Our own parts use none of it. Nothing here asks for a GPU before it is used.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.torch_version import TorchVersion

from fla._version import __version__

__all__ = [
    "IS_AMD",
    "IS_NVIDIA_HOPPER",
    "assert_close",
    "autocast_custom_bwd",
    "autocast_custom_fwd",
    "check_shared_mem",
    "checkpoint",
    "contiguous",
    "deprecate_kwarg",
    "device",
    "device_torch_lib",
    "get_abs_err",
    "get_err_ratio",
    "get_multiprocessor_count",
    "input_guard",
    "require_version",
    "tensor_cache",
]

Function = TypeVar("Function", bound=Callable)

# Bytes of shared memory that a program may have, by architecture: NVIDIA's figures; "none": what most GPUs have.
_SHARED_MEMORY = {"none": 100 << 10, "ada": 99 << 10, "ampere": 163 << 10, "hopper": 227 << 10}
_CACHED_CALLS = 4


# ---- the device


def _device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


device: str  # "cuda", another accelerator of PyTorch, or "cpu"
device_torch_lib: Any  # torch.cuda and its like
IS_AMD: bool
IS_NVIDIA_HOPPER: bool

_ASKED: dict[str, Callable[[], Any]] = {
    "device": _device,
    "device_torch_lib": lambda: getattr(torch, _device()),
    "IS_AMD": lambda: torch.version.hip is not None,
    "IS_NVIDIA_HOPPER": _is_hopper,
}


def __getattr__(name: str) -> Any:
    """What this machine has, asked for when it is first used: `import fla.utils` touches no GPU."""
    if name not in _ASKED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _ASKED[name]()
    return value


def get_multiprocessor_count(tensor_idx: int = 0) -> int:
    """Multiprocessors of a GPU, by its index; 1 without a GPU, where kernels run one program at a time."""
    return torch.cuda.get_device_properties(tensor_idx).multi_processor_count if torch.cuda.is_available() else 1


def check_shared_mem(arch: str = "none", tensor_idx: int = 0) -> bool:
    """Whether a program on the GPU of this index may have as much shared memory as one on `arch`: "ada", "ampere",
    "hopper", or "none" for 100 KiB. False without a GPU."""
    if arch not in _SHARED_MEMORY:
        raise ValueError(f"arch must be one of {', '.join(map(repr, _SHARED_MEMORY))}, got {arch!r}")
    if not torch.cuda.is_available():
        return False
    properties: Any = torch.cuda.get_device_properties(tensor_idx)
    return properties.shared_memory_per_block_optin >= _SHARED_MEMORY[arch]


# ---- decorators


def input_guard(function: Function | None = None, *, no_guard_contiguous: bool | Iterable[str] = False) -> Any:
    """Decorator: tensor arguments, positional or by name, are contiguous, and the device of the first GPU tensor is the
    current one.

    `no_guard_contiguous`: arguments that are handed on as they are: all of them (True), or those of these names.
    """
    if function is None:
        return functools.partial(input_guard, no_guard_contiguous=no_guard_contiguous)
    names = list(inspect.signature(function).parameters)
    kept = no_guard_contiguous if isinstance(no_guard_contiguous, bool) else frozenset(no_guard_contiguous)

    def guarded(name: str, x: Any) -> Any:
        keep = kept if isinstance(kept, bool) else name in kept
        return x if keep or not isinstance(x, Tensor) else x.contiguous()

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        gpu = next((x for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.is_cuda), None)
        padded = names + [""] * (len(args) - len(names))  # of *args
        with contextlib.nullcontext() if gpu is None else torch.cuda.device(gpu.device):
            return function(
                *(guarded(name, x) for name, x in zip(padded, args, strict=False)),
                **{name: guarded(name, x) for name, x in keywords.items()},
            )

    return call


def contiguous(function: Function) -> Function:
    """Decorator: tensor arguments are made contiguous. The former name of `input_guard`."""
    return input_guard(function)


def tensor_cache(function: Function) -> Function:
    """Decorator: the results of the last four calls are kept, and returned to a call with the same arguments: the same
    objects, and no tensor among them written to in between.

    Tensors of inference mode do not say when they are written to: calls with these are not kept. A result can always
    be used in training.
    """
    kept: list[tuple[tuple, dict[str, Any], list[int], Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        tensors = [x for x in (*args, *keywords.values()) if isinstance(x, Tensor)]
        if any(x.is_inference() for x in tensors):
            return function(*args, **keywords)
        versions = [x._version for x in tensors]
        for entry in kept:
            same = len(args) == len(entry[0]) and keywords.keys() == entry[1].keys() and versions == entry[2]
            if same and all(a is b for a, b in zip(args, entry[0], strict=True)):
                if all(x is entry[1][name] for name, x in keywords.items()):
                    return entry[3]
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                result = function(*args, **keywords)
        else:
            result = function(*args, **keywords)
        kept.insert(0, (args, keywords, versions, result))
        del kept[_CACHED_CALLS:]
        return result

    return call  # type: ignore[return-value]


def autocast_custom_fwd(
    fwd: Function | None = None, *, device_type: str | None = None, cast_inputs: torch.dtype | None = None
) -> Any:
    """`torch.amp.custom_fwd` for a device, by default this machine's: for the `forward` of an autograd function."""
    return torch.amp.custom_fwd(fwd, device_type=device_type or _device(), cast_inputs=cast_inputs)


def autocast_custom_bwd(bwd: Function | None = None, *, device_type: str | None = None) -> Any:
    """`torch.amp.custom_bwd` for a device, by default this machine's: for the `backward` of an autograd function."""
    if bwd is None:
        return functools.partial(autocast_custom_bwd, device_type=device_type)
    return torch.amp.custom_bwd(bwd, device_type=device_type or _device())


def checkpoint(function: Function) -> Function:
    """Decorator: what the function computes is not kept for the backward, but computed again."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **keywords)

    return call  # type: ignore[return-value]


def require_version(requirement: str, hint: str = "") -> Callable[[Function], Function]:
    """Decorator: a call raises ImportError unless a package is installed as `requirement` ("triton>=3.0") has it."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            _require(function.__name__, requirement, hint)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate


def _require(name: str, requirement: str, hint: str) -> None:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        raise ImportError(f"{name} needs {requirement}, got {found}. {hint}".rstrip(". ") + ".")


def deprecate_kwarg(
    old_name: str,
    version: str,
    new_name: str | None = None,
    warn_if_greater_or_equal_version: bool = False,
    raise_if_greater_or_equal_version: bool = False,
    raise_if_both_names: bool = False,
    additional_message: str | None = None,
) -> Callable[[Function], Function]:
    """Decorator: the keyword `old_name` warns that it goes away in `version` of this library, and is handed on as
    `new_name`.

    Given both, the new one counts, or a ValueError is raised. Without a `new_name` it is handed on as it is. From
    `version` on nothing is said, unless one of the two `..._if_greater_or_equal_version` asks for a warning or, before
    that, for a ValueError. The arguments are those of transformers' function of this name.
    """
    gone = TorchVersion(__version__) >= version  # PyTorch's class compares versions of any package
    silent = gone and not warn_if_greater_or_equal_version

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            if old_name in keywords:
                when = f"went away in version {version}" if gone else f"goes away in version {version}"
                message = f"{function.__name__}: {old_name} is deprecated and {when}"
                message += "" if new_name is None else f"; use {new_name}"
                message += "" if additional_message is None else f". {additional_message}"
                both = new_name is not None and new_name in keywords
                if both and raise_if_both_names:
                    raise ValueError(f"{function.__name__}: {old_name} and {new_name} are both given. {message}")
                if gone and raise_if_greater_or_equal_version:
                    raise ValueError(message)
                if new_name is not None:
                    keywords.setdefault(new_name, keywords.pop(old_name))
                if both or not silent:
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate


# ---- comparing


def get_abs_err(x: Tensor, y: Tensor) -> float:
    """The largest difference."""
    return float((x.detach().double() - y.detach().double()).abs().max()) if x.numel() else 0.0


def get_err_ratio(x: Tensor, y: Tensor) -> float:
    """The root mean square of the differences, relative to that of `x`."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).square().mean().sqrt() / (x.square().mean().sqrt() + 1e-8)) if x.numel() else 0.0


def assert_close(
    prefix: str, ref: Tensor, tri: Tensor, ratio: float, warning: bool = False, err_atol: float = 1e-6
) -> None:
    """AssertionError unless `tri` is `ref` within `err_atol` everywhere, or their relative root mean square is under
    `ratio`.

    `warning`: only warn of a difference that is too large; a NaN raises all the same. Our own suite has
    `fla.testing.assert_within_budget`, whose bounds follow from the dtype.
    """
    if ref.shape != tri.shape:
        raise AssertionError(f"{prefix}: the shapes are {list(ref.shape)} and {list(tri.shape)}")
    largest, relative = get_abs_err(ref, tri), get_err_ratio(ref, tri)
    message = f"{prefix}: largest difference {largest:.6f}, ratio {relative:.6f}"
    print(message)
    if largest <= err_atol or relative < ratio:
        return
    if warning and relative == relative:
        warnings.warn(f"{message}, over {ratio}", stacklevel=2)
        return
    raise AssertionError(f"{message}, must be under {ratio}")
