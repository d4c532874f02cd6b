"""Loading of checkpoints: missing keys raise, older layouts load too, and the Auto classes know every model."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from fla.models._names import name_parts

REGISTRY: dict[str, Any] = {}  # model type -> causal LM class; the contract suite tests all of them

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
        """As `PreTrainedModel.from_pretrained`, but keys that are missing, unexpected or of another shape raise.

        The ValueError names these keys. With `ignore_mismatched_sizes=True` weights of another shape are initialised
        anew instead.
        """
        load: Callable[..., Any] = functools.partial(
            super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs
        )
        model, info = load(output_loading_info=True, ignore_mismatched_sizes=True)
        renames = _other_norm_name(info)
        if renames is not None and "key_mapping" not in kwargs:
            model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, key_mapping=renames)
            vars(model).pop("_weight_conversions", None)  # so that saving uses the model's own names
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
    """A key mapping for a checkpoint that differs from the model only in the name of the output norms, or None.

    The norm is called `g_norm_swish_gate` if `fuse_norm` makes norm and gate one module, and `g_norm` otherwise.
    """
    for saved, ours in (("g_norm", "g_norm_swish_gate"), ("g_norm_swish_gate", "g_norm")):
        expected = {key.replace(f".{ours}.", f".{saved}.") for key in info["missing_keys"]}
        if info["missing_keys"] and expected == set(info["unexpected_keys"]):
            return {rf"\.{saved}\.weight$": f".{ours}.weight"}
    return None


class SplitGateAndUp(ConversionOps):
    """Splits a checkpoint's `gate_proj` that holds both gate and up projection; one that holds the gate is kept."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`{gate: [tensor]}` -> `{gate: tensor}` or `{gate: tensor, up: tensor}`. The gate's rows in `model` decide."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        rows = model.get_parameter(full_layer_name).shape[0]
        halves = tensor.split(rows) if tensor.shape[0] == 2 * rows else (tensor,)
        return {name: half.contiguous() for name, half in zip(target_patterns, halves, strict=False)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes both projections unchanged."""
        return _Unchanged()


class SplitRows(ConversionOps):
    """Splits a checkpoint's matrix into its rows, each of which becomes a parameter of the shape that the model has."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`{matrix: [tensor]}` -> `{name: row}` for every row. A matrix of another height stays, and does not fit."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        if len(tensor) != len(target_patterns):
            return {target_patterns[0]: tensor}
        shape = model.get_parameter(full_layer_name).shape
        rows = [row.reshape(shape) if row.numel() == shape.numel() else row for row in tensor]
        return dict(zip(target_patterns, rows, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes the rows unchanged."""
        return _Unchanged()


class _Unchanged(ConversionOps):
    """The reverse of a conversion that saving does not undo: the parameters go under their own names."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`full_layer_name` is the name that undoing would give. The loader would not find it in the others."""
        before, _, after = full_layer_name.partition(target_patterns[0])
        return {before + name + after: tensor for name, tensor in input_dict.items()}


def register_causal_lm(causal_lm: Class) -> Class:
    """Class decorator that makes a model known to the Auto classes, to the loader and to the contract suite.

    If transformers has the model type itself, the Auto classes keep loading transformers' model; ours loads through its
    own class.
    """
    declared: Any = causal_lm
    config_class, model_type = declared.config_class, declared.config_class.model_type
    REGISTRY[model_type] = causal_lm
    if model_type not in CONFIG_MAPPING_NAMES:
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, declared.model_cls, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal_lm, exist_ok=True)
        # The Trainer shifts the labels of classes in these tables of names, and pipelines accept them.
        MODEL_MAPPING_NAMES[model_type] = declared.model_cls.__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm.__name__
    # Checkpoints of both MLP layouts load. The converter is registered under the class name, because the model type may
    # be one of transformers.
    both = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converters: list[Any] = [WeightConverter("mlp.gate_proj.weight", both, [SplitGateAndUp()])]
    for matrix, rows in declared.model_cls.split_rows.items():
        converters.append(WeightConverter(matrix, list(rows), [SplitRows()]))
    register_checkpoint_conversion_mapping(declared.model_cls.__name__, converters, overwrite=True)
    name_parts(causal_lm)
    return causal_lm
