"""`import fla` is light, and enough for transformers' Auto classes to know every model, in any order of imports."""

import json
import subprocess
import sys

import pytest

from fla._auto import model_types

from .tiny import REGISTRY

USE = """
sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 8}
config = AutoConfig.for_model("gla", **sizes)
model = AutoModelForCausalLM.from_config(config)
assert type(model).__name__ == "GLAForCausalLM", type(model)
import fla.models
assert type(config) is fla.models.GLAConfig
"""
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM\n"
ORDERS = {
    "fla_first": """
import sys
import fla
heavy = {"transformers", "triton", "fla.models", "fla.layers"} & set(sys.modules)
assert not heavy, heavy
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["bert"].__name__ == "BertConfig"
assert CONFIG_MAPPING["mamba"].__module__.startswith("transformers.")
assert "gla" in CONFIG_MAPPING and "fla.models" not in sys.modules
import json, pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps({"model_type": "retnet", "hidden_size": 64}))
config = transformers.AutoConfig.from_pretrained(folder)
assert type(config).__name__ == "RetNetConfig" and config.hidden_size == 64
"""
    + AUTO
    + USE,
    "transformers_first": "import transformers\nimport fla\n" + AUTO + USE,
    "auto_classes_first": AUTO + "import fla\n" + USE,
    "models_first": "import fla.models\n" + AUTO + USE,
    "mapping_first": "import transformers.models.auto.configuration_auto\nimport fla, fla.models\n" + AUTO + USE,
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ORDERS[order]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_model_file_registers_its_type():
    assert sorted(REGISTRY) == sorted(model_types())


def test_types_of_transformers_are_not_taken_over():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from fla._auto import LazyConfig, _announce

    class Mapping(dict):
        def register(self, key, value):
            self[key] = value

    theirs = dict.fromkeys(CONFIG_MAPPING_NAMES, object)
    mapping = Mapping(theirs | {"gla": object})
    _announce(type("module", (), {"CONFIG_MAPPING": mapping}))
    assert mapping["gla"] is object
    assert isinstance(mapping["retnet"], LazyConfig)
    assert all(mapping[key] is object for key in theirs)


def test_files_of_the_reference_load(tmp_path):
    """A config.json as the reference writes it, with fields of its newest release."""
    from transformers import AutoConfig

    fields = {"model_type": "gla", "architectures": ["GLAForCausalLM"], "use_l2warp": False, "attnres_block_size": None}
    fields |= {"hidden_size": 64, "expand_v": 1, "fuse_swiglu": True, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (type(config).__name__, config.hidden_size, config.num_heads) == ("GLAConfig", 64, 4)
