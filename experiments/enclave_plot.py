"""Picture and table of an enclave's host: what sizes of sealed frames tell, against the bytes of a sample."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.figures import number, seconds, spread
from experiments.labels import Label, write_labels
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, reach, spread_note, written
from experiments.record import Record
from experiments.summary import Point, Setting, Spread, summarise
from experiments.tables import Table

__all__ = ["enclave_leaks", "enclave_table"]

EXPERIMENT = "enclave"
WAYS = {  # of the table's seconds: heading, name
    "no enclave": "plain", "SGX": "sgx", "TDX": "tdx", "SEV": "sev", "no enclave, GPU": "plain_gpu",
    "confidential GPU": "confidential_gpu",
}  # fmt: skip


def enclave_table(points: Sequence[Point], *, brief: bool = False) -> Table | None:
    """Return a row a codec and padding: bytes and sizes of a sample, what they tell, modelled seconds; None without.

    ``brief`` leaves out what a terminal has no room for: the spread over seeds, and most enclaves.
    """
    found = _points(points)
    if not found:
        return None
    show = _mean if brief else spread
    ways = {head: way for head, way in WAYS.items() if not brief or way in ("plain", "sgx")}
    alone = brief and len({point.setting for point in found}) == 1
    rows = []
    for point in found:
        cells = {} if alone else {"setting": point.setting.title}
        cells |= {
            "codec": _name(point),
            "seeds": str(len(point.seeds)),
            "accuracy": show(point.utility("accuracy")),
            "bytes": "—" if (size := point.utility("sample_bytes")) is None else f"{size.mean:,.0f}",
            "sizes": show(point.utility("sizes_seen")),
            "leakage": show(point.worst),
            "right": show(_right(point)),
            **{head: _seconds(point.utility(f"seconds_{way}")) for head, way in ways.items()},
        }
        rows.append(tuple(cells.values()))
    caption = (
        f"{found[0].setting.title + '. ' if alone else ''}Means over seeds"
        f"{'' if brief else ', with the lowest and the highest'}. The enclave is MODELLED: the stage runs here, "
        "attestation and key exchange are assumed, and the seconds of a sample, its network included, follow from "
        "counted work and published slowdowns. Frames are really sealed; bytes are a sample's, both ways, sizes how "
        "many differ. Leakage: what the host learns of the class from sizes and times of frames, over the most "
        "frequent class; right: how often its guess is. No other side channel is modelled: caches, page faults and "
        "power are left out."
    )
    return Table(caption, tuple(cells), tuple(rows), 1 if alone else 2)


def enclave_leaks(records: Sequence[Record], path: Path) -> Path | None:
    """Draw leakage by sizes against bytes of a sample, a panel a setting, a line a codec; None without any."""
    points = [point for point in _points(summarise(records)) if point.worst and point.utility("sample_bytes")]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys(point.setting for point in points))
    figure = Figure(figsize=(8.6, 1.4 + 4.2 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    codecs = list(dict.fromkeys(point.protection for point in points))
    looks = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(codecs)}
    grid = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    for axes, setting in zip(grid, settings, strict=True):
        _panel(axes, setting, [point for point in points if point.setting == setting], looks)
    figure.suptitle("What a host reads off sealed frames (enclave modelled)", fontsize=13, fontweight="bold")
    note = (
        "The class of a test sample, guessed from sizes and times of its sealed frames alone, over the most frequent "
        "class; 0 is a host that saw nothing. Labels are codecs, and to how many bytes their output is padded. "
        f"{spread_note(max(len(point.seeds) for point in points))} No side channel but sizes and times is modelled."
    )
    below(figure, note)
    figure.draw_without_rendering()  # fixes the layout, in which the labels then find their places
    for axes, setting in zip(grid, settings, strict=True):
        _label(axes, [point for point in points if point.setting == setting], looks)
    return written(figure, path)


def _points(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.records[0].experiment == EXPERIMENT]


def _name(point: Point) -> str:
    first = point.protection if point.protected else "float32"
    first += f" to {point.strength} B" if point.strength else ""
    return f"{first} ({point.variant})" if point.variant else first


def _right(point: Point) -> Spread | None:
    return Spread.of(leak.metrics["accuracy"] for leak in point.leaks("sizes"))


def _mean(found: Spread | None) -> str:
    return "—" if found is None else number(found.mean)


def _seconds(found: Spread | None) -> str:
    return "—" if found is None else seconds(found.mean)


def _place(point: Point) -> tuple[Spread, Spread]:
    size, leak = point.utility("sample_bytes"), point.worst
    assert size is not None and leak is not None  # noqa: PT018 - those without were left out
    return size, leak


def _panel(axes: Axes, setting: Setting, members: Sequence[Point], looks: dict[str, tuple[str, str]]) -> None:
    axes.axhline(0, color=NEUTRAL, linewidth=1.2, linestyle=(0, (1, 2)))
    for codec, (colour, marker) in looks.items():
        line = [_place(point) for point in members if point.protection == codec]
        if not line:
            continue
        axes.errorbar(
            [size.mean for size, _ in line], [leak.mean for _, leak in line],
            xerr=reach([size for size, _ in line]), yerr=reach([leak for _, leak in line]),
            color=colour, marker=marker, markersize=8, markeredgecolor="white", linewidth=0.9, elinewidth=1.0, zorder=4,
        )  # fmt: skip
    axes.set_xlabel("bytes of a sample, both ways, sealed")
    axes.set_ylabel("leakage of the class by sizes")
    axes.set_title(literal(setting.title), fontsize=10)
    axes.set_ylim(bottom=-0.02)
    axes.margins(x=0.12, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _label(axes: Axes, members: Sequence[Point], looks: dict[str, tuple[str, str]]) -> None:
    labels, segments = [], []
    for point in members:
        size, leak = _place(point)
        labels.append(Label(literal(_name(point)), (size.mean, leak.mean), looks[point.protection][0]))
        segments += [((size.low, leak.mean), (size.high, leak.mean)), ((size.mean, leak.low), (size.mean, leak.high))]
    write_labels(axes, labels, segments=segments)
