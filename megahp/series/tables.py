"""Series from CSV, JSON lines and Parquet files: a value a record (long format), or a series a record.

A record's value is a number, or a list of them: then the record is a whole series. A CSV file has a header; without a
value column it has a series a row: its name, and then its values. Records of a series are equally spaced in time: what
is missing is a record without a value (empty, null, NaN or NA).
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.files import refuse_irregular

MISSING = ("", "nan", "na", "null", "none")
Record = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of a record's fields; None: "name", "time" and "value", of which the first two may be absent."""

    name: str | None = None
    time: str | None = None
    value: str | None = None

    def find(self, record: Record, column: str, path: Path) -> str | None:
        """Return this column's name in a record; None if it is neither there nor asked for. Raises UserError."""
        asked = getattr(self, column)
        if (asked or column) in record:
            return asked or column
        if asked or column == "value":
            there = ", ".join(map(repr, list(record)[:10]))
            raise UserError(f"{path} has no column {asked or column!r}, but {there}; name it with --{column}-column")
        return None


def read_series(paths: Iterable[Path], columns: Columns) -> dict[str, np.ndarray]:
    """Return the series of these files by name, each float64 in order of time, NaN = missing.

    Without a name column a file is one series, or a record is, named by file and record. Raises UserError for a file
    that cannot be read, has another ending than .csv, .jsonl or .parquet, or holds no numbers there; for a name that
    comes again, and a time that a series has twice.
    """
    found: dict[str, np.ndarray] = {}
    for path in paths:
        parts: dict[str, list[tuple[Any, Any]]] = {}
        whole: set[str] = set()  # series that a record has made
        for number, record in enumerate(_records(path, columns), 1):
            name, time, value = (columns.find(record, column, path) for column in ("name", "time", "value"))
            assert value
            is_whole, named = isinstance(record[value], list | tuple), str(record[name]) if name else path.stem
            if is_whole:
                named = named if name else f"{path.stem}:{number}"
                values = [(at, each) for at, each in enumerate(record[value])]
            else:
                values = [(record[time] if time else number, record[value])]
            if named in (parts if is_whole else whole):
                raise UserError(f"{path}: series {named!r} comes again in record {number}; give each a name of its own")
            if is_whole:
                whole.add(named)
            parts.setdefault(named, []).extend(values)
        for named, values in parts.items():
            if named in found:
                raise UserError(f"{path}: series {named!r} is in another file too; give each a name of its own")
            found[named] = np.array([_number(value, path, named) for _, value in _in_time(values, path, named)])
    return found


def unusable(history: np.ndarray, horizon: int) -> str:
    """Return why no forecast over this horizon can be made from a history; "" if one can."""
    known = history[~np.isnan(history)]
    if len(known) == 1:
        return "it has one value"
    if horizon > len(history):
        return f"a horizon of {horizon} is longer than its history of {len(history)}"
    if not len(known):
        return "no value is known"
    return "it is constant" if known.min() == known.max() else ""


def _records(path: Path, columns: Columns) -> Iterator[Record]:
    """Yield a file's records. Raises UserError."""
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    try:
        refuse_irregular(path, "series", "name another file")
        if path.suffix not in readers:
            raise UserError(f"series {path} is none of {', '.join(readers)}; name it so, or convert it")
        yield from readers[path.suffix](path, columns)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"series {path} cannot be read: {' '.join(str(error).split())}; correct it") from None


def _csv(path: Path, columns: Columns) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        is_long = columns.value is not None or "value" in header
        steps = {b - a for a, b in pairwise(map(_finite, header[1:])) if a is not None and b is not None}
        if not is_long and len(steps) > 1:  # one step: years, or numbers of places
            raise ValueError("line 1 must be a header, and holds values")
        for number, row in enumerate(rows, 2):
            if is_long and len(row) not in (0, len(header)):
                raise ValueError(f"line {number} has {len(row)} cells, and the header {len(header)}")
            if is_long and row:
                yield dict(zip(header, row, strict=True))
            elif row:
                while row and not row[-1].strip():  # a shorter series than others
                    row.pop()
                yield {columns.name or "name": row[0] if row else "", columns.value or "value": row[1:]}


def _json_lines(path: Path, _: Columns) -> Iterator[Record]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise ValueError(f"line {number} holds no object")
            if record:
                yield record


def _parquet(path: Path, _: Columns) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"series {path} needs the package 'pyarrow'; pip install pyarrow") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error


def _in_time(values: list[tuple[Any, Any]], path: Path, name: str) -> Sequence[tuple[Any, Any]]:
    """Return (time, value) by time: as numbers where all are, else as they compare (ISO dates, as texts). Raises
    UserError for times of several kinds, and for one that comes twice."""
    times = [time for time, _ in values]
    numbers = [number for time in times if (number := _finite(time)) is not None]
    try:
        if 0 < len(numbers) < len(times):  # of texts alone it would be the order of the alphabet
            raise TypeError
        ordered = sorted(zip(numbers or times, (value for _, value in values), strict=True), key=itemgetter(0))
    except TypeError:
        raise UserError(f"{path}: times of series {name!r} do not compare; write all alike") from None
    for (time, _), (after, _) in pairwise(ordered):
        if time == after:
            raise UserError(f"{path}: series {name!r} has the time {time!r} twice; name its column, or correct it")
    return ordered


def _finite(time: Any) -> float | None:
    """Return a time as a finite number; None where it is none."""
    try:
        number = float(time)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number(value: Any, path: Path, name: str) -> float:
    if value is None or isinstance(value, str) and value.strip().lower() in MISSING:
        return math.nan
    try:
        number = float(value) if not isinstance(value, bool) else math.inf
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise UserError(f"{path}: series {name!r} holds {value!r}, which is no finite number; correct it")
    return number
