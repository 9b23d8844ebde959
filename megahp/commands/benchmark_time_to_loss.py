"""Compare how long settings train until they reach a validation loss.

    megahp benchmark time-to-loss RUN.toml [section.key=value ...] --target 2.0 --every 20 --out FOLDER
        --entries "constant: batch.policy=constant" "recipe: recipe.toml" ... [--seeds 1,2,3] [--ranks N]
        [--json FILE] [--plot FILE]

An entry is a label and what it sets over the run file, or over another one named first, such as one that `megahp
recipe` wrote. All are validated on the same samples. In the manner of AlgoPerf (arXiv 2306.07179): an entry given once
is timed as it is, whatever it tunes by itself while it trains; an entry given several times under one label has as many
trials, of which the fastest of each seed counts, and the time of all is shown beside it.

Time is that of the steps, from batch to update, until the first validation at or below the target; every --every steps
there is one, which is not counted. Runs are trained here, one after another, each seed's entries in turn, to the end of
their tokens: a schedule that decays reaches its loss late. Keep the machine otherwise idle. After an interruption the
same command resumes. You see a row per entry: median and range over the seeds. Exit code 2: invalid input.
"""

import argparse
import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megahp.commands.arguments import add_outputs, folder_name, parse_integers, split_label
from megahp.commands.output import provenance, write_json
from megahp.config import CheckpointConfig, Config, LogConfig, get_setting, resolve, with_values
from megahp.diagnose.child_runs import check_same_config, is_done, train
from megahp.errors import UserError, complain
from megahp.files import open_unlinked
from megahp.log.metrics import read_metrics
from megahp.parallel.layout import fit
from megahp.train.prepare import prepare

# what a validation loss is of
SAMPLES = (
    *("data.train", "data.weights", "data.mixtures", "data.tokenizer", "data.sequence_length", "data.validation"),
    *("data.validation_fraction", "data.mask_documents", "data.skip", "train.validation_samples"),
)
OWN = ("checkpoint.", "log.", "train.seed", "train.validate_every", "resilience.stop_after")  # what the benchmark sets
COLUMNS = ("entry", "trials", "reached", "seconds", "range", "steps", "least loss", "all trials, s")
LINE = "{:<24}{:>7}{:>9}{:>10}{:>20}{:>9}{:>12}{:>15}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every entry")
    add("--target", type=float, required=True, metavar="LOSS", help="validation loss to reach, nats per token")
    add("--entries", nargs="+", required=True, metavar="ENTRY", help="'LABEL: [RUN.toml] section.key=value ...' each")
    add("--every", type=int, default=20, metavar="N", help="steps between validations (default 20)")
    add("--seeds", type=parse_integers, default=[1, 2, 3], metavar="N,N,...", help="default 1,2,3")
    add("--ranks", type=int, default=1, metavar="N", help="per run, on this machine (default 1)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the runs")
    add_outputs(parser, "loss over time")


@dataclass(frozen=True)
class Trial:
    """One training run of an entry."""

    label: str
    number: int
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.label}, trial {self.number}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a finished trial took. seconds, steps: until the target, infinite if it was not reached."""

    trial: Trial
    seconds: float
    steps: float
    total_seconds: float
    losses: Sequence[tuple[float, float]]  # (seconds, validation loss)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    trials = read_trials(options)
    outcomes: list[Outcome] = []
    for number, trial in enumerate(trials, start=1):
        if not is_done(trial.config.directory) and (code := train_trial(trial, options.ranks)):
            complain(f"{trial} ended with exit code {code}; repeat the command to continue")
            return code
        outcomes.append(outcome := measure(trial, options.target))
        reached = f"{options.target:g} after {outcome.seconds:.1f} s" if outcome.steps < math.inf else "not reached"
        print(f"[{number}/{len(trials)}] {trial}: {reached}", flush=True)
    rows = make_rows(outcomes)
    print(LINE.format(*COLUMNS))
    for row in rows:
        low, high = row["range"]
        seconds = f"{row['seconds']:.1f}", f"[{low:.1f}, {high:.1f}]"
        shares = row["trials"], f"{row['reached']}/{row['seeds']}"
        steps, loss, total = f"{row['steps']:.0f}", f"{row['least_loss']:.4f}", f"{row['total_seconds']:.1f}"
        print(LINE.format(row["entry"], *shares, *seconds, steps, loss, total))
    write_json(options.json, {**provenance(words), "target": options.target, "rows": rows})
    if options.plot:
        plot(options.plot, outcomes, options.target)
    return 0


def read_trials(options: argparse.Namespace) -> list[Trial]:
    """Return all trials, checked as `megahp train` would, each seed's entries one after another. Raises UserError."""
    if not 0 < options.target < math.inf:
        raise UserError(f"--target {options.target:g} must be a loss above 0")
    for name in ("every", "ranks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {options.seeds} has a seed twice; name it once")
    labels = dict.fromkeys(label for label, _ in map(split_label, options.entries))
    if len(set(map(folder_name, labels))) < len(labels):
        raise UserError(f"--entries: two of {', '.join(labels)} have the same folder name; give each another label")
    trials: list[Trial] = []
    for seed in options.seeds:
        counts: dict[str, int] = {}
        for text in options.entries:
            label, words = split_label(text)
            counts[label] = counts.get(label, 0) + 1
            file = Path(words.pop(0)) if words and words[0].endswith(".toml") else options.run
            resolved = resolve.load(file, [*options.overrides, *words])
            for key, origin in resolved.origins.items():
                if origin == "command line" and key.startswith(OWN):
                    raise UserError(f"{key} ({label}) is set by the benchmark; remove it")
            config = resolved.config
            name = f"{folder_name(label)}/{counts[label]}/{seed}"
            own = {
                "train.seed": seed,
                "train.validate_every": options.every,
                "train.validation_samples": config.train.validation_samples or 64,
                "resilience.stop_after": 0.0,
            }
            log = LogConfig(root=str(options.out), name=name, every=1, tensorboard=False, baselines=False)
            config = with_values(replace(config, checkpoint=CheckpointConfig(keep=1), log=log), own)
            try:
                config = prepare(config, fit(config.parallel, options.ranks), options.ranks, resume=True)
                check_same_config(config)
            except UserError as error:
                raise UserError(f"{label}: {error}") from None
            trials.append(Trial(label, counts[label], seed, config))
    first = trials[0]
    for trial, key in itertools.product(trials, SAMPLES):
        if (ours := get_setting(trial.config, key)) != (other := get_setting(first.config, key)):
            raise UserError(
                f"{key} = {ours!r} of {trial.label} and {other!r} of {first.label} validate on other samples, whose "
                "losses do not compare; give all entries the same"
            )
    return trials


def train_trial(trial: Trial, ranks: int) -> int:
    """Train or resume a run; return its exit code, 0 for one that diverged, whose loss is a result."""
    directory = trial.config.directory
    directory.mkdir(parents=True, exist_ok=True)
    with open_unlinked(directory / "train.log", "a") as log:
        code = train(trial.config, ranks, log)
    if is_done(directory):
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return 0
    return code


def measure(trial: Trial, target: float) -> Outcome:
    """Return a finished run's time to the target, and its losses over time."""
    losses, elapsed = list[tuple[float, float]](), 0.0
    seconds = steps = math.inf
    for record in read_metrics(trial.config.directory):
        elapsed += record.get("step_seconds") or 0.0
        if (loss := record.get("validation_loss")) is None:
            continue
        losses.append((elapsed, loss))
        if loss <= target and steps == math.inf:
            seconds, steps = elapsed, record["step"]
    return Outcome(trial, seconds, steps, elapsed, losses)


def make_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row per entry, the fastest first: over the seeds, of each seed's fastest trial."""
    rows = []
    for label in dict.fromkeys(outcome.trial.label for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.trial.label == label]
        seeds = list(dict.fromkeys(outcome.trial.seed for outcome in mine))
        best = [min((o for o in mine if o.trial.seed == seed), key=lambda o: o.seconds) for seed in seeds]
        times = [outcome.seconds for outcome in best]
        rows.append(
            {
                "entry": label,
                "trials": len(mine) // len(seeds),
                "seeds": len(seeds),
                "reached": sum(map(math.isfinite, times)),
                "seconds": median(times),
                "range": [min(times), max(times)],
                "steps": median(outcome.steps for outcome in best),
                "least_loss": median(min((loss for _, loss in o.losses), default=math.inf) for o in best),
                "total_seconds": sum(outcome.total_seconds for outcome in mine) / len(seeds),
            }
        )
    return sorted(rows, key=lambda row: (row["seconds"], row["least_loss"]))


def plot(file: Path, outcomes: Sequence[Outcome], target: float) -> None:
    """Draw each entry's validation loss over time, a line a run. Raises UserError."""
    from megahp.report.figures import PALETTE, colour, plot_in

    labels = list(dict.fromkeys(outcome.trial.label for outcome in outcomes))
    with plot_in(file, 6, 3.6) as figure:
        axes = figure.add_subplot()
        for outcome in outcomes:
            label, points = outcome.trial.label, np.array(outcome.losses).reshape(-1, 2)
            once = label if outcome.trial == next(o.trial for o in outcomes if o.trial.label == label) else None
            axes.plot(*points.T, lw=1, color=PALETTE[colour(labels.index(label))], label=once)
        axes.axhline(target, color=PALETTE["muted"], lw=0.8, ls=(0, (1, 2)))
        axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
        axes.legend(frameon=False)
