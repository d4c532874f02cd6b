"""Cross entropy of a linear map whose logits never exist all at once.

    loss = reduce_n CE(softcap(logit_scale * (x_n W^T + b)), y_n)

Tokens are processed in `num_chunks` chunks, and the gradients of `x`, `W`, `b` are computed together with the loss, so
that the largest temporary is one chunk's logits [N / num_chunks, V]. `x` [N, D] or [B, T, D], `W` [V, D].
Family: `fused`. Paper: https://arxiv.org/abs/2410.10989
"""

from torch import Tensor, nn

from fla.backends import fused


def fused_linear_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
) -> Tensor:
    """The loss as a float32 scalar; 0 if all targets are ignored.

    Args:
        x, target: `[N, D]` and `[N]`, or `[B, T, D]` and `[B, T]`.
        weight, bias: `[V, D]` and `[V]`.
        reduction: "mean" over the targets that are not ignored, or "sum".
        use_l2warp, l2_penalty_factor: accepted for compatibility; `use_l2warp` must be False.
        accumulate_grad_in_fp32: sum the chunks' contributions to the weight's gradient in float32, not in the weight's
            dtype.

    Raises:
        TypeError: the targets are no integers.
        ValueError: a shape does not fit, a tensor is not on the device of `x`, a target on the CPU is no class, or
            `use_l2warp` is True.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if use_l2warp:
        raise ValueError(
            f"use_l2warp must be False: it is not supported, and l2_penalty_factor={l2_penalty_factor} has no effect"
        )
    fused.check_float("x", x)
    if x.dim() > 2:
        target = target.flatten() if isinstance(target, Tensor) and target.shape == x.shape[:-1] else target
        x = x.flatten(0, -2)
    return fused.linear_cross_entropy(
        x,
        target,
        weight,
        bias,
        num_chunks=num_chunks,
        wide_weight_grad=accumulate_grad_in_fp32,
        mean=reduction == "mean",
        options=fused.CrossEntropy(ignore_index, label_smoothing, logit_scale, 0.0, logit_softcapping),
    )


class FusedLinearCrossEntropyLoss(nn.Module):
    """`fused_linear_cross_entropy_loss` as a module. A call passes the parameters of the linear map."""

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        logit_softcapping: float | None = None,
        num_chunks: int = 8,
        reduction: str = "mean",
        use_l2warp: bool = False,
        l2_penalty_factor: float = 1e-4,
        accumulate_grad_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        # raises for bad settings
        fused.CrossEntropy(ignore_index, label_smoothing, logit_scale, 0.0, logit_softcapping)
        fused.check_count("num_chunks", num_chunks)
        self.ignore_index, self.label_smoothing, self.logit_scale = ignore_index, label_smoothing, logit_scale
        self.logit_softcapping, self.num_chunks, self.reduction = logit_softcapping, num_chunks, reduction
        self.use_l2warp, self.l2_penalty_factor = use_l2warp, l2_penalty_factor
        self.accumulate_grad_in_fp32 = accumulate_grad_in_fp32

    def forward(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of `x @ weight.T + bias` for `target`."""
        return fused_linear_cross_entropy_loss(
            x,
            target,
            weight,
            bias,
            self.ignore_index,
            self.label_smoothing,
            self.logit_scale,
            self.logit_softcapping,
            self.num_chunks,
            self.reduction,
            self.use_l2warp,
            self.l2_penalty_factor,
            self.accumulate_grad_in_fp32,
        )
