"""Do hyperparameters that were tuned on a small dense model hold for a larger sparse one? SP, muP, SmuPar (arXiv
2405.15743), and SmuPar with weight decay in proportion to density.

    python examples/density-transfer/study.py [--jobs 2] [section.key=value ...]
    python examples/density-transfer/study.py --seeds 1 2 3 4 5 --densities 1 .5 .25 .125 .0625 .03125 .015625 .0078125

Three phases, each from the results of the one before. Base: learning rate, initial standard deviation, alpha_in and
alpha_out are tuned together on a dense model of width 64, and SP's rate on a dense one of width 256, with its other
settings such that it begins as the same network. Reused: width 256 at each density with the dense model's rate. Own:
the best rate of each parameterization at each density, found on the first seed in steps of a factor 2 until it has been
tried on both sides, then run on all seeds. A run that the results lack is trained, on one thread, and becomes a line
there; then the tables are printed and the figure drawn. After an interruption the same command resumes. The first
command is about 170 runs, an hour and a half of CPU; the second is the full form, hours long. Results:
docs/transfer.md.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp.commands.transfer_sweep import Cell, final_loss, start_workers, work
from megahp.config import resolve
from megahp.diagnose.child_runs import is_done
from megahp.diagnose.statistics import half_interval
from megahp.report.figures import PALETTE, logarithmic_x, plot_in

sys.path.insert(0, str(Path(__file__).parent.parent))
import studies

HERE = Path(__file__).parent
BASE, WIDTH = 64, 256
BOX = {"lr": (0.004, 0.064), "std": (0.02, 0.32), "alpha_in": (1.0, 64.0), "alpha_out": (0.25, 16.0)}
SETTINGS = {"std": "init_std", "alpha_in": "embedding_multiplier", "alpha_out": "output_multiplier"}
SP_RATE = 0.002  # where the search for its best begins
VARIANTS = {  # parameterization.name and weight_decay, as in SmuPar's paper; and lambda m_N rho, which keeps tau
    "SP": ("sp", ""),
    "muP": ("mup", "base"),
    "SmuPar": ("smupar", "base"),
    "SmuPar, decay by density": ("smupar", "timescale"),
}
DENSE_SMUPAR = ("SmuPar", 1.0)  # the same model as muP's
OTHERS = ("SP", "muP", "SmuPar")
COLUMNS = f"{'density':>9}{'rate':>9}{'loss':>10}{'+-':>8}" + "".join(f"{'to ' + name:>10}{'+-':>8}" for name in OTHERS)
Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is trained, and the results so far. rounds: configurations tried in the box, then in one of half its size
    around the best; seeds: the first also tunes."""

    lines: Sequence[Run]
    rounds: Sequence[int] = (32, 8)
    seeds: Sequence[int] = (1, 2, 3)
    densities: Sequence[float] = (1.0, 2**-2, 2**-3, 2**-4, 2**-6)

    def find(self, variant: str, density: float) -> list[Run]:
        """Return the runs of width 256 with the base's settings."""
        like = self.target(variant, density, lr=0.0, seed=0)
        same = [name for name in like if name not in ("lr", "seed")]
        return [line for line in self.lines if all(line[name] == like[name] for name in same)]

    def left(self, runs: Iterable[Run]) -> list[Run]:
        done = {key(line) for line in self.lines}
        return [run for run in runs if key(run) not in done]

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """Every parameterization at every density."""
        pairs = [(variant, density) for density in self.densities for variant in VARIANTS]
        return [pair for pair in pairs if pair != DENSE_SMUPAR]

    def configurations(self) -> list[Run]:
        """Return the configurations of the base: the first round, and the second once the first is known."""
        low, high = np.log(list(BOX.values())).T
        middle, half = (low + high) / 2, (high - low) / 2
        runs: list[Run] = []
        for number, count in enumerate(self.rounds):
            points = torch.quasirandom.SobolEngine(len(BOX), scramble=True, seed=number).draw(count).double().numpy()
            for point in np.exp(middle + half * (2 * points - 1)):
                settings = {name: float(f"{value:.3g}") for name, value in zip(BOX, point, strict=True)}
                runs.append({"variant": "base", "width": BASE, "density": 1.0, "seed": self.seeds[0], **settings})
            if self.left(runs):
                break
            tried = {key(run) for run in runs}
            best = min((line for line in self.lines if key(line) in tried), key=lambda line: line["loss"])
            middle, half = np.log([best[name] for name in BOX]), half / 2
        return runs

    @property
    def base(self) -> Run:
        """The best configuration of the base."""
        return min((line for line in self.lines if line["variant"] == "base"), key=lambda line: line["loss"])

    def target(self, variant: str, density: float, lr: float, seed: int) -> Run:
        """Return a run of width 256 with the base's settings; SP's such that its dense model begins as muP's."""
        m = WIDTH / BASE
        scale = {"std": m**-0.5, "alpha_in": m**0.5, "alpha_out": m**-0.5} if variant == "SP" else {}
        settings = {name: float(f"{self.base[name] * scale.get(name, 1.0):.6g}") for name in BOX}
        return {"variant": variant, "width": WIDTH, "density": density, "seed": seed, **settings, "lr": lr}

    def curve(self, variant: str, density: float) -> dict[float, float]:
        """Return rate -> loss of the first seed."""
        return {run["lr"]: run["loss"] for run in self.find(variant, density) if run["seed"] == self.seeds[0]}

    def reused(self, variant: str) -> float:
        """Return the dense model's rate: the base's, or SP's own."""
        return self.own("SP", 1.0) if variant == "SP" else float(self.base["lr"])

    def own(self, variant: str, density: float) -> float:
        """Return the best rate of those tried, or the one to begin with."""
        losses = self.curve(variant, density)
        return min(losses, key=lambda lr: losses[lr], default=SP_RATE if variant == "SP" else self.reused(variant))

    def ahead(self, variant: str, density: float) -> list[Run]:
        """Return the run to try next, none once the best rate has been tried on both sides."""
        best = self.own(variant, density)
        rates = [float(f"{best * factor:.6g}") for factor in (1, 2, 0.5)]
        return self.left(self.target(variant, density, lr, self.seeds[0]) for lr in rates)[:1]

    def missing(self) -> list[Run]:
        """Return the runs to train next; none when the study is complete."""

        def seeds(variant: str, density: float, lr: float) -> list[Run]:
            return self.left(self.target(variant, density, lr, seed) for seed in self.seeds)

        if runs := self.left(self.configurations()):
            return runs
        if runs := self.ahead("SP", 1.0):
            return runs
        if runs := [run for pair in self.pairs for run in seeds(*pair, self.reused(pair[0]))]:
            return sorted(runs, key=lambda run: run["density"])  # the sparsest first
        for density in sorted(self.densities):
            pairs = [pair for pair in self.pairs if pair[1] == density]
            if runs := [run for pair in pairs for run in self.ahead(*pair) or seeds(*pair, self.own(*pair))]:
                return runs
        return []

    def losses(self, variant: str, density: float, lr: float) -> np.ndarray:
        """Return the losses of the seeds [seeds], NaN where one is missing."""
        variant = "muP" if (variant, density) == DENSE_SMUPAR else variant
        found = {run["seed"]: run["loss"] for run in self.find(variant, density) if run["lr"] == lr}
        return np.array([found.get(seed, np.nan) for seed in self.seeds])

    def table(self, own: bool) -> Iterator[tuple[str, float, float, np.ndarray]]:
        """Yield variant, density, rate and losses [seeds] at the dense model's rate, or at each one's own."""
        for density in self.densities:
            for variant in VARIANTS:
                at = ("muP" if (variant, density) == DENSE_SMUPAR else variant, density)
                lr = self.own(*at) if own else self.reused(variant)
                yield variant, density, lr, self.losses(variant, density, lr)


def read(file: Path) -> list[Run]:
    """Return all results; a loss is null where the run diverged, and infinite here."""
    return [line | {"loss": np.inf if line["loss"] is None else line["loss"]} for line in studies.read_lines(file)]


def key(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("variant", "width", "density", "seed", *BOX))


def cell(run: Run, overrides: Sequence[str]) -> Cell:
    name, decay = VARIANTS.get(run["variant"], VARIANTS["SmuPar"])
    width, values = run["width"], [f"{value:g}" for value in key(run)[2:]]
    words = [
        *(f"model.width={width}", f"model.heads={width // 64}", f"model.mlp_width={3 * width}"),
        *(f"parameterization.name={name}", f"parameterization.weight_decay={decay}"),
        *([] if name == "sp" else [f"parameterization.base_width={BASE}"]),
        *(f"parameterization.{key}={run[name]}" for name, key in SETTINGS.items()),
        *(f"optimizer.lr={run['lr']}", f"sparsity.density={run['density']}", f"train.seed={run['seed']}"),
        f"log.root={studies.Study(HERE, overrides=overrides).runs}",
        f"log.name={run['variant'].replace(' ', '-')}/{'-'.join(values)}",
        *("log.tensorboard=false", "log.baselines=false", "checkpoint.keep=1"),
        *overrides,
    ]
    config = resolve.load(HERE / "run.toml", words).config
    return Cell(run["variant"], run["density"], run["lr"], run["seed"], config)


def collect(runs: Sequence[Run], overrides: Sequence[str], file: Path) -> None:
    """Append a line to the results for each of these runs that has ended, unless another process has."""
    for run in Study(read(file)).left(runs):
        if is_done(directory := cell(run, overrides).directory):
            loss = final_loss(directory, None)
            with open(file, "a") as out:
                out.write(json.dumps({**run, "loss": loss if np.isfinite(loss) else None}) + "\n")


def mean(losses: np.ndarray) -> str:
    """Format the mean of the seeds that are there, and half of its interval."""
    known = losses[~np.isnan(losses)]
    return f"{known.mean():>+10.4f}{half_interval(known):>8.4f}" if len(known) else f"{'':>18}"


def report(study: Study) -> Iterator[str]:
    """Yield the tables: losses, and their differences to others' at the same density, paired by seed."""
    yield "base: " + ", ".join(f"{name} {study.base[name]:g}" for name in (*BOX, "loss"))
    for own in (False, True):
        yield f"\n{'at the best rate tried' if own else 'at the rate of the dense model':<32}" + COLUMNS
        table = {(variant, density): (lr, losses) for variant, density, lr, losses in study.table(own)}
        for (variant, density), (lr, losses) in table.items():
            apart = [mean(losses - table[other, density][1]) for other in OTHERS]
            yield f"{variant:<32}{density:>9.4g}{lr:>9.3g}{mean(losses).replace('+', ' ', 1)}{''.join(apart)}"


def draw(study: Study, file: Path) -> None:
    """Draw loss against density, at the dense model's rate and at each one's own."""
    with plot_in(file, 8, 3.2) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, own in zip(panels, (False, True), strict=True):
            for number, variant in enumerate(VARIANTS):
                mine = [(density, losses) for name, density, _, losses in study.table(own) if name == variant]
                densities, means = [each[0] for each in mine], [np.nanmean(each[1]) for each in mine]
                errors = [half_interval(losses) for _, losses in mine]
                style = {"fmt": "o-", "ms": 4, "capsize": 2, "color": PALETTE[f"run{number}"]}
                axes.errorbar(densities, means, errors, label=variant, **style)
            axes.set(xlabel="density", title="at the best rate tried" if own else "at the rate of the dense model")
            logarithmic_x(axes, study.densities, [f"{density:.3g}" for density in study.densities])
        panels[0].set_ylabel("validation loss, nats")
        panels[0].legend(frameon=False, fontsize=7)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="override run.toml in every run")
    add("--jobs", type=int, default=2, help="runs at a time, each on one thread (default 2)")
    add("--rounds", type=int, nargs=2, default=Study.rounds, help="configurations of the base in each round")
    add("--seeds", type=int, nargs="+", default=Study.seeds, help="the first also tunes")
    add("--densities", type=float, nargs="+", default=Study.densities, help="of width 256, 1 the first")
    add("--results", type=Path, help="by default those of the study, or with overrides others in runs/")
    add("--plot", type=Path, metavar="FILE.svg", help="the figure")
    add("--show", action="store_true", help="train nothing")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = studies.Study(HERE, overrides=options.overrides)
    options.results, options.plot = options.results or files.results, options.plot or files.figure
    options.results.parent.mkdir(parents=True, exist_ok=True)

    def study() -> Study:
        return Study(read(options.results), options.rounds, options.seeds, options.densities)

    if options.worker:
        return work([cell(run, options.overrides) for run in study().missing()], 1, None)
    while not options.show and (runs := study().missing()):
        try:
            code = start_workers([sys.executable, *sys.argv, "--worker"], min(options.jobs, len(runs)))
        finally:
            collect(runs, options.overrides, options.results)
        if code:
            return code
    print("\n".join(report(study())))
    draw(study(), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
