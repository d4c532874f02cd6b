"""When a linear layer's weight may be used without calling the layer."""

from torch import Tensor, nn


def is_plain_linear(linear: nn.Module, x: Tensor) -> bool:
    """Whether `linear(x)` is `x @ weight.T + bias` and nothing else, with the parameters at hand.

    Not so: an adapter or a quantised or sharded class in its place, hooks, a replaced `forward` (accelerate's
    offloading), parameters that are on another device or of a tensor class of their own (DTensor).
    """
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    parameters = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    return all(type(p) in (Tensor, nn.Parameter) and p.device == x.device for p in parameters)
