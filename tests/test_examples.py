"""What the studies under examples/ conclude from their runs, on planted ones."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megahp.config import resolve

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of examples/, with its folder on the path as when it is run."""
    path = EXAMPLES / name
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_decay_to_zero_compares_at_best_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2Z loses 0.1 nats per doubling of the tokens here, and cosine 0.02 more, so D2Z needs 2^-0.2 of its tokens."""
    compare = load("decay-to-zero/compare.py", monkeypatch)

    def curve(variant: str, size: float, loss: float) -> dict[str, Any]:
        seeds = np.array([-0.01, 0.0, 0.01])
        return {
            "variant": variant,
            "size": size,
            "values": [1e-3, 2e-3],
            "losses": [list(loss + 0.5 + seeds), list(loss + seeds)],
        }

    sizes = {1e5: 2.0, 2e5: 1.9, 4e5: 1.8}
    curves = [curve("D2Z", size, loss) for size, loss in sizes.items()]
    curves += [curve("cosine to 10 %", size, loss + 0.02) for size, loss in sizes.items()]
    found = {(size, variant): row for size, variant, *row in compare.rows(curves)}
    rate, _, differences, share = found[4e5, "cosine to 10 %"]
    assert rate == 2e-3 and differences == pytest.approx([0.02] * 3) and share == pytest.approx(2**-0.2)
    assert np.isnan(found[1e5, "cosine to 10 %"][3])  # above all that D2Z has reached
    assert compare.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.303 / 3**0.5)
    compare.draw(curves, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_branches_are_compared_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = load("batch-growth/branches.py", monkeypatch)
    lines = [
        {"corpus": "code", "seed": seed, "tokens": 100, "true_sq": 0.1, "noise": noise}
        | {f"loss {factor}": 3 + 0.1 * seed - 0.01 * factor for factor in branches.FACTORS}
        for seed, noise in ((1, 1.0), (2, 2.0), (3, 90.0))
    ]
    (_, line) = branches.report(json.loads(json.dumps(lines)))
    assert "20 (10 to 900)" in line and "-0.0100 +-0.0000" in line and "-0.1500" in line


def test_infinite_compute_on_planted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of each weight decay is that of its grid, extended past its best; a student's share is of the gain."""
    study = load("infinite-compute/study.py", monkeypatch)
    plan = study.Study(tokens=1024, decays=(0.1, 3.0), epochs=(1, 16), members=3)
    lines: list[dict[str, Any]] = []
    losses = {0.1: 2.0, 3.0: 1.5}
    for each in study.planned(plan, lines):
        if each.get("teachers"):
            evaluated = 1.35 + 0.05 * (len(each["teachers"]) == 1) + 0.001 * each["teachers"][0]
            lines.append(each | {"loss": 1.4, "training": 1.4, "evaluated": evaluated})
        elif "epochs" in each:
            away = abs(np.log2(each["lr"] / 1e-3)) + 0.001 * each["seed"]
            loss = losses[each["decay"]] + away + (0.2 if each["epochs"] == 64 else 0.0)
            lines.append(each | {"loss": loss, "training": 1.0})
        else:
            lines.append(each | {"loss": 1.5 - 0.1 * (len(each["ensemble"]) - 1) + 0.001 * each["ensemble"][0]})
    rates, best = study.chosen(plan, lines)
    assert rates == {0.1: 1e-3, 3.0: 1e-3} and best == 3.0
    assert sorted(study.grid_of(plan, lines, 3.0)) == [0.5e-3, 1e-3, 2e-3, 4e-3]  # both sides of the best were tried
    assert {line["seed"] for line in study.find(lines, epochs=16, decay=3.0, lr=1e-3, teachers=[])} == set(range(1, 10))
    text = "\n".join(study.report(lines, plan))
    assert "ensembles of 3: 1.304 +- 0.007, to one member -0.200 +- 0.000" in text
    assert "students of 3, 16 epochs, decay 3: 1.354 +- 0.007, to the first member -0.150 +- 0.000; 75%, 75%" in text
    assert "students of 1, 16 epochs, decay 3: 1.404 +- 0.007, to the first member -0.100 +- 0.000; 50%, 50%" in text
    study.draw(lines, plan, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    assert list(study.planned(plan, lines))[0]["epochs"] == 1  # nothing is tuned again


def test_infinite_compute_s_toy(tmp_path: Path) -> None:
    """By its command: epochs, ensembles, students, report; and again, when all is there."""
    root = EXAMPLES.parent
    command = [sys.executable, str(EXAMPLES / "infinite-compute/study.py"), "--toy"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for words in ([], ["--only-show"]):
        done = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "ensembles of 2:" in done.stdout and "of the ensemble's gain" in done.stdout


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.toml")), ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_run_files_and_the_commands_in_them_are_valid(file: Path) -> None:
    """Every `megahp train` in a run file's comments resolves, as the file itself does."""
    resolve.load(file)
    comments = "\n".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    for command in comments.replace("\\\n", " ").splitlines():
        if command.startswith("megahp train"):
            _, _, name, *words = shlex.split(command.partition("    #")[0])
            resolve.load(EXAMPLES.parent / name, [word for word in words if not word.endswith("=...")])
