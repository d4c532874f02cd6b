"""The C function behind Triton's launcher, called directly (`_entry.entry_of`), on the driver of `test_launch.py`."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from fla.backends.triton import _entry, _launch
from fla.backends.triton._launch import Launcher, launch
from tests.test_launch import SIZE, arguments, hook, machine, plain, scaled_add_kernel, slow  # noqa: F401


class Kernel:
    """The C function behind Triton's launcher, and what reached it."""

    def __init__(self):
        self.seen: list[tuple] = []

    def launch(self, *arguments):
        self.seen.append(arguments)


@pytest.fixture
def launcher_of_triton(machine, monkeypatch):  # noqa: F811
    """The installed Triton's own `CudaLauncher` around a C function that records; nothing is built for it."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if getattr(nvidia, "_BASE_ARGS_FORMAT", None) != _entry.ENTRY_FORMAT:
        pytest.skip("this Triton's launcher is another one")
    made = object.__new__(nvidia.CudaLauncher)
    made.num_ctas, made.launch, made.launch_cooperative_grid, made.launch_pdl = 1, Kernel().launch, False, True
    made.global_scratch_size, made.global_scratch_align = 0, 128
    made.profile_scratch_size, made.profile_scratch_align = 0, 1
    monkeypatch.setattr(_entry, "BuiltinFunctionType", type(made.launch))
    monkeypatch.setattr(machine, "launcher_cls", lambda src, metadata: made)
    return made


def numbers(seen: list[tuple]) -> list[tuple]:
    """Launches of the C function as numbers; hooks and what they are told as None."""
    return [plain((*x[:5], *x[9:])) + x[5:9] for x in seen]


def test_the_c_function_is_called_as_triton_calls_it(machine, slow, launcher_of_triton):  # noqa: F811
    seen = launcher_of_triton.launch.__self__.seen
    for _ in range(3):
        launch(scaled_add_kernel, 3, arguments(), SIZE)
    (compiled,) = next(iter(_launch._launchers.values()))._compiled.values()
    assert compiled.entry == (launcher_of_triton.launch, False, True) and len(slow) == 1
    args = arguments()
    launch(scaled_add_kernel, 3, args, SIZE)  # ours
    scaled_add_kernel[(3,)](*args, **SIZE, num_warps=4, num_stages=1)  # theirs
    assert numbers(seen)[-2] == numbers(seen)[-1] and len(seen) == 5
    machine.tensors_on = 1
    launch(scaled_add_kernel, 3, args, SIZE)
    launch(scaled_add_kernel, 3, args, SIZE)
    assert seen[-1][3:5] == (71, 1001)
    with hook(lambda metadata: None):
        launch(scaled_add_kernel, 3, args, SIZE)
        assert seen[-1][11] is not None, "hooks are the launcher's business"


def test_memory_for_descriptors_is_as_large_as_triton_has_it(machine, launcher_of_triton, monkeypatch):  # noqa: F811
    """So many bytes a program, from our allocator or the user's, whichever it is at the time of the launch."""
    asked: list = []
    given: list[torch.Tensor] = []

    def allocator(owner):
        def allocate(size, alignment, stream):
            asked.append((owner, size, stream))
            given.append(torch.empty(size))
            return given[-1]

        return allocate

    ours, user = allocator("ours"), allocator("user")
    monkeypatch.setattr(_launch, "_allocate", ours)
    launcher_of_triton.global_scratch_size = 384
    launcher = Launcher(scaled_add_kernel, SIZE)
    shortcut = launcher._shortcut

    def with_scratch(made, args):
        made.metadata = SimpleNamespace(target=made.metadata.target, global_scratch_size=384)
        return shortcut(made, args)

    monkeypatch.setattr(Launcher, "_shortcut", lambda self, made, args: with_scratch(made, args))
    triton.set_allocator(triton.runtime._allocation.NullAllocator())
    try:
        launcher(5, arguments())  # through Triton, which asks the allocator that it was given
        launcher(7, arguments())
        (compiled,) = launcher._compiled.values()
        assert compiled.entry is not None
        assert asked == [("ours", 5 * 384, 70), ("ours", 7 * 384, 70)]
        triton.set_allocator(user)
        launcher(9, arguments())
        assert asked[2:] == [("user", 9 * 384, 70)]
    finally:
        triton.set_allocator(triton.runtime._allocation.NullAllocator())
    first, second, third = launcher_of_triton.launch.__self__.seen
    assert [x[8] for x in (first, second, third)] == [None] * 3
    assert first[7] is given[0] and third[7] is given[2]
    assert second[7] == given[1].data_ptr()  # a number: where it is, the driver need not be asked


@pytest.mark.parametrize(
    "changes",
    [
        {"num_ctas": 2},
        {"global_scratch_size": 256},
        {"profile_scratch_size": 8},
        {"launch_pdl": None},
        {"launch": lambda *_: None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_launcher_that_does_more_is_called_whole(launcher_of_triton, changes):
    assert _entry.entry_of(launcher_of_triton, 0) is not None
    vars(launcher_of_triton).update(changes)
    assert _entry.entry_of(launcher_of_triton, 0) is None


def test_a_launcher_of_another_format_is_called_whole(launcher_of_triton, monkeypatch):
    monkeypatch.setattr(sys.modules[type(launcher_of_triton).__module__], "_BASE_ARGS_FORMAT", "iiiKKOOOO")
    assert _entry.entry_of(launcher_of_triton, 0) is None
    assert _entry.entry_of(print, 0) is None
