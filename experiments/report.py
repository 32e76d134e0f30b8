"""The report: plots, table and one self-contained HTML file, made anew from the records of a folder."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.image import imsave

from experiments.compression_plot import compression_curves, compression_table
from experiments.continual_plot import continual
from experiments.controller_plot import controller, controller_table
from experiments.detection_plot import detection, detection_table
from experiments.early_exits_plot import early_exits, exits_table
from experiments.enclave_plot import enclave_leaks, enclave_table
from experiments.figures import number, spread
from experiments.gallery import Row, gallery, strip
from experiments.grid_plot import protection_grid
from experiments.he_plot import he_costs
from experiments.interactive import interactive_tradeoff
from experiments.label_plot import label_table, labels
from experiments.mpc_plot import mpc_costs
from experiments.non_iid_plot import non_iid
from experiments.paradigm_plot import claims_table, paradigm_table, paradigms
from experiments.plots import leakage_note, reconstructions, spread_note, tradeoff
from experiments.poison_plot import backdoors, poison_table, poisonings
from experiments.privacy_plot import privacy
from experiments.progress import counted
from experiments.record import UNDERTRAINED, Record
from experiments.store import Store, write_atomically
from experiments.summary import Mark, Point, marks, pareto_front, summarise, utility_metric
from experiments.tables import (
    accounts_table,
    bytes_table,
    leakage_tables,
    results_tables,
    seconds_table,
    strength_notes,
    visible_table,
)

__all__ = ["build"]

NO_PROTECTION = 0.9  # leakage, of 1, from which on the summary says that nothing is protected
COMPARED = (paradigm_table, claims_table, compression_table, exits_table, enclave_table, controller_table)
TOLERATED_LOSS = 0.02  # of utility, in the sentence on what protects at little cost


@dataclass(frozen=True)
class Picture:
    """A row of samples in the page, its image inline."""

    row: Row
    source: str
    description: str


@dataclass(frozen=True)
class Trial:
    """One trial in the page: its record, its configuration as text, and its traceback if it failed."""

    record: Record
    config: str
    versions: str
    traceback: str


def build(root: Path) -> Path:
    """Write ``results.csv``, the pictures and ``report.html``; return its path.

    The pictures are ``tradeoff.png``, ``reconstructions.png``, where an ε is claimed ``privacy.png``, and of
    ``he_overhead`` ``encryption.png``, of ``mpc_overhead`` ``shares.png``, of ``detection`` ``detection.png``, of
    ``label_leakage`` ``labels.png``, of ``protection_grid``, ``paradigms``, ``non_iid``, ``continual``,
    ``compression``, ``early_exits``, ``enclave`` and ``controller`` one of that name, where members poisoned
    ``poisoning.png`` and ``backdoor.png``.

    A picture that the records have no figures for is left out, and removed if an earlier report left it. A corrupt
    record is told of in the report; ``ValueError`` where there is none at all that can be read.
    """
    store = Store(root)
    records, problems = store.survey()
    if not records:
        found = problems[0] if problems else "got none"
        raise ValueError(
            f"expected records in {root / 'trials'}, {found}; write some first: splitlearn run NAME --out {root}"
        )
    store.write_results(records)
    tradeoff(records, root / "tradeoff.png")
    reconstructions(records, store, root / "reconstructions.png")
    drawn = {
        "privacy": privacy(records, root / "privacy.png"),
        "encryption": he_costs(records, root / "encryption.png"),
        "shares": mpc_costs(records, root / "shares.png"),
        "detection": detection(records, root / "detection.png"),
        "labels": labels(records, root / "labels.png"),
        "poisoning": poisonings(records, root / "poisoning.png"),
        "backdoor": backdoors(records, root / "backdoor.png"),
        "protection_grid": protection_grid(records, root / "protection_grid.png"),
        "paradigms": paradigms(records, root / "paradigms.png"),
        "non_iid": non_iid(records, root / "non_iid.png"),
        "continual": continual(records, root / "continual.png"),
        "controller": controller(records, root / "controller.png"),
        "enclave": enclave_leaks(records, root / "enclave.png"),
        "early_exits": early_exits(records, root / "early_exits.png"),
        "compression": compression_curves(records, root / "compression.png"),
    }
    return write_atomically(root / "report.html", _page(records, problems, store, drawn).encode())


def _page(records: Sequence[Record], problems: Sequence[str], store: Store, drawn: Mapping[str, Path | None]) -> str:
    points = summarise(records)
    failed = [record for record in records if record.status == "failed"]
    plot = interactive_tradeoff(records)
    environment = Environment(
        loader=PackageLoader("experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=" and ".join(dict.fromkeys(record.experiment for record in records)),
        attacked=any(point.attacks for point in points),
        settings=[setting.title for setting in dict.fromkeys(point.setting for point in points)],
        started=sorted(
            record.started.replace("T", " ").replace("+00:00", " UTC") for record in records if record.started
        ),
        summary=_summary(points, failed),
        problems=problems,
        plot=Markup(plot) if plot is not None else None,  # plotly escapes what it embeds
        plot_note=_plot_note([point for point in points if point.protects]),
        **{name: None if path is None else _embedded(path.read_bytes()) for name, path in drawn.items()},
        accounts=accounts_table(points),
        detected=detection_table(points),
        labels_by_epoch=label_table(points),
        poisoned=poison_table(points),
        compared=[table for make in COMPARED if (table := make(points)) is not None],
        pictures=[_picture(row) for row in gallery(records, store)],
        results=results_tables(points),
        strengths=strength_notes(points),
        leakage=leakage_tables(points),
        overhead=[table for table in (bytes_table(points), seconds_table(points)) if table is not None],
        visible=visible_table(points),
        groups=[(point, [_trial(record, store) for record in point.records]) for point in points],
        failed=[_trial(record, store) for record in failed],
    )


def _plot_note(points: Sequence[Point]) -> str:
    return f"{leakage_note(points)} {spread_note(max((len(point.seeds) for point in points), default=0))}"


def _trial(record: Record, store: Store) -> Trial:
    config = json.dumps(record.config, indent=2, sort_keys=True, ensure_ascii=False)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return Trial(record, config, versions, store.traceback(record.trial))


def _picture(row: Row) -> Picture:
    file = io.BytesIO()
    imsave(file, strip(row.images), format="png")
    source = _embedded(file.getvalue())
    what = "private samples" if not row.attack else f"what {row.attack} reconstructs of them, {row.title}"
    return Picture(row, source, f"{len(row.images)} images: {what}")


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _summary(points: Sequence[Point], failed: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return the outcome in plain words: a heading (empty for the first part, or a setting) and its sentences."""
    trials = sum(len(point.records) for point in points)
    seeds = sorted({seed for point in points for seed in point.seeds})
    opening = (
        f"{counted(trials, 'trial')} done: {counted(len(points), 'configuration')}, "
        f"seeds {', '.join(map(str, seeds)) or 'none'}."
    )
    lines = [opening + (f" {len(failed)} failed; see the end of this page." if failed else "")]
    metric = utility_metric([point for point in points if point.protects])
    panels = marks(points, metric)
    if metric is None or not panels:
        told_by = "Nothing was attacked: the table of results holds what was measured."
        if points and not any(point.protects for point in points):
            told_by = (
                "A detector keeps nothing secret: its table says how often and how soon it spoke. What leaks in a "
                "training that is hijacked speaks for no detector."
            )
        elif any(point.attacks for point in points):
            told_by = (
                "Each mechanism protects something else: the picture of ε and the tables compare them within that."
            )
        return [("", [*lines, told_by] if points else lines)]
    told = {setting: list(_trade(members, metric.replace("_", " "))) for setting, members in panels.items()}
    if len(told) == 1:
        return [("", [*lines, *told[next(iter(told))]])]
    return [("", lines), *((setting.title, sentences) for setting, sentences in told.items())]


def _trade(members: Sequence[Mark], metric: str) -> Iterable[str]:
    """Yield the sentences on one setting: unprotected, the front, little cost, no gain, worst leak."""

    def words(mark: Mark) -> str:
        verdict = ", which is no protection" if mark.leakage.mean >= NO_PROTECTION else ""
        verdict += f", by attacks {UNDERTRAINED}: not shown to protect" if mark.point.undertrained() else ""
        return f"{mark.point.name} ({metric} {number(mark.utility.mean)}, leakage {number(mark.leakage.mean)}{verdict})"

    bare = next((mark for mark in members if not mark.point.protected), None)
    if bare is not None:
        yield (
            f"Unprotected, the model reaches {metric} {spread(bare.utility)}; the worst attack, "
            f"{bare.point.attacks[0]}, leaks {spread(bare.leakage)} on a scale from 0 (no better than an attacker "
            "who saw nothing) to 1 (everything)."
        )
    front = [members[place] for place in pareto_front([mark.place for mark in members])]
    told = "; ".join(words(mark) for mark in front)
    yield (
        f"On the Pareto front, where no other has both more {metric} and less leakage, which does not yet make them "
        f"safe: {told}."
    )
    shielded = [mark for mark in members if mark.point.protected]
    if bare is not None and shielded:
        cheap = [mark for mark in shielded if mark.utility.mean >= bare.utility.mean - TOLERATED_LOSS]
        best = min(cheap, key=lambda mark: mark.leakage.mean, default=None)
        yield (
            f"For at most {TOLERATED_LOSS} of {metric}, least leaks under {words(best)}."
            if best is not None
            else f"No protection costs less than {TOLERATED_LOSS} of {metric}."
        )
        idle = [mark.point.name for mark in shielded if mark.leakage.mean >= bare.leakage.low]
        if idle:
            yield f"As leaky as no protection, within the spread over seeds: {', '.join(idle)}."
    worst = max(members, key=lambda mark: mark.leakage.high)
    leak = max((leak for record in worst.point.records for leak in record.leakage), key=lambda leak: leak.advantage)
    yield f"The worst leak in one trial: {number(leak.advantage)}, by {leak.attack}, {worst.point.name}."
