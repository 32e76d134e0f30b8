"""Picture and table of compressions: accuracy and leakage against how many bits an entry takes on the wire."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.figures import count, number, spread
from experiments.labels import Label, write_labels
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, reach, spread_note, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise
from experiments.tables import Table

__all__ = ["compression_curves", "compression_table"]

EXPERIMENT = "compression"
RATE = "bits_per_entry"
Mark = tuple[Point, Spread, Spread]  # its rate and its height
Looks = dict[str, tuple[str, str]]  # colour and marker of a family


def compression_table(points: Sequence[Point]) -> Table | None:
    """Return a row a compression: its rate, what it costs in accuracy, what leaks; None without any."""
    found = [point for point in points if point.records[0].experiment == EXPERIMENT and point.utility(RATE)]
    if not found:
        return None
    found.sort(key=lambda point: (point.setting, -point.utility(RATE).mean))  # type: ignore[union-attr]
    settings = list(dict.fromkeys(point.setting.title for point in found))
    rows = []
    for point in found:
        same = (other for other in found if other.setting == point.setting and not other.protected)
        bare = next(iter(same), None)
        cells = {
            "compression": _name(point),
            **({"setting": point.setting.title} if len(settings) > 1 else {}),
            "seeds": str(len(point.seeds)),
            "bits an entry": _shown(point.utility(RATE)),
            "times smaller": _shown(point.utility("times_smaller")),
            "accuracy": spread(point.utility("accuracy")) if point.utility("accuracy") else "—",
            "points lost": _lost(point, bare),
            "leakage": spread(point.worst) if point.worst else "—",
            "bytes in all": "—" if (total := point.nbytes()) is None else count(total.mean),
        }
        rows.append(tuple(cells.values()))
    caption = (f"{settings[0]}. " if len(settings) == 1 else "") + (
        "Means over the seeds. The rate is that of a real frame of 64 test activations, headers and tables included, "
        "beside the plain stage's activation in float32 (of updates, that of all that crossed); points of accuracy "
        "lost are against no compression, seed by seed, with the lowest and the highest. Bytes in all are those of the "
        "whole training, gradients packed too. "
        "Leakage: the worst attack's advantage, by an attacker who knows the codec."
    )
    return Table(caption, tuple(cells), tuple(rows), 1 + (len(settings) > 1))


def compression_curves(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy and leakage against bits an entry, a line a family of compressions; None without any."""
    points = [p for p in summarise(records) if p.records[0].experiment == EXPERIMENT and p.utility(RATE)]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in points))
    attacked = any(point.worst for point in points)
    columns = 2 if attacked else 1
    figure = Figure(figsize=(1.0 + 5.2 * columns, 1.4 + 4.2 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(settings), columns, squeeze=False, sharex=True)
    families = list(dict.fromkeys(_family(point) for point in points if point.protected))
    looks = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(families)}
    drawn: list[tuple[Axes, list[Mark]]] = []
    for setting, line in zip(settings, grid, strict=True):
        own = [point for point in points if point.setting == setting]
        for axes, (what, of) in zip(line, (("accuracy", _accuracy), ("leakage", _worst)), strict=False):
            marks = [(point, rate, value) for point in own if (rate := point.utility(RATE)) and (value := of(point))]
            _panel(axes, marks, looks)
            drawn.append((axes, marks))
            axes.set_ylabel(what if what == "accuracy" else "leakage (worst attack's advantage)")
            axes.set_title(literal(setting.title), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("bits an entry on the wire, headers and tables included")
    handles = {text: one for axes in grid.flat for one, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        frameon=False,
        fontsize=8.5,
        ncols=6,
        title="What compression at the cut saves, costs and hides",
        title_fontproperties={"weight": "bold"},
    )
    below(figure, spread_note(max(len(point.seeds) for point in points)))
    figure.draw_without_rendering()
    for axes, marks in drawn:
        _write(axes, marks, looks)
    return written(figure, path)


def _panel(axes: Axes, marks: Sequence[Mark], looks: Looks) -> None:
    for point, _, value in marks:
        if not point.protected:
            axes.axhline(value.mean, color=NEUTRAL, linewidth=1.2, linestyle=(0, (4, 2)), label="float32, 32 bits")
    for family, (colour, marker) in looks.items():
        mine = sorted((one for one in marks if _family(one[0]) == family and one[0].protected), key=lambda m: m[1].mean)
        if not mine:
            continue
        axes.errorbar(
            [rate.mean for _, rate, _ in mine], [value.mean for _, _, value in mine],
            yerr=reach([value for _, _, value in mine]), color=colour, marker=marker, markersize=7,
            markeredgecolor="white", linewidth=0.9, elinewidth=1.0, label=literal(family), zorder=3,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)


def _write(axes: Axes, marks: Sequence[Mark], looks: Looks) -> None:
    labels = [
        Label(literal(p.strength), (rate.mean, value.mean), looks[_family(p)][0])
        for p, rate, value in marks
        if p.protected
    ]
    write_labels(axes, labels, segments=[])


def _family(point: Point) -> str:
    """Return what a strength is one of: int4 and int8 of int; a fraction alone is top-k's."""
    names = [found[0] if (found := re.match(r"[a-z]+", part)) else "top-k" for part in point.strength.split("+")]
    return "+".join(names)


def _name(point: Point) -> str:
    name = point.strength if point.protected else "float32"
    return f"top-k {name}" if re.fullmatch(r"[\d.]+", name) else name


def _accuracy(point: Point) -> Spread | None:
    return point.utility("accuracy")


def _worst(point: Point) -> Spread | None:
    return point.worst


def _lost(point: Point, bare: Point | None) -> str:
    if bare is None or bare is point:
        return "—"
    before = {record.seed: record.utility["accuracy"] for record in bare.records}
    lost = Spread.of(
        100 * (before[record.seed] - record.utility["accuracy"]) for record in point.records if record.seed in before
    )
    if lost is None:
        return "—"
    return f"{lost.mean:.2f}" + (f" ({lost.low:.2f} to {lost.high:.2f})" if lost.n > 1 else "")


def _shown(found: Spread | None) -> str:
    return "—" if found is None else number(found.mean)
