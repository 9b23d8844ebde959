"""Does a growing batch save serial steps at equal loss? The study behind `batch.policy = "measured"` (docs/batch.md).

    python examples/batch-growth/study.py [--quick] [--jobs 2] [--sizes S M] [--corpora code english]
        [section.key=value ...]

Every run that is missing in results.jsonl is trained, on one thread, and becomes a line there; then the table is
printed and the figure drawn. Interrupted, it resumes. An arm is a batch, or a way to grow from one. A constant batch's
learning rate is the best of a grid by its mean over seeds 1 to 3, the grid extended until the best is not at its end;
arms that grow take the rate of the batch they begin with. The larger size takes the smaller one's rates, by CompleteP.
Seeds from 4 on are compared: at the smaller size ten of the constant batches and of the measured growth and three of
the other arms, at the larger five of the constant batches and of the measured growth. --quick takes the rates that the
committed results found and trains 3 seeds of the arms that matter (about 20 minutes on two cores) in
runs/batch-growth-quick.jsonl.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahp.diagnose.statistics import half_interval, student

HERE = Path(__file__).parent
DATA = Path("data/batch-growth")
RUNS = Path("runs/batch-growth")
SIZES = {"S": (2, 64), "M": (3, 96)}
TUNED = "S"  # the size that rates are tuned at
GRID = [1e-3 * 2 ** (k / 2) for k in range(10)]  # 1e-3 .. 22.6e-3
FIRST = (4, 5)  # where the grid begins: 4e-3 and 5.7e-3
BATCHES = (4, 8, 12, 16, 24, 32)
FROM = (4, 8, 16)
FINER = "measured from 4, microbatches of 1"
TOKENS = 800_000
WARMUP = 0.1
TUNING, FAIR = (1, 2, 3), 4  # seeds that tune the rates, and the first that is compared
Line = dict[str, Any]


def betas(batch: int) -> list[str]:
    """0.9 and 0.95 at a batch of 8, and as many tokens at others (the rule sde)."""
    kappa = batch / 8
    return [f"optimizer.beta1={0.9**kappa:.6g}", f"optimizer.beta2={max(0.95**kappa, 0.9):.6g}"]


def growing(batch: int, *words: str) -> list[str]:
    return [f"batch.global_batch={batch}", "batch.micro_batch=2", *betas(batch), *words]


def measured(batch: int, *words: str) -> list[str]:
    """Calibrated as often as takes half a percent of the time: one microbatch in so many steps of `batch / 2`."""
    return growing(batch, "batch.policy=measured", f"batch.calibrate_every={400 // batch}", *words)


def along_shape(batch: int, largest: int) -> str:
    """The table of batches along 1 / shape, in steps of 2 up to the largest."""
    sizes = range(batch + 2, largest + 1, 2)  # reached where shape = batch / size
    words = [f"{round((WARMUP + (1 - WARMUP) * (1 - batch / size)) * TOKENS)}:{size}" for size in sizes]
    return "batch.table=" + json.dumps(words)


def arms() -> dict[str, list[str]]:
    """Name -> settings, all but the rate and the seed. The batch that an arm begins with is the first number in its
    name."""
    found = {f"constant {batch}": [f"batch.global_batch={batch}", *betas(batch)] for batch in BATCHES}
    found["constant 16, beta1 0.9"] = ["batch.global_batch=16"]
    for batch in FROM:
        found[f"measured from {batch}"] = measured(batch)
    found[FINER] = [*measured(4), "batch.micro_batch=1"]  # grows in steps of 1, not of 2
    for share in (0.5, 2, 1e9):
        found[f"measured from 16, noise share {share:g}"] = measured(16, f"batch.noise_share={share:g}")
    found["measured from 16, calibrated 12 times as often"] = measured(16, "batch.calibrate_every=2")
    for rule in ("sde", "sqrt", "power-lines"):
        table = along_shape(16, 128)
        found[f"1 / shape from 16, rule {rule}"] = growing(16, "batch.policy=table", f"batch.rule={rule}", table)
    found["noise-scale from 16"] = growing(16, "batch.policy=noise-scale")
    found["noise-scale from 16, rule sde"] = growing(16, "batch.policy=noise-scale", "batch.rule=sde")
    doubled = f'batch.table=["{round(0.28 * TOKENS)}:32", "{round(0.83 * TOKENS)}:64"]'
    found["doubled from 16"] = growing(16, "batch.policy=table", "batch.rule=sqrt", doubled)
    wsd = ["schedule.name=wsd", "schedule.decay=0.2"]
    found["constant 16, wsd"] = [*found["constant 16"], *wsd]
    found["measured from 16, wsd"] = measured(16, *wsd)
    ramp = ["batch.policy=ramp", "batch.rule=none", "batch.largest=16", "batch.increment=2"]
    found["ramp 4 to 16"] = growing(4, *ramp, f"batch.ramp_samples={TOKENS // 64}")
    return found


ARMS = arms()
CONSTANTS = [f"constant {batch}" for batch in BATCHES]
MEASURED = [FINER, *(f"measured from {batch}" for batch in FROM)]


def begins(arm: str) -> str:
    """The constant batch that an arm begins with, whose rate it takes; itself where it has its own grid."""
    if arm.startswith("constant"):
        return arm
    batch = re.search(r"[0-9]+", arm.partition("from")[2] or arm)
    assert batch
    return f"constant {batch[0]}" + (", wsd" if arm.endswith(", wsd") else "")


def key(line: Line) -> tuple[Any, ...]:
    return line["corpus"], line["size"], line["arm"], line["lr"], line["seed"]


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lines_of(lines: Sequence[Line], corpus: str, size: str) -> list[Line]:
    """The runs of a corpus and size, and of the size that rates are tuned at those that tune them."""
    return [
        line
        for line in lines
        if line["corpus"] == corpus and (line["size"] == size or (line["size"] == TUNED and line["seed"] in TUNING))
    ]


def missing(lines: Sequence[Line], corpus: str, size: str) -> list[Line]:
    """The runs to train next, those that the verdict rests on first: grids, then the constant batches and what is
    measured, then the other arms."""
    mine = lines_of(lines, corpus, size)
    done = {key(line) for line in mine}

    def run(arm: str, lr: float, seed: int) -> Line:
        return {"corpus": corpus, "size": size, "arm": arm, "lr": lr, "seed": seed}

    def left(runs: Iterable[Line]) -> list[Line]:
        return [each for each in runs if key(each) not in done]

    def seeds(arms: Sequence[str], count: int) -> list[Line]:
        return left(run(arm, tuned(mine, arm), seed) for seed in range(FAIR, FAIR + count) for arm in arms)

    pairs = [*dict.fromkeys(begins(arm) for arm in MEASURED), *MEASURED]
    groups = [(CONSTANTS, 0), (pairs, 5), (CONSTANTS, 5), ([*CONSTANTS, *MEASURED], 10), (list(ARMS), 3)]
    for group, count in groups if size == TUNED else groups[:3]:
        grids = [arm for arm in group if begins(arm) == arm]
        if ahead := left(run(arm, lr, seed) for seed in TUNING for arm in grids for lr in rates_ahead(mine, arm)):
            return ahead
        if ahead := seeds(group, count):
            return ahead
    return []


def grid_of(lines: Sequence[Line], arm: str) -> dict[float, float]:
    """Rate -> mean loss over the seeds that tune it, of the rates that have them all."""
    found: dict[float, list[float]] = {}
    for line in lines:
        if line["arm"] == arm and line["seed"] in TUNING:
            found.setdefault(line["lr"], []).append(line["loss"])
    return {lr: float(np.mean(losses)) for lr, losses in found.items() if len(losses) == len(TUNING)}


def rates_ahead(lines: Sequence[Line], arm: str) -> list[float]:
    """The rates of the grid to try next: until the best has been tried on both sides."""
    grid = grid_of(lines, arm)
    tried = [k for k, lr in enumerate(GRID) if lr in grid]
    if ahead := [GRID[k] for k in FIRST if k not in tried]:
        return ahead
    best = min(tried, key=lambda k: grid[GRID[k]])
    return [GRID[k] for k in (best - 1, best + 1) if 0 <= k < len(GRID) and k not in tried]


def tuned(lines: Sequence[Line], arm: str) -> float:
    """The best rate of the grid of the batch that the arm begins with."""
    grid = grid_of(lines, begins(arm))
    return min(grid, key=lambda lr: grid[lr])


def of_arm(lines: Sequence[Line], arm: str) -> dict[int, Line]:
    """Seed -> the line of the arm at its tuned rate, of the seeds that are compared."""
    lr = tuned(lines, arm)
    return {
        line["seed"]: line for line in lines if line["arm"] == arm and line["lr"] == lr and line["seed"] not in TUNING
    }


def mean_of(lines: Sequence[Line], arm: str) -> float:
    return float(np.mean([line["loss"] for line in of_arm(lines, arm).values()]))


def prepare_data(corpora: Sequence[str] = ("code", "english")) -> None:
    """Prepare those that are missing: Python's own library in 1,024 pieces, and Shakespeare as bytes."""
    stdlib = sysconfig.get_path("stdlib")
    outside = ["--exclude", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"]
    code = ["--input", stdlib, "--extensions", ".py", *outside, "--tokenizer", str(DATA / "code.model")]
    english = ["--input", str(HERE / "shakespeare.jsonl"), "--tokenizer", "bytes"]
    for name, words in (("code", [*code, "--train-sentencepiece", "1024"]), ("english", english)):
        if name in corpora and not (DATA / f"{name}.idx").exists():
            DATA.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "megahp", "preprocess", *words, "--output", str(DATA / name)]
            subprocess.run([*command, "--workers", "2"], check=True)


def tokenizer_of(corpus: str) -> str:
    return "bytes" if corpus == "english" else str(DATA / "code.model")


def train(run: Line, store: Any, overrides: Sequence[str]) -> Line:
    """Train one run in this process, decide its changes of the batch again from its log, and return its line. store: of
    the process, which it joined with; overrides: settings of every run."""
    from megahp import launch
    from megahp.config import resolve
    from megahp.log.metrics import read_run, without_nan
    from megahp.log.replay import replay
    from megahp.parallel.layout import fit
    from megahp.train.loop import train as train_run
    from megahp.train.prepare import prepare

    layers, width = SIZES[run["size"]]
    name = "-".join(map(str, key(run))).replace(" ", "_").replace(",", "")
    words = [
        *(f"model.{name}={value}" for name, value in (("layers", layers), ("width", width), ("heads", width // 32))),
        *(
            f"parameterization.base_{name}={value}"
            for name, value in zip(("layers", "width"), SIZES[TUNED], strict=True)
        ),
        f'data.train=["{DATA / run["corpus"]}"]',
        f"data.tokenizer={tokenizer_of(run['corpus'])}",
        f"optimizer.lr={run['lr']}",
        f"train.seed={run['seed']}",
        f"train.tokens={TOKENS}",
        f"schedule.warmup={WARMUP}",
        *ARMS[run["arm"]],
        f"log.root={RUNS}",
        f"log.name={name}",
        *overrides,
    ]
    config = resolve.load(HERE / "run.toml", words).config
    layout = fit(config.parallel, 1)
    config = prepare(config, layout, 1, resume=True)
    shutil.rmtree(config.directory, ignore_errors=True)
    began = time.monotonic()
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        if not train_run(config, launch.World(), store, layout, False):
            raise RuntimeError(f"{name} was told to leave")
    logged, replayed = read_run(config.directory), replay(config.directory)
    last = {key: column[-1] for key, column in logged.columns.items()}
    scales = without_nan([*zip(*(logged.column(key).tolist() for key in ("tokens", "noise_scale")), strict=True)])
    shutil.rmtree(config.directory)
    return {
        **run,
        "loss": last["validation_loss"],
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "changes": [[event["tokens"], event["now"]] for event in logged.events if event["event"] == "batch"],
        "reasons": [event["reason"].partition(": ")[2] for event in logged.events if event["event"] == "batch"],
        "noise_scale": scales[:: max(len(scales) // 20, 1)],
        "replayed": not replayed.differences,
        "seconds": round(time.monotonic() - began, 1),
    }


def work(tasks: Any, done: Any, overrides: Sequence[str]) -> None:
    import torch

    from megahp import launch

    launch.die_with_parent(signal.SIGKILL)  # a run that SIGTERM stops would be followed by the pool's next one
    store = launch.join(launch.World(), False)
    torch.set_num_threads(1)
    while (run := tasks.get()) is not None:
        try:
            done.put(train(run, store, overrides))
        except Exception as error:  # told by the parent, which ends
            done.put(error)


def train_all(file: Path, todo: Any, jobs: int, overrides: Sequence[str]) -> None:
    """Train what `todo(lines)` says is missing until nothing is."""
    context = multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    workers = [context.Process(target=work, args=(tasks, done, overrides), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    began, trained = time.monotonic(), 0
    while runs := todo(read(file)):
        for run in runs[: 4 * jobs]:
            tasks.put(run)
        for left in range(len(runs) - 1, len(runs) - 1 - min(len(runs), 4 * jobs), -1):
            line = done.get(timeout=3600)  # a worker that the system killed would be waited for without end
            if isinstance(line, Exception):
                for worker in workers:
                    worker.kill()  # they take SIGTERM for a notice, and this process would wait for them
                raise line
            with open(file, "a") as out:
                out.write(json.dumps(line) + "\n")
            trained += 1
            each = (time.monotonic() - began) / trained
            print(
                f"{line['corpus']} {line['size']} {line['arm']}, lr {line['lr']:.3g}, seed {line['seed']}: "
                f"{line['loss']:.4f} in {line['steps']} steps; {left} left of this round, {left * each / 60:.0f} min",
                flush=True,
            )
    for _ in workers:
        tasks.put(None)


def compare(losses: dict[int, float], others: dict[int, float]) -> str:
    """Mean of the paired differences over the seeds both have, its 95 % interval, p of a difference, p of one that is
    not within 0.01."""
    differences = np.array([losses[seed] - others[seed] for seed in sorted(losses.keys() & others.keys())])
    if len(differences) == 0 or not differences.any():
        return f"{'':>48}"
    mean, freedom = differences.mean(), len(differences) - 1
    if freedom < 2:
        return f"{mean:>+9.4f}{'':>39}"
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    half = half_interval(differences)
    equal = max(student((0.01 - mean) / error, freedom), student((0.01 + mean) / error, freedom))
    between = f"({mean - half:+.4f} to {mean + half:+.4f})"
    return f"{mean:>+9.4f} {between:<20}{2 * student(abs(mean) / error, freedom):>8.2g}{equal:>9.2g} "


def losses_of(lines: Sequence[Line], arm: str) -> dict[int, float]:
    return {seed: line["loss"] for seed, line in of_arm(lines, arm).items()}


def steps_of(lines: Sequence[Line], arm: str) -> float:
    return float(np.mean([line["steps"] for line in of_arm(lines, arm).values()]))


def along_the_constants(lines: Sequence[Line], steps: float) -> dict[int, float]:
    """Seed -> the loss that constant batches have at so many steps, between those on either side, along the logarithm
    of the steps."""
    there = sorted((arm for arm in CONSTANTS if arm in compared(lines)), key=lambda arm: steps_of(lines, arm))
    losses = [losses_of(lines, arm) for arm in there]
    seeds = set.intersection(*(set(each) for each in losses)) if losses else set()
    places = [math.log(steps_of(lines, arm)) for arm in there]
    return {seed: float(np.interp(math.log(steps), places, [each[seed] for each in losses])) for seed in seeds}


def compared(lines: Sequence[Line]) -> list[str]:
    """The arms of which more than the seeds that tune has been trained."""
    return [arm for arm in ARMS if grid_of(lines, begins(arm)) and of_arm(lines, arm)]


def report(lines: Sequence[Line]) -> Iterator[str]:
    """The table of each corpus and size, arms by steps: beside the best constant batch; beside the constant batch that
    an arm begins with, at the same rate; and beside the line of constant batches, at as many steps."""
    for corpus, size in dict.fromkeys((line["corpus"], line["size"]) for line in lines):
        mine = lines_of(lines, corpus, size)
        there = compared(mine)
        if not (constants := [arm for arm in CONSTANTS if arm in there]):
            continue
        best = min(constants, key=lambda arm: mean_of(mine, arm))
        yield f"\n{corpus}, {size}; best: {best}, {mean_of(mine, best):.4f} nats per token"
        columns = "difference (95 %)           p p(equal) "
        titles = (f"beside {best}", "beside the one it begins with", "beside constants, same steps")
        yield f"{'':<62}" + "".join(f"{title:<49}" for title in titles)
        yield f"{'arm':<37}{'lr':>7}{'seeds':>6}{'loss':>7}{'steps':>6}" + f"{'share ' + columns:>48}" * 2 + columns
        for arm in sorted(there, key=lambda arm: -steps_of(mine, arm)):
            losses, steps, own = losses_of(mine, arm), steps_of(mine, arm), begins(arm)
            line = f"{arm:<37}{tuned(mine, arm):>7.2g}{len(losses):>6}{mean_of(mine, arm):>8.4f}{steps:>6.0f}"
            line += f"{steps / steps_of(mine, best):>6.2f}" + compare(losses, losses_of(mine, best))
            if own != arm and own in there:
                line += f"{steps / steps_of(mine, own):>6.2f}" + compare(losses, losses_of(mine, own))
            else:
                line += f"{'':>54}"
            yield line + (compare(losses, along_the_constants(mine, steps)) if arm not in CONSTANTS else "")
        for arm in (arm for arm in MEASURED if arm in there):
            if firsts := [line["changes"][0][0] / TOKENS for line in of_arm(mine, arm).values() if line["changes"]]:
                yield f"first growth of {arm}: {min(firsts):.2f} to {max(firsts):.2f} of the tokens"
    if wrong := [key(line) for line in lines if not line["replayed"]]:
        yield f"NOT replayed: {wrong}"


def draw(lines: Sequence[Line], file: Path) -> None:
    """Loss against serial steps at equal tokens, a panel a corpus and size."""
    from megahp.report.figures import PALETTE, plot_in

    panels = list(dict.fromkeys((line["corpus"], line["size"]) for line in lines))
    kinds = {"constant": ("run1", "o-"), "measured": ("accent", "s-"), "other ways to grow": ("ink", "^")}
    with plot_in(file, 4.5 * len(panels), 3.6) as figure:
        for axes, (corpus, size) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            mine = lines_of(lines, corpus, size)
            there = [arm for arm in compared(mine) if "wsd" not in arm]
            grown = [arm for arm in there if arm not in (*CONSTANTS, *MEASURED) and not arm.startswith("constant")]
            for (kind, (colour, mark)), arms in zip(kinds.items(), (CONSTANTS, MEASURED, grown), strict=True):
                points = sorted((steps_of(mine, arm), arm) for arm in arms if arm in there)
                if points:
                    steps = [at for at, _ in points]
                    losses = [list(losses_of(mine, arm).values()) for _, arm in points]
                    means, errors = [np.mean(each) for each in losses], [half_interval(each) for each in losses]
                    style = {"fmt": mark, "ms": 4, "lw": 1, "capsize": 2, "color": PALETTE[colour]}
                    axes.errorbar(steps, means, errors, label=kind, **style)
            axes.set(xscale="log", xlabel="serial steps", ylabel="validation loss, nats", title=f"{corpus}, {size}")
            axes.legend(frameon=False, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the run file's settings")
    parser.add_argument(
        "--quick", action="store_true", help="3 seeds of the arms that matter, at the rates found before"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at once (default: one a core)"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["S"])
    parser.add_argument("--corpora", nargs="+", choices=["code", "english"], default=["code", "english"])
    parser.add_argument("--only-show", action="store_true", help="train nothing: table and figure of what is there")
    options = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    known, file = read(HERE / "results.jsonl"), HERE / "results.jsonl"
    if options.quick:
        file = Path("runs/batch-growth-quick.jsonl")
        file.parent.mkdir(exist_ok=True)
    if not options.only_show:
        prepare_data(options.corpora)

    def todo(lines: Sequence[Line]) -> list[Line]:
        places = [(corpus, size) for size in options.sizes for corpus in options.corpora]
        if not options.quick:
            rounds = itertools.zip_longest(*(missing(lines, *place) for place in places))
            return [run for each in rounds for run in each if run]
        done, wanted = {key(line) for line in lines}, []
        for corpus, size in places:
            mine = lines_of(known, corpus, size)
            for arm in ("constant 4", "constant 8", "constant 16", *MEASURED):
                for seed in range(FAIR, FAIR + 3):
                    run = {"corpus": corpus, "size": size, "arm": arm, "lr": tuned(mine, arm), "seed": seed}
                    wanted += [run] if key(run) not in done else []
        return wanted

    if not options.only_show:
        train_all(file, todo, options.jobs, options.overrides)
    lines = read(file)
    if options.quick:  # with those that found the rates
        lines = [line for line in known if line["seed"] in TUNING] + lines
    print("\n".join(report(lines)))
    draw(lines, Path("runs/batch-growth.svg") if options.quick else Path("docs/figures/batch-growth.svg"))


if __name__ == "__main__":
    main()
