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
from corpus import write_corpus

from megahp.config import resolve
from megahp.scaling.parameterization import Role, table_of

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


RUN_FILES = sorted(file for file in EXAMPLES.glob("*/*.toml") if file.name != "laws.toml")


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_run_files_and_the_commands_in_them_are_valid(file: Path) -> None:
    """Every `megahp train` in a run file's comments resolves, as the file itself does."""
    resolve.load(file)
    comments = "\n".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    for command in comments.replace("\\\n", " ").splitlines():
        if command.startswith("megahp train"):
            _, _, name, *words = shlex.split(command.partition("    #")[0])
            settings = [word for word in words if "." in word.partition("=")[0] and not word.endswith("=...")]
            resolve.load(EXAMPLES.parent / name, settings)


def planted(run: dict[str, Any]) -> dict[str, Any]:
    """The base is best at 0.008, 0.15, 4 and 3; a dense SP at 0.001; SP's and muP's optima rise as 1 / density."""
    best = {"lr": 0.008, "std": 0.15, "alpha_in": 4.0, "alpha_out": 3.0}
    if run["variant"] == "base":
        return run | {"loss": 2 + sum(np.log(run[name] / value) ** 2 for name, value in best.items())}
    optimum = (0.001 if run["variant"] == "SP" else 0.0123) / (run["density"] if "SmuPar" not in run["variant"] else 1)
    return run | {"loss": 2 + 0.01 * np.log2(run["lr"] / optimum) ** 2 + 0.001 * run["seed"]}


def complete(study: ModuleType, **options: Any) -> Any:
    """Run the density study on planted losses."""
    found = study.Study([], **options)
    while runs := found.missing():
        found = study.Study([*found.lines, *map(planted, runs)], **options)
    return found


def test_density_study_tunes_the_base_and_finds_optima(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load("density-transfer/study.py", monkeypatch)
    found = complete(study)
    assert len({study.key(line) for line in found.lines}) == len(found.lines)  # nothing twice
    configurations = [line for line in found.lines if line["variant"] == "base"]
    first, second = configurations[: found.rounds[0]], configurations[found.rounds[0] :]
    assert len(second) == found.rounds[1] and found.base in second
    best = min(first, key=lambda line: line["loss"])
    assert max(line["alpha_in"] for line in first) / min(line["alpha_in"] for line in first) > 64**0.8
    # a quarter of the range in logarithms to either side
    assert all(8**-0.5 <= line["alpha_in"] / best["alpha_in"] * 1.01 <= 8**0.5 * 1.02 for line in second)
    assert found.own("SP", 1.0) == 0.001 and found.own("SP", 1 / 8) == 0.008 and found.own("SP", 1 / 64) == 0.064
    assert found.own("SmuPar", 1 / 64) == found.own("muP", 1.0) and len(found.losses("SmuPar", 1.0, found.base["lr"]))
    reused = {(variant, density): losses for variant, density, _, losses in found.table(own=False)}
    assert reused["SP", 1 / 64].mean() - reused["SP", 1.0].mean() == pytest.approx(0.01 * 6**2)
    assert "2.3620  0.0025   +0.0000  0.0000" in "\n".join(study.report(found))  # SP at 1/64: +- 4.303 x 0.001 / 3^1/2
    study.draw(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_density_study_gives_sp_the_dense_network_of_mup(monkeypatch: pytest.MonkeyPatch) -> None:
    """At initialization: embedding's output, hidden matrices and logits are of the same size, attention apart."""
    study = load("density-transfer/study.py", monkeypatch)
    found = complete(study, rounds=(1, 1), densities=(1.0,))
    sizes = []
    for variant in ("SP", "muP"):
        config = study.cell(found.target(variant, 1.0, 0.01, 1), ()).config
        table, std = table_of(config), config.parameterization.init_std
        hidden = std * table.rule(Role.HIDDEN).init_std
        sizes.append([hidden, std * table.embedding, std * table.logits])
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_density_study_trains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, on a results file that lacks two runs: they are trained, added and shown."""
    study = load("density-transfer/study.py", monkeypatch)
    write_corpus(tmp_path / "corpus")
    results, lines = tmp_path / "results.jsonl", complete(study).lines
    lost = [line for line in lines if line["seed"] == 3 and line["density"] == 1 / 64][:2]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines if line not in lost))
    small = ("model.layers=1", "model.width=32", "model.heads=2", "model.mlp_width=32", "train.tokens=2560")
    place = (f'data.train=["{tmp_path / "corpus"}"]', "train.validation_samples=1", f"log.root={tmp_path / 'runs'}")
    options = ("--results", str(results), "--plot", str(tmp_path / "plot.svg"), "--jobs", "1")
    command = [sys.executable, str(EXAMPLES / "density-transfer/study.py"), *small, *place, *options]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "[2/2]" in said and "at the best rate tried" in said and (tmp_path / "plot.svg").exists()
    added = [json.loads(line) for line in results.read_text().splitlines()][-2:]
    assert {study.key(line) for line in added} == {study.key(line) for line in lost}
    assert all(line["loss"] > 3 for line in added)  # after ten steps; what was planted is below
    assert not study.Study(study.read(results)).missing()


def test_norm_layers_are_compared_along_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The total is 1.5 times the norms here, twice what training smoothed, and ten times that at the end."""
    study = load("norm-layers/study.py", monkeypatch)
    lines = []
    for seed in (1, 2, 3):
        for part in (0.25, 0.5, 0.75, 1.0):
            norms, smoothed = 10 * part * seed, 15 * part * seed / (2 if part < 1 else 10)
            line = {"seed": seed, "part": part, "loss": 2.0, "noise_scale": smoothed, "noise_scale_total": 2 * smoothed}
            line |= {"noise_scale_total_low": smoothed, "noise_scale_total_high": 3 * smoothed}
            lines.append(line | {"kinds": {"norms": [1.0, norms], "embedding": [3.0, 5 * norms]}})
    run = study.runs_of(lines)[1]
    assert study.along(run, lambda line: line["noise_scale"], "total", 0.95) == pytest.approx((2, 1))
    assert study.along(run, lambda line: study.exact(line, "norms"), "total", 1) == pytest.approx((1.5, 1))
    assert study.along(run, lambda line: study.exact(line, "norms"), "total without embeddings", 1)[0] == 1
    text = "\n".join(study.report(lines))
    assert "norms, smoothed in training       2.00 +- 0.00    2.00 +- 0.00    2.00 +- 0.00   10.00 +- 0.00" in text
    assert "at 9 of 12 checkpoints" in text


def test_power_lines_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss whose optimum is at twice the published tau and at a batch that goes as D^0.7, the search trains the
    neighbours of every optimum, of every seed, and the laws come back."""
    study = load("power-lines/study.py", monkeypatch)
    lines: list[dict[str, Any]] = []
    points = (*study.LADDER, study.LEFT_OUT)
    while runs := study.missing(lines, points, 3):
        for (width, tokens, batch, octave), seed in runs:
            best = 8 * (tokens / 300_000) ** 0.7
            loss = 2 + 0.01 * seed + 0.1 * np.log2(batch / best) ** 2 + 0.05 * (octave - 1) ** 2
            size, of_step = 1000.0 * width, 64.0 * batch
            decay = of_step / (0.01 * tokens * 2.0**octave * study.TAU(tokens / size))
            known = {"parameters": size, "batch": of_step, "lr": 0.01, "weight_decay": decay, "loss": loss}
            lines.append({"place": [width, tokens, batch, octave], "seed": seed, **known})
    assert len({(tuple(line["place"]), line["seed"]) for line in lines}) == len(lines)
    for point in points:
        of = study.losses(lines, point)
        assert all({0, 1, 2} <= set(octaves) for octaves in of.values())
    runs = study.finished([line for line in lines if tuple(line["place"][:2]) != study.LEFT_OUT])
    assert all(run.loss > 2.02 for run in runs)  # means of three seeds
    assert study.fit_timescale(runs).law.exponent == pytest.approx(study.TAU.exponent, abs=1e-6)
    assert study.fit_optimal_batch(runs).law.exponent == pytest.approx(0.7, abs=0.05)
    assert list(study.slopes(runs).values()) == pytest.approx([1] * len(study.LADDER))
    text = "\n".join(study.report(lines))
    assert "the ladder's: batch 6" in text and "mean 1.00" in text
    study.draw(lines, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
