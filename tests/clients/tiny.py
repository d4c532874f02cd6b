"""The smallest models of transformers whose mixers are ours: those of its models that ask for `fla`."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tests.clients.providing import modeling

VOCABULARY = 128
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "rms_norm_eps": 1e-2,  # a smaller one multiplies the rounding of outputs that are near 0
}
_GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
_GROUPS = {"n_group": 1, "topk_group": 1}
_KDA = {"linear_head_dim": 16, "linear_num_heads": 4}
_SPARSE = {"index_topk": 64, "index_kpool": 16, "index_head_dim": 16, "index_n_heads": 2}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}
_WITHOUT_HEAD_DIM = {name: value for name, value in _BASE.items() if name != "head_dim"}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": _BASE | _GATED_DELTA | _SHARED | {"decoder_sparse_step": 1},
    "qwen3_5_text": _BASE | _GATED_DELTA,
    "qwen3_5_moe_text": _BASE | _GATED_DELTA | _SHARED,
    "qwen4_exp_text": _BASE | _GATED_DELTA | _SHARED | {"hc_count": 2, "hc_lowrank": 8} | _INDEXER,
    "olmo_hybrid": _BASE | _GATED_DELTA,
    "lara_mini": _BASE | _GATED_DELTA | _SHARED,
    "kimi_linear": _WITHOUT_HEAD_DIM
    | _LATENT
    | _EXPERTS
    | _GROUPS
    | _KDA
    | {"num_local_experts": 4, "qk_rope_head_dim": 8, "layer_types": 3 * ["linear_attention"] + ["full_attention"]},
    "bailing_hybrid": _BASE
    | _LATENT
    | _EXPERTS
    | _GROUPS
    | {"num_experts": 4, "q_lora_rank": 16, "qk_rope_head_dim": 8, "layer_group_size": 4},
    "glm5_next_text": _WITHOUT_HEAD_DIM
    | _LATENT
    | _EXPERTS
    | _KDA
    | _SPARSE
    | {"n_routed_experts": 4, "q_lora_rank": 16, "qk_rope_head_dim": 0},
}
MODELS = [name for name in CONFIGS if name in CONFIG_MAPPING_NAMES]  # those of the installed transformers
KDA = ("kimi_linear", "bailing_hybrid", "glm5_next_text")


def marked(cases: Iterable[Any]) -> list[Any]:
    """Cases that begin with a model's name, each with a mark that says which op it runs."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    ops = ["kda" if row[0] in KDA else "gated_delta_rule" for row in rows]
    return [
        pytest.param(*row, marks=pytest.mark.touches(op), id="-".join(row)) for row, op in zip(rows, ops, strict=True)
    ]


@functools.cache
def asking() -> dict[str, tuple[str, ...]]:
    """Folder of transformers' models -> the functions that its models ask `fla` for."""
    asks = re.compile(r'use_kernel_func_from_hub_with_fallback\(\s*"(\w+)",\s*"fla"')
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    found = {file.parent.name: tuple(asks.findall(file.read_text())) for file in sorted(files)}
    return {folder: names for folder, names in found.items() if names}


def config(name: str) -> Any:
    made = AutoConfig.for_model(name, **CONFIGS[name])
    made._experts_implementation = "eager"  # the default has no float64
    return made


def folder(name: str) -> str:
    return type(config(name)).__module__.split(".")[-2]


def build(name: str) -> Any:
    """The model, with weights under which its mixers matter: gates from 0.95 to almost 0 a token, values of size 1."""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else MODEL_MAPPING_NAMES
    torch.manual_seed(0)
    model = getattr(modeling(folder(name)), classes[name])(config(name)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("A_log"):
                p.copy_(torch.tensor([0.05, 0.2, 1.0, 8.0]).log().view_as(p))
            elif key.endswith("dt_bias"):
                p.normal_(0, 0.3)
            elif p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


def implementation(function: Callable) -> tuple[Callable, bool]:
    """What a call of this function of transformers runs, and whether that is not its own."""
    while (found := inspect.getclosurevars(function).nonlocals).get("implementation") is None:
        function = function.__wrapped__
    return found["implementation"], found["is_new_implementation"]


def decorated(module: ModuleType) -> dict[str, Callable]:
    """The functions of a module that it has by the name of another package's: name there -> function here."""
    wrapped = {name: x for name, x in vars(module).items() if inspect.isfunction(x) and hasattr(x, "__wrapped__")}
    source = Path(module.__file__).read_text()
    asked = re.findall(r'use_kernel_func_from_hub_with_fallback\(\s*"(\w+)",\s*"\w+"[^)]*\)\s*def (\w+)\(', source)
    return {theirs: wrapped[here] for theirs, here in asked}


@contextmanager
def own_path(module: ModuleType, *, exact: bool = False) -> Iterator[None]:
    """The module's models run by functions of transformers alone; if `exact` token by token, and in float64 wherever
    they ask for float32."""
    with pytest.MonkeyPatch.context() as patch:
        functions = decorated(module)
        for theirs, function in functions.items():
            name, own = function.__name__, inspect.unwrap(function)
            if exact and theirs.startswith("chunk_"):
                own = token_by_token(inspect.unwrap(functions[theirs.replace("chunk_", "fused_recurrent_")]))
            patch.setattr(module, name, own)
        if exact:
            patch.setattr(module, "torch", Wide())
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


class Wide:
    """`torch`, in which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def token_by_token(function: Callable) -> Callable:
    def call(*args: Tensor, **keywords: Any) -> Any:
        return function(*args, **({"initial_state": None, "output_final_state": False} | keywords))

    return call
