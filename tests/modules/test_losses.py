"""Cross entropy: against PyTorch's own, reductions, what is ignored, and how much memory the linear form takes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fla.backends.torch.fused import loss as torch_loss
from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.testing import assert_within_budget, relative_rms

N, D, V = 50, 12, 37


@pytest.fixture
def problem():
    target = torch.randint(V, (N,))
    target[::7] = -100
    return torch.randn(N, D), target, torch.randn(V, D), torch.randn(V)


class Sizes(TorchDispatchMode):
    """Records the elements of every tensor that an operator returns, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__
        for y in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(y, torch.Tensor):
                self.largest = max(self.largest, y.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_matches_torch(problem, reduction, smoothing):
    target = problem[1]
    logits = torch.randn(N, V, requires_grad=True)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    actual = FusedCrossEntropyLoss(**options)(logits, target)
    expected64 = F.cross_entropy(logits.double(), target, **options)
    assert_within_budget("loss", actual, expected64, F.cross_entropy(logits, target, **options))
    (grad,) = torch.autograd.grad(actual.sum(), logits)
    (grad64,) = torch.autograd.grad(expected64.sum(), logits)
    (naive,) = torch.autograd.grad(F.cross_entropy(logits, target, **options).sum(), logits)
    assert_within_budget("dlogits", grad, grad64.double(), naive)
    assert not grad[::7].any()


def test_another_ignore_index_and_integer_targets(problem):
    logits, target = torch.randn(N, V), torch.randint(V, (N,), dtype=torch.int32)
    target[3:20] = 5
    expected = F.cross_entropy(logits.double(), target.long(), ignore_index=5)
    actual = FusedCrossEntropyLoss(ignore_index=5)(logits, target)
    assert_within_budget("loss", actual, expected, F.cross_entropy(logits, target.long(), ignore_index=5))


def test_nothing_but_ignored_targets(problem):
    x, target, weight, bias = problem
    ignored = torch.full_like(target, -100)
    logits = torch.randn(N, V, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        criterion = FusedCrossEntropyLoss(reduction=reduction, lse_square_scale=0.1, return_z_loss=True)
        loss, z_loss = criterion(logits, ignored)
        assert not loss.any() and not z_loss.any() and not torch.autograd.grad(loss.sum(), logits)[0].any()
    leaves = [z.requires_grad_() for z in (x, weight, bias)]
    loss = FusedLinearCrossEntropyLoss()(x, ignored, weight, bias)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_no_rows():
    assert FusedCrossEntropyLoss(reduction="sum")(torch.zeros(0, V), torch.zeros(0, dtype=torch.long)).item() == 0
    x, weight = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = fused_linear_cross_entropy_loss(x, torch.zeros(0, dtype=torch.long), weight)
    assert loss.item() == 0
    assert [g.shape for g in torch.autograd.grad(loss, (x, weight))] == [x.shape, weight.shape]


def test_z_loss_is_part_of_the_loss_and_has_no_gradient(problem):
    logits, target = torch.randn(N, V, requires_grad=True), problem[1]
    loss, z_loss = FusedCrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)(logits, target)
    plain = F.cross_entropy(logits.double(), target)
    expected = 0.1 * logits.double().logsumexp(-1)[target >= 0].square().mean()
    assert not z_loss.requires_grad
    assert_within_budget("z_loss", z_loss, expected.detach(), expected.detach().float())
    assert_within_budget("loss", loss, (plain + expected).detach(), (plain + expected).detach().float())


def test_inplace_backward_writes_over_the_logits(problem):
    target = problem[1]
    kept, given = (torch.randn(N, V).requires_grad_() for _ in range(2))
    given.data.copy_(kept.data)
    FusedCrossEntropyLoss()(kept, target).backward()
    FusedCrossEntropyLoss(inplace_backward=True)(given, target).backward()
    assert torch.equal(given.grad, kept.grad)
    assert torch.equal(given.detach(), kept.grad) and not torch.equal(kept.detach(), kept.grad)


def test_rows_in_chunks_give_the_same(problem, monkeypatch):
    logits, target = torch.randn(N, V, requires_grad=True), problem[1]

    def both():
        losses, _ = cross_entropy_loss(logits, target, 0.1, 0.5, 0.01, 7.0)
        return losses, *torch.autograd.grad(losses.sum(), logits)

    whole = both()
    monkeypatch.setattr(torch_loss, "_CHUNK_ELEMENTS", 4 * V)
    assert all(torch.equal(a, b) for a, b in zip(whole, both(), strict=True))


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"lse_square_scale": 1e-4},
    "scale": {"logit_scale": 0.7},
    "negative scale": {"logit_scale": -0.3},
    "soft cap": {"logit_softcapping": 5.0},
    "all": {"label_smoothing": 0.1, "logit_scale": 0.7, "logit_softcapping": 9.0, "lse_square_scale": 0.01},
}


def formula(logits, target, label_smoothing=0.0, logit_scale=1.0, logit_softcapping=None, lse_square_scale=0.0):
    """The mean loss by PyTorch's own cross entropy, in the dtype of the logits."""
    z = logits * logit_scale
    z = z if logit_softcapping is None else logit_softcapping * torch.tanh(z / logit_softcapping)
    penalty = lse_square_scale * z.logsumexp(-1)[target >= 0].square().mean()
    return F.cross_entropy(z, target, label_smoothing=label_smoothing) + penalty


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("offset", [300.0, 1e4, 1e6])
def test_a_common_offset_of_the_logits_costs_no_digits(problem, offset, options):
    x, target, weight, _ = problem
    logits = (x @ weight.T + offset).requires_grad_()  # rounded here, so that all that follows sees the same numbers
    runs = []
    for z in (logits, logits.detach().double().requires_grad_(), logits):
        ours = z is logits and not runs
        loss = FusedCrossEntropyLoss(**options)(z, target) if ours else formula(z, target, **options)
        runs.append((loss, *torch.autograd.grad(loss, z)))
    for name, y, y64, naive in zip(("loss", "dlogits"), *runs, strict=True):
        assert_within_budget(name, y, y64, naive)


@pytest.mark.parametrize("options", ["plain", "smoothing", "scale"])
def test_linear_form_with_a_common_offset(problem, options):
    """The products are small integers, exact in float32, and the bias lifts them all."""
    target, options = problem[1], OPTIONS[options]
    x, weight = (torch.randint(-2, 3, (size, D)).float().requires_grad_() for size in (N, V))
    runs = []
    for dtype, ours in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        leaves = [z.detach().to(dtype).requires_grad_() for z in (x, weight, torch.full((V,), 1e6))]
        if ours:
            loss = fused_linear_cross_entropy_loss(leaves[0], target, leaves[1], leaves[2], **options)
        else:
            loss = formula(F.linear(*leaves), target, **options)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    for name, y, y64, naive in zip(("loss", "dx", "dweight", "dbias"), *runs, strict=True):
        assert_within_budget(name, y, y64, naive)


@pytest.mark.parametrize("classes", [151, 32003])
def test_classes_beside_the_vocabulary_do_not_count(classes):
    logits = torch.full((3, classes), -30.0)
    logits[:, classes - 1] = 2.0
    target, logits = torch.tensor([classes - 1, 0, -100]), logits.requires_grad_()
    losses, _ = cross_entropy_loss(logits, target)
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    assert_within_budget("loss", losses, expected, F.cross_entropy(logits, target, reduction="none"))
    (grad,), (grad64,) = (torch.autograd.grad(z.sum(), logits) for z in (losses, expected))
    assert_within_budget("dlogits", grad, grad64, grad64)


def test_linear_form_equals_the_two_steps(problem):
    x, target, weight, bias = (z.double() if z.is_floating_point() else z for z in problem)
    leaves = [z.requires_grad_() for z in (x, weight, bias)]
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
        for num_chunks in (1, 3, 8, 200):
            module = FusedLinearCrossEntropyLoss(num_chunks=num_chunks, reduction=reduction)
            actual = module(x, target, weight, bias)
            assert_within_budget("loss", actual, expected, expected)
            pairs = zip(
                torch.autograd.grad(actual, leaves),
                torch.autograd.grad(expected, leaves, retain_graph=True),
                strict=True,
            )
            for name, (grad, grad64) in zip("xwb", pairs, strict=True):
                assert_within_budget(f"d{name}", grad, grad64, grad64)


def test_linear_form_takes_batches_and_scales_with_the_upstream_gradient(problem):
    x, target, weight, _ = problem
    x.requires_grad_()
    flat = fused_linear_cross_entropy_loss(x, target, weight)
    batched = fused_linear_cross_entropy_loss(x.view(2, N // 2, D), target.view(2, N // 2), weight)
    assert torch.equal(flat, batched)
    (one,), (three,) = (torch.autograd.grad(factor * flat, x, retain_graph=True) for factor in (1.0, 4.0))
    assert torch.equal(4 * one, three)


def test_linear_form_never_holds_all_logits():
    N, D, V = 256, 8, 512
    x, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target = torch.randint(V, (N,))
    with Sizes() as chunked:
        fused_linear_cross_entropy_loss(x, target, weight, num_chunks=8).backward()
    with Sizes() as whole:
        F.cross_entropy(x @ weight.T, target).backward()
    assert whole.largest == N * V
    assert chunked.largest == N * V // 8


def test_linear_form_forms_no_gradients_that_nobody_wants(problem):
    x, target, weight, _ = problem
    counts = []
    for x_grad, weight_grad, recorded in ((True, True, True), (True, False, True), (True, True, False)):
        leaves = x.clone().requires_grad_(x_grad), weight.clone().requires_grad_(weight_grad)
        with torch.set_grad_enabled(recorded), Sizes() as sizes:
            fused_linear_cross_entropy_loss(leaves[0], target, leaves[1], num_chunks=5)
        counts.append(sizes.products)
    assert counts == [15, 10, 5]


def test_float16_gradients_survive_many_tokens():
    N = 4096
    x, weight = (torch.randn(size, D, dtype=torch.float16, requires_grad=True) for size in (N, V))
    loss = fused_linear_cross_entropy_loss(x, torch.randint(V, (N,)), weight)
    (grad,) = torch.autograd.grad(loss * 2.0**14, x)  # as gradient scaling does
    assert (grad == 0).float().mean() < 0.01 and grad.isfinite().all()


def test_weight_gradient_summed_in_float32_is_closer():
    x, target = torch.randn(2048, D, dtype=torch.bfloat16), torch.randint(V, (2048,))
    weight = torch.randn(V, D, dtype=torch.bfloat16)
    w64 = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(x.double() @ w64.T, target), w64)
    errors = []
    for wide in (True, False):
        w = weight.clone().requires_grad_()
        loss = fused_linear_cross_entropy_loss(x, target, w, num_chunks=64, accumulate_grad_in_fp32=wide)
        errors.append(relative_rms(torch.autograd.grad(loss, w)[0], expected))
    assert errors[0] < 0.7 * errors[1]


def test_linear_form_under_autocast(problem):
    x, target, weight, _ = problem
    low = [z.bfloat16().float().requires_grad_() for z in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_cross_entropy_loss(low[0], target, low[1])
    expected = fused_linear_cross_entropy_loss(low[0], target, low[1])
    assert torch.equal(loss, expected)
    assert [g.dtype for g in torch.autograd.grad(loss, low)] == [torch.float32, torch.float32]


def test_linear_form_refuses_second_derivatives(problem):
    x, target, weight, _ = problem
    x.requires_grad_()
    loss = fused_linear_cross_entropy_loss(x, target, weight)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def meta(x):
    return torch.empty_like(x, device="meta")


BAD = [
    (lambda x, y, w: FusedCrossEntropyLoss()(x, y.tolist()), TypeError, "target must"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x.tolist(), y), TypeError, "logits must"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x, meta(y)), ValueError, "target must be on cpu"),
    (lambda x, y, w: FusedCrossEntropyLoss(label_smoothing="0.1"), TypeError, "label_smoothing"),
    (lambda x, y, w: FusedCrossEntropyLoss(logit_scale=float("nan")), ValueError, "logit_scale"),
    (lambda x, y, w: FusedCrossEntropyLoss(ignore_index=None), TypeError, "ignore_index"),
    (lambda x, y, w: FusedLinearCrossEntropyLoss(-100, 0.0, 1.0, 8, "mean"), TypeError, "num_chunks"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x.tolist(), y, w), TypeError, "x must"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y.tolist(), w), TypeError, "target must"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x[None], y.tolist(), w), TypeError, "target must"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w.tolist()), TypeError, "weight must"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w, [0.0]), TypeError, "bias must"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, meta(w)), ValueError, "weight must be on cpu.*not there"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w, meta(w[:, 0])), ValueError, "bias must be on cpu"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, meta(y), w), ValueError, "target must be on cpu"),
    (lambda x, y, w: FusedCrossEntropyLoss(reduction="avg"), ValueError, "reduction"),
    (lambda x, y, w: FusedLinearCrossEntropyLoss(reduction="none"), ValueError, "reduction"),
    (lambda x, y, w: FusedCrossEntropyLoss(label_smoothing=1.5)(x, y), ValueError, "label_smoothing"),
    (lambda x, y, w: FusedCrossEntropyLoss(logit_softcapping=0.0)(x, y), ValueError, "logit_softcapping"),
    (lambda x, y, w: FusedCrossEntropyLoss(process_group=object())(x, y), ValueError, "process_group"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x, y.float()), TypeError, "target"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x, y[:3]), ValueError, "target"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x[0], y), ValueError, "logits"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x, y + D), ValueError, "target"),
    (lambda x, y, w: FusedCrossEntropyLoss()(x, torch.full_like(y, -1)), ValueError, "target"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w.T), ValueError, "weight"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w, w[0]), ValueError, "bias"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w, num_chunks=0), ValueError, "num_chunks"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x, y, w, use_l2warp=True), ValueError, "use_l2warp"),
    (lambda x, y, w: fused_linear_cross_entropy_loss(x.long(), y, w), TypeError, "x must be"),
]


@pytest.mark.parametrize(("call", "error", "word"), BAD)
def test_errors_name_the_argument(call, error, word):
    with pytest.raises(error, match=word):
        call(torch.randn(N, D), torch.randint(D, (N,)), torch.randn(V, D))
