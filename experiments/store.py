"""The store: a folder of trials, each with its record, reconstructions and, if it failed, its traceback."""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from experiments.record import Record
from splitlearn.checkpoint import write_atomically

__all__ = ["RESULT_COLUMNS", "Store", "files", "strength_order", "write_atomically"]

IMAGES, TRACEBACK, RECORD = "images.safetensors", "traceback.txt", "record.json"

RESULT_COLUMNS = (
    "trial",
    "seed",
    "data",
    "protocol",
    "cut",
    "protection",
    "strength",
    "attack",
    "metric",
    "value",
    "baseline",
)


@dataclass(frozen=True)
class Store:
    """Trials under ``root/trials/<trial>/``: ``record.json``, ``images.safetensors``, ``traceback.txt``.

    ``record.json`` is written last, so that a trial counts only when all of it is there. Making a store
    touches nothing; ``prepare`` makes the folders and proves that they can be written.
    """

    root: Path

    def prepare(self) -> None:
        """Make the folders and write a probe; ``ValueError`` where that fails, before any work is done."""
        probe = self.root / "trials" / f".probe.{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"expected a folder that can be written, got {self.root}: {error.strerror or error}; "
                "choose another with --out"
            ) from error

    def save(self, record: Record, images: Mapping[str, Tensor] | None = None, traceback: str | None = None) -> None:
        """Write one trial in place of an earlier one of the same hash.

        ``images`` maps ``original`` and attack names to [n, C, H, W] in [0, 1], C = 1 or 3; all of one shape.
        """
        self.write(record.trial, files(record, images, traceback))

    def write(self, trial: str, contents: Mapping[str, bytes]) -> None:
        """Write the ``files`` of one trial, which may have come from elsewhere, in place of earlier ones."""
        for name in (IMAGES, TRACEBACK, RECORD):
            if name in contents:
                write_atomically(self._folder(trial) / name, contents[name])
        for name in {IMAGES, TRACEBACK} - set(contents):
            (self._folder(trial) / name).unlink(missing_ok=True)

    def load(self, trial: str) -> Record | None:
        """Return the record of ``trial``, or None if there is none; ``ValueError`` if the file is corrupt."""
        path = self._record(trial)
        try:
            record = Record.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"expected a record in {path}, got {where or 'text'}: {first['msg']}; "
                f"delete the folder {path.parent} and run the trial again"
            ) from error
        if record.trial != trial:
            raise ValueError(
                f"expected the record of trial {trial} in {path}, got that of {record.trial}; "
                f"rename the folder to {record.trial}, or delete it"
            )
        return record

    def finished(self, trial: str) -> bool:
        """Return whether ``trial`` is there and done."""
        record = self.load(trial)
        return record is not None and record.status == "done"

    def records(self) -> list[Record]:
        """Return every record, sorted by what was run, then strength and seed; a corrupt file is an error."""
        records, problems = self.survey()
        if problems:
            raise ValueError(problems[0])
        return records

    def survey(self) -> tuple[list[Record], list[str]]:
        """Return the records that can be read, sorted, and one line about each that cannot."""
        records: list[Record] = []
        problems: list[str] = []
        for path in sorted(self.root.glob("trials/*/record.json")):
            try:
                record = self.load(path.parent.name)
            except ValueError as error:
                problems.append(str(error))
            else:
                records.extend([record] if record is not None else [])
        return sorted(records, key=_order), problems

    def images(self, trial: str) -> dict[str, Tensor]:
        """Return the trial's images by name, [n, C, H, W] in [0, 1]; empty where it kept none."""
        path = self._images(trial)
        try:
            return load(path.read_bytes())
        except FileNotFoundError:
            return {}
        except SafetensorError as error:
            raise ValueError(
                f"expected images in {path}, got: {error}; delete the folder {path.parent} and run the trial again"
            ) from error

    def traceback(self, trial: str) -> str:
        """Return the traceback of a failed trial; empty where there is none."""
        path = self._traceback(trial)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def write_results(self, records: Sequence[Record] | None = None) -> Path:
        """Write ``results.csv``, one row per trial and metric, of ``records`` or of all; return its path.

        ``attack`` is empty for utility and cost; ``baseline`` is the best that an attacker who saw nothing
        reaches.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(RESULT_COLUMNS)
        for record in self.records() if records is None else records:
            labels = [record.trial, record.seed, record.data, record.protocol, record.cut]
            labels += [record.protection, record.strength]
            table.writerows([*labels, *row] for row in _rows(record))
        return write_atomically(self.root / "results.csv", text.getvalue().encode())

    def _folder(self, trial: str) -> Path:
        return self.root / "trials" / trial

    def _record(self, trial: str) -> Path:
        return self._folder(trial) / RECORD

    def _images(self, trial: str) -> Path:
        return self._folder(trial) / IMAGES

    def _traceback(self, trial: str) -> Path:
        return self._folder(trial) / TRACEBACK


def files(record: Record, images: Mapping[str, Tensor] | None = None, traceback: str | None = None) -> dict[str, bytes]:
    """Return the content of one trial's files by name; ``ValueError`` for what cannot be kept. See ``Store.save``."""
    contents = {IMAGES: _packed(images)} if images else {}
    if traceback is not None:
        contents[TRACEBACK] = traceback.encode()
    return {**contents, RECORD: f"{record.model_dump_json(indent=2)}\n".encode()}


def _rows(record: Record) -> Iterator[tuple[str, str, float, float | str]]:
    """Yield attack, metric, value and baseline of every figure in a record."""
    for name, value in record.utility.items():
        yield "", name, value, ""
    for direction, kinds in record.nbytes.items():
        yield "", f"bytes_{direction}", sum(kinds.values()), ""
        for kind, nbytes in kinds.items():
            yield "", f"bytes_{direction}_{kind}", nbytes, ""
    if record.nbytes:
        yield "", "bytes_total", sum(sum(kinds.values()) for kinds in record.nbytes.values()), ""
    for phase, seconds in record.seconds.items():
        yield "", f"seconds_{phase}", seconds, ""
    if record.peak_memory_bytes:
        yield "", "peak_memory_bytes", record.peak_memory_bytes, ""
    if record.epsilon is not None:
        yield "", "epsilon", record.epsilon, ""
    for leak in record.leakage:
        yield leak.attack, "advantage", leak.advantage, ""
        for name, value in leak.metrics.items():
            baseline = leak.baseline(name)
            yield leak.attack, name, value, "" if baseline is None else baseline


def _packed(images: Mapping[str, Tensor]) -> bytes:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    shape = shapes.get("original", ())
    if len(set(shapes.values())) > 1 or len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"expected images 'original' and one per attack, all of one [n, 1 or 3, H, W], got {shapes}")
    return save({name: image.detach().cpu().contiguous().clone() for name, image in images.items()})


def _order(record: Record) -> tuple[object, ...]:
    return (
        record.data,
        record.protocol,
        record.cut,
        record.protection != "none",
        record.protection,
        strength_order(record.strength),
        record.seed,
        record.trial,
    )


def strength_order(strength: str) -> tuple[float, str]:
    """Return a key that sorts strengths by their first number (0.5 before 2 before 10); without one, last."""
    number = re.search(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", strength, re.IGNORECASE)
    if number is not None:
        return float(number[0]), strength
    return float("inf") if strength else float("-inf"), strength
