"""The trade-off as an interactive plot: plotly's script and data inline, nothing fetched."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.figures import count, seconds, spread
from experiments.plots import NEUTRAL, Style, styles
from experiments.record import UNDERTRAINED, Record
from experiments.summary import Mark, Spread, marks, pareto_front, summarise, utility_metric

__all__ = ["interactive_tradeoff"]

PLOT_ID = "tradeoff-plot"
BUTTONS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]  # none that talks to a server
PANEL_PIXELS = 520  # height of one row of panels


def interactive_tradeoff(records: Sequence[Record]) -> str | None:
    """Return an HTML fragment with the plot and the script that draws it; None where there is nothing to plot."""
    from plotly.io import to_html  # only where a report is written

    points = [point for point in summarise(records) if point.protects]
    metric = utility_metric(points)
    panels = marks(points, metric)
    if metric is None or not panels:
        return None
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    layout: dict[str, Any] = {
        "height": PANEL_PIXELS * rows,
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 13, "color": NEUTRAL},
        "margin": {"l": 60, "r": 16, "t": 30, "b": 130},
        "legend": {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": NEUTRAL, "activecolor": NEUTRAL},
        "hoverlabel": {"align": "left"},
        "annotations": [],
        "shapes": [],
    }
    traces: list[dict[str, Any]] = []
    look = styles(points)
    for number, (setting, members) in enumerate(panels.items()):
        suffix = "" if number == 0 else str(number + 1)
        traces += _traces(members, metric, look, suffix, legend=number == 0)
        across, down = number % columns, number // columns
        x = [across / columns + 0.05 * (across > 0), (across + 1) / columns - 0.02 * (across < columns - 1)]
        y = [1 - (down + 1) / rows + 0.27 / rows * (rows > 1), 1 - down / rows]
        axis = {"gridcolor": "rgba(128,128,128,.22)", "zeroline": False, "linecolor": NEUTRAL, "ticks": "outside"}
        layout[f"xaxis{suffix}"] = {
            **axis,
            "domain": x,
            "anchor": f"y{suffix}",
            "title": {"text": _plain(metric.replace("_", " "))},
        }
        title = {"text": "leakage (worst attack's advantage)"} if across == 0 else {}
        layout[f"yaxis{suffix}"] = {**axis, "domain": y, "anchor": f"x{suffix}", "range": [-0.05, 1.06], "title": title}
        heading = {"text": _plain(setting.title), "x": x[0], "xanchor": "left", "y": y[1], "yanchor": "bottom"}
        layout["annotations"].append({**heading, "xref": "paper", "yref": "paper", "showarrow": False})
        layout["shapes"].append(_nothing_seen(suffix, legend=number == 0))
    shown = {entry["name"] for entry in traces if entry["showlegend"]}
    for trace in traces:  # a protection that is missing from the first panel still gets its entry
        if trace["name"] not in shown and trace.get("legendgroup"):
            trace["showlegend"] = True
            shown.add(trace["name"])
    return str(
        to_html(
            {"data": traces, "layout": layout},
            config={"displaylogo": False, "responsive": True, "displayModeBar": "hover", "modeBarButtons": BUTTONS},
            include_plotlyjs=True,
            full_html=False,
            div_id=PLOT_ID,
            default_width="100%",
            default_height=f"{layout['height']}px",
        )
    )


def _nothing_seen(suffix: str, *, legend: bool) -> dict[str, Any]:
    """Return the line of the no-observation baseline, across its whole panel."""
    return {
        "type": "line",
        "name": "attacker who saw nothing",
        "showlegend": legend,
        "xref": f"x{suffix} domain",
        "yref": f"y{suffix}",
        "x0": 0,
        "x1": 1,
        "y0": 0,
        "y1": 0,
        "line": {"color": NEUTRAL, "width": 1.5, "dash": "dot"},
    }


def _traces(
    members: Sequence[Mark], metric: str, look: Mapping[str, Style], suffix: str, *, legend: bool
) -> list[dict[str, Any]]:
    axes = {"type": "scatter", "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    places = [mark.place for mark in members]
    front = pareto_front(places)
    halo = {"color": "rgba(128,128,128,.3)", "width": 10, "shape": "vh"}  # a step: nothing is measured between marks
    traces: list[dict[str, Any]] = [
        {
            **axes,
            "name": "Pareto front",
            "legendgroup": "front",
            "showlegend": legend,
            "mode": "lines",
            "hoverinfo": "skip",
            "line": halo,
            "x": [places[number][0] for number in front],
            "y": [places[number][1] for number in front],
        }
    ]
    for protection, style in look.items():
        mine = [mark for mark in members if mark.point.protection == protection]
        variants = dict.fromkeys(mark.point.variant for mark in mine)
        for variant in variants:
            line = [mark for mark in mine if mark.point.variant == variant]
            name = f"{style.label} ({variant})" if variant else style.label
            traces.append({**axes, **_line(line, metric, style), "name": _plain(name), "showlegend": legend})
    return traces


def _line(line: Sequence[Mark], metric: str, style: Style) -> dict[str, Any]:
    return {
        "legendgroup": style.label,
        "mode": "lines+markers",
        "line": {"color": style.colour, "width": 1.3},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 17 if style.symbol == "star" else 11},
        "x": [mark.utility.mean for mark in line],
        "y": [mark.leakage.mean for mark in line],
        "error_x": _error([mark.utility for mark in line], style.colour),
        "error_y": _error([mark.leakage for mark in line], style.colour),
        "text": [_hover(mark, metric) for mark in line],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _error(spreads: Sequence[Spread], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [found.high - found.mean for found in spreads],
        "arrayminus": [found.mean - found.low for found in spreads],
        "color": colour,
        "thickness": 1.1,
        "width": 3,
    }


def _hover(mark: Mark, metric: str) -> str:
    """Return all figures of a point; plotly reads a little HTML, so whatever came from outside is escaped."""
    point = mark.point
    lines = [f"<b>{_plain(point.name)}</b>", f"{_plain(metric.replace('_', ' '))} {spread(mark.utility)}"]
    for attack in point.attacks:
        advantage = Spread.of(leak.advantage for leak in point.leaks(attack))
        doubt = f" ({UNDERTRAINED})" if any(leak.standing == UNDERTRAINED for leak in point.leaks(attack)) else ""
        lines.append(f"leakage, {_plain(attack)}: {spread(advantage)}{doubt}")
    for name, figure, show in (
        ("bytes up", point.nbytes("up"), count),
        ("bytes down", point.nbytes("down"), count),
        ("training", point.seconds("train"), seconds),
        ("peak memory", point.peak_memory, count),
    ):
        if figure is not None:
            lines.append(f"{name} {show(figure.mean)}")
    lines.append(f"seeds {', '.join(str(seed) for seed in point.seeds)}")
    return "<br>".join(lines)


def _plain(text: str) -> str:
    """Return text that plotly reads neither as HTML nor as TeX."""
    return html.escape(text).replace("$", "&#36;")
