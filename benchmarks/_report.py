"""Writes `docs/benchmarks.md` and its plots from the records alone: nothing is run, and no number is typed by hand.

Every table holds records of one commit, which it names: `--commit`, or the newest commit that has any of its rows. Left
out are runs with `--quick`, runs on another backend than the usual one, runs of uncommitted code, and rows without a
time. A gap says "no record".
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _plots, families
from benchmarks import _records as records
from benchmarks._goals import GPU, GROUPS, UNITS, Goal, Records, number
from benchmarks._shapes import SHAPES
from fla.ops._spec import REGISTRY

Record = dict[str, Any]
NONE = "no record"
DTYPE = "bfloat16"  # of plots and targets
LENGTH = re.compile(r"B8 T(\d+) (?:H32 D128|D4096)")  # ops without heads have the channels of all of them
SOFTMAX = {"sdpa_flash": "softmax (flash)", "sdpa_cudnn": "softmax (cuDNN)"}
MODES = ("fwd", "fwdbwd")
MODELS = ("generate", "train")
HEAD = """# Benchmarks

Written by `python -m benchmarks.ops --report` from `benchmarks/results/*.jsonl`; do not edit. The records come from
`python -m benchmarks.ops` and its neighbours `benchmarks.host`, `.packed`, `.decode`, `.benchmark_generation`
and `.benchmark_training_throughput`, which check a result before they time it.

- **ms**: the median time of a call with a cold L2 cache, in the quietest of several rounds. `fwd` is a forward without
  autograd; `fwdbwd` is a forward and the gradient of every input, computed in the calling thread.
- **floors**: the time over the memory floor. The memory floor is the time that it takes to read every input once and to
  write every output once, at the copy bandwidth that the same run measured. The closer to 1, the better.
- **peer**: another linear-attention library, which the tables name. It is timed in the same run on the same inputs,
  after its autotuning. **peer/ours** is its time over ours: above 1, ours is faster.
- **work**: the working memory of a call in MiB, which is its peak memory without inputs, outputs and gradients.
- **first call**: the seconds of the first forward and backward with an empty compile cache.
- Every table holds records of one commit. "no record" means that nothing was measured there on that commit.
"""


def write(everything: list[Record], docs: Path, commit: str | None = None) -> list[Path]:
    """Write the page and its pictures into `docs`. Returns the files. Pictures of an earlier report are removed."""
    docs.mkdir(parents=True, exist_ok=True)
    page, pictures = build(everything, commit)
    for old in docs.glob("benchmarks-*.png"):
        if old.name not in pictures:
            old.unlink()
    for name, draw in pictures.items():
        draw(docs / name)
    (docs / "benchmarks.md").write_text(page, encoding="utf-8")
    return [docs / "benchmarks.md", *(docs / name for name in pictures)]


def build(everything: list[Record], commit: str | None = None) -> tuple[str, dict[str, Callable[[Path], None]]]:
    """The text of the page, and for the file name of every picture a function that draws it."""
    parts: list[str] = [HEAD]
    pictures: dict[str, Callable[[Path], None]] = {}
    gpus = sorted(dict.fromkeys(r["gpu"] for r in everything), key=lambda gpu: (gpu == "cpu", gpu))
    for gpu in gpus:
        found = [r for r in everything if r["gpu"] == gpu]
        rows = [r for r in found if _counts(r)]
        names = [name for name in family_names() if any(family_of(r["op"]) == name for r in found)]
        alone = len(names) < 2
        for name in names or [""]:
            slug = records.slug(gpu) if alone else f"{records.slug(gpu)}-{name}"
            here = Section([r for r in rows if family_of(r["op"]) in (name, "")], slug, commit, name)
            parts.append(f"## {gpu}\n" if alone else f"## {gpu}: family `{name}`\n")
            if gpu == GPU:
                parts += here.targets()
            parts += [*here.lengths(), *here.shapes(), *here.small()]
            pictures |= here.pictures
        parts += [] if alone else [f"## {gpu}: models\n"]
        parts += Section(rows, records.slug(gpu), commit, "").models()
    return "\n".join(parts), pictures


def _counts(r: Record) -> bool:
    named = records.backend(r)
    usual = named in ("", "triton") or r["gpu"] == "cpu"
    return r["ms"] is not None and "--quick" not in r["note"] and usual


def family_names() -> list[str]:
    """The families of the registered ops, in the order of their ops."""
    return list(dict.fromkeys(spec.family for spec in REGISTRY.values()))


def family_of(name: str) -> str:
    """The family of the op that records call `name`; "" for softmax attention and models, which have none."""
    for spec in REGISTRY.values():
        if name == f"naive_{spec.name}" or name in (function.__name__ for function in spec.forms.values()):
            return spec.family
    return ""


def with_targets(family: str) -> list[str]:
    """The ops of a family whose speed has goals."""
    return list(dict.fromkeys(goal.op for goal in families.goals(family) if goal.group == "speed"))


def op_names(family: str) -> list[str]:
    """The names of a family's ops in records: their chunk form, or else their first. Those with targets come first."""
    forms = [spec.forms for spec in REGISTRY.values() if spec.family == family]
    names = [found.get("chunk", next(iter(found.values()))).__name__ for found in forms]
    first = with_targets(family)
    return [*first, *(name for name in names if name not in first)]


class Section:
    """The part of the page about one family on one GPU. `rows` also holds the records of softmax attention."""

    def __init__(self, rows: list[Record], slug: str, commit: str | None, family: str) -> None:
        self.rows, self.slug, self.commit, self.family = rows, slug, commit, family
        self.ops, self.goals = op_names(family), families.goals(family)
        self.pictures: dict[str, Callable[[Path], None]] = {}

    def of_one_commit(self, wanted: Callable[[Record], bool]) -> tuple[str, list[Record]]:
        """A line that says where the wanted rows come from, and the last record of each.

        The list is empty if there is none.
        """
        found = [r for r in self.rows if wanted(r)]
        commit = self.commit
        if commit is None:
            clean = [r for r in found if not r["commit"].endswith("-dirty")]
            # softmax attention may have been timed on another commit
            clean = [r for r in clean if family_of(r["op"])] or clean
            commit = max(clean, key=lambda r: r["date"])["commit"] if clean else None
        found = [r for r in found if r["commit"] == commit]
        if not found:
            return f"{NONE[0].upper()}{NONE[1:]}.\n", []
        days = sorted({r["date"][:10] for r in found})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        versions = "; ".join(sorted({f"torch {r['torch']}, triton {r['triton']}" for r in found}))
        peers = ", ".join(sorted({r["peer"] for r in found if r["peer"]}))
        where = f"Commit `{commit}`, {when}, {versions}"
        return f"{where}{f'; peer: {peers}' if peers else ''}.\n", records.latest(found)

    def targets(self) -> list[str]:
        """The goals, group by group, each with what was measured and whether it is met."""
        parts = ["### Targets\n"] if self.goals else []
        for group, about in GROUPS.items():
            goals = [goal for goal in self.goals if goal.group == group]
            if not goals:
                continue
            keys = {key for goal in goals for key in goal.keys}
            said, rows = self.of_one_commit(lambda r, keys=keys: r["dtype"] == DTYPE and _key(r) in keys)  # type: ignore[misc]
            parts += [f"#### {about}\n", said, *goal_table(goals, {_key(r): r for r in rows})]
        return parts

    def lengths(self) -> list[str]:
        """Time against sequence length, for the ops, softmax attention and the peer."""
        parts = ["### Time against sequence length (B8 H32 D128)\n"]
        chosen = {*self.ops, *SOFTMAX}
        said, rows = self.of_one_commit(
            lambda r: (
                r["dtype"] == DTYPE
                and r["op"] in chosen
                and r["mode"] in MODES
                and LENGTH.fullmatch(r["shape"]) is not None
            )
        )
        parts.append(said)
        if not rows:
            return parts
        name = f"benchmarks-{self.slug}-time.png"
        lines = {mode: self._lines(rows, mode) for mode in MODES}
        title = "Time against sequence length, B8 H32 D128, bfloat16 (dashed or hollow: the peer)"
        self.pictures[name] = lambda path: _plots.time_against_tokens(path, lines, title)
        parts.append(f"![Time against sequence length]({name})\n")
        found = {(r["op"], _tokens(r), r["mode"]): r for r in rows}
        shown = {*with_targets(self.family), *(r["op"] for r in rows)}
        columns = [op for op in (*self.ops, *SOFTMAX) if op in shown or op in SOFTMAX]
        for mode in MODES:
            parts.append(f"{_plots.TITLES[mode].capitalize()}, ms (in brackets the peer's):\n")
            table = [["T", *columns]]
            for tokens in (_tokens({"shape": shape}) for shape in SHAPES["seed"]):
                table.append([str(tokens), *(_time(found.get((op, tokens, mode))) for op in columns)])
            parts.append(markdown(table))
        return parts

    def _lines(self, rows: list[Record], mode: str) -> list[_plots.Line]:
        lines = []
        for op in (*self.ops, *SOFTMAX):
            mine = [(_tokens(r), r) for r in rows if (r["op"], r["mode"]) == (op, mode)]
            mine.sort(key=lambda pair: pair[0])
            colour, marker = _plots.style(op, self.ops)
            ours = [(tokens, r["ms"]) for tokens, r in mine]
            peers = [(tokens, r["peer_ms"]) for tokens, r in mine if r["peer_ms"]]
            if peers:
                lines.append(_plots.Line(op, colour, marker, peers, dashed=True))
            if ours:
                lines.append(_plots.Line(SOFTMAX.get(op) or op.removeprefix("chunk_"), colour, marker, ours))
        return lines

    def shapes(self) -> list[str]:
        """Every op at every shape, beside the peer and the memory floor, as pictures and in one table."""
        parts = ["### Every op and shape\n"]
        said, rows = self.of_one_commit(lambda r: r["mode"] in MODES)
        parts.append(said)
        if not rows:
            return parts
        rows.sort(key=lambda r: (_place(r["shape"]), r["op"], r["mode"]))
        pictures = (
            ("ratio", "ratio", "Peer's time over ours, bfloat16 (longer to the right: ours is faster; tick: target)",
             "peer's time / our time", (1.0, "as fast as the peer")),
            ("floor", "floor_x", "Time over the memory floor, bfloat16 (shorter is better; tick: target)",
             "time / memory floor", (1.0, "memory floor")),
        )  # fmt: skip
        for short, quantity, title, unit, line in pictures:
            bars = {mode: self._bars(rows, mode, quantity) for mode in MODES}
            if not any(bars.values()):
                parts.append(f"{title.split(',')[0]}: {NONE}.\n")
                continue
            name = f"benchmarks-{self.slug}-{short}.png"
            self.pictures[name] = lambda path, bars=bars, title=title, unit=unit, line=line: _plots.bars(  # type: ignore[misc]
                path, bars, self.ops, title, unit, line
            )
            parts.append(f"![{title.split(',')[0]}]({name})\n")
        return [*parts, _all_rows(rows), *_remarks(rows)]

    def _bars(self, rows: list[Record], mode: str, quantity: str) -> list[_plots.Bar]:
        must = {(g.op, g.shape): g.must for g in self.goals if (g.mode, g.quantity) == (mode, quantity)}
        mine = [r for r in rows if r["mode"] == mode and r["dtype"] == DTYPE and r["op"] in self.ops]
        # the lengths have a picture of their own
        mine = [r for r in mine if r["shape"] in SHAPES["targets"] or not LENGTH.fullmatch(r["shape"])]
        on_target = must if any(r["gpu"] == GPU for r in rows) else {}
        return [
            _plots.Bar(r["op"], r["shape"], r[quantity], on_target.get((r["op"], r["shape"])))
            for r in mine
            if r[quantity] is not None
        ]

    def small(self) -> list[str]:
        """Host overhead, packed sequences and decoding."""
        parts = []
        for title, about, modes in (
            ("Host overhead", "Wall time per call in a loop on tiny inputs.", ("host_",)),
            (
                "Packed sequences",
                "`packed`: many sequences of skewed lengths in one row. `whole`: one sequence of as many tokens.",
                ("packed", "whole"),
            ),
            (
                "Decoding",
                "One token, from a state to the next. Bandwidth: that of the state's bytes, over copy bandwidth.",
                ("decode",),
            ),
        ):
            said, rows = self.of_one_commit(lambda r, modes=modes: r["mode"].startswith(modes))  # type: ignore[misc]
            parts += [f"### {title}\n", f"{about}\n", said]
            if not rows:
                continue
            table = [["op", "shape", "dtype", "mode", "us per call", "bandwidth"]]
            for r in rows:
                share = number("bandwidth", 1 / r["floor_x"]) if r["floor_x"] else ""
                table.append([r["op"], r["shape"], r["dtype"], r["mode"], f"{r['ms'] * 1e3:.4g}", share])
            parts.append(markdown(table, numbers=(4, 5)))
        return parts

    def models(self) -> list[str]:
        """Training steps and generated tokens of whole models."""
        said, rows = self.of_one_commit(lambda r: r["mode"] in MODELS)
        parts = ["### Models\n", "`train`: one optimizer step. `generate`: one token of every sequence.\n", said]
        if not rows:
            return parts
        table = [["model", "shape", "dtype", "mode", "ms", "tokens/s", "peak MiB", "what"]]
        for r in rows:
            sizes = dict(re.findall(r"([A-Z]+)(\d+)", r["shape"]))
            tokens = int(sizes["B"]) * (int(sizes["T"]) if r["mode"] == "train" else 1)
            speed = f"{tokens / r['ms'] * 1e3:,.0f}"
            memory = "" if r["peak_mb"] is None else f"{r['peak_mb']:,.0f}"
            table.append(
                [r["op"], r["shape"], r["dtype"], r["mode"], f"{r['ms']:.4g}", speed, memory, r["note"]]
            )  # fmt: skip
        return [*parts, markdown(table, numbers=(4, 5, 6))]


def goal_table(goals: Sequence[Goal], found: Records) -> list[str]:
    """The goals of one group with what was measured, and how many are met."""
    table = [["op", "shape", "mode", "must", "aim", "measured", ""]]
    verdicts = [goal.verdict(found) for goal in goals]
    for goal, verdict in zip(goals, verdicts, strict=True):
        value = goal.value(found)
        measured = "" if value is None else number(goal.quantity, value) + UNITS[goal.quantity]
        said = f"**{verdict}**" if verdict == "not met" else verdict
        table.append([goal.op, goal.shape, goal.mode, goal.shown(goal.must), goal.shown(goal.aim), measured, said])
    count = {name: sum(verdict.startswith(name) for verdict in verdicts) for name in ("met", "not met", NONE)}
    summary = ", ".join(f"{name}: {n}" for name, n in count.items())
    return [f"{summary}; of {len(goals)}.\n", markdown(table, numbers=(3, 4, 5))]


def _all_rows(rows: Sequence[Record]) -> str:
    table = [
        ["op", "shape", "dtype", "mode", "ms", "floors", "peer ms", "peer/ours", "work", "peer's work", "first call s"]
    ]
    for r in rows:
        cells = [f"{r['ms']:.4g}"]
        for name, form in (("floor_x", ".3g"), ("peer_ms", ".4g"), ("ratio", ".3g"), ("work_mb", ",.0f"),
                           ("peer_work_mb", ",.0f"), ("first_call_s", ".3g")):  # fmt: skip
            cells.append("" if r[name] is None else format(r[name], form))
        table.append([r["op"], r["shape"], r["dtype"], r["mode"], *cells])
    return markdown(table, numbers=tuple(range(4, 11)))


def _remarks(rows: Sequence[Record]) -> list[str]:
    """The notes of the records, each once, with the ops and modes that have it."""
    about: dict[str, dict[str, None]] = {}
    for r in rows:
        for remark in filter(None, (r["note"] or "").split("; ")):
            if not re.fullmatch(r"\w+ backend|peer's warm-up .*", remark):
                about.setdefault(remark, {})[f"{r['op']} {r['mode']}"] = None
    if not about:
        return []
    return ["Notes of the records:\n", *(f"- {remark}: {', '.join(names)}" for remark, names in about.items()), ""]


def _key(r: Record) -> tuple[str, str, str]:
    return r["op"], r["shape"], r["mode"]


def _tokens(r: Record) -> int:
    """T of a row whose shape is one of the comparison by sequence length."""
    match = LENGTH.fullmatch(r["shape"])
    assert match is not None
    return int(match[1])


def _place(shape: str) -> tuple[int, str]:
    known = [*SHAPES["targets"], *SHAPES["peer"], *SHAPES["seed"]]
    return (known.index(shape) if shape in known else len(known)), shape


def _time(r: Record | None) -> str:
    if r is None:
        return NONE
    return f"{r['ms']:.4g}" + (f" ({r['peer_ms']:.4g})" if r["peer_ms"] else "")


def markdown(table: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table. The columns `numbers` are aligned to the right."""
    rows = [list(row) for row in table]
    ruler = ["---:" if i in numbers else "---" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ruler, *rows[1:]]) + "\n"
