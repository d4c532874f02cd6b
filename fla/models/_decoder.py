"""The one decoder that all models are: embeddings, blocks of a token mixer and an MLP with pre-norms, a norm, a head.

    h <- x + mixer(norm(x));  x <- h + mlp(norm(h))

A model file declares config fields and class names (`gla.py` shows how). What may differ: `mixer_cls` or `build_mixer`,
`mlp_cls` (None: blocks without one), `build_norm`, and `ModuleNames`, from which key prefixes and tied weights follow.

A model has two ways to hand tensors to its blocks. `layer_inputs()` computes one value a layer from parameters of the
model, which `add_parameters()` makes. The carry is one tensor that goes from block to block: a mixer with a
carry takes it and returns it, or one that it made. Blocks get both as positional arguments, since re-entrant
gradient checkpointing loses the gradients of keywords and of tensors inside tuples.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from fla.layers._mixer import TokenMixer, build_from_config
from fla.layers.attn import Attention
from fla.models._config import DecoderConfig
from fla.models._generation import CACHE_NAME, DecoderGenerationMixin
from fla.models._inputs import check_tokens, embed, lay_out, merge_cache, merge_packing, refuse_unknown
from fla.models._loading import StrictLoading, register_causal_lm
from fla.models._loss import IGNORE_INDEX, causal_lm_loss
from fla.models.cache import Cache
from fla.modules import LayerNorm, RMSNorm
from fla.modules.mlp import GatedMLP

__all__ = [
    "DecoderBlock",
    "DecoderConfig",
    "DecoderForCausalLM",
    "DecoderModel",
    "GatedMLP",
    "ModuleNames",
    "cache_before_embeds",
    "register_causal_lm",
]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ModuleNames:
    """Attribute names, and with them the state-dict keys, of a model."""

    model: str = "model"
    embeddings: str = "embeddings"
    mixer_norm: str = "attn_norm"
    mixer: str = "attn"
    mlp_norm: str = "mlp_norm"
    mlp: str = "mlp"
    norm: str = "norm"


def _shared_parameters(module: nn.Module) -> dict[str, str]:
    """Further name -> first name of every parameter that a module has under several names."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: owner for name, owner in names if name != owner}


class DecoderBlock(GradientCheckpointingLayer):
    """One layer: token mixer and MLP, each behind a norm, each added to the stream.

    An `mlp_cls` whose `uses_cache` is True is called with the cache, the mask and the packing, like a mixer.
    """

    mixer_cls: ClassVar[type[TokenMixer]]
    mlp_cls: ClassVar[type[nn.Module] | None] = GatedMLP
    names: ClassVar[ModuleNames] = ModuleNames()

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.add_module(self.names.mixer_norm, self.build_norm(config))
        mixer: Any = self.build_mixer(config, layer_idx)
        mixer._tied_weights_keys = _shared_parameters(mixer)  # saved once; transformers looks for this in every module
        self.add_module(self.names.mixer, mixer)
        if self.mlp_cls is not None:
            self.add_module(self.names.mlp_norm, self.build_norm(config))
            self.add_module(self.names.mlp, build_from_config(self.mlp_cls, config, layer_idx))

    @classmethod
    def build_norm(cls, config: DecoderConfig) -> nn.Module:
        """The RMSNorm of blocks and model; with `fuse_norm=False` PyTorch's own, under the same key."""
        norm_cls = RMSNorm if config.fuse_norm else nn.RMSNorm
        return norm_cls(config.hidden_size, eps=config.norm_eps)

    @classmethod
    def build_mixer(cls, config: DecoderConfig, layer_idx: int) -> TokenMixer:
        """`mixer_cls`, or softmax attention where the config's `attn` says so."""
        spec = config.attention_spec(layer_idx)
        if spec is None:
            return cls.mixer_cls.from_config(config, layer_idx)
        names = ("num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
        return Attention(
            hidden_size=config.hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            layer_idx=layer_idx,
            **{name: spec[name] for name in names},
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        carry: Tensor | None = None,
        *extra: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """`[B, T, D]` -> (`[B, T, D]`, None, cache), and the carry if the mixer has one.

        `carry` and `extra`, the mixer's other `inputs` in their order, are positional for the sake of checkpointing;
        the mixer's own keywords do the same.
        """
        call = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        mixer: Any = getattr(self, self.names.mixer)
        normed = getattr(self, self.names.mixer_norm)(hidden_states)
        mixed, _, past_key_values, *carried = mixer(normed, **call, **mixer.named_inputs(carry, extra))
        if self.mlp_cls is None:
            hidden_states = hidden_states + mixed
        else:
            hidden_states = self._add_mlp(hidden_states, mixed, call)
        return hidden_states, None, past_key_values, *carried

    def _add_mlp(self, hidden_states: Tensor, mixed: Tensor, call: dict[str, Any]) -> Tensor:
        """The stream after `mixed` and the MLP's output were added to it."""
        mlp_norm, mlp = getattr(self, self.names.mlp_norm), getattr(self, self.names.mlp)
        if isinstance(mlp_norm, LayerNorm):  # ours, RMSNorm among them: adds and norms in one
            normed, stream = mlp_norm(mixed, residual=hidden_states, prenorm=True)
        else:
            stream = hidden_states + mixed
            normed = mlp_norm(stream)
        return stream + (mlp(normed, **call) if getattr(self.mlp_cls, "uses_cache", False) else mlp(normed))


class DecoderPreTrainedModel(StrictLoading):
    """Initialisation, and what transformers wants to know of every model; it follows from `block_cls`."""

    config_class = DecoderConfig
    block_cls: ClassVar[type[DecoderBlock]]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - accelerate leaves caches where they are

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model_cls" in vars(cls):
            cls.block_cls = vars(cls)["model_cls"].block_cls
        if hasattr(cls, "block_cls"):
            names = cls.block_cls.names
            cls.base_model_prefix = names.model
            cls._no_split_modules = [cls.block_cls.__name__]
            if hasattr(cls, "model_cls"):
                cls._tied_weights_keys = {"lm_head.weight": f"{names.model}.{names.embeddings}.weight"}

    def _init_weights(self, module: nn.Module) -> None:
        """Weights normal(0, initializer_range), biases 0; a module with its own rule (norms 1) has `reset_parameters`.

        transformers calls this for children before parents, and makes `init` leave loaded parameters alone.
        """
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In code that is not its own, transformers passes over modules without parameters of their own: such as a
        # feature map, whose rule is for its children. Ours needs no such care, since it initialises through `init`.
        super()._initialize_weights(module, is_custom_code=False)


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, blocks and a final norm: `input_ids` `[B, T]` -> hidden states `[B, T, D]`."""

    # AutoModel may load the body out of a causal LM's checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        config.check()
        names = self.block_cls.names
        self.add_module(names.embeddings, nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id))
        self.layers = nn.ModuleList(self.block_cls(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.add_module(names.norm, self.block_cls.build_norm(config))
        self.add_parameters(config)
        self.gradient_checkpointing = False
        self.post_init()

    def add_parameters(self, config: DecoderConfig) -> None:
        """Make parameters of the model itself, if it has any; `reset_parameters()` gives them their first values."""

    def layer_inputs(self) -> Sequence[Tensor | tuple[Tensor | None, ...] | None]:
        """One value a layer: what its mixer lists in `inputs` beside a carry, a tuple if that are several, or None."""
        return [None] * len(self.layers)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return getattr(self, self.block_cls.names.embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        setattr(self, self.block_cls.names.embeddings, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the blocks.

        Shapes: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`; `attention_mask` `[B, seen + T]`, 1 = token, 0 =
        padding, which may be left, right or in between; `cu_seqlens` `[N + 1]` packs N sequences into a batch of 1
        (and wins over a mask); `past_key_values` (in transformers `cache` from 5.24 on, which is accepted too)
        continues where an earlier call ended. Hidden states, when asked for: the input of every block, then the final
        normed output. Raises ValueError or TypeError naming the argument that does not fit.

        `position_ids` `[B, T]` that do not grow from one token of a row to the next pack sequences too, as does a
        `seq_idx` `[B, T]` that changes. Looking at their values waits for the GPU once a call; `cu_seqlens`, or
        `cu_seq_lens_q` as transformers' flattening collator calls it, says the same without.
        """
        refuse_unknown(kwargs)
        name, x = embed(self.get_input_embeddings(), input_ids, inputs_embeds, self.config.hidden_size)
        cu_seqlens = merge_packing(cu_seqlens, cu_seq_lens_q, name, x)
        if output_attentions:
            logger.warning_once("output_attentions=True has no effect: linear attention forms no attention matrix")
        past, use_cache = self._cache(merge_cache(past_key_values, cache), use_cache)
        seen = 0 if past is None else past.get_seq_length()
        layout = lay_out(x, attention_mask, cu_seqlens, position_ids, seq_idx, seen)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = layout.join(x)
        hidden_states: Any = ()
        carry: tuple[Tensor | None, ...] = (None,)
        packing = {"cu_seqlens": layout.cu_seqlens, "padding": layout.padding}
        for block, value in zip(self.layers, self.layer_inputs(), strict=True):
            hidden_states += (layout.split(x),) if output_hidden_states else ()
            extra = value if isinstance(value, tuple) else () if value is None else (value,)
            x, _, past, *carried = block(x, layout.attention_mask, past, use_cache, False, *carry, *extra, **packing)
            carry = carried or carry
        x = layout.split(getattr(self, self.block_cls.names.norm)(x))
        fields: dict[str, Any] = {"last_hidden_state": x, CACHE_NAME: past}
        if output_hidden_states:
            fields["hidden_states"] = (*hidden_states, x)
        output = BaseModelOutputWithPast(**fields)
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> tuple[Cache | None, bool]:
        """The cache to use, ours; and whether to fill it: as asked, else by the config outside training."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values must be None in training with gradient checkpointing: it runs each block twice"
                )
            use_cache = False
        if past_key_values is None and not use_cache:
            return None, False
        return Cache.wrap(past_key_values), True


class DecoderForCausalLM(DecoderPreTrainedModel, DecoderGenerationMixin):
    """A `DecoderModel` and a head `[vocab, D]`: logits, the loss of next-token prediction, and `generate`."""

    model_cls: ClassVar[type[DecoderModel]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.model_cls(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion: nn.Module | None = None  # set it to replace the loss that the config chooses
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `DecoderModel.forward`, and logits `[B, T, vocab]` (the last `logits_to_keep` positions; 0 = all).

        `labels` `[B, T]` (pass `input_ids`; -100 = no target) are shifted inside: position t predicts token t + 1.
        The loss is their mean cross entropy, or their sum over `num_items_in_batch`. Logits are None only with labels
        and `fuse_linear_cross_entropy`, which never holds them all.
        """
        if "num_logits_to_keep" in kwargs:  # its name before transformers 4.50
            logits_to_keep = kwargs.pop("num_logits_to_keep")
        if labels is not None:
            check_tokens("labels", labels, getattr(self.lm_head, "out_features", None), ignored=IGNORE_INDEX)
        output = getattr(self, self.base_model_prefix)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=merge_cache(past_key_values, cache),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            seq_idx=seq_idx,
            **kwargs,
        )
        x = output.last_hidden_state
        loss: Any = None
        logits: Any = None
        if labels is None:
            logits = self.lm_head(_select(x, logits_to_keep))
        else:
            if labels.shape != x.shape[:2]:
                raise ValueError(f"labels must have shape {list(x.shape[:2])} like the input, got {list(labels.shape)}")
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(x.device, torch.long)
            loss, logits = causal_lm_loss(x, targets, self.lm_head, self.config, self.criterion, num_items_in_batch)
            logits = None if logits is None else _select(logits, logits_to_keep)
        fields: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states": output.hidden_states}
        result = CausalLMOutputWithPast(**fields, **{CACHE_NAME: getattr(output, CACHE_NAME)})
        return result if _wants_dict(return_dict, self.config) else result.to_tuple()


def cache_before_embeds(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with `past_key_values` before `inputs_embeds`, the positional order of the reference's Transformer."""
    parameters = list(inspect.signature(forward).parameters.values())
    at = [parameter.name for parameter in parameters].index("inputs_embeds")
    parameters[at : at + 2] = parameters[at + 1], parameters[at]

    @functools.wraps(forward)
    def reordered(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return forward(self, input_ids, attention_mask, inputs_embeds, past_key_values, *args, **kwargs)

    vars(reordered)["__signature__"] = inspect.Signature(parameters)  # the Trainer reads it
    return reordered


def _select(x: Tensor, positions: int | Tensor | None) -> Tensor:
    if isinstance(positions, Tensor):
        return x[:, positions]
    return x[:, -positions:] if positions else x


def _wants_dict(return_dict: bool | None, config: Any) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
