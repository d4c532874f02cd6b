"""Train a byte-level language model on real text, save it, load it again and let it write.

The text is the source of Python's own standard library, which every machine has, or the files of `--text`. Every tenth
file is held out for validation. The model is one of `fla.models`, GLA unless `--model` names another. The folder
`--out` gets `checkpoint/` (a Hugging Face checkpoint, and the trainer's state), `loss.png`, `metrics.json` and
`report.txt`.

    python examples/train_and_generate.py                                  # under four minutes on two CPU cores
    python examples/train_and_generate.py --model retnet --text book.txt   # another model, your own text
    python examples/train_and_generate.py --resume                         # after Ctrl-C
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from _arguments import SIZES, learning_rate, positive, seed
from _text import UserError, baselines, read_files, split
from _threads import Threads
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

import fla
import fla.models
from fla.backends import family, resolve
from fla.ops._spec import REGISTRY as OPS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MODELS = {
    causal_lm.config_class.model_type: causal_lm
    for name, causal_lm in vars(fla.models).items()
    if name.endswith("ForCausalLM")
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULTS = {
    "model": "gla", "text": [], "steps": 1000, "seed": 0, "hidden_size": 128, "layers": 3, "heads": 2, "seq_len": 256,
    "batch_size": 4, "lr": 3e-3, "dtype": "float32",
    "device": None, "threads": None, "backend": None, "out": "runs/demo", "resume": False, "prompt": None,
    "new_bytes": 400,
}  # fmt: skip
RESULTS = ("checkpoint", "checkpoint.new", "checkpoint.old", "loss.png", "metrics.json", "report.txt")
# what may change when a run is resumed; all other arguments decide the loss curve
FREE_ON_RESUME = {"device", "threads", "backend", "out", "resume", "prompt", "new_bytes"}


# --- training ---------------------------------------------------------------------------------------------------------


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(data: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """Batch number `step`, `[batch_size, seq_len]`.

    It depends only on seed and step, so a resumed run keeps the order.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.seq_len + 1, (args.batch_size,), generator=generator)
    return torch.stack([data[s : s + args.seq_len] for s in starts.tolist()]).long().to(args.device)


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, args: argparse.Namespace) -> float:
    """Mean bits per byte under the model, of all of `data` but its first byte, given what precedes in the window."""
    model.eval()
    nats = 0.0
    windows = zip(data[:-1].view(-1, args.seq_len).split(16), data[1:].view(-1, args.seq_len).split(16), strict=True)
    for x, y in windows:
        logits = model(input_ids=x.long().to(args.device), use_cache=False).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), y.long().to(args.device).flatten(), reduction="sum").item()
    model.train()
    return nats / math.log(2) / (len(data) - 1)


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    config_class = MODELS[args.model].config_class
    fields = {
        "vocab_size": 256,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_heads": args.heads,
    }
    fields |= {"bos_token_id": None, "eos_token_id": None}  # bytes have no such tokens
    if hasattr(config_class, "use_short_conv"):
        fields["use_short_conv"] = True  # it saves over half a bit per byte at this size
    for width in ("head_dim", "expand_ratio"):
        if hasattr(config_class, width) and hasattr(config_class, "num_heads"):
            fields[width] = max(1, args.hidden_size // args.heads)  # otherwise heads as wide as in a large model
    torch.manual_seed(args.seed)
    try:
        return AutoModelForCausalLM.from_config(config_class(**fields)).to(device=args.device, dtype=DTYPES[args.dtype])
    except ValueError as error:
        raise UserError(str(error)) from None


def check_finite(loss: float, name: str, step: int) -> None:
    """End a run that diverged; the checkpoint of an earlier run stays what it was."""
    if not math.isfinite(loss):
        raise UserError(f"training diverged: {name} is {loss} after {step} steps; try a smaller --lr")


class Run:
    """A model in training, with all that a checkpoint must hold so that a resumed run goes on exactly as before."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model = model
        self.weights = list(model.parameters())
        # bfloat16 weights have too few bits for small updates, so the optimizer works on float32 copies
        self.masters = [w if w.dtype == torch.float32 else nn.Parameter(w.detach().float()) for w in self.weights]
        groups = [  # matrices decay; biases and norms do not
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, max(1, args.steps // 20), args.steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def update(self, ids: Tensor) -> float:
        """One optimizer step on `ids`; returns the loss, in nats per byte."""
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        pairs = [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if m is not w]
        for weight, master in pairs:
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in pairs:
                weight.copy_(master)
        return loss.item()

    def save(self, folder: Path, args: argparse.Namespace, fingerprint: str) -> None:
        """Write the checkpoint beside the old one, then replace that: a complete one exists at any moment."""
        new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)
        self.model.save_pretrained(new)
        state = {
            "args": {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME},
            "text": fingerprint, "losses": self.losses, "seconds": self.seconds, "validation": self.validation,
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "masters": None if DTYPES[args.dtype] == torch.float32 else self.masters,
            "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
        }  # fmt: skip
        torch.save(state, new / "trainer.pt")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, state: dict) -> None:
        """Restore the state that `save` wrote. `model` has the saved weights already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        with torch.no_grad():
            for master, kept in zip(self.masters, state["masters"] or [], strict=False):
                master.copy_(kept)
        self.losses, self.seconds, self.validation = state["losses"], state["seconds"], state["validation"]
        cpu, *gpus = state["rng"]
        torch.set_rng_state(cpu)
        if len(gpus) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(gpus)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that is no longer empty after Ctrl-C (or SIGTERM), so that the running step can end.

    A second one stops at once.
    """
    caught: list[int] = []

    def handler(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def train(run: Run, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> bool:
    """Train. Returns True after the last step, and False after Ctrl-C."""
    every = max(1, args.steps // 10)
    glance = held_out[: max(1, len(held_out) // 16 // args.seq_len) * args.seq_len + 1]  # enough for the curve
    shape = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed}, {remaining} left]"
    threads = choose_threads(args)
    bar = tqdm(total=args.steps, initial=run.step, bar_format=shape, dynamic_ncols=True)
    with interruptible() as caught, bar:
        while run.step < args.steps and not caught:
            start = time.perf_counter()
            loss = run.update(batch(training, args, run.step))
            check_finite(loss, "the loss", run.step)
            run.losses.append(loss)
            run.seconds.append(time.perf_counter() - start)
            threads.seen(run.seconds[-1])
            if run.step % every == 0 or run.step == args.steps:
                bits = bits_per_byte(run.model, glance, args)
                check_finite(bits, "the validation loss", run.step)
                run.validation.append((run.step, bits))
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second(run, args):,.0f} tokens/s", refresh=False)
            bar.update()
    return run.step == args.steps


def choose_threads(args: argparse.Namespace) -> Threads:
    """As many threads as `--threads` or OMP_NUM_THREADS says; without them, on a CPU, as many as make steps quicker."""
    most = args.threads or torch.get_num_threads()
    is_fixed = args.threads or "OMP_NUM_THREADS" in os.environ or not args.device.startswith("cpu")
    return Threads(most, least=most if is_fixed else 1)


def tokens_per_second(run: Run, args: argparse.Namespace) -> float:
    """By the median time of the last hundred steps, so that neither compiling nor validation counts."""
    return args.batch_size * args.seq_len / statistics.median(run.seconds[-100:])


# --- what the user gets -----------------------------------------------------------------------------------------------


def table(bits: dict[str, float], model: str, held_out: bytes) -> str:
    """The bits per byte of the model and the baselines, worst first, and a line about those that beat the model."""
    lines = [f"bits per byte of {len(held_out):,} held-out bytes"]
    lines += [f"  {name:<20} {value:5.2f}" for name, value in sorted(bits.items(), key=lambda row: -row[1])]
    winners = [name.split()[0] for name in ("gzip -9", "xz -9e") if bits[name] < bits[model]]
    if winners:
        lines.append(
            f"{' and '.join(winners)} still win{'s' * (len(winners) == 1)}: the model is small and has seen little."
        )
    return "\n".join(lines)


def plot(run: Run, bits: dict[str, float], title: str, file: Path) -> None:
    """Draw the training and validation curves in bits per byte, with lines for the baselines."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = range(1, run.step + 1), [loss / math.log(2) for loss in run.losses]
    half = run.step // 80
    smooth = [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label=f"training (mean of {2 * half + 1} steps)")
    axes.plot(*zip(*run.validation, strict=True), "o-", color="tab:orange", markersize=3.5, label="validation")
    low, high = sorted(("gzip -9", "xz -9e"), key=bits.__getitem__)
    for name, side in (("byte frequencies", "center"), (high, "bottom"), (low, "top")):
        axes.axhline(bits[name], color="gray", linewidth=0.8, linestyle=":")
        axes.text(1.01, bits[name], name, transform=axes.get_yaxis_transform(), va=side, color="gray", fontsize=8)
    axes.set(xlabel="training step", ylabel="bits per byte", title=title, xlim=(0, run.step), ylim=(0, 8.5))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def choose_prompt(args: argparse.Namespace, held_out: bytes) -> bytes:
    if args.prompt:
        return args.prompt.encode(errors="surrogateescape")
    return held_out[:64] if args.text else b'def main(args):\n    """'


def load(checkpoint: Path, args: argparse.Namespace) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint).to(args.device)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {checkpoint}: {first_line(error)}") from None


def generate(checkpoint: Path, prompt: bytes, args: argparse.Namespace) -> str:
    """The text that the reloaded checkpoint writes after `prompt`."""
    model = load(checkpoint, args).eval()
    torch.manual_seed(args.seed)
    ids = torch.tensor([list(prompt)], device=args.device)
    written = model.generate(ids, max_new_tokens=args.new_bytes, do_sample=True, top_p=0.95, top_k=0, pad_token_id=0)
    return bytes(written[0].tolist()).decode("utf-8", errors="replace")


def metrics(run: Run, bits: dict[str, float], args: argparse.Namespace) -> dict:
    """The content of `metrics.json`."""
    gpu = args.device.startswith("cuda")
    return {
        "args": {k: v for k, v in vars(args).items() if k not in ("out", "resume", "prompt", "new_bytes")},
        "parameters": sum(w.numel() for w in run.weights),
        "device": torch.cuda.get_device_name(args.device) if gpu else "cpu",
        "backend": op_backend(args), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "tokens_per_second": round(tokens_per_second(run, args), 1),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated(args.device) / 2**20) if gpu else None,
        "training_seconds": round(sum(run.seconds), 2), "bits_per_byte": bits,
        "loss": run.losses, "seconds": run.seconds, "validation_bits_per_byte": run.validation,
    }  # fmt: skip


def op_family(model: str) -> str:
    """The family of the op of the model's layers; that of norms and convolutions for a model without an op."""
    forms = getattr(MODELS[model].block_cls.mixer_cls, "forms", {}).values()
    return next((spec.family for spec in OPS.values() if set(forms) & set(spec.forms.values())), "fused")


def op_backend(args: argparse.Namespace) -> str:
    """The backend of the model's op, which may have no Triton kernels while other parts have."""
    return resolve(op_family(args.model), torch.empty(0, device=args.device))


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_state(out: Path) -> dict:
    """The state of the run in `out`; UserError where there is none, or it is no run of this program."""
    file = out / "checkpoint" / "trainer.pt"
    if not file.is_file():
        raise UserError(f"nothing to resume: there is no {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no state at all may raise anything
        raise UserError(f"cannot read {file}: {first_line(error)}") from None
    if not (isinstance(state, dict) and {"args", "text", "optimizer", "rng"} <= set(state)):
        raise UserError(f"{file} is no state of a run of this program")
    return state


def check_out(out: Path) -> None:
    """UserError unless results can be written to `out` without overwriting anything that is not of such a run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} must be a folder for the results: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} must be a folder for the results: Permission denied")
    if there := [name for name in RESULTS if (out / name).exists()]:
        try:
            read_state(out)
        except UserError:
            raise UserError(
                f"--out {out} already has {', '.join(there)}, not of a run of this program: choose another folder"
            ) from None


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the state of the run to resume, if any.

    A setting comes from the command line, else from that run, else from the defaults.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], argument_default=argparse.SUPPRESS)

    def option(name: str, text: str, **keywords) -> None:
        default = DEFAULTS[name.replace("-", "_")]
        parser.add_argument(
            f"--{name}", help=text if default in (None, [], False) else f"{text} (default: {default})", **keywords
        )

    option("model", "type of the model", choices=MODELS)
    option(
        "text",
        "files or folders with text to train on (default: Python's standard library)",
        nargs="+",
        action="extend",
        metavar="PATH",
    )
    option("threads", "threads on a CPU (default: as many as make steps quicker)", type=positive, metavar="N")
    for name, text in SIZES.items():
        option(name, text, type=positive, metavar="N")
    option("lr", "highest learning rate", type=learning_rate)
    option("dtype", "dtype of the weights; the optimizer's copies are float32", choices=DTYPES)
    option("device", "cpu or cuda (default: cuda if there is a GPU)")
    option("backend", "compute the ops with this backend (default: fla's choice)", choices=("triton", "torch"))
    option("seed", "seed of weights, data order and sampling", type=seed)
    option("prompt", "text that the model continues (default: Python; with --text, the held-out beginning)")
    option("out", "folder for the results", metavar="FOLDER")
    option("resume", "go on with the run in --out", action="store_true")
    given = vars(parser.parse_args(argv))
    state, saved = None, {}
    if given.get("resume"):
        state = read_state(Path(given.get("out", DEFAULTS["out"])))
        saved = state["args"]
        if changed := [name for name in given if name in saved and given[name] != saved[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise UserError(f"--resume goes on with the run as it was begun: leave out {flags}")
    args = argparse.Namespace(**{**DEFAULTS, **saved, **given})
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {first_line(error)}") from None
    if probe.device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: must be cpu or cuda")
    try:
        named, args.backend = args.backend, resolve("decay", probe, args.backend)
        if named:
            family(op_family(args.model), named)  # raises if it has no such kernels
    except ValueError as error:
        raise UserError(f"--backend {args.backend}: {error}") from None
    return args, state


def how_to_resume(args: argparse.Namespace) -> str:
    flags = ["--resume"] + ([] if args.out == DEFAULTS["out"] else ["--out", args.out])
    command = shlex.join([os.path.relpath(sys.executable), sys.argv[0], *flags])
    return f"To go on:\n  {command}\n  make demo ARGS={shlex.quote(shlex.join(flags))}"


def demo(args: argparse.Namespace, state: dict | None) -> int:
    """Train, save, reload and generate. Returns 0, or 130 after Ctrl-C."""
    disable_progress_bar()  # those of saving and loading: one bar is enough
    out = Path(args.out)
    checkpoint = out / "checkpoint"
    texts = read_files(args.text)
    training, held_out = split(texts, args.seq_len)
    fingerprint = hashlib.sha256(training + held_out).hexdigest()
    if state is not None and state["text"] != fingerprint:
        raise UserError("--resume goes on with the run as it was begun, but the text has changed since")
    check_out(out)
    if state is None:
        model = build_model(args)
    else:
        model = load(checkpoint, args)
    run = Run(model.train(), args)
    if state is not None:
        run.load(state)
    title = f"{args.model}, {sum(w.numel() for w in run.weights) / 1e6:.1f} million parameters"
    print(f"text:  {len(training):,} bytes to train on, from {len(texts):,} files; {len(held_out):,} held-out bytes")
    where = f"{args.dtype} on {args.device} ({op_backend(args)} backend)"
    print(f"model: {title}, {where}, {args.batch_size * args.seq_len:,} tokens a step", flush=True)

    done = train(run, as_tensor(training), as_tensor(held_out), args)
    run.save(checkpoint, args, fingerprint)
    if not done:
        print(
            f"stopped after step {run.step} of {args.steps}; the checkpoint is in {checkpoint}. {how_to_resume(args)}"
        )
        return 130

    bits = baselines(training, held_out)
    bits[args.model] = bits_per_byte(model, as_tensor(held_out), args)
    check_finite(bits[args.model], "the validation loss", run.step)
    plot(run, bits, title, out / "loss.png")
    (out / "metrics.json").write_text(json.dumps(metrics(run, bits, args), indent=1) + "\n")
    prompt = choose_prompt(args, held_out)
    text = generate(checkpoint, prompt, args)
    speed = f"{run.step} steps in {sum(run.seconds):.0f} s, {tokens_per_second(run, args):,.0f} tokens/s"
    report = f"{title}: {speed}\n\n{table(bits, args.model, held_out)}\n\n"
    report += f"what the reloaded checkpoint writes after {prompt.decode(errors='replace')!r}:\n\n{text}\n"
    (out / "report.txt").write_text(report, encoding="utf-8")
    print(f"\n{report}\ncheckpoint: {checkpoint}\npicture:    {out / 'loss.png'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return the exit code."""
    try:
        args, state = parse(argv)
        with fla.use_backend(args.backend):
            return demo(args, state)
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message = f"out of memory, take smaller sizes: {first_line(error)}"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"train_and_generate.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
