"""Read finished runs for `megahp fit`, fit the laws they suffice for, and print and plot these."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megahp.config import Config, get_setting, longest
from megahp.config.resolve import read_config
from megahp.errors import UserError
from megahp.files import read_text
from megahp.log.events import STARTS
from megahp.log.metrics import Record, newest_metrics, read_events
from megahp.log.progress import human_count
from megahp.log.status import runs_below
from megahp.recipe import fit
from megahp.recipe.fit import FinishedRun, Fit
from megahp.scaling import flops
from megahp.scaling.laws import INTERVAL, ErrorLaw, LossLaw, quantiles
from megahp.scaling.parameterization import Role, table_of


class LawKind(NamedTuple):
    """How one kind of law is fitted and displayed."""

    fit: Callable[..., Fit]
    formula: str
    x: str
    y: str


KINDS = {
    "loss": LawKind(fit.fit_loss, "L(N, D) = E + A / N^alpha + B / D^beta", "tokens D", "nats per token"),
    "timescale": LawKind(fit.fit_timescale, "tau_opt = scale (D / N)^exponent", "tokens per parameter", "optimal tau"),
    "optimal_batch": LawKind(fit.fit_optimal_batch, "B_opt = scale D^exponent", "tokens D", "optimal batch, tokens"),
    "critical_batch": LawKind(
        fit.fit_critical_batch, "B_crit = scale D_min^exponent", "tokens D_min", "critical batch, tokens"
    ),
    "task_error": LawKind(
        fit.fit_task_error, "error = most - scale exp(-exponent L)", "nats per token", "downstream error"
    ),
}
COMPUTE = (*(10.0**power for power in range(18, 24)), 5.76e23, 1e24)  # FLOPs; 5.76e23 is Chinchilla's
TEXT_SETTINGS = ("data.train", "data.tokenizer", "data.sequence_length", "data.validation_fraction")
MIN_DRAWS = 20  # an 80 % interval of fewer is its two extremes
BEYOND = 1e30  # a table's largest value, and 1 / BEYOND its smallest: products of several must stay floats
REQUIRED, OPTIONAL = ("parameters", "tokens", "loss"), ("batch", "lr", "weight_decay", "error")  # keys of a table


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read run directories, folders that hold some, such as a sweep's, and .jsonl tables; return runs and notes.

    Raises UserError for a run that cannot be used; in a folder of runs it is skipped, with a note.
    """
    runs: list[FinishedRun] = []
    notes: list[str] = []
    configs: list[Config] = []

    for path in paths:
        if path.suffix == ".jsonl":
            runs += _read_table(path)
            continue
        below = [] if (path / "config.toml").exists() else list(runs_below(path))
        for directory in below or [path]:
            try:
                config = read_config(directory)
                runs.append(_read_run(directory, config, notes))
                configs.append(config)
            except UserError as error:
                if not below:
                    raise
                notes.append(f"skipped: {error}")
    for key in TEXT_SETTINGS:
        if len({get_setting(config, key) for config in configs}) > 1:
            notes.append(f"the runs differ in {key}, so their losses may not compare")
    return runs, notes


def _read_run(path: Path, config: Config, notes: list[str]) -> FinishedRun:
    """Read a run directory. Its tokens are train.tokens, reached to within a batch, or those until train.steps."""
    last, events = next(newest_metrics(path), None), [event["event"] for event in read_events(path)]
    if last is None:
        raise UserError(f"{path} has logged no step; train it, or remove it from the list")
    batch, tokens = config.step_tokens, config.train.tokens
    ended = next((event for event in reversed(events) if event in ("finished", *STARTS)), None)
    is_short = last["tokens"] + (last.get("global_batch") or 0) * longest(config) <= tokens
    is_cut = is_short and 0 < config.train.steps <= last["step"]
    if ended != "finished" or is_short and not is_cut:
        done = f"{last['tokens']} of train.tokens = {tokens} are trained"
        raise UserError(f"{path} has not ended: {done}; resume it, or remove it from the list")
    if is_cut:
        notes.append(
            f"{path} ended by train.steps = {config.train.steps}, with the schedule of {tokens} tokens; it counts as a "
            f"run of the {last['tokens']} tokens it trained on"
        )
        tokens = last["tokens"]
    if (loss := last.get("validation_loss")) is None:
        raise UserError(
            f"{path} has no validation loss at its end; set train.validation_samples, or remove it from the list"
        )
    if config.sparsity.method != "none":
        raise UserError(f"{path} is sparse, and the laws are of dense models; remove it from the list")
    if config.model.quantize != "none" or config.compute.fp4:
        raise UserError(f"{path} is quantized, and the laws are of full precision; remove it from the list")
    if config.distill.teachers:
        raise UserError(f"{path} learned from teachers, and the laws are of data alone; remove it from the list")
    rule, optimizer = table_of(config).rules[Role.HIDDEN], config.optimizer
    hidden = {"lr": optimizer.lr * rule.lr, "weight_decay": optimizer.weight_decay * rule.weight_decay}
    values = {"batch": batch, **hidden}
    if not {"batch", "branched"}.isdisjoint(events):
        notes.append(f"{path}: its batch changes, or it starts from another run; it is used for the loss law only")
        values = {}
    elif optimizer.name != "adamw":
        notes.append(f"{path}: tau is AdamW's, not {optimizer.name}'s; it is not used for the timescale law")
        values = {"batch": batch}
    parameters = flops.parameters(config.model, longest(config), active=True)
    return FinishedRun(str(path), parameters, tokens, loss, **values)


def _read_table(path: Path) -> list[FinishedRun]:
    """Read one run from each line's JSON object. Raises UserError naming file and line."""
    runs, text = [], read_text(path, "table of runs", "name a run directory or a .jsonl table")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            run = json.loads(line)
            if not isinstance(run, dict):
                raise ValueError("not a JSON object")
            if unknown := run.keys() - {*REQUIRED, *OPTIONAL, "name"}:
                raise ValueError(f"{', '.join(sorted(unknown))} is unknown")
            for key in (*REQUIRED, *(key for key in OPTIONAL if run.get(key) is not None)):
                value = run.get(key)
                zero = key in ("weight_decay", "error") and value == 0
                if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or zero):
                    raise ValueError(f"{key} = {json.dumps(value)} is not a number above 0")
                if not (1 / BEYOND < value < BEYOND or zero):
                    raise ValueError(f"{key} = {json.dumps(value)[:40]} is not within {1 / BEYOND:g} to {BEYOND:g}")
                if key == "error" and value > 1:
                    raise ValueError(f"error = {value:g} is no share of wrong answers, from 0 to 1")
                run[key] = float(value)
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}; an object has {', '.join(REQUIRED + OPTIONAL)}") from None
        runs.append(FinishedRun(**{"name": f"{path} line {number}", **run}))
    return runs


def fit_laws(
    runs: Sequence[FinishedRun], asked: Sequence[str] | None, tied: bool, draws: int, seed: int
) -> tuple[dict[str, Fit], list[str]]:
    """Fit the laws asked for, or by default all that the runs suffice for; return them, and why others were not fitted.

    Raises UserError for a law asked for that cannot be fitted, or if none can.
    """
    if draws < MIN_DRAWS:
        raise UserError(f"--draws {draws} are too few for an interval; give at least {MIN_DRAWS}")
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")
    if tied and asked and "loss" not in asked:
        raise UserError("--tied-exponents is for the loss law; add --loss, or remove it")
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
        raise UserError("\n".join(["the runs do not suffice for any law", *refused]))
    return fits, refused


def summary(name: str, fitted: Fit) -> Record:
    """Return what `megahp fit` prints about one law, for JSON."""
    law, kind, more = fitted.law, KINDS[name], {}
    if isinstance(law, LossLaw):
        constants = dict(zip(("E", "A", "B", "alpha", "beta"), law.constants, strict=True))
        ranges = {"N": law.parameters, "D": law.tokens}
        more = {"compute_optimal": [optimal(law, compute) for compute in COMPUTE]}
    else:
        names = ["most"] * isinstance(law, ErrorLaw) + ["scale", "exponent"]
        constants, ranges = {key: getattr(law, key) for key in names}, {kind.x: law.fitted}
    return {
        "formula": kind.formula,
        "source": law.source,
        "confidence": law.confidence,
        "constants": constants,
        "intervals": dict(zip(constants, quantiles(law.draws).T.tolist(), strict=True)),
        "fitted": ranges,
        "notes": fitted.notes,
        **more,
    }


def optimal(law: LossLaw, compute: float) -> Record:
    """Return the run of least loss at 6 N D FLOPs, and whether N and D are within the range the law was fitted on."""
    parameters, tokens = law.optimum(compute)
    floor, a, b, alpha, beta = np.array(law.draws).T  # a law of arrays: all draws at once
    drawn = LossLaw(floor, a, b, alpha, beta, "", "").optimum(compute)
    inside = law.parameters[0] <= parameters <= law.parameters[1] and law.tokens[0] <= tokens <= law.tokens[1]
    return {
        "compute": compute,
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "tokens_per_parameter_interval": quantiles(drawn[1] / drawn[0]).tolist(),
        "loss": law(parameters, tokens),
        "loss_interval": law.interval(parameters, tokens),
        "inside": inside,
    }


def text(laws: Mapping[str, Record], notes: Sequence[str]) -> str:
    """Format the summaries of laws, by name, for the terminal."""
    lines = []
    for name, law in laws.items():
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
    """Plot each law with its points, and its residuals beside it. Raises UserError."""
    from megahp.report.figures import plot_in

    with plot_in(file, 8, 2.9 * len(fits)) as figure:
        for (name, fitted), axes in zip(fits.items(), figure.subplots(len(fits), 2, squeeze=False), strict=True):
            _draw(name, fitted, *axes)


def _draw(name: str, fitted: Fit, left: Any, right: Any) -> None:
    """Plot points and law, for a loss law a line per N, on the left axes, and residuals on the right."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from megahp.report.figures import PALETTE, colour

    points, residuals = fitted.points, 100 * fitted.residuals
    sizes = points[:, 0] if name == "loss" else np.zeros(len(points))
    for index, size in enumerate(np.unique(sizes)):
        of_size, hue = sizes == size, PALETTE[colour(index)]
        x, y = points[of_size, -2:].T
        grid = np.geomspace(x.min(), x.max())
        law = fitted.law(size, grid) if name == "loss" else fitted.law(grid)
        left.plot(x, y, "o", color=hue, ms=4)
        left.plot(grid, law, color=hue, lw=1, label=f"N = {human_count(size)}")
        right.plot(x, residuals[of_size], "o", color=hue, ms=4)
    left.set(xscale="log", yscale="linear" if name == "loss" else "log", xlabel=KINDS[name].x, ylabel=KINDS[name].y)
    left.set_title(f"{name}, {fitted.law.source}")
    right.set(xscale="log", xlabel=KINDS[name].x, ylabel="measured over law, %", title=f"R^2 {fitted.r_squared:.4f}")
    right.axhline(0, color=PALETTE["muted"], lw=1)
    for axis in [left.xaxis, right.xaxis] + [left.yaxis] * (name != "loss"):
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
        axis.set_major_formatter(lambda value, _: human_count(value))
    if 1 < len(np.unique(sizes)) <= 8:
        left.legend(frameon=False)
