"""The command that fits laws to runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recipe.test_fit import BESIROGLU, ERROR, SIZES, grid, sweeps

from megahp.cli import main
from megahp.recipe import law_file
from megahp.recipe.fit import FinishedRun
from megahp.scaling.power_laws import TAU

ROOT = Path(__file__).parents[2]


def write_table(path: Path, runs: Sequence[FinishedRun]) -> Path:
    rows = [{key: value for key, value in asdict(run).items() if key != "name"} for run in runs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_on_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every law that can be fitted is, and is written so that recipe reads it; what could not be is said."""
    table = write_table(tmp_path / "runs.jsonl", [*grid(BESIROGLU), *sweeps("timescale", SIZES[:3])])
    law, plot = tmp_path / "law.toml", tmp_path / "law.png"
    assert main(["fit", str(table), "--out", str(law), "--plot", str(plot), "--draws", "20"]) == 0
    out = capsys.readouterr().out
    assert "not fitted: an optimal batch needs" in out and "not fitted: a critical batch needs" in out
    row = next(line for line in out.splitlines() if line.lstrip().startswith("5.76e+23"))
    assert row.split()[1:4] == ["72.2B", "1.33T", "18.4"] and row.endswith("beyond the runs")
    written = law_file.read(law)
    assert written.loss and written.timescale and written.optimal_batch is written.critical_batch is None
    assert written.loss(7e9, 1.4e11) == pytest.approx(BESIROGLU(7e9, 1.4e11), rel=1e-6)
    assert len(written.loss.draws) == 20 and written.timescale.fitted == (2, 160)
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert main(["fit", str(table), "--out", str(law), "--timescale", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["laws"]
    assert found.keys() == {"timescale"} and law_file.read(law).loss is None
    assert found["timescale"]["constants"]["exponent"] == pytest.approx(TAU.exponent)


def test_task_results_become_a_law_that_a_recipe_predicts_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error at the loss that the same file's law predicts, and no error beside another law's loss."""
    runs = [replace(run, error=float(ERROR(run.loss))) for run in grid(BESIROGLU)]
    table, law = write_table(tmp_path / "runs.jsonl", runs), tmp_path / "law.toml"
    words = ["fit", str(table), "--out", str(law), "--plot", str(tmp_path / "law.png"), "--draws", "20"]
    assert main([*words, "--loss", "--task-error"]) == 0
    assert "task_error: error = most - scale exp(-exponent L)" in capsys.readouterr().out
    recipe = ["recipe", "--params", "1e9", "--tokens", "2e10", "--law", str(law)]
    assert main([*recipe, "--json"]) == 0
    rows = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    loss, error = (float(rows[name].split()[0]) for name in ("loss, nats per token", "downstream error"))
    assert error == pytest.approx(float(ERROR(loss)), abs=1e-3)
    assert main([*recipe, "--loss-law", "besiroglu"]) == 0
    assert "downstream" not in capsys.readouterr().out


def test_the_example_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/fit.md: its commands, what it shows of their output, and the recipe made of them."""
    page = (ROOT / "docs/fit.md").read_text()
    command, shown = page.split("\n$ megahp ")[1].split("\n```")[0].split("\n", 1)
    words = command.replace("examples/", f"{ROOT}/examples/").split()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert [words_of(line) for line in capsys.readouterr().out.splitlines()] == list(map(words_of, shown.splitlines()))
    assert (tmp_path / "mine.png").exists()
    more = re.findall(r"`megahp (recipe [^`.]*mine\.toml)`", page)
    for words in (more[0], f"{more[0]} --loss-law mine.toml", "recipe --flops 1e20 --loss-law mine.toml"):
        assert main(words.split()) == 0
        assert "fitted to 56 runs" in " ".join(capsys.readouterr().out.split())


def words_of(line: str) -> list[object]:
    """A line's words, and its numbers to about the digits that any machine finds."""
    return [pytest.approx(float(word), rel=0.01) if re.fullmatch(r"[\d.]+", word) else word for word in line.split()]


def test_without_scipy_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "runs.jsonl", grid(BESIROGLU))
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert main(["fit", str(table), "--out", str(tmp_path / "law.toml")]) == 2
    error = capsys.readouterr().err
    assert error == "megahp: megahp fit needs scipy, which is not installed; pip install 'megahp[fit]'\n"


LINE = '{"parameters": 1e8, "tokens": 2e9, "loss": 3.1}'


@pytest.mark.parametrize(
    ("lines", "words", "told"),
    [
        ([LINE], "", ["the runs do not suffice for any law", "given 1"]),
        (
            [LINE],
            "--loss",
            [
                "a loss law L(N, D) needs at least 6 different (N, D)",
                "given 1, one of 100M parameters, one of 2B tokens",
            ],
        ),
        ([LINE], "--timescale --tied-exponents", ["--tied-exponents", "--loss"]),
        ([LINE], "--draws 5", ["--draws 5", "20"]),
        ([LINE], "--seed -1", ["--seed -1"]),
        ([LINE, LINE[:-1]], "", ["runs.jsonl line 2"]),
        ([LINE, "[]"], "", ["runs.jsonl line 2", "not a JSON object"]),
        ([LINE.replace("loss", "los")], "", ["runs.jsonl line 1", "los is unknown"]),
        ([LINE.replace(', "loss": 3.1', "")], "", ["runs.jsonl line 1", "loss = null"]),
        ([LINE.replace("3.1", "-1")], "", ["runs.jsonl line 1", "loss = -1 is not a number above 0"]),
        ([LINE.replace("3.1", '"low"')], "", ['loss = "low"']),
        ([LINE.replace("1e8", "1" + 31 * "0")] * 9, "--loss", ["parameters = 1000", "is not within 1e-30 to 1e+30"]),
        ([LINE.replace("2e9", "9" * 400)], "--loss", ["tokens = 9999", "is not within"]),
        (
            [LINE[:-1] + ', "batch": 1, "lr": 1e-300, "weight_decay": 1e-300}'],
            "--timescale",
            ["lr = 1e-300 is not within"],
        ),
    ],
)
def test_a_mistake_in_a_table_or_an_option(
    lines: list[str], words: str, told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, law = tmp_path / "runs.jsonl", tmp_path / "law.toml"
    table.write_text("\n".join(lines))
    assert main(["fit", str(table), "--out", str(law), *words.split()]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in told) and "Traceback" not in error
    assert not law.exists()
