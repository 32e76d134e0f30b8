"""The table that surveys print in words, measured; what of their words the figures bear out; and a picture of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.courses import PARADIGMS
from experiments.figures import count, number, seconds
from experiments.plots import COLOURS, MARKERS, literal, written
from experiments.record import Record
from experiments.summary import Point, Spread, summarise
from experiments.tables import Table

__all__ = ["claims_table", "paradigm_table", "paradigms"]

EXPERIMENT = "paradigms"
NONE = "—"
# What a terminal of 80 columns has room for, and by which heading.
BRIEF = {
    "paradigm": "paradigm", "accuracy": "even", "unlike devices": "unlike", "bytes": "bytes", "ops, device": "ops",
    "satellite": "satellite", "inputs": "inputs", "membership": "members",
}  # fmt: skip
ALIKE = 0.05  # by which accuracies on even devices may differ where what they lose is compared
NOTES = "¹²³⁴⁵⁶⁷⁸⁹"
LOST = "accuracy lost to unlike devices"
Measure = Callable[[Point], Spread | None]


def _utility(metric: str) -> Measure:
    return lambda point: point.utility(metric)


def _leak(family: str) -> Measure:
    return lambda point: point.leakage(family)


def _lost(point: Point) -> Spread | None:
    both = [record.utility for record in point.records if "accuracy_non_iid" in record.utility]
    return Spread.of(one["accuracy"] - one["accuracy_non_iid"] for one in both)


MEASURES: dict[str, Measure] = {
    "bytes a round": lambda point: point.nbytes(),
    "operations of a device": _utility("edge_flops"),
    "parameters on a device": _utility("edge_parameters"),
    "network seconds by satellite": _utility("network_seconds_satellite"),
    "leakage of inputs": _leak("reconstruction"),
    "leakage of membership": _leak("membership"),
    LOST: _lost,
}


@dataclass(frozen=True)
class Claim:
    """What surveys say in words, as an order of two paradigms in one measure.

    ``but``: why the figures here may not be about it.
    """

    measure: str
    more: str
    less: str
    source: str
    but: str = ""


CLAIMS = (
    Claim("operations of a device", "fedavg", "split", "Thapa et al. 2021, arXiv:2011.14818"),
    Claim(
        "operations of a device", "fedavg", "answers", "Li et al. 2024, arXiv:2404.08564",
        "so by construction: the model is a smaller one",
    ),
    Claim(
        "bytes a round", "fedavg", "split", "Singh et al. 2019, arXiv:1909.09145",
        "said of large models and many clients, and not of small ones",
    ),
    Claim("bytes a round", "fedavg", "answers", "Li et al. 2024, arXiv:2404.08564"),
    Claim("network seconds by satellite", "split", "fedavg", "Thapa et al. 2022, arXiv:2004.12088"),
    Claim("network seconds by satellite", "split", "splitfed_v1", "Thapa et al. 2022, arXiv:2004.12088"),
    Claim(
        "leakage of inputs", "fedavg", "split", "Thapa et al. 2021, arXiv:2011.14818",
        "said of who holds the whole model; the attacks differ: one on the sum of many samples' gradients, without "
        "samples of its own, one on each sample's activation",
    ),
    Claim(
        "leakage of membership", "fedavg", "answers", "Qin et al. 2024, arXiv:2406.10861",
        "the latter's model is asked by nobody but its device; its answers on public samples are not attacked",
    ),
    Claim("accuracy lost to unlike devices", "split", "fedavg", "Gao et al. 2020, arXiv:2003.13376"),
    Claim("accuracy lost to unlike devices", "fedavg", "fedprox", "Li et al. 2020, arXiv:1812.06127"),
    Claim(
        "accuracy lost to unlike devices", "fedavg", "scaffold", "Karimireddy et al. 2020, arXiv:1910.06378",
        "plain SGD against SGD with momentum",
    ),
)  # fmt: skip


def paradigm_table(points: Sequence[Point], *, brief: bool = False) -> Table | None:
    """Return a row a paradigm: who holds what, what leaves, accuracy, cost, networks and leakage; None without any.

    ``brief`` leaves out what a terminal has no room for.
    """
    found = _compared(points)
    if not found:
        return None
    names = _names(found)
    show = _mean if brief else _interval
    rows = []
    for name, point in zip(names, found, strict=True):
        paradigm = PARADIGMS[point.setting.protocol]
        cells = {
            "paradigm": name,
            "seeds": str(len(point.seeds)),
            "family": paradigm.family,
            "the model": paradigm.partitioning,
            "leaves a device": paradigm.leaves,
            "accuracy": show(point.utility("accuracy"), number),
            "public labels alone": show(point.utility("accuracy_public_alone"), number),
            "unlike devices": show(point.utility("accuracy_non_iid"), number),
            "messages": _mean(point.utility("messages"), lambda value: f"{value:.0f}"),
            "bytes": _mean(point.nbytes(), count),
            "ops, device": _mean(point.utility("edge_flops"), _operations),
            "ops, cloud": _mean(point.utility("cloud_flops"), _operations),
            "parameters, device": _mean(point.utility("edge_parameters"), lambda value: f"{value:,.0f}"),
            "LAN": _mean(point.utility("network_seconds_lan"), seconds),
            "4G": _mean(point.utility("network_seconds_4g"), seconds),
            "satellite": _mean(point.utility("network_seconds_satellite"), seconds),
            "inputs": show(point.leakage("reconstruction"), number),
            "labels": show(point.leakage("label"), number),
            "membership": show(point.leakage("membership"), number),
        }
        rows.append({heading: cells[long] for long, heading in BRIEF.items()} if brief else cells)
    caption = (
        "Means over seeds, with the lowest and the highest seed; of a round, in which every device goes once through "
        "its samples (central: bytes and seconds are of the whole training, whose samples cross once). Accuracy is "
        "the one model's, or the mean of all devices' (teacher, answers, gossip); a teacher has labelled samples that "
        "no other has. Messages, operations (ops) and parameters are a device's, bytes those of all; operations are "
        "those of products and convolutions: averages, optimizers and penalties count as none. Networks: seconds that "
        "a round's frames take by emulation, each device on a line of its own, computing apart. Leakage: the worst "
        "attack's advantage on what crosses (inputs, labels) and by asking the trained model (membership). Attacks "
        "differ: an activation is decoded with samples of the attacker's own, an update of many steps is inverted "
        "without, so that 0 says that this attack failed. A dash: no attack of this kind was run, although something "
        "may cross that one could read."
    )
    if brief:
        caption = (
            "Means over seeds; the report tells more. Accuracy on even and on unlike devices. Of a round: bytes of all "
            "devices, operations of one in products and convolutions, seconds on the network by satellite. Leakage: "
            "the advantage of attacks on inputs, which are not the same for all, and on membership."
        )
    return Table(caption, tuple(rows[0]), tuple(tuple(row.values()) for row in rows), 1)


def claims_table(points: Sequence[Point]) -> Table | None:
    """Return, for each thing that surveys say, the two figures and whether they bear it out; None without any."""
    found = _compared(points)
    rows, doubts = [], []
    for setting in dict.fromkeys(_apart_from_paradigm(point) for point in found):
        alike = [point for point in found if _apart_from_paradigm(point) == setting]
        for claim in CLAIMS:
            both = [[point for point in alike if point.setting.protocol == name] for name in (claim.more, claim.less)]
            for a, b in product(*both):
                more, less = MEASURES[claim.measure](a), MEASURES[claim.measure](b)
                verdict = _verdict(more, less, doubtful=bool(claim.but))
                if claim.measure == LOST and _far(a, b):
                    verdict = "open: unlike even on even devices"
                if claim.but and claim.but not in doubts:
                    doubts.append(claim.but)
                mark = f" {NOTES[doubts.index(claim.but)]}" if claim.but else ""
                rows.append(
                    (
                        f"{claim.measure}: {_name(a)} > {_name(b)}", claim.source, _figure(more, claim.measure),
                        _figure(less, claim.measure), f"{verdict}{mark}",
                    )
                )  # fmt: skip
    if not rows:
        return None
    caption = (
        "Orders that surveys and papers state in words, in our paraphrase, against the figures above. Contradicted: "
        "every seed of the former is below every seed of the latter; open: seeds of both overlap, one of them has no "
        f"figure, or one learns so much less on even devices (by {ALIKE:g} or more) that what both lose is no measure. "
        "The other way round: so are the figures, which may be of something else."
    )
    caption += "".join(f" {mark} {doubt[0].upper()}{doubt[1:]}." for mark, doubt in zip(NOTES, doubts, strict=False))
    return Table(caption, ("said", "by", "the former", "the latter", "measured"), tuple(rows), 1)


def paradigms(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy, bytes, operations, seconds and leakage, a row a paradigm; None where none was compared."""
    found = _compared(summarise(records))
    if not found:
        path.unlink(missing_ok=True)
        return None
    found = found[::-1]
    figure = Figure(figsize=(17.5, 1.9 + 0.42 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, 5, sharey=True)
    accuracy = {"even devices": _utility("accuracy"), "unlike devices": _utility("accuracy_non_iid")}
    leakage = {"inputs": _leak("reconstruction"), "labels": _leak("label"), "membership": _leak("membership")}
    networks = {one: _utility(f"network_seconds_{one}") for one in ("lan", "4g", "satellite")}
    _dots(grid[0], found, accuracy, "accuracy")
    _dots(grid[1], found, {"all devices": MEASURES["bytes a round"]}, "bytes a round", log=True)
    operations = {"a device": _utility("edge_flops"), "the cloud": _utility("cloud_flops")}
    _dots(grid[2], found, operations, "operations a round", log=True)
    _dots(grid[3], found, networks, "network seconds a round", log=True)
    _dots(grid[4], found, leakage, "leakage")
    grid[0].set_yticks(range(len(found)), [literal(name) for name in _names(found)], fontsize=9)
    figure.suptitle("Devices and a cloud that learn together, side by side", fontsize=13, fontweight="bold")
    note = (
        "A small dot a seed, a large one the mean. Axes of cost are logarithmic; nothing is drawn where there is none, "
        "or no attack was run. Leakage is the worst attack's advantage: on what crosses, by attacks that differ from "
        "paradigm to paradigm, or by asking the trained model. Central: bytes and seconds of the whole training."
    )
    below(figure, note)
    return written(figure, path)


def _dots(axes: Axes, points: Sequence[Point], measures: dict[str, Measure], title: str, *, log: bool = False) -> None:
    for place, (name, measure) in enumerate(measures.items()):
        shift = 0.16 * (place - (len(measures) - 1) / 2)
        colour, marker = COLOURS[place], MARKERS[place]
        labelled = False
        for row, point in enumerate(points):
            means = measure(point)
            each = [one for seed in point.records if (one := measure(_alone(point, seed))) is not None]
            if means is None or (log and means.mean <= 0):
                continue
            values = [one.mean for one in each]
            axes.scatter(
                values, [row - shift] * len(values), s=12, alpha=0.5, linewidths=0, color=colour, marker=marker
            )
            axes.scatter(
                [means.mean], [row - shift], s=46, label=None if labelled else name, color=colour, marker=marker
            )
            labelled = True
    if log:
        axes.set_xscale("log")
    else:
        axes.set_xlim(-0.03, 1.03)
    axes.set_title(title, fontsize=10.5)
    axes.grid(axis="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(measures) > 1:
        axes.legend(
            fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.24), ncols=3, handletextpad=0.1
        )


def _alone(point: Point, record: Record) -> Point:
    return Point(point.setting, point.protection, point.strength, point.variant, (record,))


def _compared(points: Sequence[Point]) -> list[Point]:
    """Return the points of this experiment, in the catalogue's order."""
    found = [p for p in points if p.records[0].experiment == EXPERIMENT and p.setting.protocol in PARADIGMS]
    order = list(PARADIGMS)
    return sorted(found, key=lambda point: (point.setting.data, point.setting.cut, order.index(point.setting.protocol)))


def _names(points: Sequence[Point]) -> list[str]:
    """Return the points' paradigms, and what else they differ by where one was run in several settings."""
    several = len({point.setting for point in points}) > len({point.setting.protocol for point in points})
    return [_name(point, point.setting.title if several else "") for point in points]


def _name(point: Point, title: str = "") -> str:
    return (title or point.setting.protocol) + (f" ({point.variant})" if point.variant else "")


def _apart_from_paradigm(point: Point) -> str:
    """Return all of a point's configuration but the seed, the paradigm and its learning rate."""
    config = {name: value for name, value in point.records[0].config.items() if name != "seed"}
    training = config.get("training")
    if isinstance(training, dict):
        config["training"] = {name: one for name, one in training.items() if name not in ("protocol", "lr")}
    return json.dumps([point.setting.data, point.setting.cut, config], sort_keys=True)


def _far(one: Point, other: Point) -> bool:
    """Return whether the accuracies on even devices are too far apart to compare what unlike devices cost."""
    both = [point.utility("accuracy") for point in (one, other)]
    return None not in both and abs(both[0].mean - both[1].mean) >= ALIKE  # type: ignore[union-attr]


def _verdict(more: Spread | None, less: Spread | None, *, doubtful: bool = False) -> str:
    if more is None or less is None:
        return "open: no figure for one of them"
    if min(more.n, less.n) < 2:
        return "open: one seed"
    if more.low > less.high:
        return "as said"
    if more.high < less.low:
        return "the other way round" if doubtful else "CONTRADICTED"
    return "open: seeds overlap" if more.mean != less.mean else "open: no difference"


def _figure(value: Spread | None, measure: str) -> str:
    show = {"bytes a round": count, "network seconds by satellite": seconds}.get(measure, number)
    if measure in ("operations of a device", "parameters on a device"):
        show = _operations
    return _interval(value, show)


def _interval(value: Spread | None, show: Callable[[float], str]) -> str:
    if value is None:
        return NONE
    if value.n == 1 or value.low == value.high:
        return show(value.mean)
    return f"{show(value.mean)} ({show(value.low)} to {show(value.high)})"


def _mean(value: Spread | None, show: Callable[[float], str]) -> str:
    return NONE if value is None else show(value.mean)


def _operations(value: float) -> str:
    return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:,.0f}"
