"""The modules in which other programs look for an op's forms: `fla.ops.gla.chunk` has `chunk_gla`; `gla` is a file."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from fla._names import make_module


def name_forms(
    op: str, forms: Mapping[str, Callable], also: Mapping[str, tuple[Callable, ...]] = MappingProxyType({})
) -> None:
    """Make `<op>.<form>` importable for every form of the op in the module `op`, and `<op>.naive`.

    Each holds the form's function, whatever else of that module begins with the form's name, and what `also` says.
    """
    own = {name: x for name, x in vars(sys.modules[op]).items() if getattr(x, "__module__", None) == op}
    for form in dict.fromkeys((*forms, "naive")):
        held = {name: x for name, x in own.items() if name.startswith(f"{form}_")}
        if form in forms:
            held[forms[form].__name__] = forms[form]
        held |= {function.__name__: function for function in also.get(form, ())}
        make_module(f"{op}.{form}", f"The {form} form of {op}.", held)
