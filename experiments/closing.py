"""The table in which a run ends on the terminal: what was kept of the utility, what still leaked, what it cost."""

from collections.abc import Callable, Iterable

from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.figures import count, seconds, spread
from experiments.record import Record
from experiments.summary import Spread, summarise, utility_metric
from experiments.tables import front_of

__all__ = ["closing_table"]


def closing_table(records: Iterable[Record]) -> Table:
    """Return one row per configuration, seeds apart: utility, worst leakage, and a trial's bytes and time.

    A heading stands over each data set, protocol and cut; failed trials take no part.
    """
    points = summarise(records)
    metric = utility_metric(points)
    front = front_of(points) if len(points) > 1 else []
    phase = "train" if any(point.seconds("train") for point in points) else "total"
    table = Table(box=box.SIMPLE_HEAD, caption=_caption(bool(front)), caption_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("seeds", (metric or "utility").replace("_", " "), "worst leakage", "bytes", f"{phase} time"):
        table.add_column(heading, justify="right")
    setting = None
    for point in points:
        if point.setting != setting:
            setting = point.setting
            table.add_section()
            table.add_row(f"[bold]{escape(setting.title)}[/bold]")
        table.add_row(
            escape(point.name) + (" *" if point in front else ""),
            str(len(point.seeds)),
            spread(None if metric is None else point.utility(metric)),
            spread(point.worst),
            _mean(point.nbytes(), count),
            _mean(point.seconds(phase), seconds),
        )
    return table


def _caption(starred: bool) -> str:
    line = "means over seeds (lowest to highest seed); leakage: 0 is nothing, 1 is everything"
    return f"{line}\n* on the Pareto front: nothing else is both more useful and leaks less" if starred else line


def _mean(found: Spread | None, show: Callable[[float], str]) -> str:
    return "—" if found is None else show(found.mean)
