"""Measure the critical batch at a checkpoint by branched training (Merrill et al., arXiv 2505.23971).

    megahp measure critical-batch runs/first --factors 1 2 4 8 --tokens 2e9 [--tolerance 0.01] [--ranks N]
        [--out FOLDER] [--json FILE] [--plot FILE]

For every factor k a branch continues from the checkpoint (or a run directory's newest), on the same data, at k times
the batch and sqrt(k) times the learning rate there, both constant; weight decay, betas and eps are those at the
checkpoint. All branches train the same tokens, rounded down to steps of the largest batch. You see a table, and the
critical batch: k* times the batch, where k* is the largest factor whose loss, smoothed over its last few steps, is at
most the tolerance (nats per token) above that of every smaller factor.

The branches are runs of `megahp train`, one after another on this machine; start it where the run was started, since
its data may have a relative path. After an interruption repeat the command to continue: a branch that has ended is not
trained again. One that diverges is harmful. +- in the table is the standard deviation of a smoothed loss from the noise
of single steps. Exit code 2: invalid input, which is reported before anything is trained where possible.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megahp import checkpoint
from megahp.commands.arguments import add_outputs, check_minimum
from megahp.commands.output import write_json
from megahp.config import BatchConfig, CheckpointConfig, Config, LogConfig, ScheduleConfig, config_to_dict, resolve
from megahp.diagnose import critical_batch
from megahp.diagnose.child_runs import check_same_config, has_diverged, is_done, train
from megahp.errors import UserError, complain
from megahp.log.metrics import read_run
from megahp.log.progress import human_count, human_duration
from megahp.parallel.layout import Layout, fit
from megahp.scaling.batch import Hyperparameters, follow, rule_of
from megahp.scaling.schedules import fraction
from megahp.train.prepare import prepare

MIN_STEPS = 5  # of the largest batch: the first step then has a weight of 1/16 in the smoothed loss
HEADER = f"factor {'batch':>9}{'tokens':>9}{'lr':>11}{'steps':>9}{'loss':>9}{'+-':>8}{'limit':>9}  harmless"
LINE = "{factor:<7g}{batch:>9,}{tokens:>9}{lr:>11.2e}{steps:>9,}{loss:>9.4f}{scatter:>8.4f}{limit:>9.4f}  {answer}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run directory: its newest")
    add("--factors", type=float, nargs="+", default=[1, 2, 4, 8], metavar="K", help="of the batch")
    add("--tokens", type=float, required=True, metavar="T", help="that each branch trains (the paper: 2e9)")
    add("--tolerance", type=float, default=critical_batch.TOLERANCE, metavar="NATS", help="per token")
    add("--ranks", type=int, metavar="N", help="of each branch (default: as many as at the checkpoint)")
    add("--out", type=Path, metavar="FOLDER", help="of the branches (default: beside the run)")
    add_outputs(parser, "the losses")


@dataclass(frozen=True)
class Origin:
    """The start of all branches."""

    path: Path  # the checkpoint
    config: Config  # of the run that wrote it
    ranks: int  # that wrote it
    tokens: int  # trained
    batch: int  # sequences of data.sequence_length
    values: Hyperparameters  # there: scaled by the batch rule, and lr by the schedule


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Check, train the branches, compare. Returns the exit code of a branch that failed, else 0."""
    origin = read_origin(arguments.checkpoint)
    ranks = origin.ranks if arguments.ranks is None else arguments.ranks
    check_options(arguments, origin)
    log = origin.config.log
    out = arguments.out or Path(log.root) / f"{log.name}-critical-batch" / origin.path.name
    length = origin.config.data.sequence_length
    # whole steps of the largest batch, so that branches whose batches divide it end at the same token
    step = round(max(arguments.factors) * origin.batch) * length
    end = origin.tokens + int(arguments.tokens) // step * step
    branches = {k: checked(branch(origin, k, end, out.resolve()), ranks) for k in sorted(arguments.factors)}
    if code := train_all(branches, ranks):
        return code
    losses_of_steps = {k: read_run(config.directory).column("loss").tolist() for k, config in branches.items()}
    for k, config in branches.items():
        if has_diverged(config.directory):  # even if its losses are finite: its gradients may not have been
            losses_of_steps[k] = [math.nan] * len(losses_of_steps[k])
    losses = {k: critical_batch.smoothed(steps) for k, steps in losses_of_steps.items()}
    if not math.isfinite(losses[1]):
        raise UserError(f"{branches[1].directory}, at the batch of {origin.path}, diverged; measure at another one")
    rows = [  # losses in nats per token; limit: the highest harmless one
        {
            "factor": k,
            "batch": config.batch.global_batch,
            "batch_tokens": config.batch.global_batch * length,
            "lr": config.optimizer.lr,
            "steps": len(losses_of_steps[k]),
            "loss": losses[k],
            "scatter": critical_batch.scatter(losses_of_steps[k]),
            "limit": critical_batch.limit(losses, k, arguments.tolerance),
            "harmless": critical_batch.harmless(losses, k, arguments.tolerance),
        }
        for k, config in branches.items()
    ]
    star = critical_batch.largest_harmless(losses, arguments.tolerance)
    show(rows, origin, star, arguments.tolerance)
    critical = round(star * origin.batch)
    results = {
        "checkpoint": str(origin.path),
        "tokens": origin.tokens,
        "branch_tokens": end - origin.tokens,
        "tolerance": arguments.tolerance,
        "batch": origin.batch,
        "sequence_length": length,
        "factor": star,
        "critical_batch": critical,
        "critical_batch_tokens": critical * length,
        "lower_bound": star == max(branches),
        "rows": rows,
        "machine": {"ranks": ranks, "torch": torch.__version__},
    }
    write_json(arguments.json, results)
    if arguments.plot:
        plot(arguments.plot, rows, star, arguments.tolerance)
    return 0


def read_origin(location: Path) -> Origin:
    """Return the batch and the hyperparameters at a checkpoint. Raises UserError."""
    path = checkpoint.find(location).resolve()
    state = checkpoint.read_state(path)
    config = resolve.from_dict(state["config"], str(path))
    tokens, batch = state["progress"]["tokens"], state["batch_plan"]["batch"]
    values = follow(rule_of(config.batch), config.optimizer, batch / config.batch.global_batch)
    multiplier = fraction(config.schedule, tokens, config.train.tokens)
    if multiplier == 0:
        after = f"after {tokens} of train.tokens = {config.train.tokens}"
        schedule = f"with schedule.name = {config.schedule.name!r}"
        raise UserError(f"at {path} the learning rate is 0, {after} {schedule}; name an earlier checkpoint")
    ranks = math.prod(Layout(**state["layout"]).shape)
    return Origin(path, config, ranks, tokens, batch, replace(values, lr=values.lr * multiplier))


def check_options(arguments: argparse.Namespace, origin: Origin) -> None:
    """Raise UserError for invalid options."""
    factors, text = arguments.factors, " ".join(f"{factor:g}" for factor in arguments.factors)
    if not all(1 <= factor < math.inf for factor in factors):
        raise UserError(f"--factors {text}: each must be at least 1, and finite")
    if len(set(factors)) < len(factors):
        raise UserError(f"--factors {text}: each is trained once; name it once")
    if 1 not in factors:
        raise UserError(f"--factors {text}: 1 is missing, the reference for the others; add it")
    for factor in factors:
        if not math.isclose(factor * origin.batch, round(factor * origin.batch)):
            batch = f"{factor:g} x {origin.batch} sequences, the batch at {origin.path}"
            raise UserError(f"--factors {text}: {batch}, is not whole; change the factor")
    minimum = MIN_STEPS * round(max(factors) * origin.batch) * origin.config.data.sequence_length
    if not minimum <= arguments.tokens < math.inf:
        steps = f"{MIN_STEPS} steps of {max(factors):g} x {origin.batch} sequences"
        few = f"--tokens {arguments.tokens:g} must be at least {minimum}, {steps}"
        raise UserError(f"{few}; raise it, or omit the largest factor")
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance:g} must be at least 0 nats per token, such as 0.01")
    check_minimum(arguments, ranks=1)


def branch(origin: Origin, factor: float, end: int, out: Path) -> Config:
    """Return the config of one branch, unchecked.

    Schedule, batch, checkpoint and log start from their defaults, because settings of another schedule or policy would
    be refused.
    """
    config = origin.config
    lr = origin.values.lr * math.sqrt(factor)
    optimizer = replace(config.optimizer, **asdict(replace(origin.values, lr=lr)))
    if optimizer.name == "muon":  # its rate keeps its ratio to lr
        optimizer = replace(optimizer, muon_lr=config.optimizer.muon_lr * lr / config.optimizer.lr)
    train = replace(config.train, start_from=str(origin.path), tokens=end, steps=0)
    global_batch, micro_batch = round(factor * origin.batch), config.batch.micro_batch
    return replace(
        config,
        schedule=ScheduleConfig(name="constant", start=origin.tokens, warmup=0.0),
        batch=BatchConfig(policy="constant", global_batch=global_batch, micro_batch=micro_batch),
        optimizer=optimizer,
        train=replace(train, validate_every=0, validation_samples=0),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(root=str(out), name=f"k-{factor:g}", every=1, tensorboard=False),
    )


def checked(config: Config, ranks: int) -> Config:
    """Return the config as `megahp train` will resolve it, after all of its checks. Raises UserError."""
    try:
        config = resolve.from_dict(config_to_dict(config), "branch")
        check_same_config(config)
        return prepare(config, fit(config.parallel, ranks), ranks, resume=True)
    except UserError as error:
        raise UserError(f"branch {config.log.name}: {error}") from None


def train_all(branches: Mapping[float, Config], ranks: int) -> int:
    """Train the branches that have not ended. Returns the exit code of one that failed, else 0."""
    missing = [config for config in branches.values() if not is_done(config.directory)]
    if done := len(branches) - len(missing):
        print(f"{done} of {len(branches)} branches are already trained", flush=True)
    began = time.monotonic()
    for number, config in enumerate(missing, start=1):
        name, batch, lr = config.log.name, config.batch.global_batch, config.optimizer.lr
        print(f"branch {name}: {batch:,} sequences a step, learning rate {lr:.3g}", flush=True)
        code = train(config, ranks)
        if code and not has_diverged(config.directory):
            if code != 2:  # invalid input, which the run itself has reported
                complain(f"branch {name} ended with exit code {code}; repeat the command to continue")
            return code
        eta = human_duration((time.monotonic() - began) / number * (len(missing) - number))
        outcome = "diverged, which is harmful" if code else "done"
        print(f"branch {name} {outcome}; {number} of {len(missing)}, ETA {eta}", flush=True)
    return 0


def show(rows: Sequence[Mapping[str, Any]], origin: Origin, star: float, tolerance: float) -> None:
    """Print the table, a warning where noise exceeds the tolerance, and the result in a sentence."""
    print(HEADER)
    for row in rows:
        answer = "yes" if row["harmless"] else "no"
        print(LINE.format(**row, tokens=human_count(row["batch_tokens"]), answer=answer))
    noisiest = max(row["scatter"] for row in rows if math.isfinite(row["scatter"]))
    if noisiest > tolerance:
        more = f"scatter by up to {noisiest:.2g}, more than --tolerance {tolerance:g}"
        print(f"the smoothed losses {more}: the result may be chance; raise it")
    batch, length = round(star * origin.batch), origin.config.data.sequence_length
    size = f"{star:g} x {origin.batch:,} = {batch:,} sequences ({human_count(batch * length)} tokens)"
    if star == rows[-1]["factor"]:
        size = f"at least {size}; the largest factor tested was still harmless, so this is a lower bound"
    elif star == 1:
        size += "; no factor above 1 was harmless, so it may be less"
    print(f"critical batch at {human_count(origin.tokens)} tokens: {size}")


def plot(file: Path, rows: Sequence[Mapping[str, Any]], star: float, tolerance: float) -> None:
    """Draw each branch's loss against its batch, and the highest harmless loss. Raises UserError."""
    from megahp.report.figures import PALETTE, plot_in

    batches, losses, limits = ([row[key] for row in rows] for key in ("batch", "loss", "limit"))
    with plot_in(file, 5, 3) as figure:
        axes = figure.add_subplot()
        axes.plot(batches, losses, "o-", color=PALETTE["run0"], label="smoothed loss")
        label = f"least of the smaller + {tolerance:g}"
        axes.plot(batches[1:], limits[1:], color=PALETTE["accent"], ls=(0, (3, 1.3)), label=label)
        critical = next(row["batch"] for row in rows if row["factor"] == star)
        axes.axvline(critical, color=PALETTE["muted"], lw=1, label=f"largest harmless batch, {critical:,}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axes.set(xlabel="sequences per step", ylabel="nats per token")
        axes.legend(frameon=False)
