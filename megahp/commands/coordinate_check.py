"""Check that activations keep their size, and layers keep learning, as the model grows.

    megahp coordinate-check run.toml model.preset=llama-3-8b --widths 256,512,1024 --steps 10 --seeds 1,2,3
    megahp coordinate-check run.toml --depths 2,4,8,16,32 [--lazy] [--data] [--json FILE] [--plot FILE]
    megahp coordinate-check run.toml --densities 1,0.5,0.25,0.125

The run file's model and parameterization, at each size: --widths keeps the head size and scales heads and MLP with the
width, --depths changes model.layers, --densities sparsity.density. Each is trained for a few steps at the file's peak
learning rate, without warm-up or decay, on random tokens or, with --data, the run's own. Mean |activation|s are
measured at init and after the steps; --lazy instead measures how nonlinear the first step is in the MLPs' weights.

You see a slope per quantity, of log mean against log size, with its 95 % bootstrap interval over seeds; what it must be
for hyperparameters to transfer (the table REQUIRED); and what theory predicts of this parameterization: SP, and muP in
depth, are predicted to fail. Theory holds for small learning rates and few steps: at a rate too high for the smallest
model a good parameterization fails too. Exit code 1: a slope failed; 2: invalid input.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp.commands.arguments import add_outputs, check_minimum, parse_integers, parse_positive
from megahp.commands.output import write_json
from megahp.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    ParallelConfig,
    ParameterizationConfig,
    ScheduleConfig,
    config_to_dict,
    resolve,
    with_values,
)
from megahp.diagnose.coordinates import activations, nonlinearity
from megahp.diagnose.transfer import Estimate, slope
from megahp.diagnose.verify import synthetic_batch
from megahp.errors import UserError
from megahp.parallel.device import with_fast_dtype
from megahp.parallel.mesh import Mesh, single_rank_mesh
from megahp.train.prepare import load_described_tokenizer, open_data, with_vocabulary

FAMILIES = {"widths": "model.width", "depths": "model.layers", "densities": "sparsity.density"}
LINE = "{quantity:<15}{when:<7}{slope:>+7.2f}  [{low:+.2f}, {high:+.2f}]  {needed:>14}{predicted:>9}  {verdict}"
HEADER = f"{'quantity':<15}{'when':<7}{'slope':>7}  {'95 % interval':<14}  {'needed':>14}{'theory':>9}"

Measured = dict[tuple[str, str], np.ndarray]  # quantity and when -> [sizes, seeds]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    sizes = parser.add_mutually_exclusive_group(required=True)
    for kind, key in FAMILIES.items():
        sizes.add_argument(f"--{kind}", metavar="N,N,...", help=f"of {key}")
    add("--lazy", action="store_true", help="the lazy-learning check, over depths")
    add("--steps", type=int, metavar="N", help="to train (default 10)")
    add("--seeds", type=parse_integers, default=[1, 2, 3], metavar="N,N,...", help="(default 1,2,3)")
    add("--batch", type=int, default=4, metavar="B", help="sequences per step (default 4)")
    add("--data", action="store_true", help="train on the run's data, not on random tokens")
    add_outputs(parser, "it")


@dataclass(frozen=True)
class Requirement:
    """The bounds on a quantity's slope, and theory's predictions: parameterization -> slope."""

    least: float
    most: float
    predicted: Mapping[str, float | None]
    source: str


def flat(tolerance: float, source: str, **others: float | None) -> Requirement:
    """Require slope 0, as predicted for every parameterization except those named; None: no prediction."""
    every: dict[str, float | None] = dict.fromkeys(("sp", "mup", "smupar", "completep", "completep-half"), 0.0)
    return Requirement(-tolerance, tolerance, every | others, source)


# of CompleteP's alphas the theory is of these; at 0 it has no depth factor, as muP
ALPHAS = {0.0: "mup", 0.5: "completep-half", 1.0: "completep"}
MUP = "muP: activations are Theta(1) in width (arXiv 2505.01618 Table 1's columns; derived for one matrix)"
DEPTH = "arXiv 2505.01618: stable for alpha >= 1/2; SP after steps read from its authors' figure"
SPARSE = "arXiv 2405.15743: Var(Y) is proportional to density unless init undoes it"
LAZY = "arXiv 2505.01618: second order over first is m_L^(alpha-1); its authors' data: -0.46 and -0.05"
REQUIRED: dict[str, dict[tuple[str, str], Requirement]] = {
    "widths": {
        ("stream", "init"): flat(0.1, MUP, sp=1.0),
        ("attention", "init"): flat(0.1, MUP, sp=1.0),
        ("mlp", "init"): flat(0.1, MUP, sp=None),  # of two matrices or three, and an activation between them
        ("pre-activation", "init"): flat(0.1, MUP, sp=0.5),
        # with an output multiplier of 1 / m_N they vanish at init, until the unembedding has learnt
        ("logits", "init"): Requirement(-0.6, 0.1, {"sp": 0.5, "mup": -0.5, "smupar": -0.5, "completep": -0.5}, MUP),
        ("stream", "after"): flat(0.2, MUP, sp=1.0),
        ("attention", "after"): flat(0.2, MUP, sp=1.0),
        ("mlp", "after"): flat(0.2, MUP, sp=None),
        ("pre-activation", "after"): flat(0.2, MUP, sp=0.5),
        ("logits", "after"): Requirement(-0.6, 0.2, {}, MUP),
    },
    "depths": {
        # alpha = 1: the branches' sum vanishes in depth, and what remains is the embedding
        ("stream", "init"): Requirement(
            -0.6, 0.1, {"sp": 0.5, "mup": 0.5, "smupar": 0.5, "completep-half": 0.0, "completep": -0.5}, DEPTH
        ),
        ("mlp", "init"): flat(0.1, DEPTH),
        ("pre-activation", "init"): flat(0.1, DEPTH),
        ("stream", "after"): flat(0.2, DEPTH, sp=1.25, mup=1.25, smupar=1.25),
        # nothing of a branch's output: what it learns falls as m_L^(alpha - 1), and must where there are more of them
        ("pre-activation", "after"): flat(0.2, DEPTH),
    },
    "densities": {
        ("mlp", "init"): flat(0.1, SPARSE, sp=None, mup=None, completep=None),
        ("mlp", "after"): flat(0.2, SPARSE, sp=None, mup=None, completep=None),
        ("pre-activation", "init"): flat(0.1, SPARSE, sp=0.5, mup=0.5, completep=0.5),
        ("pre-activation", "after"): flat(0.2, SPARSE, sp=0.5, mup=0.5, completep=0.5),
    },
    "lazy": {("nonlinearity", "step 1"): Requirement(-0.1, math.inf, {"completep-half": -0.5, "completep": 0.0}, LAZY)},
}


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    base, family = read_family(arguments)
    measured = measure(family, arguments, single_rank_mesh(base))
    rows = judge(arguments, base.parameterization, list(family), measured)
    show(rows)
    results = {
        "parameterization": asdict(base.parameterization),
        "lr": base.optimizer.lr,
        "sizes": list(family),
        "slopes": rows,
        "measured": {f"{quantity} {when}": values.tolist() for (quantity, when), values in measured.items()},
        "torch": torch.__version__,
    }
    write_json(arguments.json, results)
    if arguments.plot:
        plot(arguments.plot, rows, list(family), measured, FAMILIES[family_kind(arguments)])
    return 0 if all(row["passed"] for row in rows) else 1


def family_kind(arguments: argparse.Namespace) -> str:
    return next(kind for kind in FAMILIES if getattr(arguments, kind))


def read_family(arguments: argparse.Namespace) -> tuple[Config, dict[float, Config]]:
    """Return the checked run's config, and the same at each size, smallest first. Raises UserError."""
    kind = family_kind(arguments)
    text = getattr(arguments, kind)
    sizes = [parse_positive(size, "no size; give positive numbers, such as 2,4,8") for size in text.split(",")]
    if len(set(sizes)) < max(2, len(sizes)):
        raise UserError(f"--{kind} {text}: give two or more sizes, each once, to see a slope")
    if arguments.lazy and not arguments.depths:
        raise UserError(f"--lazy is about depth, not --{kind}; give --depths")
    if arguments.lazy and arguments.steps is not None:
        raise UserError(f"--steps {arguments.steps} has no effect with --lazy, which takes one step; omit it")
    check_minimum(arguments, steps=1, batch=1)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {arguments.seeds}: each is measured once; name it once")
    base = prepare_base(resolve.load(arguments.run, arguments.overrides).config, arguments)
    return base, {size: resize(base, kind, size) for size in sorted(sizes)}


def prepare_base(config: Config, arguments: argparse.Namespace) -> Config:
    """Return the run's config for a few steps at its peak learning rate, on one rank. Raises UserError."""
    if not config.model.vocab_size:
        config = with_vocabulary(config, load_described_tokenizer(config))
    if arguments.data and not config.data.train:
        raise UserError("--data, and data.train is empty; name what `megahp preprocess` wrote, or omit --data")
    if arguments.lazy and config.model.experts:
        raise UserError(f"--lazy checks dense MLPs, not model.experts = {config.model.experts}; omit those")
    if arguments.densities and config.sparsity.method not in ("static", "rigl"):
        method = f"sparsity.method = {config.sparsity.method!r}"
        raise UserError(f"--densities with {method} would check dense models; set static")
    tokens = 1_000_000 * arguments.batch * config.data.sequence_length  # more than the steps take
    return replace(
        config,
        data=replace(config.data, lengths=(), mixtures=()),  # the steps stay in one phase
        schedule=ScheduleConfig("constant", warmup=0.0),
        batch=BatchConfig(global_batch=arguments.batch, micro_batch=arguments.batch),
        parallel=ParallelConfig(),
        train=replace(config.train, start_from="", weights="all", tokens=tokens, steps=0, noise_scale=False),
        compute=ComputeConfig(),
    )


def resize(base: Config, kind: str, size: float) -> Config:
    """Return the config at another size. Raises UserError where it is not valid."""
    values: dict[str, Any] = {FAMILIES[kind]: size}
    if kind == "widths":
        model, ratio = base.model, size / base.model.width
        for key in ("heads", "kv_heads", "mlp_width", "expert_width"):
            value = getattr(model, key)
            values[f"model.{key}"] = value * ratio
            if not (value * ratio).is_integer():
                broken = f"model.{key} = {value} at model.width = {model.width} would not be whole"
                multiple = model.width // math.gcd(model.width, value)
                raise UserError(f"--widths {size:g}: {broken}; choose a multiple of {multiple}")
    return resolve.from_dict(config_to_dict(with_values(base, values)), f"--{kind} {size:g}")


def measure(family: Mapping[float, Config], arguments: argparse.Namespace, mesh: Mesh) -> Measured:
    """Measure every size and seed."""

    def seeded(config: Config, seed: int) -> Config:
        return with_fast_dtype(with_values(config, {"train.seed": seed}), mesh.device)

    runs = [
        [measure_run(seeded(config, seed), arguments, mesh) for seed in arguments.seeds] for config in family.values()
    ]
    return {key: np.array([[run[key] for run in seeds] for seeds in runs]) for key in runs[0][0]}


def measure_run(config: Config, arguments: argparse.Namespace, mesh: Mesh) -> dict[tuple[str, str], float]:
    """Return quantity and when -> value."""
    data = open_data(config) if arguments.data else None

    def samples(ids: np.ndarray) -> torch.Tensor:
        return (data.batch(ids, False) if data else synthetic_batch(ids, config)).tokens

    if arguments.lazy:
        return {("nonlinearity", "step 1"): nonlinearity(config, mesh, samples)}
    steps = 10 if arguments.steps is None else arguments.steps
    times = zip(("init", "after"), activations(config, mesh, steps, samples), strict=True)
    return {(quantity, when): value for when, values in times for quantity, value in values.items()}


def judge(
    arguments: argparse.Namespace, rules: ParameterizationConfig, sizes: Sequence[float], measured: Measured
) -> list[dict[str, Any]]:
    """Return the slope of everything measured and, where theory requires something of it, whether it holds."""
    kind = "lazy" if arguments.lazy else family_kind(arguments)
    name = ALPHAS.get(rules.depth_alpha, "") if rules.name == "completep" else rules.name
    name = "smupar" if kind == "densities" and rules.scale_density else name
    requirements = REQUIRED[kind]
    rows = []
    for (quantity, when), values in measured.items():
        required = requirements.get((quantity, when))
        fitted = slope(sizes, values) if np.isfinite(values).all() else Estimate(*[math.nan] * 3)
        row = {
            "quantity": quantity,
            "when": when,
            "slope": fitted.value,
            "interval": (fitted.low, fitted.high),
            "needed": (required.least, required.most) if required else None,
            "predicted": required.predicted.get(name) if required else None,
            "passed": required is None or required.least <= fitted.value <= required.most,
            "source": required.source if required else None,
        }
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line per slope, and whether all passed."""
    print(HEADER)
    for row in rows:
        low, high = row["interval"]
        columns = {
            **row,
            "low": low,
            "high": high,
            "needed": "{:.1f} .. {:.1f}".format(*row["needed"]) if row["needed"] else "-",
            "predicted": "-" if row["predicted"] is None else f"{row['predicted']:+.2f}",
            "verdict": "FAILS" if not row["passed"] else "passes" if row["needed"] else "",
        }
        print(LINE.format(**columns))
    failed = [f"{row['quantity']} ({row['when']})" for row in rows if not row["passed"]]
    print(f"fails: {', '.join(failed)}" if failed else "passes: all slopes are as needed")


def plot(
    file: Path, rows: Sequence[Mapping[str, Any]], sizes: Sequence[float], measured: Measured, size_key: str
) -> None:
    """Draw mean and range of each quantity over the sizes, a panel each, init and after. Raises UserError."""
    from megahp.report.figures import PALETTE, logarithmic, logarithmic_x, plot_in

    names = list(dict.fromkeys(quantity for quantity, _ in measured))
    with plot_in(file, 2.6 * len(names), 2.6) as figure:
        panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
        for row in rows:
            values, axes = measured[row["quantity"], row["when"]], panels[row["quantity"]]
            hue = PALETTE["run1" if row["when"] == "init" else "run0"]
            axes.plot(sizes, values.mean(1), ".-", color=hue, label=f"{row['when']}: {row['slope']:+.2f}")
            axes.fill_between(sizes, values.min(1), values.max(1), color=hue, alpha=0.2, lw=0)
        for name, axes in panels.items():
            every = np.concatenate([values.ravel() for (quantity, _), values in measured.items() if quantity == name])
            axes.set_ylim(every.min() / 2, every.max() * 2)  # or a flat curve would look steep
            logarithmic(axes, 10)
            logarithmic_x(axes, sizes, [f"{size:g}" for size in sizes])
            axes.set_title(name, fontsize=8.5)
            axes.set_xlabel(size_key)
            axes.legend(frameon=False, title="slope")
