"""Picture of unlike members: how accurate each method is for all and for each member, a panel a skew."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.plots import COLOURS, literal, written
from experiments.record import Record
from experiments.skewed import KINDS, skew_of
from experiments.summary import Point, summarise
from experiments.unlike import METHODS

__all__ = ["non_iid"]

EXPERIMENT = "non_iid"
COLUMNS = 3
LOOKS = {  # colour, marker, and how far below its method's line
    "accuracy": (COLOURS[0], "o", -0.16),
    "accuracy_personal": (COLOURS[1], "s", 0.16),
}
NAMES = {
    "accuracy": "the global model, on the samples of all",
    "accuracy_personal": "members, each on a split of its own kind",
}


def non_iid(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy and personal accuracy, a panel a skew, a row a method, a dot a seed; None without any."""
    points = [point for point in summarise(records) if point.records[0].experiment == EXPERIMENT]
    if not points:
        path.unlink(missing_ok=True)
        return None
    points.sort(key=lambda point: list(METHODS).index(point.setting.protocol))
    rows = list(dict.fromkeys(_row(point) for point in points))
    panels = sorted(
        {(point.setting.data, point.strength) for point in points}, key=lambda one: (one[0], _order(one[1]))
    )
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (2.2 + 3.6 * columns, 1.7 + lines * (0.8 + 0.36 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        data, skew = panels[place]
        members = [point for point in points if (point.setting.data, point.strength) == panels[place]]
        _panel(axes, members, rows)
        several = len({data for data, _ in panels}) > 1
        axes.set_title(literal(f"{data} · {skew}" if several else skew), fontsize=10)
    grid[0, 0].set_yticks(range(len(rows)), [literal(row) for row in rows])
    grid[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", frameon=False, fontsize=8.5, ncols=2,
        title="Members that are unlike: whom does which method serve?", title_fontproperties={"weight": "bold"},
    )  # fmt: skip
    note = "A dot a seed, a bar their mean. Methods that end in no global model have no circle."
    below(figure, note)
    return written(figure, path)


def _panel(axes: Axes, points: Sequence[Point], rows: Sequence[str]) -> None:
    for point in points:
        for metric, (colour, marker, off) in LOOKS.items():
            found = [record.utility[metric] for record in point.records if metric in record.utility]
            if not found:
                continue
            height = rows.index(_row(point)) + off
            axes.scatter(
                found, [height] * len(found), s=26, color=colour, marker=marker, alpha=0.85, edgecolors="white",
                linewidths=0.5, label=NAMES[metric], zorder=3,
            )  # fmt: skip
            axes.vlines(sum(found) / len(found), height - 0.15, height + 0.15, color=colour, linewidth=1.6, zorder=2)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _order(skew: str) -> tuple[int, float]:
    """Return what sorts skews: kinds as they are listed, then the most alike first."""
    found = skew_of(skew)
    return list(KINDS).index(found.kind), found.level if found.kind == "feature" else -found.level


def _row(point: Point) -> str:
    """Return a method's line: its name, and what else tells it apart."""
    return f"{point.setting.protocol} ({point.variant})" if point.variant else point.setting.protocol
