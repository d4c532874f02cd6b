"""The names by which other programs know a model's parts, such as `fla.models.gla.modeling_gla.GLAPreTrainedModel`."""

import sys
from typing import Any

from fla._names import make_module


def name_parts(causal_lm: Any) -> None:
    """Make `modeling_<m>` and `configuration_<m>` importable under `fla.models.<m>`, and give that module a
    `<M>PreTrainedModel`, from which the model inherits with and without its head. Other programs' models stay as they
    are.
    """
    path, short = causal_lm.__module__, causal_lm.__name__.removesuffix("ForCausalLM")
    package, _, name = path.rpartition(".")
    if package != __package__:
        return
    module, pretrained = vars(sys.modules[path]), _pretrained(f"{short}PreTrainedModel", causal_lm)
    module[pretrained.__name__] = pretrained
    own = {key: x for key, x in module.items() if getattr(x, "__module__", None) == path and not key.startswith("_")}
    configs = {key: x for key, x in own.items() if key.endswith("Config")}
    models = {key: x for key, x in own.items() if key not in configs} | {causal_lm.__name__: causal_lm}
    make_module(f"{path}.configuration_{name}", f"The config of {path}.", configs)
    make_module(f"{path}.modeling_{name}", f"The classes of {path}.", models)


def _pretrained(name: str, causal_lm: Any) -> type:
    """A class above the model with and without its head, directly below what they have in common already."""
    body = causal_lm.model_cls
    shared = next(cls for cls in causal_lm.__mro__ if issubclass(body, cls))
    contents = {
        "__module__": causal_lm.__module__,
        "__doc__": f"What `{body.__name__}` and `{causal_lm.__name__}` share.",
        "config_class": body.config_class,
        "block_cls": body.block_cls,
    }
    made = type(name, (shared,), contents)
    for cls in (body, causal_lm):
        cls.__bases__ = (*cls.__bases__, made)
    return made
