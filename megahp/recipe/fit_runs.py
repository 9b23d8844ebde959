"""`megahp fit`: from run directories and tables of runs to laws, and what is printed and drawn of them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megahp.config import Config, get_setting
from megahp.errors import UserError
from megahp.files import read_text
from megahp.log.events import STARTS
from megahp.log.metrics import Record, newest_metrics, read_events
from megahp.log.progress import human_count
from megahp.log.standing import runs_below
from megahp.model.build import longest
from megahp.recipe import fit
from megahp.recipe.fit import FinishedRun, Fit
from megahp.scaling import flops
from megahp.scaling.laws import INTERVAL, LossLaw
from megahp.scaling.parameterization import Role, table_of
from megahp.train.run import read_config


class Kind(NamedTuple):
    """One kind of law: how it is fitted, and how it and its axes are written."""

    fit: Callable[..., Fit]
    formula: str
    x: str
    y: str


KINDS = {
    "loss": Kind(fit.fit_loss, "L(N, D) = E + A / N^alpha + B / D^beta", "tokens D", "nats per token"),
    "timescale": Kind(fit.fit_timescale, "tau_opt = scale (D / N)^exponent", "tokens per parameter", "optimal tau"),
    "optimal_batch": Kind(fit.fit_optimal_batch, "B_opt = scale D^exponent", "tokens D", "optimal batch, tokens"),
    "critical_batch": Kind(
        fit.fit_critical_batch, "B_crit = scale D_min^exponent", "tokens D_min", "critical batch, tokens"
    ),
}
COMPUTE = (*(10.0**power for power in range(18, 24)), 5.76e23, 1e24)  # FLOPs; 5.76e23 is Chinchilla's
OF_THE_TEXT = ("data.train", "data.tokenizer", "data.sequence_length", "data.validation_fraction")
LEAST_DRAWS = 20
BEYOND = 1e30  # all that is counted or measured of a run, and its inverse
NEEDED, OPTIONAL = ("parameters", "tokens", "loss"), ("batch", "lr", "weight_decay")  # of a table's objects


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The runs of run directories, of folders that hold some, such as a sweep's, and of .jsonl tables; and notes about
    them. Raises UserError for a run that cannot be used; one that a folder merely holds is left out, with a note."""
    runs: list[FinishedRun] = []
    notes: list[str] = []
    trees: list[Config] = []

    def add(run: Path) -> None:
        config = read_config(run)
        runs.append(_read_run(run, config, notes))
        trees.append(config)

    for path in paths:
        if path.suffix == ".jsonl":
            runs += _read_table(path)
        elif (path / "config.toml").exists() or not (below := list(runs_below(path))):
            add(path)
        else:
            for run in below:
                try:
                    add(run)
                except UserError as error:
                    notes.append(f"left out: {error}")
    for key in OF_THE_TEXT:
        if len({get_setting(config, key) for config in trees}) > 1:
            notes.append(f"the runs differ in {key}, so their losses may not compare")
    return runs, notes


def _read_run(path: Path, config: Config, notes: list[str]) -> FinishedRun:
    """A run directory's run, of as many tokens as it was planned for, which it keeps to within a batch, or as it took
    until train.steps."""
    last, events = next(newest_metrics(path), None), [event["event"] for event in read_events(path)]
    if last is None:
        raise UserError(f"{path} has logged no step; train it, or leave it out")
    batch, tokens = config.batch.global_batch * config.data.sequence_length, config.train.tokens
    ended = next((event for event in reversed(events) if event in ("finished", *STARTS)), None)
    is_short = last["tokens"] + (last.get("global_batch") or 0) * longest(config) <= tokens
    is_cut = is_short and 0 < config.train.steps <= last["step"]
    if ended != "finished" or is_short and not is_cut:
        done = f"{last['tokens']} of train.tokens = {tokens} are done"
        raise UserError(f"{path} has not ended: {done}; finish it, or leave it out")
    if is_cut:
        notes.append(
            f"{path} ended by train.steps = {config.train.steps}, its learning rate that of {tokens} tokens; it "
            f"counts as a run of the {last['tokens']} it took"
        )
        tokens = last["tokens"]
    if (loss := last.get("validation_loss")) is None:
        raise UserError(f"{path} has no validation loss at its end; set train.validation_samples, or leave it out")
    if config.sparsity.method != "none":
        raise UserError(f"{path} is sparse, and the laws are of dense models; leave it out")
    rule, optimizer = table_of(config).rules[Role.HIDDEN], config.optimizer
    hidden = {"lr": optimizer.lr * rule.lr, "weight_decay": optimizer.weight_decay * rule.weight_decay}
    values = {"batch": batch, **hidden}
    if not {"batch", "branched"}.isdisjoint(events):
        notes.append(f"{path}: its batch changes, or it starts from another run; it serves the loss law alone")
        values = {}
    elif optimizer.name != "adamw":
        notes.append(f"{path}: tau is AdamW's, not {optimizer.name}'s; it does not serve the timescale's law")
        values = {"batch": batch}
    return FinishedRun(str(path), flops.parameters(config.model, longest(config)), tokens, loss, **values)


def _read_table(path: Path) -> list[FinishedRun]:
    """One run for each line's object. Raises UserError naming file and line."""
    runs, text = [], read_text(path, "table of runs", "name a run directory or a .jsonl table")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            run = json.loads(line)
            if not isinstance(run, dict):
                raise ValueError("not a JSON object")
            if unknown := run.keys() - {*NEEDED, *OPTIONAL, "name"}:
                raise ValueError(f"{', '.join(sorted(unknown))} is unknown")
            for key in (*NEEDED, *(key for key in OPTIONAL if run.get(key) is not None)):
                value = run.get(key)
                zero = key == "weight_decay" and value == 0
                if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or zero):
                    raise ValueError(f"{key} = {json.dumps(value)} is no number above 0")
                if not (1 / BEYOND < value < BEYOND or zero):  # products of several would leave the floats' range
                    raise ValueError(f"{key} = {json.dumps(value)[:40]} is beyond {1 / BEYOND:g} to {BEYOND:g}")
                run[key] = float(value)
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}; each has {', '.join(NEEDED + OPTIONAL)}") from None
        runs.append(FinishedRun(**{"name": f"{path} line {number}", **run}))
    return runs


def fit_laws(
    runs: Sequence[FinishedRun], asked: Sequence[str] | None, tied: bool, draws: int, seed: int
) -> tuple[dict[str, Fit], list[str]]:
    """The laws asked for, or, where none is, all the runs suffice for; and why others were not fitted. Raises UserError
    for a law asked for that cannot be fitted, or where none can."""
    if draws < LEAST_DRAWS:
        raise UserError(f"--draws {draws} give no interval; make them at least {LEAST_DRAWS}")
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")
    if tied and asked and "loss" not in asked:
        raise UserError("--tied-exponents is for the loss law; ask for --loss too, or leave it out")
    fits, refused = {}, []
    for name in asked or KINDS:
        options = {"tied": tied} if name == "loss" else {}
        try:
            fits[name] = KINDS[name].fit(runs, draws=draws, seed=seed, **options)
        except UserError as error:
            if asked:
                raise
            refused.append(f"not fitted: {error}")
    if not fits:
        raise UserError("\n".join(["the runs suffice for no law", *refused]))
    return fits, refused


def summary(name: str, fitted: Fit) -> Record:
    """What there is to say of one law."""
    law, kind, more = fitted.law, KINDS[name], {}
    if isinstance(law, LossLaw):
        constants = dict(zip(("E", "A", "B", "alpha", "beta"), law.constants, strict=True))
        ranges = {"N": law.parameters, "D": law.tokens}
        more = {"compute_optimal": [optimal(law, compute) for compute in COMPUTE]}
    else:
        constants, ranges = {"scale": law.scale, "exponent": law.exponent}, {kind.x: law.fitted}
    return {
        "formula": kind.formula,
        "source": law.source,
        "confidence": law.confidence,
        "constants": constants,
        "intervals": dict(zip(constants, np.quantile(law.draws, INTERVAL, axis=0).T.tolist(), strict=True)),
        "fitted": ranges,
        "notes": fitted.notes,
        **more,
    }


def optimal(law: LossLaw, compute: float) -> Record:
    """The run of least loss at 6 N D FLOPs, and whether it lies within what the law was fitted on."""
    parameters, tokens = law.optimum(compute)
    floor, a, b, alpha, beta = np.array(law.draws).T  # all at once
    drawn = LossLaw(floor, a, b, alpha, beta, "", "").optimum(compute)
    inside = law.parameters[0] <= parameters <= law.parameters[1] and law.tokens[0] <= tokens <= law.tokens[1]
    return {
        "compute": compute,
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "tokens_per_parameter_interval": np.quantile(drawn[1] / drawn[0], INTERVAL).tolist(),
        "loss": law(parameters, tokens),
        "loss_interval": law.interval(parameters, tokens),
        "inside": inside,
    }


def text(found: Mapping[str, Record], notes: Sequence[str]) -> str:
    """The laws as a person reads them."""
    lines = []
    for name, law in found.items():
        lines += [f"{name}: {law['formula']}", f"  {law['source']}; {law['confidence']}"]
        for constant, value in law["constants"].items():
            low, high = law["intervals"][constant]
            lines.append(f"  {constant:<9}{value:<10.4g} {low:.4g} to {high:.4g}")
        ranges = (f"{x} {human_count(low)} to {human_count(high)}" for x, (low, high) in law["fitted"].items())
        lines += [f"  fitted on {', '.join(ranges)}", *(f"  {note}" for note in law["notes"])]
        if rows := law.get("compute_optimal"):
            lines += ["  compute-optimal:", "    FLOPs      N      D      D / N                  loss"]
            for row in rows:
                ratios, losses = row["tokens_per_parameter_interval"], row["loss_interval"]
                ratio = f"{row['tokens_per_parameter']:.1f} ({ratios[0]:.1f} to {ratios[1]:.1f})"
                loss = f"{row['loss']:.4f} ({losses[0]:.4f} to {losses[1]:.4f})"
                sizes = f"{human_count(row['parameters']):<6} {human_count(row['tokens']):<6}"
                beyond = "" if row["inside"] else "  beyond the runs"
                lines.append(f"    {row['compute']:<10.3g} {sizes} {ratio:<22} {loss}{beyond}")
        lines.append("")
    low, high = (round(100 * share) for share in INTERVAL)
    return "\n".join([*lines, f"intervals: the {low} to {high} % quantiles of the bootstrap draws", *notes])


def plot(file: Path, fits: Mapping[str, Fit]) -> None:
    """Draw each law with its points, and its residuals beside it. Raises UserError."""
    from megahp.report.figures import plot_in

    with plot_in(file, 8, 2.9 * len(fits)) as figure:
        for (name, fitted), axes in zip(fits.items(), figure.subplots(len(fits), 2, squeeze=False), strict=True):
            _draw(name, fitted, *axes)


def _draw(name: str, fitted: Fit, left: Any, right: Any) -> None:
    """Points and law, of a loss law a line for each N, and beside them the residuals."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from megahp.report.figures import PALETTE, colour

    points, residuals = fitted.points, 100 * fitted.residuals
    sizes = points[:, 0] if name == "loss" else np.zeros(len(points))
    for index, size in enumerate(np.unique(sizes)):
        of_size, hue = sizes == size, PALETTE[colour(index)]
        x, y = points[of_size, -2:].T
        along = np.geomspace(x.min(), x.max())
        law = fitted.law(size, along) if name == "loss" else fitted.law(along)
        left.plot(x, y, "o", color=hue, ms=4)
        left.plot(along, law, color=hue, lw=1, label=f"N = {human_count(size)}")
        right.plot(x, residuals[of_size], "o", color=hue, ms=4)
    left.set(xscale="log", yscale="linear" if name == "loss" else "log", xlabel=KINDS[name].x, ylabel=KINDS[name].y)
    left.set_title(f"{name}, {fitted.law.source}")
    right.set(xscale="log", xlabel=KINDS[name].x, ylabel="found over law, %", title=f"R^2 {fitted.r_squared:.4f}")
    right.axhline(0, color=PALETTE["muted"], lw=1)
    for axis in [left.xaxis, right.xaxis] + [left.yaxis] * (name != "loss"):
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
        axis.set_major_formatter(lambda value, _: human_count(value))
    if 1 < len(np.unique(sizes)) <= 8:
        left.legend(frameon=False)
