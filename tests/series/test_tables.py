"""The same series from every format; and what cannot be read, in one line."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from megahp.errors import UserError
from megahp.series.tables import Columns, read_series, unusable

SERIES = {"a": [3.0, np.nan, 1.5, 2.0], "b": [1e9, -2.0]}
DAYS = [date(2026, 1, 30), date(2026, 1, 31), date(2026, 2, 1), date(2026, 2, 2)]


def long_rows(shuffled: bool = True) -> list[tuple[str, date, float]]:
    rows = [(name, day, y) for name, values in SERIES.items() for day, y in zip(DAYS, values, strict=False)]
    return [rows[n] for n in (3, 5, 0, 4, 2, 1)] if shuffled else rows


def write(path: Path, form: str) -> Columns:
    """One of the formats; returns the columns' names."""
    if form == "long.csv":
        rows = (f"{name},{day},{'' if np.isnan(y) else y}\n" for name, day, y in long_rows())
        path.write_text("name,time,value\n" + "".join(rows) + "\n")
    elif form == "rows.csv":
        path.write_text("V1,V2,V3,V4,V5\na,3,NA,1.5,2\nb,1e9,-2,,\n")
    elif form == "lists.jsonl":
        lines = ({"id": k, "target": [None if np.isnan(y) else y for y in v]} for k, v in SERIES.items())
        path.write_text("\n".join(map(json.dumps, lines)))
        return Columns("id", None, "target")
    elif form == "long.jsonl":
        long = ({"name": name, "time": day.toordinal(), "value": y} for name, day, y in long_rows())
        path.write_text("\n".join(map(json.dumps, long)))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        if form == "long.parquet":
            name, when, y = (list(column) for column in zip(*long_rows(), strict=True))
            table = pyarrow.table({"series": name, "when": when, "y": y})
        else:
            table = pyarrow.table({"series": list(SERIES), "y": list(SERIES.values())})
        parquet.write_table(table, path)
        return Columns("series", "when" if form == "long.parquet" else None, "y")
    return Columns()


@pytest.mark.parametrize("form", ["long.csv", "rows.csv", "lists.jsonl", "long.jsonl", "long.parquet", "lists.parquet"])
def test_formats(tmp_path: Path, form: str) -> None:
    found = read_series([tmp_path / form], write(tmp_path / form, form))
    assert sorted(found) == ["a", "b"]
    for name, values in SERIES.items():
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], values)


def test_series_without_names(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("time,value\n10,5\n9,4\n\n100,6\n")
    (tmp_path / "lists.jsonl").write_text('{"value": [1, 2]}\n\n{"value": [3]}\n')
    found = read_series([tmp_path / "one.csv", tmp_path / "lists.jsonl"], Columns())
    assert {name: values.tolist() for name, values in found.items()} == {
        "one": [4, 5, 6],  # by time as a number
        "lists:1": [1, 2],
        "lists:2": [3],
    }


WRONG = {
    "value.txt": ("1\n2\n", "none of .csv, .jsonl, .parquet"),
    "text.csv": ("name,time,value\na,1,x\n", "holds 'x', which is no finite number"),
    "infinite.csv": ("value\ninf\n", "no finite number"),
    "columns.jsonl": ('{"name": "a", "y": 3}', "no column 'value', but 'name', 'y'; name it with --value-column"),
    "twice.csv": ("name,time,value\na,1,3\na,1,4\n", "has the time 1.0 twice"),
    "mixed.jsonl": ('{"time": "2026-01-01", "value": 1}\n{"time": 3, "value": 1}', "do not compare"),
    "zero.csv": ("name,time,value\na,0,1\na,0,100\na,1,2\n", "has the time 0.0 twice"),
    "untimed.csv": ("time,value\n9,1\n10,2\n,3\n", "do not compare"),
    "nan.csv": ("time,value\nnan,1\n2,2\n1,3\n", "do not compare"),
    "headless.csv": ("a,1.5,2,3\nb,4,5,6\n", "line 1 must be a header"),
    "whole.jsonl": ('{"name": "a", "value": [1, 2]}\n{"name": "a", "value": 3}', "comes again in record 2"),
    "again.csv": ("h\na,1\na,2\n", "comes again in record 2"),
    "broken.jsonl": ('{"value": [1, 2}', "cannot be read"),
    "number.jsonl": ("3\n", "line 1 holds no object"),
    "cells.csv": ("time,value\n1,2,3\n", "line 2 has 3 cells, and the header 2"),
    "bytes.csv": ("value\n\udcff\n", "cannot be read"),
    "not.parquet": ("PAR1", "cannot be read"),
    "deep.jsonl": ("[" * 100_000, "cannot be read"),
    "truth.jsonl": ('{"value": [true]}', "holds True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_one_line(tmp_path: Path, name: str) -> None:
    content, problem = WRONG[name]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=problem) as error:
        read_series([tmp_path / name], Columns())
    assert "\n" not in str(error.value) and name in str(error.value)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="series"):
            read_series([path], Columns())
    (tmp_path / "a.csv").write_text("name,value\na,1\n")
    (tmp_path / "b.csv").write_text("name,value\na,1\n")
    with pytest.raises(UserError, match="no column 'when'"):
        read_series([tmp_path / "a.csv"], Columns(time="when"))
    with pytest.raises(UserError, match="in another file too"):
        read_series([tmp_path / "a.csv", tmp_path / "b.csv"], Columns())


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([np.nan] * 5, "no value is known"),
        ([], "a horizon of 4 is longer than its history of 0"),
        ([np.nan, 3], "it has one value"),
        ([3, np.nan, 3, 3], "it is constant"),
        ([3, 4, 5], "a horizon of 4 is longer than its history of 3"),
        ([3, np.nan, 4, np.nan], ""),
    ],
)
def test_unusable_series(history: list[float], problem: str) -> None:
    assert unusable(np.array(history, np.float64), 4) == problem
