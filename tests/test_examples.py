"""What the studies under examples/ conclude from their runs, on planted ones."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

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
