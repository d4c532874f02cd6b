"""Kernels launched without Triton's binder (`fla.backends.triton._launch`), on a driver that records its calls.

Triton itself runs up to the driver: it compiles for sm_90 and arranges the arguments, without a GPU.
"""

import gc
import importlib
import pkgutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import fla.backends.triton  # noqa: E402
from fla.backends import interpreting  # noqa: E402
from fla.backends.triton import _launch  # noqa: E402
from fla.backends.triton._launch import Launcher, launch  # noqa: E402


@triton.jit(do_not_specialize=["n", "step"])
def scaled_add_kernel(x, y, out, scale, n, step, SIZE: tl.constexpr, ADD: tl.constexpr = True):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + o * step, mask=o < n, other=0.0) * scale
    if ADD:
        if y is not None:
            value += tl.load(y + o, mask=o < n, other=0.0)
    tl.store(out + o, value, mask=o < n)


@triton.jit
def constants_kernel(x, A: tl.constexpr, B: tl.constexpr):
    tl.store(x + A, B)


@triton.jit
def value_kernel(x, n, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), n)


class Machine:
    """A CUDA driver of several devices, without any: what was launched is in `launches`."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.launched_on: list[int] = []
        self.device, self.tensors_on, self.streams = 0, 0, {0: 70, 1: 71}
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (object(), 1000 + device, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    def launcher_cls(self, src, metadata):
        return self.run

    def run(self, *arguments):
        self.launches.append(arguments)
        self.launched_on.append(self.device)

    @contextmanager
    def of(self, device: int):
        before, self.device = self.device, device
        yield
        self.device = before


@pytest.fixture
def machine(monkeypatch):
    assert not interpreting()
    gc.freeze()  # the collection at the end then looks at what the test made alone
    made = Machine()
    monkeypatch.setattr(_launch, "_launchers", {})
    monkeypatch.setattr(_launch, "_get_device", lambda x: made.tensors_on)
    monkeypatch.setattr(torch.cuda, "device", made.of)
    before = driver._active if hasattr(driver, "_active") else driver.active
    driver.set_active(made)
    forget_kernels()
    yield made
    _launch._launchers.clear()
    forget_kernels()
    gc.collect()  # compiled kernels unload themselves from the driver
    gc.unfreeze()
    driver.set_active(before)


@pytest.fixture
def slow(monkeypatch):
    """The calls that went Triton's way."""
    calls: list = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        calls.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return calls


def triton_modules() -> list:
    found = pkgutil.walk_packages(fla.backends.triton.__path__, "fla.backends.triton.")
    return [importlib.import_module(info.name) for info in found]


def our_kernels() -> list[JITFunction]:
    found = [vars(module) for module in triton_modules()]
    kernels = {id(x): x for names in found for n, x in names.items() if n.endswith("_kernel")}
    return [x for x in kernels.values() if isinstance(x, JITFunction)]


def forget_kernels() -> None:
    """What was compiled, and the plans, which keep launchers."""
    for kernel in (scaled_add_kernel, value_kernel, constants_kernel, *our_kernels()):
        kernel.device_caches.clear()
    for module in triton_modules():
        for name, value in vars(module).items():
            if name.endswith("_plan"):
                value.cache_clear()


def arguments(**changes) -> tuple:
    given = {"x": torch.ones(64), "y": torch.ones(64), "out": torch.ones(64), "scale": 0.5, "n": 64, "step": 1}
    return tuple((given | changes).values())


def plain(launched: tuple) -> tuple:
    """A launch as numbers: tensors as their pointers, and hooks, of which there are none, as None."""
    start, rest = launched[:6], launched[9:]
    return (*start, None, None, None, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest))


SIZE = {"SIZE": 64, "ADD": True}


def test_later_calls_reach_the_driver_as_the_first_one_did(machine, slow):
    args = arguments()
    scaled_add_kernel[(3,)](*args, **SIZE, num_warps=2, num_stages=1)
    for _ in range(3):
        launch(scaled_add_kernel, 3, args, SIZE, num_warps=2)
    assert len(slow) == 2  # the call above, and the first of the three
    assert {plain(launched) for launched in machine.launches} == {plain(machine.launches[0])}
    assert machine.launches[0][:5] == (3, 1, 1, 70, 1000)
    assert machine.launches[-1][5][:2] == (2, 1)  # warps, clusters
    assert machine.launches[-1][9:] == (*(x.data_ptr() for x in args[:3]), 0.5, 64, 1, 64, True)


def test_what_may_change_without_a_new_kernel(machine, slow):
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    x = torch.nn.Parameter(torch.ones(7))
    launch(scaled_add_kernel, 9, arguments(x=x, n=16, step=5, scale=-1.0), {"SIZE": 64, "ADD": True})
    machine.streams[0] = 72
    launch(scaled_add_kernel, 9, arguments(x=torch.ones(0)), SIZE)
    assert len(slow) == 1
    assert machine.launches[1][0] == 9 and machine.launches[1][9] == x.data_ptr()
    assert machine.launches[1][12:15] == (-1.0, 16, 5)
    assert machine.launches[2][3] == 72 and machine.launches[2][9] == 0


@pytest.mark.parametrize(
    "changes, constants, settings",
    [
        ({"x": torch.ones(64, dtype=torch.float16)}, SIZE, {}),
        ({"out": torch.ones(64, dtype=torch.bfloat16)}, SIZE, {}),
        ({"y": None}, SIZE, {}),
        ({}, {"SIZE": 128, "ADD": True}, {}),
        ({}, {"SIZE": 64, "ADD": False}, {}),
        ({}, SIZE, {"num_warps": 8}),
        ({}, SIZE, {"num_stages": 3}),
    ],
    ids=("dtype", "output dtype", "None", "constant", "flag", "warps", "stages"),
)
def test_every_signature_goes_through_triton_once(machine, slow, changes, constants, settings):
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(**changes), constants, **settings)
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 2 and len(machine.launches) == 4
    assert plain(machine.launches[1])[12:] == plain(machine.launches[2])[12:]
    assert machine.launches[2][5][0] == settings.get("num_warps", 4)


def test_defaults_of_constants(machine, slow):
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(), {"SIZE": 64})
    assert len(slow) == 1 and machine.launches[0][15:] == machine.launches[1][15:] == (64, True)


@pytest.mark.parametrize("changes", ({"x": torch.ones(65)[1:]}, {"n": 2**31}, {"n": -(2**31) - 1}, {"step": True}))
def test_calls_that_always_go_through_triton(machine, slow, changes):
    """A misaligned pointer, an integer of 64 bits and a bool are other types to the compiler."""
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(**changes), SIZE)
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 3 and len(machine.launches) == 4
    kernels = scaled_add_kernel.device_caches[0][0]
    assert len(kernels) == 2  # and Triton took it for another kernel


@pytest.mark.parametrize(
    "one, other",
    [
        ({"A": 1, "B": 2}, {"B": 1, "A": 2}),
        ({"A": 1, "B": 2}, {"A": 1, "B": 2.0}),
        ({"A": 1, "B": 2}, {"A": True, "B": 2}),
    ],
    ids=("order", "float", "bool"),
)
def test_a_launcher_is_known_by_the_names_values_and_types_of_its_constants(machine, slow, one, other):
    """Constants of other names, values or types give another kernel, and every call launches its own."""
    launchers = [_launch.launcher_of(constants_kernel, constants) for constants in (one, other)]
    assert launchers[0] is not launchers[1]
    assert launchers == [_launch.launcher_of(constants_kernel, constants) for constants in (one, other)]
    for launcher in launchers * 2:
        launcher(1, (torch.ones(64),))
    assert len(slow) == 2
    wanted = [[repr(constants[name]) for name in "AB"] for constants in (one, other)]
    assert [[repr(x) for x in launched[-2:]] for launched in machine.launches] == wanted * 2


class Wrapped(torch.Tensor):
    """A tensor whose memory is not what `Tensor.data_ptr` says."""

    inner: torch.Tensor
    on = 0  # the device

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return self.on


class Number(int):
    """An int that is not one to Triton's compiler, for all we know."""


def subclassed(inner: torch.Tensor) -> Wrapped:
    made = torch.zeros(64).as_subclass(Wrapped)
    made.inner = inner
    return made


@pytest.mark.parametrize("aligned", (True, False))
def test_a_tensor_of_a_subclass_is_left_to_triton(machine, slow, aligned):
    """It says itself where its memory is; what is compiled for it depends on that pointer's alignment."""
    for inner in (torch.ones(65)[:64], torch.ones(65)[0 if aligned else 1 :][:64]):
        launch(scaled_add_kernel, 1, arguments(x=subclassed(inner)), SIZE)
    assert len(slow) == 2
    assert len(scaled_add_kernel.device_caches[0][0]) == (1 if aligned else 2)
    machine.tensors_on = 1  # where plain ones are
    launch(scaled_add_kernel, 1, arguments(x=subclassed(torch.ones(64))), SIZE)
    assert len(slow) == 3 and machine.launched_on[-1] == 0, "a mixture is launched where the caller is"


def test_a_subclass_alone_says_the_device(machine, slow, monkeypatch):
    monkeypatch.setattr(Wrapped, "on", 1)
    x = subclassed(torch.ones(64))
    for _ in range(2):
        launch(value_kernel, 1, (x, 3), {"SIZE": 64})
    assert machine.launched_on == [1, 1] and len(slow) == 2


@pytest.mark.parametrize(
    "changes",
    ({"n": Number(64)}, {"n": numpy.int64(64)}, {"scale": numpy.float64(0.5)}, {"scale": numpy.float32(0.5)}),
    ids=repr,
)
def test_numbers_of_other_classes_are_left_to_triton(machine, monkeypatch, changes):
    """Triton decides whether and how it takes them; the stand-in here takes all."""
    metadata = SimpleNamespace(target=machine.target)
    made = SimpleNamespace(metadata=metadata, run=machine.run, function=1, packed_metadata=())
    taken: list = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: taken.append(args) or made)
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(**changes), SIZE)
    assert len(taken) == 2 and not machine.launches
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(taken) == 3 and len(machine.launches) == 1, "what is plain takes the short way"


def test_the_ends_of_32_bits_are_no_new_signature(machine, slow):
    for n in (1, 2**31 - 1, -(2**31)):
        launch(scaled_add_kernel, 1, arguments(n=n), SIZE)
    assert len(slow) == 1


def test_integers_that_triton_specialises_are_left_to_it(machine, slow):
    for n in (1, 16, 3):
        for _ in range(2):
            launch(value_kernel, 1, (torch.ones(64), n), {"SIZE": 64})
    assert len(slow) == 6 and len(value_kernel.device_caches[0][0]) == 3


def test_devices(machine, slow):
    """A function belongs to a device; a launch runs on the device and the stream of its tensors, whichever is
    current."""
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    machine.tensors_on = 1
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(), SIZE)
        assert machine.device == 0
    machine.tensors_on = 0
    with machine.of(1):
        launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 2
    assert machine.launched_on == [0, 1, 1, 0]
    assert [launched[3:5] for launched in machine.launches] == [(70, 1000), (71, 1001), (71, 1001), (70, 1000)]


def test_tensors_of_two_devices_are_left_to_triton(machine, slow, monkeypatch):
    devices = iter((0, 1, 0) * 2)
    monkeypatch.setattr(_launch, "_get_device", lambda x: next(devices))
    for _ in range(2):
        launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 2


def test_hooks_see_every_launch(machine, slow):
    seen: list = []
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    with hook(seen.append):
        launch(scaled_add_kernel, 1, arguments(), SIZE)
        machine.launches[-1][7](machine.launches[-1][6])  # as the launcher does
    launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 2 and len(seen) == 1
    scaled_add_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(args))
    try:
        launch(scaled_add_kernel, 1, arguments(), SIZE)
    finally:
        scaled_add_kernel.pre_run_hooks.clear()
    assert len(slow) == 3 and len(seen) == 2


@contextmanager
def hook(function):
    where = _launch._watched
    before = where.launch_enter_hook
    if hasattr(before, "add"):
        before.add(function)
    else:
        where.launch_enter_hook = function
    yield
    if hasattr(before, "remove"):
        before.remove(function)
    else:
        where.launch_enter_hook = before


class Interpreted:
    """A kernel as the interpreter has it: no parts to call directly."""

    def __init__(self, result=None):
        self.calls, self.result, self.pre_run_hooks = [], result, []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append((grid, args, options))
            return self.result

        return run


def test_kernels_of_another_kind_are_called_as_ever(machine):
    kernel = Interpreted()
    for _ in range(2):
        launch(kernel, 5, (torch.ones(3), None, 7), {"K": 64})
    grid, args, options = kernel.calls[1]
    assert len(kernel.calls) == 2 and grid == (5,) and args[1:] == (None, 7)
    assert options == {"K": 64, "num_warps": 4, "num_stages": 1}


def test_a_compiled_kernel_of_another_make_is_called_as_ever(machine, slow, monkeypatch):
    """An AMD kernel, and one of a Triton that is not known to us: without the parts that a launch needs."""
    cuda, amd = (SimpleNamespace(target=target) for target in (machine.target, GPUTarget("hip", "gfx942", 64)))
    unknown = SimpleNamespace(metadata=cuda, run=None, function=1, packed_metadata=())
    for made in (unknown, SimpleNamespace(metadata=amd, run=print, function=1, packed_metadata=()), None):
        monkeypatch.setattr(JITFunction, "run", lambda self, *args, made=made, **kwargs: slow.append(self) or made)
        for _ in range(2):
            launch(scaled_add_kernel, 1, arguments(), SIZE)
    assert len(slow) == 6 and not machine.launches


def test_a_launcher_is_launch_with_its_settings_kept(machine, slow):
    launcher = Launcher(scaled_add_kernel, SIZE, num_warps=2)
    for _ in range(2):
        launcher(3, arguments())
    assert len(slow) == 1 and machine.launches[1][:3] == (3, 1, 1) and machine.launches[1][5][0] == 2


def test_empty_as(monkeypatch):
    """Without memory by the slow allocation: the quick one would import for 0.3 s, in every rehearsal."""
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert described(_launch.empty_as(x)) == described(x)
    assert _launch.empty_as(x, torch.float32).dtype == torch.float32
    monkeypatch.setattr(torch, "empty_like", None)
    assert described(_launch.empty_as(x.to("meta"))) == (x.shape, x.dtype, "meta")
    assert _launch.empty_as(x.to("meta"), torch.float32).dtype == torch.float32


def described(x: torch.Tensor) -> tuple:
    return x.shape, x.dtype, x.device.type


def instead_of_compiling(machine, see=lambda kernel: None):
    """A `JITFunction._do_compile` that compiles nothing and shows the kernel to `see`."""

    def fake(self, key, signature, device, constexprs, options, attrs, warmup):
        see(self)
        made = SimpleNamespace(
            metadata=SimpleNamespace(target=machine.target),
            function=5,
            packed_metadata=(4, 1, 0),
            run=machine.run,
            launch_metadata=lambda *_: None,
        )
        self.device_caches[device][0][key] = made
        return made

    return fake


@pytest.mark.parametrize("kernel", our_kernels(), ids=lambda kernel: kernel.fn.__name__)
def test_our_kernels_are_launched_directly(machine, slow, monkeypatch, kernel):
    """Every kernel takes the short way from its second call on, with the arguments where Triton
    puts them. Nothing is compiled: only the way there is of interest."""
    monkeypatch.setattr(JITFunction, "_do_compile", instead_of_compiling(machine))
    values = iter(range(1, 100))
    before = [p for p in kernel.params if not p.is_constexpr]
    args = tuple(_value(p, next(values)) for p in before)
    constants = {p.name: 64 + next(values) for p in kernel.params if p.is_constexpr}
    for _ in range(3):
        launch(kernel, 3, args, constants)
    assert len(slow) == 1, "an integer argument is missing in do_not_specialize"
    assert {plain(launched) for launched in machine.launches} == {plain(machine.launches[0])}
    assert len(machine.launches[0]) == 9 + len(kernel.params)


def _value(parameter, number: int):
    if parameter.do_not_specialize:
        return number
    return 0.5 * number if parameter.name == "scale" else torch.ones(64)
