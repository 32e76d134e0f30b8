"""Picture of a plan: what each candidate costs, leaks and loses, which one was chosen, and the bounds."""

from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.labels import Label, write_labels
from experiments.planner import Bounds, Candidate, Found, of_cost
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, reach, written
from splitlearn.cost import Cost

__all__ = ["UNITS", "plan_picture"]

UNITS = {
    "seconds": ("milliseconds a sample", 1e3),
    "joules": ("millijoules a sample", 1e3),
    "nbytes": ("bytes a sample", 1),
}
WHOLE = "not split"
LARGEST, SHRINKING = 110.0, 0.55  # area of the first compression's marks, in square points, and of the next ones
WIDE = 10  # times the least cost, from which on the axis is logarithmic
LOSSES = (-5, 0, 1, 2, 5, 10, 20, 50, 100)


def plan_picture(found: Found, costs: Mapping[Candidate, Cost], bounds: Bounds, against: str, path: Path) -> Path:
    """Draw leakage and points of accuracy lost against a cost (``against``: seconds, joules or nbytes); return the PNG.

    Hollow marks are glimpses, full ones are measured, the star is the plan.
    """
    figure = Figure(figsize=(12.4, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True)
    seen = [one for one in costs if one in found.glimpses]
    places = list(dict.fromkeys(one.place or WHOLE for one in seen))
    colours = {place: NEUTRAL if place == WHOLE else COLOURS[n % len(COLOURS)] for n, place in enumerate(places)}
    packs = list(dict.fromkeys(one.compression for one in seen))
    sizes = {name: LARGEST * SHRINKING**n for n, name in enumerate(packs)}
    shields = list(dict.fromkeys(one.protection for one in seen))
    markers = {name: MARKERS[n % len(MARKERS)] for n, name in enumerate(shields)}
    word, scale = UNITS[against]
    cost = {one: scale * of_cost(costs[one], against) for one in seen}
    cost |= {one.candidate: scale * of_cost(one.cost, against) for one in found.measured}
    labels: dict[Axes, list[Label]] = {left: [], right: []}
    for axes, what, limit in ((left, "leakage", bounds.leakage), (right, "loss", bounds.loss)):
        for one in seen:
            axes.scatter(
                cost[one], getattr(found.glimpses[one], what), s=sizes[one.compression], marker=markers[one.protection],
                facecolors="none", edgecolors=colours[one.place or WHOLE], linewidths=1.0, alpha=0.55, zorder=2,
            )  # fmt: skip
        for done in found.measured:
            one, value = done.candidate, getattr(done, what)
            axes.errorbar(
                cost[one], value.mean, yerr=reach([value]), color=colours[one.place or WHOLE],
                marker=markers[one.protection], markersize=sizes[one.compression] ** 0.5, markeredgecolor="white",
                elinewidth=1.0, zorder=4,
            )  # fmt: skip
        if found.best is not None:
            x, value = cost[found.best.candidate], getattr(found.best, what).mean
            axes.scatter(x, value, s=330, marker="*", facecolors="#F0E442", edgecolors="black", zorder=3)
            labels[axes] = [Label(literal(found.best.candidate.name), (x, value), "black")]
        if isfinite(limit):
            axes.axhline(limit, color=NEUTRAL, linestyle=(0, (4, 2)), linewidth=1.1)
        spent = getattr(bounds, against)
        if spent < inf:
            axes.axvline(scale * spent, color=NEUTRAL, linestyle=(0, (4, 2)), linewidth=1.1)
        if cost and max(cost.values()) > WIDE * min(cost.values()) > 0:
            axes.set_xscale("log")
        axes.set_xlabel(word)
        axes.grid(color="#E6E6E6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("leakage (worst attack's advantage)")
    left.set_ylim(-0.05, 1.08)
    right.set_ylabel("points of accuracy lost")
    right.set_yscale("symlog", linthresh=5)
    right.set_yticks(LOSSES, [str(one) for one in LOSSES])
    _legend(figure, left, colours, markers, sizes)
    below(
        figure,
        "Full marks: measured, bars from the lowest to the highest seed; hollow: a glimpse (short training, small "
        "attack); star: the plan; broken lines: the bounds. What lies beyond the bounds of cost is not shown.",
    )
    figure.draw_without_rendering()
    for axes, own in labels.items():
        write_labels(axes, own, segments=[])
    return written(figure, path)


def _legend(
    figure: Figure, axes: Axes, colours: Mapping[str, str], markers: Mapping[str, str], sizes: Mapping[str, float]
) -> None:
    handles = [axes.scatter([], [], color=colour, marker="o", s=45) for colour in colours.values()]
    handles += [
        axes.scatter([], [], edgecolors=NEUTRAL, facecolors="none", marker=one, s=45) for one in markers.values()
    ]
    handles += [axes.scatter([], [], color=NEUTRAL, marker="o", s=size) for size in sizes.values()]
    names = [place if place == WHOLE else f"after {place}" for place in colours]
    names += ["no protection" if name == "none" else name for name in markers]
    names += ["float32" if name == "none" else name for name in sizes]
    figure.legend(
        handles, [literal(name) for name in names], loc="outside upper left", ncols=max(4, len(colours)), frameon=False,
        fontsize=8.5, title="Where to cut, what to compress, what leaks", title_fontproperties={"weight": "bold"},
    )  # fmt: skip
