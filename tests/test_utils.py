"""`fla.utils`: what kernels and layers of other programs are written with."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fla import utils
from fla.utils import assert_close, deprecate_kwarg, input_guard, tensor_cache


def test_nothing_is_asked_of_a_gpu_before_its_use():
    code = "import torch; asked = []; torch.accelerator.is_available = lambda: asked.append(1); import fla.utils; "
    code += "assert not asked; fla.utils.device; assert asked"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=300)
    with pytest.raises(ImportError, match="cannot import name 'nope'"):
        from fla.utils import nope  # noqa: F401
    assert not hasattr(utils, "__wrapped__")


def test_the_device(monkeypatch):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert utils.device == expected and utils.device_torch_lib is getattr(torch, expected)
    torch.empty(1, device=utils.device)
    assert utils.IS_AMD in (False, True) and utils.IS_NVIDIA_HOPPER in (False, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not utils._is_hopper()
    assert utils.get_multiprocessor_count() == 1 and utils.get_multiprocessor_count(tensor_idx=0) == 1
    assert not utils.check_shared_mem() and not utils.check_shared_mem("hopper", tensor_idx=0)
    with pytest.raises(ValueError, match=r"arch must be one of .*'hopper', got 'h200'"):
        utils.check_shared_mem("h200")


def test_input_guard():
    x = torch.zeros(2, 3).T

    @input_guard
    def plain(ctx, a, *rest, b=None):
        return [y.is_contiguous() for y in (a, *rest, b)]

    assert plain(None, x, x, b=x) == [True] * 3 and plain.__name__ == "plain"
    assert utils.contiguous(lambda a, b=None: a.is_contiguous() and b)(x, b="kept") == "kept"

    @input_guard(no_guard_contiguous=True)
    def none(a, b):
        return [a.is_contiguous(), b.is_contiguous()]

    @input_guard(no_guard_contiguous=["a"])
    def one(a, b):
        return [a.is_contiguous(), b.is_contiguous()]

    assert none(x, b=x) == [False, False]
    assert one(x, x) == [False, True] and one(b=x, a=x) == [False, True]

    class Double(torch.autograd.Function):
        @staticmethod
        @input_guard
        @utils.autocast_custom_fwd
        def forward(ctx, x):
            assert x.is_contiguous()
            return x * 2

        @staticmethod
        @input_guard
        @utils.autocast_custom_bwd
        def backward(ctx, dy):
            assert dy.is_contiguous()
            return dy * 2

    x.requires_grad_()
    Double.apply(x).T.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_autocast_of_a_function():
    """Forward and backward run with the autocast of the forward, or with inputs cast and autocast off."""
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        @utils.autocast_custom_fwd
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x @ x

        @staticmethod
        @utils.autocast_custom_bwd
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            seen.append((x @ x).dtype)
            return dy @ x.T + x.T @ dy

    class Cast(torch.autograd.Function):
        @staticmethod
        @utils.autocast_custom_fwd(device_type=utils.device, cast_inputs=torch.float32)
        def forward(ctx, x):
            return x @ x

        @staticmethod
        @utils.autocast_custom_bwd(device_type=utils.device)
        def backward(ctx, dy):
            return dy

    device = utils.device
    x = torch.randn(4, 4, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = Square.apply(x)
        assert Cast.apply(x.bfloat16()).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert seen == [torch.bfloat16] and x.grad.dtype == torch.float32


def test_tensor_cache_keeps_the_last_calls():
    calls = []

    @tensor_cache
    def table(x, n, scale=1):
        calls.append(n)
        return x * n * scale

    xs = [torch.arange(4) for _ in range(6)]
    first = table(xs[0], 2, scale=3)
    assert table(xs[0], 2, scale=3) is first and calls == [2]
    assert table(xs[0].clone(), 2, scale=3) is not first
    assert torch.equal(table(xs[0], 2), xs[0] * 2) and table(xs[0], 2, scale=3) is first
    for x in xs[1:5]:
        table(x, 2)
    assert table(xs[4], 2) is table(xs[4], 2)
    count = len(calls)
    table(xs[0], 2, scale=3)
    assert len(calls) == count + 1, "four calls are kept"


def test_tensor_cache_sees_what_is_written_and_can_train():
    @tensor_cache
    def double(x):
        return x * 2

    x = torch.arange(3)
    assert double(x).tolist() == [0, 2, 4]
    x[0] = 5
    assert double(x).tolist() == [10, 2, 4]
    w = torch.ones(3)
    with torch.inference_mode():
        double(w)
        made = torch.ones(3)
        double(made)
        made += 1
        assert double(made).tolist() == [4, 4, 4]
    assert not double(w).is_inference()
    (torch.ones(3, requires_grad=True) * double(w)).sum().backward()


def test_checkpoint_and_require_version():
    runs = []

    @utils.checkpoint
    def square(x):
        runs.append(1)
        return (x * x).sin()

    x = torch.randn(3, requires_grad=True)
    square(x).sum().backward()
    assert len(runs) == 2
    torch.testing.assert_close(x.grad, (x * x).cos() * 2 * x)
    assert utils.require_version("torch>=2.0")(lambda: 1)() == 1
    with pytest.raises(ImportError, match=r"needs torch>=99, got 2.*\. Install it\.$"):
        utils.require_version("torch>=99", "Install it.")(lambda: 1)()
    with pytest.raises(ImportError, match="needs no-such-package, got None"):
        utils.require_version("no-such-package")(lambda: 1)()


def test_deprecate_kwarg():
    @deprecate_kwarg("old", "2.0", "new", additional_message="See the docs")
    def function(a, new=None):
        return a, new

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(1, new=2) == (1, 2)
    said = r"^function: old is deprecated and goes away in version 2\.0; use new\. See the docs$"
    with pytest.warns(DeprecationWarning, match=said) as caught:
        assert function(1, old=2) == (1, 2)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning):
        assert function(1, old=2, new=3) == (1, 3)
    strict = deprecate_kwarg("old", "2.0", "new", raise_if_both_names=True)(lambda new: new)
    with pytest.raises(ValueError, match="old and new are both given"):
        strict(old=1, new=2)
    with pytest.warns(DeprecationWarning):
        assert deprecate_kwarg("old", "2.0")(lambda old: old)(old=1) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deprecate_kwarg("old", "0.6.0", "new")(lambda new: new)(old=1) == 1
    with pytest.warns(DeprecationWarning, match=r"went away in version 0\.6\.0; use new$"):
        assert deprecate_kwarg("old", "0.6.0", "new", True)(lambda new: new)(old=1) == 1
    with pytest.raises(ValueError, match=r"went away in version 0\.6\.0; use new$"):
        deprecate_kwarg("old", "0.6.0", "new", False, True)(lambda new: new)(old=1)


def test_assert_close():
    ref = torch.tensor([3.0, 4.0, 0.0, 0.0])  # its root mean square is 2.5
    assert_close("o", ref, ref, 0.0)
    assert_close("o", ref, ref + 1e-7, 0.0)
    assert_close("o", ref, ref + 0.1, 0.041)
    with pytest.raises(AssertionError, match=r"o: largest difference 0\.1.*, ratio 0\.04.* must be under 0\.03999"):
        assert_close("o", ref, ref + 0.1, 0.04 * (1 - 1e-6))
    assert_close("o", ref, ref + 0.1, 0.0, err_atol=0.2)
    with pytest.warns(UserWarning, match="o: largest difference 0.1"):
        assert_close("o", ref, ref + 0.1, 0.001, warning=True)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            assert_close("o", ref, ref + bad, 10.0)
    with pytest.raises(AssertionError, match="nan"):
        assert_close("o", ref, ref + float("nan"), 10.0, warning=True)
    with pytest.raises(AssertionError, match=r"the shapes are \[4\] and \[2\]"):
        assert_close("o", ref, ref[:2], 10.0)
    assert_close("o", ref[:0], ref[:0], 0.0)
