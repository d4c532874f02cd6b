"""Checkpoints: nothing is silently left out or made up, both MLP layouts load, the Auto classes know every model."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

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


class SplitGateAndUp(ConversionOps):
    """A checkpoint's `gate_proj` that holds gate and up projection, as both; one that holds the gate stays as it is."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`{gate: [tensor]}` to `{gate: tensor}` or `{gate: tensor, up: tensor}`, by the gate's rows in `model`."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        rows = model.get_parameter(full_layer_name).shape[0]
        halves = tensor.split(rows) if tensor.shape[0] == 2 * rows else (tensor,)
        return {name: half.contiguous() for name, half in zip(target_patterns, halves, strict=False)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving changes nothing: both projections are written as they are."""
        return _AsTheyAre()


class _AsTheyAre(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


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
        # By the names in these tables the Trainer knows that labels are to be shifted, and pipelines what they can run.
        MODEL_MAPPING_NAMES[model_type] = declared.model_cls.__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm.__name__
    # Checkpoints of both MLP layouts load. By the model's class name: a type may be transformers' own.
    both = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converter = WeightConverter("mlp.gate_proj.weight", both, [SplitGateAndUp()])
    register_checkpoint_conversion_mapping(declared.model_cls.__name__, [converter], overwrite=True)
    return causal_lm
