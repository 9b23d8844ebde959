"""Compare the measured noise scale with the critical batch found by branches, at three moments of a run.

    python examples/batch-growth/branches.py [--seeds 5] [--only-show]

For each corpus and seed of the study's smaller model, a run of constant batch 8 and constant rate keeps checkpoints at
200k, 400k and 600k tokens. From each, branches of 1 to 16 times the batch train the same 98k tokens at a rate of
sqrt(factor) (Merrill et al., arXiv 2505.23971), and their validation losses are compared over the seeds, where `megahp
measure critical-batch` compares smoothed training losses of one run, which scatter by more than its tolerance here. The
noise scale is the whole model's, exact, by `megahp measure noise-scale`. Every seed and moment becomes a line in
branches.jsonl; interrupted, it resumes. About 15 minutes on one core.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from study import DATA, FAIR, HERE, Line, prepare_data, read, tokenizer_of

from megahp.diagnose.statistics import half_interval
from megahp.log.metrics import read_run

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import run_megahp

OUT = HERE / "branches.jsonl"
RUNS = Path("runs/batch-growth-branches")
BATCH, LENGTH, RATE = 8, 64, 5.7e-3  # the constant batch's own best rate is within the grid's steps of it on both
EVERY = 390  # steps, 200k tokens
MOMENTS = 3
FACTORS = (1, 2, 4, 8, 16)
TOKENS = 12 * max(FACTORS) * BATCH * LENGTH


def train(corpus: str, seed: int, name: str, *words: str) -> Path:
    """Train a run of the study's smaller model at a constant rate; return its directory."""
    data = [f'data.train=["{DATA / corpus}"]', f"data.tokenizer={tokenizer_of(corpus)}", f"train.seed={seed}"]
    constant = ["schedule.name=constant", f"log.root={RUNS}", f"log.name={name}", *words]
    run_megahp("train", str(HERE / "run.toml"), *data, *constant)
    return RUNS / name


def measure(corpus: str, seed: int) -> list[Line]:
    """Return a line for every moment of one run: its exact |G|^2 and S, and the losses of its branches."""
    shutil.rmtree(RUNS, ignore_errors=True)
    batch = [f"batch.global_batch={BATCH}", f"optimizer.lr={RATE}", "schedule.warmup=0.1"]
    keep = [f"checkpoint.every={EVERY}", f"checkpoint.keep={MOMENTS}", f"train.steps={MOMENTS * EVERY}"]
    base, found = train(corpus, seed, "base", *batch, *keep, "train.tokens=800_000"), RUNS / "noise.json"
    run_megahp("measure", "noise-scale", str(base), "--batch", "64", "--batches", "24", "--json", str(found))
    lines: list[Line] = []
    for at in json.loads(found.read_text())["checkpoints"]:
        tokens, total = at["tokens"], at["kinds"]["total"]
        line: Line = {
            "corpus": corpus,
            "seed": seed,
            "tokens": tokens,
            "true_sq": total["true_sq"],
            "noise": total["noise"],
        }
        for factor in FACTORS:
            words = [f"batch.global_batch={factor * BATCH}", f"optimizer.lr={RATE * factor**0.5}", "schedule.warmup=0"]
            words += [
                f"schedule.start={tokens}",
                f"train.start_from={at['checkpoint']}",
                f"train.tokens={tokens + TOKENS}",
            ]
            branch = read_run(train(corpus, seed, f"{tokens}-{factor}", *words))
            line[f"loss {factor}"] = branch.columns["validation_loss"][-1]
        lines.append(line)
    return lines


def report(lines: list[Line]) -> Iterator[str]:
    """Yield the table: of each corpus and moment the median noise scale of the seeds and their range, and the mean
    difference of the loss to that of factor 1 with its 95 % interval."""
    yield f"{'corpus':<9}{'tokens':>9}{'seeds':>6}{'noise scale':>20}" + "".join(
        f"{f'{k * BATCH}':>19}" for k in FACTORS[1:]
    )
    for corpus, tokens in dict.fromkeys((line["corpus"], line["tokens"]) for line in lines):
        mine = [line for line in lines if (line["corpus"], line["tokens"]) == (corpus, tokens)]
        scales = sorted(line["noise"] / line["true_sq"] for line in mine)
        scale = f"{np.median(scales):.0f} ({scales[0]:.0f} to {scales[-1]:.0f})"
        cells = ""
        for factor in FACTORS[1:]:
            differences = np.array([line[f"loss {factor}"] - line["loss 1"] for line in mine])
            cells += f"{differences.mean():>+10.4f} +-{half_interval(differences):.4f}"
        yield f"{corpus:<9}{tokens:>9,}{len(mine):>6}{scale:>20}{cells}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only-show", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.only_show:
        prepare_data()
        done = {(line["corpus"], line["seed"]) for line in read(OUT)}
        runs = [(corpus, seed) for seed in range(FAIR, FAIR + arguments.seeds) for corpus in ("code", "english")]
        began, left = time.monotonic(), [run for run in runs if run not in done]
        for number, (corpus, seed) in enumerate(left, start=1):
            lines = measure(corpus, seed)
            with OUT.open("a") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
            eta = (time.monotonic() - began) / number * (len(left) - number)
            print(f"{corpus}, seed {seed}; {number} of {len(left)}, {eta / 60:.0f} min left", flush=True)
    print("\n".join(report(read(OUT))))
