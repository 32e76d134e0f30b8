"""The picture of he_overhead: accuracy, seconds and bytes an epoch of each way to train, and what the noise costs."""

import textwrap
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.plots import NEUTRAL, literal, reach, spread_note, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise

__all__ = ["CLEAR", "LEAKY", "SEALED", "bars", "he_costs", "megabytes"]

Figured = Callable[[Point], Spread | None]
CLEAR, LEAKY, SEALED = NEUTRAL, "#D55E00", "#0072B2"  # in the clear, leaking, nothing to read
LEAKS = 0.1  # of labels, from which on a way is drawn as leaking


def he_costs(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what each way of training through an encrypted layer costs, and return the PNG's path.

    A column of panels a data set and cut. None, and the file removed, where no trial is of ``he_overhead``.
    """
    points = [point for point in summarise(records) if point.records[0].experiment == "he_overhead"]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in points))
    longest = max(sum(point.setting == setting for point in points) for setting in settings)
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
    for number, setting in enumerate(settings):
        members = [point for point in points if point.setting == setting]
        first = number * (2 if noised else 1)
        for column, (title, read, logarithmic) in enumerate(panels):
            axes = figure.add_subplot(grid[first, column])
            bars(axes, members, read, logarithmic, named=column == 0, name=_name, colour=_colour, hatched=_unnoised)
            axes.set_xlabel(title)
            if column == 1:
                axes.set_title(literal(setting.title), fontsize=10.5)
        if noised:
            _noise(figure.add_subplot(grid[first + 1, :]), members)
    figure.suptitle("What encryption on the cut costs", fontsize=14, fontweight="bold")
    note = (
        "Grey: in the clear. Orange: the server reads labels. Blue: nothing but ciphertexts and noised steps crosses. "
        "Hatched: noise off, for comparison: its true steps cross. "
        + spread_note(max(len(point.seeds) for point in points))
    )
    figure.supxlabel("\n".join(textwrap.wrap(note, width=150)), fontsize=8.5, color=NEUTRAL)
    return written(figure, path)


def bars(
    axes: Axes,
    members: Sequence[Point],
    read: Figured,
    logarithmic: bool,
    *,
    named: bool,
    name: Callable[[Point], str],
    colour: Callable[[Point], str],
    hatched: Callable[[Point], bool] = lambda point: False,
) -> None:
    """Draw a bar a configuration, from its lowest to its highest seed, and write its mean."""
    found = [read(point) for point in members]
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    some = [one.mean for one in found if one is not None and one.mean > 0]
    low, high = (min(some, default=1.0) / 3, max(some, default=1.0) * 4) if logarithmic else (0.0, 1.15)
    for place, (point, spread) in enumerate(zip(members, found, strict=True)):
        if spread is None or (logarithmic and spread.mean <= 0):
            axes.text(low * 1.1 if logarithmic else 0.01, place, "nothing crosses" if spread else "—", va="center",
                      fontsize=8, color=NEUTRAL)  # fmt: skip
            continue
        below, above = reach([spread])
        axes.barh(
            place, spread.mean - low, left=low, height=0.62, color=colour(point), alpha=0.85,
            hatch="//" if hatched(point) else None, edgecolor="white",
        )  # fmt: skip
        axes.errorbar(spread.mean, place, xerr=[below, above], color="black", linewidth=1, capsize=2)
        axes.text(spread.high * 1.06 if logarithmic else spread.high + 0.015, place, f"{spread.mean:.3g}",
                  va="center", fontsize=8)  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(members)), [literal(name(point)) for point in members] if named else [])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


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
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xticks(sorted({_epsilon(point) for point in members if _noised(point)}))
    axes.set_xlabel("ε of the noised step, add or remove one sample")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left")


def _name(point: Point) -> str:
    return f"{'plain' if point.protection == 'none' else point.protection} {point.strength}".strip()


def _colour(point: Point) -> str:
    leaked = point.leakage("label")
    if point.protection in ("none", "plain_dp") or _unnoised(point):
        return CLEAR
    return LEAKY if leaked is not None and leaked.mean > LEAKS else SEALED


def megabytes(point: Point) -> Spread | None:
    """Return the bytes of an epoch; None for a way that trains in the clear and answers encrypted."""
    if point.seconds("epoch") is None:
        return None
    return Spread.of(
        sum(sum(kinds.values()) for kinds in record.nbytes.values()) / record.config["training"]["epochs"] / 1e6
        for record in point.records
    )


def _unnoised(point: Point) -> bool:
    return point.protection == "he_u_dp" and not _noised(point)


def _noised(point: Point) -> bool:
    return isfinite(_epsilon(point))


def _epsilon(point: Point) -> float:
    asked = point.records[0].config["epsilon"]
    return float("inf") if asked == "none" else float(asked)
