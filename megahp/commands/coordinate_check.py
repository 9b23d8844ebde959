"""Do activations stay as large, and layers learn as much, while the model grows? Slopes in size, and whether they pass.

    megahp coordinate-check run.toml model.preset=llama-3-8b --widths 256,512,1024 --steps 10 --seeds 1,2,3
    megahp coordinate-check run.toml --depths 2,4,8,16,32 [--lazy] [--data] [--json FILE] [--plot FILE]
    megahp coordinate-check run.toml --densities 1,0.5,0.25,0.125

The run file's model and parameterization, at each size: --widths keeps the head size and scales heads and MLP along,
--depths changes model.layers, --densities sparsity.density. Each is trained for a few steps at the file's peak rate,
without warm-up or decay, on random tokens or, with --data, the run's own. Measured are mean |activation|s at init and
after the steps; --lazy measures instead how nonlinear the first step is in the MLPs' weights.

A slope is that of log mean against log size, with its 95 % bootstrap interval over seeds. What it must be for
hyperparameters to transfer stands in the table REQUIRED, beside what theory predicts of the parameterization at hand:
SP, and muP in depth, are predicted to fail. Theory speaks of small rates and few steps: at a rate too high for the
smallest model a good parameterization fails too. Exit code 1 means that a slope failed, 2 a mistake in what was given.
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
from megahp.data.tokenizer import load_tokenizer
from megahp.diagnose.coordinates import activations, nonlinearity
from megahp.diagnose.transfer import Estimate, slope
from megahp.diagnose.verify import synthetic_batch
from megahp.errors import UserError
from megahp.parallel.mesh import Mesh, single_rank_mesh
from megahp.train.prepare import open_data, with_vocabulary

FAMILIES = {"widths": "model.width", "depths": "model.layers", "densities": "sparsity.density"}
LINE = "{quantity:<13}{when:<7}{slope:>+7.2f}  [{low:+.2f}, {high:+.2f}]  {needed:>14}{predicted:>9}  {verdict}"
HEADER = f"{'quantity':<13}{'when':<7}{'slope':>7}  {'95 % interval':<14}  {'needed':>14}{'theory':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="settings before the file's")
    sizes = parser.add_mutually_exclusive_group(required=True)
    for kind, key in FAMILIES.items():
        sizes.add_argument(f"--{kind}", metavar="N,N,...", help=f"of {key}")
    add("--lazy", action="store_true", help="the lazy-learning check, over depths")
    add("--steps", type=int, metavar="N", help="to train (default 10)")
    add("--seeds", type=parse_integers, default=[1, 2, 3], metavar="N,N,...", help="(default 1,2,3)")
    add("--batch", type=int, default=4, metavar="B", help="sequences a step (default 4)")
    add("--data", action="store_true", help="train on the run's data, not on random tokens")
    add_outputs(parser, "it")


@dataclass(frozen=True)
class Requirement:
    """What the slope of a quantity must be, and what theory predicts it is: parameterization -> slope."""

    least: float
    most: float
    predicted: Mapping[str, float]
    source: str


def flat(tolerance: float, source: str, **others: float) -> Requirement:
    """No slope, as predicted of every parameterization but those named."""
    every = dict.fromkeys(("sp", "mup", "smupar", "completep", "completep-half"), 0.0)
    return Requirement(-tolerance, tolerance, every | others, source)


# CompleteP with alpha below 1 is "completep-half": 1/2 is the alpha that theory was written for.
MUP = "muP: activations are Theta(1) in width (arXiv 2505.01618 Table 1's columns; derived for one matrix)"
DEPTH = "arXiv 2505.01618: stable for alpha >= 1/2; SP after steps read from its authors' figure"
SPARSE = "arXiv 2405.15743: Var(Y) is proportional to density unless init undoes it"
LAZY = "arXiv 2505.01618: second order over first is m_L^(alpha-1); its authors' data: -0.46 and -0.05"
REQUIRED: dict[str, dict[tuple[str, str], Requirement]] = {
    "widths": {
        ("stream", "init"): flat(0.1, MUP, sp=1.0),
        ("attention", "init"): flat(0.1, MUP, sp=1.0),
        ("mlp", "init"): flat(0.1, MUP, sp=0.5),
        # with an output multiplier of 1 / m_N they vanish at init, until the unembedding has learnt
        ("logits", "init"): Requirement(-0.6, 0.1, {"sp": 0.5, "mup": -0.5, "smupar": -0.5, "completep": -0.5}, MUP),
        ("stream", "after"): flat(0.2, MUP, sp=1.0),
        ("attention", "after"): flat(0.2, MUP, sp=1.0),
        ("mlp", "after"): flat(0.2, MUP, sp=0.5),
        ("logits", "after"): Requirement(-0.6, 0.2, {}, MUP),
    },
    "depths": {
        # alpha = 1: the branches add up to ever less, down to what the embedding gives
        ("stream", "init"): Requirement(
            -0.6, 0.1, {"sp": 0.5, "mup": 0.5, "smupar": 0.5, "completep-half": 0.0, "completep": -0.5}, DEPTH
        ),
        ("mlp", "init"): flat(0.1, DEPTH),
        ("stream", "after"): flat(0.2, DEPTH, sp=1.25, mup=1.25, smupar=1.25),
        ("mlp", "after"): flat(0.2, DEPTH),
    },
    "densities": {
        ("mlp", "init"): flat(0.1, SPARSE, sp=0.5, mup=0.5, completep=0.5),
        ("mlp", "after"): flat(0.2, SPARSE, sp=0.5, mup=0.5, completep=0.5),
    },
    "lazy": {("nonlinearity", "step 1"): Requirement(-0.1, math.inf, {"completep-half": -0.5, "completep": 0.0}, LAZY)},
}


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure, fit, judge. Returns 1 where a slope is not what it must be, else 0."""
    base, family = read_family(arguments)
    found = measure(family, arguments, single_rank_mesh(base))
    rows = judged(arguments, base.parameterization, list(family), found)
    show(rows)
    everything = {
        "parameterization": asdict(base.parameterization),
        "lr": base.optimizer.lr,
        "sizes": list(family),
        "slopes": rows,
        "measured": {f"{quantity} {when}": values.tolist() for (quantity, when), values in found.items()},
        "torch": torch.__version__,
    }
    write_json(arguments.json, everything)
    if arguments.plot:
        plot(arguments.plot, rows, list(family), found, FAMILIES[kind_of(arguments)])
    return 0 if all(row["passed"] for row in rows) else 1


def kind_of(arguments: argparse.Namespace) -> str:
    return next(kind for kind in FAMILIES if getattr(arguments, kind))


def read_family(arguments: argparse.Namespace) -> tuple[Config, dict[float, Config]]:
    """The run as it is looked at, and the same at each size, small ones first. Raises UserError."""
    kind = kind_of(arguments)
    given = getattr(arguments, kind)
    sizes = [parse_positive(text, "no size; give positive numbers, such as 2,4,8") for text in given.split(",")]
    if len(set(sizes)) < max(2, len(sizes)):
        raise UserError(f"--{kind} {given}: give two or more sizes, each once, to see a slope")
    if arguments.lazy and not arguments.depths:
        raise UserError(f"--lazy is about depth, not --{kind}; give --depths")
    if arguments.lazy and arguments.steps is not None:
        raise UserError(f"--steps {arguments.steps} has no effect with --lazy, which looks at the first; leave it out")
    check_minimum(arguments, steps=1)
    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch} must be at least 1 sequence")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {arguments.seeds}: each is measured once; name it once")
    base = of_a_check(resolve.load(arguments.run, arguments.overrides).config, arguments)
    return base, {size: of_size(base, kind, size) for size in sorted(sizes)}


def of_a_check(config: Config, arguments: argparse.Namespace) -> Config:
    """The run as it is looked at: a few steps at its peak rate, on one rank. Raises UserError."""
    if not config.model.vocab_size:
        config = with_vocabulary(config, load_tokenizer(config.data.tokenizer))
    if arguments.data and not config.data.train:
        raise UserError("--data, and data.train is empty; name what `megahp preprocess` wrote, or leave --data out")
    if arguments.lazy and config.model.experts:
        raise UserError(f"--lazy looks at dense MLPs, not at model.experts = {config.model.experts}; leave those out")
    if arguments.densities and config.sparsity.method not in ("static", "rigl"):
        method = f"sparsity.method = {config.sparsity.method!r}"
        raise UserError(f"--densities with {method} would check dense models; set static")
    tokens = 1_000_000 * arguments.batch * config.data.sequence_length  # more than are taken
    return replace(
        config,
        data=replace(config.data, lengths=(), mixtures=()),
        schedule=ScheduleConfig("constant", warmup=0.0),
        batch=BatchConfig(global_batch=arguments.batch, micro_batch=arguments.batch),
        parallel=ParallelConfig(),
        train=replace(config.train, start_from="", weights="all", tokens=tokens, steps=0, noise_scale=False),
        compute=ComputeConfig(),
    )


def of_size(base: Config, kind: str, size: float) -> Config:
    """The same run at another size. Raises UserError where there is none such."""
    values: dict[str, Any] = {FAMILIES[kind]: size}
    if kind == "widths":
        model, share = base.model, size / base.model.width
        for key in ("heads", "kv_heads", "mlp_width", "expert_width"):
            own = getattr(model, key)
            values[f"model.{key}"] = scaled = own * share
            if not scaled.is_integer():
                broken = f"model.{key} = {own} at model.width = {model.width} would not be whole"
                whole = model.width // math.gcd(model.width, own)
                raise UserError(f"--widths {size:g}: {broken}; choose a multiple of {whole}")
    return resolve.from_dict(config_to_dict(with_values(base, values)), f"--{kind} {size:g}")


Measured = dict[tuple[str, str], np.ndarray]  # quantity and when -> [sizes, seeds]


def measure(family: Mapping[float, Config], arguments: argparse.Namespace, mesh: Mesh) -> Measured:
    """What is seen of every size and seed."""
    found = [
        [look(replace(each, train=replace(each.train, seed=seed)), arguments, mesh) for seed in arguments.seeds]
        for each in family.values()
    ]
    return {key: np.array([[each[key] for each in row] for row in found]) for key in found[0][0]}


def look(config: Config, arguments: argparse.Namespace, mesh: Mesh) -> dict[tuple[str, str], float]:
    """What is measured of one run: quantity and when -> value."""
    data = open_data(config) if arguments.data else None

    def samples(ids: np.ndarray) -> torch.Tensor:
        return (data.batch(ids, False) if data else synthetic_batch(ids, config)).tokens

    if arguments.lazy:
        return {("nonlinearity", "step 1"): nonlinearity(config, mesh, samples)}
    steps = 10 if arguments.steps is None else arguments.steps
    times = zip(("init", "after"), activations(config, mesh, steps, samples), strict=True)
    return {(quantity, when): value for when, values in times for quantity, value in values.items()}


def judged(
    arguments: argparse.Namespace, rules: ParameterizationConfig, sizes: Sequence[float], found: Measured
) -> list[dict[str, Any]]:
    """The slope of everything measured and, where theory has something to say, whether it is what it must be."""
    name = "completep-half" if rules.name == "completep" and rules.depth_alpha < 1 else rules.name
    rows = []
    for (quantity, when), values in found.items():
        required = REQUIRED["lazy" if arguments.lazy else kind_of(arguments)].get((quantity, when))
        each = slope(sizes, values) if np.isfinite(values).all() else Estimate(*[math.nan] * 3)
        row = {
            "quantity": quantity,
            "when": when,
            "slope": each.value,
            "interval": (each.low, each.high),
            "needed": (required.least, required.most) if required else None,
            "predicted": required.predicted.get(name) if required else None,
            "passed": required is None or required.least <= each.value <= required.most,
            "source": required.source if required else None,
        }
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a slope, and the verdict."""
    print(HEADER)
    for row in rows:
        own = {
            **dict(zip(("low", "high"), row["interval"], strict=True)),
            "needed": "{:.1f} .. {:.1f}".format(*row["needed"]) if row["needed"] else "-",
            "predicted": "-" if row["predicted"] is None else f"{row['predicted']:+.2f}",
            "verdict": "FAILS" if not row["passed"] else "passes" if row["needed"] else "",
        }
        print(LINE.format(**{**row, **own}))
    failed = [f"{row['quantity']} ({row['when']})" for row in rows if not row["passed"]]
    print(f"fails: {', '.join(failed)}" if failed else "passes: all that must be flat is")


def plot(file: Path, rows: Sequence[Mapping[str, Any]], sizes: Sequence[float], found: Measured, size_key: str) -> None:
    """Mean and range of each quantity over the sizes, a panel each, init and after. Raises UserError."""
    from megahp.report.figures import PALETTE, logarithmic, logarithmic_x, plot_in

    names = list(dict.fromkeys(quantity for quantity, _ in found))
    with plot_in(file, 2.6 * len(names), 2.6) as figure:
        panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
        for row in rows:
            values, axes = found[row["quantity"], row["when"]], panels[row["quantity"]]
            hue = PALETTE["run1" if row["when"] == "init" else "run0"]
            axes.plot(sizes, values.mean(1), ".-", color=hue, label=f"{row['when']}: {row['slope']:+.2f}")
            axes.fill_between(sizes, values.min(1), values.max(1), color=hue, alpha=0.2, lw=0)
        for name, axes in panels.items():
            every = np.concatenate([values.ravel() for (quantity, _), values in found.items() if quantity == name])
            axes.set_ylim(every.min() / 2, every.max() * 2)  # or what is flat would look steep
            logarithmic(axes, 10)
            logarithmic_x(axes, sizes, [f"{size:g}" for size in sizes])
            axes.set_title(name, fontsize=8.5)
            axes.set_xlabel(size_key)
            axes.legend(frameon=False, title="slope")
