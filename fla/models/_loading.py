"""Checkpoints: nothing is silently left out or made up, both MLP layouts load, the Auto classes know every model."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from fla.models._names import name_parts

REGISTRY: dict[str, Any] = {}  # model type -> causal LM class: what the contract suite runs over

Class = TypeVar("Class", bound=type[PreTrainedModel])


class StrictLoading(PreTrainedModel):
    """`from_pretrained` that raises where transformers only warns."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, but ValueError naming the keys that are missing, unexpected or of
        another shape.

        `ignore_mismatched_sizes=True` lets weights of another shape be initialised anew, which is what asking for it
        means.
        """
        load: Callable[..., Any] = functools.partial(
            super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs
        )
        model, info = load(output_loading_info=True, ignore_mismatched_sizes=True)
        renames = _other_norm_name(info)
        if renames is not None and "key_mapping" not in kwargs:
            model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, key_mapping=renames)
            vars(model).pop("_weight_conversions", None)  # save under the model's own names
        problems = [
            f"{name.replace('_', ' ')}: {', '.join(sorted(map(_describe, info[name])))}"
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[name] and not (name == "mismatched_keys" and ignore_mismatched_sizes)
        ]
        if problems:
            raise ValueError(
                f"the checkpoint {pretrained_model_name_or_path} does not fit {cls.__name__} with this config: "
                + "; ".join(problems)
            )
        return (model, info) if output_loading_info else model


def _describe(key: Any) -> str:
    return key if isinstance(key, str) else f"{key[0]} {list(key[1])} instead of {list(key[2])}"


def _other_norm_name(info: dict[str, Any]) -> dict[str, str] | None:
    """The renaming that makes a checkpoint fit whose output norms go by their other name, if that is all that is wrong.

    The weight is called `g_norm_swish_gate` where norm and gate are one module and `g_norm` where they are two
    (`fuse_norm`).
    """
    for there, here in (("g_norm", "g_norm_swish_gate"), ("g_norm_swish_gate", "g_norm")):
        expected = {key.replace(f".{here}.", f".{there}.") for key in info["missing_keys"]}
        if info["missing_keys"] and expected == set(info["unexpected_keys"]):
            return {rf"\.{there}\.weight$": f".{here}.weight"}
    return None


def register_causal_lm(causal_lm: Class) -> Class:
    """Class decorator: make a model known to the Auto classes, to the loader of both MLP layouts and to the contract
    suite.

    A model type that transformers has itself stays transformers': such a model loads through its own class.
    """
    declared: Any = causal_lm
    config_class, model_type = declared.config_class, declared.config_class.model_type
    REGISTRY[model_type] = causal_lm
    if model_type not in CONFIG_MAPPING_NAMES:
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, declared.model_cls, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal_lm, exist_ok=True)
    # Our gate_proj holds the gate's rows, then those of the up projection; a checkpoint of the other layout has them
    # as two tensors. This loads both, and every save writes the two. By the model's class name: a type may be
    # transformers' own.
    halves = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converter = WeightConverter(halves, "mlp.gate_proj.weight", [Concatenate(dim=0)])
    register_checkpoint_conversion_mapping(declared.model_cls.__name__, [converter], overwrite=True)
    name_parts(causal_lm)
    return causal_lm
