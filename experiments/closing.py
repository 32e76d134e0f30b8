"""The tables in which a run ends on the terminal: what was kept of the utility, what still leaked, what it cost."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.figures import count, seconds
from experiments.record import Record
from experiments.summary import Point, Spread, summarise, utility_metric
from experiments.tables import front_of

__all__ = ["closing_tables"]


def closing_tables(records: Iterable[Record]) -> Iterator[Table]:
    """Yield a table per data set, protocol and cut, one row per configuration, seeds apart.

    A row holds utility, worst leakage, and the bytes and the time of a trial; failed trials take no part.
    """
    points = summarise(records)
    for setting in dict.fromkeys(point.setting for point in points):
        yield _table(setting.title, [point for point in points if point.setting == setting])


def _table(title: str, points: Sequence[Point]) -> Table:
    metric = utility_metric(points)
    front = front_of(points) if len(points) > 1 else []
    phase = "train" if any(point.seconds("train") for point in points) else "total"
    table = Table(
        title=escape(title),
        caption=_caption(bool(front)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("protection")
    for heading in ("seeds", (metric or "utility").replace("_", " "), "worst leakage", "bytes", f"{phase} time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            escape(point.name) + (" *" if point in front else ""),
            str(len(point.seeds)),
            _spread(None if metric is None else point.utility(metric)),
            _spread(point.worst),
            _mean(point.nbytes(), count),
            _mean(point.seconds(phase), seconds),
        )
    return table


def _caption(starred: bool) -> str:
    line = "mean ± standard deviation over seeds; leakage: 0 nothing, 1 everything"
    return f"{line}\n* on the Pareto front: nothing else is both more useful and leaks less" if starred else line


def _spread(found: Spread | None) -> str:
    if found is None:
        return "—"
    return f"{found.mean:.3f}" if found.n == 1 else f"{found.mean:.3f} ± {found.std:.3f}"


def _mean(found: Spread | None, show: Callable[[float], str]) -> str:
    return "—" if found is None else show(found.mean)
