"""Printed trees, keys and configs are what they were, and what the reference's users know."""

import difflib
import json

import pytest
import torch

from .snapshots import FOLDER, snapshot
from .tiny import REGISTRY, TYPES, every_type

HINT = "if the change is meant, run `python -m tests.models.snapshots` and review the diff"


@every_type
def test_snapshot(model_type):
    path, actual = FOLDER / f"{model_type}.txt", snapshot(model_type)
    assert path.exists(), f"{path.name} is missing: {HINT}"
    if actual != path.read_text():
        diff = difflib.unified_diff(path.read_text().splitlines(), actual.splitlines(), path.name, "now", lineterm="")
        pytest.fail(f"{HINT}\n" + "\n".join(diff))


def test_no_snapshot_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.txt")} <= set(TYPES)


# Parameters of the reference's models with two layers and a vocabulary of 320, other fields at their defaults.
PARAMETERS = {
    "gla": 104_182_784,
    "retnet": 103_033_856,
    "transformer": 104_081_408,
    "delta_net": 104_196_352,
    "gated_deltanet": 120_957_988 - 2 * 6,  # without `D`, which had no effect
    "kda": 106_301_728,
}


@pytest.mark.parametrize("model_type", PARAMETERS)
def test_number_of_parameters(model_type):
    causal_lm = REGISTRY[model_type]
    with torch.device("meta"):
        model = causal_lm(causal_lm.config_class(num_hidden_layers=2, vocab_size=320))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[model_type]


# Printed by the reference of January 2025 for GLAConfig(), `transformers_version` aside.
GLA_CONFIG = """{
"attn": null, "attn_mode": "chunk", "bos_token_id": 1, "clamp_min": null, "conv_size": 4, "elementwise_affine": true,
"eos_token_id": 2, "expand_k": 0.5, "expand_v": 1, "feature_map": null, "fuse_cross_entropy": true, "fuse_norm": true,
"hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": null,
"max_position_embeddings": 2048, "model_type": "gla", "norm_eps": 1e-06, "num_heads": 4, "num_hidden_layers": 24,
"num_kv_heads": null, "tie_word_embeddings": false, "use_cache": true, "use_gk": true, "use_gv": false,
"use_output_gate": true, "use_short_conv": false, "vocab_size": 32000
}"""

GLA_TREE = """
GLAForCausalLM(
(model): GLAModel(
(embeddings): Embedding(32000, 2048)
(layers): ModuleList(
(0-23): 24 x GLABlock(
(attn_norm): RMSNorm(2048, eps=1e-06)
(attn): GatedLinearAttention(
(q_proj): Linear(in_features=2048, out_features=1024, bias=False)
(k_proj): Linear(in_features=2048, out_features=1024, bias=False)
(v_proj): Linear(in_features=2048, out_features=2048, bias=False)
(g_proj): Linear(in_features=2048, out_features=2048, bias=False)
(gk_proj): Sequential(
(0): Linear(in_features=2048, out_features=16, bias=False)
(1): Linear(in_features=16, out_features=1024, bias=True)
)
(o_proj): Linear(in_features=2048, out_features=2048, bias=False)
(g_norm_swish_gate): FusedRMSNormSwishGate(512, eps=1e-06)
)
(mlp_norm): RMSNorm(2048, eps=1e-06)
(mlp): GLAMLP(
(gate_proj): Linear(in_features=2048, out_features=11264, bias=False)
(down_proj): Linear(in_features=5632, out_features=2048, bias=False)
(act_fn): SiLU()
)
)
)
(norm): RMSNorm(2048, eps=1e-06)
)
(lm_head): Linear(in_features=2048, out_features=32000, bias=False)
)
"""


def test_gla_prints_as_the_reference_did():
    from transformers import AutoModelForCausalLM

    from fla.models import GLAConfig

    name, _, printed = str(GLAConfig()).partition(" ")
    assert name == "GLAConfig"
    fields = json.loads(printed)
    for field, value in json.loads(GLA_CONFIG).items():
        assert json.dumps(fields[field]) == json.dumps(value), field  # 1 and 1.0 print differently
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GLAConfig())
    lines = [line.strip() for line in str(model).splitlines()]
    assert lines == GLA_TREE.split("\n")[1:-1]
