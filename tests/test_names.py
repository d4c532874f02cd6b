"""Names by which other programs import our parts: each resolves, to a module or a class."""

import importlib
import importlib.util
import inspect
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fla.layers
import fla.models
import fla.ops
from fla import varlen
from fla._names import make_module
from fla.models._loading import REGISTRY as MODELS
from fla.ops._spec import REGISTRY as OPS
from tests import toys
from tests.test_architecture import add

ROOT = Path(__file__).parents[1]
FORMS = [(op, form) for op, spec in OPS.items() for form in dict.fromkeys((*spec.forms, "naive", *spec.also))]


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("op, form", FORMS, ids="-".join)
def test_every_form_is_a_module(op, form):
    spec = OPS[op]
    module = importlib.import_module(f"{spec.module}.{form}")
    above = getattr(importlib.import_module(spec.module), form)  # a function of that name keeps its place
    assert isinstance(module, ModuleType) and (above is module or above in vars(module).values())
    assert importlib.util.find_spec(module.__name__).name == module.__name__
    held = {name: getattr(module, name) for name in module.__all__}
    named = {x for x in held.values() if x in spec.also.get(form, ())}
    assert held and all(callable(x) and (x in named or name.startswith(f"{form}_")) for name, x in held.items())
    if form in spec.forms:
        assert spec.forms[form] in held.values()
    for x in held.values():
        assert pickle.loads(pickle.dumps(x)) is x


def test_forms_are_importable_first():
    """Before anything else of ours is imported, by both statements."""
    python("import fla.ops.gla.chunk; fla.ops.gla.chunk.chunk_gla")
    python("from fla.ops.retention.naive import naive_retention; from fla.ops.simple_gla import parallel")


@pytest.mark.parametrize("name", ("fla.ops.gla.parallel", "fla.ops.nope.chunk", "fla.models.gla.modeling_nope"))
def test_what_does_not_exist_is_an_import_error(name):
    with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[0]):
        importlib.import_module(name)
    with pytest.raises(ImportError, match="cannot import name 'nope'"):
        exec("from fla.ops.gla.chunk import nope")


@pytest.mark.parametrize(
    "model_type", [name for name, cls in MODELS.items() if cls.__module__.startswith("fla.models.")]
)
def test_every_model_has_its_modules_and_its_base(model_type):
    causal_lm = MODELS[model_type]
    place, short = causal_lm.__module__, causal_lm.__name__.removesuffix("ForCausalLM")
    name = place.rpartition(".")[2]
    modeling = importlib.import_module(f"{place}.modeling_{name}")
    configuration = importlib.import_module(f"{place}.configuration_{name}")
    body, config_class = causal_lm.model_cls, causal_lm.config_class
    assert getattr(modeling, causal_lm.__name__) is causal_lm and getattr(modeling, body.__name__) is body
    assert getattr(configuration, config_class.__name__) is config_class
    base = getattr(modeling, f"{short}PreTrainedModel")
    assert getattr(importlib.import_module(place), base.__name__) is base and pickle.loads(pickle.dumps(base)) is base
    assert issubclass(causal_lm, base) and issubclass(body, base) and base.config_class is config_class
    others = [cls for other, cls in MODELS.items() if other != model_type]
    assert not any(issubclass(other, base) for other in others)
    assert base._no_split_modules == body._no_split_modules and base.base_model_prefix == body.base_model_prefix


def test_a_model_of_ones_own_on_that_base():
    """Other programs write models so: layers of their own, initialised by the rules of the base."""
    from fla.models.gla.configuration_gla import GLAConfig
    from fla.models.gla.modeling_gla import GLABlock, GLAPreTrainedModel

    class Encoder(GLAPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.layers = torch.nn.ModuleList([GLABlock(config, 0)])
            self.head = torch.nn.Linear(config.hidden_size, 3)
            self.post_init()

    config = GLAConfig(**GLAConfig.tiny, initializer_range=0.5)
    encoder = Encoder(config)
    assert encoder.head.bias.count_nonzero() == 0 and 0.3 < encoder.head.weight.std() < 0.7
    assert list(encoder._no_split_modules) == ["GLABlock"]


def test_a_models_base_is_left_alone_outside_the_library():
    """Another program's model, registered with ours, shares its body: nothing is added to either."""
    from fla.models._names import name_parts

    class Outside(fla.models.GLAForCausalLM):
        """Ours with another name."""

    before = fla.models.GLAModel.__mro__
    name_parts(Outside)
    assert fla.models.GLAModel.__mro__ == before and not hasattr(sys.modules[__name__], "OutsidePreTrainedModel")


@pytest.mark.slow
def test_what_is_added_has_its_names(tmp_path):
    """An op, a layer and a model, each one file and one line, without a word about names."""
    shutil.copytree(ROOT / "fla", tmp_path / "fla", ignore=shutil.ignore_patterns("__pycache__"))
    add(tmp_path / "fla/ops/toy.py", toys.OP, toys.OP_LINE)
    add(tmp_path / "fla/layers/toy.py", toys.LAYER, toys.LAYER_LINE)
    add(tmp_path / "fla/models/toy.py", toys.MODEL, toys.MODEL_LINE)
    code = """
from fla.ops.toy.chunk import chunk_toy
from fla.ops.toy.fused_recurrent import fused_recurrent_toy
from fla.ops.toy.naive import naive_recurrent_toy
from fla import ToyMixer, ToyForCausalLM
from fla.models.toy.modeling_toy import ToyPreTrainedModel, ToyModel, ToyMLP
from fla.models.toy.configuration_toy import ToyConfig
assert issubclass(ToyForCausalLM, ToyPreTrainedModel)
"""
    python(code, tmp_path)


TABLES = [
    "get_max_num_splits",
    *(name for name in vars(varlen) if name.startswith("prepare_")),
]


@pytest.mark.parametrize("place", ("fla.ops.utils", "fla.ops.common.utils", "fla.ops.utils.index"))
def test_tables_of_packing_where_they_are_looked_for(place):
    module = importlib.import_module(place)
    for name in TABLES:
        assert getattr(module, name) is getattr(varlen, name)
    python(f"from {place} import prepare_chunk_indices; import {place}; {place}.prepare_lens")


def test_utils_are_the_same_in_both_places():
    one, other = importlib.import_module("fla.ops.utils"), importlib.import_module("fla.ops.common.utils")
    assert set(one.__all__) == set(other.__all__) and all(getattr(one, n) is getattr(other, n) for n in one.__all__)


def classes(package) -> dict[str, type]:
    found = {name: x for name, x in vars(package).items() if inspect.isclass(x) and not name.startswith("_")}
    return {name: x for name, x in found.items() if x.__module__.startswith(package.__name__)}


def test_layers_and_models_at_the_top():
    wanted = classes(fla.layers) | classes(fla.models)
    del wanted["Cache"]
    assert {"GatedLinearAttention", "GLAForCausalLM", "GLAConfig", "GLAModel"} <= set(wanted)
    for name, x in wanted.items():
        assert getattr(fla, name) is x, name


def test_the_top_imports_only_what_is_asked_for():
    code = """
import sys, fla
names = lambda: [n for n in ("transformers", "triton", "fla.layers", "fla.models", "fla.ops") if n in sys.modules]
seen = [names()]
for name in ("nope", "chunk_gla", "__wrapped__", "_private", ""):
    assert not hasattr(fla, name)
seen.append(names())
from fla import ops
from fla import GatedLinearAttention
seen.append(names())
assert not hasattr(fla, "Nope") and not hasattr(fla, "Tensor")
seen.append(names())
from fla import GLAForCausalLM
seen.append([n for n in names() if n != "triton"])  # transformers may import it
assert not hasattr(fla, "NopeModel")
print(seen)
"""
    light = ["fla.layers", "fla.ops"]
    assert python(code) == str([[], [], light, light, ["transformers", "fla.layers", "fla.models", "fla.ops"]])


def test_a_module_does_not_take_the_place_of_a_function():
    """Programs import `causal_conv1d` of `fla.modules.conv` as the function and as the module that has it."""
    from fla.modules import conv

    assert inspect.isfunction(conv.causal_conv1d) and isinstance(conv.triton.ops, ModuleType)
    module = importlib.import_module("fla.modules.conv.causal_conv1d")
    assert isinstance(module, ModuleType) and module.causal_conv1d is conv.causal_conv1d
    first = make_module("fla.modules.conv.toy", "A module.", {"one": 1})
    assert conv.toy is first and make_module("fla.modules.conv.toy", "Made anew.", {}) is conv.toy is not first
    del conv.toy, sys.modules["fla.modules.conv.toy"]


# What published programs import of ours, of those things that exist
CLIENTS = {
    "fla": "__version__",
    "fla.layers.utils": "get_unpad_data index_first_axis pad_input",
    "fla.layers.attn": "Attention",
    "fla.layers": "GatedLinearAttention",
    "fla.models.utils": "Cache",
    "fla.modules": "FusedRMSNormGated ShortConvolution RMSNorm GatedMLP FusedCrossEntropyLoss "
    "FusedLinearCrossEntropyLoss RotaryEmbedding rms_norm rms_norm_gated",
    "fla.modules.convolution": "causal_conv1d causal_conv1d_update",
    "fla.modules.l2norm": "l2norm l2_norm l2norm_fwd l2norm_bwd",
    "fla.modules.conv.causal_conv1d": "causal_conv1d",
    "fla.modules.conv.triton.ops": "CausalConv1dFunction",
    "fla.modules.conv.short_conv": "ShortConvolution",
    "fla.modules.fused_norm_gate": "FusedRMSNormSwishGate",
    "fla.modules.layernorm": "RMSNorm",
    "fla.modules.layernorm_gated": "RMSNormGated",
    "fla.compat": "provide",
    "fla.ops.cp": "FLACPContext build_cp_context",
    "fla.ops.delta_rule": "chunk_delta_rule fused_recurrent_delta_rule",
    "fla.ops.gated_delta_product.chunk": "chunk_gated_delta_product",
    "fla.ops.gated_delta_rule": "chunk_gated_delta_rule fused_recurrent_gated_delta_rule chunk_gdn",
    "fla.ops.gated_delta_rule.chunk": "ChunkGatedDeltaRuleFunction chunk_gated_delta_rule chunk_gated_delta_rule_fwd "
    "chunk_gated_delta_rule_bwd l2norm_fwd l2norm_bwd",
    "fla.ops.gated_delta_rule.fused_recurrent": "FusedRecurrentFunction fused_recurrent_gated_delta_rule",
    "fla.ops.gated_delta_rule.naive": "naive_recurrent_gated_delta_rule",
    "fla.ops.gdn2.chunk": "chunk_gdn2",
    "fla.ops.kda": "chunk_kda fused_recurrent_kda",
    "fla.ops.kda.chunk": "chunk_kda",
    "fla.ops.kda.fused_recurrent": "fused_recurrent_kda",
    "fla.ops.kda.gate": "fused_kda_gate",
    "fla.ops.gla.chunk": "chunk_gla",
    "fla.ops.gla.fused_recurrent": "fused_recurrent_gla",
    "fla.ops.simple_gla.chunk": "chunk_simple_gla",
    "fla.ops.simple_gla.parallel": "parallel_simple_gla",
    "fla.ops.retention.chunk": "chunk_retention",
    "fla.ops.retention.naive": "naive_retention",
    "fla.ops.utils": "prepare_chunk_indices prepare_position_ids prepare_sequence_ids prepare_lens",
    "fla.ops.utils.index": "prepare_chunk_indices",
    "fla.ops.common.utils": "prepare_chunk_offsets",
    "fla.utils": "input_guard autocast_custom_fwd autocast_custom_bwd get_multiprocessor_count assert_close "
    "device device_torch_lib contiguous tensor_cache check_shared_mem deprecate_kwarg",
}


@pytest.mark.parametrize("place", CLIENTS)
def test_what_clients_import(place):
    module = importlib.import_module(place)
    assert all(hasattr(module, name) for name in CLIENTS[place].split())
