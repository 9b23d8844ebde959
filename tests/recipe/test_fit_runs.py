"""Runs as points to fit laws to."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from megahp.cli import main
from megahp.config import config_to_toml, resolve
from megahp.errors import UserError
from megahp.log.metrics import RunLog
from megahp.recipe.fit_runs import read_runs


def write_run(folder: Path, tree: dict, events: Sequence[str] = ("started", "finished"), **last: float | None) -> Path:
    """A run directory as `megahp train` leaves it."""
    config = resolve.from_dict({"model": {"vocab_size": 257}, "data": {"train": ["corpus"]}, **tree}, "test")
    log = RunLog(folder)
    for event in events:
        log.event(event, "because")
    batch = config.batch.global_batch
    log.metrics({"step": 9, "tokens": config.train.tokens, "global_batch": batch, "validation_loss": 3.0, **last})
    log.close()
    (folder / "config.toml").write_text(config_to_toml(config))
    return folder


def test_run_directories(tmp_path: Path) -> None:
    """Sizes, batch and what is applied to hidden matrices; a growing batch, or another optimizer, serves fewer laws."""
    tree = {
        "model": {"width": 512, "heads": 8, "vocab_size": 257},
        "parameterization": {"name": "completep", "base_width": 256},
        "optimizer": {"lr": 8e-3, "weight_decay": 0.05},
        "train": {"tokens": 10_000_000},
        "batch": {"global_batch": 24},
    }
    plain = write_run(tmp_path / "plain", tree, tokens=9_999_000)  # no room for another batch
    grown = write_run(tmp_path / "grown", tree, ("started", "batch", "resumed", "finished"), global_batch=48)
    muon = write_run(tmp_path / "muon", tree | {"optimizer": {"name": "muon"}})
    (one, two, three), notes = read_runs([plain, grown, muon])
    width, mlp, block = 512, 1408, 4 * 512**2 + 3 * 512 * 1408 + 2 * 512
    assert mlp == 64 * math.ceil(8 * width / 3 / 64)
    assert one.parameters == 4 * block + 512 + 2 * 384 * 512
    assert (one.tokens, one.loss, one.batch) == (10_000_000, 3.0, 24 * 256)
    assert (one.lr, one.weight_decay) == (4e-3, 0.1)
    assert one.timescale == pytest.approx(24 * 256 / (8e-3 * 0.05 * 1e7))
    assert (two.batch, two.lr) == (None, None) and (three.batch, three.lr) == (24 * 256, None)
    assert len(notes) == 2 and "grown: its batch changes" in notes[0] and "muon: tau is AdamW's" in notes[1]

    other = write_run(tmp_path / "other", tree | {"data": {"train": ["corpus"], "tokenizer": "x.model"}})
    assert "data.tokenizer" in read_runs([plain, other])[1][0]


@pytest.mark.parametrize(
    ("events", "last", "told"),
    [
        (("started",), {}, "has not ended"),
        (("started", "finished", "resumed"), {}, "has not ended"),
        (("started", "finished"), {"tokens": 5000}, "has not ended: 5000 of train.tokens = 10000000 are trained"),
        (("started", "finished"), {"validation_loss": None}, "no validation loss"),
    ],
)
def test_a_run_that_cannot_be_used_is_named(
    events: Sequence[str], last: dict, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "mine", {}, events, **last)
    assert main(["fit", str(run), "--out", str(tmp_path / "law.toml")]) == 2
    error = capsys.readouterr().err
    assert str(run) in error and told in error


def test_a_folder_s_runs_are_read_but_those_that_cannot_be_used(tmp_path: Path) -> None:
    """As a sweep leaves them: some finished, one diverged, one that has hardly begun."""
    for size, name in enumerate(("one", "two"), start=1):
        write_run(tmp_path / "sweep/mup" / name, {"train": {"tokens": 10_000_000 * size}})
    write_run(tmp_path / "sweep/mup/wild", {}, ("started", "broken"))
    (tmp_path / "sweep/mup/new").mkdir()
    (tmp_path / "sweep/mup/new/events.jsonl").touch()
    runs, notes = read_runs([tmp_path / "sweep"])
    assert [run.tokens for run in runs] == [10_000_000, 20_000_000]
    assert "skipped" in notes[0] and "new/config.toml" in notes[0]
    assert "skipped" in notes[1] and "wild has not ended" in notes[1] and len(notes) == 2
    with pytest.raises(UserError, match="wild has not ended"):
        read_runs([tmp_path / "sweep/mup/wild"])
    with pytest.raises(UserError, match="absent"):
        read_runs([tmp_path / "absent"])


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff")
    for name in ("pipe", "binary", "absent"):
        with pytest.raises(UserError, match=f"table of runs .*{name}.jsonl .*; name a run directory"):
            read_runs([tmp_path / f"{name}.jsonl"])


def test_a_run_that_train_steps_ended_counts_what_it_took(tmp_path: Path) -> None:
    run = write_run(tmp_path / "cut", {"train": {"steps": 9}}, tokens=73_728)
    (found,), notes = read_runs([run])
    assert found.tokens == 73_728 and "ended by train.steps = 9" in notes[0] and "10000000 tokens" in notes[0]
    with pytest.raises(UserError, match="has not ended"):
        read_runs([write_run(tmp_path / "short", {"train": {"steps": 10}}, tokens=73_728)])


def test_a_sparse_run_is_no_run_of_these_laws(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sparse", {"sparsity": {"method": "static", "density": 0.5}})
    with pytest.raises(UserError, match="sparse is sparse, and the laws are of dense models"):
        read_runs([run])


@pytest.mark.parametrize("settings", [{"model": {"quantize": "int4"}}, {"compute": {"fp4_backward": "nvfp4"}}])
def test_a_run_of_few_bits_is_no_run_of_these_laws(tmp_path: Path, settings: dict[str, dict[str, str]]) -> None:
    run = write_run(tmp_path / "rounded", settings)
    with pytest.raises(UserError, match="rounded is quantized, and the laws are of full precision"):
        read_runs([run])
