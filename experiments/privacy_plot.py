"""The picture of privacy_utility: accuracy, error of reconstruction, leakage of labels and the audit, all against ε."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.plots import NEUTRAL, Style, literal, reach, spread_note, styles, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise

__all__ = ["privacy"]

Figured = Callable[[Point], Spread | None]
Panel = Callable[[Axes, Sequence[Point], Mapping[str, Style]], None]
REACH = 6.0  # how far below the least claim the axis of ε goes, for what audits showed
ROOM = 1.35  # of the error of an attacker who saw nothing: how far the axis of errors goes
FLOOR = 0.08  # ε̂ below this is drawn there


def privacy(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what each ε costs and holds back, and return the PNG's path.

    None, and the file removed, where no trial claims a finite ε.
    """
    points = [point for point in summarise(records) if point.records[0].experiment == "privacy_utility"]
    claimed = [point for point in points if (found := point.claimed("epsilon")) and isfinite(found.mean)]
    if not claimed:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in claimed))
    labels = any(_label(point) for point in claimed)
    panels: list[tuple[str, Panel]] = [
        ("accuracy", _accuracy),
        ("error of reconstruction\n(MSE, best attack)", _error),
        *([("leakage of labels\n(advantage)", _labels)] if labels else []),
        ("audit: lower bound on ε\n(99.9 % each, mean of seeds)", _audit),
    ]
    # One setting fills a square of panels, several have a column each.
    columns = 2 if len(settings) == 1 else len(settings)
    rows = -(-len(panels) // 2) if len(settings) == 1 else len(panels)
    figure = Figure(figsize=(6.2 * columns + 0.4, 3.3 * rows + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    look = styles(points)
    for number, setting in enumerate(settings):
        own = list(grid.flat) if len(settings) == 1 else list(grid[:, number])
        members = [point for point in points if point.setting == setting]
        asked = sorted({float(point.strength) for point in members if point in claimed})
        claims = [point.claimed("epsilon").mean for point in members if point in claimed]  # type: ignore[union-attr]
        for axes, (title, draw) in zip(own, panels, strict=False):
            _epsilon_axis(axes, claims, asked)
            draw(axes, members, look)
            axes.set_ylabel(title)
        for axes in own[len(panels) :]:
            axes.set_visible(False)
        own[0].set_title(literal(setting.title), fontsize=10.5)
    figure.suptitle("What an ε buys, and what can be shown of it", fontsize=14, fontweight="bold")
    delta = claimed[0].records[0].delta
    note = (
        f"ε as claimed at δ = {delta:g}, each to the neighbour that its mechanism is proved for: it bounds what its "
        f"own mechanism covers, and nothing else that crosses. {spread_note(max(len(point.seeds) for point in points))}"
    )
    _legend(figure, "\n".join(textwrap.wrap(note, width=96 * columns)))
    return written(figure, path)


def _epsilon_axis(axes: Axes, claims: Sequence[float], asked: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(asked)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(claims) / REACH, max(claims) * 1.3)
    axes.set_xlabel("ε")
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _accuracy(axes: Axes, members: Sequence[Point], look: Mapping[str, Style]) -> None:
    _lines(axes, members, look, lambda point: point.utility("accuracy"))
    for point in members:  # from what an audit showed to what is claimed: the truth is in between
        accuracy, claim, lower = point.utility("accuracy"), point.claimed("epsilon"), point.claimed("epsilon_lower")
        if accuracy and claim and lower:
            style, low = look[point.protection], max(lower.mean, FLOOR)
            axes.plot([low, claim.mean], [accuracy.mean] * 2, color=style.colour, linewidth=1.2, alpha=0.45, zorder=2)
            axes.plot([low], [accuracy.mean], color=style.colour, marker="|", markersize=9, alpha=0.7, zorder=2)
    _level(axes, members, lambda point: point.utility("accuracy"), "unprotected")
    public = Spread.of(record.utility["accuracy_public"] for point in members for record in point.records)
    if public is not None:
        axes.axhline(public.mean, color=NEUTRAL, linewidth=1.2, linestyle=(0, (1, 2)), label="public samples alone")
    axes.plot([], [], color=NEUTRAL, marker="|", markersize=9, label="audited ε̂ to claimed ε")
    axes.set_ylim(-0.03, 1.03)


def _error(axes: Axes, members: Sequence[Point], look: Mapping[str, Style]) -> None:
    _lines(axes, members, look, _mse)
    least = float("inf")
    for protection, points in _by_protection(members).items():
        pairs = [(c.mean, b.mean) for p in points if (c := p.claimed("epsilon")) and (b := p.claimed("mse_bound"))]
        if pairs:
            least = min(least, *(bound for _, bound in pairs))
            x, y = zip(*sorted(pairs), strict=True)
            axes.plot(x, y, color=look[protection].colour, linewidth=1.0, linestyle=(0, (4, 2)), alpha=0.8, zorder=2)
    _level(axes, members, _mse, "unprotected")
    blind = Spread.of(
        leak.baselines["mse_mean_image"]
        for point in members
        for record in point.records
        for leak in record.leakage
        if "mse_mean_image" in leak.baselines
    )
    if blind is not None:
        axes.axhline(blind.mean, color=NEUTRAL, linewidth=1.2, linestyle=(0, (3, 1, 1, 1)), label="saw nothing")
        axes.set_ylim(0, ROOM * blind.mean)
        if ROOM * blind.mean < least < float("inf"):
            axes.text(
                0.01, 0.9, f"dFIL: an unbiased attacker errs by {least:.2g} at least; these know what inputs look like",
                transform=axes.transAxes, fontsize=8.5, color=NEUTRAL,
            )  # fmt: skip


def _labels(axes: Axes, members: Sequence[Point], look: Mapping[str, Style]) -> None:
    _lines(axes, members, look, _label)
    axes.set_ylim(-0.05, 1.05)
    axes.text(
        0.01, 0.55, "where a mechanism protects labels; all others send them as they are", transform=axes.transAxes,
        fontsize=8.5, color=NEUTRAL,
    )  # fmt: skip


def _audit(axes: Axes, members: Sequence[Point], look: Mapping[str, Style]) -> None:
    _lines(axes, members, look, lambda point: _floored(point.claimed("epsilon_lower")))
    for point in members:  # nothing shown: on the edge of the axis, and hollow
        claim, lower = point.claimed("epsilon"), point.claimed("epsilon_lower")
        if claim and lower and lower.mean <= FLOOR:
            style = look[point.protection]
            axes.plot(
                [claim.mean], [FLOOR], marker=style.marker, markersize=7, markerfacecolor="white",
                markeredgecolor=style.colour, linestyle="none", zorder=5,
            )  # fmt: skip
    axes.text(
        0.01, 0.83, "noise alone, by paired worlds; dpsgd: one run with canaries; hollow: nothing shown",
        transform=axes.transAxes, fontsize=8, color=NEUTRAL,
    )  # fmt: skip
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color=NEUTRAL, linewidth=1.2, zorder=1)
    axes.fill_between([low, high], [low, high], [10 * high] * 2, color="#A8321A", alpha=0.1, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * 0.8, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.text(
        0.01, 0.9, "in here a claim is refuted", transform=axes.transAxes, fontsize=8.5, color="#A8321A"
    )  # fmt: skip


def _lines(axes: Axes, members: Sequence[Point], look: Mapping[str, Style], figure: Figured) -> None:
    """Draw a figure of each mechanism against ε, a line a mechanism, with bars over the seeds."""
    for protection, points in _by_protection(members).items():
        found = [(c.mean, value) for p in points if (c := p.claimed("epsilon")) and (value := figure(p)) is not None]
        if not found:
            continue
        style = look[protection]
        x, spreads = zip(*sorted(found, key=lambda pair: pair[0]), strict=True)
        axes.errorbar(
            x, [spread.mean for spread in spreads], yerr=reach(spreads), color=style.colour, marker=style.marker,
            markersize=7, markeredgecolor="white", markeredgewidth=0.8, linewidth=1.2, elinewidth=1.0, zorder=4,
            label=literal(style.label),
        )  # fmt: skip


def _level(axes: Axes, members: Sequence[Point], figure: Figured, label: str) -> None:
    """Draw the unprotected figure as a level: its ε is infinite, and has no place on the axis."""
    for point in members:
        if not point.protected and (found := figure(point)) is not None:
            axes.axhline(found.mean, color=NEUTRAL, linewidth=1.4, linestyle="--", label=label, zorder=1)
            return


def _by_protection(members: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in members:
        if point.protected:
            found.setdefault(point.protection, []).append(point)
    return found


def _mse(point: Point) -> Spread | None:
    return Spread.of(
        min(errors)
        for record in point.records
        if (errors := [leak.metrics["mse"] for leak in record.leakage if leak.family == "reconstruction"])
    )


def _label(point: Point) -> Spread | None:
    return Spread.of(leak.advantage for r in point.records for leak in r.leakage if leak.family == "label")


def _floored(found: Spread | None) -> Spread | None:
    if found is None:
        return None
    low, mean, high = (max(value, FLOOR) for value in (found.low, found.mean, found.high))
    return Spread(mean, found.std, low, high, found.n)


def _legend(figure: Figure, note: str) -> None:
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    legend = figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=5, frameon=False, title=note
    )
    legend.get_title().set(fontsize=8.5, color=NEUTRAL)
