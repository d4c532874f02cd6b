"""`fla.modules.convolution` under the module names that other programs import, such as `fla.modules.conv.short_conv`.

These programs expect `fla.modules.conv` to be a package. Its submodules are made here, from one table.
"""

from fla._names import make_module
from fla.backends import family
from fla.modules.convolution import ShortConvolution, causal_conv1d, causal_conv1d_update

# the autograd function of every convolution, which trainers register by its class; for them, `apply` is `causal_conv1d`
CausalConv1dFunction = family("fused", "torch").CausalConv1dFunction
CausalConv1dFunction.apply = staticmethod(causal_conv1d)

__all__ = ["CausalConv1dFunction", "ShortConvolution", "causal_conv1d", "causal_conv1d_update"]

_SUBMODULES: dict[str, tuple[str, ...]] = {  # submodule -> the names in it
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_update"),
    "short_conv": ("ShortConvolution",),
    "triton": (),
    "triton.ops": ("CausalConv1dFunction",),
}

for _submodule, _names in _SUBMODULES.items():
    _doc = f"Names of `fla.modules.convolution`: {', '.join(_names)}."
    make_module(f"{__name__}.{_submodule}", _doc, {name: globals()[name] for name in _names})
