"""Training throughput of a model: `python -m benchmarks.benchmark_training_throughput --name gla`.

The program times optimizer steps (AdamW, cosine schedule, bfloat16 by autocast with float32 weights) on random tokens
or the bytes of a text. With `--varlen` a step has as many tokens in one row, as packed sequences of random lengths.

It prints parameters, memory, tokens/s and ms per step. On a GPU a record with the median step goes to
`benchmarks/results`.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from benchmarks import _models as models
from benchmarks._local import Recorder


@dataclass
class Measured:
    """What a run measured: seconds of every timed step, and memory in MiB."""

    initial_mb: float | None
    warmup_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    max_mb: float | None = None


def packing(tokens: int, sequences: int, context_len: int | None, generator: torch.Generator) -> Tensor:
    """`cu_seqlens` of `sequences` sequences of random lengths; those longer than `context_len` are cut into several."""
    cuts = (torch.randperm(tokens - 1, generator=generator)[: sequences - 1] + 1).sort().values.tolist()
    bounds: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        bounds += range(start, end, context_len or tokens)
    return torch.tensor([*bounds, tokens], dtype=torch.int32)


def batches(codec: models.Codec, a: argparse.Namespace, count: int) -> list[dict[str, Tensor]]:
    """The inputs of every step. The last token of a packed sequence has no target, as the next token is not its own."""
    made = []
    for step in range(count):
        seed = a.seed * 1_000_003 + step
        if not a.varlen:
            ids = models.draw(codec, a.data, (a.batch_size, a.seq_len), seed).to(a.device)
            made.append({"input_ids": ids, "labels": ids})
            continue
        ids = models.draw(codec, a.data, (1, a.batch_size * a.seq_len), seed).to(a.device)
        bounds = packing(ids.shape[1], a.batch_size, a.context_len, torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:, bounds[:-1].long().to(a.device)] = -100
        made.append({"input_ids": ids, "labels": labels, "cu_seqlens": bounds.to(a.device)})
    return made


def train(model: nn.Module, steps: list[dict[str, Tensor]], a: argparse.Namespace) -> Measured:
    """Run warm-up steps, then timed ones. Raises RuntimeError if the loss is not finite: a wrong run gets no number."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    forward = torch.compile(model) if a.compile else model
    measured = Measured(models.memory_mb(a.device))
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = a.batch_size * a.seq_len
    bar = tqdm(steps, desc="steps", disable=None)
    for number, inputs in enumerate(bar):
        models.wait(a.device)
        start = time.perf_counter()
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        models.wait(a.device)
        spent = time.perf_counter() - start
        if number < a.warmup_steps:
            measured.warmup_seconds += spent
            continue
        measured.seconds.append(spent)
        measured.losses.append(loss.item())
        bar.set_postfix_str(f"{tokens / statistics.median(measured.seconds):,.0f} tokens/s", refresh=False)
    if not all(map(torch.isfinite, map(torch.tensor, measured.losses))):
        raise RuntimeError(f"the loss became {measured.losses[-1]}: a wrong run gets no number")
    measured.max_mb = models.peak_mb(a.device)
    return measured


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_training_throughput", description="Training throughput of a model."
    )
    p.add_argument("--name", default="retnet", help="model type, or a saved model's folder or hub name; default retnet")
    models.option(p, "batch_size", type=int, default=8, help="default 8")
    models.option(p, "seq_len", type=int, default=2048, help="default 2048")
    models.option(p, "context_len", type=int, help="with --varlen, the longest sequence; default no limit")
    p.add_argument("--varlen", action="store_true", help="pack sequences of random lengths into one row")
    models.option(p, "warmup_steps", type=int, default=16, help="default 16")
    p.add_argument("--steps", type=int, default=32, help="timed steps; default 32")
    models.model_arguments(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = parser()
    a = p.parse_args(arguments)
    try:
        models.settle(a)
        models.positive(a, "batch_size", "seq_len", "context_len", "steps")
        if a.context_len is not None and not a.varlen:
            raise ValueError("--context_len needs --varlen")
        config = models.build_config(a.name, a, a.seq_len * (a.batch_size if a.varlen else 1), "--name")
        codec = models.Codec(a.name, config.vocab_size)
        steps = batches(codec, a, a.warmup_steps + a.steps)
        model = models.build_model(a.name, config, a, torch.float32).train()
    except ValueError as error:
        p.error(str(error))
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{config.model_type}: {models.describe(config, parameters)}", flush=True)
    with models.on_backend(a):
        measured = train(model, steps, a)
    tokens, step = a.batch_size * a.seq_len, statistics.median(measured.seconds)
    rows = "packed" if a.varlen else f"{a.batch_size} rows"
    models.print_table(
        [
            ("tokens per step", f"{tokens:,} ({rows})"),
            ("initial memory", models.mib(measured.initial_mb)),
            ("max memory", models.mib(measured.max_mb)),
            (f"{a.warmup_steps} warm-up steps", f"{measured.warmup_seconds:.2f} s"),
            (f"{a.steps} steps", f"{sum(measured.seconds):.2f} s, loss {measured.losses[-1]:.3f}"),
            ("step, median", f"{step * 1e3:,.1f} ms"),
            ("throughput", f"{tokens / step:,.0f} tokens/s"),
        ]
    )
    how = ["torch.compile"] * a.compile + ["packed"] * a.varlen + ["autocast"] * (a.dtype == "bfloat16")
    note = models.note(models.describe(config, parameters), a, "AdamW", *how)
    shape = f"B1 T{tokens}" if a.varlen else f"B{a.batch_size} T{a.seq_len}"
    if a.out is not None:
        Recorder(a.device, a.out, a.commit).add(
            op=config.model_type, shape=shape, dtype=a.dtype, mode="train", ms=step * 1e3, peak_mb=measured.max_mb,
            note=note,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
