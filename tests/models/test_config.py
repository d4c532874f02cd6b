"""Configs: every field is read or refused, hybrids are checked and copied, sizes that do not divide are named."""

import copy
import dataclasses
import logging
import re
import typing

import pytest
import torch
from transformers import PreTrainedConfig

from fla.models import GLAConfig
from fla.models._config import DecoderConfig
from fla.models._fields import FIELDS

from .tiny import COMMON, HYBRID, REGISTRY, build, every_gated, every_type, tiny_config, tokens

# Read by transformers from the config's dict when it makes the generation config; see the test below.
TOKENS = {"bos_token_id", "eos_token_id"}


def own_fields(config_class):
    """The fields that we declare."""
    theirs = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - theirs


@every_type
def test_every_field_is_read_or_refused(model_type):
    causal_lm = REGISTRY[model_type]
    reads, recording = set(), []

    class Recording(causal_lm.config_class):
        def __getattribute__(self, name):
            if recording:
                reads.add(name)
            return super().__getattribute__(name)

    for extra in ({}, {"use_short_conv": True, "attn": HYBRID}):
        known = {k: v for k, v in extra.items() if k in own_fields(causal_lm.config_class)}
        config = Recording(**{**COMMON, **causal_lm.config_class.tiny, **known})
        recording.append(True)
        model = causal_lm(config)
        model(tokens(1, 4), labels=tokens(1, 4))
        recording.clear()
    fixed = causal_lm.config_class.fixed_fields
    assert own_fields(causal_lm.config_class) - reads - TOKENS - set(fixed) == set()
    for name, only in fixed.items():
        with pytest.raises(ValueError, match=re.escape(f"{name} must be {only!r}")):
            causal_lm.config_class(**{name: not only})


@every_type
def test_special_tokens_reach_generation(model_type):
    model = build(model_type, {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5})
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (3, 4, 5)
    assert model.get_input_embeddings().padding_idx == 5


BAD_FIELDS = {
    "both_losses": ({"fuse_linear_cross_entropy": True}, ValueError, "cannot both be True"),
    "heads_type": ({"num_heads": "4"}, TypeError, "num_heads must be an int"),
    "layers": ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be at least 1"),
    "hidden_size": ({"hidden_size": 2.0}, TypeError, "hidden_size must be an int"),
    "pad": ({"pad_token_id": 32000}, ValueError, "pad_token_id must be less than vocab_size 32000, got 32000"),
    "ends": ({"eos_token_id": [2, "x"]}, TypeError, "eos_token_id must be an int, got str 'x'"),
    "end": ({"eos_token_id": -2}, ValueError, "eos_token_id must be at least -1, got -2"),
    "l2warp": ({"use_l2warp": True}, ValueError, "use_l2warp is not supported"),
    "attnres": ({"attnres_block_size": 4}, ValueError, "attnres_block_size is not supported"),
}


# What no field of an annotation can be, and what comes of it where the field has no range of its own.
NEVER = {
    bool: [("false", TypeError, "must be True or False, got str 'false'"), (1, TypeError, "must be True or False")],
    int: [
        ("4", TypeError, "must be an int, got str '4'"),
        (2.0, TypeError, "must be an int"),
        (True, TypeError, "int"),
    ],
    float: [
        ("10000", TypeError, "must be a number, got str '10000'"),
        (float("nan"), ValueError, "must be a finite number .*, got nan"),
        (float("inf"), ValueError, "must be a finite number .*, got inf"),
        (False, TypeError, "must be a number"),
    ],
    str: [(3, TypeError, "must be a string, got int 3"), (["swish"], TypeError, "must be a string")],
}
IMPOSSIBLE = {int: [-2, 0], float: [-1, -2.0, 0]}
MAY_BE_0 = {"norm_eps", "initializer_range", "pad_token_id", "bos_token_id", "clamp_min"}
MAY_BE_NEGATIVE = {"clamp_min", "lower_bound"}


def kinds(field):
    """The one or more types of a field, and whether it may be None."""
    found = set(typing.get_args(field.type)) or {field.type}
    return found - {type(None)}, type(None) in found


@every_type
def test_no_field_takes_what_it_cannot_be(model_type):
    config_class = REGISTRY[model_type].config_class
    assert {"norm_eps", "vocab_size"} <= own_fields(config_class) - set(config_class.fixed_fields)
    for field in dataclasses.fields(config_class):
        if field.name not in own_fields(config_class) - {"attn", "eos_token_id", *config_class.fixed_fields}:
            continue
        (kind,), optional = kinds(field)
        bad = list(NEVER[kind])
        for value in IMPOSSIBLE.get(kind, []):
            if not ((value == 0 and field.name in MAY_BE_0) or (value < 0 and field.name in MAY_BE_NEGATIVE)):
                bad.append((value, ValueError, re.escape(f", got {value}")))
        if not optional:
            bad.append((None, TypeError, "got NoneType None"))
        for value, error, message in bad:
            with pytest.raises(error, match=f"^{field.name} must be .*{message.removeprefix('must be ')}"):
                config_class(**{field.name: value})
        with pytest.raises(bad[0][1], match=f"^{field.name} must be"):
            setattr(config_class(), field.name, bad[0][0])


@every_type
def test_every_field_says_what_it_is(model_type):
    config_class = REGISTRY[model_type].config_class
    for described in (config_class, DecoderConfig):
        for name in own_fields(described):
            (line,) = re.findall(rf"^        {name} \(.*\): (.*)$", described.__doc__, re.MULTILINE)
            assert re.fullmatch(r"[A-Z].*\.", line), f"{name}: {line!r} is no sentence"
            assert len(line) < 120
    assert f"vocab_size ({config_class().vocab_size}): How many tokens" in config_class.__doc__
    own = config_class.field_help
    assert set(own) <= own_fields(config_class)
    assert not set(own.items()) & set(FIELDS.items()), "a sentence that is in FIELDS already"


def test_every_sentence_is_of_a_field():
    every = {name for causal_lm in REGISTRY.values() for name in own_fields(causal_lm.config_class)}
    assert set(FIELDS) <= every


def test_unknown_fields_load_and_a_near_miss_is_logged(caplog):
    """Checkpoints of other programs have fields of their own; a typo of ours is one of them, so it is no error."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        config = GLAConfig(use_cahce=False, conv_bias=True, head_first=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert (config.use_cahce, config.conv_bias, config.head_first) == (False, True, False)
    assert [r.message for r in caplog.records] == ["GLAConfig has no field use_cahce (did you mean use_cache?)"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_logit_normalizer": -1}, "gate_logit_normalizer must be a finite number above 0, got -1"),
        ({"gate_fn": "tanh?"}, "gate_fn must be one of"),
        ({"attn_mode": "nonsense"}, "attn_mode must be one of chunk, .*, got 'nonsense'"),
        ({"hidden_act": "swish?"}, "hidden_act must be one of"),
    ],
)
def test_what_layers_take_from_a_config_is_named_as_it_is_there(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build("gla", fields)


@every_type
@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_are_named(model_type, case):
    fields, error, message = BAD_FIELDS[case]
    with pytest.raises(error, match=message):
        REGISTRY[model_type].config_class(**fields)


@every_type
def test_sizes_that_do_not_divide_are_named(model_type):
    fields = own_fields(REGISTRY[model_type].config_class)
    if "num_heads" in fields and "head_dim" not in fields:  # else heads are as wide as it says
        with pytest.raises(ValueError, match="num_heads"):
            build(model_type, {"hidden_size": 30, "num_heads": 4})
    if "num_kv_heads" in fields:
        with pytest.raises(ValueError, match="num_kv_heads"):
            build(model_type, {"num_heads": 4, "num_kv_heads": 3})
    if "num_v_heads" in fields:
        with pytest.raises(ValueError, match=r"^num_v_heads must be a multiple of num_heads=4, got 6"):
            build(model_type, {"num_heads": 4, "num_v_heads": 6})
    if "head_dim" in fields and "expand_v" in fields:
        with pytest.raises(ValueError, match=r"^expand_v \* head_dim must be a whole number .*, got 0.3 \* 8 = 2.4"):
            build(model_type, {"head_dim": 8, "expand_v": 0.3})
    if "attn_mode" in fields:
        with pytest.raises(ValueError, match=r"^attn_mode must be one of"):
            build(model_type, {"attn_mode": "nonsense"})


@every_type
def test_absent_fields_of_other_releases_are_dropped(model_type):
    config = REGISTRY[model_type].config_class(use_l2warp=False, attnres_block_size=None)
    assert not hasattr(config, "use_l2warp")
    assert not hasattr(config, "attnres_block_size")


BAD_HYBRIDS = {
    "no_dict": (3, TypeError, "attn must be a dict"),
    "no_dict_inside": ([3], TypeError, r"attn\[0\] must be a dict"),
    "no_layers": ({"num_heads": 2}, ValueError, "attn must have 'layers'"),
    "no_heads": ({"layers": [0]}, ValueError, "attn must have 'num_heads'"),
    "layer_type": ({"layers": ["0"], "num_heads": 2}, TypeError, r"attn\['layers'\] must be a list of ints"),
    "layers_int": ({"layers": 1, "num_heads": 2}, TypeError, r"attn\['layers'\] must be a list of ints"),
    "twice": ({"layers": [1, 1], "num_heads": 2}, ValueError, "must not name a layer twice"),
    "beyond": ({"layers": [3], "num_heads": 2}, ValueError, r"attn\['layers'\] must name layers from 0 to 2.*got 3"),
    "negative": ({"layers": [-1], "num_heads": 2}, ValueError, r"must name layers from 0 to 2.*got -1"),
    "heads": ({"layers": [0], "num_heads": 0}, ValueError, r"attn\['num_heads'\] must be a positive int, got 0"),
    "window": (
        {"layers": [0], "num_heads": 2, "window_size": -1},
        ValueError,
        r"attn\['window_size'\] must be a positive int",
    ),
    "typo": (
        {"layers": [0], "num_heads": 2, "windw_size": 4},
        ValueError,
        r"attn must have no keys but layers, .*, got 'windw_size' \(did you mean window_size\?\)",
    ),
    "note": ([{"layers": [0], "num_heads": 2, 3: 4}], ValueError, r"attn\[0\] must have no keys but .*, got 3$"),
    "bias": ({"layers": [0], "num_heads": 2, "qkv_bias": "false"}, TypeError, r"attn\['qkv_bias'\] must be True or"),
    "theta": ({"layers": [0], "num_heads": 2, "rope_theta": 0}, ValueError, r"attn\['rope_theta'\] must be .* above 0"),
    "theta_type": (
        {"layers": [0], "num_heads": 2, "rope_theta": "10000"},
        TypeError,
        r"attn\['rope_theta'\] must be a number, got str '10000'",
    ),
    "groups": ({"layers": [0], "num_heads": 4, "num_kv_heads": 3}, ValueError, "must be a multiple of num_kv_heads 3"),
    "overlap": (
        [{"layers": [0, 1], "num_heads": 2}, {"layers": [1], "num_heads": 2}],
        ValueError,
        r"attn\[1\]\['layers'\] must not overlap with attn\[0\], got layer 1",
    ),
}


@every_type
@pytest.mark.parametrize("case", BAD_HYBRIDS)
def test_bad_hybrids_are_named(model_type, case):
    attn, error, message = BAD_HYBRIDS[case]
    config_class = REGISTRY[model_type].config_class
    with pytest.raises(error, match=message):
        config_class(num_hidden_layers=3, attn=attn)
    config = config_class(num_hidden_layers=3)
    with pytest.raises(error, match=message):
        config.attn = attn


@every_type
def test_hybrid_configs_are_checked_copies(model_type, tmp_path):
    config_class = REGISTRY[model_type].config_class
    given = {"layers": (0, 2), "num_heads": 4}
    before = copy.deepcopy(given)
    filled = {"num_kv_heads": 4, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
    expected = {**given, **filled, "layers": [0, 2]}
    config = config_class(num_hidden_layers=3, attn=given)
    assert (config.attn, given) == (expected, before)
    config = config_class(num_hidden_layers=3)
    config.attn = given
    assert (config.attn, given) == (expected, before)
    config.attn = [given, {"layers": [1], "num_heads": 2, "window_size": 5}]
    config.save_pretrained(tmp_path)
    again = config_class.from_pretrained(tmp_path)
    assert again.attn == config.attn
    assert [again.attention_spec(i)["num_heads"] for i in range(3)] == [4, 2, 4]
    assert config_class.from_pretrained(tmp_path, attn=None).attn is None
    again.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"attn\[0\]\['layers'\] must name layers from 0 to 1"):
        REGISTRY[model_type](again)


@every_type
def test_hybrid_layers_are_attention_with_those_settings(model_type):
    attn = [{"layers": [2], "num_heads": 4, "num_kv_heads": 2, "window_size": 7, "rope_theta": 5e5, "qkv_bias": True}]
    layers = build(model_type, {"attn": attn}).base_model.layers
    names = layers[0].names
    mixers = [getattr(layer, names.mixer) for layer in layers]
    assert type(mixers[2]).__name__ == "Attention"
    assert (mixers[2].num_heads, mixers[2].num_kv_heads, mixers[2].window_size) == (4, 2, 7)
    assert mixers[2].rotary.base == 5e5
    assert mixers[2].q_proj.bias is not None
    assert type(mixers[0]) is type(mixers[1]) is layers[0].mixer_cls


@pytest.mark.parametrize(("ratio", "size", "width"), [(4, 2048, 5632), (2, 2048, 2816), (None, 1024, 2816)])
@every_gated
def test_mlp_width(model_type, ratio, size, width):
    config = REGISTRY[model_type].config_class(hidden_size=size, hidden_ratio=ratio, num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        block = REGISTRY[model_type](config).base_model.layers[0]
    assert getattr(block, block.names.mlp).down_proj.weight.shape == (size, width)


@every_type
def test_a_model_takes_no_config_of_another(model_type):
    causal_lm, foreign = REGISTRY[model_type], tiny_config(next(name for name in REGISTRY if name != model_type))
    message = f"^config must be a {causal_lm.config_class.__name__}, got a {type(foreign).__name__}$"
    for cls in (causal_lm, causal_lm.model_cls):
        with pytest.raises(TypeError, match=message):
            cls(foreign)
