"""What every field of a config means, for `help()` of the config classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FIELDS: Mapping[str, str] = {
    "vocab_size": "How many tokens there are.",
    "hidden_size": "Width of the stream between the layers.",
    "num_hidden_layers": "How many layers, each a token mixer and an MLP.",
    "hidden_ratio": "Width of the MLPs as a factor of `hidden_size`, times 2/3, rounded up to a multiple of 256.",
    "intermediate_size": "Width of the MLPs itself; None: by `hidden_ratio`.",
    "hidden_act": "Activation in the MLPs, a name of `fla.modules.activations.ACT2FN`.",
    "max_position_embeddings": "Length to prepare rotary tables for; longer inputs are fine. None: no length.",
    "elementwise_affine": "Whether the output norms of token mixers have weights.",
    "norm_eps": "What norms add to the mean square.",
    "attn": "Which layers are softmax attention, and its settings; None: none. See `DecoderConfig`.",
    "use_cache": "Whether calls in evaluation mode return a cache.",
    "pad_token_id": "Token that fills up short rows; its embedding gets no gradient. None: there is none.",
    "bos_token_id": "Token that begins a text, for `generate`; None: there is none.",
    "eos_token_id": "Token, or list of tokens, that ends a text, for `generate`; None: there is none.",
    "tie_word_embeddings": "Whether embeddings and head are one matrix.",
    "initializer_range": "Standard deviation of the initial weights.",
    "fuse_norm": "Whether a norm is computed in one with what stands beside it; the results are the same.",
    "fuse_swiglu": "Whether MLPs compute their product again in the backward pass instead of keeping it.",
    "fuse_cross_entropy": "Whether the loss computes its gradient in one pass over the logits.",
    "fuse_linear_cross_entropy": "Whether the loss never holds all logits, which then are not returned.",
    "attn_mode": "Form of the op in training and for long inputs, a name that the layer's `mode` takes.",
    "num_heads": "How many heads.",
    "num_kv_heads": "Heads of keys and values, each shared by several query heads; None: `num_heads`.",
    "num_v_heads": "Heads of values, a multiple of `num_heads`; None: `num_heads`.",
    "head_dim": "Width of a head's queries and keys.",
    "expand_k": "Width of all keys as a factor of `hidden_size`.",
    "expand_v": "Width of values as a factor of `hidden_size`, or of `head_dim` where there is such a field.",
    "feature_map": "Name of the function that queries and keys go through; None: they stay as they are.",
    "use_short_conv": "Whether short convolutions follow the projections of queries, keys and values.",
    "conv_size": "How many tokens a short convolution sees.",
    "use_output_gate": "Whether a gate multiplies the output of the heads.",
    "use_gate": "Whether a gate multiplies the output of the heads.",
    "allow_neg_eigval": "Whether writes have up to twice their strength, so that they may reverse what a key holds.",
    "use_lower_bound": "Whether forget gates have lower bounds, learned and higher from layer to layer.",
    "clamp_min": "Lower bound of the log decay; None: none.",
    "use_gk": "Must be True: every key channel has a decay of its own.",
    "use_gv": "Must be False: value channels have no decay.",
    "tie_feature_map_qk": "Whether queries and keys share the feature map's weights.",
    "norm_q": "Whether the features of queries are divided by their sum.",
    "norm_k": "Whether the features of keys are divided by their sum.",
    "norm_feature_map": "Whether outputs are divided by the sum of the weights of all earlier tokens.",
    "qkv_bias": "Whether the projections of queries, keys and values have biases.",
    "qk_norm": "Whether, or by which norm, every head's queries and keys are normalised.",
    "window_size": "How many tokens a token sees, itself among them; None: all.",
    "rope_theta": "Base of the rotary frequencies.",
    "norm_first": "Must be False.",
    "attention_bias": "Must be False; `qkv_bias` is the field for biases.",
}


def document_fields(config_class: Any, not_ours: frozenset[str]) -> None:
    """Add a line for every field to the docstring, with what `field_help` of the class or `FIELDS` says of it."""
    if config_class.__doc__ is None:  # python -OO
        return
    sentences = {**FIELDS, **config_class.field_help}
    fields = [field for field in dataclasses.fields(config_class) if field.name not in not_ours]
    lines = [f"        {field.name} ({field.default!r}): {sentences.get(field.name, '')}" for field in fields]
    config_class.__doc__ = "\n".join([config_class.__doc__.rstrip(), "", "    Fields, and their defaults:", *lines, ""])
