"""Cross entropy with label smoothing, logit scale, soft cap and a penalty on the log-sum-exp.

    z = logit_scale * logits
    z = cap * tanh(z / cap)          if cap = logit_softcapping is given
    lse = logsumexp(z)
    loss = lse - (1 - s) z[y] - s mean(z) + lse_square_scale * lse^2          s = label_smoothing

`logits` [N, V], target classes `y` [N]. Losses are float32 (float64 for float64), and 0 where the target is
`ignore_index`. Family: `fused`.
Papers: https://arxiv.org/abs/1512.00567 (smoothing), https://arxiv.org/abs/2204.02311 (z-loss)
"""

from typing import Any

from torch import Tensor, nn

from fla.backends import fused


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The losses [N], and their part that comes from `lse_square_scale` [N], which is for logging and has no gradient.

    `logits` [N, V], `target` [N]. `inplace_backward`: the gradient overwrites the logits.

    Raises:
        TypeError: the targets are no integers.
        ValueError: a shape does not fit, a target on the CPU is no class, or `process_group` is given.
    """
    if process_group is not None:
        raise ValueError("process_group must be None: a vocabulary spread over ranks is not supported yet")
    options = fused.CrossEntropy(
        ignore_index, label_smoothing, logit_scale, lse_square_scale, logit_softcapping, inplace_backward
    )
    return fused.cross_entropy(logits, target, options)


class FusedCrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` with a reduction: "mean" over the targets that are not ignored, "sum" or "none".

    If all targets are ignored, the mean is 0 and so are its gradients (`torch.nn.CrossEntropyLoss` gives NaN), so that
    a micro-batch without targets does not spoil the step that it is part of.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        logit_softcapping: float | None = None,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        # raises for bad settings
        fused.CrossEntropy(ignore_index, label_smoothing, logit_scale, lse_square_scale, logit_softcapping)
        self.ignore_index, self.reduction, self.return_z_loss = ignore_index, reduction, return_z_loss
        self.label_smoothing, self.logit_scale, self.lse_square_scale = label_smoothing, logit_scale, lse_square_scale
        self.logit_softcapping, self.inplace_backward = logit_softcapping, inplace_backward
        self.process_group = process_group

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss of logits `input` [N, V] for `target` [N]; `(loss, z_loss)` with `return_z_loss`."""
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.logit_softcapping,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        if self.reduction != "none":
            losses, z_losses = losses.sum(), z_losses.sum()
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum().clamp(min=1)
            losses, z_losses = losses / count, z_losses / count
        return (losses, z_losses) if self.return_z_loss else losses
