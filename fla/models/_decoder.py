"""The decoder that all models share: embeddings, blocks, a final norm and a head. A block is

    h <- x + mixer(norm(x))
    x <- h + mlp(norm(h))

and may put a norm of x itself in front. A model file declares config fields and classes (`gla.py` shows how). Models
may differ in `mixer_cls` or `build_mixer`, in `mlp_cls` (None: no MLP), in `build_norm` and `build_pre_norm`, and in
`ModuleNames`, which determine state-dict keys and tied weights.

A model has two ways to pass tensors to its blocks. `layer_inputs()` computes a value for every layer from parameters of
the model, which `add_parameters()` creates. The carry is one tensor that goes from block to block: a mixer with a carry
takes it and returns it or its replacement. Blocks take both as positional arguments, because re-entrant gradient
checkpointing loses the gradients of keywords and of tensors inside tuples.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from fla.layers._mixer import TokenMixer, build_from_config, weights_drawn_later
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
    """The attribute names of a model's parts, of which its state-dict keys consist."""

    model: str = "model"
    embeddings: str = "embeddings"
    pre_norm: str = "pre_norm"
    mixer_norm: str = "attn_norm"
    mixer: str = "attn"
    mlp_norm: str = "mlp_norm"
    mlp: str = "mlp"
    norm: str = "norm"


def _shared_parameters(module: nn.Module) -> dict[str, str]:
    """For parameters that a module has under several names: every further name -> the first name."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: owner for name, owner in names if name != owner}


class DecoderBlock(GradientCheckpointingLayer):
    """One layer: token mixer and MLP, each after a norm and with a residual connection.

    An `mlp_cls` whose `uses_cache` is True is called with the cache, the mask and the packing, like a mixer.
    """

    mixer_cls: ClassVar[type[TokenMixer]]
    mlp_cls: ClassVar[type[nn.Module] | None] = GatedMLP
    names: ClassVar[ModuleNames] = ModuleNames()

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        pre_norm = self.build_pre_norm(config, layer_idx)
        if pre_norm is not None:
            self.add_module(self.names.pre_norm, pre_norm)
        self.add_module(self.names.mixer_norm, self.build_norm(config))
        mixer: Any = self.build_mixer(config, layer_idx)
        mixer._tied_weights_keys = _shared_parameters(mixer)  # by this attribute transformers saves them only once
        self.add_module(self.names.mixer, mixer)
        if self.mlp_cls is not None:
            self.add_module(self.names.mlp_norm, self.build_norm(config))
            self.add_module(self.names.mlp, build_from_config(self.mlp_cls, config, layer_idx))

    @classmethod
    def build_norm(cls, config: DecoderConfig) -> nn.Module:
        """The RMSNorm of blocks and model. With `fuse_norm=False` it is PyTorch's; the state-dict key is the same."""
        norm_cls = RMSNorm if config.fuse_norm else nn.RMSNorm
        return norm_cls(config.hidden_size, eps=config.norm_eps)

    @classmethod
    def build_pre_norm(cls, config: DecoderConfig, layer_idx: int) -> nn.Module | None:
        """A norm that replaces the stream before the block adds to it, or None."""
        return None

    @classmethod
    def build_mixer(cls, config: DecoderConfig, layer_idx: int) -> TokenMixer:
        """A mixer of the class `mixer_cls`, or softmax attention if the config's `attn` lists the layer."""
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
        """`[B, T, D]` -> (`[B, T, D]`, None, cache), and the carry as a fourth value if the mixer has one.

        `carry` and `extra` (the mixer's other `inputs` in their order) are positional because re-entrant checkpointing
        loses the gradients of keywords.
        """
        call = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        mixer: Any = getattr(self, self.names.mixer)
        pre_norm = getattr(self, self.names.pre_norm, None)
        if pre_norm is not None:
            hidden_states = pre_norm(hidden_states)
        normed = getattr(self, self.names.mixer_norm)(hidden_states)
        mixed, _, past_key_values, *carried = mixer(normed, **call, **mixer.named_inputs(carry, extra))
        if self.mlp_cls is None:
            hidden_states = hidden_states + mixed
        else:
            hidden_states = self._add_mlp(hidden_states, mixed, call)
        return hidden_states, None, past_key_values, *carried

    def _add_mlp(self, hidden_states: Tensor, mixed: Tensor, call: dict[str, Any]) -> Tensor:
        """Add `mixed` and then the output of the MLP to the residual stream `hidden_states`."""
        mlp_norm, mlp = getattr(self, self.names.mlp_norm), getattr(self, self.names.mlp)
        if isinstance(mlp_norm, LayerNorm):  # our norms, RMSNorm included, add the residual themselves
            normed, stream = mlp_norm(mixed, residual=hidden_states, prenorm=True)
        else:
            stream = hidden_states + mixed
            normed = mlp_norm(stream)
        return stream + (mlp(normed, **call) if getattr(self.mlp_cls, "uses_cache", False) else mlp(normed))


class DecoderPreTrainedModel(StrictLoading):
    """Initialisation of weights, and the class attributes that transformers needs, derived from `block_cls`."""

    config_class = DecoderConfig
    block_cls: ClassVar[type[DecoderBlock]]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - accelerate leaves caches where they are

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        if not isinstance(config, self.config_class):
            raise TypeError(f"config must be a {self.config_class.__name__}, got a {type(config).__name__}")

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
        """Initialise weights from a normal distribution with standard deviation `initializer_range`, biases with 0.

        Modules with a rule of their own, such as norms, have `reset_parameters()`. transformers calls this method for
        children before parents, and its `init` functions leave loaded parameters as they are.
        """
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # With `is_custom_code` transformers skips modules without direct parameters, to protect what is loaded. That
        # would skip feature maps, whose `reset_parameters` initialises their children. Our code needs no protection,
        # since it initialises through `init`.
        super()._initialize_weights(module, is_custom_code=False)


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, blocks and a final norm: `input_ids` `[B, T]` -> hidden states `[B, T, D]`."""

    # The end of a matrix's key in older checkpoints -> the ends of the keys of the parameters that its rows are now.
    split_rows: ClassVar[Mapping[str, Sequence[str]]] = {}
    # AutoModel may load this model from the checkpoint of a causal LM, which has a head too.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        config.check()
        names = self.block_cls.names
        self.add_module(names.embeddings, nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id))
        with weights_drawn_later():
            blocks = [self.block_cls(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.add_module(names.norm, self.block_cls.build_norm(config))
        self.add_parameters(config)
        self.gradient_checkpointing = False
        self.post_init()

    def add_parameters(self, config: DecoderConfig) -> None:
        """Create parameters of the model itself, if it has any. `reset_parameters()` must initialise them."""

    def layer_inputs(self) -> Sequence[Tensor | tuple[Tensor | None, ...] | None]:
        """For every layer the tensors that its mixer lists in `inputs`, without the carry.

        They are a tensor, a tuple if there are several, or None if there are none.
        """
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

        Args:
            input_ids: `[B, T]`; or else inputs_embeds: `[B, T, D]`.
            attention_mask: `[B, seen + T]`, 1 = token, 0 = padding, which may be left, right or in between.
            past_key_values: a cache, from which the call continues. `cache`, as transformers calls it from 5.24 on, is
                another name of it.
            use_cache: whether to return a cache; by default as the config says, and not in training or `torch.export`.
            output_hidden_states: also return the input of every block and the final normed output.
            cu_seqlens: `[N + 1]`, bounds of sequences packed into one row (B = 1); with it a mask is ignored.
                `cu_seq_lens_q` is another name of it.
            position_ids: `[B, T]`. Where they do not grow from one token of a row to the next, a packed sequence
                begins (zeros everywhere are sequences of one token each, as in transformers). They are used for nothing
                else. Without `cu_seqlens` their values are read once a call, which waits for the GPU.
            seq_idx: `[B, T]`, the number of each token's sequence; the same as `position_ids` to the model.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
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
        """The cache of this call, and whether there is one.

        By default the config decides. Training has none, and neither has `torch.export`, which knows no such output.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
        if self.training and self.gradient_checkpointing:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values must be None in training with gradient checkpointing, which runs each block twice"
                )
            use_cache = False
        if past_key_values is None and not use_cache:
            return None, False
        cache = Cache.wrap(past_key_values)
        if cache.layers and len(cache.layers) != len(self.layers):
            raise ValueError(
                f"past_key_values must be of the same model, which has {len(self.layers)} layers, got the states of "
                f"{len(cache.layers)}"
            )
        return cache, True


class DecoderForCausalLM(DecoderPreTrainedModel, DecoderGenerationMixin):
    """A `DecoderModel` and a head `[vocab, D]`: logits, the loss of next-token prediction, and `generate`."""

    model_cls: ClassVar[type[DecoderModel]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.model_cls(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion: nn.Module | None = None  # users may set it, to replace the loss that the config chooses
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
        """Run the model and the head. The arguments of `DecoderModel.forward`, and

        Args:
            labels: `[B, T]`, usually `input_ids`; -100 = no target. Position t predicts `labels[:, t + 1]`.
            logits_to_keep: how many of the last positions get logits (0 = all), or a tensor of positions.
            num_items_in_batch: divide the summed loss by it; by default the loss is the mean over the targets.

        Returns:
            The loss if there are labels, and the logits `[B, T, vocab]`. With labels and `fuse_linear_cross_entropy`
            the logits are None, since they are never held all at once.
        """
        if "num_logits_to_keep" in kwargs:  # the name of `logits_to_keep` before transformers 4.50
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
