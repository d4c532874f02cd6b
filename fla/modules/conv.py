"""`fla.modules.convolution` under the module names that other programs import, such as `fla.modules.conv.short_conv`.

These programs expect `fla.modules.conv` to be a package. Its submodules are made here, from one table.
"""

import sys
from types import ModuleType

from fla.backends import family
from fla.modules.convolution import ShortConvolution, causal_conv1d, causal_conv1d_update

CausalConv1dFunction = family("fused", "torch").DepthwiseConv  # trainers look for its name in the autograd graph

__all__ = ["CausalConv1dFunction", "ShortConvolution", "causal_conv1d", "causal_conv1d_update"]

_SUBMODULES: dict[str, tuple[str, ...]] = {  # submodule -> the names in it
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_update"),
    "short_conv": ("ShortConvolution",),
    "triton": (),
    "triton.ops": ("CausalConv1dFunction",),
}


def _make_submodules() -> None:
    for submodule, names in _SUBMODULES.items():
        module = ModuleType(f"{__name__}.{submodule}", f"Names of `fla.modules.convolution`: {', '.join(names)}.")
        vars(module).update({name: globals()[name] for name in names})
        sys.modules[module.__name__] = module
    triton = sys.modules[f"{__name__}.triton"]
    triton.ops = sys.modules[f"{__name__}.triton.ops"]  # type: ignore[attr-defined]
    globals().update(triton=triton, short_conv=sys.modules[f"{__name__}.short_conv"])


_make_submodules()
