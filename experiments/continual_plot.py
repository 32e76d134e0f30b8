"""Picture of what is forgotten: the accuracy on each task as further ones come, a panel a method."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.continual import TASK_METHODS, TRAINED
from experiments.cost_bars import below
from experiments.figures import number
from experiments.plots import COLOURS, MARKERS, literal, written
from experiments.record import Record
from experiments.store import strength_order
from experiments.summary import Point, Setting, summarise

__all__ = ["continual"]

EXPERIMENT = "continual"
TRACE = "accuracy on task "


def continual(records: Sequence[Record], path: Path) -> Path | None:
    """Draw the accuracy on each task after each, a row a protocol, a panel a method, a dot a seed; None without any."""
    points = [point for point in summarise(records) if point.records[0].experiment == EXPERIMENT]
    if not points:
        path.unlink(missing_ok=True)
        return None
    points.sort(key=_order)
    settings = list(dict.fromkeys(point.setting for point in points))
    rows = {setting: [point for point in points if point.setting == setting] for setting in settings}
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.2 + 2.7 * columns, 1.4 + 2.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    for line, (setting, members) in zip(grid, rows.items(), strict=True):
        for place, axes in enumerate(line):
            if place >= len(members):
                axes.set_visible(False)
                continue
            _panel(axes, members[place], setting)
        line[0].set_ylabel("accuracy on the task")
    for axes in grid[-1]:
        axes.set_xlabel("tasks learned")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle("One task after the other: what is still known", fontsize=13, fontweight="bold")
    below(
        figure, "Lines are means over the seeds, a dot a seed, each from when its task was learned. One head for all."
    )
    return written(figure, path)


def _order(point: Point) -> tuple[object, ...]:
    """Return what sorts configurations: protocols and methods as they are listed, the weakest first."""
    method = point.records[0].config["method"]
    places = list(TRAINED).index(point.setting.protocol), list(TASK_METHODS).index(method)
    return (point.setting.data, *places, strength_order(point.strength))


def _panel(axes: Axes, point: Point, setting: Setting) -> None:
    tasks = sum(name.startswith(TRACE) for name in point.records[0].traces)
    for task in range(tasks):
        colour, marker = COLOURS[task % len(COLOURS)], MARKERS[task % len(MARKERS)]
        seeds = [record.traces[f"{TRACE}{task + 1}"][task:] for record in point.records]
        steps = range(task + 1, tasks + 1)
        mean = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
        axes.plot(steps, mean, linewidth=1.6, markersize=5, color=colour, marker=marker, label=f"task {task + 1}")
        for values in seeds:
            axes.scatter(steps, values, s=9, alpha=0.5, linewidths=0, color=colour, marker=marker)
    metrics = {"accuracy": "accuracy", "learned": "accuracy_learned", "forgetting": "forgetting"}
    told = {name: point.utility(metric) for name, metric in metrics.items()}
    figures = [f"{name} {number(found.mean)}" for name, found in told.items() if found is not None]
    name = point.name if point.protected else f"naive{f' ({point.variant})' if point.variant else ''}"
    title = f"{name} · {setting.protocol}"
    axes.set_title(literal(f"{title}\n{', '.join(figures)}"), fontsize=9)
    axes.set_xticks(range(1, tasks + 1))
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
