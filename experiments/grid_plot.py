"""The picture of `protection_grid`: utility against each kind of leakage, and what each row costs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import Figured, bars, by_setting, megabytes, noted
from experiments.labels import Label, write_labels
from experiments.plots import NEUTRAL, Style, literal, styles, written
from experiments.record import Record
from experiments.summary import Point, Spread, pareto_front

__all__ = ["protection_grid"]

EXPERIMENT = "protection_grid"
FAMILIES = {"reconstruction": "inputs", "label": "labels", "membership": "membership"}


def protection_grid(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy against leakage of inputs, labels and membership, and bars of each row's figures and costs.

    Return the PNG's path, or None, and no file, where the experiment was not run. Only the first setting is drawn.
    """
    settings = by_setting(records, EXPERIMENT)
    if not settings:
        path.unlink(missing_ok=True)
        return None
    setting, members = next(iter(settings.items()))
    look = styles(members)
    figure = Figure(figsize=(15, 5.4 + 0.34 * len(members)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2, 1, height_ratios=[4.2, 1.2 + 0.34 * len(members)], squeeze=False)
    above, below = parts[0, 0], parts[1, 0]
    panels = above.subplots(1, len(FAMILIES), sharey=False)
    for axes, (family, what) in zip(panels, FAMILIES.items(), strict=True):
        _panel(axes, members, family, what, look)
    columns = below.subplots(1, 6)
    shown = [
        ("accuracy", lambda point: point.utility("accuracy"), False),
        *((f"leakage of {what}", _leak(family), False) for family, what in FAMILIES.items()),
        ("seconds an epoch", lambda point: point.seconds("epoch"), True),
        ("MB an epoch", megabytes, True),
    ]
    for place, (axes, (title, read, log)) in enumerate(zip(columns, shown, strict=True)):
        bars(
            axes, members, read, log=log, named=place == 0, colour=lambda point: look[point.protection].colour,
            hatched=lambda point: False,
        )  # fmt: skip
        axes.set_title(title, fontsize=10)
    figure.suptitle(
        f"What protects what, and what that costs: {literal(setting.title)}", fontsize=14, fontweight="bold"
    )
    note = (
        "Leakage: the best of the attacks that were tried on what the row's server holds (inputs, labels), or by a "
        "threshold on the loss of what users of the model are answered (membership: with some hundred samples, "
        "differences of .05 are chance); 0 is an attacker who saw nothing, 1 is everything. Grey lines are Pareto "
        "fronts: no row has both more accuracy and less leakage. Labels are strengths: of rows with an ε, that ε. "
        "Rows dp_… start from a model of public samples."
    )
    noted(figure, note, members)
    figure.draw_without_rendering()
    for axes, family in zip(panels, FAMILIES, strict=True):
        marks = [(point, mark) for point in members if (mark := _mark(point, family)) is not None]
        texts = [
            Label(literal(point.strength or point.protection), mark, look[point.protection].colour)
            for point, mark in marks
        ]
        write_labels(axes, texts, segments=[], fontsize=7.5)
    return written(figure, path)


def _panel(axes: Axes, members: Sequence[Point], family: str, what: str, look: dict[str, Style]) -> None:
    places = []
    for point in members:
        mark = _mark(point, family)
        if mark is None:
            continue
        places.append(mark)
        style = look[point.protection]
        axes.plot(*mark, style.marker, color=style.colour, markersize=9 if point.protected else 13)
    front = sorted(places[place] for place in pareto_front(places))
    axes.plot([x for x, _ in front], [y for _, y in front], color=NEUTRAL, linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("accuracy")
    axes.set_ylabel(f"leakage of {what}")
    axes.set_ylim(-0.06, 1.08)
    axes.set_xlim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(point: Point, family: str) -> tuple[float, float] | None:
    utility, leakage = point.utility("accuracy"), point.leakage(family)
    return None if utility is None or leakage is None else (utility.mean, leakage.mean)


def _leak(family: str) -> Figured:
    def read(point: Point) -> Spread | None:
        return point.leakage(family)

    return read
