"""Pictures of poisoning: the worst attack on each defense, and accuracy against the success of backdoors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.cost_bars import below
from experiments.figures import number
from experiments.plots import COLOURS, MARKERS, literal, written
from experiments.record import Leakage, Record
from experiments.summary import Point, summarise
from experiments.tables import Table

__all__ = ["backdoors", "poison_table", "poisonings"]

FAMILIES = {"accuracy": "poisoning", "success": "backdoor"}
WORST = {"accuracy": min, "success": max}
NONE = "—"
TOLD = {
    "success": "success", "out_of_bad": "bad shut out", "out_of_honest": "honest shut out",
    "flagged_poison": "poison flagged", "flagged_honest": "honest flagged", "flagged_target": "trigger's class flagged",
    "flagged_others": "other classes flagged",
}  # fmt: skip


def poisonings(records: Sequence[Record], path: Path) -> Path | None:
    """Draw a heatmap for accuracy and one for success, whose cells are the worst attack; None where none poisoned."""
    points = _poisoned(records)
    metrics = [metric for metric in WORST if any(_leaks(point, metric) for point in points)]
    if not metrics:
        path.unlink(missing_ok=True)
        return None
    told = {metric: [point for point in points if _leaks(point, metric)] for metric in metrics}
    rows = [len({_row(point) for point in some}) for some in told.values()]
    columns = [len({_column(point) for point in some}) for some in told.values()]
    size = (max(9.0, sum(2.6 + 1.75 * count for count in columns)), 3.4 + 0.52 * max(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(metrics), squeeze=False, width_ratios=columns)[0]
    for axes, (metric, some) in zip(grid, told.items(), strict=True):
        _heat(axes, some, metric)
    figure.suptitle("What bad members do, and what survives: the worst attack", fontsize=13, fontweight="bold")
    note = (
        "Cells: the worst attack's figure, mean over the seeds, each seed below it, and which attack. Accuracy is on "
        "clean test samples, under attacks on it; success is the share of samples that the trigger turns to its class."
    )
    below(figure, note)
    return written(figure, path)


def backdoors(records: Sequence[Record], path: Path) -> Path | None:
    """Draw accuracy against a backdoor's success, a panel a setting, a dot a seed; None where there was no backdoor."""
    points = [point for point in _poisoned(records) if _leaks(point, "success")]
    if not points:
        path.unlink(missing_ok=True)
        return None
    settings = list(dict.fromkeys((point.setting, point.strength) for point in points))
    figure = Figure(figsize=(max(9.0, 1.8 + 4.4 * len(settings)), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(_row(point) for point in points))
    for axes, (setting, strength) in zip(grid, settings, strict=True):
        for point in points:
            if (point.setting, point.strength) != (setting, strength):
                continue
            look = names.index(_row(point))
            worst = [_worst(record, "success") for record in point.records]
            found = [(leak.metrics["accuracy"], leak.metrics["success"]) for leak in worst if leak is not None]
            axes.scatter(
                [success for _, success in found], [accuracy for accuracy, _ in found], s=46, alpha=0.85,
                color=COLOURS[look % len(COLOURS)], marker=MARKERS[look % len(MARKERS)],
                label=literal(_row(point)),
                edgecolors="white", linewidths=0.6,
            )  # fmt: skip
        axes.set_xlim(-0.04, 1.04)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(literal(f"{setting.title}\n{strength}"), fontsize=9.5)
        axes.set_xlabel("success of the worst backdoor")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("accuracy on clean samples")
    handles = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle("Backdoors: what gets in, and at what accuracy", fontsize=12, fontweight="bold")
    note = "A dot a seed. Upper left is good: accurate, and the trigger means nothing. Lower right has collapsed."
    below(figure, note)
    return written(figure, path)


def poison_table(points: Sequence[Point]) -> Table | None:
    """Return a row for each attack on each configuration, its figures seed by seed."""
    found = [point for point in points if _is_poisoned(point)]
    if not found:
        return None
    rows = []
    for point in found:
        for name in point.attacks:
            leaks = point.leaks(name)
            rows.append(
                (
                    point.setting.title, f"{_row(point)}, {point.strength}", name,
                    str(leaks[0].details.get("surface", "")),
                    _seeds([leak.baselines["accuracy_unattacked"] for leak in leaks]),
                    _seeds([leak.metrics["accuracy"] for leak in leaks]),
                    *(
                        _seeds([leak.baselines[one] for leak in leaks if "success" in leak.metrics])
                        for one in ("success_unattacked", "success_untriggered")
                    ),
                    *(_seeds([leak.metrics[one] for leak in leaks if one in leak.metrics]) for one in TOLD),
                    str(sum(int(leak.details.get("not_finite", 0)) for leak in leaks)),
                )
            )  # fmt: skip
    caption = (
        "Each attack on each defense, a figure a seed. Success, on the model as attacked and unattacked, and without "
        "trigger: the share of samples of other classes that are taken for the trigger's, with it and without; of a "
        "model that collapsed both may be high. Edge cases have no trigger, and count on their tail alone. "
        "Shut out: the share of rounds in which a member had no part in the result, of bad and of honest ones, where "
        "the rule says so (filters: from whom the top did not learn; "
        "witnesses: who is doubted in the end; SafeSplit: whose turn was rolled back). "
        "Flagged: by a filter, the share of poisoned and of honest samples; by Neural Cleanse, the trigger's class and "
        "others."
    )
    columns = (
        "setting", "defense", "attack", "surface", "accuracy unattacked", "accuracy", "success unattacked",
        "without trigger",
        *TOLD.values(), "not finite",
    )  # fmt: skip
    empty = {column for column, told in enumerate(zip(*rows, strict=True)) if set(told) == {NONE}}
    columns, *shown = (
        tuple(cell for column, cell in enumerate(row) if column not in empty) for row in (columns, *rows)
    )
    return Table(caption, columns, tuple(shown), 4)


def _heat(axes: Axes, points: Sequence[Point], metric: str) -> None:
    rows = list(dict.fromkeys(_row(point) for point in points))
    columns = list(dict.fromkeys(_column(point) for point in points))
    values = np.full((len(rows), len(columns)), np.nan)
    for point in points:
        row, column = rows.index(_row(point)), columns.index(_column(point))
        worst = [leak for record in point.records if (leak := _worst(record, metric)) is not None]
        if not worst:
            continue
        values[row, column] = sum(leak.metrics[metric] for leak in worst) / len(worst)
        by = max(leaks := [leak.attack for leak in worst], key=leaks.count)
        text = f"{values[row, column]:.2f}\n{' '.join(f'{leak.metrics[metric]:.2f}' for leak in worst)}\n{by}"
        dark = values[row, column] < 0.45 if metric == "accuracy" else values[row, column] > 0.55
        axes.text(column, row, literal(text), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis" if metric == "accuracy" else "cividis_r", aspect="auto")
    axes.set_xticks(range(len(columns)), [literal(one) for one in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [literal(row) for row in rows], fontsize=8.5)
    axes.set_title({"accuracy": "accuracy under attack", "success": "success of a backdoor"}[metric], fontsize=10)


def _column(point: Point) -> str:
    return "\n".join([*point.setting.parts, *point.strength.split(", ")])


def _poisoned(records: Sequence[Record]) -> list[Point]:
    return [point for point in summarise(records) if _is_poisoned(point)]


def _is_poisoned(point: Point) -> bool:
    return any(leak.family in FAMILIES.values() for record in point.records for leak in record.leakage)


def _row(point: Point) -> str:
    return f"{point.protection} ({point.variant})" if point.variant else point.protection


def _leaks(point: Point, metric: str) -> bool:
    return any(_worst(record, metric) is not None for record in point.records)


def _worst(record: Record, metric: str) -> Leakage | None:
    """Return the attack of this goal that did worst in a trial: on accuracy, or a backdoor."""
    found = [leak for leak in record.leakage if leak.family == FAMILIES[metric]]
    return WORST[metric](found, key=lambda leak: leak.metrics[metric], default=None)


def _seeds(values: Sequence[float]) -> str:
    return " ".join(number(value) for value in values) or NONE
