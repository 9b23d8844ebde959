"""A family of models from one tuned base: does its smallest three predict the fourth?

    python examples/family/study.py [--jobs 2] [--seeds 1 2 3]

What a lab would do. The rate is tuned on the smallest model; `megahp recipe --base run.toml --law laws.toml` then makes
every run file: CompleteP transfers rate and init, Power Lines' timescale sets the weight decay, and the batch grows
along the run. Three sizes at four numbers of tokens each are trained, `megahp fit` fits the loss to them, and predicts
the fourth, of one and a half times the third's weights, before it is trained. The fourth is trained at its constant
first batch too, and the third with a quarter of the timescale and four times it.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import HERE, Line, Run, Study, code, half_interval, main, mean_and_interval, prepare, print_table

FOLDER = HERE / "family"
# width, layers, most tokens in millions: 20 a weight, 17 of the second, whose MLP is wider; 10 of the fourth
SIZES = {"32k": (24, 2, 0.64512), "74k": (32, 3, 1.232), "96k": (40, 3, 1.9256)}
FOURTH = "148k", (48, 4, 1.47888)
SHARES = 0.125, 0.25, 0.5, 1  # of those tokens
TUNED, VARIED = "32k at 50 %", "96k at 50 %"  # whose rate is, and whose timescale
RATES = 0.25, 0.5, 1, 2, 4  # of run.toml's, on the smallest model
TAUS = {"a quarter of tau": 4, "four times tau": 0.25}  # weight decays, of the recipe's


def run_files(study: Study) -> Iterator[tuple[str, Path]]:
    """Write the run files of all sizes by `megahp recipe`. Yield name and file of each."""
    from megahp.cli import main as megahp  # in this process: 13 starts would take half a minute

    for size, (width, layers, millions) in [*SIZES.items(), FOURTH]:
        for share in SHARES if size in SIZES else [1]:
            name = named(size, share)
            file = study.runs / f"recipes/{name}.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            given = "--width", width, "--layers", layers, "--tokens", study.tokens(share * millions)
            laws = "--base", FOLDER / "run.toml", "--law", FOLDER / "laws.toml"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                if megahp(list(map(str, ["recipe", *given, *laws, "--out", file, "--overwrite"]))):
                    sys.exit(f"{said.getvalue()}megahp recipe made no {file}")
            yield name, file


def named(size: str, share: float) -> str:
    return f"{size} at {100 * share:g} %"


def runs(study: Study, seeds: list[int]) -> list[Run]:
    from megahp.config import resolve

    found = []
    for run, file in run_files(study):
        given = resolve.load(file).config

        def add(name: str, seed: int, *settings: str, run: str = run, file: Path = file) -> None:
            found.append(Run(f"{run}{name}/{seed}", [f"train.seed={seed}", *settings], file=file))

        def decay(factor: float, given: resolve.Config = given) -> str:
            return f"optimizer.weight_decay={factor * given.optimizer.weight_decay}"

        if run == TUNED:
            for factor in RATES:
                add(f", rate x{factor:g}", seeds[0], f"optimizer.lr={factor * given.optimizer.lr}", decay(1 / factor))
        for seed in seeds:
            add("", seed)
            if run == VARIED:
                for name, factor in TAUS.items():
                    add(f", {name}", seed, decay(factor))
            if run == named(FOURTH[0], 1):
                add(", constant batch", seed, f"batch.largest={given.batch.global_batch}")
    return found


def measure(directory: Path) -> Line:
    """Return a run's weights, steps and first and last batch, and the steps that the recipe forecast."""
    from megahp.config.resolve import read_config
    from megahp.log.metrics import newest_metrics
    from megahp.recipe.recipe import steps_of
    from megahp.scaling import flops

    config, last = read_config(directory), next(iter(newest_metrics(directory)))
    found = {
        "parameters": flops.parameters(config.model, config.data.sequence_length),
        "steps": last["step"],
        "forecast": steps_of(config, 1)[0],
        "batch": [config.batch.global_batch, last["global_batch"]],
    }
    return found | {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print the rates tried, the ladder, and the fourth beside its prediction; draw losses over tokens."""
    from megahp.errors import UserError
    from megahp.recipe.fit import FinishedRun, fit_loss
    from megahp.report.figures import PALETTE, logarithmic_x, plot_in

    def losses(name: str) -> list[float]:
        return [lines[f"{name}/{seed}"]["loss"] for seed in seeds]

    def against(name: str, other: str) -> str:
        return mean_and_interval([a - b for a, b in zip(losses(name), losses(other), strict=True)], 4)

    rates = [lines[f"{TUNED}, rate x{factor:g}/{seeds[0]}"] for factor in RATES]
    print_table(("rate", "loss"), [[f"{line['lr']:g}", f"{line['loss']:.4f}"] for line in rates])

    size, fourth = FOURTH[0], named(FOURTH[0], 1)
    ladder = {named(name, share): name for name in SIZES for share in SHARES}
    means = []
    for name in ladder:
        line = lines[f"{name}/{seeds[0]}"]
        means.append(FinishedRun(name, line["parameters"], line["tokens"], float(np.mean(losses(name)))))
    rows = []
    for run in means:
        mine = [lines[f"{run.name}/{seed}"] for seed in seeds]
        batches = f"{mine[0]['batch'][0]} to {np.mean([line['batch'][1] for line in mine]):.0f}"
        steps = f"{np.mean([line['steps'] for line in mine]):.0f} ({mine[0]['forecast']})"
        rows.append([run.name, f"{run.tokens:,}", mean_and_interval(losses(run.name)), batches, steps])
    print_table(("weights, share of the tokens", "tokens", "loss", "batch", "steps (forecast)"), rows)
    for name in TAUS:
        print(f"{VARIED}, {name}: {against(f'{VARIED}, {name}', VARIED)}")

    try:
        law = fit_loss(means, tied=True).law
    except UserError as error:  # as of a trial with a hundredth of the tokens
        return print(error)
    constant = f"{fourth}, constant batch"
    weights, tokens = (lines[f"{fourth}/{seeds[0]}"][key] for key in ("parameters", "tokens"))
    predicted, interval = law(weights, tokens), law.interval(weights, tokens)
    assert interval is not None
    print(f"\n{fourth}: predicted {predicted:.4f} ({interval[0]:.4f} to {interval[1]:.4f})")
    steps = {name: np.mean([lines[f"{name}/{seed}"]["steps"] for seed in seeds]) for name in (fourth, constant)}
    for name, number in steps.items():
        print(f"{name}: {mean_and_interval(losses(name), 4)}, {number:.0f} steps")
    print(f"growth: {1 - steps[fourth] / steps[constant]:.0%} of the steps saved, at {against(fourth, constant)} nats")

    with plot_in(study.figure, 5.5, 3.4) as figure:
        axes = figure.add_subplot()
        x = np.geomspace(min(run.tokens for run in means), max(tokens, *(run.tokens for run in means)), 50)
        for number, name in enumerate(SIZES):
            mine = [run for run in means if ladder[run.name] == name]
            errors = [half_interval(np.array(losses(run.name))) for run in mine]
            hue = PALETTE[f"run{number}"]
            own = [run.tokens for run in mine], [run.loss for run in mine]
            axes.errorbar(*own, errors, fmt="o", ms=4, capsize=2, color=hue, label=f"{name} weights")
            axes.plot(x, [law(mine[0].parameters, each) for each in x], color=hue, lw=1)
        hue = PALETTE["accent"]
        axes.plot(x, [law(weights, each) for each in x], color=hue, lw=1, ls="--", label=f"{size}, predicted")
        axes.fill_between(x, *zip(*[law.interval(weights, each) for each in x], strict=True), color=hue, alpha=0.15)
        errors = half_interval(np.array(losses(fourth)))
        axes.errorbar([tokens], [np.mean(losses(fourth))], errors, fmt="*", ms=9, capsize=2, color=hue, label=size)
        axes.set(xlabel="tokens", ylabel="loss, nats per byte")
        logarithmic_x(axes, [3e5, 1e6, 3e6], ["0.3 M", "1 M", "3 M"])
        axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
