"""The fields that all model configs share, the checks of their values, and `attn`, which makes a model a hybrid."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

from fla.layers._settings import check_setting, did_you_mean
from fla.models._fields import document_fields

logger = logging.get_logger(__name__)

_ATTENTION_DEFAULTS: dict[str, Any] = {
    "num_kv_heads": None,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
_ATTENTION_KEYS = ("layers", "num_heads", *_ATTENTION_DEFAULTS)
# These count the same in every model, so they are checked even if a model has no such field.
_COUNTS = {"num_heads", "num_kv_heads", "conv_size", "window_size"}
_NOT_OURS = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
# Fields that config files of other implementations have and ours lack. They may be present with these values only.
_ABSENT = {"use_l2warp": False, "attnres_block_size": None}


class DecoderConfig(PreTrainedConfig):
    """The fields of every model's config. A field's annotation says which values it may have (`fla.layers._settings`).

    `attn` makes a hybrid: `{"layers": [1, 3], "num_heads": 16}`, or a list of such dicts, gives the listed layers
    softmax attention. A dict may also set `num_kv_heads` (default: `num_heads`), `window_size` (None), `rope_theta`
    (10000.0) and `qkv_bias` (False). Every assignment of `attn` checks and copies the value.

    Raises ValueError or TypeError, naming the field, for a value that no model can have.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    fixed_fields: ClassVar[Mapping[str, Any]] = {}  # fields without effect -> the only value that they may have
    # Fields that no other model has, or that mean something else in other models -> a sentence on their meaning.
    field_help: ClassVar[Mapping[str, str]] = {}
    # For tests: the smallest useful sizes, and by name further settings worth a test.
    tiny: ClassVar[Mapping[str, Any]] = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    max_position_embeddings: int | None = 2048
    elementwise_affine: bool = True
    norm_eps: float = 1e-6
    attn: dict | list | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        document_fields(cls, _NOT_OURS)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, only in _ABSENT.items():
            if kwargs.pop(name, only) != only:
                raise ValueError(f"{name} is not supported: set it to {only!r} or leave it out")
        names = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:  # config files of other programs have fields of their own, so this is no error
            if hint := did_you_mean(name, names, 0.85):
                logger.warning_once(f"{type(self).__name__} has no field {name}{hint}")
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        built = "_name_or_path" in vars(self)  # before, fields that depend on each other are not all there
        if built and name not in _NOT_OURS and name in self.__dataclass_fields__:
            check_setting(name, self.__dataclass_fields__[name].type, value)
        super().__setattr__(name, normalise_attention(value) if name == "attn" else value)
        if built and name == "attn":
            self.check()

    def check(self) -> None:
        """Raise ValueError or TypeError unless a model can be built from these values."""
        values = vars(self)
        for name, only in self.fixed_fields.items():
            if values[name] != only:
                raise ValueError(
                    f"{name} must be {only!r}: another value has no effect in this model, got {values[name]!r}"
                )
        for field in dataclasses.fields(self):
            if field.name not in _NOT_OURS:
                check_setting(field.name, field.type, values[field.name])
        for name in _COUNTS & set(values) - set(self.__dataclass_fields__):
            check_setting(name, int | None, values[name])
        _check_tokens(values)
        if values["fuse_cross_entropy"] and values["fuse_linear_cross_entropy"]:
            raise ValueError(
                "fuse_cross_entropy and fuse_linear_cross_entropy cannot both be True: set fuse_cross_entropy=False to "
                "use the loss that never holds all logits"
            )
        _check_layers(values["attn"], values["num_hidden_layers"])

    def attention_spec(self, layer_idx: int) -> dict[str, Any] | None:
        """The entry of `attn` that lists the layer `layer_idx`, or None."""
        return next((dict(spec) for _, spec in _specs(self.attn) if layer_idx in spec["layers"]), None)


def normalise_attention(attn: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """A checked copy of `attn` with all defaults filled in: a dict for a dict, a list for a list."""
    if attn is None:
        return None
    if not isinstance(attn, Mapping | list | tuple):
        raise TypeError(f"attn must be a dict, a list of dicts or None, got {type(attn).__name__}")
    copies = [_normalise_spec(name, spec) for name, spec in _specs(attn)]
    return copies[0] if isinstance(attn, Mapping) else copies


def _specs(attn: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of a name for messages and a dict, for every dict in `attn`."""
    if isinstance(attn, Mapping):
        yield "attn", attn
    else:
        yield from ((f"attn[{i}]", spec) for i, spec in enumerate(attn or ()))


def _normalise_spec(name: str, spec: Any) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(spec).__name__}")
    for key in ("layers", "num_heads"):
        if spec.get(key) is None:
            raise ValueError(f"{name} must have {key!r}, got the keys {sorted(map(str, spec))}")
    layers = spec["layers"]
    if not isinstance(layers, list | tuple | range) or not all(_is_int(i) for i in layers):
        raise TypeError(f"{name}['layers'] must be a list of ints, got {layers!r}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{name}['layers'] must not name a layer twice, got {list(layers)}")
    for key in spec:
        if key not in _ATTENTION_KEYS:
            known, hint = ", ".join(_ATTENTION_KEYS), did_you_mean(key, _ATTENTION_KEYS)
            raise ValueError(f"{name} must have no keys but {known}, got {key!r}{hint}")
    copy = {**_ATTENTION_DEFAULTS, **spec, "layers": list(layers)}
    if copy["num_kv_heads"] is None:
        copy["num_kv_heads"] = copy["num_heads"]
    for key in ("num_heads", "num_kv_heads", "window_size"):
        value = copy[key]
        if not (_is_int(value) and value > 0) and not (key == "window_size" and value is None):
            raise ValueError(f"{name}[{key!r}] must be a positive int, got {value!r}")
    if copy["num_heads"] % copy["num_kv_heads"]:
        raise ValueError(
            f"{name}['num_heads'] must be a multiple of num_kv_heads {copy['num_kv_heads']}, got {copy['num_heads']}"
        )
    check_setting(f"{name}['qkv_bias']", bool, copy["qkv_bias"])
    check_setting(f"{name}['rope_theta']", float, copy["rope_theta"])
    return copy


def _check_tokens(values: Mapping[str, Any]) -> None:
    """Special tokens: `eos_token_id` may be a list, and `pad_token_id` has a row among the embeddings."""
    ends = values["eos_token_id"]
    for token in ends if isinstance(ends, list) else [ends]:
        check_setting("eos_token_id", int | None, token)
    if values["pad_token_id"] is not None and values["pad_token_id"] >= values["vocab_size"]:
        raise ValueError(
            f"pad_token_id must be less than vocab_size {values['vocab_size']}, got {values['pad_token_id']}"
        )


def _check_layers(attn: Any, num_hidden_layers: int) -> None:
    """Raise ValueError unless all listed layers exist and none is listed twice."""
    owner: dict[int, str] = {}
    for name, spec in _specs(attn):
        for layer in spec["layers"]:
            if not 0 <= layer < num_hidden_layers:
                raise ValueError(
                    f"{name}['layers'] must name layers from 0 to {num_hidden_layers - 1} (num_hidden_layers is "
                    f"{num_hidden_layers}), got {layer}"
                )
            if layer in owner:
                raise ValueError(f"{name}['layers'] must not overlap with {owner[layer]}, got layer {layer} in both")
            owner[layer] = name


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


document_fields(DecoderConfig, _NOT_OURS)
