"""Generation speed of a model: `python -m benchmarks.benchmark_generation --path FOLDER --prompt "..."`.

The model reads a prompt (a text, pieces of one, or random tokens) and samples `--maxlen` tokens. The program prints
what the model wrote, the time of the prompt and of decoding, and the memory. On a GPU a record with the milliseconds
per decoded token goes to `benchmarks/results`. A short generation comes first; it compiles, and does not count.
"""

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import _models as models
from benchmarks._local import Recorder


class Ticker(StoppingCriteria):
    """Moves a progress bar with every token. It never stops the generation and never waits for the GPU."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.bar.update()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prompt_of(codec: models.Codec, a: argparse.Namespace) -> Tensor:
    """Prompts `[batch_size, T]`: `--prompt` in every row, or else `--length` tokens of `--data` or random ones."""
    if a.prompt is None:
        return models.draw(codec, a.data, (a.batch_size, a.length), a.seed)
    ids = codec.encode(a.prompt)
    if not ids:
        raise ValueError("--prompt must hold at least one token, got an empty text")
    return torch.tensor([ids]).repeat(a.batch_size, 1)


def generate(model: Any, ids: Tensor, new: int, a: argparse.Namespace, what: str) -> tuple[Tensor, float]:
    """Prompt and `new` generated tokens, and the seconds that this took."""
    torch.manual_seed(a.seed)
    with tqdm(total=new, desc=what, disable=None, leave=False) as bar, torch.inference_mode():
        models.wait(a.device)
        start = time.perf_counter()
        written = model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=a.temperature, top_p=a.topp,
            repetition_penalty=a.repetition_penalty, use_cache=not a.no_cache, pad_token_id=0,
            attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([Ticker(bar)]),
        )  # fmt: skip
        models.wait(a.device)
        seconds = time.perf_counter() - start
    if written.shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"generation must write {new} tokens, got {written.shape[1] - ids.shape[1]}")
    return written, seconds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.benchmark_generation", description="Speed of generation.")
    p.add_argument("--path", default="gla", help="a saved model's folder or hub name, or a model type; default gla")
    p.add_argument("--prompt", help="a text to go on with")
    p.add_argument(
        "--length", type=int, default=128, help="tokens of a prompt from --data or of random tokens; default 128"
    )
    p.add_argument("--maxlen", type=int, default=128, help="tokens to generate; default 128")
    models.option(p, "batch_size", type=int, default=1, help="default 1")
    models.option(p, "no-cache", action="store_true", dest="no_cache", help="read the whole text for every token")
    p.add_argument("--temperature", type=float, default=0.5, help="default 0.5")
    p.add_argument("--topp", type=float, default=0.2, help="default 0.2")
    models.option(p, "repetition_penalty", type=float, default=1.1, help="default 1.1")
    p.add_argument("--output-generation", action="store_true", help="print the tokens also after a random prompt")
    models.model_arguments(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = parser()
    a = p.parse_args(arguments)
    try:
        models.settle(a)
        models.positive(a, "length", "maxlen", "batch_size")
        longest = a.length if a.prompt is None else len(a.prompt.encode())
        config = models.build_config(a.path, a, longest + a.maxlen, "--path")
        codec = models.Codec(a.path, config.vocab_size)
        ids = prompt_of(codec, a).to(a.device)
        model = models.build_model(a.path, config, a, getattr(torch, a.dtype)).eval()
    except ValueError as error:
        p.error(str(error))
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{config.model_type}: {models.describe(config, parameters)}", flush=True)
    if a.compile:
        model.forward = torch.compile(model.forward)
    model.generation_config.eos_token_id = None  # every run writes as many tokens
    with models.on_backend(a):
        generate(model, ids, min(2, a.maxlen), a, "warm-up")
        if a.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _, first = generate(model, ids, 1, a, "prompt")
        written, total = generate(model, ids, a.maxlen, a, "tokens")
    new = a.maxlen - 1
    per_token = (total - first) / new if new else total
    memory = models.peak_mb(a.device)
    if a.prompt is not None or a.data is not None or a.output_generation:
        prompt, text = (codec.decode(part.tolist()) for part in (ids[0], written[0]))
        print(f"Prompt:\n{prompt}\n\nGenerated:\n{text}\n")
    print(f"Prompt length: {ids.shape[1]}, generation length: {a.maxlen}")
    print(f"Total prompt processing + decoding time: {total * 1e3:.0f}ms")
    models.print_table(
        [
            ("prompt and first token", f"{first * 1e3:,.1f} ms"),
            ("every further token", f"{per_token * 1e3:,.2f} ms"),
            ("throughput", f"{a.batch_size / per_token:,.1f} tokens/s"),
            ("max memory", models.mib(memory)),
        ]
    )
    how = ["torch.compile"] * a.compile + ["no cache"] * a.no_cache
    times = f"{a.maxlen} tokens in {total * 1e3:.0f} ms, prompt and first token {first * 1e3:.4g} ms"
    if a.out is not None:
        Recorder(a.device, a.out, a.commit).add(
            op=config.model_type, shape=f"B{a.batch_size} T{ids.shape[1]}", dtype=a.dtype, mode="generate",
            ms=per_token * 1e3, peak_mb=memory, note=models.note(models.describe(config, parameters), a, times, *how),
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
