"""How far does a fixed amount of data go when compute is free? The study behind docs/studies.md, "Infinite compute".

    python examples/infinite-compute/study.py [--tokens 32768] [--toy] [--jobs 2]
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DATA = Path("data/infinite-compute")
RUNS = Path("runs/infinite-compute")
TEXTS = HERE.parent / "batch-growth/shakespeare.jsonl"
HELD_OUT = 60  # texts, the last ones: 131 thousand bytes
EPOCHS, DECAYS = (1, 4, 16, 64), (0.1, 1.0, 3.0, 10.0)
RATES, FIRST = [0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], (2, 3)  # and where the grid begins
TUNED = 16  # epochs at which the rate is tuned, and that members of ensembles are trained for
SEEDS = (1, 2, 3)
Line = dict[str, Any]


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def prepare_data(tokens: int) -> None:
    """Write the first texts, so many tokens of them, and the last, which no run is trained on."""
    texts, count = read(TEXTS), 0
    first = [text for text in texts[:-HELD_OUT] if (count := count + len(text["text"].encode()) + 1) <= tokens]
    for name, part in ((f"train-{tokens}", first), ("held-out", texts[-HELD_OUT:])):
        if not (DATA / f"{name}.idx").exists():
            DATA.mkdir(parents=True, exist_ok=True)
            file = DATA / f"{name}.jsonl"
            file.write_text("".join(json.dumps(text) + "\n" for text in part))
            command = [sys.executable, "-m", "megahp", "preprocess", "--tokenizer", "bytes", "--input", str(file)]
            subprocess.run([*command, "--output", str(DATA / name)], check=True, stdout=subprocess.DEVNULL)


def train(run: Line, tokens: int, store: Any) -> Line:
    from megahp import launch
    from megahp.config import resolve
    from megahp.log.metrics import read_run
    from megahp.parallel.layout import fit
    from megahp.train.loop import train as train_run
    from megahp.train.prepare import prepare

    name = f"{tokens}/" + "-".join(f"{value:g}" for value in run.values())
    words = [
        f'data.train=["{DATA}/train-{tokens}"]',
        f"train.tokens={run['epochs'] * tokens}",
        f"optimizer.weight_decay={run['decay']}",
        f"optimizer.lr={run['lr']}",
        f"train.seed={run['seed']}",
        f"log.root={RUNS}",
        f"log.name={name}",
    ]
    config = resolve.load(HERE / "run.toml", words).config
    layout = fit(config.parallel, 1)
    shutil.rmtree(config.directory, ignore_errors=True)
    config = prepare(config, layout, 1, resume=False)
    began = time.process_time()
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        if not train_run(config, launch.World(), store, layout, False):
            raise RuntimeError(f"{name} was told to leave")
    columns = read_run(config.directory).columns
    losses = [loss for loss in columns["loss"] if loss is not None]
    loss, training = columns["validation_loss"][-1], float(np.mean(losses[-max(1, len(losses) // 20) :]))
    return {"tokens": tokens, **run, "loss": loss, "training": training, "seconds": round(time.process_time() - began)}


def find(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def grid_of(lines: Sequence[Line], decay: float) -> dict[float, float]:
    """Rate -> loss, of the runs that tune it."""
    return {line["lr"]: line["loss"] for line in find(lines, epochs=TUNED, decay=decay, seed=1)}


def rates_ahead(grid: dict[float, float]) -> list[float]:
    """The rates to try next: until the best has been tried on both sides."""
    if ahead := [RATES[k] for k in FIRST if RATES[k] not in grid]:
        return ahead
    best = RATES.index(min(grid, key=lambda lr: grid[lr]))
    return [lr for lr in RATES[max(0, best - 1) : best + 2] if lr not in grid]


def missing(lines: Sequence[Line]) -> list[Line]:
    def run(epochs: int, decay: float, lr: float, seed: int) -> Line:
        return {"epochs": epochs, "decay": decay, "lr": lr, "seed": seed}

    def left(runs: Any) -> list[Line]:
        return [run for run in runs if not find(lines, **run)]

    grids = {decay: grid_of(lines, decay) for decay in DECAYS}
    if tuning := left(run(TUNED, decay, lr, 1) for decay in DECAYS for lr in rates_ahead(grids[decay])):
        return tuning
    rates = {decay: min(grid, key=lambda lr: grid[lr]) for decay, grid in grids.items()}
    best = min(DECAYS, key=lambda decay: min(grids[decay].values()))
    return left(
        run(epochs, decay, rates[decay], seed)
        for seed in SEEDS
        for epochs in EPOCHS
        for decay in DECAYS
        if epochs <= TUNED or decay in (DECAYS[0], best)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    file = HERE / "results.jsonl"
    prepare_data(options.tokens)
    from megahp import launch

    store = launch.join(launch.World(), False)
    while runs := missing(find(read(file), tokens=options.tokens)):
        line = train(runs[0], options.tokens, store)
        with open(file, "a") as out:
            out.write(json.dumps(line) + "\n")
        print(len(runs), line, flush=True)


if __name__ == "__main__":
    main()
