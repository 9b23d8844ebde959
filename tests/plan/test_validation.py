"""Published measurements: the medians hold, and rows are read as their sources mean them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megahp.cli import main
from megahp.plan.calibration import calibrated
from megahp.plan.machine import load_machine
from megahp.plan.published import FILE, read, read_rows
from megahp.plan.validation import Validation, numbers, rankings, records, report, spearman, validate


@pytest.fixture(scope="module")
def validation() -> Validation:
    return validate(read_rows(FILE))


def test_the_medians_hold(validation: Validation) -> None:
    """The targets of docs/plan.md; and what was reached, with a little room."""
    found = numbers(validation)
    assert found["time"] < 0.055 and found["time within 20 %"] > 0.95
    assert found["time, own quarter"] < 0.05 and found["time within 15 %, own quarter"] > 0.9
    assert found["ranking"] > 0.9
    assert found["memory"] < 0.085 and found["activations"] < 0.05
    assert found["out of memory"] >= 5


def test_a_minority_calibrates(validation: Validation) -> None:
    """At most a quarter of each source's rows, and no float8 or expert row."""
    for source in validation.sources():
        rows = validation.of(source)
        assert 0 < sum(each.calibrates for each in rows) <= -(-len(rows) // 4)
    assert not any(each.calibrates for each in validation.of(kind="fp8"))


def test_machines_carry_the_fit(validation: Validation) -> None:
    for name in ("a100-80", "h100", "b200"):
        machine = load_machine(name)
        fitted = asdict(calibrated(machine, validation.factors).efficiency)
        assert asdict(machine.efficiency) == pytest.approx(fitted, rel=0.01), f"write {fitted} into {name}.toml"


def test_every_row_is_in_the_records(validation: Validation) -> None:
    found = records(validation)
    assert [each["row"] for each in found] == list(range(len(validation.rows)))
    assert all(each.get("left_out") or each["predicted"] > 0 for each in found)
    # of published numbers the error is in the row's own unit
    (row,) = [each for each in found if each["row"] == 182]
    assert row["unit"] == "s/step" and row["error"] == row["predicted"] / 189.06 - 1


def test_the_page_has_the_table(validation: Validation) -> None:
    """docs/plan.md holds what the command prints, but for numbers in their last digit."""
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    labels = [line.split("|")[1] for line in report(validation).splitlines() if line.startswith("|")]
    assert [label for label in labels if f"|{label}|" not in page] == []
    assert f"Spearman {numbers(validation)['ranking']:.2f} in the median" in page


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_nine_sets_are_ranked(validation: Validation) -> None:
    assert len(rankings(validation)) == 9


def test_layers_of_stages_are_those_of_the_source() -> None:
    rows = read_rows(FILE)
    assert read(227, rows[227]).config.parallel.split == (7,) * 11 + (1,)  # 78 layers by DeepSpeed, says the page
    assert read(261, rows[261]).config.parallel.split == (5, *(6,) * 10, 5)  # embeddings count as a layer
    assert read(261, rows[261]).stack.gradient_bytes == 6 and read(227, rows[227]).stack.gradient_bytes == 2


def test_sources_that_are_not_listed() -> None:
    """ZeRO names the stack, and the number of weights says whether an MLP has a gate."""
    rows = read_rows(FILE)
    mpt, llama = (read(0, {**rows[number], "source": "another"}) for number in (0, 349))
    assert (mpt.source, mpt.stack.states, mpt.config.model.gated) == ("other", "fsdp", False)
    assert llama.config.model.gated and llama.config.parallel.dp_replicate == 16
    assert read(0, {**rows[299], "source": "another"}).stack.states == "megatron"


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("recompute", "not stated", "recomputation is not stated"),
        ("microbatch", "1?", "microbatch is not stated"),
        ("gpu", "abacus", "no machine file"),
        ("dp", "7", "not of as many GPUs"),
        ("notes", "MoE", "experts"),
        ("measured_unit", "furlongs", "unit 'furlongs'"),
    ],
)
def test_rows_that_cannot_be_read_say_why(column: str, value: str, problem: str) -> None:
    row = {**read_rows(FILE)[0], column: value}
    with pytest.raises((LookupError, ValueError), match=problem):
        read(0, row)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows, bad = tmp_path / "rows.csv", tmp_path / "bad.csv"
    rows.write_text("\n".join([lines[0], lines[1], lines[60], lines[400]]))
    bad.write_text("a,b\n1,2\n")
    assert main(["plan", "--predict", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [each["row"] for each in found] == [0, 1, 2] and all(np.isfinite(each["predicted"]) for each in found)
    for words in (["--predict", str(bad)], ["--predict", str(tmp_path / "none.csv")], []):
        assert main(["plan", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
