"""The picture and the table of detection: how well scores tell honest servers from others, and how soon."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import by_setting, noted
from experiments.detection import DETECTED_AT, HONEST, READY, SUSPICION
from experiments.figures import number
from experiments.plots import COLOURS, MARKERS, NEUTRAL, literal, written
from experiments.record import Record
from experiments.summary import Point
from experiments.tables import Table
from splitlearn.metrics import auc

__all__ = ["detection", "detection_table"]

EXPERIMENT = "detection"
TOO_FEW = "too few batches"


def detection(records: Sequence[Record], path: Path) -> Path | None:
    """Draw ROC curves and the batches until a verdict, a row a setting; None, and no file, where none was watched."""
    settings = by_setting(records, EXPERIMENT)
    if not settings:
        path.unlink(missing_ok=True)
        return None
    figure = Figure(figsize=(12, 4.6 * len(settings) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(settings), 2, squeeze=False)
    for (left, right), (setting, members) in zip(grid, settings.items(), strict=True):
        _curves(left, members)
        _times(right, members)
        left.set_title(literal(setting.title), fontsize=10.5)
    figure.suptitle("Does the client notice that the server hijacks the training?", fontsize=14, fontweight="bold")
    note = (
        "Left: each score of a detector is one decision; all scores of honest servers against all of the others. "
        "Right: the batch at which the detector spoke, a mark a seed; a mark of an honest server is a false alarm."
    )
    noted(figure, note, [point for members in settings.values() for point in members])
    return written(figure, path)


def detection_table(points: Sequence[Point]) -> Table | None:
    """Return a row for each detector and server: how often and how soon it spoke, and how well its scores tell."""
    watched = [point for point in points if point.records[0].experiment == EXPERIMENT]
    if not watched:
        return None
    rows = []
    for point in watched:
        spoken = _spoken(point)
        honest = _honest(point, watched)
        area = "—" if point.strength == HONEST or honest is None else number(_area(honest, point))
        scores = [score for record in point.records for score in record.traces.get("scores", [])]
        able = _able(point)
        short = len(point.records) - able
        rows.append(
            (
                point.setting.title, point.protection, point.strength,
                f"{len(spoken)} of {able}" + (f", {short} with {TOO_FEW}" if short else ""),
                number(statistics.median(spoken)) if spoken else "never" if able else TOO_FEW, area,
                number(statistics.median(scores)) if scores else "—",
            )
        )  # fmt: skip
    caption = (
        "How often the detector spoke, the median batch at which it did, the area under the ROC curve of its scores "
        "against those under an honest server, and the median score. Where the server is honest, speaking is a false "
        f"alarm. With {TOO_FEW} no detector could have spoken, and none is counted."
    )
    columns = ("setting", "detector", "server", "spoke", "at batch", "ROC area", "median score")
    return Table(caption, columns, tuple(rows), 3)


def _curves(axes: Axes, members: Sequence[Point]) -> None:
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle=":")
    others = [point for point in members if point.strength != HONEST]
    names = list(dict.fromkeys(point.protection for point in others))
    servers = list(dict.fromkeys(point.strength for point in others))
    for point in others:
        honest = _honest(point, members)
        if honest is None or not _suspicion(point):
            continue
        colour = COLOURS[names.index(point.protection) % len(COLOURS)]
        style = ("-", "--", ":", "-.")[servers.index(point.strength) % 4]
        below, above = _suspicion(honest), _suspicion(point)
        cuts = sorted({*below, *above}, reverse=True)
        false = [0.0, *(sum(score >= at for score in below) / len(below) for at in cuts)]
        true = [0.0, *(sum(score >= at for score in above) / len(above) for at in cuts)]
        label = f"{point.protection} against {point.strength}: {_area(honest, point):.3f}"
        axes.plot(false, true, style, color=colour, label=label, drawstyle="steps-post")
    axes.set_xlabel("honest scores past the threshold")
    axes.set_ylabel("scores under attack past the threshold")
    if len(axes.get_lines()) > 1:  # beside the diagonal
        axes.legend(frameon=False, fontsize=8, title="area under the curve", title_fontsize=8, loc="lower right")


def _times(axes: Axes, members: Sequence[Point]) -> None:
    batches = max((len(r.traces.get(SUSPICION, [])) for p in members for r in p.records), default=1)
    last = max([1, batches, *(spoken for point in members for spoken in _spoken(point))])
    names = list(dict.fromkeys(point.protection for point in members))
    for place, point in enumerate(members):
        look = names.index(point.protection)
        spoken = _spoken(point)
        able, of = _able(point), len(point.records)
        silent = [f"never ({able - len(spoken)} of {of})"] if able > len(spoken) else []
        silent += [f"{TOO_FEW} ({of - able} of {of})"] if able < of else []
        colour, marker = COLOURS[look % len(COLOURS)], MARKERS[look % len(MARKERS)]
        axes.plot(spoken, [place] * len(spoken), marker, color=colour)
        if silent:
            axes.text(last * 1.03, place, ", ".join(silent), va="center", fontsize=8)
    axes.set_yticks(range(len(members)), [literal(f"{p.protection}, {p.strength}") for p in members], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, last * 1.35)
    axes.set_xlabel("batches until the detector spoke")


def _honest(point: Point, members: Sequence[Point]) -> Point | None:
    alike = [one for one in members if (one.setting, one.protection) == (point.setting, point.protection)]
    return next((one for one in alike if one.strength == HONEST and _suspicion(one)), None)


def _suspicion(point: Point) -> list[float]:
    return [score for record in point.records for score in record.traces.get(SUSPICION, [])]


def _spoken(point: Point) -> list[float]:
    return [at for record in point.records for at in record.traces.get(DETECTED_AT, [])]


def _able(point: Point) -> int:
    """Return in how many trials the detector had the scores that a verdict takes; a record may not say."""
    return sum(record.traces.get(READY, [1.0]) == [1.0] for record in point.records)


def _area(honest: Point, other: Point) -> float:
    below, above = _suspicion(honest), _suspicion(other)
    if not above:
        return float("nan")
    return auc(torch.tensor(below + above), torch.tensor([0] * len(below) + [1] * len(above)))
