"""The modules in which other programs look for an op's forms: `fla.ops.gla.chunk` has `chunk_gla`; `gla` is a file."""

import sys
from collections.abc import Callable, Mapping

from fla._names import make_module


def name_forms(op: str, forms: Mapping[str, Callable], others: Mapping[str, tuple[Callable, ...]]) -> None:
    """Make `<op>.<form>` importable for every form of the op in the module `op`, `<op>.naive`, and what `others` names.

    Each holds the form's function, whatever else of that module begins with the form's name, and the functions that
    `others` has for it.
    """
    own = {name: x for name, x in vars(sys.modules[op]).items() if getattr(x, "__module__", None) == op}
    for form in dict.fromkeys((*forms, "naive", *others)):
        held = {name: x for name, x in own.items() if name.startswith(f"{form}_")}
        if form in forms:
            held[forms[form].__name__] = forms[form]
        held |= {function.__name__: function for function in others.get(form, ())}
        make_module(f"{op}.{form}", f"What {op} has under the name {form}.", held)
