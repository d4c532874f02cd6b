"""Cross entropy of logits, and of a linear map whose logits never exist all at once."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fla.backends.fused import CrossEntropy
from fla.backends.torch.fused._common import autocast, creating_graph, gradients_with_graph, wide_dtype

_CHUNK_ELEMENTS = 2**24  # elements of a wide temporary in `cross_entropy`: 64 MiB in float32


class _Scores(NamedTuple):
    """The scores `z = top + below` of rows of logits: `top` [N, 1] is a row's largest score, and `below` <= 0.

    A loss is a difference of scores. If all scores of a row are near 10^6, float32 rounds them to multiples of 1/16,
    so losses are computed from `below`, which holds the differences.
    """

    below: Tensor
    top: Tensor

    def full(self) -> Tensor:
        return self.below + self.top


def _scores(logits: Tensor, options: CrossEntropy) -> _Scores:
    """The scores of `logits` in a wide dtype, whose memory is overwritten where possible."""
    scale, cap = options.logit_scale, options.logit_softcapping
    if cap is not None:
        z = torch.tanh(logits * (scale / cap)) * cap
        top = z.detach().amax(-1, keepdim=True)
        return _Scores(z - top, top)
    # subtract before scaling: the product with an offset would round the differences away
    peak = logits.detach().amax(-1, keepdim=True) if scale >= 0 else logits.detach().amin(-1, keepdim=True)
    below = logits.sub_(peak)
    return _Scores(below if scale == 1.0 else below.mul_(scale), peak * scale)


def _wide_scores(logits: Tensor, options: CrossEntropy) -> _Scores:
    return _scores(logits.to(wide_dtype(logits), copy=True), options)


def _losses(scores: _Scores, target: Tensor, options: CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """For every row the loss [N], its z-loss part [N], which comes from `lse_square_scale`, and `lse - top` [N, 1]."""
    below, ignored = scores.below, target == options.ignore_index
    lse = below.exp().sum(-1, keepdim=True).log()
    chosen = below.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1))
    penalty = options.lse_square_scale * (lse + scores.top).square().squeeze(-1)
    loss = (lse - (1 - options.label_smoothing) * chosen).squeeze(-1) + penalty
    if options.label_smoothing:
        loss = loss - options.label_smoothing * below.mean(-1)
    return loss.masked_fill(ignored, 0), penalty.masked_fill(ignored, 0), lse


def _loss(logits: Tensor, target: Tensor, options: CrossEntropy) -> Tensor:
    return _losses(_wide_scores(logits, options), target, options)[0]


def _gradient(scores: _Scores, target: Tensor, lse: Tensor, dloss: Tensor, options: CrossEntropy) -> Tensor:
    """The gradient of `sum(dloss * loss)` with respect to the logits [N, V]; `lse` is the third result of `_losses`."""
    ignored = target == options.ignore_index
    dz = (scores.below - lse).exp_().mul_(1 + 2 * options.lse_square_scale * (lse + scores.top))
    if options.label_smoothing:
        dz.sub_(options.label_smoothing / dz.shape[-1])
    target_column = target.masked_fill(ignored, 0).unsqueeze(-1)
    dz.scatter_add_(-1, target_column, torch.full_like(target_column, options.label_smoothing - 1, dtype=dz.dtype))
    dz.mul_((dloss.masked_fill(ignored, 0) * options.logit_scale).unsqueeze(-1))
    if options.logit_softcapping is not None:
        dz.mul_(1 - (scores.full() / options.logit_softcapping).square_())
    return dz


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of logits. Rows are processed in chunks, so that no wide copy of all logits is made."""

    @staticmethod
    def forward(ctx, logits, target, options):
        step = max(1, _CHUNK_ELEMENTS // max(logits.shape[1], 1))
        parts = [
            _losses(_wide_scores(logits[i : i + step], options), target[i : i + step], options)
            for i in range(0, max(len(logits), 1), step)
        ]
        losses, penalties, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, target, lse)
        ctx.options, ctx.step = options, step
        ctx.mark_non_differentiable(penalties)
        return losses, penalties

    @staticmethod
    def backward(ctx, dloss, _):
        logits, target, lse = ctx.saved_tensors
        if creating_graph():
            plain = functools.partial(_loss, target=target, options=ctx.options)
            return *gradients_with_graph(plain, (logits,), ctx.needs_input_grad[:1], dloss), None, None
        # not in a compiled graph, which plans its memory itself and may still read the logits
        inplace = ctx.options.inplace_backward and not torch.compiler.is_compiling()
        dlogits = logits if inplace else torch.empty_like(logits)
        for i in range(0, len(logits), ctx.step):
            rows = slice(i, i + ctx.step)
            scores = _wide_scores(logits[rows], ctx.options)
            dlogits[rows] = _gradient(scores, target[rows], lse[rows], dloss[rows], ctx.options).to(logits.dtype)
        return dlogits, None, None


def cross_entropy(logits: Tensor, target: Tensor, options: CrossEntropy) -> tuple[Tensor, Tensor]:
    return _CrossEntropy.apply(logits, target, options)


def _matmul(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` with a wide result: rounding the logits to bfloat16 would be the largest error of the loss."""
    if a.dtype == wide:
        return a @ b
    if "dtype" in torch.ops.aten.mm.overloads():  # since torch 2.8
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear map.

    The forward pass computes the gradients too, chunk by chunk, while a chunk's logits exist; the backward pass scales
    them. They are kept before the division by the number of targets, whose results may be too small for float16.
    """

    @staticmethod
    def forward(ctx, x, target, weight, bias, num_chunks, wide_weight_grad, need_grad, mean, options):
        wide = wide_dtype(x)
        dtype = x.dtype if x.is_cuda else wide  # without tensor cores, products run in the wide dtype: cast once
        u, w = x.to(dtype), weight.to(dtype)
        needs = [need_grad and need for need in ctx.needs_input_grad]
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=wide if wide_weight_grad else None) if needs[2] else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[3] else None
        total, step = x.new_zeros((), dtype=wide), max(1, -(-len(x) // num_chunks))
        with torch.autocast(x.device.type, enabled=False):  # autocast would undo the choice of dtypes made here
            for i in range(0, len(x), step):
                rows = slice(i, i + step)
                logits = _matmul(u[rows], w.t(), wide)
                scores = _scores(logits if bias is None else logits.add_(bias), options)
                losses, _, lse = _losses(scores, target[rows], options)
                total = total + losses.sum()
                if any(needs):
                    dlogits = _gradient(scores, target[rows], lse, torch.ones_like(losses), options)
                    if dbias is not None:
                        dbias += dlogits.sum(0)
                    dlogits = dlogits.to(dtype)
                    if dx is not None:
                        dx[rows] = (dlogits @ w).to(x.dtype)
                    if dweight is not None:
                        dweight += _matmul(dlogits.t(), u[rows], wide)
        count = (target != options.ignore_index).sum().clamp(min=1).to(wide) if mean else torch.ones_like(total)
        ctx.save_for_backward(dx, dweight, dbias, count)
        ctx.dtypes = tuple(p if p is None else p.dtype for p in (x, weight, bias))
        return total / count

    @staticmethod
    def backward(ctx, dloss):
        if creating_graph():
            raise RuntimeError(
                "linear_cross_entropy has no second derivatives: its gradients are formed in the forward pass; "
                "apply the linear map and FusedCrossEntropyLoss instead"
            )
        *gradients, count = ctx.saved_tensors
        factor = dloss / count
        scaled = (
            None if d is None else (d.to(factor.dtype) * factor).to(dtype)
            for d, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        dx, dweight, dbias = scaled
        return dx, None, dweight, dbias, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_chunks: int,
    wide_weight_grad: bool,
    mean: bool,
    options: CrossEntropy,
) -> Tensor:
    tensors = autocast(x, weight, bias)
    need_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        tensors[0], target, *tensors[1:], num_chunks, wide_weight_grad, need_grad, mean, options
    )
