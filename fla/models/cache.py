"""The cache of every model: transformers' `Cache`, with one class of layers that store tensors in named slots.

The slots of a layer:

- `recurrent_state`: the state of the mixer, such as `[N, H, K, V]`
- `conv_state`: the states of the short convolutions, a tuple of `[N, D, W]`
- `attn_state`: keys and values `[N, T, ...]`, whose time axis grows
- `ffn_state`: the state of the MLP
- `attn_shift`, `ffn_shift`: the last inputs `[N, D]` of the token shifts of mixer and MLP

The batch is the first axis of every tensor, so that beam search and batch selection are the same for all slots. Every
layer counts the tokens that it has seen, so that nothing depends on the order of updates.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin, DynamicCache

SLOTS = ("recurrent_state", "conv_state", "attn_state", "ffn_state", "attn_shift", "ffn_shift")
Slot = Tensor | tuple[Tensor, ...]

_NO_CROP = (
    "This cache cannot be cropped: a recurrent state holds the whole past in one matrix and cannot be rewound. Keep a "
    "copy (`copy.deepcopy(cache)`) at the point to return to. Decoding that rewinds (assisted, "
    "contrastive) is not possible."
)


class Slots(dict[str, Slot]):
    """Slot name -> tensor or tuple of tensors; a slot in which nothing is stored reads as None."""

    def __missing__(self, name: str) -> None:
        if name not in SLOTS:
            raise KeyError(f"a cache slot is one of {', '.join(SLOTS)}, got {name!r}")


class StateLayer(CacheLayerMixin):
    """The slots of one layer of a model, by name, and the number of tokens that it has seen."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, seen_tokens: int = 0) -> None:
        super().__init__()
        self.slots = Slots()
        self.seen_tokens = seen_tokens
        self.has_stored = False  # whether anything was ever stored; `reset` does not undo it
        self._holds_inference_tensors = False
        self._device_before: torch.device | None = None  # where the states were before they were offloaded

    def __repr__(self) -> str:
        return f"StateLayer({', '.join(self.slots) or 'empty'}; seen_tokens={self.seen_tokens})"

    def update(self, offset: int = 1, cache_kwargs: Mapping[str, Any] | None = None, **slots: Slot | None) -> Slots:
        """Store `slots` and count `offset` tokens. Returns all slots; their `attn_state` is not trimmed to a window."""
        result = Slots(self.slots)
        for name, value in slots.items():
            if name not in SLOTS:
                raise TypeError(f"a cache slot must be one of {', '.join(SLOTS)}, got {name!r}")
            if value is None:
                continue
            self.has_stored = True
            result[name] = value
            if name == "attn_state":
                result[name] = self._append(value)
                self.slots[name] = _last_columns(result[name], (cache_kwargs or {}).get("window_size"))
            else:
                self.slots[name] = value
        self.seen_tokens += offset
        self.is_initialized = True
        self._holds_inference_tensors |= torch.is_inference_mode_enabled()
        return result

    def leave_inference_mode(self) -> None:
        """Outside `torch.inference_mode`, replace tensors that were stored in it by copies without their limits.

        An inference tensor can neither be changed in place, as short convolutions change their states, nor be kept for
        a gradient.
        """
        if self._holds_inference_tensors and not torch.is_inference_mode_enabled():
            self.map_(lambda x: x.clone() if x.is_inference() else x)
            self._holds_inference_tensors = False

    def _append(self, new: Slot) -> Slot:
        old = self.slots.get("attn_state")
        if old is None:
            return new
        if old[0].shape[0] != new[0].shape[0]:
            raise ValueError(f"attn_state must have the cache's batch size {old[0].shape[0]}, got {new[0].shape[0]}")
        if [x.shape[2:] for x in old] != [x.shape[2:] for x in new]:
            raise ValueError(
                f"attn_state must be as wide as the cache's, {list(old[0].shape[2:])}, got {list(new[0].shape[2:])}"
            )
        return tuple(torch.cat((a, b), 1) for a, b in zip(old, new, strict=True))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first update creates the slots."""

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that a mask for `query_length` new tokens covers, and the position of the first key."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the name of `get_max_length` before transformers 5.17

    @property
    def batch_size(self) -> int:
        """The batch size of the states. Raises AttributeError while there are none, as transformers expects."""
        for value in self.slots.values():
            return (value if isinstance(value, Tensor) else value[0]).shape[0]
        raise AttributeError("an empty cache layer has no batch_size")

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateLayer":
        """A copy to return to. It clones tensors, since PyTorch cannot deep-copy tensors that are part of a graph."""
        layer = StateLayer()
        vars(layer).update(vars(self), slots=Slots(self.slots))
        layer.map_(torch.clone)
        return layer

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor by `function(tensor)`."""
        for name, value in self.slots.items():
            self.slots[name] = function(value) if isinstance(value, Tensor) else tuple(function(x) for x in value)
        self._holds_inference_tensors |= torch.is_inference_mode_enabled()

    def detach_(self) -> None:
        """Cut the states off from the graph that computed them."""
        self.map_(torch.Tensor.detach)

    def reset(self) -> None:
        """Remove all states and set the count of tokens to 0."""
        self.slots.clear()
        self.seen_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row `n` by row `beam_idx[n]`."""
        self.map_(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, with the copies next to each other."""
        self.map_(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (positions, or a boolean per row)."""
        self.map_(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise NotImplementedError: a recurrent state cannot be rewound."""
        raise NotImplementedError(_NO_CROP)

    def offload(self) -> None:
        """Move the states to the CPU."""
        for value in self.slots.values():
            self._device_before = (value if isinstance(value, Tensor) else value[0]).device
        self.map_(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the states back to the device that `offload` took them from."""
        device = self._device_before
        if device is not None:
            self.map_(lambda x: x.to(device, non_blocking=True))


class Cache(TransformersCache):
    """The states of all layers. `cache[layer_idx]` maps a slot's name to a tensor or a tuple of tensors.

    `Cache(seen_tokens=n)` starts the count of every layer at `n`. `cache[layer_idx]` raises KeyError if the layer has
    never stored anything. Slots that are empty, as after `reset`, read as None.

    What uses it: a model fills and returns the cache that it is given as `past_key_values`. `copy.deepcopy(cache)` is a
    point to return to, `cache.detach_()` the cut of truncated backpropagation.
    """

    layers: list[StateLayer]  # type: ignore[assignment]

    def __init__(self, seen_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self._first_token = seen_tokens

    def __getitem__(self, layer_idx: int) -> Slots:
        if not isinstance(layer_idx, int):
            raise TypeError(f"a cache is indexed by the number of a layer, got {layer_idx!r}")
        if not 0 <= layer_idx < len(self.layers) or not self.layers[layer_idx].has_stored:
            raise KeyError(f"layer {layer_idx} has stored nothing in this cache")
        self.layers[layer_idx].leave_inference_mode()
        return self.layers[layer_idx].slots

    def __iter__(self) -> Iterator[Slots]:
        return iter([layer.slots for layer in self.layers])

    def update(
        self,
        recurrent_state: Slot | None = None,
        attn_state: tuple[Tensor, Tensor] | None = None,
        conv_state: Slot | None = None,
        ffn_state: Slot | None = None,
        layer_idx: int = 0,
        offset: int = 1,
        cache_kwargs: Mapping[str, Any] | None = None,
        attn_shift: Slot | None = None,
        ffn_shift: Slot | None = None,
    ) -> Slots:
        """Store the states of a layer after `offset` new tokens, and return all its slots. Slots given as None stay.

        `attn_state` (keys, values) is appended on axis 1. With `cache_kwargs={"window_size": w}` only the last `w`
        columns are stored. The returned mapping has all columns, so that a prefill longer than the window attends
        correctly.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(StateLayer(self._first_token))
        return self.layers[layer_idx].update(
            offset=offset,
            cache_kwargs=cache_kwargs,
            recurrent_state=recurrent_state,
            attn_state=attn_state,
            conv_state=conv_state,
            ffn_state=ffn_state,
            attn_shift=attn_shift,
            ffn_shift=ffn_shift,
        )

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """The number of tokens that the layer `layer_idx` has seen. None means the first layer."""
        layer_idx = layer_idx or 0
        return self.layers[layer_idx].seen_tokens if layer_idx < len(self.layers) else self._first_token

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Remove all states and set the counts of tokens to 0."""
        super().reset()
        self._first_token = 0

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise NotImplementedError: a recurrent state cannot be rewound."""
        raise NotImplementedError(_NO_CROP)

    def detach_(self) -> "Cache":
        """Cut all states off from the graph that computed them, in place, and return the cache.

        A call that continues from it then has gradients of its own tokens only (truncated backpropagation).
        """
        for layer in self.layers:
            layer.detach_()
        return self

    def to_legacy_cache(self) -> tuple[dict[str, Slot], ...]:
        """A snapshot of the states, one dict per layer. It shares no memory with the cache, which may go on."""
        return tuple(dict(copy.deepcopy(layer).slots) for layer in self.layers)

    @classmethod
    def from_legacy_cache(cls, past: Any = None, seen_tokens: int = 0) -> "Cache":
        """A cache from copies of `past`, one mapping of slots per layer. All layers have seen `seen_tokens` tokens."""
        cache = cls(seen_tokens)
        for layer_idx, slots in enumerate(past or ()):
            if not isinstance(slots, Mapping):
                raise TypeError(
                    f"past must have one mapping of slot name to states per layer, got {type(slots).__name__} for "
                    f"layer {layer_idx}"
                )
            cache.update(layer_idx=layer_idx, offset=0, **slots)
        for layer in cache.layers:
            layer.map_(torch.clone)
        return cache

    @classmethod
    def wrap(cls, past: Any) -> "Cache":
        """`past` if it is a `Cache` of ours; a new one if it is None; for an empty `DynamicCache` one that fills it.

        Such a `DynamicCache` gets our layers in place of its own, so that the next call can be given either of the two.
        Raises ValueError for any other cache, even an empty one: a recurrent state cannot keep what its class promises
        (a fixed number of tokens, offloading, quantised keys).
        """
        if isinstance(past, cls):
            return past
        if past is None:
            return cls()
        layers = past.layers if _grows(past) and not past.offloading else None
        if layers is None or not all(_is_empty(layer) or isinstance(layer, StateLayer) for layer in layers):
            raise ValueError(
                f"past_key_values must be a fla.models.utils.Cache or an empty DynamicCache, got {_describe(past)}; "
                "states without a token count need `Cache.from_legacy_cache(states, seen_tokens=...)`"
            )
        if not all(isinstance(layer, StateLayer) for layer in layers):
            layers.clear()
        cache = cls()
        cache.layers = layers  # the list itself: layers that the model adds are the caller's too
        return cache


def _is_empty(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin) and layer.get_seq_length() == 0


def _grows(past: Any) -> bool:
    return type(past) in (DynamicCache, TransformersCache)


def _describe(past: Any) -> str:
    if not _grows(past):
        return type(past).__name__
    return f"{type(past).__name__} with {'offloading' if past.offloading else 'tokens in it'}"


def _last_columns(state: Slot, window_size: int | None) -> Slot:
    """The last `window_size` columns of keys and values; all without a window."""
    if window_size is None or state[0].shape[1] <= window_size:
        return state
    return tuple(x[:, -window_size:].clone() for x in state)  # cloned, since a slice would keep the whole tensor alive
