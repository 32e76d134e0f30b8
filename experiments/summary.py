"""What the records of a folder say together: trials that differ only by their seed become one point."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.record import UNDERTRAINED, Leakage, Record
from experiments.store import strength_order

__all__ = ["Mark", "Point", "Setting", "Spread", "families", "marks", "pareto_front", "summarise", "utility_metric"]

UTILITY = ("accuracy", "macro_f1", "auc")  # the first one that was measured is the axis of the trade-off
LONGEST = 24  # characters of a setting that tells variants apart
ABSENT = "—"
WATCHED = frozenset({"detection"})  # experiments in whose records a detector stands in a protection's place


@dataclass(frozen=True)
class Spread:
    """A figure over ``n`` seeds. ``std`` is that of a sample; NaN for one seed, or where a figure is infinite."""

    mean: float
    std: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Return the spread of the values, or None where there are none."""
        found = list(values)
        if not found:
            return None
        std = statistics.stdev(found) if len(found) > 1 and all(map(math.isfinite, found)) else math.nan
        mean = statistics.fmean(found) if all(map(math.isfinite, found)) else sum(found) / len(found)
        low, high = min(found), max(found)
        return cls(min(max(mean, low), high), std, low, high, len(found))  # rounding may not put it outside


class Setting(NamedTuple):
    """What is compared within, never across: one data set, protocol and cut, of one experiment where several met."""

    data: str
    protocol: str
    cut: str
    experiment: str = ""  # "" where all records are of one

    @property
    def parts(self) -> tuple[str, ...]:
        """What the setting is, in words, without what is empty."""
        parts = (self.experiment, self.data, self.protocol, self.cut and f"cut {self.cut}")
        return tuple(part for part in parts if part)

    @property
    def title(self) -> str:
        """The setting in a line."""
        return " · ".join(self.parts)


@dataclass(frozen=True)
class Point:
    """One configuration over its seeds. ``variant`` tells apart those of the same protection and strength."""

    setting: Setting
    protection: str
    strength: str
    variant: str
    records: tuple[Record, ...]  # done, by seed

    @property
    def protected(self) -> bool:
        """Whether there is a protection."""
        return self.protection not in ("none", "")

    @property
    def protects(self) -> bool:
        """Whether less leakage speaks for it: not of a training that is hijacked, and that a detector watches."""
        return self.records[0].experiment not in WATCHED

    def undertrained(self, family: str | None = None) -> bool:
        """Return whether in some trial each attack, or each of a family, did worse than who saw nothing.

        Leakage of 0 then tells of the attacker's training, and of no protection.
        """
        for record in self.records:
            found = [leak.standing for leak in record.leakage if family in (None, leak.family)]
            if found and set(found) == {UNDERTRAINED}:
                return True
        return False

    @property
    def comparable(self) -> bool:
        """Whether its leakage stands on the same axis as others': mechanisms with an ε protect different things."""
        return not any(record.accounts for record in self.records)

    def leakage(self, family: str) -> Spread | None:
        """Return the largest advantage of any attack of a family in each trial, over the seeds."""
        return Spread.of(
            max(found)
            for record in self.records
            if (found := [leak.advantage for leak in record.leakage if leak.family == family])
        )

    @property
    def name(self) -> str:
        """Protection, strength and variant in a line."""
        parts = [self.protection if self.protected else "unprotected", self.strength]
        return " ".join(part for part in parts if part) + (f" ({self.variant})" if self.variant else "")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the trials."""
        return tuple(record.seed for record in self.records)

    def utility(self, metric: str) -> Spread | None:
        """Return a utility metric over the seeds."""
        return Spread.of(record.utility[metric] for record in self.records if metric in record.utility)

    @property
    def worst(self) -> Spread | None:
        """The largest advantage of any attack in each trial, over the seeds; None where nothing attacked."""
        return Spread.of(leak for record in self.records if (leak := record.worst_leakage) is not None)

    @property
    def attacks(self) -> list[str]:
        """The attacks, the one with the largest mean advantage first."""
        names = dict.fromkeys(leak.attack for record in self.records for leak in record.leakage)
        means = {name: statistics.fmean(leak.advantage for leak in self.leaks(name)) for name in names}
        return sorted(means, key=lambda name: -means[name])

    def leaks(self, attack: str) -> list[Leakage]:
        """Return what one attack got, by seed."""
        return [leak for record in self.records for leak in record.leakage if leak.attack == attack]

    def nbytes(self, direction: str | None = None, kind: str | None = None) -> Spread | None:
        """Return the bytes of a trial, of one direction or kind where given; None where none was counted."""
        return Spread.of(
            sum(
                nbytes
                for way, kinds in record.nbytes.items()
                for name, nbytes in kinds.items()
                if direction in (None, way) and kind in (None, name)
            )
            for record in self.records
            if record.nbytes
        )

    def seconds(self, phase: str) -> Spread | None:
        """Return the seconds of one phase over the seeds."""
        return Spread.of(record.seconds[phase] for record in self.records if phase in record.seconds)

    def claimed(self, figure: str) -> Spread | None:
        """Return ``epsilon``, ``epsilon_lower`` or ``mse_bound`` over the seeds; None where it is not claimed."""
        return Spread.of(value for record in self.records if (value := getattr(record, figure)) is not None)

    @property
    def peak_memory(self) -> Spread | None:
        """The peak memory in bytes over the seeds."""
        return Spread.of(record.peak_memory_bytes for record in self.records if record.peak_memory_bytes)


@dataclass(frozen=True)
class Mark:
    """A point's place in a trade-off plot."""

    point: Point
    utility: Spread
    leakage: Spread

    @property
    def place(self) -> tuple[float, float]:
        """Mean utility and mean leakage."""
        return self.utility.mean, self.leakage.mean


def summarise(records: Iterable[Record]) -> list[Point]:
    """Return one point per configuration, seeds apart, sorted by setting, protection and strength.

    Failed trials take no part.
    """
    records = list(records)
    several = len({record.experiment for record in records}) > 1
    groups: dict[tuple[Setting, str, str], dict[str, list[Record]]] = {}
    for record in records:
        if record.status == "done":
            experiment = record.experiment if several else ""
            setting = Setting(record.data, record.protocol, record.cut, experiment)
            alike = groups.setdefault((setting, record.protection, record.strength), {})
            alike.setdefault(json.dumps(_without_seed(record), sort_keys=True), []).append(record)
    points = []
    for (setting, protection, strength), alike in groups.items():
        variants = _variants([group[0] for group in alike.values()])
        for variant, group in zip(variants, alike.values(), strict=True):
            by_seed = tuple(sorted(group, key=lambda record: record.seed))
            points.append(Point(setting, protection, strength, variant, by_seed))
    return sorted(points, key=_order)


def families(points: Iterable[Point]) -> list[str]:
    """Return the families of attacks that were run on any of the points."""
    return list(dict.fromkeys(leak.family for point in points for record in point.records for leak in record.leakage))


def marks(points: Iterable[Point], metric: str | None) -> dict[Setting, list[Mark]]:
    """Return, by setting, the points that have both a utility ``metric`` and a leakage.

    None where some are not comparable: a front over mechanisms that protect different things would mislead. Points
    that are no protections are left out.
    """
    found: dict[Setting, list[Mark]] = {}
    points = [point for point in points if point.protects]
    for point in points if all(point.comparable for point in points) else ():
        utility, leakage = None if metric is None else point.utility(metric), point.worst
        if utility is not None and leakage is not None:
            found.setdefault(point.setting, []).append(Mark(point, utility, leakage))
    return found


def utility_metric(points: Iterable[Point]) -> str | None:
    """Return the metric that stands for utility: accuracy where it was measured; None without any."""
    measured = {name for point in points for record in point.records for name in record.utility}
    return next((name for name in UTILITY if name in measured), min(measured, default=None))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (utility, leakage) points no other beats, by rising utility.

    One beats another if it has no less utility and no more leakage, and is better in one of them. Equal points
    are all on the front; points with NaN never are.
    """
    finite = [number for number, point in enumerate(points) if not any(map(math.isnan, point))]

    def beaten(number: int) -> bool:
        utility, leakage = points[number]
        return any(
            points[other][0] >= utility and points[other][1] <= leakage and points[other] != (utility, leakage)
            for other in finite
        )

    return sorted((number for number in finite if not beaten(number)), key=lambda number: points[number])


def _without_seed(record: Record) -> dict[str, object]:
    config = {name: value for name, value in record.config.items() if name != "seed"}
    return {"experiment": record.experiment, **config}


def _variants(records: Sequence[Record]) -> list[str]:
    """Return, for records of one label, the fewest settings that tell them apart, those that read shortest first."""
    configs = [{name: str(value) for name, value in _flat(_without_seed(record))} for record in records]
    names = sorted({name for config in configs for name in config})
    names.sort(key=lambda name: max(len(config.get(name, ABSENT)) for config in configs))
    telling: list[str] = []
    told = [""] * len(configs)
    for name in names:
        finer = [f"{before}\n{config.get(name, ABSENT)}" for before, config in zip(told, configs, strict=True)]
        if len(set(finer)) > len(set(told)):
            telling, told = [*telling, name], finer
    return [", ".join(f"{_last(name)}={_short(config.get(name, ABSENT))}" for name in telling) for config in configs]


def _flat(config: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of nested dicts under dotted names, such as ``training.epochs``."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _order(point: Point) -> tuple[object, ...]:
    strength = strength_order(point.strength)
    setting = point.setting
    return (setting.experiment, *setting[:3], point.protected, point.protection, strength, point.variant)
