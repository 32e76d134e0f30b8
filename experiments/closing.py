"""The tables in which a run ends on the terminal: what was kept of the utility, what still leaked, what it cost."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.compression_plot import compression_table
from experiments.controller_plot import controller_table
from experiments.early_exits_plot import exits_table
from experiments.enclave_plot import enclave_table
from experiments.figures import count, seconds
from experiments.paradigm_plot import claims_table, paradigm_table
from experiments.record import UNDERTRAINED, Record
from experiments.summary import Point, Spread, families, summarise, utility_metric
from experiments.tables import Table as Figures
from experiments.tables import front_of, utility_columns

__all__ = ["closing_tables", "plain"]

SPREAD = "mean ± standard deviation over seeds"


def closing_tables(records: Iterable[Record]) -> Iterator[Table]:
    """Yield a table per data set, protocol and cut, one row per configuration, seeds apart.

    A row holds utility, worst leakage, and the bytes and the time of a trial; failed trials take no part. Where
    nothing was attacked, every utility metric has its column, and the settings share one table. Paradigms, too, share
    one, beside what surveys say of them.
    """
    points = summarise(records)
    compared = paradigm_table(points, brief=True)
    if compared is not None:
        said = claims_table(points)
        yield plain(compared)
        yield from [] if said is None else [plain(said)]
        return
    for table in (
        compression_table(points),
        exits_table(points, brief=True),
        enclave_table(points, brief=True),
        controller_table(points),
    ):
        if table is not None:
            yield plain(table)
            return
    if points and not any(point.attacks for point in points):
        yield _unattacked(points)
        return
    for setting in dict.fromkeys(point.setting for point in points):
        yield _table(setting.title, [point for point in points if point.setting == setting])


def _table(title: str, points: Sequence[Point]) -> Table:
    metric = utility_metric(points)
    front = front_of(points) if len(points) > 1 else []
    phase = _phase(points)
    table = _empty(title, _caption(bool(front), any(point.undertrained() for point in points)))
    table.add_column("protection")
    attacked = families(points)
    leaks = ["worst leakage"] if len(attacked) < 2 else [f"{family} leakage" for family in attacked]
    for heading in ("seeds", (metric or "utility").replace("_", " "), *leaks, "bytes", f"{phase} time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            escape(point.name) + (" *" if point in front else ""),
            str(len(point.seeds)),
            _spread(None if metric is None else point.utility(metric)),
            *(_leak(point, one) for one in (attacked if len(attacked) > 1 else [None])),
            _mean(point.nbytes(), count),
            _mean(point.seconds(phase), seconds),
        )
    return table


def plain(figures: Figures) -> Table:
    """Return a table of a report for the terminal."""
    table = _empty("", figures.caption)
    for place, heading in enumerate(figures.columns):
        table.add_column(heading, justify="left" if place < figures.heads else "right")
    for row in figures.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _unattacked(points: Sequence[Point]) -> Table:
    metrics, _ = utility_columns(points)
    phase = _phase(points)
    parts = [(*point.setting.parts, point.name) for point in points]
    common = [part for part in parts[0] if all(part in other for other in parts)] if len(parts) > 1 else []
    table = _empty(" · ".join(common), f"{SPREAD}; nothing was attacked")
    table.add_column("setting", no_wrap=True)
    for heading in ("seeds", *(metric.replace("_", " ") for metric in metrics), "bytes", f"{phase} time"):
        table.add_column(heading, justify="right")
    for point, told in zip(points, parts, strict=True):
        table.add_row(
            escape(" · ".join(part for part in told if part not in common)),
            str(len(point.seeds)),
            *(_spread(point.utility(metric)) for metric in metrics),
            _mean(point.nbytes(), count),
            _mean(point.seconds(phase), seconds),
        )
    return table


def _empty(title: str, caption: str) -> Table:
    return Table(
        title=escape(title) or None,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
    )


def _phase(points: Sequence[Point]) -> str:
    return "train" if any(point.seconds("train") for point in points) else "total"


def _caption(starred: bool, undertrained: bool) -> str:
    lines = [f"{SPREAD}; leakage: 0 nothing, 1 everything"]
    lines += ["* on the Pareto front: nothing else is both more useful and leaks less"] if starred else []
    lines += (
        [f"† {UNDERTRAINED} attacks: worse than who saw nothing, which shows no protection"] if undertrained else []
    )
    return "\n".join(lines)


def _leak(point: Point, family: str | None) -> str:
    """Return the leakage by a family of attacks, or by all."""
    doubt = " †" if point.undertrained(family) else ""
    return _spread(point.worst if family is None else point.leakage(family)) + doubt


def _spread(found: Spread | None) -> str:
    if found is None:
        return "—"
    if abs(found.mean) < 0.001:  # such as a difference of weights, which is exact where it is 0
        return "0" if found.low == found.high == 0 else f"{found.mean:.1e}"
    return f"{found.mean:.3f}" if found.n == 1 else f"{found.mean:.3f} ± {found.std:.3f}"


def _mean(found: Spread | None, show: Callable[[float], str]) -> str:
    return "—" if found is None else show(found.mean)
