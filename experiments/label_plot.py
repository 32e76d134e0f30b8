"""The picture of label leakage: what each attack gets in each epoch, a panel a protection, utility in its title."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.cost_bars import by_setting, noted
from experiments.figures import number
from experiments.label_leakage import EPOCHS
from experiments.plots import COLOURS, MARKERS, literal, reach, written
from experiments.record import Record
from experiments.summary import Point, Spread
from experiments.tables import Table

__all__ = ["label_table", "labels"]

EXPERIMENT = "label_leakage"
COLUMNS = 6


def labels(records: Sequence[Record], path: Path) -> Path | None:
    """Draw leakage by epoch, rows of panels a setting; None, and no file, where no labels were attacked so."""
    settings = by_setting(records, EXPERIMENT)
    if not settings:
        path.unlink(missing_ok=True)
        return None
    rows = sum(math.ceil(len(members) / COLUMNS) for members in settings.values())
    figure = Figure(figsize=(2.9 * COLUMNS + 1.4, 2.6 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True)
    points = [point for members in settings.values() for point in members]
    names = sorted({name for point in points for name in point.attacks})
    row = 0
    for setting, members in settings.items():
        panels = [axes for line in grid[row : row + math.ceil(len(members) / COLUMNS)] for axes in line]
        for axes in panels[len(members) :]:
            axes.set_visible(False)
        for axes, point in zip(panels, members, strict=False):
            _panel(axes, point, names)
        panels[0].set_ylabel(literal(setting.title).replace(" · ", "\n"), fontsize=8.5)
        row += math.ceil(len(members) / COLUMNS)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(
        [handles[name] for name in names if name in handles], [literal(name) for name in names if name in handles],
        loc="outside right upper", frameon=False, fontsize=9,
    )  # fmt: skip
    figure.suptitle("What gradients and activations tell of labels, epoch by epoch", fontsize=14, fontweight="bold")
    note = (
        "Leakage: the attack's advantage over who saw nothing, by accuracy or, for scores, by the area under the curve "
        "within each batch; 0 is chance, 1 is every label. Titles: protection, and what the model itself is worth."
    )
    noted(figure, note, points)
    return written(figure, path)


def label_table(points: Sequence[Point]) -> Table | None:
    """Return a row for each attack on each configuration: what it got at each epoch, beside utility."""
    attacked = [point for point in points if point.records[0].experiment == EXPERIMENT]
    if not attacked:
        return None
    rows = []
    for point in attacked:
        for name in point.attacks:
            curve = _curve(point, name)
            raw = {metric: _mean(point, name, metric) for metric in ("accuracy", "leak_auc", "leak_auc_p95")}
            rows.append(
                (
                    point.setting.title, point.name, _worth(point), name,
                    ", ".join(f"{epoch:g}: {spread.mean:.2f}" for epoch, spread in curve.items()),
                    *("—" if value is None else number(value) for value in raw.values()),
                )
            )  # fmt: skip
    caption = (
        "Advantage of each attack at each epoch that was attacked, means over the seeds; and, at the epoch of its "
        "greatest advantage, accuracy, and leak AUC as mean and 95th percentile over batches."
    )
    columns = (
        "setting", "protection", "test set", "attack", "advantage by epoch", "accuracy", "leak AUC",
        "95th percentile",
    )  # fmt: skip
    return Table(caption, columns, tuple(rows), 4)


def _panel(axes: Axes, point: Point, names: Sequence[str]) -> None:
    for name in point.attacks:
        curve, look = _curve(point, name), names.index(name)
        below, above = reach(list(curve.values()))
        axes.errorbar(
            list(curve), [one.mean for one in curve.values()], yerr=[below, above], label=name, linewidth=1.4,
            color=COLOURS[look % len(COLOURS)], marker=MARKERS[look % len(MARKERS)], markersize=4,
        )  # fmt: skip
        axes.plot([], [], label=name, color=COLOURS[look % len(COLOURS)], marker=MARKERS[look % len(MARKERS)])
    axes.set_ylim(-0.05, 1.05)
    axes.set_title(f"{literal(point.name)}\n{_worth(point)}", fontsize=9)
    axes.set_xlabel("epoch", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _curve(point: Point, name: str) -> dict[float, Spread]:
    """Return an attack's advantage over the seeds at each epoch that was attacked."""
    traced = [record.traces for record in point.records if name in record.traces]
    epochs = traced[0][EPOCHS] if traced else []
    found = {epoch: Spread.of(one[name][place] for one in traced) for place, epoch in enumerate(epochs)}
    return {epoch: spread for epoch, spread in found.items() if spread is not None}


def _mean(point: Point, name: str, metric: str) -> float | None:
    spread = Spread.of(leak.metrics[metric] for leak in point.leaks(name) if metric in leak.metrics)
    return None if spread is None else spread.mean


def _worth(point: Point) -> str:
    """Return the model's own accuracy and AUC: where one class is rare, accuracy says little."""
    found = {metric: point.utility(metric) for metric in ("accuracy", "auc")}
    names = {"accuracy": "accuracy", "auc": "AUC"}
    return ", ".join(f"{names[metric]} {number(one.mean)}" for metric, one in found.items() if one is not None)
