"""`fla.modules.convolution` under the names that other programs import: `fla.modules.conv.causal_conv1d` and so on.

They expect a package. Its modules are made here from one table, so that no file stands for a name.
"""

from fla._names import make_module
from fla.backends import family
from fla.modules.convolution import ShortConvolution, causal_conv1d, causal_conv1d_update

CausalConv1dFunction = family("fused", "torch").DepthwiseConv  # by which trainers recognise it in a graph of gradients

__all__ = ["CausalConv1dFunction", "ShortConvolution", "causal_conv1d", "causal_conv1d_update"]

_MODULES: dict[str, tuple[str, ...]] = {
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_update"),
    "short_conv": ("ShortConvolution",),
    "triton": (),
    "triton.ops": ("CausalConv1dFunction",),
}

for _place, _names in _MODULES.items():
    _doc = f"Names of `fla.modules.convolution`: {', '.join(_names)}."
    make_module(f"{__name__}.{_place}", _doc, {name: globals()[name] for name in _names})
