"""Train small models on associative recall or on parity, and draw what their states can do.

    python examples/recall.py                   # recall: accuracy against the size of the state; minutes on two cores
    python examples/recall.py --task parity     # parity with and without negative eigenvalues
    python examples/recall.py --task parity --full --device cuda   # the published setting

A model is a type of `fla.models`, with settings of its config after a `+`: `delta_net+allow_neg_eigval` or
`gla+expand_k=0.5`. Recall trains each model at every width of `--hidden-sizes`; parity at the first. The folder
`--out` gets `TASK.json`, `TASK.txt` and `TASK.png` (with `--full`, `TASK-full`).
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from _arguments import learning_rate, positive, seed
from _tasks import IGNORED, Parity, Recall
from _text import UserError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

import fla
from fla._auto import model_types

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TASKS = {"recall": Recall, "parity": Parity}
DEFAULTS: dict[str, dict[str, Any]] = {
    "recall": {
        "models": ["delta_net", "gated_deltanet", "linear_attn"],
        "hidden_sizes": [32, 64],
        "steps": 1500,
        "batch_size": 64,
        "lr": 3e-3,
        "weight_decay": 0.1,
    },
    "parity": {
        "models": ["delta_net+allow_neg_eigval", "delta_net"],
        "hidden_sizes": [64],
        "steps": 1500,
        "batch_size": 64,
        "lr": 3e-3,
        "weight_decay": 0.0,  # it would draw beta away from its largest value, which parity of long rows needs
    },
}
# the published setting: https://arxiv.org/abs/2411.12537, section 5.1
FULL = {"hidden_sizes": [128], "steps": 20_000, "batch_size": 256, "lr": 1e-3, "heads": 4}
TESTED = 1024  # sequences of the test
CHECK_EVERY = 250  # steps between tests


# --- models -----------------------------------------------------------------------------------------------------------


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """`gla+expand_k=0.5+use_short_conv` -> the model type and its settings; a name alone stands for True."""
    name, *settings = text.split("+")
    if name not in model_types():
        raise UserError(f"--models must be among {', '.join(model_types())}, got {name!r}")
    found: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            found[key] = json.loads(value) if value else True
        except json.JSONDecodeError:
            found[key] = value
    return name, found


def build(text: str, task: Recall | Parity, hidden_size: int, args: argparse.Namespace) -> PreTrainedModel:
    """A model of `args.layers` layers. Keys and values are as wide as the model where its config can say so."""
    name, settings = parse_model(text)
    known = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(name)))}
    wanted = {
        "vocab_size": task.vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": args.layers,
        "num_heads": args.heads,
        "head_dim": hidden_size // args.heads,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_short_conv": True,
    }
    if "num_heads" in known:  # without heads it is a factor
        wanted["expand_ratio"] = wanted["head_dim"]
    fields = {key: value for key, value in wanted.items() if key in known}
    if unknown := [key for key in settings if key not in known]:
        raise UserError(f"--models {text}: the config of {name} has no {', '.join(unknown)}")
    fields |= settings | {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(args.seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).to(args.device)
    except (ValueError, TypeError) as error:
        raise UserError(f"--models {text}: {error}") from None


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


@torch.no_grad()
def state_size(model: PreTrainedModel, tokens: int) -> int:
    """How many numbers the model keeps of a sequence of so many tokens: its whole cache."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
    return sum(x.numel() for slots in cache for value in slots.values() for x in tensors_in(value))


# --- training ---------------------------------------------------------------------------------------------------------


def answers(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits where something is asked, and what is right there."""
    asked = labels != IGNORED
    return model(input_ids=ids, use_cache=False).logits[asked].float(), labels[asked]


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Recall | Parity, args: argparse.Namespace) -> float:
    """Share of right answers on sequences that training does not see, scaled so that a guess has 0."""
    generator = torch.Generator(args.device).manual_seed(args.seed + 2**41)
    right = asked = 0
    model.eval()
    for _ in range(0, TESTED, 256):
        logits, labels = answers(model, *task.batch(256, generator, test=True))
        right, asked = right + (logits.argmax(-1) == labels).sum().item(), asked + len(labels)
    model.train()
    return (right / asked - task.guess) / (1 - task.guess)


def train(
    text: str,
    hidden_size: int,
    task: Recall | Parity,
    args: argparse.Namespace,
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
    place: int | None = None,
) -> dict[str, Any]:
    """Train one model, until it knows enough or the steps are over. Returns what is recorded of it.

    `keep` gets that after every test. `place`: the line of the progress bar.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(text, task, hidden_size, args)
    tokens = task.tokens if isinstance(task, Recall) else task.tested
    decay = {"weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True, **decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    row: dict[str, Any] = {"model": text, "hidden_size": hidden_size, "state": state_size(model, tokens), "curve": []}
    row["parameters"] = sum(w.numel() for w in model.parameters())
    model.train()
    started = time.perf_counter()
    shape = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed}, {remaining} left]"
    look = {"bar_format": shape, "dynamic_ncols": True, "position": place}
    with tqdm(total=args.steps, desc=f"{text}, D {hidden_size}", **look) as bar:
        for step in range(1, args.steps + 1):
            logits, labels = answers(model, *task.batch(args.batch_size, generator))
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % CHECK_EVERY == 0 or step == args.steps:
                if not math.isfinite(loss.item()):
                    raise UserError(f"training of {text} diverged after {step} steps: try a smaller --lr")
                right = accuracy(model, task, args)
                row["curve"].append((step, right))
                row |= {"accuracy": right, "steps": step, "seconds": round(time.perf_counter() - started, 1)}
                keep(row)
                bar.set_postfix_str(f" loss {loss.item():.3f}, accuracy {right:.3f}", refresh=False)
            bar.update()
            if row.get("accuracy", 0.0) >= task.enough:
                break
    return row


# --- what the user gets -----------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], title: str) -> str:
    """One line for each model and width."""
    width = max(len(row["model"]) for row in rows)
    lines = [title, "", f"{'model':<{width}}  width  state (numbers)  parameters  steps  seconds  accuracy"]
    for row in rows:
        lines.append(
            f"{row['model']:<{width}}  {row['hidden_size']:>5}  {row['state']:>15,}  {row['parameters']:>10,}"
            f"  {row['steps']:>5}  {row['seconds']:>7.0f}  {row['accuracy']:>8.3f}"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], task: Recall | Parity, title: str, file: Path) -> None:
    """Recall: accuracy against the size of the state. Parity: accuracy against steps."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        of_model = [row for row in rows if row["model"] == model]
        style = {"marker": "os^Dv*P"[i % 7], "label": model, "color": f"C{i}", "markersize": 6}
        if isinstance(task, Recall):
            points = sorted((row["state"], row["accuracy"]) for row in of_model)
            axes.plot(*zip(*points, strict=True), **style)
        else:
            last = of_model[0]["curve"][-1]
            curve = [(0, 0.0), *of_model[0]["curve"]]
            axes.plot(*zip(*curve, strict=True), **style | {"markersize": 3.5})
            axes.axhline(last[1], color=f"C{i}", linewidth=0.6, linestyle=":")
    if isinstance(task, Recall):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="numbers in the state", ylabel="share of right answers")
    else:
        axes.set(xlabel="training step", ylabel="accuracy on longer rows (0: a guess)")
    axes.set(title=title, ylim=(-0.05, 1.05))
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def write(
    rows: dict[tuple[str, int], dict[str, Any]], task: Recall | Parity, args: argparse.Namespace, out: Path
) -> None:
    """The record, the table and the picture of the runs so far."""
    title, runs = title_of(task, args), list(rows.values())
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    record = {"task": args.task, **vars(task), "args": settings, "device": device, "torch": torch.__version__}
    record |= {"fla": fla.__version__, "date": time.strftime("%Y-%m-%d"), "runs": runs}
    (out / f"{name_of(args)}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name_of(args)}.txt").write_text(table(runs, title))
    plot(runs, task, title, out / f"{name_of(args)}.png")


def name_of(args: argparse.Namespace) -> str:
    """The name of the files of results, without suffix."""
    return f"{args.task}-full" if args.full else args.task


def title_of(task: Recall | Parity, args: argparse.Namespace) -> str:
    if isinstance(task, Recall):
        return f"recall of {task.pairs} pairs in {task.tokens} tokens, {args.layers} layers"
    return f"parity: trained on {task.shortest} to {task.longest} bits, tested on up to {task.tested}"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Recall | Parity]:
    """The settings, from the command line or else the task's defaults, and the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=TASKS, default="recall", help="what to train on (default: recall)")
    add("--full", action="store_true", help="parity: the published setting, for a GPU")
    add("--models", nargs="+", metavar="MODEL", help="model types, with settings after a + (default: by task)")
    add("--hidden-sizes", nargs="+", type=positive, metavar="N", help="widths of the models (default: by task)")
    add("--layers", type=positive, default=2, metavar="N", help="layers (default: 2)")
    add("--heads", type=positive, metavar="N", help="heads of a layer (default: 2)")
    add("--tokens", type=positive, default=64, metavar="N", help="recall: tokens of a sequence (default: 64)")
    add("--pairs", type=positive, default=8, metavar="N", help="recall: pairs to remember (default: 8)")
    add("--steps", type=positive, metavar="N", help="most optimizer steps of a model (default: by task)")
    add("--batch-size", type=positive, metavar="N", help="sequences of a step (default: by task)")
    add("--lr", type=learning_rate, help="highest learning rate (default: by task)")
    add("--seed", type=seed, default=0, help="seed of weights and data (default: 0)")
    add("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    add("--threads", type=positive, metavar="N", help="threads of a process on a CPU (default: PyTorch's)")
    add("--jobs", type=positive, default=1, metavar="N", help="processes, each of which trains a model (default: 1)")
    add("--out", default="runs/recall", metavar="FOLDER", help="folder for the results (default: runs/recall)")
    args = parser.parse_args(argv)
    if args.full and args.task != "parity":
        parser.error("--full is for --task parity")
    for name, value in {"heads": 2, **DEFAULTS[args.task], **(FULL if args.full else {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {args.device}: must be cpu, or cuda where there is a GPU")
    for text in args.models:
        parse_model(text)
    if args.task == "recall":
        return args, Recall(args.tokens, args.pairs)
    return args, Parity(3, 40, 256, every=False) if args.full else Parity()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return the exit code."""
    try:
        args, task = parse(argv)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise UserError(f"--out {out} must be a folder for the results: Permission denied")
        widths = args.hidden_sizes if args.task == "recall" else args.hidden_sizes[:1]
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        keys = list(itertools.product(args.models, widths))
        if args.jobs == 1:
            for key in keys:
                rows[key] = train(*key, task, args, lambda row, key=key: write(rows | {key: row}, task, args, out))
        else:
            with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
                runs = [pool.submit(train, *key, task, args, place=i) for i, key in enumerate(keys)]
                for key, run in zip(keys, runs, strict=True):
                    rows[key] = run.result()
                    write(rows, task, args, out)
        print(f"\n{(out / f'{name_of(args)}.txt').read_text()}\npicture: {out / name_of(args)}.png")
        return 0
    except (UserError, ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"recall.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
