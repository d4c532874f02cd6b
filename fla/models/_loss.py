"""The loss of a causal LM: which criterion, on what, and by how many targets it is divided."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from fla.modules._linear import is_plain_linear

logger = logging.get_logger(__name__)
IGNORE_INDEX = -100


def causal_lm_loss(
    x: Tensor,
    targets: Tensor,
    head: nn.Module,
    config: Any,
    criterion: Any,
    num_items: int | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss of hidden states `[B, T, D]` against targets `[B, T]`, and the logits unless the config asks for none.

    `criterion` None: by the config. With `num_items` the loss is the sum over targets divided by it. Without a target
    it is 0, and so are its gradients.
    """
    linear = config.fuse_linear_cross_entropy
    if criterion is None:
        fused: Any = FusedLinearCrossEntropyLoss if linear else FusedCrossEntropyLoss
        choice = fused if linear or config.fuse_cross_entropy else nn.CrossEntropyLoss
        if choice is nn.CrossEntropyLoss and num_items is None:
            num_items = _count(targets)  # PyTorch's own mean of no targets is NaN
        criterion = choice(reduction="mean" if num_items is None else "sum")
    elif num_items is not None and getattr(criterion, "reduction", None) in ("mean", "sum"):
        criterion = copy.copy(criterion)
        criterion.reduction = "sum"
    logits = None
    if not linear:
        logits = head(x)
        loss = criterion(logits.flatten(0, 1), targets.flatten())
    elif is_plain_linear(head, x):
        plain: Any = head
        loss = criterion(x, targets, plain.weight, plain.bias)
    else:
        loss = _without_head(criterion, head)(head(x).flatten(0, 1), targets.flatten())
    if num_items is None:
        return loss, logits
    if getattr(criterion, "reduction", None) != "sum":  # a caller's own function, which is taken to return a mean
        loss = loss * _count(targets)
    items = num_items.to(loss.device).clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return loss / items, logits


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORE_INDEX).sum()


def _without_head(criterion: Any, head: nn.Module) -> nn.Module:
    """The loss of logits that equals a loss which multiplies by the head itself."""
    if not isinstance(criterion, FusedLinearCrossEntropyLoss):
        raise ValueError(
            f"criterion must be a FusedLinearCrossEntropyLoss where lm_head ({type(head).__name__}) has to be called, "
            f"got {type(criterion).__name__}; or set the config's fuse_linear_cross_entropy to False"
        )
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "fuse_linear_cross_entropy has no effect: lm_head is more than an nn.Linear with its weight at hand (an "
            "adapter, hooks, offloaded or sharded), so the loss is computed from all logits"
        )
    return FusedCrossEntropyLoss(
        criterion.ignore_index,
        criterion.reduction,
        criterion.label_smoothing,
        criterion.logit_scale,
        logit_softcapping=criterion.logit_softcapping,
    )
