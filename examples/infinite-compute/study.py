"""How far does a fixed amount of data go if compute is free? The study behind docs/studies.md, "Infinite compute".

    python examples/infinite-compute/study.py [--tokens 32768] [--toy] [--only-show]

The first bytes of a corpus are read again and again by a model that has more weights than they are. Every run that is
missing in results.jsonl is trained, on one thread, and becomes a line there; then the tables are printed and the figure
is drawn. Interrupted, it resumes. In order:

- rates: for each weight decay the learning rate's grid, on one seed, at 16 epochs, extended until the best has been
  tried on both sides;
- epochs on three seeds, at the usual weight decay and at the best;
- members: the best weight decay of 16 epochs on fifteen seeds, and three ensembles of one to five of them, whose
  probabilities are averaged (`megahp evaluate RUN RUN ...`);
- students of the members' size (distill.teachers): of an ensemble of five, and of its first member, with the members'
  rate and weight decay; of five with the usual weight decay and its rate;
- 64 epochs, at those two weight decays; students of five for as long; the other weight decays.

--toy does all of that in seconds, in runs/infinite-compute/toy.jsonl: only that it runs can be learned from it.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megahp.diagnose.statistics import half_interval

HERE = Path(__file__).parent
DATA, RUNS = Path("data/infinite-compute"), Path("runs/infinite-compute")
TEXTS = HERE.parent / "batch-growth/shakespeare.jsonl"
HELD_OUT = 60  # texts, the last ones: 131 thousand bytes
USUAL = 0.1  # weight decay
RATES = [0.5e-3 * 2**k for k in range(8)]
STEP = 1024  # tokens
Line = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is trained. first: where the grid of rates begins; members: of an ensemble."""

    tokens: int = 32_768
    decays: tuple[float, ...] = (USUAL, 1.0, 3.0, 10.0)
    epochs: tuple[int, ...] = (1, 4, 16)
    most: int = 64
    first: tuple[int, ...] = (2, 3)
    seeds: tuple[int, ...] = (1, 2, 3)
    members: int = 5

    @property
    def tuned(self) -> int:
        """Epochs at which the rate is tuned, and that members and students are trained for."""
        return self.epochs[-1]

    def group(self, number: int) -> list[int]:
        """The seeds of an ensemble."""
        return list(range(number * self.members + 1, (number + 1) * self.members + 1))


TOY = Study(4096, (USUAL, 3.0), (1, 2), 4, (3,), (1,), 2)


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def held_out() -> list[str]:
    return [line["text"] for line in read(TEXTS)[-HELD_OUT:]]


def prepare_data(tokens: int) -> None:
    """Write the first texts, so many tokens of them, and the last, which no run is trained on."""
    first, left = [], tokens
    for line in read(TEXTS)[:-HELD_OUT]:
        if (left := left - len(line["text"].encode()) - 1) < 0:
            break
        first.append(line["text"])
    for name, texts in ((f"train-{tokens}", first), ("held-out", held_out())):
        if not (DATA / f"{name}.idx").exists():
            DATA.mkdir(parents=True, exist_ok=True)
            (DATA / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            command = [sys.executable, "-m", "megahp", "preprocess", "--tokenizer", "bytes"]
            files = ["--input", str(DATA / f"{name}.jsonl"), "--output", str(DATA / name)]
            subprocess.run([*command, *files], check=True, stdout=subprocess.DEVNULL)


def run_of(epochs: int, decay: float, lr: float, seed: int, teachers: Sequence[int] = ()) -> Line:
    """A run to train. teachers: the seeds of the members that it learns from."""
    return {"epochs": epochs, "decay": decay, "lr": lr, "seed": seed, "teachers": list(teachers)}


def folder_of(study: Study, run: Line) -> Path:
    words = [f"{run[key]:g}" for key in ("epochs", "decay", "lr", "seed")] + list(map(str, run["teachers"]))
    return RUNS / str(study.tokens) / "-".join(words)


def train(study: Study, run: Line, member: Line, store: Any) -> Line:
    """Train a run in this process. member: what teachers are, but for their seeds; store: of the process, which it
    joined with."""
    from megahp import launch
    from megahp.config import resolve
    from megahp.log.metrics import read_run
    from megahp.parallel.layout import fit
    from megahp.train.loop import train as train_run
    from megahp.train.prepare import prepare

    folder = folder_of(study, run)
    teachers = [str(folder_of(study, member | {"seed": seed})) for seed in run["teachers"]]
    words = [
        f'data.train=["{DATA}/train-{study.tokens}"]',
        f"train.tokens={run['epochs'] * study.tokens}",
        f"optimizer.weight_decay={run['decay']}",
        f"optimizer.lr={run['lr']}",
        f"train.seed={run['seed']}",
        f"distill.teachers={json.dumps(teachers)}",
        f"log.root={folder.parent}",
        f"log.name={folder.name}",
    ]
    config = resolve.load(HERE / "run.toml", words).config
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    layout = fit(config.parallel, 1)
    config = prepare(config, layout, 1, resume=False)
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        if not train_run(config, launch.World(), store, layout, False):
            raise RuntimeError(f"{folder} was told to leave")
    columns = read_run(folder).columns
    losses = columns["loss"][-max(1, len(columns["loss"]) // 20) :]
    found = {"loss": float(columns["validation_loss"][-1]), "training": float(np.mean(losses))}
    found |= {"evaluated": measure([folder])} if teachers else {}
    return run | found | {"seconds": round(time.process_time() - began, 1)}


def measure(paths: Sequence[Path]) -> float:
    """The loss of the mean of these models' probabilities on the held-out texts, as `megahp evaluate` measures it."""
    from megahp.evaluate.perplexity import evaluate
    from megahp.evaluate.sample import ensemble, load_trained

    trained = ensemble([load_trained(path) for path in paths])
    with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
        (score,) = evaluate(trained, [held_out()], trained.context, trained.context)
    return score.numbers()["loss"]


def grid_of(study: Study, lines: Sequence[Line], decay: float) -> dict[float, float]:
    """Rate -> loss, of the runs that tune it."""
    tuning = find(lines, epochs=study.tuned, decay=decay, seed=1, teachers=[])
    return {line["lr"]: line["loss"] for line in tuning}


def rates_ahead(study: Study, grid: dict[float, float]) -> list[float]:
    """The rates to try next: until the best has been tried on both sides."""
    if ahead := [RATES[k] for k in study.first if RATES[k] not in grid]:
        return ahead
    best = RATES.index(min(grid, key=lambda lr: grid[lr]))
    return [] if study is TOY else [lr for lr in RATES[max(0, best - 1) : best + 2] if lr not in grid]


def chosen(study: Study, lines: Sequence[Line]) -> tuple[dict[float, float], float]:
    """The best rate of each weight decay, and the best weight decay."""
    grids = {decay: grid_of(study, lines, decay) for decay in study.decays}
    rates = {decay: min(grid, key=lambda lr: grid[lr]) for decay, grid in grids.items()}
    return rates, min(study.decays, key=lambda decay: grids[decay][rates[decay]])


def member_of(study: Study, lines: Sequence[Line]) -> Line:
    """What all members of ensembles are, but for their seeds."""
    rates, best = chosen(study, lines)
    return run_of(study.tuned, best, rates[best], 0)


def planned(study: Study, lines: Sequence[Line]) -> Iterator[Line]:
    """What is to be trained and measured, in order; those that are there already too."""
    for decay in study.decays:
        while ahead := rates_ahead(study, grid_of(study, lines, decay)):
            yield run_of(study.tuned, decay, ahead[0], 1)
    rates, best = chosen(study, lines)
    both = dict.fromkeys((USUAL, best))
    for seed in study.seeds:
        yield from (run_of(epochs, decay, rates[decay], seed) for epochs in study.epochs for decay in both)
    member, groups = member_of(study, lines), [study.group(number) for number in range(len(study.seeds))]
    for number, group in enumerate(groups):
        yield from (member | {"seed": seed} for seed in group)
        yield from ({"ensemble": group[:count]} for count in range(1, len(group) + 1))
        yield from (member | {"seed": 100 + number, "teachers": teachers} for teachers in (group, group[:1]))

    def students(epochs: int, decay: float) -> Iterator[Line]:
        yield from (run_of(epochs, decay, rates[decay], 100 + number, group) for number, group in enumerate(groups))

    yield from students(study.tuned, USUAL)
    yield from (run_of(study.most, decay, rates[decay], seed) for seed in study.seeds for decay in both)
    yield from students(study.most, best)
    for epochs in study.epochs:
        yield from (run_of(epochs, decay, rates[decay], seed) for seed in study.seeds for decay in study.decays)


def carry_out(study: Study, file: Path) -> None:
    from megahp import launch

    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_data(study.tokens)
    store = launch.join(launch.World(), False)
    lines = read(file)  # grows, and with it what is planned
    for each in planned(study, lines):
        if find(lines, **each):
            continue
        seeds = each.get("ensemble") or each["teachers"]
        member = member_of(study, lines) if seeds else {}
        models = [member | {"seed": seed} for seed in seeds]
        for model in models:
            if not (folder_of(study, model) / "checkpoints").exists():  # results that came with a clone
                train(study, model, member, store)
        if "ensemble" in each:
            line = each | {"loss": measure([folder_of(study, model) for model in models])}
        else:
            line = train(study, each, member, store)
        lines.append(line)
        with open(file, "a") as out:
            out.write(json.dumps(line) + "\n")
        print(line, flush=True)


def shown(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} +- {half_interval(np.asarray(values)):.3f}" if len(values) else ""


def losses_of(lines: Sequence[Line], study: Study, epochs: int, decay: float, key: str = "loss") -> list[float]:
    """What the seeds that are compared have, at the decay's best rate."""
    lr = chosen(study, lines)[0][decay]
    found = find(lines, epochs=epochs, decay=decay, lr=lr, teachers=[])
    return [line[key] for line in found if line["seed"] in study.seeds]


def of_ensembles(lines: Sequence[Line], study: Study) -> list[list[float]]:
    """Losses of ensembles of 1, 2, ... members: a list for each of the groups that are measured."""
    groups = [study.group(number) for number in range(len(study.seeds))]
    found = [
        [line["loss"] for k in range(len(group)) for line in find(lines, ensemble=group[: k + 1])] for group in groups
    ]
    return [losses for losses in found if len(losses) == study.members]


def report(lines: Sequence[Line], study: Study) -> Iterator[str]:
    rates, best = chosen(study, lines)
    yield f"{study.tokens:,} tokens; held-out loss with 95 % of the seeds' mean, in brackets the last training loss"
    yield f"{'epochs':<8}" + "".join(f"{f'decay {decay:g}':<28}" for decay in study.decays)
    for epochs in (*study.epochs, study.most):
        cells = [
            f"{shown(losses)} [{np.mean(losses_of(lines, study, epochs, decay, 'training')):.2f}]" if losses else ""
            for decay in study.decays
            for losses in [losses_of(lines, study, epochs, decay)]
        ]
        yield f"{epochs:<8}" + "".join(f"{cell:<28}" for cell in cells)
    for epochs in (*study.epochs, study.most):
        pairs = zip(*(losses_of(lines, study, epochs, decay) for decay in (best, USUAL)), strict=False)
        if differences := [one - other for one, other in pairs]:
            yield f"{epochs} epochs, decay {best:g} to {USUAL:g}, seed by seed: {shown(differences)}"
    yield "best rates: " + ", ".join(f"{lr:g} of decay {decay:g}" for decay, lr in rates.items())
    epochs = {decay: STEP / (lr * decay * study.tokens) for decay, lr in rates.items()}
    yield "timescale 1 / (rate x decay), in epochs: " + ", ".join(f"{each:.3g}" for each in epochs.values())
    groups = of_ensembles(lines, study)
    for count, losses in enumerate(zip(*groups, strict=True), 1):
        gains = [loss - group[0] for loss, group in zip(losses, groups, strict=True)]
        yield f"ensembles of {count}: {shown(losses)}" + (f", to one member {shown(gains)}" if count > 1 else "")
    taught = [line for line in lines if "evaluated" in line]
    kinds = dict.fromkeys((line["epochs"], line["decay"], len(line["teachers"])) for line in taught)
    for epochs, decay, count in kinds:
        found = {n: losses for n in range(len(groups)) if (losses := student(lines, study, n, epochs, decay, count))}
        gains = [loss - groups[n][0] for n, loss in found.items()]
        kept = [(groups[n][0] - loss) / (groups[n][0] - groups[n][-1]) for n, loss in found.items()]
        words = f"students of {count}, {epochs} epochs, decay {decay:g}: {shown([*found.values()])}"
        shares = ", ".join(f"{share:.0%}" for share in kept)
        yield f"{words}, to the first member {shown(gains)}; {shares} of the ensemble's gain"


def student(lines: Sequence[Line], study: Study, group: int, epochs: int, decay: float, count: int) -> float:
    """The loss of a group's student; 0 if there is none."""
    found = find(lines, epochs=epochs, decay=decay, seed=100 + group, teachers=study.group(group)[:count])
    return found[0]["evaluated"] if found else 0.0


def draw(lines: Sequence[Line], study: Study, file: Path) -> None:
    from megahp.report.figures import PALETTE, plot_in

    with plot_in(file, 9, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for number, decay in enumerate(study.decays):
            for key, style in (("loss", "o-"), ("training", ":")):
                points = {e: losses_of(lines, study, e, decay, key) for e in (*study.epochs, study.most)}
                points = {epochs: losses for epochs, losses in points.items() if losses}
                means, errors = (
                    [np.mean(each) for each in points.values()],
                    [half_interval(np.asarray(each)) for each in points.values()],
                )
                label = f"decay {decay:g}" if key == "loss" else None
                left.errorbar(
                    [*points],
                    means,
                    errors if key == "loss" else None,
                    fmt=style,
                    ms=4,
                    capsize=2,
                    color=PALETTE[f"run{number}"],
                    label=label,
                )
        left.set(xscale="log", xlabel="epochs", ylabel="held-out loss, nats (dotted: training)")
        left.legend(frameon=False, fontsize=7)
        for number, group in enumerate(of_ensembles(lines, study)):
            hue = PALETTE[f"run{number}"]
            right.plot(range(1, len(group) + 1), group, "o-", ms=4, color=hue)
            for line in lines:
                if "evaluated" in line and line["seed"] == 100 + number:
                    right.plot(1, line["evaluated"], "x" if line["teachers"][1:] == [] else "*", ms=8, color=hue)
        right.set(xlabel="members (star: a student of the ensemble; x: of one member)", ylabel="held-out loss, nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=Study.tokens, help="of the corpus; of others than the default in runs/"
    )
    parser.add_argument("--toy", action="store_true", help="all of it in seconds")
    parser.add_argument("--only-show", action="store_true", help="train nothing: tables and figure of what is there")
    options = parser.parse_args()
    study = TOY if options.toy else replace(Study(), tokens=options.tokens)
    is_committed = study == Study()
    file = HERE / "results.jsonl" if is_committed else RUNS / f"{'toy' if options.toy else study.tokens}.jsonl"
    RUNS.mkdir(parents=True, exist_ok=True)
    if not options.only_show:
        carry_out(study, file)
    lines = read(file)
    print("\n".join(report(lines, study)))
    draw(lines, study, Path("docs/figures/infinite-compute.svg") if is_committed else file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
