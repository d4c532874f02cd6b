"""The one tolerance of the project: an error budget derived from the naive implementation's own error.

    rms(actual - ref) / rms(ref)  <=  2 e + c eps,      e = rms(naive - ref) / rms(ref)

`ref` is computed in float64, `naive` by the plain implementation on the same inputs (float32 inside, result cast to the
tested dtype). `eps` is one rounding step of the arithmetic that was tested, `c` how many steps the design may add.

float64 has no wider reference from which `e` could be learnt. So for float64 `naive` runs in float32, and its error is
multiplied by 2^-29, the ratio of the two rounding steps. `eps` is then far below a rounding step of float32, so that a
single step in float32 inside the tested code fails.
"""

import math

import torch
from torch import Tensor

_LOW_PRECISION_EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# A gate gradient is a difference of large terms. It is given more steps where the code computes in no wider dtype.
GATE_C = {torch.bfloat16: 8.0, torch.float16: 8.0, torch.float64: 8.0}


def relative_rms(actual: Tensor, reference: Tensor) -> float:
    """`rms(actual - reference) / rms(reference)` in float64, or `rms(actual)` if the reference is zero everywhere."""
    return _rms(actual, reference) / (_rms(reference) or 1.0)


def _rms(x: Tensor, reference: Tensor | None = None) -> float:
    x = x.detach().double()
    if x.numel() == 0:
        return 0.0
    x = x if reference is None else x - reference.detach().double().to(x.device)
    return x.square().mean().sqrt().item()


def rounding_step(dtype: torch.dtype, backend: str = "torch", gate: bool = False) -> float:
    """The budget's `eps` for arithmetic in `dtype` on `backend`. `gate`: for the gradient of a log decay."""
    if dtype in _LOW_PRECISION_EPS:
        return _LOW_PRECISION_EPS[dtype]
    if dtype == torch.float64:
        return 2.0**-46
    if dtype != torch.float32:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if backend == "triton":
        return 2.0**-20
    return 2.0**-21 if gate else 2.0**-22


def assert_within_budget(
    name: str,
    actual: Tensor,
    reference64: Tensor,
    naive_actual: Tensor,
    c: float | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
    gate: bool = False,
    eps: float | None = None,
) -> None:
    """Fail unless `actual` is within `2 e + c eps` of `reference64`, relative RMS (`e` is that of `naive_actual`).

    `actual` must also have the reference's shape, the dtype of `naive_actual` (float32 where float64 is tested), and no
    NaN or infinity. A reference that is zero, or so small that naive's own error is larger (the rest of terms that
    cancel), is compared absolutely, as for values of size 1. `dtype` is what was computed in (a float32 state of a
    bfloat16 op has bfloat16's budget), by default that of `actual`; `backend` ("torch", "triton") by default follows
    the device. `gate`: the gradient of a log decay, whose budget is wider (`GATE_C`). `eps` overrides the rounding
    step. Raises AssertionError with the numbers.
    """
    dtype = actual.dtype if dtype is None else dtype
    backend = backend or ("triton" if actual.is_cuda else "torch")
    if c is None:
        c = GATE_C.get(dtype, 2.0) if gate else 2.0
    eps = rounding_step(dtype, backend, gate) if eps is None else eps
    if actual.shape != reference64.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(reference64.shape)}")
    if naive_actual.shape != reference64.shape:
        raise AssertionError(
            f"{name}: the naive result has shape {list(naive_actual.shape)}, not {list(reference64.shape)}"
        )
    ratio = 2.0**-29 if (actual.dtype, naive_actual.dtype) == (torch.float64, torch.float32) else 1.0
    if actual.dtype != naive_actual.dtype and ratio == 1.0:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {naive_actual.dtype}")
    if not torch.isfinite(reference64).all():
        raise AssertionError(f"{name}: the reference itself is not finite")
    bad = ~torch.isfinite(actual.detach())
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} values are NaN or infinite, the first at {first}"
        )
    size, naive_error = _rms(reference64), _rms(naive_actual, reference64)
    if not math.isfinite(naive_error):
        raise AssertionError(f"{name}: the naive result is not finite, so it gives no budget")
    size = size if size > naive_error else 1.0
    error, naive_error = _rms(actual, reference64) / size, naive_error / size * ratio
    budget = 2 * naive_error + c * eps
    if not error <= budget:
        worst = (actual.detach().double() - reference64.detach().double().to(actual.device)).abs()
        at = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{name}: relative RMS error {error:.3g} is over the budget {budget:.3g} = "
            f"2 * {naive_error:.3g} + {c:g} * {eps:.3g} ({dtype}, {backend}); "
            f"largest error {worst.max():.3g} at {at}: got {actual[at].item():.6g}, "
            f"expected {reference64[at].item():.6g}"
        )
