"""Sampled paths of series against the probabilities of every path, from passes without a cache; what the command writes
and refuses."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed import world

from megahp import checkpoint, cli
from megahp.config import resolve
from megahp.data.tokenizer import load_tokenizer
from megahp.evaluate import forecast
from megahp.evaluate.forecast import sample_paths, sample_series
from megahp.evaluate.sample import TrainedModel, load_trained, single_rank_model
from megahp.parallel.parameters import model_state, storage
from megahp.series.binning import Binning
from megahp.series.coding import SeriesCoding
from megahp.train.prepare import with_vocabulary
from megahp.train.run import state_of_weights

SAMPLES = 4000
# of three sub-series, read from the last to the first: so the paths are not sampled in the order of time
CODING = SeriesCoding(Binning((2, 3), -0.5, 1.5, (3.0, 2.0)), 5, 3, 3, "backfill")
GIVEN = np.array([[3.0, 5.0, np.nan, 4.0, 7.0, 6.0], [20.0, 20.0, 10.0, 15.0, 11.0, 10.0]])


@torch.no_grad()
def write_run(folder: Path, coding: SeriesCoding | None = CODING) -> None:
    """A run on series, or on bytes, of random weights."""
    data: dict[str, Any] = {"sequence_length": 17}
    model = {"layers": 2, "width": 16, "heads": 2}
    if coding:
        (folder / "data").mkdir(parents=True)
        coding.save(folder / "data" / "some.series")
        data = {"tokenizer": str(folder / "data" / "some.series"), "sequence_length": coding.window_tokens}
    tree = {"model": model, "data": data, "parameterization": {"name": "sp"}, "train": {"dtype": "float64"}}
    config = resolve.resolve([("test", tree)]).config
    config = with_vocabulary(config, load_tokenizer(config.data.tokenizer))
    generator = torch.Generator().manual_seed(1)
    weights = (
        (name, storage(weight) + 0.3 * torch.randn(storage(weight).shape, generator=generator))
        for name, weight in model_state(single_rank_model(config)).items()
    )
    checkpoint.write(checkpoint.path(folder / "checkpoints", 1), weights, state_of_weights(config), 10**9)


@torch.no_grad()
def probabilities(trained: TrainedModel, given: np.ndarray) -> np.ndarray:
    """Of each path of intervals, at times 1, 2 and 3, from one pass over all of them. [6, 6, 6]"""
    known = given[-5:]
    z = (known - np.nanmin(known)) / (np.nanmax(known) - np.nanmin(known))
    # 5 values, of which the first two keep their places; the other three are read from the last to the first
    prompt = [6]
    for value in z[[0, 1, 4, 3, 2]]:
        interval = min(5, max(0, math.floor((value + 0.5) / 2 * 6))) if value == value else None
        prompt += [5, 5] if interval is None else [interval // 3, 2 + interval % 3]
    paths = list(itertools.product(range(6), repeat=3))  # in the order in which the model reads them
    digits = [[digit for interval in path for digit in (interval // 3, 2 + interval % 3)] for path in paths]
    logits = trained.model(torch.tensor([prompt + each for each in digits]))[:, len(prompt) - 1 : -1]
    found = np.ones((6, 6, 6))
    for path, each, scores in zip(paths, digits, logits, strict=True):
        for place, digit in enumerate(each):
            level = scores[place, 2:5] if place % 2 else scores[place, :2]
            found[path[::-1]] *= level.softmax(0)[digit - 2 * (place % 2)].item()
    return found


def everything(folder: Path) -> Any:
    write_run(folder / "series")
    trained = load_trained(folder / "series")
    paths = sample_series(trained, GIVEN, SAMPLES, 1)
    with mock.patch.object(forecast, "MOST_CACHED", 10_000):
        in_turns = sample_paths(trained, GIVEN[0], 50, 1, 0)
    twice = sample_series(trained, GIVEN[[0, 0]], 20, 1)
    again = twice, sample_series(trained, GIVEN[:1], 20, 1), sample_series(trained, GIVEN[:1], 20, 2)
    expected = [probabilities(trained, row) for row in GIVEN]
    return paths, in_turns, again, expected


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.run(1, everything, tmp_path_factory.mktemp("forecast"))[0]


@pytest.mark.parametrize("row", [0, 1])
def test_paths_come_as_often_as_the_model_says(found: Any, row: int) -> None:
    paths, _, _, expected = found
    assert paths.shape == (2, SAMPLES, 3) and expected[row].sum() == pytest.approx(1)
    known = GIVEN[row][-5:]
    z = (paths[row] - np.nanmin(known)) / (np.nanmax(known) - np.nanmin(known))
    intervals = np.clip(np.floor((z + 0.5) / 2 * 6).astype(int), 0, 5)
    counts = np.zeros((6, 6, 6))
    np.add.at(counts, tuple(intervals.T), 1)
    # marginals of each time, of each pair of times, and all paths, each against its own spread
    for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        chance, share = expected[row].sum(axes), counts.sum(axes) / SAMPLES
        off = (share - chance) / np.sqrt(chance * (1 - chance) / SAMPLES)
        assert np.abs(off[chance > 5 / SAMPLES]).max() < 4.5
    assert np.abs(expected[row].sum((1, 2)) - expected[row].sum((0, 1))).max() > 0.05  # the times differ


def test_values_are_spread_over_their_intervals(found: Any) -> None:
    z = (found[0][0] - 4) / 3
    inside = ((z + 0.5) * 3)[(z > -1 / 6) & (z < 7 / 6)] % 1  # within an interval that is no tail
    assert np.histogram(inside, 4, (0, 1))[0] / len(inside) == pytest.approx([0.25] * 4, abs=0.02)
    assert z.min() < -0.5 and z.max() > 1.5  # tails go beyond


def test_paths_repeat_by_seed_and_stand_alone(found: Any) -> None:
    _, in_turns, (twice, again, other), _ = found
    assert in_turns.shape == (50, 3) and len(np.unique(in_turns[:, 0])) == 50
    assert np.array_equal(twice[0], again[0]) and not np.array_equal(again, other)
    assert not np.array_equal(twice[0], twice[1])  # two series alike have paths of their own


def said(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["forecast", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


FILES = {
    "good.csv": "name,value\n" + "".join(f"{name},{v}\n" for name in ("a", '"b, c"') for v in (3, 5, "", 4, 7, 6)),
    "constant.csv": "value\n" + "2\n" * 9,
    "ended.csv": "value\n3\n4\n" + "2\n" * 9,
    "one.csv": "value\n2\n",
    "unknown.csv": "value\n" + "NaN\n" * 9,
    "short.csv": "value\n1\n2\n",
    "mixed.csv": "name,value\n"
    + "".join(f"{name},{v}\n" for name in "abc" for v in (1, 1, 1, 2 if name == "a" else 1)),
    "other.csv": "name,value\na,1\n",
    "none.csv": "name,value\n",
}
MISTAKES = {
    "constant": ("series constant.csv", "series 'constant' cannot be forecast: it is constant; leave it out"),
    "of late": ("series ended.csv", "of its last 5 values, which are read, it is constant"),
    "one value": ("series one.csv", "it has one value"),
    "NaN only": ("series unknown.csv", "no value is known"),
    "history": ("series short.csv", "a horizon of 3 is longer than its history of 2"),
    "several": ("series mixed.csv", "series 'b', and 1 more, cannot be forecast: it is constant; leave them out"),
    "horizon": ("series good.csv --horizon 4", "--horizon 4 is above 3, which "),
    "no horizon": ("series good.csv --horizon 0", "--horizon 0 must be at least 1"),
    "samples": ("series good.csv --samples 0", "--samples 0 must be at least 1"),
    "column": ("series good.csv --value-column price", "has no column 'price'"),
    "no series": ("series none.csv", "none.csv holds no series; name another file"),
    "missing": ("series nowhere.csv", "nowhere.csv"),
    "text": ("text good.csv", "was trained on text (data.tokenizer = 'bytes'); name a run on series"),
    "run": ("data good.csv", "is neither a checkpoint nor a run directory that has one"),
    "folder": ("series good.csv --output no/where.csv", "is no folder"),
    "precious": ("series good.csv --output other.csv", "which megahp did not write"),
    "input": ("series good.csv --output good.csv", "which is the input"),
    "no drawing": ("series good.csv --plot some.txt", "--plot some.txt cannot be drawn"),
}


def commands(folder: Path) -> dict[str, Any]:
    with contextlib.chdir(folder):
        write_run(folder / "series")
        write_run(folder / "text", None)
        Path("data").mkdir()
        for name, text in FILES.items():
            Path(name).write_text(text)
        how = ("series", "good.csv", "--samples", 30, "--quantiles", 0.9, 0.1, "--seed", 3)
        found: dict[str, Any] = {"printed": said(*how)}
        found["written"] = (
            *said(*how, "--horizon", 2, "--output", "new.csv", "--plot", "new.svg"),
            Path("new.csv").read_text(),
        )
        found["again"] = said(*how, "--horizon", 2, "--output", "new.csv", "--plot", "new.svg")[0]
        found["plot"] = Path("new.svg").read_text()
        trained = load_trained(Path("series"))
        found["paths"] = sample_series(trained, [GIVEN[0], GIVEN[0]], 30, 3)
        return found | {name: said(*words.split()) for name, (words, _) in MISTAKES.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world.run(1, commands, tmp_path_factory.mktemp("commands"))[0]


def test_the_command_writes_the_quantiles_of_its_paths(outcomes: dict[str, Any]) -> None:
    code, out, err = outcomes["printed"]
    rows = list(csv.reader(io.StringIO(out)))
    assert code == 0 and rows[0] == ["series", "step", "0.1", "0.9"] and len(rows) == 1 + 2 * 3
    assert [row[:2] for row in rows[1:]] == [[name, step] for name in ("a", "b, c") for step in "123"]
    expected = np.quantile(outcomes["paths"], (0.1, 0.9), axis=1).transpose(1, 2, 0).reshape(6, 2)
    assert np.array(rows[1:])[:, 2:].astype(float) == pytest.approx(expected, rel=1e-7)


def test_a_shorter_horizon_is_the_beginning_of_the_whole(outcomes: dict[str, Any]) -> None:
    whole = outcomes["printed"][1].splitlines()
    code, out, _, written = outcomes["written"]
    assert code == 0 and out == "" and written.splitlines() == [*whole[:3], *whole[4:6]]
    assert outcomes["again"] == 0  # it replaces what it wrote
    assert all(f">{label}<" in outcomes["plot"] for label in ("history", "median", "80 %", "a", "b, c"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(outcomes: dict[str, Any], mistake: str) -> None:
    code, out, err = outcomes[mistake]
    assert code == 2 and out == "" and err.count("\n") == 1 and MISTAKES[mistake][1] in err
