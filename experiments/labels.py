"""Writes labels beside the marks of a plot, where they cover the least of what is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["Label", "write_labels"]

Boxes = NDArray[numpy.float64]  # [n, 4]: left, low, right, high in pixels

GAPS = (7, 12, 20, 30, 42)  # points between a mark and its label, tried in this order
TURNS = (4, 0, 8, 12, 2, 6, 14, 10, 1, 3, 5, 7, 9, 11, 13, 15)  # sixteenths of a turn, the readable ones first
LEADER_POINTS = 19  # a label further away than this gets a line to its mark


@dataclass(frozen=True)
class Label:
    """A text for the mark at ``place`` (data coordinates)."""

    text: str
    place: tuple[float, float]
    colour: str


def write_labels(
    axes: Axes,
    labels: Sequence[Label],
    *,
    segments: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    fontsize: float = 8.5,
) -> None:
    """Write the labels into ``axes``, whose layout is final; keep off their marks, ``segments`` and each other.

    ``segments`` are the lines and bars drawn, as pairs of places in data coordinates.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    marks = axes.transData.transform(numpy.array([label.place for label in labels]).reshape(-1, 2))
    taken = numpy.concatenate([_around(marks, 5 * scale), *(_along(axes, segment, scale) for segment in segments)])
    frame = numpy.array(axes.get_window_extent(renderer).extents)
    for label in labels:
        note = axes.annotate(
            label.text,
            label.place,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=fontsize,
            color=label.colour,
            zorder=5,
        )
        note.set_in_layout(False)
        box = numpy.array(note.get_window_extent(renderer).extents)
        width, height = (box[2:] - box[:2]) / scale
        shifts = _shifts(width, height)
        moved = box + scale * numpy.tile(shifts, 2)
        area = (width * height) * scale**2
        cost = _common(moved, taken).sum(axis=1) + area - _common(moved, frame[None])[:, 0]
        cost += 0.002 * area * numpy.hypot(*shifts.T)
        best = int(cost.argmin())
        x, y = (float(value) for value in shifts[best])
        note.set_position((x, y))
        taken = numpy.concatenate([taken, moved[best, None]])
        if math.hypot(x, y) > LEADER_POINTS:
            line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 6, "shrinkB": 5}
            axes.annotate("", label.place, xytext=(x, y), textcoords="offset points", arrowprops=line)


def _shifts(width: float, height: float) -> Boxes:
    """Return the places, [n, 2] in points, that a label of this size may take around its mark, nearest first."""
    return numpy.array(
        [
            (math.cos(angle) * (width / 2 + gap), math.sin(angle) * (height / 2 + gap))
            for gap in GAPS
            for angle in (math.tau * turn / 16 for turn in TURNS)
        ]
    )


def _along(axes: Axes, segment: tuple[tuple[float, float], tuple[float, float]], scale: float) -> Boxes:
    """Return a row of small boxes along a line."""
    start, end = axes.transData.transform(numpy.array(segment))
    steps = max(2, int(math.hypot(*(end - start)) / (4 * scale)))
    return _around(start + numpy.linspace(0, 1, steps)[:, None] * (end - start), 1.5 * scale)


def _around(centres: Boxes, half: float) -> Boxes:
    return numpy.concatenate([centres - half, centres + half], axis=1)


def _common(boxes: Boxes, others: Boxes) -> Boxes:
    """Return the area that each of ``boxes`` shares with each of ``others``, [n, m]."""
    low = numpy.maximum(boxes[:, None, :2], others[None, :, :2])
    high = numpy.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return numpy.clip(high - low, 0, None).prod(axis=2)
