"""Initial weights by rules of a layer's own. Values are computed and drawn in float32, whatever the dtype of the
parameter, and parameters that were loaded from a checkpoint are left as they are."""

import torch
from torch import Tensor, nn


def fill_(parameter: Tensor, values: Tensor | float) -> None:
    """Set a parameter to `values`, unless it was loaded from a checkpoint."""
    if not is_loaded(parameter):
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))


def orthogonal_(parameter: Tensor, gain: float = 1.0) -> None:
    """Set a matrix to an orthogonal one times `gain`, drawn in float32, unless it was loaded from a checkpoint."""
    if not is_loaded(parameter):
        fill_(parameter, nn.init.orthogonal_(torch.empty_like(parameter, dtype=torch.float32), gain))


def uniform_(parameter: Tensor, bound: float) -> None:
    """Draw a parameter between `-bound` and `bound`, in float32, unless it was loaded from a checkpoint."""
    if not is_loaded(parameter):
        fill_(parameter, torch.empty_like(parameter, dtype=torch.float32).uniform_(-bound, bound))


def is_loaded(parameter: Tensor) -> bool:
    """Whether a checkpoint has set the parameter: transformers marks what it has loaded."""
    return getattr(parameter, "_is_hf_initialized", False)
