"""`fla.modules.convolution` under the names that other programs import: `fla.modules.conv.causal_conv1d` and so on.

They expect a package. Its modules are made here from one table, so that no file stands for a name.
"""

import sys
from types import ModuleType

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


def _make_modules() -> None:
    for place, names in _MODULES.items():
        module = ModuleType(f"{__name__}.{place}", f"Names of `fla.modules.convolution`: {', '.join(names)}.")
        vars(module).update({name: globals()[name] for name in names})
        sys.modules[module.__name__] = module
    triton = sys.modules[f"{__name__}.triton"]
    triton.ops = sys.modules[f"{__name__}.triton.ops"]  # type: ignore[attr-defined]
    globals().update(triton=triton, short_conv=sys.modules[f"{__name__}.short_conv"])


_make_modules()
