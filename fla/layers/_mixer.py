"""`TokenMixer`: the base of all token mixers. `MultiHeadMixer` (`_heads.py`) is the base of those with heads.

    [B, T, D] -> projections (-> short convolutions) -> op -> output projection -> [B, T, D]

A mixer's file declares its projections and defines `mix()`. The base deals with padding, packing, caches, short
convolutions, token shifts, the choice of the op's form, and the tensors that a model passes to its layers.

A mixer lists in `inputs` the tensors that a model may pass to it. They are keywords of `forward()`, and each may be
None. There are two kinds:

- Tensors for this layer alone, which the model computes from its own parameters. `mix()` reads `call.extra[name]`.
- The carry, which goes from layer to layer; `carry_name` is its name. `mix()` reads `call.carry`, may replace it, and
  `forward()` returns it as a fourth value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
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

# Arguments of ops and modules that a layer fills from the cache: errors about them are about the cache.
_STATE_ARGUMENTS = ("initial_state", "cache", "attn_state")

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
    """All that a forward call knows besides its tokens."""

    batch_size: int
    seq_len: int  # before padding is removed
    attention_mask: Tensor | None  # [B, T_total]; None for packed input
    padding: Padding | None  # given if padding was removed, so that the tokens are one packed row
    cu_seqlens: Tensor | None  # of the packed row: the caller's, or those that follow from the padding
    cache: Any
    state: Mapping[str, Any]  # what the cache holds for this layer
    seen: int  # number of columns in earlier calls
    start: int | Tensor  # position of each row's first token, an int or [B]; 0 for layers without positions
    keep: bool  # whether to store the state after this call
    slots: dict[str, Any] = field(default_factory=dict)  # states to store in the cache, by name
    extra: Mapping[str, Tensor | None] = field(default_factory=dict)  # tensors from the model for this layer, by name
    carry: Tensor | None = None  # from an earlier layer, packed like the tokens; `mix()` may replace it


class TokenMixer(nn.Module):
    """Base of all token mixers."""

    # Name of a mode -> form of the mixer's op.
    forms: ClassVar[Mapping[str, Callable[..., tuple[Tensor, Any]]]] = {}
    # Whether results depend on where a token stands in its sequence (rotary embeddings).
    uses_positions: ClassVar[bool] = False
    # Whether a call of this layer advances the cache's count of the tokens that its block has seen.
    counts_tokens: ClassVar[bool] = True
    # Name -> shape (axes: `size_inputs`) of the tensors that a model may pass; and which of them is the carry.
    inputs: ClassVar[Mapping[str, str]] = {}
    carry_name: ClassVar[str | None] = None
    # Constructor parameter -> field of a model's config, where the two have different names.
    config_names: ClassVar[Mapping[str, str]] = {"mode": "attn_mode"}
    # The modules that compute log decays. Their gradients, differences of large terms, have a budget of their own.
    gate_names: ClassVar[tuple[str, ...]] = ("gk_proj",)
    # For tests: the smallest useful settings with `hidden_size` 32, and by name further settings worth a test.
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
        self.size_inputs(D=hidden_size)

    def size_inputs(self, **sizes: int) -> None:
        """Give the axes of `inputs` their sizes: `D` is the hidden size, and a mixer may name axes of its own."""
        shapes = {"hidden_states": "B T D", **self.inputs}
        self.input_shapes = {
            name: " ".join(str(sizes.get(axis, axis)) for axis in shape.split()) for name, shape in shapes.items()
        }

    @classmethod
    def from_config(cls, config: Any, layer_idx: int | None = None) -> TokenMixer:
        """Build the mixer from the fields of a model's config, as `build_from_config` does."""
        return build_from_config(cls, config, layer_idx)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        """Compute what `output()` takes from tokens `[B, T, D]`, which are one packed row if `call.cu_seqlens` is set.

        It must call `remember()` once, which `recur()` does.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mix()")

    def output(self, o: Tensor) -> Tensor:
        """Compute tokens `[B, T, D]` from the result of `mix()`; unless overridden, that result is returned."""
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

        A layer with a carry returns it, or the tensor that replaces it, as a fourth value.

        Args:
            attention_mask: `[B, at least T]`, 1 = token, 0 = padding; the last `T` columns belong to this call.
                Padding may be anywhere in a row. It has no effect on tokens, and its outputs are 0.
            past_key_values: a cache. The layer continues from the state that the cache holds for `layer_idx`, and
                stores its new state there.
            use_cache: ignored; the state is stored if `past_key_values` is given.
            output_attentions: must be False; there is no attention matrix to return.
            cu_seqlens: `[N + 1]`, bounds of sequences packed into one row (`B = 1`). With it a mask is ignored.
                `cu_seq_lens_q` is another name of it, and `cu_seqlens_cpu` the same on the CPU.
            padding: what a model computed from the mask once for all its layers; by default the layer computes it.

        Further keywords are the names in `inputs`. Those of other layers of a model, and those that trainers pass to
        every layer, are ignored. Raises ValueError or TypeError, naming the argument.
        """
        if kwargs:
            self._check_keywords(kwargs)
        if output_attentions:
            raise ValueError(f"output_attentions must be False: {type(self).__name__} never forms the attention matrix")
        cu_seqlens = packing(hidden_states, cu_seqlens, kwargs)
        inputs: dict[str, Any] = {name: kwargs.get(name) for name in self.inputs}
        check_shapes(self.input_shapes, cu_seqlens=cu_seqlens, hidden_states=hidden_states, **inputs)
        call = self._begin(hidden_states, attention_mask, past_key_values, cu_seqlens, padding)
        unpad, repad = (_identity, _identity) if call.padding is None else (call.padding.unpad, call.padding.repad)
        carry = None if self.carry_name is None else inputs.pop(self.carry_name)
        incoming_carry = call.carry = None if carry is None else unpad(carry)
        call.extra = inputs
        try:
            o = repad(self.output(self.mix(unpad(hidden_states), call)))
        except (TypeError, ValueError) as error:
            if not call.state or not any(f"{name} must" in str(error) for name in _STATE_ARGUMENTS):
                raise
            raise type(error)(f"past_key_values must be of the same model: in {type(self).__name__}, {error}") from None
        if self.carry_name is None:
            return o, None, past_key_values
        if call.carry is not None and call.carry is not incoming_carry:
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
        """Check the mask, the padding and the cache, and collect what `mix()` needs to know."""
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
            # The cache counts columns, not the tokens of each packed sequence, so positions could not go on from it.
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
        """The tensors from the model as keywords of `forward()`.

        `extra` has the values of all `inputs` but the carry, in their order, or is empty.
        """
        names = [name for name in self.inputs if name != self.carry_name]
        if names and len(extra) not in (0, len(names)):
            raise ValueError(f"{type(self).__name__} must be given {', '.join(names)}, got {len(extra)} values")
        named = dict(zip(names, extra, strict=False))
        return named if self.carry_name is None or carry is None else named | {self.carry_name: carry}

    def remember(self, call: Call, **slots: Any) -> Any:
        """Store `call.slots` and `slots` in the cache. Returns what the cache returns, or None without a cache."""
        slots = {**call.slots, **slots} if call.keep else {}
        return update_layer_cache(self, call.cache, offset=call.seq_len if self.counts_tokens else 0, **slots)

    def stored(self, call: Call, slot: str) -> Any:
        """What the cache holds in `slot` for this layer, or None if it holds nothing.

        Raises ValueError if it holds only what another kind of layer stores.
        """
        if call.state and slot not in call.state:
            raise ValueError(
                f"past_key_values must be of the same model: {type(self).__name__} continues from {slot}, got "
                f"{', '.join(call.state)}"
            )
        return call.state.get(slot)

    # ---- short convolutions and the token shift

    def add_short_convs(self, convs: Mapping[str, tuple[int, str | None]], conv_size: int, conv_bias: bool) -> None:
        """Add causal depthwise convolutions. `convs`: name of the module -> (channels, activation)."""
        check_positive(conv_size=conv_size)
        for name, (channels, act) in convs.items():
            self.add_module(name, ShortConvolution(channels, conv_size, bias=conv_bias, activation=act))
        self.conv_names += tuple(convs)

    def convolve(self, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Apply the convolutions, in the order in which they were added, to the inputs.

        The convolutions continue from the cache. A mixer without convolutions gets its inputs back.
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
        """`x[t - 1] - x[t]` in every sequence. The `slot` of the cache holds the last `x` of every sequence."""
        delta, last = token_shift(x, call.cu_seqlens, call.state.get(slot), output_cache=True)
        call.slots[slot] = last
        return delta

    # ---- the op

    def recur(self, call: Call, *inputs: Tensor, **settings: Any) -> Tensor:
        """Run the op from the cached state, and store the new state.

        The form is that of `mode`, with two exceptions: short inputs without gradients take the recurrent form, unless
        the call is exported, for any length; and in place of a parallel form, which has no state, a call with a state
        takes the chunk form.
        """
        state = self.stored(call, "recurrent_state")
        inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_exporting())
        short = inference and call.seq_len <= SHORT and "fused_recurrent" in self.forms
        mode = "fused_recurrent" if short else self.mode
        if mode == "parallel" and (call.keep or state is not None):
            mode = "chunk"
        assert mode is not None
        if mode != "parallel":
            settings |= {"initial_state": state, "output_final_state": call.keep}
        with torch.autocast(inputs[0].device.type, enabled=False):  # ops choose their precision themselves
            o, state = self.forms[mode](*inputs, cu_seqlens=call.cu_seqlens, **settings)
        self.remember(call, recurrent_state=state)
        return o

    # ---- sizes

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state and of its token shifts."""
        raise NotImplementedError(f"{type(self).__name__} must define recurrent_size()")

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of a sequence's whole state: `recurrent_size()` and the states of the short convolutions.

        It is the same for every `sequence_length`.
        """
        return self.recurrent_size() + sum(getattr(self, name).state_size for name in self.conv_names)


_drawn_later: ContextVar[bool] = ContextVar("_drawn_later", default=False)


@contextmanager
def weights_drawn_later() -> Iterator[None]:
    """Within this context a layer leaves its first `reset_parameters()` to the model, which calls it when it is whole.

    Otherwise slow draws, such as those of orthogonal matrices, would be made twice.
    """
    token = _drawn_later.set(True)
    try:
        yield
    finally:
        _drawn_later.reset(token)


def draw_weights(layer: nn.Module) -> None:
    """Call `reset_parameters()` at the end of a layer's constructor, unless a model does so later."""
    if not _drawn_later.get():
        layer.reset_parameters()  # type: ignore[operator]


def packing(hidden_states: Tensor, cu_seqlens: Tensor | None, keywords: Mapping[str, Any]) -> Tensor | None:
    """`cu_seqlens` by whichever of its names a call gives it."""
    cu_seqlens, on_cpu = merge_cu_seqlens(cu_seqlens, keywords.get("cu_seq_lens_q")), keywords.get("cu_seqlens_cpu")
    return on_cpu.to(hidden_states.device) if cu_seqlens is None and on_cpu is not None else cu_seqlens


class ChannelMixer(TokenMixer):
    """Base of MLPs that keep a state. Blocks pass them the cache, the mask and the packing.

    A subclass defines `mix()` like a token mixer. A call returns only the tokens.
    """

    uses_cache: ClassVar[bool] = True
    counts_tokens = False

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, D] -> [B, T, D]`, with the keywords of `TokenMixer.forward`."""
        return super().forward(hidden_states, **kwargs)[0]


def _identity(x: Tensor) -> Tensor:
    return x


def build_from_config(cls: type[Module], config: Any, layer_idx: int | None) -> Module:
    """`cls(...)`, where every parameter that `config` has a field for takes the value of that field.

    `cls.config_names` maps a parameter to its field if their names differ. `layer_idx` is passed if `cls` takes it.
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
    """Raise TypeError or ValueError unless every size is an int of at least 1."""
    for name, size in sizes.items():
        check_setting(name, int, size)


def _first_positions(mask: Tensor | None, padding: Padding | None, seen: int, seq_len: int) -> int | Tensor:
    """The position of each row's first token in this call: how many tokens, without padding, it has seen before."""
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
