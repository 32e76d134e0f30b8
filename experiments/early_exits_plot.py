"""Picture and table of early exits: what accuracy is left, by how many samples leave at the edge."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.early_exits import SWEEP
from experiments.figures import number, spread
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise
from experiments.tables import Table

__all__ = ["early_exits", "exits_table"]

EXPERIMENT = "early_exits"
COLUMNS = 3
FIGURES = {  # of the table: heading, utility metric
    "accuracy": "accuracy",
    "lost to split": "accuracy_lost",
    "edge alone": "accuracy_edge",
    "leave": "share_left",
    "ops, edge": "edge_flops_share",
    "ops, all": "flops_share",
    "bytes": "sample_bytes",
}


def early_exits(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy against the share that leaves, a panel a cut, a line a rule; None, and no file, without any."""
    points = [point for point in _points(summarise(records)) if _curves(point)]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in points))
    columns = min(COLUMNS, len(settings))
    lines = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(1.6 + 4.2 * columns, 1.8 + 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(settings):
            axes.set_visible(False)
            continue
        _panel(axes, [point for point in points if point.setting == settings[place]])
        axes.set_title(literal(settings[place].title), fontsize=9.5)
        axes.set_xlabel("share of samples that leave at the edge")
        axes.set_ylabel("accuracy")
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", frameon=False, fontsize=8.5, ncols=3,
        title="How much a device can answer itself", title_fontproperties={"weight": "bold"},
    )  # fmt: skip
    note = (
        "Lines sweep all thresholds on the test set, means over the seeds, thin ones a seed; a mark is what the "
        "threshold that was calibrated on held-out samples came to, a seed. Left end: split; right end: edge alone."
    )
    below(figure, note)
    return written(figure, path)


def exits_table(points: Sequence[Point], *, brief: bool = False) -> Table | None:
    """Return a row a cut and rule: accuracy, what leaves, work and bytes of a sample, leakage; None without any.

    ``brief`` leaves out the spread over seeds, for which a terminal has no room.
    """
    found = _points(points)
    if not found:
        return None
    families = dict.fromkeys(leak.family for point in found for record in point.records for leak in record.leakage)
    show = _mean if brief else spread
    rows = []
    for point in found:
        cells = [show(point.utility(metric)) for metric in FIGURES.values()]
        cells += [show(point.leakage(family)) for family in families]
        rows.append((point.setting.title, _name(point), str(len(point.seeds)), *cells))
    caption = (
        f"Means over seeds{'' if brief else ', with the lowest and the highest'}. Operations (ops), as shares of the "
        "whole model's, and bytes are a test sample's, on average. Reconstruction leakage is of samples that cross, "
        "label leakage what is told by which ones do."
    )
    leaks = [f"{family} leakage" for family in families]
    return Table(caption, ("setting", "rule", "seeds", *FIGURES, *leaks), tuple(rows), 2)


def _points(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.records[0].experiment == EXPERIMENT]


def _curves(point: Point) -> list[list[float]]:
    return [record.traces[SWEEP] for record in point.records if SWEEP in record.traces]


def _mean(found: Spread | None) -> str:
    return "—" if found is None else number(found.mean)


def _name(point: Point) -> str:
    """Return the rule and the loss that it may cost, or that all cross."""
    first = f"{point.protection} {point.strength}" if point.protected else "split"
    return f"{first} ({point.variant})" if point.variant else first


def _panel(axes: Axes, members: Sequence[Point]) -> None:
    for place, point in enumerate(members):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        curves = _curves(point)
        shares = [percent / 100 for percent in range(len(curves[0]))]
        for curve in curves:
            axes.plot(shares, curve, color=colour, linewidth=0.6, alpha=0.35)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(shares, mean, color=colour, linewidth=1.8, label=f"{_name(point)}: any threshold")
        axes.scatter(
            [record.utility["share_left"] for record in point.records],
            [record.utility["accuracy"] for record in point.records],
            s=46, color=colour, marker=marker, edgecolors="black", linewidths=0.8, zorder=4,
            label=f"{_name(point)}: calibrated",
        )  # fmt: skip
    split = [record.utility["accuracy_split"] for point in members for record in point.records]
    axes.axhline(sum(split) / len(split), color=NEUTRAL, linewidth=1.0, linestyle="--", label="split")
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
