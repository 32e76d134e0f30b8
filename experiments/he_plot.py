"""The picture of he_overhead: accuracy, seconds and bytes an epoch of each way to train, and what the noise costs."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.cost_bars import (
    CLEAR,
    SEALED,
    Figured,
    bars,
    by_setting,
    leaky_or_sealed,
    logarithmic,
    megabytes,
    noted,
)
from experiments.plots import NEUTRAL, literal, reach, written
from experiments.record import Record
from experiments.summary import Point

__all__ = ["he_costs"]


def he_costs(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what each way of training through an encrypted layer costs, and return the PNG's path.

    A column of panels a data set and cut. None, and the file removed, where no trial is of ``he_overhead``.
    """
    settings = by_setting(records, "he_overhead")
    if not settings:
        path.unlink(missing_ok=True)
        return None
    points = [point for members in settings.values() for point in members]
    longest = max(map(len, settings.values()))
    noised = any(_noised(point) for point in points)
    panels: list[tuple[str, Figured, bool]] = [
        ("accuracy", lambda point: point.utility("accuracy"), False),
        ("seconds an epoch", lambda point: point.seconds("epoch"), True),
        ("megabytes an epoch, both ways", megabytes, True),
    ]
    rows = len(settings) * (2 if noised else 1)
    heights = ([0.34 * longest + 1.0, 3.0] if noised else [0.34 * longest + 1.0]) * len(settings)
    figure = Figure(figsize=(13.5, sum(heights) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, len(panels), height_ratios=heights)
    for number, (setting, members) in enumerate(settings.items()):
        first = number * (2 if noised else 1)
        for column, (title, read, log) in enumerate(panels):
            axes = figure.add_subplot(grid[first, column])
            bars(axes, members, read, log=log, named=column == 0, colour=_colour, hatched=_unnoised)
            axes.set_xlabel(title)
            if column == 1:
                axes.set_title(literal(setting.title), fontsize=10.5)
        if noised:
            _noise(figure.add_subplot(grid[first + 1, :]), members)
    figure.suptitle("What encryption on the cut costs", fontsize=14, fontweight="bold")
    note = (
        "Grey: in the clear. Orange: the server reads labels. Blue: nothing but ciphertexts and noised steps crosses. "
        "Hatched: noise off, for comparison: its true steps cross."
    )
    noted(figure, note, points)
    return written(figure, path)


def _noise(axes: Axes, members: Sequence[Point]) -> None:
    """Draw accuracy against ε, encrypted and in the clear: the same noise, and so the same cost."""
    looks = {"plain_dp": (CLEAR, "s", "--"), "he_u_dp": (SEALED, "o", "-")}
    for way, (colour, marker, dashes) in looks.items():
        mine = sorted((p for p in members if p.protection == way and _noised(p)), key=_epsilon)
        if mine:
            accuracy = [spread for point in mine if (spread := point.utility("accuracy")) is not None]
            axes.errorbar([_epsilon(point) for point in mine], [one.mean for one in accuracy], yerr=reach(accuracy),
                          color=colour, marker=marker, linestyle=dashes, capsize=3, label=way)  # fmt: skip
    for point in members:
        bare = point.utility("accuracy")
        if point.protection == "none" and bare is not None:
            axes.axhline(bare.mean, color=NEUTRAL, linewidth=1.2, linestyle=(0, (1, 2)), label="no noise, in the clear")
    logarithmic(axes)
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xticks(sorted({_epsilon(point) for point in members if _noised(point)}))
    axes.set_xlabel("ε of the noised step, add or remove one sample")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left")


def _colour(point: Point) -> str:
    if point.protection in ("none", "plain_dp") or _unnoised(point):
        return CLEAR
    return leaky_or_sealed(point, "label")


def _unnoised(point: Point) -> bool:
    return point.protection == "he_u_dp" and not _noised(point)


def _noised(point: Point) -> bool:
    return isfinite(_epsilon(point))


def _epsilon(point: Point) -> float:
    asked = point.records[0].config["epsilon"]
    return float("inf") if asked == "none" else float(asked)
