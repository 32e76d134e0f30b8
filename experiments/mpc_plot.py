"""The picture of mpc_overhead: accuracy, seconds and bytes of each way on one cut, and where the time goes."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from experiments.he_plot import CLEAR, LEAKY, SEALED, bars, megabytes
from experiments.plots import NEUTRAL, literal, spread_note, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise
from privacy.mpc import LAN, WAN

__all__ = ["mpc_costs"]

LEAKS = 0.1  # of the activation, from which on a way is drawn as leaking
MEASURED = (("epoch", "measured on loopback", "o"), ("lan", "modelled LAN", "s"), ("wan", "modelled WAN", "^"))
PARTS = {
    "servers_linear": ("linear", "#0072B2"),
    "servers_relu": ("ReLU", "#56B4E9"),
    "servers_pool": ("pooling", "#009E73"),
    "servers_softmax": ("softmax", "#E69F00"),
    "servers_loss": ("loss", "#F0E442"),
    "servers_update": ("step", "#999999"),
    "client_share": ("sharing", "#CC79A7"),
    "client_reveal": ("revealing", "#D55E00"),
    "frames": ("frames and waiting", "#DDDDDD"),
}


def mpc_costs(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what each way of computing above the cut costs, and return the PNG's path.

    A row of panels a data set and cut. None, and the file removed, where no trial is of ``mpc_overhead``.
    """
    points = [point for point in summarise(records) if point.records[0].experiment == "mpc_overhead"]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in points))
    members = {setting: [point for point in points if point.setting == setting] for setting in settings}
    heights = [0.42 * len(own) + 1.5 for own in members.values()]
    figure = Figure(figsize=(16, sum(heights) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(settings), 4, height_ratios=heights, width_ratios=(1, 1.3, 1, 1.2))
    for row, (setting, own) in enumerate(members.items()):
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        bars(axes[0], own, lambda p: p.utility("accuracy"), False, named=True, name=_name, colour=_colour)
        _seconds(axes[1], own)
        bars(axes[2], own, _crossed, True, named=False, name=_name, colour=_colour)
        _shares(axes[3], own)
        names = ("accuracy", "seconds an epoch", "megabytes an epoch, all wires", "share of the time")
        for one, name in zip(axes, names, strict=True):
            one.set_xlabel(name)
        axes[1].set_title(literal(setting.title), fontsize=10.5)
    figure.suptitle("What computing on shares costs", fontsize=14, fontweight="bold")
    networks = ", ".join(
        f"{n.name} {1000 * n.latency:g} ms one way and {n.bandwidth / 1e6:g} Mbit/s" for n in (LAN, WAN)
    )
    note = (
        "Grey: in the clear. Blue: one server sees shares, or ciphertexts. Orange: one server reads the activations. "
        f"Networks are modelled, rounds × latency + bytes ÷ bandwidth beside what was measured: {networks}. Inference: "
        "of the whole test set. " + spread_note(max(len(point.seeds) for point in points))
    )
    figure.supxlabel("\n".join(textwrap.wrap(note, width=170)), fontsize=8.5, color=NEUTRAL)
    return written(figure, path)


def _seconds(axes: Axes, members: Sequence[Point]) -> None:
    """Draw a mark for loopback and for each modelled network."""
    for key, label, marker in MEASURED:
        found = [(place, _spent(point, key)) for place, point in enumerate(members)]
        some = [(place, value) for place, value in found if value]
        axes.scatter([v for _, v in some], [p for p, _ in some], marker=marker, s=34, zorder=3,
                     color=[_colour(members[p]) for p, _ in some])  # fmt: skip
        side = {"epoch": (-6, "right"), "wan": (6, "left")}.get(key)  # the LAN's mark lies between, mostly next to one
        for place, value in some if side else []:
            assert side is not None
            axes.annotate(f"{value:.3g}", (value, place), xytext=(side[0], 0), textcoords="offset points", ha=side[1],
                          va="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(members)), [])
    axes.set_ylim(len(members) - 0.4, -0.9)
    axes.margins(x=0.2)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    marks = [Line2D([], [], marker=marker, linestyle="", color=NEUTRAL, label=label) for _, label, marker in MEASURED]
    axes.legend(handles=marks, frameon=False, fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _shares(axes: Axes, members: Sequence[Point]) -> None:
    """Draw which operations the time of each way on shares goes into."""
    seen = set()
    for place, point in enumerate(members):
        parts = {key: _spent(point, key) or 0.0 for key in PARTS if key != "frames"}
        whole = (_spent(point, "client_servers") or 0.0) + parts["client_share"] + parts["client_reveal"]
        if not sum(parts.values()):
            axes.text(0.01, place, "nothing on shares", va="center", fontsize=8, color=NEUTRAL)
            continue
        parts["frames"] = max(0.0, whole - sum(parts.values()))
        left = 0.0
        for key, value in parts.items():
            part = value / sum(parts.values())
            label = None if key in seen or not value else PARTS[key][0]
            axes.barh(place, part, left=left, height=0.62, color=PARTS[key][1], label=label)
            left += part
            seen |= {key} if value else set()
    axes.set_xlim(0, 1)
    axes.set_yticks(range(len(members)), [])
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if seen:
        axes.legend(frameon=False, fontsize=7.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _spent(point: Point, key: str) -> float | None:
    """Return the mean seconds of a phase; of inference, those of the test set."""
    inference = point.seconds("epoch") is None
    spread = point.seconds(f"test_{key}" if inference and key in ("lan", "wan") else key)
    if inference and key == "epoch":
        spread = point.seconds("test")
    return None if spread is None else spread.mean


def _crossed(point: Point) -> Spread | None:
    """Return the megabytes of an epoch; of inference, those of the test set."""
    if point.seconds("epoch") is not None:
        return megabytes(point)
    return Spread.of(sum(sum(kinds.values()) for kinds in record.nbytes.values()) / 1e6 for record in point.records)


def _name(point: Point) -> str:
    return f"{'plain' if point.protection == 'none' else point.protection} {point.strength}".strip()


def _colour(point: Point) -> str:
    if point.protection == "none":
        return CLEAR
    leaked = point.leakage("reconstruction")
    return LEAKY if leaked is not None and leaked.mean > LEAKS else SEALED
