"""The two pictures of a run: leakage against utility, and what an attacker reconstructed."""

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.gallery import gallery, strip
from experiments.labels import Label, write_labels
from experiments.record import Record
from experiments.store import Store, write_atomically
from experiments.summary import Mark, Point, Spread, marks, pareto_front, summarise, utility_metric

__all__ = [
    "NEUTRAL", "Style", "leakage_note", "literal", "reach", "reconstructions", "spread_note", "styles", "tradeoff",
    "written",
]  # fmt: skip

# Okabe and Ito's colours, told apart by most colour-blind readers; the markers tell them apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")  # plotly's names for them
NEUTRAL = "#767676"  # unprotected, baselines and the front; readable on white and on black
PANEL_COLUMNS = 3


@dataclass(frozen=True)
class Style:
    """How one protection looks in every plot."""

    label: str
    colour: str
    marker: str  # matplotlib's
    symbol: str  # plotly's


def styles(points: Iterable[Point]) -> dict[str, Style]:
    """Return the style of each protection among the points; the unprotected one is a grey star, and first."""
    points = list(points)
    found = {p.protection: Style("unprotected", NEUTRAL, "*", "star") for p in points if not p.protected}
    names = sorted({point.protection for point in points if point.protected})
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(zip(MARKERS, SYMBOLS, strict=True)), strict=False)
    for name, (colour, (marker, symbol)) in zip(names, looks, strict=False):
        found[name] = Style(name, colour, marker, symbol)
    return found


def leakage_note(points: Iterable[Point]) -> str:
    """Return what leakage is taken over: the attacks, and the attackers who saw nothing; empty where none attacked."""
    leaks = [leak for point in points for record in point.records for leak in record.leakage]
    if not leaks:
        return ""
    attacks = sorted({leak.attack for leak in leaks})
    blind = sorted({guess for leak in leaks for name in leak.baselines if (guess := _guess(name, leak.metrics))})
    beside = f" (baselines: {', '.join(blind)})" if blind else ""
    of = f"the worst of {', '.join(attacks)}" if len(attacks) > 1 else f"by {attacks[0]}"
    return f"Leakage: {of}; 0 is an attacker who saw nothing{beside}, 1 is everything."


def _guess(baseline: str, metrics: Iterable[str]) -> str:
    """Return what a baseline answers, in words: ``mse_mean_image`` is the mean image."""
    metric = next((name for name in metrics if baseline.startswith(f"{name}_")), "")
    return baseline.removeprefix(f"{metric}_").replace("_", " ") if metric else ""


def spread_note(seeds: int) -> str:
    """Return what the bars of a plot over ``seeds`` seeds show."""
    if seeds < 2:
        return "One seed only: no spread to show."
    return "Marks are means over the seeds; bars reach from the lowest seed to the highest."


def tradeoff(records: Sequence[Record], path: Path) -> Path | None:
    """Draw leakage (worst attack's advantage) against utility, a panel per setting, and return the PNG's path.

    Returns None, and removes the file, where no trial has both figures.
    """
    points = [point for point in summarise(records) if point.protects]
    metric = utility_metric(points)
    panels = marks(points, metric)
    if metric is None or not panels:
        path.unlink(missing_ok=True)
        return None
    columns = PANEL_COLUMNS if len(panels) > 4 else math.ceil(len(panels) / math.ceil(len(panels) / PANEL_COLUMNS))
    rows = math.ceil(len(panels) / columns)
    size = (9.0, 6.4) if len(panels) == 1 else (5.0 * columns + 0.6, 4.2 * rows + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    look = styles(points)
    for axes, members in itertools.zip_longest(grid.flat, panels.values()):
        if members is None:
            axes.set_visible(False)
        else:
            _panel(axes, members, metric, look)
    for axes in grid[:, 0]:
        axes.set_ylabel("leakage (worst attack's advantage)")
    seeds = max(mark.leakage.n for members in panels.values() for mark in members)
    failed = sum(record.status == "failed" for record in records)
    lines = textwrap.wrap(leakage_note(points), width=round(13 * size[0]))
    note = "\n".join([*lines, f"{spread_note(seeds)} Labels are strengths."])
    note += f" Failed trials left out: {failed}." if failed else ""
    figure.suptitle("What leaks, against what the model is worth", fontsize=14, fontweight="bold")
    _legend(figure, note)
    figure.draw_without_rendering()  # fixes the layout, in which the labels then find their places
    for axes, members in zip(grid.flat, panels.values(), strict=False):
        _label(axes, members, look)
    return written(figure, path)


def reconstructions(records: Sequence[Record], store: Store, path: Path) -> Path | None:
    """Draw private samples and, below them, what the worst attack on each configuration made of them.

    Returns None, and removes the file, where no trial kept images.
    """
    rows = [row for row in gallery(records, store) if row.worst]
    if not rows:
        path.unlink(missing_ok=True)
        return None
    pictures = [strip(row.images) for row in rows]
    width = 6.0  # inches of samples, beside 3.4 of labels
    heights = [width * picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = Figure(figsize=(width + 3.6, sum(heights) + 0.12 * len(rows) + 0.7))
    tall = figure.get_figheight()
    top, edge = tall - 0.6, 3.4 / (width + 3.6)
    for row, picture, height in zip(rows, pictures, heights, strict=True):
        top -= height
        axes = figure.add_axes((edge, top / tall, width / (width + 3.6), height / tall))
        top -= 0.12
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        first = row.setting.title if row.attack == "" else row.title
        second = f"{row.title}, seed {row.seed}" if row.attack == "" else f"{row.attack} · {row.scores}".rstrip(" ·")
        middle = (top + 0.12 + height / 2) / tall
        figure.text(
            edge - 0.012, middle + 0.003, literal(first), ha="right", va="bottom", fontsize=9.5, fontweight="bold"
        )
        figure.text(edge - 0.012, middle - 0.003, literal(second), ha="right", va="top", fontsize=8.5, color=NEUTRAL)
    title = "Private samples, and what the worst attack makes of them"
    figure.text(0.5, 1 - 0.3 / tall, title, ha="center", va="center", fontsize=13, fontweight="bold")
    return written(figure, path)


def _legend(figure: Figure, note: str) -> None:
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = math.ceil(len(entries) / 2) if len(entries) > 4 else len(entries)
    handles = list(entries.values())
    legend = figure.legend(handles, list(entries), loc="outside lower center", ncols=columns, frameon=False, title=note)
    legend.get_title().set(fontsize=8.5, color=NEUTRAL)


def _panel(axes: Axes, members: Sequence[Mark], metric: str, look: Mapping[str, Style]) -> None:
    places = [mark.place for mark in members]
    front = [places[number] for number in pareto_front(places)]
    axes.axhline(0, color=NEUTRAL, linewidth=1.2, linestyle=(0, (1, 2)), label="attacker who saw nothing")
    x, y = zip(*front, strict=True)
    # Between two marks nothing better was measured than the right one: a step, and no straight line.
    axes.step(x, y, where="pre", color=NEUTRAL, linewidth=9, alpha=0.25, zorder=1, label="Pareto front")
    for protection, style in look.items():
        mine = [mark for mark in members if mark.point.protection == protection]
        for number, line in enumerate(_lines(mine)):
            axes.errorbar(
                [mark.utility.mean for mark in line],
                [mark.leakage.mean for mark in line],
                xerr=reach([mark.utility for mark in line]),
                yerr=reach([mark.leakage for mark in line]),
                color=style.colour,
                marker=style.marker,
                markersize=20 if style.marker == "*" else 8,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linewidth=0.9,
                elinewidth=1.0,
                zorder=3 if style.marker == "*" else 4,  # what is no better than unprotected stays visible
                label=literal(style.label) if number == 0 else None,
            )
    axes.set_ylim(-0.06, 1.06)
    axes.margins(x=0.1)
    axes.set_xlabel(literal(metric.replace("_", " ")))
    seeds = {mark.leakage.n for mark in members}
    axes.set_title(literal(f"{members[0].point.setting.title} · {_range(seeds)} seeds"), fontsize=10.5)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(0.99, 0.075, "better ↘", transform=axes.transAxes, ha="right", fontsize=9, color=NEUTRAL)


def _lines(members: Sequence[Mark]) -> list[list[Mark]]:
    """Return the marks of one protection as one line of rising strength per variant."""
    variants = dict.fromkeys(mark.point.variant for mark in members)
    return [[mark for mark in members if mark.point.variant == variant] for variant in variants]


def reach(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """Return how far each bar reaches below and above its mean: to the lowest and the highest seed."""
    return [s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]


def _range(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _label(axes: Axes, members: Sequence[Mark], look: Mapping[str, Style]) -> None:
    """Write each mark's strength beside it."""
    labels, segments = [], []
    for mark in members:
        text = " ".join(part for part in (mark.point.strength, mark.point.variant) if part)
        labels.append(Label(literal(text), mark.place, look[mark.point.protection].colour))
        (x, y), utility, leakage = mark.place, mark.utility, mark.leakage
        segments += [((utility.low, y), (utility.high, y)), ((x, leakage.low), (x, leakage.high))]
    for protection in look:
        for line in _lines([mark for mark in members if mark.point.protection == protection]):
            segments += itertools.pairwise(mark.place for mark in line)
    write_labels(axes, labels, segments=segments)


def literal(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def written(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all, and return its path."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    return write_atomically(path, content.getvalue())
