"""Forecasts of public series and of synthetic ones whose distribution is known (docs/series.md).

    python examples/forecasting/study.py [--jobs 2] [--seeds 1 2 3]

Two questions: are C2FAR's levels better than flat bins of as many weights, and are SutraNets' orders better than the
order of time at a long horizon? One model learns all sets of a question together. Every run that is missing in
results.jsonl is trained on one thread and measured on windows after what it was trained on; then the tables are printed
and the figures drawn. Interrupted, it resumes. Needs statsmodels (its data sets, and ETS) and matplotlib.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from megahp.report.figures import DOTTED, MARKERS, PALETTE, colour, logarithmic_x, plot_in
from megahp.series.measures import QUANTILES

HERE = Path(__file__).parent
FIGURES = Path("docs/figures")
DATA, RUNS, RESULTS = Path("data/forecasting"), Path("runs/forecasting"), HERE / "results.jsonl"
SAMPLES = 100
Line = dict[str, Any]
# Quantiles [QUANTILES, horizon] of a series' number, its history and the horizon.
Forecaster = Callable[[int, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Set:
    """Series of one kind. season: values of a period, 1 = none; windows: the last ones of each that are forecast.

    truth: of a series' number, a history and a horizon the quantiles that the future was drawn from, where known.
    """

    season: int
    windows: int
    series: Sequence[np.ndarray]
    truth: Forecaster | None = None


@dataclass(frozen=True)
class Question:
    """Arms to compare: name -> options of preprocess. windows: that a run is trained on, a share `practice` of them of
    practice_series(). settings: where they are not run.toml's."""

    conditioning: int
    horizon: int
    windows: int
    practice: float
    arms: dict[str, str]
    sets: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)


QUESTIONS = {
    "bins": Question(
        84,
        12,
        16_000,
        0.4,
        {"C2FAR 12 x 12 x 12": "--levels 12 12 12", "flat 36": "--levels 36"},
        (
            *("electricity", "co2", "el nino", "equipment", "inflation", "macro", "sunspots", "nile", "fertility"),
            *("seasonal + noise", "AR(1)"),
        ),
    ),
    "orders": Question(
        72,
        72,
        3_000,
        0.0,
        {
            "time": "--levels 12 12",
            **{
                order: f"--levels 12 12 --sub-series 6 --order {order}"
                for order in ("regular", "backfill", "backfill-alternating")
            },
        },
        ("electricity", "co2", "el nino", "seasonal + noise", "AR(1)"),
        {
            "model.positions": "learned",  # rotary ones favour the order of time, in which a season is one distance
            "model.rope_theta": 10_000,
            "batch.global_batch": 16,
            "batch.micro_batch": 16,
            "optimizer.lr": 1e-2,
        },
    ),
}


def public_sets() -> dict[str, Set]:
    """Those that statsmodels ships, its tests' too."""
    import pandas as pd
    from statsmodels import datasets

    folder = Path(datasets.__file__).parent
    frame = {
        name: getattr(datasets, name).load_pandas().data
        for name in ("co2", "elnino", "interest_inflation", "macrodata", "sunspots", "nile", "fertility")
    }
    electricity = pd.read_csv(folder.parent / "tsa/stl/tests/results/mstl_elec_vic.csv")["y"]
    equipment = pd.read_csv(folder / "elec_equip/elec_equip.csv").iloc[:, 1]
    births = frame["fertility"].loc[:, "1960":"2011"].dropna().iloc[::16]
    macro = frame["macrodata"].drop(columns=["year", "quarter"])
    inflation = frame["interest_inflation"][["Dp", "R"]]

    def columns(data: Any) -> list[np.ndarray]:
        return list(data.to_numpy(np.float64).T)

    return {
        "electricity": Set(24, 8, [electricity.to_numpy(np.float64)]),
        "co2": Set(52, 8, [frame["co2"]["co2"].to_numpy(np.float64)]),
        "el nino": Set(12, 6, [frame["elnino"].iloc[:, 1:].to_numpy(np.float64).reshape(-1)]),
        "equipment": Set(12, 4, [equipment.to_numpy(np.float64)]),
        "inflation": Set(4, 2, columns(inflation)),
        "macro": Set(4, 1, columns(macro)),
        "sunspots": Set(11, 5, columns(frame["sunspots"][["SUNACTIVITY"]])),
        "nile": Set(1, 2, columns(frame["nile"][["volume"]])),
        "fertility": Set(1, 1, list(births.to_numpy(np.float64))),
    }


NOISE, DECAY = 0.3, 0.8


def synthetic_sets() -> dict[str, Set]:
    random = np.random.default_rng(0)
    seasonal, decaying, phases = [], [], random.uniform(0, 2 * math.pi, 12)

    def wave(number: int, time: np.ndarray) -> np.ndarray:
        return 10 + np.sin(2 * math.pi * time / 12 + phases[number])

    for number in range(12):
        seasonal.append(wave(number, np.arange(400)) + random.normal(scale=NOISE, size=400))
        noise = random.normal(size=400)
        decaying.append(autoregressive(np.append(noise[0] / math.sqrt(1 - DECAY**2), noise[1:]), DECAY))

    def of_seasonal(number: int, history: np.ndarray, horizon: int) -> np.ndarray:
        return normal(wave(number, len(history) + np.arange(horizon)), NOISE)

    def of_decaying(_: int, history: np.ndarray, horizon: int) -> np.ndarray:
        steps = np.arange(1, horizon + 1)
        return normal(history[-1] * DECAY**steps, np.sqrt((1 - DECAY ** (2 * steps)) / (1 - DECAY**2)))

    return {"seasonal + noise": Set(12, 1, seasonal, of_seasonal), "AR(1)": Set(1, 1, decaying, of_decaying)}


def autoregressive(shocks: np.ndarray, decay: float) -> np.ndarray:
    """Return values that are each `decay` times the one before, plus a shock."""
    values = shocks.copy()
    for n in range(1, len(values)):
        values[n] += decay * values[n - 1]
    return values


def practice_series() -> list[np.ndarray]:
    """Return series to train on, and not to measure, of what short public ones show too rarely: seasons that drift and
    swell, levels that wander, trends and noise, each of a random size. (As Chronos has series of
    Gaussian processes: arXiv 2403.07815, section 4.2)"""
    random, time, found = np.random.default_rng(1), np.arange(170), list[np.ndarray]()

    def walk() -> np.ndarray:
        return np.cumsum(random.normal(size=len(time)))

    for _ in range(100):
        season, decay = random.choice((1, 4, 11, 12, 24, 52)), random.choice((0, 0.5, 0.8, 0.95))
        waves = np.outer(np.arange(1, 4), np.arange(season) / season) + random.random((3, 1))
        smooth = random.normal(size=3) / (1, 2, 3) @ np.sin(2 * math.pi * waves)
        pattern = random.normal(size=season) if random.random() < 0.5 else smooth
        drift, swell = random.choice((0, 0, 0.02), 2)
        phase = (time + season * drift * walk()) % season
        parts = np.stack(
            (
                np.interp(phase, np.arange(season + 1), np.append(pattern, pattern[0])) * np.exp(swell * walk()),
                walk() / 6,
                random.normal() * time / 85,
                autoregressive(random.normal(size=len(time)), decay) * math.sqrt(1 - decay**2),
            )
        )
        sizes = 10 ** random.uniform(-1.5, 0.5, 4) * (random.random(4) < 0.7)
        found.append(np.append(sizes[:3], max(sizes[3], 0.02)) @ parts)
    return found


def all_sets() -> dict[str, Set]:
    return public_sets() | synthetic_sets()


def cuts(each: Set, horizon: int) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """Yield index of the series, history and future of every window that is forecast."""
    for index, series in enumerate(each.series):
        windows = min(each.windows, 3) if horizon > 12 else each.windows
        for left in range(windows, 0, -1):
            end = len(series) - left * horizon
            yield index, series[:end], series[end : end + horizon]


# Forecasters: quantiles [QUANTILES, horizon] of a history.
def naive(history: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """The last season again, with normal errors that grow with every season, of the size of those in the history."""
    filled = interpolated(history)
    steps = np.arange(horizon)
    point = filled[len(filled) - season + steps % season]
    scale = np.sqrt(np.mean((filled[season:] - filled[:-season]) ** 2)) * np.sqrt(steps // season + 1)
    return normal(point, scale)


def ets(history: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """statsmodels' ETS: additive errors, damped additive trend, additive season; of at most 6 seasons or 200 values."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    recent = interpolated(history)[-max(200, 6 * season) :]
    seasonal = {"seasonal": "add", "seasonal_periods": season} if season > 1 and len(recent) > 2 * season else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = ETSModel(recent, error="add", trend="add", damped_trend=True, **seasonal).fit(disp=False, maxiter=200)
        paths = fit.simulate(horizon, anchor="end", repetitions=400, rng=0)
    return np.quantile(np.asarray(paths), QUANTILES, axis=1)


def normal(mean: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Return the quantiles [QUANTILES, horizon] of normal distributions."""
    return mean + np.array([[NormalDist().inv_cdf(q)] for q in QUANTILES]) * scale


def interpolated(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return np.interp(np.arange(len(values)), np.flatnonzero(known), values[known])


def measures(futures: np.ndarray, quantiles: np.ndarray, which: np.ndarray) -> Line:
    """Means over the series of a set, each weighing the same. futures [n, horizon]; quantiles [QUANTILES, n, horizon];
    which: the series of each."""
    from megahp.series.measures import coverage, normalized_deviation, weighted_quantile_loss

    found = []
    for index in np.unique(which):
        rows = which == index
        y, forecast = futures[rows], quantiles[:, rows]
        loss = weighted_quantile_loss(y, forecast, QUANTILES)
        found.append((loss, normalized_deviation(y, forecast[4]), coverage(y, forecast[0], forecast[-1])))
    return dict(zip(("wql", "nd", "coverage"), np.mean(found, 0).tolist(), strict=True))


def baselines(question: str) -> list[Line]:
    lines, horizon = [], QUESTIONS[question].horizon
    for name, each in all_sets().items():
        if name not in QUESTIONS[question].sets:
            continue
        windows = list(cuts(each, horizon))
        which, futures = np.array([w[0] for w in windows]), np.array([w[2] for w in windows])
        arms: dict[str, Forecaster | None] = {
            "seasonal naive": lambda _, history, horizon, season=each.season: naive(history, horizon, season),
            "ETS": lambda _, history, horizon, season=each.season: ets(history, horizon, season),
            "truth": each.truth,
        }
        for arm, forecast in arms.items():
            if not forecast:
                continue
            quantiles = np.stack([forecast(index, history, horizon) for index, history, _ in windows], 1)
            lines.append({"question": question, "arm": arm, "set": name, **measures(futures, quantiles, which)})
    return lines


def megahp(*words: object) -> None:
    command = [sys.executable, "-m", "megahp", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def slug(*names: object) -> str:
    return "-".join(map(str, names)).replace(" ", "_").replace("(", "").replace(")", "").replace("+", "and")


def prepare(question: str, arm: str) -> tuple[Path, list[str]]:
    """Write the sets' training parts as windows, once. Returns the coding, of all sets together, and the prefixes."""
    asked, folder = QUESTIONS[question], DATA / slug(question, arm)
    names = [*asked.sets, *(["practice"] if asked.practice else [])]
    coding, prefixes = folder / "all.series", [str(folder / slug(name)) for name in names]
    if all(Path(f"{prefix}.json").exists() for prefix in prefixes):
        return coding, prefixes
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sets = all_sets()
    for name, prefix in zip(names, prefixes, strict=True):
        if name == "practice":
            firsts = dict(enumerate(practice_series()))
        else:  # the history of the first window that is forecast
            firsts = {index: history for index, history, _ in reversed(list(cuts(sets[name], asked.horizon)))}
        with open(f"{prefix}.jsonl", "w") as file:
            for index, history in sorted(firsts.items()):
                values = [None if math.isnan(y) else y for y in history.tolist()]
                file.write(json.dumps({"name": f"{name} {index}", "value": values}) + "\n")
    files, options = [f"{prefix}.jsonl" for prefix in prefixes], asked.arms[arm].split()
    window = "--conditioning", asked.conditioning, "--horizon", asked.horizon
    series = "preprocess", "--series", "--tokenizer", coding
    megahp(*series, "--input", *files, "--output", folder / "all", *window, *options)  # its tails are all sets'
    for file, prefix in zip(files, prefixes, strict=True):
        megahp(*series, "--input", file, "--output", prefix)
    return coding, prefixes


def train_and_measure(question: str, arm: str, seed: int) -> list[Line]:
    from megahp.series.coding import load_coding

    asked, (file, prefixes) = QUESTIONS[question], prepare(question, arm)
    began = time.monotonic()
    coding, name = load_coding(file), slug(question, arm, seed)
    shutil.rmtree(RUNS / name, ignore_errors=True)
    documents = [json.loads(Path(f"{prefix}.json").read_text())["documents"] for prefix in prefixes]
    weights = np.sqrt(documents[: len(asked.sets)])
    weights *= (1 - asked.practice) / weights.sum()
    settings = {
        **asked.settings,
        "data.train": json.dumps(prefixes),
        "data.weights": json.dumps([*weights, *([asked.practice] if asked.practice else [])]),
        "data.tokenizer": file,
        "data.sequence_length": coding.window_tokens,
        "train.tokens": asked.windows * coding.window_tokens,
        "train.seed": seed,
        "log.name": name,
    }
    megahp("train", HERE / "run.toml", *(f"{key}={value}" for key, value in settings.items()))
    trained_in = time.monotonic() - began
    command = [sys.executable, __file__, "--measure", question, arm, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in found.splitlines()]
    seconds = {"trained_in": round(trained_in, 1), "measured_in": round(time.monotonic() - began - trained_in, 1)}
    return [line | seconds for line in lines]


def measure(question: str, arm: str, seed: int) -> None:
    """Print a line for each set: measures of samples, and the mean negative log density of a value."""
    import torch

    from megahp.evaluate.forecast import sample_series
    from megahp.evaluate.sample import load_trained
    from megahp.series.measures import crps

    torch.set_num_threads(1)
    trained, sets = load_trained(RUNS / slug(question, arm, seed)), all_sets()
    coding = trained.tokenizer.coding
    windows = [(name, *cut) for name in QUESTIONS[question].sets for cut in cuts(sets[name], coding.horizon)]
    given = np.full((len(windows), coding.conditioning), np.nan)
    for row, (_, _, history, _) in zip(given, windows, strict=True):
        recent = history[-coding.conditioning :]
        row[-len(recent) :] = recent
    futures, names = np.array([w[3] for w in windows]), np.array([w[0] for w in windows])
    samples = sample_series(trained, list(given), SAMPLES, seed)
    quantiles = np.quantile(samples, QUANTILES, axis=1)
    tokens, scale = coding.encode(np.concatenate((given, futures), 1))
    with torch.no_grad():
        rows = torch.from_numpy(tokens)
        losses = torch.cat([trained.model(part[:, :-1], part[:, 1:]) for part in rows.split(64)]).double().numpy()
    nats = coding.nats(losses[:, coding.prompt_tokens - 1 :], futures, scale)
    np.savez_compressed(
        RUNS / slug(question, arm, seed) / "forecasts.npz",
        quantiles=quantiles,
        futures=futures,
        names=names,
        given=given,
    )
    for name in QUESTIONS[question].sets:
        here = names == name
        which = np.array([w[1] for w in windows])[here]
        errors = crps(futures[here], samples[here].swapaxes(0, 1))
        more = {
            "nats": float(np.nanmean(nats[here])),
            "crps": float(np.nanmean(errors) / np.nanmean(np.abs(futures[here]))),
        }
        line = {"question": question, "arm": arm, "seed": seed, "set": name}
        print(json.dumps(line | measures(futures[here], quantiles[:, here], which) | more))


def read() -> list[Line]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(lines: Sequence[Line]) -> None:
    with open(RESULTS, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def scores(lines: Sequence[Line], arm: str, measured: str) -> dict[tuple[str, Any], float]:
    """(set, seed) -> what was measured of an arm; the seed is None where there is none."""
    return {(line["set"], line.get("seed")): line[measured] for line in lines if line["arm"] == arm}


def by_set(lines: Sequence[Line], arm: str, measured: str) -> dict[str, list[float]]:
    """Set -> the values of an arm, one a seed."""
    found: dict[str, list[float]] = {}
    for (name, _), value in sorted(scores(lines, arm, measured).items(), key=str):
        found.setdefault(name, []).append(value)
    return found


def sign_test(wins: int, pairs: int) -> float:
    """Return the two-sided p-value of so many wins, if each side were as likely."""
    tail = sum(math.comb(pairs, k) for k in range(max(wins, pairs - wins), pairs + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def print_tables(lines: Sequence[Line]) -> None:
    """Print a table of wQL for each question, in Markdown, then signs, coverage and log densities."""
    for question, asked in QUESTIONS.items():
        mine = [line for line in lines if line["question"] == question]
        if not mine:
            continue
        arms = [*asked.arms, "seasonal naive", "ETS", "truth"]
        print(f"\n{question}: wQL, mean of the seeds\n\n| set | {' | '.join(arms)} |\n|---{'|---' * len(arms)}|")
        for name in asked.sets:
            values = [by_set(mine, arm, "wql").get(name) for arm in arms]
            print(f"| {name} | {' | '.join(f'{np.mean(v):.4f}' if v else '' for v in values)} |")
        first, *others = asked.arms
        for measured, other in ((measured, other) for measured in ("wql", "crps", "nats") for other in others):
            ours, theirs = (scores(mine, arm, measured) for arm in (first, other))
            pairs = [(ours[each], theirs[each]) for each in ours if each in theirs]
            means = [
                [np.mean(by_set(mine, arm, measured).get(name, np.nan)) for arm in (first, other)]
                for name in asked.sets
            ]
            wins, sets = sum(a < b for a, b in pairs), sum(bool(a < b) for a, b in means)
            ratio = "" if measured == "nats" or not pairs else f"; geometric mean of ratios {geometric(pairs):.3f}"
            print(
                f"{measured}: {first} below {other} on {sets} of {len(means)} sets by the seeds' mean "
                f"(p = {sign_test(sets, len(means)):.2g}), in {wins} of {len(pairs)} pairs of set and seed "
                f"(p = {sign_test(wins, len(pairs)):.2g}, were seeds independent){ratio}"
            )
        for arm in arms:
            if found := by_set(mine, arm, "coverage"):
                shares = ", ".join(f"{name} {100 * np.mean(values):.0f}" for name, values in found.items())
                mean = 100 * np.mean([np.mean(values) for values in found.values()])
                print(f"coverage of 80 % intervals by {arm}: {mean:.0f} % ({shares})")


def geometric(pairs: Sequence[tuple[float, float]]) -> float:
    return math.exp(np.mean([math.log(a / b) for a, b in pairs]))


def draw(lines: Sequence[Line]) -> None:
    """Draw wQL beside seasonal naive's for each question, and a forecast of each set by its first arm."""
    for question, asked in QUESTIONS.items():
        mine = [line for line in lines if line["question"] == question]
        if mine:
            draw_losses(FIGURES / f"forecasting-{question}.svg", asked, mine)
        file = RUNS / slug(question, next(iter(asked.arms)), 1) / "forecasts.npz"
        if mine and file.exists():
            draw_forecasts(FIGURES / f"forecasting-{question}-forecasts.svg", asked.sets, np.load(file))


def draw_losses(file: Path, asked: Question, lines: Sequence[Line]) -> None:
    reference = by_set(lines, "seasonal naive", "wql")
    with plot_in(file, 9, 0.32 * len(asked.sets) + 1.6) as figure:
        axes = figure.add_subplot()
        for number, arm in enumerate((*asked.arms, "ETS", "truth")):
            found = by_set(lines, arm, "wql")
            rows = [(n, loss / reference[name][0]) for n, name in enumerate(asked.sets) for loss in found.get(name, ())]
            marker, _ = MARKERS[number % len(MARKERS)]
            hue = PALETTE[colour(number)]
            axes.plot([x for _, x in rows], [n for n, _ in rows], marker, color=hue, ms=5, alpha=0.7, label=arm)
        axes.axvline(1, color=PALETTE["muted"], lw=1, ls=DOTTED)
        logarithmic_x(axes, (0.25, 0.5, 1, 2, 4), ("1/4", "1/2", "1", "2", "4"))
        axes.set_xlabel("weighted quantile loss, as a ratio to seasonal naive's; a mark a seed")
        axes.set_yticks(range(len(asked.sets)), asked.sets)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def draw_forecasts(file: Path, names: Sequence[str], kept: Mapping[str, np.ndarray]) -> None:
    columns, hue = 4, PALETTE["run0"]
    rows = math.ceil(len(names) / columns)
    with plot_in(file, 11, 2.1 * rows) as figure:
        for number, name in enumerate(names, 1):
            axes, row = figure.add_subplot(rows, columns, number), int(np.flatnonzero(kept["names"] == name)[0])
            history, future, quantiles = kept["given"][row], kept["futures"][row], kept["quantiles"][:, row]
            ahead = np.arange(len(future))
            axes.plot(np.arange(-len(history), 0), history, lw=0.8, color=PALETTE["muted"])
            axes.plot(ahead, future, lw=1, color=PALETTE["ink"])
            axes.fill_between(ahead, quantiles[0], quantiles[-1], color=hue, alpha=0.3, lw=0)
            axes.plot(ahead, quantiles[4], lw=1, color=hue)
            axes.set_title(name, fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, on one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], options.measure[1], int(options.measure[2]))
    done = {(line["question"], line["arm"], line.get("seed")) for line in read()}
    for question in QUESTIONS:
        if (question, "seasonal naive", None) not in done:
            write(baselines(question))
    runs = [(q, arm, seed) for seed in options.seeds for q, asked in QUESTIONS.items() for arm in asked.arms]
    left = [run for run in runs if run not in done]
    for question, arm in dict.fromkeys((question, arm) for question, arm, _ in left):
        prepare(question, arm)
    with ThreadPoolExecutor(options.jobs) as threads:
        for lines in threads.map(lambda run: train_and_measure(*run), left):
            write(lines)
            print(*(f"{lines[0][key]}" for key in ("question", "arm", "seed", "trained_in", "measured_in")), flush=True)
    print_tables(read())
    draw(read())


if __name__ == "__main__":
    main()
