"""The family `fused` in PyTorch: any device, any float dtype, `torch.compile`, gradients by autograd.

`fla/backends/fused.py` says what each function computes. Arithmetic is float32 (float64 for float64). Tensors that a
gradient needs are kept in their own dtype, or recomputed if keeping them would mean one more activation in memory.
"""

from fla.backends.torch.fused.conv import CausalConv1dFunction, conv, conv_step, token_shift
from fla.backends.torch.fused.glu import glu, glu_linear
from fla.backends.torch.fused.loss import cross_entropy, linear_cross_entropy
from fla.backends.torch.fused.norm import l2norm, norm, norm_linear
from fla.backends.torch.fused.rotary import rotary

__all__ = [
    "CausalConv1dFunction",
    "conv",
    "conv_step",
    "cross_entropy",
    "glu",
    "glu_linear",
    "l2norm",
    "linear_cross_entropy",
    "norm",
    "norm_linear",
    "rotary",
    "token_shift",
]
