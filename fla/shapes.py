"""The shape language, and the checks that every public function runs first.

A shape is a string of axes such as "B T H K". A letter has the same size in all tensors of a call; a number is the size
itself. `N` is the number of states: the batch size, or with `cu_seqlens` the number of packed sequences.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def check_shapes(
    shapes: dict[str, str],
    *,
    same_dtype: tuple[str, ...] = ("q", "k", "v"),
    required: tuple[str, ...] = ("q", "k", "v"),
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    **tensors: Tensor | None,
) -> dict[str, int]:
    """Check the tensors of a call against each other and return the size of every axis.

    The result is cached: read it, never change it. The first tensor sets the device and, for the names in `same_dtype`,
    the dtype. The values in `cu_seqlens` are checked where they are read (`fla.varlen`).

    Raises:
        TypeError: an argument is no floating-point tensor, has another dtype than the first tensor although its name is
            in `same_dtype`, or `scale` is no number.
        ValueError: a shape, a device, `scale` or the shape of `cu_seqlens` does not fit.
    """
    if not is_compiling():
        dims = _sizes_if_valid(shapes, same_dtype, required, cu_seqlens, scale, tensors)
        if dims is not None:
            return dims
    return _check_one_by_one(shapes, same_dtype, required, cu_seqlens, scale, tensors)


def _sizes_if_valid(shapes, same_dtype, required, cu_seqlens, scale, tensors) -> dict[str, int] | None:
    """The sizes of the axes, or None if an argument may be wrong.

    It applies the rules of `_check_one_by_one` in a third of the time, and cannot say which rule is broken.
    """
    first_dtype = None
    found: list[Any] = []
    for name, x in tensors.items():
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            return None
        dtype = x.dtype
        if first_dtype is None:
            first_dtype, device, index = dtype, x.device, x.get_device()
            if not dtype.is_floating_point:
                return None
            if cu_seqlens is not None:
                try:
                    _check_packing(cu_seqlens, x, name)
                except (TypeError, ValueError):
                    return None
                found.append(cu_seqlens.shape[0] - 1)
        else:
            if x.get_device() != index or (index < 0 and x.device != device):  # the index of a GPU is quicker to read
                return None
            if dtype is not first_dtype and (name in same_dtype or not dtype.is_floating_point):
                return None
        found += shapes[name], x.shape
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        return None
    try:
        return _match_axes(*found)
    except TypeError:  # symbolic sizes cannot be hashed
        return _match_axes.__wrapped__(*found)


@functools.lru_cache(maxsize=4096)
def _match_axes(*found: Any) -> dict[Any, int] | None:
    """The size of every axis, or None if two tensors contradict each other.

    `found`: the shape string and the sizes of every tensor in turn. If their count is odd, the first is the size of N.
    """
    dims: dict[Any, int] = {}
    start = len(found) % 2
    if start:
        dims["N"] = found[0]
    for shape, sizes in zip(found[start::2], found[start + 1 :: 2], strict=True):
        axes = _parsed_shapes.get(shape) or _parse(shape)
        if len(sizes) != len(axes):
            return None
        for axis, size in zip(axes, sizes, strict=True):
            if axis in dims:
                if dims[axis] != size:
                    return None
            elif axis == "N":
                dims[axis] = dims.get("B", size)
                if dims[axis] != size:
                    return None
            elif axis.__class__ is str:
                dims[axis] = size
            elif axis != size:
                return None
    return dims


def _parse(shape: str) -> tuple[str | int, ...]:
    axes = tuple(int(axis) if axis.isdigit() else axis for axis in shape.split())
    _parsed_shapes[shape] = axes
    return axes


_parsed_shapes: dict[str, tuple[str | int, ...]] = {}  # shape string -> its axes


def _check_one_by_one(shapes, same_dtype, required, cu_seqlens, scale, tensors) -> dict[str, int]:
    """The sizes of the axes; raises for the first argument that is wrong."""
    dims: dict[str, int] = {}
    first = None
    for name, x in tensors.items():
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of shape [{shapes[name]}], got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if first is None:
            first = name
            if cu_seqlens is not None:
                _check_packing(cu_seqlens, x, name)
                dims["N"] = cu_seqlens.shape[0] - 1
        reference = tensors[first]
        assert reference is not None
        if x.device != reference.device:
            raise ValueError(f"{name} must be on {reference.device} like {first}, got {x.device}")
        if name in same_dtype and x.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first} ({reference.dtype}), got {x.dtype}")
        _check_axes(shapes[name], name, x, dims)
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    return dims


def _check_axes(shape: str, name: str, x: Tensor, dims: dict[str, int]) -> None:
    axes = shape.split()
    if x.dim() != len(axes):
        raise ValueError(f"{name} must have shape [{', '.join(axes)}], got {len(x.shape)} axes: {list(x.shape)}")
    for axis, size in zip(axes, x.shape, strict=True):
        if axis == "N" and "N" not in dims:
            dims["N"] = dims.get("B", size)
        expected = int(axis) if axis.isdigit() else dims.setdefault(axis, size)
        if size != expected:
            known = "" if axis.isdigit() else f" with {axis} = {expected}"
            raise ValueError(f"{name} must have shape [{', '.join(axes)}]{known}, got {list(x.shape)}")


def _check_packing(cu_seqlens: Tensor, x: Tensor, name: str) -> None:
    check_bounds("cu_seqlens", cu_seqlens, x, name, x.device)
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like {name}, got {cu_seqlens.device}")


def check_bounds(argument: str, bounds: Tensor, x: Tensor, name: str, device: torch.device | str) -> None:
    """TypeError or ValueError unless `bounds` has the form of the bounds of sequences packed into the one row of `x`,
    an argument called `name`. `device`: where a message says to make them."""
    if not isinstance(bounds, Tensor):
        raise TypeError(
            f"{argument} must be an int32 or int64 tensor, got {type(bounds).__name__}; "
            f"make one with torch.tensor({argument}, dtype=torch.int32, device='{device}')"
        )
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{argument} must be an int32 or int64 tensor, got {bounds.dtype}")
    if bounds.dim() != 1 or bounds.shape[0] < 2:
        raise ValueError(f"{argument} must have shape [N + 1] with N >= 1, got {list(bounds.shape)}")
    if x.shape[0] != 1:
        raise ValueError(
            f"{argument} packs all sequences into one row: {name} must have batch size 1, got {x.shape[0]}; "
            "flatten the batch with x.reshape(1, -1, *x.shape[2:])"
        )


def merge_cu_seqlens(cu_seqlens: Tensor | None, cu_seq_lens_q: Tensor | None) -> Tensor | None:
    """The packing of a call that takes it under two names.

    Raises ValueError if both are given and are not the same tensor. Their values are not compared, since that would
    wait for the GPU.
    """
    if cu_seqlens is None or cu_seq_lens_q is None:
        return cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seq_lens_q", cu_seq_lens_q)):
        if not isinstance(bounds, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(bounds).__name__}; make one with torch.tensor({name}, "
                "dtype=torch.int32)"
            )
    same = cu_seqlens.shape == cu_seq_lens_q.shape and cu_seqlens.data_ptr() == cu_seq_lens_q.data_ptr()
    if cu_seqlens is not cu_seq_lens_q and not same:
        raise ValueError(
            "cu_seqlens and cu_seq_lens_q are two names of one argument: give one of them, got two tensors"
        )
    return cu_seqlens


def check_chunk_size(chunk_size: int) -> None:
    """TypeError or ValueError unless another program's chunk could have this size. Results depend on none."""
    if not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be 16, 32, 64 or 128, or None, got {type(chunk_size).__name__}")
    if chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"chunk_size must be 16, 32, 64 or 128, or None, got {chunk_size}")


def pool_shapes(shapes: dict[str, str], state_indices: Tensor | None) -> dict[str, str]:
    """The shapes of an op's arguments. With `state_indices` its states are a pool of P slots: axis N becomes P."""
    if state_indices is None:
        return shapes
    return {name: "P" + shape[1:] if shape.startswith("N ") else shape for name, shape in shapes.items()}
