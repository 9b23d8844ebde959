"""Power Lines at the scale of two cores: are tau_opt and B_opt power laws, and is lambda_opt linear in the batch?

    python examples/power-lines/study.py [--seeds 3] [--jobs 2] [--points N] [--only-show] [section.key=value ...]

A ladder of widths at one learning rate, which CompleteP transfers, and a width left out. At every (N, D) and batch the
weight decay is swept, so that tau = B / (eta lambda D) is the published law's and twice that, then the best by its mean
over the seeds and its neighbours by factors of two, until they all are there; so are the batches. Every run becomes a
line in results.jsonl, which is what counts as done: interrupted, the same command resumes. Then laws are fitted to the
means over the seeds of the ladder, written to means.jsonl for `megahp fit`, and to each seed alone, and what they
predict for the width left out is set beside the best found there.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megahp.commands.transfer_sweep import Cell, final_loss, start_workers, work
from megahp.config import LogConfig, longest, resolve
from megahp.diagnose.child_runs import check_same_config
from megahp.diagnose.statistics import half_interval
from megahp.diagnose.transfer import Optimum, optimum
from megahp.errors import UserError
from megahp.parallel.layout import fit as fit_layout
from megahp.recipe.fit import FinishedRun, fit_loss, fit_optimal_batch, fit_timescale
from megahp.report.figures import PALETTE, plot_in
from megahp.scaling.flops import parameters
from megahp.scaling.parameterization import Role, table_of
from megahp.scaling.power_laws import OPTIMAL_BATCH, TAU
from megahp.train.prepare import prepare

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Study, read_lines

HERE = Path(__file__).parent
LADDER = ((32, 204_800), (24, 393_216), (16, 147_456), (16, 589_824))  # (width, tokens)
LEFT_OUT = (48, 393_216)
BATCHES = (4, 8, 16)  # sequences, to begin with
OCTAVES = (0, 1)  # of tau, from the published law's; to begin with
FURTHEST = 4  # octaves
Line = dict[str, Any]
Place = tuple[int, int, int, int]  # width, tokens, batch, octave


def cell(place: Place, seed: int, decay: float, overrides: Sequence[str]) -> Cell:
    """Return a run as a cell of a sweep. A place and a seed are its directory."""
    width, tokens, batch, _ = place
    words = [f"model.width={width}", f"model.heads={max(width // 16, 1)}", f"batch.global_batch={batch}"]
    words += [f"train.tokens={tokens}", f"train.seed={seed}", f"optimizer.weight_decay={decay}", *overrides]
    log = LogConfig(
        name="-".join(map(str, (*place, seed))),
        root=str(Study(HERE, overrides=overrides).runs),
        tensorboard=False,
        baselines=False,
    )
    config = replace(resolve.load(HERE / "run.toml", words).config, log=log)
    return Cell(f"width {width}, {tokens} tokens, batch {batch}", batch, decay, seed, config)


def checked(place: Place, seed: int, overrides: Sequence[str]) -> Cell:
    """Return the cell at the place's tau, checked. Not for workers: another may be writing to its directory."""
    _, tokens, batch, octave = place
    config = cell(place, seed, 0.1, overrides).config
    config = prepare(config, fit_layout(config.parallel, 1), 1, resume=True)  # the vocabulary, so N
    tau = 2.0**octave * TAU(tokens / parameters(config.model, longest(config)))
    decay = batch * config.data.sequence_length / (config.optimizer.lr * tokens * tau)
    config = replace(config, optimizer=replace(config.optimizer, weight_decay=decay))
    check_same_config(config)
    return replace(cell(place, seed, decay, overrides), config=config)


def line_of(place: Place, cell: Cell) -> Line:
    """Return what is kept of a run that has ended; loss: nats per token, null if it diverged."""
    config, loss = cell.config, final_loss(cell.directory, None)
    rule, optimizer = table_of(config).rules[Role.HIDDEN], config.optimizer
    return {
        "place": place,
        "seed": cell.seed,
        "parameters": parameters(config.model, longest(config)),
        "batch": cell.size * config.data.sequence_length,
        "lr": optimizer.lr * rule.lr,  # as applied to hidden matrices, both
        "weight_decay": optimizer.weight_decay * rule.weight_decay,
        "loss": loss if math.isfinite(loss) else None,
    }


def losses(lines: Sequence[Line], point: tuple[int, int]) -> dict[int, dict[int, list[float]]]:
    """Return batch -> octave -> losses of the seeds, infinite where one diverged."""
    found: dict[int, dict[int, list[float]]] = {}
    for line in lines:
        width, tokens, batch, octave = line["place"]
        if (width, tokens) == point:
            of = found.setdefault(batch, {}).setdefault(octave, [])
            of.append(math.inf if line["loss"] is None else line["loss"])
    return found


def best_of(groups: dict[int, list[float]]) -> int:
    """Return the key of the least mean, of those with as many seeds as the most: others do not compare."""
    most = max(map(len, groups.values()))
    return min((key for key, of in groups.items() if len(of) == most), key=lambda key: float(np.mean(groups[key])))


def wanted(lines: Sequence[Line], point: tuple[int, int]) -> Iterator[Place]:
    """Yield the places of a point that every seed is to train, as far as they are known."""
    known = losses(lines, point)
    best = {batch: best_of(of) for batch, of in known.items()}
    batches = set(BATCHES)
    if known:
        at = best_of({batch: known[batch][octave] for batch, octave in best.items()})
        batches = {*known, at // 2, 2 * at} - {1}
    for batch in sorted(batches):
        octaves: Sequence[int] = OCTAVES
        if batch in best:
            octaves = [best[batch] + step for step in (-1, 0, 1) if abs(best[batch] + step) <= FURTHEST]
        yield from ((*point, batch, octave) for octave in octaves)


def missing(lines: Sequence[Line], points: Sequence[tuple[int, int]], seeds: int) -> list[tuple[Place, int]]:
    """Return the runs of the first seed that lacks some."""
    done = {(tuple(line["place"]), line["seed"]) for line in lines}
    for seed in range(1, seeds + 1):
        runs = [(place, seed) for point in points for place in wanted(lines, point)]
        if left := [run for run in runs if run not in done]:
            return left
    return []


def train(study: Study, options: argparse.Namespace) -> None:
    """Train and keep what is missing, round by round."""
    points = (*LADDER, LEFT_OUT)[: options.points]
    while runs := missing(read_lines(study.results), points, options.seeds):
        cells = [checked(place, seed, options.overrides) for place, seed in runs]
        todo = study.runs / "todo.json"
        study.runs.mkdir(parents=True, exist_ok=True)
        todo.write_text(json.dumps([(*run, each.value) for run, each in zip(runs, cells, strict=True)]))
        command = [sys.executable, __file__, "--worker", str(todo), *options.overrides]
        if code := start_workers(command, min(options.jobs, len(runs))):
            sys.exit(code)
        with study.results.open("a") as out:
            for (place, _), each in zip(runs, cells, strict=True):
                out.write(json.dumps(line_of(place, each)) + "\n")
                shutil.rmtree(each.directory)


def finished(lines: Sequence[Line]) -> list[FinishedRun]:
    """Return the means of each place over its seeds, of those places that have as many as the most."""
    places: dict[Place, list[Line]] = {}
    for line in lines:
        places.setdefault(tuple(line["place"]), []).append(line)
    most = max(map(len, places.values()), default=0)
    return [
        FinishedRun(
            "-".join(map(str, place)),
            of[0]["parameters"],
            place[1],
            float(np.mean([line["loss"] for line in of])),
            *(of[0][key] for key in ("batch", "lr", "weight_decay")),
        )
        for place, of in sorted(places.items())
        if len(of) == most and all(line["loss"] for line in of)
    ]


def optima(runs: Sequence[FinishedRun]) -> list[tuple[float, float, float, float, bool]]:
    """Return (N, D, B, optimal lambda, at the edge) of each sweep of three or more weight decays."""
    groups: dict[tuple[float, float, float], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.parameters, run.tokens, run.batch or 0), []).append(run)
    found = []
    for key, group in sorted(groups.items()):
        if len(group) >= 3:
            group.sort(key=lambda run: run.weight_decay or 0)
            best = optimum([run.weight_decay or 0 for run in group], [run.loss for run in group])
            found.append((*key, best.value, best.at_edge))
    return found


def slopes(runs: Sequence[FinishedRun]) -> dict[tuple[float, float], float]:
    """Return (N, D) -> slope of ln lambda_opt over ln B, of the optima inside their sweeps."""
    points: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for size, tokens, batch, decay, at_edge in optima(runs):
        if not at_edge:
            points.setdefault((size, tokens), []).append((math.log(batch), math.log(decay)))
    return {point: float(np.polyfit(*zip(*of, strict=True), 1)[0]) for point, of in points.items() if len(of) >= 3}


def seeds_of(lines: Sequence[Line]) -> list[list[FinishedRun]]:
    """Return the runs of each seed alone."""
    return [
        finished([line for line in lines if line["seed"] == seed]) for seed in sorted({line["seed"] for line in lines})
    ]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} +- {half_interval(values):.3f} ({len(values)})" if values else "none"


def report(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the laws, the slopes, and the width left out."""
    ladder = [line for line in lines if tuple(line["place"][:2]) != LEFT_OUT]
    runs, alone = finished(ladder), seeds_of(ladder)
    yield f"{len(lines)} runs, {len(alone)} seeds; {sum(line['loss'] is None for line in lines)} diverged"
    for name, fit, published in (("tau_opt", fit_timescale, TAU), ("B_opt", fit_optimal_batch, OPTIMAL_BATCH)):
        try:
            law = fit(runs).law
        except UserError as error:
            yield f"{name}: {error}"
            continue
        low, high = np.quantile([exponent for _, exponent in law.draws], (0.1, 0.9))
        each = []
        for own in alone:
            try:
                each.append(fit(own).law.exponent)
            except UserError:
                continue
        yield f"{name} = {law.scale:.4g} x^{law.exponent:.3f} (80 %: {low:.3f} to {high:.3f}); {law.confidence}"
        yield f"    published {published.scale:.4g} x^{published.exponent}; each seed: {spread(each)}"
    of = slopes(runs)
    for (size, tokens), slope in of.items():
        yield f"N = {size:.3g}, D = {tokens:.3g}: lambda_opt goes as B^{slope:.2f}"
    by_seed = [float(np.mean(list(found.values()))) for found in map(slopes, alone) if found]
    if of:
        yield f"mean {np.mean(list(of.values())):.2f}; of each seed: {spread(by_seed)}"
    yield from left_out(lines, runs)


def left_out(lines: Sequence[Line], runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Yield what the ladder's laws and the published ones choose for the width left out, and what that costs there."""
    there = finished([line for line in lines if tuple(line["place"][:2]) == LEFT_OUT])
    if not there:
        return
    best, size, tokens = min(there, key=lambda run: run.loss), there[0].parameters, LEFT_OUT[1]
    at = f"batch {best.batch:.0f}, tau {best.timescale:.3f}; B_opt there {own_batch(there).value:.0f}"
    yield f"left out: N = {size:.4g}, D = {tokens}; best {best.loss:.4f} at {at}"
    try:
        law = fit_loss(runs, tied=True).law
        low, high = law.interval(size, tokens)
        yield f"    loss predicted {law(size, tokens):.4f}, {low:.4f} to {high:.4f}"
    except UserError as error:
        yield f"    {error}"
    at_best = "tau at the best batch"
    choices = {"published": (TAU, float(OPTIMAL_BATCH(tokens))), f"published {at_best}": (TAU, float(best.batch or 0))}
    try:
        ladder = fit_timescale(runs).law
        choices[f"the ladder's {at_best}"] = (ladder, float(best.batch or 0))
        choices["the ladder's"] = (ladder, float(fit_optimal_batch(runs).law(tokens)))
    except UserError as error:
        yield f"    {error}"
    for name, (timescale, batch) in choices.items():
        tau = timescale(tokens / size)

        def distance(run: FinishedRun, tau: float = tau, batch: float = batch) -> float:
            return abs(math.log((run.batch or 0) / batch)) + abs(math.log((run.timescale or 0) / tau))

        nearest = min(there, key=distance)
        decay = batch / (best.lr * tokens * tau)
        chosen = f"batch {batch:.0f}, tau {tau:.3f}, so weight decay {decay:.3g}"
        tried = f"batch {nearest.batch:.0f}, tau {nearest.timescale:.3f}: {nearest.loss - best.loss:+.4f} from the best"
        yield f"    {name}: {chosen}; nearest tried {tried}"


def own_batch(runs: Sequence[FinishedRun]) -> Optimum:
    """Return the optimal batch, in tokens, of one (N, D), each batch at its best tau."""
    least: dict[float, float] = {}
    for run in runs:
        least[run.batch or 0] = min(run.loss, least.get(run.batch or 0, math.inf))
    batches = sorted(least)
    return optimum(batches, [least[batch] for batch in batches])


def draw(lines: Sequence[Line], file: Path) -> None:
    """Draw tau_opt over tokens a weight, B_opt over tokens, and lambda_opt over the batch."""
    groups = {
        "ladder": ("run0", lambda point: point != LEFT_OUT),
        "left out": ("accent", lambda point: point == LEFT_OUT),
    }
    runs = finished([line for line in lines if tuple(line["place"][:2]) != LEFT_OUT])
    with plot_in(file, 11, 3.2) as figure:
        taus, batches, decays = figure.subplots(1, 3)
        taus.set(xscale="log", yscale="log", xlabel="tokens per weight", ylabel="optimal tau")
        batches.set(xscale="log", yscale="log", xlabel="tokens", ylabel="optimal batch, tokens")
        decays.set(xscale="log", yscale="log", xlabel="batch, tokens", ylabel="optimal weight decay")
        for label, (hue, of) in groups.items():
            mine = finished([line for line in lines if of(tuple(line["place"][:2]))])
            rates = {run.tokens: run.lr or 0 for run in mine}
            inside = [each for each in optima(mine) if not each[-1]]
            x = [tokens / size for size, tokens, *_ in inside]
            y = [batch / (rates[tokens] * decay * tokens) for _, tokens, batch, decay, _ in inside]
            style = {"color": PALETTE[hue], "ms": 4, "ls": "none"}
            taus.plot(x, y, "o", label=label if x else None, **style)
            points = sorted({(run.parameters, run.tokens) for run in mine})
            own = [own_batch([run for run in mine if (run.parameters, run.tokens) == point]) for point in points]
            found = [(tokens, at.value) for (_, tokens), at in zip(points, own, strict=True) if not at.at_edge]
            batches.plot([tokens for tokens, _ in found], [batch for _, batch in found], "o", **style)
            for point in points:
                curve = [(batch, decay) for size, tokens, batch, decay, at_edge in inside if (size, tokens) == point]
                if curve:
                    decays.plot(*zip(*curve, strict=True), "o-", ms=4, lw=1, color=PALETTE[hue])
        for axes, fit, published in ((taus, fit_timescale, TAU), (batches, fit_optimal_batch, OPTIMAL_BATCH)):
            x = np.geomspace(*axes.get_xlim())
            axes.plot(x, published(x), color=PALETTE["muted"], lw=1, label="published")
            try:
                axes.plot(x, fit(runs).law(x), color=PALETTE["run0"], lw=1, label="fitted to the ladder")
            except UserError:
                continue
        x = np.array(decays.get_xlim())
        decays.plot(x, decays.get_ylim()[0] * x / x[0], color=PALETTE["muted"], lw=1, label="slope 1")
        for axes in (taus, batches, decays):
            axes.legend(frameon=False, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the run file; results in runs/"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at once")
    parser.add_argument("--points", type=int, metavar="N", help="of (N, D), the first N (default: all)")
    parser.add_argument("--only-show", action="store_true", help="train nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    study = Study(HERE, overrides=options.overrides)
    if options.worker:
        runs = json.loads(options.worker.read_text())
        work([cell(tuple(place), seed, decay, options.overrides) for place, seed, decay in runs], 1, None)
    if not options.only_show:
        subprocess.run(["sh", str(HERE.parent / "stdlib-bytes.sh")], check=True)
        train(study, options)
    if not (lines := read_lines(study.results)):
        sys.exit(f"{study.results} has no results; repeat without --only-show")
    ladder = finished([line for line in lines if tuple(line["place"][:2]) != LEFT_OUT])
    study.results.with_name("means.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in vars(run).items() if v is not None}) + "\n" for run in ladder)
    )
    print("\n".join(report(lines)))
    draw(lines, study.figure)


if __name__ == "__main__":
    main()
