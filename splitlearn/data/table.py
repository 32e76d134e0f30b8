"""Tables from CSV files with a schema: numeric columns as they stand, categorical ones one-hot, one target."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from splitlearn.data.dataset import Dataset
from splitlearn.data.opening import read_text

__all__ = ["Schema", "load_csv"]

Row = tuple[int, list[str]]  # the line on which it ends, and its cells


@dataclass(frozen=True)
class Schema:
    """What the columns of a CSV file mean. Columns that are not named here are left out."""

    target: str
    classes: Mapping[str, int]
    """The label of each spelling of the target, 0 to the number of classes - 1."""
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    separator: str = ","
    header: tuple[str, ...] | None = None
    """The names of all columns where the file has no line of them."""
    comment: str | None = None
    """Lines that begin with this are skipped."""
    group: str | None = None
    """The column whose values tell patients or persons apart."""

    def __post_init__(self) -> None:
        if not self.numeric and not self.categorical:
            raise ValueError("expected numeric or categorical columns, got none; name some in the schema")
        if sorted(set(self.classes.values())) != list(range(len(set(self.classes.values())))):
            raise ValueError(
                f"expected labels 0, 1, … without a gap, got {sorted(set(self.classes.values()))}; renumber"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.numeric, *self.categorical, self.target, *([self.group] if self.group else []))


def load_csv(path: str | Path, schema: Schema, *, test: str | Path | None = None, name: str | None = None) -> Dataset:
    """Return a table, x [N, F]: the numeric columns unscaled, then a 0/1 column for each value of each category.

    Where a ``test`` file is given, its rows follow as the official test set, categories are those of the training
    rows, and a value that only the test set has is all zeros. Numbers are not scaled here, since what the victim
    trains on is not known yet: use ``standardise(split(…))``. Files are UTF-8, gzipped or plain.
    """
    path = Path(path)
    rows = _read(path, schema)
    num_train = None
    sources = [(path, row) for row in rows]
    if test is not None:
        num_train = len(rows)
        sources += [(Path(test), row) for row in _read(Path(test), schema)]
    columns = {column: [row[1][place] for _, row in sources] for place, column in enumerate(schema.columns)}
    parts = [_numbers(column, columns[column], sources) for column in schema.numeric]
    names = list(schema.numeric)
    for column in schema.categorical:
        values = sorted(set(columns[column][:num_train]))
        places = {value: place for place, value in enumerate(values)}
        chosen = np.array([places.get(value, -1) for value in columns[column]])
        parts.append((chosen[:, None] == np.arange(len(values))).astype(np.float32))
        names += [f"{column}={value}" for value in values]
    y = torch.tensor(
        [_label(schema, value, source) for value, source in zip(columns[schema.target], sources, strict=True)]
    )
    groups = None
    if schema.group:
        groups = torch.from_numpy(np.unique(columns[schema.group], return_inverse=True)[1]).long()
    return Dataset(
        name or path.name.split(".")[0],
        torch.from_numpy(np.concatenate(parts, axis=1)),
        y,
        len(set(schema.classes.values())),
        "table",
        torch.arange(len(y)),
        num_train,
        groups,
        tuple(names),
    )


def _read(path: Path, schema: Schema) -> list[Row]:
    """Return the cells of the schema's columns, in its order, row by row."""
    lines = read_text(path).split("\n")
    if schema.comment:  # blanked, not dropped, so that line numbers stay
        lines = ["" if line.startswith(schema.comment) else line for line in lines]
    reader = csv.reader(lines, delimiter=schema.separator, skipinitialspace=True, strict=True)
    rows: list[Row] = []
    try:
        header = list(schema.header) if schema.header else next((row for row in reader if row), [])
        missing = [column for column in schema.columns if column not in header]
        if missing:
            raise ValueError(
                f"{path}: expected the columns {', '.join(missing)}, got {', '.join(header)[:200] or 'an empty file'}; "
                "check the separator and the schema"
            )
        places = [header.index(column) for column in schema.columns]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                line = f"{path}, line {reader.line_num}"
                raise ValueError(f"{line}: expected {len(header)} cells, got {len(row)}; check the separator")
            rows.append((reader.line_num, [row[place].strip() for place in places]))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV line ({error}); mend the file") from error
    if not rows:
        raise ValueError(f"{path}: expected rows below the header, got none; fetch the file again")
    return rows


def _numbers(column: str, cells: list[str], sources: list[tuple[Path, Row]]) -> np.ndarray:
    try:
        numbers = np.array(cells).astype(np.float32)
    except ValueError:
        numbers = np.array([_number(cell) for cell in cells], dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        path, (line, _) = sources[wrong[0]]
        raise ValueError(
            f"{path}, line {line}: expected a finite number in column {column!r}, got {cells[wrong[0]]!r}; "
            "mend the file, or call the column categorical"
        )
    return numbers[:, None]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _label(schema: Schema, value: str, source: tuple[Path, Row]) -> int:
    if value not in schema.classes:
        path, (line, _) = source
        raise ValueError(
            f"{path}, line {line}: expected {schema.target!r} among {', '.join(schema.classes)}, got {value!r}; "
            "add it to the schema's classes"
        )
    return schema.classes[value]
