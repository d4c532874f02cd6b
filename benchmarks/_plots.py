"""The pictures of the report: logarithmic axes, labels beside the data, colours for colour-blind readers too.

Nothing here reads records: `_report.py` passes in the numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

matplotlib.use("Agg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the palette of Okabe and Ito
MARKERS = "osD^vP"
GREYS = {"sdpa_flash": "#888888", "sdpa_cudnn": "#222222"}
TITLES = {"fwd": "forward", "fwdbwd": "forward + backward"}
TEXT = 11
LABEL_GAP = 0.052  # least distance of two labels, as a share of the height of the axes


@dataclass(frozen=True)
class Line:
    """Times of one function: `points` are (tokens, ms). A dashed line is the peer's, and is drawn without its label."""

    label: str
    colour: str
    marker: str
    points: Sequence[tuple[int, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One number of an op at a shape, and the number that must be reached, if any."""

    op: str
    shape: str
    value: float
    must: float | None = None


def style(op: str, ops: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of an op. They follow from its place in `ops`, so they are the same in every picture."""
    if op in GREYS:
        return GREYS[op], "x"
    place = ops.index(op)
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def time_against_tokens(path: Path, modes: Mapping[str, Sequence[Line]], title: str) -> None:
    """Milliseconds against sequence length, a panel per mode. The panel of a mode without lines says "no record"."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 2)
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for axes, (mode, lines) in zip(panels, modes.items(), strict=True):
        _bare(axes, TITLES[mode])
        if not lines:
            axes.text(0.5, 0.5, "no record", transform=axes.transAxes, ha="center", fontsize=TEXT)
            continue
        ticks = sorted({tokens for line in lines for tokens, _ in line.points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens per sequence (T)", fontsize=TEXT)
        axes.set_ylabel("time, ms (lower is faster)", fontsize=TEXT)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.tick_params(labelsize=TEXT - 1)
        axes.grid(which="major", color="#dddddd", linewidth=0.7)
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            width, dash = (1.1, (0, (4, 3))) if line.dashed else (2.0, "solid")
            mark = line.marker if not line.dashed or len(xs) == 1 else None  # a single point needs one to be seen
            fill = "none" if line.dashed else "full"
            axes.plot(xs, ys, color=line.colour, lw=width, ls=dash, marker=mark, markersize=5.5, fillstyle=fill)
        _label_ends(axes, [line for line in lines if not line.dashed])
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write the name of every line at its right end. Names that would overlap are moved apart."""
    low, high = (math.log(y) for y in axes.get_ylim())
    ends = sorted(lines, key=lambda line: max(line.points)[1])
    places = [(math.log(max(line.points)[1]) - low) / (high - low) for line in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    for i in range(len(places) - 1, -1, -1):  # downwards again, if the last ones left the axes
        places[i] = min(places[i], (places[i + 1] if i + 1 < len(places) else 1 + LABEL_GAP) - LABEL_GAP)
    for place, line in zip(places, ends, strict=True):
        axes.text(1.015, place, line.label, transform=axes.transAxes, color=line.colour, fontsize=TEXT, va="center")


def bars(
    path: Path, modes: Mapping[str, Sequence[Bar]], ops: Sequence[str], title: str, unit: str, line: tuple[float, str]
) -> None:
    """Horizontal bars, grouped by shape, a panel per mode. `line` is a value to compare with, and its name.

    Bars begin at this line, so that their direction shows which side wins. A black tick is the `must` of a bar.
    """
    rows: list[tuple[str, str]] = []
    for given in modes.values():
        rows += [(bar.shape, bar.op) for bar in given if (bar.shape, bar.op) not in rows]
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    rows.sort(key=lambda row: (shapes.index(row[0]), ops.index(row[1])))
    place = 0.0
    places: dict[tuple[str, str], float] = {}
    headings: dict[str, float] = {}
    for row in rows:
        if row[0] not in headings:
            place += 0.9 if headings else 0.0
            headings[row[0]] = place
            place += 1.0
        places[row] = place
        place += 1.0
    figure = Figure(figsize=(13, 1.6 + 0.27 * place), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 2)
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    values = [x for given in modes.values() for bar in given for x in (bar.value, bar.must) if x is not None]
    width_of_number = (max(values) / min(values)) ** 0.15  # as a factor on the logarithmic axis
    for axes, (mode, given) in zip(panels, modes.items(), strict=True):
        _bare(axes, TITLES[mode])
        axes.set_xscale("log")
        axes.set_xlim(min([*values, line[0]]) / 1.25, max([*values, line[0]]) * 1.6)
        axes.set_ylim(place, -1.2)
        axes.axvline(line[0], color="#222222", linewidth=1)
        axes.text(line[0], -0.75, line[1], fontsize=TEXT - 1, ha="center", va="center", backgroundcolor="white")
        for bar in given:
            y, colour = places[bar.shape, bar.op], style(bar.op, ops)[0]
            axes.plot([line[0], bar.value], [y, y], color=colour, linewidth=7, solid_capstyle="butt")
            number_at = max(bar.value, line[0])
            if bar.must is not None and number_at * 0.98 < bar.must < number_at * width_of_number:
                number_at = bar.must  # behind the tick, which the number would hide
            axes.annotate(
                f"{bar.value:.3g}", (number_at, y), (5, 0), textcoords="offset points", va="center", fontsize=TEXT - 1
            )
            if bar.must is not None:
                axes.plot([bar.must, bar.must], [y - 0.42, y + 0.42], color="black", linewidth=2.2)
        axes.set_xlabel(unit, fontsize=TEXT)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.tick_params(axis="x", labelsize=TEXT - 1)
        axes.tick_params(axis="y", length=0, labelsize=TEXT - 1)
        axes.set_yticks([*headings.values(), *places.values()], [*headings, *(op for _, op in places)])
        for label in axes.get_yticklabels()[: len(headings)]:
            label.set_fontweight("bold")
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=TEXT + 1, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
