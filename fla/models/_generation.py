"""`generate` for models whose past is a recurrent state.

The cache counts the tokens that it has seen, which tells which tokens are new. Ways of decoding that go back in the
sequence are refused, since a recurrent state cannot.
"""

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from fla.models._inputs import begins_anew, merge_cache
from fla.models.cache import Cache

# What transformers calls the cache in its outputs and its decoding loop: `cache` from 5.24 on
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


class DecoderGenerationMixin(GenerationMixin):
    """Generation as in transformers: greedy, sampling, beam search, with left-padded batches and chunked prefill."""

    _is_stateful = True  # tells transformers that the cache cannot be rewound

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.generate`. Raises ValueError for decoding that rewinds (contrastive, assisted, ...)."""
        settings = copy.deepcopy(generation_config or self.generation_config)
        for name, value in kwargs.items():
            if hasattr(settings, name):
                setattr(settings, name, value)
        mode = settings.get_generation_mode(kwargs.get("assistant_model"))
        if str(mode.value) not in _MODES:
            raise ValueError(
                f"generate() must use {', '.join(_MODES)} with {type(self).__name__}, got {mode.value}: a recurrent "
                "state cannot be rewound, which other decoding needs"
            )
        for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None in generate(): give a left-padded batch and its attention_mask")
        if begins_anew(kwargs.get("position_ids"), kwargs.get("attention_mask")):
            raise ValueError(
                "position_ids must not start anew inside a row in generate(): give a left-padded batch and its "
                "attention_mask"
            )
        cache = merge_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Any = None,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor | None = None,
        cache: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next forward call, with only those tokens that the cache has not seen.

        `attention_mask` covers the seen and the new tokens. `input_ids` may hold all tokens or only the new ones. The
        number of new tokens is `next_sequence_length`, or else how far the mask reaches beyond the cache, or else what
        `input_ids` holds. The mask comes second because the cache may hold more than it covers: peft's virtual tokens.
        """
        past_key_values = merge_cache(past_key_values, cache)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        embedded = inputs_embeds is not None and seen < inputs_embeds.shape[1]
        tokens = inputs_embeds if embedded else input_ids
        given = tokens.shape[1]
        if next_sequence_length is not None:
            new = next_sequence_length
        elif attention_mask is not None:
            new = attention_mask.shape[1] - seen
        else:
            new = given - seen if given > seen and not is_first_iteration else given
        if not seen and next_sequence_length is None and new != given:
            raise ValueError(f"attention_mask must have a column for each of the {given} tokens, got {new}")
        if not 0 < new <= given:
            raise ValueError(
                f"{'inputs_embeds' if embedded else 'input_ids'} must hold every token that the cache, which has seen "
                f"{seen}, has not, got {given}: pass the whole sequence, or an attention_mask that covers the cached "
                "tokens too"
            )
        tokens = tokens[:, -new:]
        inputs = {"inputs_embeds": tokens} if embedded else {"input_ids": tokens.contiguous()}
        # Other keywords, such as position_ids, cache_position and labels, are dropped: forward() does not need them.
        extra = {k: kwargs[k] for k in ("output_hidden_states", "output_attentions") if k in kwargs}
        inputs |= {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        return inputs | extra | ({} if logits_to_keep is None else {"logits_to_keep": logits_to_keep})

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None: these models have one cache, got {implementation!r}")
        past = model_kwargs.get(CACHE_NAME)
        if past is not None or generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = Cache.wrap(past)
            model_kwargs[CACHE_NAME]._is_user_defined = past is not None

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: positions follow from the mask and the cache."""
