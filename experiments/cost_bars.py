"""What pictures of costs share: points of one experiment by setting, a bar a configuration, what colours say."""

import textwrap
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.plots import NEUTRAL, literal, reach, spread_note
from experiments.record import Record
from experiments.summary import Point, Setting, Spread, summarise

__all__ = [
    "CLEAR", "LEAKY", "SEALED", "Figured", "bars", "below", "by_setting", "finish", "leaky_or_sealed", "logarithmic",
    "megabytes", "name", "noted",
]  # fmt: skip

Figured = Callable[[Point], Spread | None]
CLEAR, LEAKY, SEALED = NEUTRAL, "#D55E00", "#0072B2"  # in the clear, leaking, nothing to read
LEAKS = 0.1  # of what an attack is after, from which on a way is drawn as leaking
CHARACTERS = 11  # of a note, an inch


def by_setting(records: Sequence[Record], experiment: str) -> dict[Setting, list[Point]]:
    """Return the points of one experiment by data set, protocol and cut; empty where there are none."""
    found: dict[Setting, list[Point]] = {}
    for point in summarise(records):
        if point.records[0].experiment == experiment:
            found.setdefault(point.setting, []).append(point)
    return found


def bars(
    axes: Axes,
    members: Sequence[Point],
    read: Figured,
    *,
    log: bool,
    named: bool,
    colour: Callable[[Point], str],
    hatched: Callable[[Point], bool],
) -> None:
    """Draw a bar a configuration, from its lowest to its highest seed, and write its mean."""
    found = [read(point) for point in members]
    some = [one.mean for one in found if one is not None and one.mean > 0]
    low, high = (min(some, default=1.0) / 3, max(some, default=1.0) * 4) if log else (0.0, 1.15)
    for place, (point, spread) in enumerate(zip(members, found, strict=True)):
        if spread is None or (log and spread.mean <= 0):
            axes.text(low * 1.1 if log else 0.01, place, "nothing crosses" if spread else "—", va="center",
                      fontsize=8, color=NEUTRAL)  # fmt: skip
            continue
        below, above = reach([spread])
        axes.barh(
            place, spread.mean - low, left=low, height=0.62, color=colour(point), alpha=0.85,
            hatch="//" if hatched(point) else None, edgecolor="white",
        )  # fmt: skip
        axes.errorbar(spread.mean, place, xerr=[below, above], color="black", linewidth=1, capsize=2)
        axes.text(spread.high * 1.06 if log else spread.high + 0.015, place, f"{spread.mean:.3g}",
                  va="center", fontsize=8)  # fmt: skip
    if log:
        logarithmic(axes)
    axes.set_xlim(low, high)
    finish(axes, members, named=named)


def finish(axes: Axes, members: Sequence[Point], *, named: bool) -> None:
    """Put a row a configuration, the first on top, under its name where ``named``."""
    axes.set_yticks(range(len(members)), [literal(name(point)) for point in members] if named else [])
    axes.set_ylim(len(members) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def logarithmic(axes: Axes) -> None:
    """Make the axis along the bars logarithmic, its figures as they are read."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def name(point: Point) -> str:
    """Return a configuration's way and strength, and below them what else tells it apart."""
    first = f"{'plain' if point.protection == 'none' else point.protection} {point.strength}".strip()
    return f"{first}\n{point.variant}" if point.variant else first


def leaky_or_sealed(point: Point, family: str) -> str:
    """Return the colour of a way that is to hide something: orange where an attack of the family gets at it."""
    leaked = point.leakage(family)
    return LEAKY if leaked is not None and leaked.mean > LEAKS else SEALED


def megabytes(point: Point) -> Spread | None:
    """Return the bytes of an epoch; None for a way that trains in the clear and answers protected."""
    if point.seconds("epoch") is None:
        return None
    return Spread.of(
        sum(sum(kinds.values()) for kinds in record.nbytes.values()) / record.config["training"]["epochs"] / 1e6
        for record in point.records
    )


def noted(figure: Figure, note: str, points: Sequence[Point]) -> None:
    """Write a note below the figure, and what its bars reach over."""
    below(figure, f"{note} {spread_note(max(len(point.seeds) for point in points))}")


def below(figure: Figure, note: str) -> None:
    """Write a note below the figure, in lines as wide as it is."""
    lines = textwrap.wrap(note, width=round(CHARACTERS * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=8.5, color=NEUTRAL)
