"""The tables of a report, as rows of text: results, leakage, overhead, who sees what."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.figures import count, number, ratio, seconds, spread
from experiments.record import UNDERTRAINED
from experiments.summary import Point, Spread, families, marks, pareto_front, utility_metric

__all__ = [
    "Table",
    "accounts_table",
    "bytes_table",
    "front_of",
    "leakage_tables",
    "results_tables",
    "seconds_table",
    "strength_notes",
    "utility_columns",
    "visible_table",
]

STRENGTH = "strength:"  # begins the note of a record that says in which unit its strength is
QUANTILE = re.compile(r"_q\d+$")
BESIDE_ACCURACY = frozenset({"macro_f1", "auc"})
BY_MEDIAN = frozenset({"psnr", "ssim"})  # a few samples that are hit or missed altogether carry their mean away


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first ``heads`` cells of a row say what it is about. ``strong`` rows stand out."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int
    prose: bool = False  # cells are sentences rather than figures
    strong: frozenset[int] = frozenset()


def results_tables(points: Sequence[Point]) -> list[Table]:
    """Return a table per experiment, one row per configuration: utility, worst leakage, ε; the front stands out."""
    experiments = dict.fromkeys(point.setting.experiment for point in points)
    return [_results_table([p for p in points if p.setting.experiment == experiment]) for experiment in experiments]


def _results_table(points: Sequence[Point]) -> Table:
    first, further = utility_columns(points)
    front = front_of(points)
    attacked = any(point.worst for point in points)
    proved = any(_epsilon(point) for point in points)
    columns = [*_heads(points), "seeds", *(metric.replace("_", " ") for metric in first)]
    kinds = families(points)
    mixed = len(kinds) > 1  # one worst of all would set labels against inputs
    columns += [f"{family} leakage" for family in kinds] if mixed else ["worst leakage", "by"] if attacked else []
    columns += ["ε", "ε at least"] if proved else []
    columns += [metric.replace("_", " ") for metric in further]
    rows = []
    for point in points:
        row = [*_head(point, points), str(len(point.seeds)), *(spread(point.utility(metric)) for metric in first)]
        if mixed:
            row += [spread(point.leakage(family)) + _doubt(point.undertrained(family)) for family in kinds]
        elif attacked:
            row += [spread(point.worst) + _doubt(point.undertrained()), point.attacks[0] if point.attacks else "—"]
        row += [spread(_epsilon(point)), spread(point.claimed("epsilon_lower"))] if proved else []
        rows.append((*row, *(spread(point.utility(metric)) for metric in further)))
    strong = frozenset(number for number, point in enumerate(points) if point in front)
    note = " Shaded rows are on the Pareto front: nothing else is both more useful and leaks less." if strong else ""
    caption = f"Means over seeds, with the lowest and the highest seed.{note}"
    return Table(caption, tuple(columns), tuple(rows), len(_heads(points)), strong=strong)


def strength_notes(points: Sequence[Point]) -> list[tuple[str, list[str]]]:
    """Return, by protection, what its strength means: the records' notes that begin ``strength:``, each once."""
    found: dict[str, dict[str, None]] = {}
    for point in points:
        for note in (note for record in point.records for note in record.notes if note.startswith(STRENGTH)):
            found.setdefault(point.protection, {})[note.removeprefix(STRENGTH).strip()] = None
    return [(protection, list(notes)) for protection, notes in found.items()]


def leakage_tables(points: Sequence[Point]) -> list[Table]:
    """Return a table per family of attacks: the advantage, and each raw metric beside its baseline."""
    return [_leakage_table(points, family) for family in families(points)]


def bytes_table(points: Sequence[Point]) -> Table | None:
    """Return bytes by direction and kind of message, and their sum over that of the unprotected; None without any."""
    found = [(way, kind) for p in points for r in p.records for way, kinds in r.nbytes.items() for kind in kinds]
    kinds = sorted(set(found), key=lambda pair: (pair[0] != "up", *pair))
    if not kinds:
        return None
    columns = (*_heads(points), *(f"{way}: {kind}" for way, kind in kinds), "all", "ratio")
    rows = [
        (
            *_head(point, points),
            *(_mean(point.nbytes(way, kind), count) for way, kind in kinds),
            _mean(point.nbytes(), count),
            ratio(point.nbytes(), _base(point, points, lambda base: base.nbytes())),
        )
        for point in points
    ]
    caption = (
        "Bytes of the frames of a whole trial, by direction and kind; up is towards the server. Ratio: to unprotected."
    )
    return Table(caption, columns, tuple(rows), len(_heads(points)))


def seconds_table(points: Sequence[Point]) -> Table | None:
    """Return seconds by phase and peak memory, training beside that of the unprotected; None without any."""
    phases = list(dict.fromkeys(phase for point in points for record in point.records for phase in record.seconds))
    if not phases:
        return None
    timed = "train" if "train" in phases else phases[-1]
    columns = (*_heads(points), *(phase.replace("_", " ") for phase in phases), f"{timed}, ratio")
    rows = [
        (
            *_head(point, points),
            *(_mean(point.seconds(phase), seconds) for phase in phases),
            ratio(point.seconds(timed), _base(point, points, lambda base: base.seconds(timed))),
            _mean(point.peak_memory, count),
        )
        for point in points
    ]
    caption = (
        "Mean time of each phase of a trial, as it ran beside others, and the highest memory of its whole process, "
        "interpreter and libraries included. Ratio: to unprotected."
    )
    return Table(caption, (*columns, "peak memory"), tuple(rows), len(_heads(points)))


def visible_table(points: Sequence[Point]) -> Table | None:
    """Return what each observer saw; configurations that showed the same share a row. None where none was told."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    several = len({point.setting for point in points}) > 1
    for point in points:
        for observer, seen in {o: tuple(s) for record in point.records for o, s in record.visible.items()}.items():
            setting = point.setting.title if several else ""
            groups.setdefault((setting, observer, seen), []).append(point.name)
    if not groups:
        return None
    heads = ("setting", "observer") if several else ("observer",)
    rows = [
        (*((setting,) if several else ()), observer, "; ".join(seen) or "nothing", ", ".join(names))
        for (setting, observer, seen), names in groups.items()
    ]
    caption = "What remained visible, and to whom, whatever the attacks above made of it."
    return Table(caption, (*heads, "sees", "under"), tuple(rows), len(heads), prose=True)


def accounts_table(points: Sequence[Point]) -> Table | None:
    """Return every account of each configuration, one a row, as its first seed had it; None where none was kept."""
    rows = [(point.name, account) for point in points for account in point.records[0].accounts]
    caption = (
        "What was released, by whose data, observer and neighbour. Accounts are never added up: each answers a "
        "question of its own. The first of a configuration is the one that its mechanism is for; ε = ∞ is what it "
        "leaves in the clear."
    )
    return Table(caption, ("protection", "account"), tuple(rows), 1, prose=True) if rows else None


def utility_columns(points: Sequence[Point]) -> tuple[list[str], list[str]]:
    """Return the utility metrics that a table is about, and those that only come beside accuracy: macro F1, AUC."""
    metrics = list(dict.fromkeys(name for point in points for record in point.records for name in record.utility))
    first = [name for name in metrics if name not in BESIDE_ACCURACY or "accuracy" not in metrics]
    return first, [name for name in metrics if name not in first]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points on the Pareto front of their setting, by rising utility."""
    found: list[Point] = []
    for members in marks(points, utility_metric(points)).values():
        found += [members[number].point for number in pareto_front([mark.place for mark in members])]
    return found


def _leakage_table(points: Sequence[Point], family: str) -> Table:
    leaks = [
        (point, attack, found)
        for point in points
        for attack in point.attacks
        if (found := [leak for leak in point.leaks(attack) if leak.family == family])
    ]
    metrics = list(dict.fromkeys(name for _, _, found in leaks for leak in found for name in leak.metrics))
    metrics = [_typical(name, metrics) for name in metrics if not QUANTILE.search(name)]
    columns = [*_heads(points), "attack", "advantage"]
    told = any(leak.standing for _, _, found in leaks for leak in found)
    columns += ["the attacker's training"] if told else []
    for metric in metrics:
        columns += [metric.replace("_q50", " median").replace("_", " "), "baseline"]
    rows = []
    for point, attack, found in leaks:
        row = [*_head(point, points), attack, spread(Spread.of(leak.advantage for leak in found))]
        row += [", ".join(dict.fromkeys(leak.standing for leak in found if leak.standing)) or "—"] if told else []
        for metric in metrics:
            row.append(_mean(Spread.of(leak.metrics[metric] for leak in found if metric in leak.metrics), number))
            baselines = [leak.baseline(QUANTILE.sub("", metric)) for leak in found]
            row.append(_mean(Spread.of(value for value in baselines if value is not None), number))
        rows.append(tuple(row))
    caption = (
        f"Attacks on {family}. Advantage: 0 is what an attacker who saw nothing reaches, 1 is everything. "
        "Metrics are means over samples, or medians where it says so; baseline is the best mean of such an attacker. "
        f"An attack that is {UNDERTRAINED} does worse than who saw nothing: no defense has been shown to work there. "
        "results.csv holds further quantiles."
    )
    return Table(caption, tuple(columns), tuple(rows), len(_heads(points)) + 1)


def _typical(metric: str, measured: Sequence[str]) -> str:
    """Return the median of a metric that is told by it, where it was measured, else the metric itself."""
    median = f"{metric}_q50"
    return median if metric in BY_MEDIAN and median in measured else metric


def _heads(points: Sequence[Point]) -> list[str]:
    """Return the columns that name a configuration; the setting only where there are several."""
    return ["setting", "protection"] if len({point.setting for point in points}) > 1 else ["protection"]


def _head(point: Point, points: Sequence[Point]) -> list[str]:
    return [point.setting.title, point.name] if len(_heads(points)) > 1 else [point.name]


def _base(point: Point, points: Sequence[Point], figure: Callable[[Point], Spread | None]) -> Spread | None:
    """Return a figure of the unprotected configuration of the same setting and, where there is one, variant."""
    bare = [other for other in points if other.setting == point.setting and not other.protected]
    same = [other for other in bare if other.variant == point.variant] or bare
    return figure(same[0]) if same else None


def _epsilon(point: Point) -> Spread | None:
    return Spread.of(record.epsilon for record in point.records if record.epsilon is not None)


def _doubt(undertrained: bool) -> str:
    return f" ({UNDERTRAINED})" if undertrained else ""


def _mean(found: Spread | None, show: Callable[[float], str]) -> str:
    return "—" if found is None else show(found.mean)
