"""Run files at random: refused in one line before anything is written, or run as what they say."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from corpus import write_corpus
from fuzz import forked
from fuzz.run_files import Mutant, mutant, settings_of

from megahp.config import get_setting, resolve

CPU = 2.0  # seconds
# settings by which a run may become larger than a test can wait for; the others' runs end within 30 s
SIZES = ("model.", "data.sequence_length", "data.lengths", "batch.", "train.", "sparsity.", "log.every")


class Wrong(Exception):
    pass


def check(holds: object, ended: object) -> None:
    if not holds:
        raise Wrong(str(ended)[:1200])


def is_told(ended: forked.Ended) -> bool:
    """Whether it ended with a line for each mistake, and nothing else."""
    lines = [line for line in ended.err.splitlines() if not line.startswith("megahp: warning: ")]
    return bool(lines) and lines[0].startswith("megahp: ") and len(lines) <= 4 and "Traceback" not in ended.err


def sort(folder: Path, one: Mutant) -> str:
    """Return the kind that a mutant is of. Raises Wrong where it is of none."""
    (folder / "run.toml").write_bytes(one.text)
    before = forked.everything(folder)
    ended = forked.run(folder, ["train", "run.toml"], 20, forked.stop_at_join)
    check(ended.code in (2, forked.ACCEPTED) and ended.seconds < CPU and not (folder / "owned").exists(), ended)
    if ended.code == 2:
        check(is_told(ended) and not ended.out and forked.everything(folder) == before, ended)
        return "refused"
    # what it says is what is meant: of each value, its own type's equal
    meant = resolve.load(folder / "run.toml").config
    for key, value in settings_of(tomllib.loads(one.text.decode())).items():
        got = get_setting(meant, key)
        is_same = got == (float(value) if isinstance(got, float) else value)
        check(is_same or isinstance(got, tuple) and list(got) == value, (key, got, value))
    ended = forked.run(folder, ["train", "run.toml"], 30)
    directory = meant.directory if meant.directory.is_absolute() else folder / meant.directory
    metrics = directory / "metrics.jsonl"
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if folder in directory.resolve().parents:
        shutil.rmtree(directory, ignore_errors=True)
    if ended.code == forked.HUNG:
        check(any(key.startswith(SIZES) for key in settings_of(tomllib.loads(one.text.decode()))), ended)
        return "ran on"
    if ended.code == 2:
        check(is_told(ended), ended)
        return "ended with its mistake"
    if ended.code == 1:  # 20 steps in a row would be its mistake; weights that break may be a device's fault
        large = max(meant.optimizer.lr, meant.optimizer.muon_lr, meant.optimizer.weight_decay)
        check("is not finite on rank 0; an older checkpoint may have it finite" in ended.err and large > 1, ended)
        return "broke its weights"
    if ended.code == 75:  # both ask for an end before the end
        check(meant.resilience.stop_after or meant.resilience.stop_at_batch, ended)
        return "stopped"
    warned = all(line.startswith("megahp: warning: ") for line in ended.err.splitlines())
    check(ended.code == 0 and warned and (steps or meant.log.every > 3), ended)
    return "trained"


def sorted_out(folder: Path, seed: int, count: int) -> Counter[str]:
    write_corpus(folder / "corpus", 0.02)
    found, faults = Counter[str](), []
    for number in range(count):
        one = mutant(random.Random(f"{seed} {number}"))
        try:
            found[sort(folder, one)] += 1
        except Wrong as error:
            faults.append(f"{number}: {one.what}\n{error}")
    assert not faults, f"{len(faults)} of {count}, seed {seed}:\n" + "\n\n".join(faults)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_some(folder: Path) -> None:
    found = sorted_out(folder, 1, 150)
    assert found["refused"] > 60 and found["trained"] > 3, found


@pytest.mark.slow
def test_a_thousand(folder: Path) -> None:
    """FUZZ_SEED=7 for other ones."""
    found = sorted_out(folder, int(os.environ.get("FUZZ_SEED", "2")), 1000)
    print(json.dumps(found), file=sys.stderr)
