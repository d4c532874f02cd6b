"""The fields that all model configs share, what may stand in them, and `attn`, the softmax layers of a hybrid."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

_ATTENTION_DEFAULTS: dict[str, Any] = {
    "num_kv_heads": None,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
_POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "num_kv_heads", "intermediate_size"),
    *("conv_size", "window_size", "max_position_embeddings"),
)
# Fields of later releases of the reference that ours does not have: a config file may hold them at these values.
_ABSENT = {"use_l2warp": False, "attnres_block_size": None}


class DecoderConfig(PreTrainedConfig):
    """Fields of every model.

    `attn` makes a hybrid: `{"layers": [1, 3], "num_heads": 16}` (or a list of such dicts) gives the listed layers
    softmax attention; `num_kv_heads` (as `num_heads`), `window_size` (None), `rope_theta` (10000.0) and `qkv_bias`
    (False) may be set. It is checked and copied whenever it is assigned. Raises ValueError or TypeError for a value
    that no model can have.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    fixed_fields: ClassVar[Mapping[str, Any]] = {}  # fields that do nothing: any other value raises
    # The smallest useful sizes, and further settings worth a test, by name: for all suites.
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

    def __post_init__(self, **kwargs: Any) -> None:
        for name, only in _ABSENT.items():
            if kwargs.pop(name, only) != only:
                raise ValueError(f"{name} is not supported: it must be {only!r} or absent")
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, normalise_attention(value) if name == "attn" else value)
        if name == "attn" and "_name_or_path" in vars(self):  # construction is over: num_hidden_layers is known
            self.check()

    def check(self) -> None:
        """Raise ValueError or TypeError unless a model can be built from these values."""
        values = vars(self)
        for name in _POSITIVE:
            value = values.get(name)
            if value is not None and not _is_int(value):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, only in self.fixed_fields.items():
            if values[name] != only:
                raise ValueError(
                    f"{name} must be {only!r}: another value has no effect in this model, got {values[name]!r}"
                )
        if values["fuse_cross_entropy"] and values["fuse_linear_cross_entropy"]:
            raise ValueError(
                "fuse_cross_entropy and fuse_linear_cross_entropy cannot both be True: set fuse_cross_entropy=False to "
                "take the loss that never holds all logits"
            )
        _check_layers(values["attn"], values["num_hidden_layers"])

    def attention_spec(self, layer_idx: int) -> dict[str, Any] | None:
        """The entry of `attn` that layer `layer_idx` is listed in, or None."""
        return next((dict(spec) for _, spec in _specs(self.attn) if layer_idx in spec["layers"]), None)


def normalise_attention(attn: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """A checked copy of a hybrid's `attn` with every default filled in; a dict stays a dict, a list a list."""
    if attn is None:
        return None
    if not isinstance(attn, Mapping | list | tuple):
        raise TypeError(f"attn must be a dict, a list of dicts or None, got {type(attn).__name__}")
    copies = [_normalise_spec(name, spec) for name, spec in _specs(attn)]
    return copies[0] if isinstance(attn, Mapping) else copies


def _specs(attn: Any) -> Iterator[tuple[str, Any]]:
    """(name for messages, spec) of every entry."""
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
    return copy


def _check_layers(attn: Any, num_hidden_layers: int) -> None:
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
