"""`TokenMixer`: what every token mixer repeats, once. `MultiHeadMixer` (`_heads.py`) adds what those with heads share.

    [B, T, D] -> projections (-> short convolutions) -> op -> output projection -> [B, T, D]

A mixer's file says which projections it has and writes `mix()`. Padding, packing, caches, short convolutions, token
shifts, the choice of the op's form and what a model hands to its layers are here.

A model can hand tensors to a mixer, which lists them in `inputs` and takes them as keywords of `forward()`; each may be
None. They are the layer's own, which the model computed from its parameters: `mix()` reads `call.extra[name]`. One of
them, `carry_name`, goes from layer to layer instead: `mix()` reads `call.carry` and sets it to hand on another, and
`forward()` returns it as its fourth value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fla.layers._settings import check_arguments, check_setting, did_you_mean
from fla.layers.utils import Padding, check_batch, check_mask, get_layer_cache, update_layer_cache
from fla.modules import ShortConvolution
from fla.modules.token_shift import token_shift
from fla.shapes import check_shapes, merge_cu_seqlens

# Up to this many tokens the recurrent form is at least as fast as the chunked one, when no gradient is needed.
SHORT = 64

Module = TypeVar("Module", bound=nn.Module)
Mixer = TypeVar("Mixer", bound="TokenMixer")
# Keywords that callers send along to every layer; what they say is also in the mask and in `cu_seqlens`. The `inputs`
# of every mixer class are added: what a model hands to one kind of its layers may reach the others.
_KEYWORDS = {
    *("cu_seq_lens_q", "cu_seqlens_cpu", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("position_ids", "is_causal", "cache_position"),
}


@dataclass
class Call:
    """What one forward call knows besides its tokens."""

    batch_size: int
    seq_len: int  # before unpadding
    attention_mask: Tensor | None  # [B, T_total]; None for packed input
    padding: Padding | None  # set: the tokens were packed by the mask
    cu_seqlens: Tensor | None  # of the packed row, the caller's or the padding's
    cache: Any
    state: Mapping[str, Any]  # what the cache holds for this layer
    seen: int  # columns in earlier calls
    start: int | Tensor  # position of each row's first token, an int or [B]; 0 for layers without positions
    keep: bool  # whether the state after this call is wanted
    slots: dict[str, Any] = field(default_factory=dict)  # collected for the cache
    extra: Mapping[str, Tensor | None] = field(default_factory=dict)  # what the model computed for this layer, by name
    carry: Tensor | None = None  # what an earlier layer handed on, packed like the tokens; `mix()` may set it


class TokenMixer(nn.Module):
    """Base of all token mixers; not used by itself."""

    # The forms of the mixer's op by the name of their mode.
    forms: ClassVar[Mapping[str, Callable[..., tuple[Tensor, Any]]]] = {}
    # Whether results depend on where a token stands in its sequence (rotary embeddings).
    uses_positions: ClassVar[bool] = False
    # Whether the cache's count of seen tokens is this layer's to advance.
    counts_tokens: ClassVar[bool] = True
    # What a model hands to the mixer, name -> shape, with `D` the hidden size; and which of it is the carry.
    inputs: ClassVar[Mapping[str, str]] = {}
    carry_name: ClassVar[str | None] = None
    # Constructor parameter -> field of a model's config, where the two have different names.
    config_names: ClassVar[Mapping[str, str]] = {"mode": "attn_mode"}
    # The parts that make the log decays; their gradients, differences of large terms, have a budget of their own.
    gate_names: ClassVar[tuple[str, ...]] = ("gk_proj",)
    # The smallest useful settings beside `hidden_size` 32, and further ones worth a test, by name: for all suites.
    tiny: ClassVar[Mapping[str, Any]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KEYWORDS.update(cls.inputs)

    def __new__(cls: type[Mixer], *args: Any, **kwargs: Any) -> Mixer:
        """Check the arguments of `__init__`, whatever class defines it."""
        check_arguments(cls.__init__, args, kwargs)
        return super().__new__(cls)  # type: ignore[misc]

    def __init__(self, hidden_size: int, layer_idx: int | None, mode: str | None = None) -> None:
        super().__init__()
        if self.forms and mode not in self.forms:
            raise ValueError(f"mode must be one of {', '.join(self.forms)}, got {mode!r}")
        check_positive(hidden_size=hidden_size)
        self.mode = mode
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx
        self.conv_names: tuple[str, ...] = ()
        shapes = {"hidden_states": "B T D", **self.inputs}
        self._shapes = {name: shape.replace("D", str(hidden_size)) for name, shape in shapes.items()}

    @classmethod
    def from_config(cls, config: Any, layer_idx: int | None = None) -> TokenMixer:
        """Build from a model's config: every constructor parameter that the config has a field for takes its value."""
        return build_from_config(cls, config, layer_idx)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        """Tokens `[B, T, D]` (one packed row when `call.cu_seqlens` is set) to what `output()` takes.

        `remember()` must be called once, which `recur()` does.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mix()")

    def output(self, o: Tensor) -> Tensor:
        """From the result of `mix()` to the tokens `[B, T, D]`: nothing is left to do unless a subclass says so."""
        return o

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Padding | str | None = "from_mask",
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Mix the tokens of `hidden_states` `[B, T, D]`; returns `(o [B, T, D], None, past_key_values)`.

        A layer with a carry returns it, or the one that it made in its place, as a fourth value.

        Args:
            attention_mask: `[B, at least T]`, 1 = token, 0 = padding; the last `T` columns belong to this call.
                Padding changes nothing, wherever it is, and its outputs are 0.
            past_key_values: a cache. The layer goes on from what the cache holds for `layer_idx` and stores its state
                there.
            use_cache: part of the common call of all layers; the state is kept exactly when `past_key_values` is given.
            output_attentions: must be False; there is no attention matrix to return.
            cu_seqlens: `[N + 1]`, boundaries of sequences packed into one row (`B = 1`); wins over a mask.
                `cu_seq_lens_q` is another name of it, and `cu_seqlens_cpu` the same on the CPU.
            padding: what a model computed once from the mask for all its layers; by default the layer does it itself.

        `inputs` are further keywords. Those of other layers of a model, and those that trainers hand to every layer,
        are not looked at. Raises ValueError or TypeError, naming the argument.
        """
        if kwargs:
            self._check_keywords(kwargs)
        if output_attentions:
            raise ValueError(f"output_attentions must be False: {type(self).__name__} never forms the attention matrix")
        cu_seqlens = packing(hidden_states, cu_seqlens, kwargs)
        inputs: dict[str, Any] = {name: kwargs.get(name) for name in self.inputs}
        check_shapes(self._shapes, cu_seqlens=cu_seqlens, hidden_states=hidden_states, **inputs)
        call = self._begin(hidden_states, attention_mask, past_key_values, cu_seqlens, padding)
        unpad, repad = (_same, _same) if call.padding is None else (call.padding.unpad, call.padding.repad)
        carry = None if self.carry_name is None else inputs.pop(self.carry_name)
        came = call.carry = None if carry is None else unpad(carry)
        call.extra = inputs
        o = repad(self.output(self.mix(unpad(hidden_states), call)))
        if self.carry_name is None:
            return o, None, past_key_values
        if call.carry is not None and call.carry is not came:
            carry = repad(call.carry)
        return o, None, past_key_values, carry

    def _check_keywords(self, keywords: Mapping[str, Any]) -> None:
        unknown = next((name for name in keywords if name not in _KEYWORDS), None)
        if unknown is None:
            return
        known = [*list(inspect.signature(TokenMixer.forward).parameters)[1:-1], "cu_seq_lens_q", *self.inputs]
        hint = did_you_mean(unknown, known) or f": the keywords are {', '.join(known)}"
        raise TypeError(f"unexpected keyword argument {unknown!r} of {type(self).__name__}.forward(){hint}")

    def _begin(
        self, x: Tensor, mask: Tensor | None, cache: Any, cu_seqlens: Tensor | None, padding: Padding | str | None
    ) -> Call:
        B, T, _ = x.shape
        packed = cu_seqlens is not None
        if packed:
            mask = padding = None
        if mask is not None:
            check_mask(mask, T, B)
        if isinstance(padding, str):
            padding = None if mask is None else Padding.from_mask(mask, T)
        if padding is not None:
            if (padding.batch_size, padding.seq_len) != (B, T):
                raise ValueError(f"padding must be of a batch {[B, T]}, got {[padding.batch_size, padding.seq_len]}")
            cu_seqlens = padding.cu_seqlens
        state = get_layer_cache(self, cache) or {}
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        keep = cache is not None
        start: int | Tensor = 0
        if self.uses_positions:
            # The cache counts columns, not the tokens of each packed sequence: nothing could go on from there.
            keep = keep and not packed
            if seen and (packed or not {"recurrent_state", "attn_state"} & set(state)):
                raise ValueError(
                    f"cu_seqlens must be None in every call of a sequence that {type(self).__name__} continues from a "
                    "cache, which does not know each packed sequence's length; pass a padded batch and attention_mask"
                )
            start = _first_positions(mask, padding, seen, T)
        check_batch(state, cu_seqlens.shape[0] - 1 if packed and cu_seqlens is not None else B)
        return Call(B, T, mask, padding, cu_seqlens, cache, state, seen, start, keep)

    def named_inputs(self, carry: Tensor | None, extra: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
        """What a model hands to every layer, as keywords of this one's `forward()`: those that it lists."""
        names = [name for name in self.inputs if name != self.carry_name]
        if names and len(extra) not in (0, len(names)):
            raise ValueError(f"{type(self).__name__} must be given {', '.join(names)}, got {len(extra)} values")
        named = dict(zip(names, extra, strict=False))
        return named if self.carry_name is None or carry is None else named | {self.carry_name: carry}

    def remember(self, call: Call, **slots: Any) -> Any:
        """Store what the call collected, and `slots`, in its cache; returns what that returns (None without one)."""
        slots = {**call.slots, **slots} if call.keep else {}
        return update_layer_cache(self, call.cache, offset=call.seq_len if self.counts_tokens else 0, **slots)

    # ---- what looks at the tokens before: short convolutions, token shift

    def add_short_convs(self, convs: Mapping[str, tuple[int, str | None]], conv_size: int, conv_bias: bool) -> None:
        """Causal depthwise convolutions: name -> (channels, activation)."""
        check_positive(conv_size=conv_size)
        for name, (channels, act) in convs.items():
            self.add_module(name, ShortConvolution(channels, conv_size, bias=conv_bias, activation=act))
        self.conv_names += tuple(convs)

    def convolve(self, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Every input after its convolution, in the order of their names, going on from the cache.

        A mixer without convolutions gets its inputs back.
        """
        if not self.conv_names:
            return inputs
        before = call.state.get("conv_state") or (None,) * len(self.conv_names)
        options: dict[str, Any] = {"output_final_state": call.keep, "cu_seqlens": call.cu_seqlens}
        done = [
            getattr(self, name)(x, cache=state, **options)
            for name, x, state in zip(self.conv_names, inputs, before, strict=True)
        ]
        if call.keep:
            call.slots["conv_state"] = tuple(state for _, state in done)
        return tuple(y for y, _ in done)

    def shift(self, x: Tensor, call: Call, slot: str) -> Tensor:
        """`x[t - 1] - x[t]` within each sequence; the cache's `slot` holds every sequence's last `x`."""
        delta, last = token_shift(x, call.cu_seqlens, call.state.get(slot), output_cache=True)
        call.slots[slot] = last
        return delta

    # ---- the op

    def recur(self, call: Call, *inputs: Tensor, **settings: Any) -> Tensor:
        """Run the op in the form that fits, from the cached state, and keep the new one."""
        state = call.state.get("recurrent_state")
        inference = not (self.training or torch.is_grad_enabled())
        short = inference and call.seq_len <= SHORT and "fused_recurrent" in self.forms
        mode = "fused_recurrent" if short else self.mode
        if mode == "parallel" and (call.keep or state is not None):
            mode = "chunk"  # parallel forms have no state
        assert mode is not None
        if mode != "parallel":
            settings |= {"initial_state": state, "output_final_state": call.keep}
        with torch.autocast(inputs[0].device.type, enabled=False):  # the op chooses its precision itself
            o, state = self.forms[mode](*inputs, cu_seqlens=call.cu_seqlens, **settings)
        self.remember(call, recurrent_state=state)
        return o

    # ---- sizes

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state, and of the states of token shifts."""
        raise NotImplementedError(f"{type(self).__name__} must define recurrent_size()")

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of state per sequence: the recurrent state and the short convolutions', whatever its length."""
        return self.recurrent_size() + sum(getattr(self, name).state_size for name in self.conv_names)


def packing(hidden_states: Tensor, cu_seqlens: Tensor | None, keywords: Mapping[str, Any]) -> Tensor | None:
    """`cu_seqlens` by whichever of its names a call gives it."""
    cu_seqlens, on_cpu = merge_cu_seqlens(cu_seqlens, keywords.get("cu_seq_lens_q")), keywords.get("cu_seqlens_cpu")
    return on_cpu.to(hidden_states.device) if cu_seqlens is None and on_cpu is not None else cu_seqlens


class ChannelMixer(TokenMixer):
    """Base of MLPs that keep a state: a block calls them with its cache, its mask and its packing.

    `mix()` as in a token mixer; the call returns tokens alone.
    """

    uses_cache: ClassVar[bool] = True
    counts_tokens = False

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, D] -> [B, T, D]`, with the keywords of `TokenMixer.forward`."""
        return super().forward(hidden_states, **kwargs)[0]


def _same(x: Tensor) -> Tensor:
    return x


def build_from_config(cls: type[Module], config: Any, layer_idx: int | None) -> Module:
    """`cls(...)` with every parameter that the config has a field for, and `layer_idx` if it takes one.

    `cls.config_names` says which field a parameter takes where their names differ.
    """
    parameters = inspect.signature(cls.__init__).parameters
    renamed: Mapping[str, str] = getattr(cls, "config_names", {})
    settings: dict[str, Any] = {"layer_idx": layer_idx} if "layer_idx" in parameters else {}
    for name in parameters:
        for field_name in (renamed.get(name, name), name):
            if name != "layer_idx" and hasattr(config, field_name):
                settings[name] = getattr(config, field_name)
                break
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise _by_field_name(error, renamed, config) from None


def _by_field_name(error: Exception, renamed: Mapping[str, str], config: Any) -> Exception:
    """The error, with the name of the config's field where it begins with that of a parameter."""
    message = str(error)
    name = message.split(" ", 1)[0]
    field_name = renamed.get(name, name)
    if field_name == name or not hasattr(config, field_name):
        return error
    return type(error)(field_name + message.removeprefix(name))


def check_positive(**sizes: int) -> None:
    """Raise unless every size is an int of at least 1."""
    for name, size in sizes.items():
        check_setting(name, int, size)


def _first_positions(mask: Tensor | None, padding: Padding | None, seen: int, seq_len: int) -> int | Tensor:
    """Tokens that each row has seen before this call, without its padding: where its positions go on."""
    if not seen:
        return 0
    if mask is None and padding is None:
        return seen
    if mask is None or mask.shape[1] != seen + seq_len:
        raise ValueError(
            f"attention_mask must cover the cached tokens too: {seen} + {seq_len} columns, "
            f"got {'no mask' if mask is None else mask.shape[1]}"
        )
    return (mask[:, :seen] != 0).sum(-1)
