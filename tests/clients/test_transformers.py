"""Models of transformers that ask for `fla` run on ours, and compute what they do without."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import import_utils

from tests.clients import checks
from tests.clients.providing import modeling, provided
from tests.clients.tiny import CONFIGS, MODELS, asking, folder, marked

ROOT = Path(__file__).parents[2]
CAUSAL = [name for name in MODELS if name != "glm5_next_text"]  # it has no causal LM of its own
BOTH_WAYS = ("qwen3_next", "kimi_linear")  # models for every packing; the others take turns
PACKED = [
    (name, packing)
    for i, name in enumerate(CAUSAL)
    for j, packing in enumerate(checks.PACKINGS)
    if name in BOTH_WAYS or i % 2 == j
]


def test_every_model_that_asks_is_here():
    assert set(asking()) == {folder(name) for name in MODELS} and len(MODELS) >= 7
    assert set(MODELS) <= set(CONFIGS)


@pytest.mark.parametrize("asked", asking())
def test_ours_is_in_use(asked):
    checks.assert_ours(modeling(asked))


@pytest.mark.parametrize("name", marked(MODELS))
def test_as_without_us(name):
    checks.check_padded(name)


@pytest.mark.parametrize("name", marked(CAUSAL))
def test_greedy_tokens(name):
    checks.check_generation(name)


@pytest.mark.parametrize("name", marked(["qwen3_5_text", "kimi_linear"]))
def test_bfloat16(name):
    checks.check_padded(name, tokens=40, dtype=torch.bfloat16)


@pytest.mark.parametrize("name, packing", marked(PACKED))
def test_packed_is_separate(name, packing):
    checks.check_packed(name, packing)


@pytest.mark.parametrize("name", marked(BOTH_WAYS))
def test_packed_leaks_without_our_convolution(name):
    """Why `provide` is there, and that the test above can fail."""
    rows = [checks.ids_of(length) for length in (30, 40)]
    model = checks.build(name)
    with torch.no_grad():
        logits = [model(row[None], use_cache=False).logits[0] for row in rows]
    leaking = checks.packed(model, rows, ("cu_seq_lens_q",))["logits"]
    torch.testing.assert_close(leaking[:30], logits[0], rtol=1e-3, atol=1e-3)
    assert (leaking[30:] - logits[1]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "nemotron_h"])
def test_other_models_find_our_convolution(name):
    with provided("causal_conv1d"):
        checks.assert_ours(modeling(name), "causal_conv1d")


def test_the_checks_that_programs_make(monkeypatch):
    """By the metadata of our distribution, and where there is none (a folder on the path) by `fla.__version__`."""
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    asked = import_utils.is_flash_linear_attention_available
    while hasattr(asked, "__wrapped__"):
        asked = asked.__wrapped__
    assert asked()
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    available, version = import_utils._is_package_available("fla", return_version=True)
    assert available and import_utils.version.parse(version) >= import_utils.version.parse("0.5") and asked()


def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_program_that_does_not_know_us():
    """Nothing but transformers is imported, and there is no Triton: the model runs on ours, without a warning."""
    code = f"""
import logging, sys, warnings
warnings.simplefilter("ignore")
sys.modules["triton"] = None
import torch, transformers
said = []
transformers.logging.get_logger("transformers").addHandler(h := logging.Handler())
h.emit = lambda record: said.append(record.getMessage())
config = transformers.AutoConfig.for_model("qwen3_next", **{CONFIGS["qwen3_next"]!r})
model = transformers.AutoModelForCausalLM.from_config(config)
assert "fla.ops" in sys.modules and "fla.models" not in sys.modules and "fla.layers" not in sys.modules
ids = torch.arange(3, 9)[None]
model(ids, labels=ids).loss.backward()
assert not any("chunk_gated_delta_rule" in x or "fused_recurrent" in x for x in said), said
assert type(transformers.AutoConfig.for_model("mamba2")).__module__.startswith("transformers.")
import fla.compat, fla.layers
assert "causal_conv1d" not in sys.modules  # nobody asked for it
"""
    run(code)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", marked(BOTH_WAYS))
def test_a_packed_mixer_compiles_whole(name):
    """In a process of its own: a compiler's guards know a module by its name, and tests import it anew."""
    code = f"""
import torch, fla.compat
fla.compat.provide("causal_conv1d")
from tests.clients.checks import build
mixer = next(x for x in build({name!r}).modules() if hasattr(x, "conv1d"))
x = torch.randn(1, 40, 64, requires_grad=True)
packing = {{"cu_seq_lens_q": torch.tensor([0, 13, 40], dtype=torch.int32)}}
outputs = [call(x, **packing) for call in (mixer, torch.compile(mixer, backend="aot_eager", fullgraph=True))]
assert torch.equal(*outputs) and torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in outputs))
"""
    run("import warnings; warnings.simplefilter('ignore')\n" + code)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
