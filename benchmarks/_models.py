"""What the benchmarks of whole models share: the model, its sizes, and the tokens that it reads."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fla
from benchmarks import _local
from fla._auto import model_types
from fla.backends import BACKENDS

SIZES = ("hidden_size", "num_hidden_layers", "num_heads", "head_dim", "vocab_size")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
BYTES = 256


def model_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of a benchmark of models."""
    for name in SIZES:
        option(p, name, type=int, help="of a model that is made from its type; default the config's")
    p.add_argument("--data", type=Path, help="a text file: its bytes are the tokens; default random tokens")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--backend", choices=BACKENDS, help="default: Triton for GPU tensors, PyTorch otherwise")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16 on a GPU, float32 otherwise")
    p.add_argument(
        "--out", type=Path, help="folder of the records; default benchmarks/results on a GPU, none otherwise"
    )
    _local.common_arguments(p)


def option(p: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    """Add an option that may be written with underscores or with dashes."""
    p.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **keywords)


def settle(a: argparse.Namespace) -> None:
    """Fill in device, dtype and the folder of records. Raises ValueError for a GPU or a file that is not there."""
    _local.settle(a)
    if a.out is None and a.device == "cuda":
        a.out = _local.RESULTS
    if a.data is not None and not a.data.is_file():
        raise ValueError(f"--data must be a text file, got {a.data}")


def positive(a: argparse.Namespace, *names: str) -> None:
    """Raise ValueError unless these arguments, where given, are at least 1."""
    for name in names:
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def build_config(name: str, a: argparse.Namespace, tokens: int, where: str) -> Any:
    """The config of a model type or a saved model, with the sizes of the command line, for `tokens` positions.

    Raises ValueError naming `where` for a name that is neither.
    """
    sizes = {size: getattr(a, size) for size in SIZES if getattr(a, size) is not None}
    if name in model_types():
        config = AutoConfig.for_model(name, **sizes)
        unknown = [size for size in sizes if not hasattr(config.__class__(), size)]
    else:
        try:
            config, unknown = AutoConfig.from_pretrained(name), list(sizes)
        except (OSError, ValueError) as error:
            known = ", ".join(model_types())
            raise ValueError(
                f"{where} must be a model type ({known}) or a saved model, got {name!r}: {error}"
            ) from None
    if unknown:
        raise ValueError(f"--{unknown[0]} is no size of {name} that can be set")
    if (getattr(config, "max_position_embeddings", None) or tokens) < tokens:
        config.max_position_embeddings = tokens
    return config


def build_model(name: str, config: Any, a: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    """A saved model with its weights, or a new one with random weights from the seed, on the device."""
    torch.manual_seed(a.seed)
    if name in model_types():
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
    return model.to(a.device)


class Codec:
    """Text to tokens and back, by the saved model's tokenizer; without a tokenizer, bytes are the tokens."""

    def __init__(self, name: str, vocab: int) -> None:
        self.vocab, local = vocab, Path(name)
        has_files = not local.is_dir() or any((local / file).is_file() for file in TOKENIZER_FILES)
        self.tokenizer = AutoTokenizer.from_pretrained(name) if name not in model_types() and has_files else None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Raises ValueError for a vocabulary that does not hold all bytes."""
        if self.tokenizer is not None:
            return self.tokenizer(text)["input_ids"]
        if self.vocab < BYTES:
            raise ValueError(f"--vocab_size must be at least {BYTES} for text without a tokenizer, got {self.vocab}")
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text of tokens. Without a tokenizer, a token that is not a byte is shown as `?`."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(ids))
        return bytes(i if i < BYTES else ord("?") for i in ids).decode(errors="replace")


def draw(codec: Codec, data: Path | None, shape: tuple[int, int], seed: int) -> Tensor:
    """Tokens `[rows, T]` from the seed: random ones, or pieces of a text.

    Raises ValueError if the text is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if data is None:
        return torch.randint(codec.vocab, shape, generator=generator)
    ids = torch.tensor(codec.encode(data.read_text(encoding="utf-8", errors="replace")))
    if len(ids) < shape[1]:
        raise ValueError(f"--data must hold at least {shape[1]} tokens, got {len(ids)} in {data.name}")
    starts = torch.randint(len(ids) - shape[1] + 1, (shape[0],), generator=generator)
    return torch.stack([ids[start : start + shape[1]] for start in starts.tolist()])


def on_backend(a: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """A block in which the ops run on `--backend`."""
    return contextlib.nullcontext() if a.backend is None else fla.use_backend(a.backend)


def wait(device: str) -> None:
    """Wait until the GPU has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory_mb(device: str) -> float | None:
    """MiB of GPU memory in use now; None on a CPU."""
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else None


def peak_mb(device: str) -> float | None:
    """The most MiB of GPU memory in use since `torch.cuda.reset_peak_memory_stats` was called; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None


def note(described: str, a: argparse.Namespace, *how: str) -> str:
    """The note of a record: the model, the backend if one was named, and how it ran."""
    return "; ".join([described, *([f"{a.backend} backend"] if a.backend else []), *how])


def describe(config: Any, parameters: int) -> str:
    """The size of a model in a few words."""
    sizes = f"hidden {config.hidden_size}, {config.num_hidden_layers} layers"
    heads = getattr(config, "num_heads", None)
    return f"{parameters / 1e6:.4g}M parameters, {sizes}" + (f", {heads} heads" if heads else "")


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)


def mib(value: float | None) -> str:
    """Memory as it is printed."""
    return "-" if value is None else f"{value:,.0f} MiB"
