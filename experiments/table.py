"""The table in which a run ends: what each protection kept of the utility, what still leaked, and what it cost."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from experiments.record import Record
from experiments.summary import Mark, Point, Setting, Spread, marks, pareto_front, summarise, utility_metric

__all__ = ["closing_table"]


def closing_table(records: Iterable[Record]) -> Table:
    """Return one row per configuration, seeds apart: utility, worst leakage, bytes and seconds of a trial."""
    points = summarise(records)
    metric = utility_metric(points)
    front = _front(marks(points, metric))
    phase = "train" if any(point.seconds("train") for point in points) else "total"
    seeds = sorted({len(point.records) for point in points})
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=_caption(seeds, bool(front)),
        caption_justify="left",
        caption_style="dim",
        pad_edge=False,
    )
    table.add_column("protection")
    for heading in (metric or "utility", "worst leakage", "bytes", f"seconds ({phase})"):
        table.add_column(heading, justify="right", no_wrap=True)
    setting = None
    for point in points:
        if point.setting != setting:
            setting = point.setting
            table.add_section()
            table.add_row(f"[bold]{_plain(setting.title)}[/bold]")
        table.add_row(
            f"{_plain(point.name)}{' *' if point in front else ''}",
            _spread(None if metric is None else point.utility(metric)),
            _spread(point.worst),
            _nbytes(point.nbytes()),
            _spread(point.seconds(phase), digits=1),
        )
    return table


def _front(found: dict[Setting, list[Mark]]) -> list[Point]:
    """Return the points that no other of their setting beats; none where a setting has but one."""
    return [
        group[number].point
        for group in found.values()
        if len(group) > 1
        for number in pareto_front([mark.place for mark in group])
    ]


def _caption(seeds: Sequence[int], starred: bool) -> str:
    over = " to ".join(str(number) for number in dict.fromkeys((*seeds[:1], *seeds[-1:])))
    several = bool(seeds) and seeds[-1] > 1
    first = f"mean ± standard deviation over {over} seeds" if several else "one seed: no spread"
    return f"{first}\n* no other has at least its utility and no more leakage" if starred else first


def _spread(spread: Spread | None, *, digits: int = 3) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.std:.{digits}f}" if spread.n > 1 else "")


def _nbytes(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    size, unit = spread.mean, "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
