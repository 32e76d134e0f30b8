"""Picture and table of controllers: what each pays over the oracle, and which arms they chose on one trace."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from experiments.controller import ARMS, SHOWN, TRACES
from experiments.cost_bars import below
from experiments.figures import number, spread
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, written
from experiments.record import Record
from experiments.summary import Point, summarise
from experiments.tables import Table

__all__ = ["controller", "controller_table"]

EXPERIMENT = "controller"
NAMES = {
    "best_fixed": "best fixed arm, in hindsight",
    "fixed": "fixed arm, of training",
    "threshold": "threshold rule",
    "q_learning": "Q-learning",
    "bandit_cold": "bandit, untrained",
    "bandit_apart": "bandit, arms apart",
    "bandit": "bandit",
    "oracle": "oracle",
}
COLUMNS = 5
LONGEST = 400  # requests of a trace that are drawn


def controller(records: Sequence[Record], path: Path) -> Path | None:
    """Draw ratios to the oracle, a panel a kind of trace, a dot a seed, and one trace with its arms; None without."""
    points = _played(summarise(records))
    if not points:
        path.unlink(missing_ok=True)
        return None
    points = points[:COLUMNS]
    figure = Figure(figsize=(2.6 + 2.2 * len(points), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.3))
    rows = [name for name in NAMES if name != "oracle"]
    panels = upper.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for axes, point in zip(panels, points, strict=True):
        _ratios(axes, point, rows)
    panels[0].set_yticks(range(len(rows)), [NAMES[row] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    upper.supxlabel("cost on held-out traces, switching included, over the oracle's", fontsize=9)
    shown = min(points[0].records, key=lambda record: record.seed)
    _trace(lower, shown)
    figure.suptitle("Does it pay to move the cut?", fontsize=13, fontweight="bold")
    below(
        figure,
        "A dot a seed, a bar their mean; 1 is the oracle, which knows the trace; the dotted line is 10 % above it. "
        f"Below: the first held-out trace of {shown.strength}, seed {shown.seed}.",
    )
    return written(figure, path)


def controller_table(points: Sequence[Point]) -> Table | None:
    """Return a row a policy: its cost over the oracle's, and its switches a trace, by kind of trace; None without."""
    points = _played(points)
    if not points:
        return None
    heads = [f"{point.strength} ({point.variant})" if point.variant else point.strength for point in points]
    rows = []
    for name, told in NAMES.items():
        cells = [told]
        for point in points:
            ratio, switches = point.utility(f"ratio_{name}"), point.utility(f"switches_{name}")
            paid = "1" if name == "oracle" else spread(ratio)
            cells.append(f"{paid}; {number(switches.mean)}" if switches is not None else paid)
        rows.append(tuple(cells))
    caption = "cost on held-out traces over the oracle's, mean (lowest to highest seed); changes of arm a trace"
    return Table(caption, ("policy", *heads), tuple(rows), heads=1, strong=frozenset({list(NAMES).index("bandit")}))


def _played(points: Sequence[Point]) -> list[Point]:
    found = [point for point in points if point.records[0].experiment == EXPERIMENT]
    return sorted(found, key=lambda point: (point.setting.data, list(TRACES).index(point.strength), point.variant))


def _ratios(axes: Axes, point: Point, rows: Sequence[str]) -> None:
    for height, name in enumerate(rows):
        found = [record.utility[f"ratio_{name}"] for record in point.records]
        colour = COLOURS[1] if name == "bandit" else COLOURS[0] if "bandit" not in name else COLOURS[4]
        axes.scatter(found, [height] * len(found), s=24, color=colour, alpha=0.85, edgecolors="white", linewidths=0.5)
        axes.vlines(sum(found) / len(found), height - 0.3, height + 0.3, color=colour, linewidth=1.6)
    axes.axvline(1.1, color=NEUTRAL, linewidth=0.9, linestyle=":")
    axes.autoscale_view()
    axes.set_xlim(left=0.99)
    axes.set_title(literal(f"{point.strength} ({point.variant})" if point.variant else point.strength), fontsize=10)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _trace(figure: FigureBase, record: Record) -> None:
    series = {name: values[:LONGEST] for name, values in record.traces.items()}
    times = series["time, s"]
    state, chosen = figure.subplots(2, 1, sharex=True)
    state.plot(times, series["up, Mbit/s"], color=COLOURS[0], linewidth=1.1)
    state.set_yscale("log")
    state.set_ylabel("up, Mbit/s", color=COLOURS[0], fontsize=9)
    load = state.twinx()
    load.plot(times, series["load"], color=COLOURS[1], linewidth=1.1)
    load.set_ylabel("load of the device", color=COLOURS[1], fontsize=9)
    load.spines["top"].set_visible(False)
    (note,) = (note for note in record.notes if note.startswith(ARMS))
    arms = note.removeprefix(ARMS).split(", ")
    for place, name in enumerate(SHOWN):
        lifted = [arm + 0.12 * (place - (len(SHOWN) - 1) / 2) for arm in series[f"arm of {name}"]]
        chosen.step(
            times, lifted, where="post", color=COLOURS[place], linewidth=1.3, label=NAMES[name], marker=MARKERS[place],
            markevery=max(1, len(times) // 12), markersize=4,
        )  # fmt: skip
    chosen.set_yticks(range(len(arms)), [literal(arm) for arm in arms])
    chosen.set_xlabel("seconds", fontsize=9)
    chosen.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(SHOWN), frameon=False, fontsize=8.5)
    for axes in (state, chosen):
        axes.tick_params(labelsize=8.5)
        axes.spines["top"].set_visible(False)
