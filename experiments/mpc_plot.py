"""The picture of mpc_overhead: accuracy, seconds and bytes of each way on one cut, and where the time goes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.cost_bars import CLEAR, bars, by_setting, finish, leaky_or_sealed, logarithmic, megabytes, noted
from experiments.plots import NEUTRAL, literal, reach, written
from experiments.record import Record
from experiments.summary import Point, Spread
from privacy.mpc import LAN, WAN

__all__ = ["mpc_costs"]

# Of an epoch, and of the inference of the test set; each a little below the last, so that marks nearby stay apart.
NETWORKS = (
    ("measured on loopback", "epoch", "test", "o", -0.25),
    ("modelled LAN", "lan", "test_lan", "s", 0.0),
    ("modelled WAN", "wan", "test_wan", "^", 0.25),
)
REST = "waiting and frames"
PARTS = {
    "servers_linear": ("linear", "#0072B2"),
    "servers_relu": ("ReLU", "#56B4E9"),
    "servers_pool": ("pooling", "#009E73"),
    "servers_shape": ("reshaping", "#000000"),
    "servers_softmax": ("softmax", "#E69F00"),
    "servers_loss": ("loss", "#F0E442"),
    "servers_update": ("step", "#A6761D"),
    "client_share": ("sharing", "#CC79A7"),
    "client_reveal": ("revealing", "#8C6BB1"),
    REST: (REST, "#D9D9D9"),
}
PANELS = ("accuracy", "seconds an epoch", "megabytes an epoch, all wires", "share of the time, by operation")


def mpc_costs(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what each way of computing above the cut costs, and return the PNG's path.

    A row of panels a data set and cut. None, and the file removed, where no trial is of ``mpc_overhead``.
    """
    settings = by_setting(records, "mpc_overhead")
    if not settings:
        path.unlink(missing_ok=True)
        return None
    points = [point for members in settings.values() for point in members]
    heights = [0.42 * len(members) + 0.9 for members in settings.values()]
    figure = Figure(figsize=(16, sum(heights) + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(settings), len(PANELS), squeeze=False, height_ratios=heights, width_ratios=(1, 1.3, 1, 1.2)
    )
    for row, (setting, members) in zip(grid, settings.items(), strict=True):
        accuracy, seconds, crossed, parts = row
        bars(accuracy, members, lambda point: point.utility("accuracy"), log=False, named=True, colour=_colour,
             hatched=_infers)  # fmt: skip
        _seconds(seconds, members)
        bars(crossed, members, _crossed, log=True, named=False, colour=_colour, hatched=_infers)
        _shares(parts, members)
        for axes, title in zip(row, PANELS, strict=True):
            axes.set_xlabel(title)
        seconds.set_title(literal(setting.title), fontsize=10.5)
    _legends(grid[-1], points)
    figure.suptitle("What computing on shares costs", fontsize=14, fontweight="bold")
    networks = ", ".join(
        f"{one.name} {1000 * one.latency:g} ms one way and {one.bandwidth / 1e6:g} Mbit/s" for one in (LAN, WAN)
    )
    note = (
        "Grey: in the clear. Blue: a server sees shares or ciphertexts. Orange: one server reads the activations. "
        "Hatched, and hollow marks: trained in the clear; bytes and seconds are of the inference of the whole test "
        "set. LAN and WAN are modelled, not measured: rounds × latency + bytes ÷ bandwidth, beside what was measured "
        f"on loopback; {networks}."
    )
    noted(figure, note, points)
    return written(figure, path)


def _seconds(axes: Axes, members: Sequence[Point]) -> None:
    """Draw a mark for loopback and for each modelled network, from its lowest to its highest seed."""
    for place, point in enumerate(members):
        for _, epoch, test, marker, below in NETWORKS:
            spread = point.seconds(test if _infers(point) else epoch)
            if spread is not None:
                axes.errorbar(
                    spread.mean, place + below, xerr=reach([spread]), marker=marker, markersize=5.5, capsize=2,
                    color=_colour(point), ecolor="black", elinewidth=1,
                    markerfacecolor="white" if _infers(point) else _colour(point),
                )  # fmt: skip
                axes.annotate(f"{spread.mean:.3g}", (spread.high, place + below), xytext=(6, 0), va="center",
                              textcoords="offset points", fontsize=7.5)  # fmt: skip
        axes.axhline(place + 0.5, color="#E6E6E6", linewidth=0.7)
    logarithmic(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 2)  # room for the figure of the greatest
    finish(axes, members, named=False)


def _shares(axes: Axes, members: Sequence[Point]) -> None:
    """Draw which operations the time of each way on shares goes into."""
    for place, point in enumerate(members):
        parts, left = _parts(point), 0.0
        if not parts:
            axes.text(0.01, place, "nothing on shares", va="center", fontsize=8, color=NEUTRAL)
        for key, value in parts.items():
            part = value / sum(parts.values())
            axes.barh(place, part, left=left, height=0.62, color=PARTS[key][1])
            left += part
    axes.set_xlim(0, 1)
    finish(axes, members, named=False)


def _legends(row: Sequence[Axes], points: Sequence[Point]) -> None:
    """Say below the last row what marks and colours of the second and the fourth panel stand for."""
    marks = [
        Line2D([], [], marker=marker, linestyle="", color=NEUTRAL, label=label) for label, _, _, marker, _ in NETWORKS
    ]
    used = {key for point in points for key in _parts(point)}
    patches = [Patch(color=colour, label=label) for key, (label, colour) in PARTS.items() if key in used]
    for axes, handles, columns in ((row[1], marks, 3), (row[3], patches, 3)):
        if handles:  # a fixed way below the axis, whatever its height
            axes.legend(
                handles=handles, frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0),
                borderaxespad=5,
            )  # fmt: skip


def _parts(point: Point) -> dict[str, float]:
    """Return the mean seconds of each operation on shares, and of what is left of the client's time with the servers.

    Of inference the client's own layers are in what is left. Empty where nothing is on shares.
    """
    found = {key: spread.mean for key in PARTS if (spread := point.seconds(key)) is not None and spread.mean > 0}
    if not found:
        return {}
    mine = ("client_share", "client_servers", "client_reveal")
    spent = [point.seconds(key) for key in (("test",) if _infers(point) else mine)]
    whole = sum(one.mean for one in spent if one is not None)
    return {**found, REST: max(0.0, whole - sum(found.values()))}


def _crossed(point: Point) -> Spread | None:
    """Return the megabytes of an epoch; of inference, those of the test set."""
    if not _infers(point):
        return megabytes(point)
    return Spread.of(sum(sum(kinds.values()) for kinds in record.nbytes.values()) / 1e6 for record in point.records)


def _infers(point: Point) -> bool:
    return point.seconds("epoch") is None


def _colour(point: Point) -> str:
    return CLEAR if point.protection == "none" else leaky_or_sealed(point, "reconstruction")
