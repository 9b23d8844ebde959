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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DATA, RUNS, RESULTS = Path("data/forecasting"), Path("runs/forecasting"), HERE / "results.jsonl"
SAMPLES = 100
AT_ONCE = 1600  # sequences that are sampled together
QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Line = dict[str, Any]


@dataclass(frozen=True)
class Set:
    """Series of one kind. season: values of a period, 1 = none; windows: the last ones of each that are forecast."""

    season: int
    windows: int
    series: Sequence[np.ndarray]


@dataclass(frozen=True)
class Question:
    """Arms to compare: name -> options of preprocess. windows: that a run is trained on."""

    conditioning: int
    horizon: int
    windows: int
    arms: dict[str, str]
    sets: Sequence[str]


QUESTIONS = {
    "bins": Question(
        84,
        12,
        16_000,
        {"C2FAR 12 x 12 x 12": "--levels 12 12 12", "flat 36": "--levels 36"},
        (
            *("electricity", "co2", "el nino", "equipment", "inflation", "macro", "sunspots", "nile", "fertility"),
            *("seasonal + noise", "AR(1)"),
        ),
    ),
    "orders": Question(
        96,
        96,
        8_000,
        {
            "time": "--levels 12 12",
            **{
                order: f"--levels 12 12 --sub-series 6 --order {order}"
                for order in ("regular", "backfill", "backfill-alternating")
            },
        },
        ("electricity", "co2", "el nino", "seasonal + noise", "AR(1)"),
    ),
}


def public_sets() -> dict[str, Set]:
    """Those that statsmodels ships, its tests' too."""
    import pandas as pd
    from statsmodels import datasets

    folder = Path(datasets.__file__).parent
    frame = {name: getattr(datasets, name).load_pandas().data for name in (
        "co2", "elnino", "interest_inflation", "macrodata", "sunspots", "nile", "fertility"
    )}
    electricity = pd.read_csv(folder.parent / "tsa/stl/tests/results/mstl_elec_vic.csv")["y"]
    equipment = pd.read_csv(folder / "elec_equip/elec_equip.csv").iloc[:, 1]
    births = frame["fertility"].loc[:, "1960":"2011"].dropna().iloc[::6]
    macro = frame["macrodata"].drop(columns=["year", "quarter"])
    inflation = frame["interest_inflation"][["Dp", "R"]]

    def columns(data: Any) -> list[np.ndarray]:
        return list(data.to_numpy(np.float64).T)

    return {
        "electricity": Set(24, 12, [electricity.to_numpy(np.float64)]),
        "co2": Set(52, 12, [frame["co2"]["co2"].to_numpy(np.float64)]),
        "el nino": Set(12, 6, [frame["elnino"].iloc[:, 1:].to_numpy(np.float64).reshape(-1)]),
        "equipment": Set(12, 4, [equipment.to_numpy(np.float64)]),
        "inflation": Set(4, 2, columns(inflation)),
        "macro": Set(4, 2, columns(macro)),
        "sunspots": Set(11, 5, columns(frame["sunspots"][["SUNACTIVITY"]])),
        "nile": Set(1, 2, columns(frame["nile"][["volume"]])),
        "fertility": Set(1, 1, list(births.to_numpy(np.float64))),
    }


NOISE, DECAY = 0.3, 0.8


def synthetic_sets() -> dict[str, Set]:
    random = np.random.default_rng(0)
    seasonal, decaying = [], []
    for phase in random.uniform(0, 2 * math.pi, 12):
        seasonal.append(10 + wave(phase, np.arange(400)) + random.normal(scale=NOISE, size=400))
        noise = random.normal(size=400)
        values = [noise[0] / math.sqrt(1 - DECAY**2)]
        for shock in noise[1:]:
            values.append(DECAY * values[-1] + shock)
        decaying.append(np.array(values))
    return {"seasonal + noise": Set(12, 2, seasonal), "AR(1)": Set(1, 2, decaying)}


def wave(phase: float, time: np.ndarray) -> np.ndarray:
    return np.sin(2 * math.pi * time / 12 + phase)


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
    return point + np.array([[NormalDist().inv_cdf(q)] for q in QUANTILES]) * scale


def ets(history: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """statsmodels' ETS: additive errors, damped additive trend, additive season; of at most 6 seasons or 200 values."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    recent = interpolated(history)[-max(200, 6 * season) :]
    seasonal = {"seasonal": "add", "seasonal_periods": season} if 1 < season and len(recent) > 2 * season else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = ETSModel(recent, error="add", trend="add", damped_trend=True, **seasonal).fit(disp=False, maxiter=200)
        paths = fit.simulate(horizon, anchor="end", repetitions=400, random_state=0)
    return np.quantile(np.asarray(paths), QUANTILES, axis=1)


def truth(name: str, phase: float, history: np.ndarray, horizon: int) -> np.ndarray:
    """The distribution that a synthetic series was drawn from."""
    steps = np.arange(1, horizon + 1)
    if name == "AR(1)":
        point, scale = history[-1] * DECAY**steps, np.sqrt((1 - DECAY ** (2 * steps)) / (1 - DECAY**2))
    else:
        point, scale = 10 + wave(phase, len(history) - 1 + steps), np.full(horizon, NOISE)
    return point + np.array([[NormalDist().inv_cdf(q)] for q in QUANTILES]) * scale


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
    random = np.random.default_rng(0)
    phases = random.uniform(0, 2 * math.pi, 12)
    for name, each in all_sets().items():
        if name not in QUESTIONS[question].sets:
            continue
        windows = list(cuts(each, horizon))
        which, futures = np.array([w[0] for w in windows]), np.array([w[2] for w in windows])
        arms: dict[str, Callable[[int, np.ndarray], np.ndarray]] = {
            "seasonal naive": lambda _, history, season=each.season: naive(history, horizon, season),
            "ETS": lambda _, history, season=each.season: ets(history, horizon, season),
        }
        if name in synthetic_sets():
            arms["truth"] = lambda index, history, name=name: truth(name, phases[index], history, horizon)
        for arm, forecast in arms.items():
            quantiles = np.stack([forecast(index, history) for index, history, _ in windows], 1)
            lines.append({"question": question, "arm": arm, "set": name, **measures(futures, quantiles, which)})
    return lines


def megahp(*words: object) -> None:
    command = [sys.executable, "-m", "megahp", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def slug(*names: object) -> str:
    return "-".join(map(str, names)).replace(" ", "_").replace("(", "").replace(")", "").replace("+", "and")


def prepare(question: str, arm: str) -> tuple[Path, list[str]]:
    """Write the sets' training parts as windows, once. Returns the coding and the prefixes."""
    asked = QUESTIONS[question]
    folder = DATA / slug(question, arm)
    coding, prefixes = folder / "all.series", [str(folder / slug(name)) for name in asked.sets]
    sets = all_sets()
    folder.mkdir(parents=True, exist_ok=True)
    for name, prefix in zip(asked.sets, prefixes, strict=True):
        if Path(f"{prefix}.idx").exists():
            continue
        with open(f"{prefix}.jsonl", "w") as file:
            for index, history, _ in cuts(sets[name], asked.horizon):
                if index == 0 or True:
                    file.write("")
            firsts = {index: history for index, history, _ in reversed(list(cuts(sets[name], asked.horizon)))}
            for index, history in sorted(firsts.items()):
                values = [None if math.isnan(y) else y for y in history.tolist()]
                file.write(json.dumps({"name": f"{name} {index}", "value": values}) + "\n")
        words = ["--conditioning", asked.conditioning, "--horizon", asked.horizon, *asked.arms[arm].split()]
        files = ["--input", f"{prefix}.jsonl", "--output", prefix, "--tokenizer", coding]
        megahp("preprocess", "--series", *files, *(words if not coding.exists() else []))
    return coding, prefixes


def train_and_measure(question: str, arm: str, seed: int, words: Sequence[str] = ()) -> list[Line]:
    from megahp.series.coding import load_coding

    asked, began = QUESTIONS[question], time.monotonic()
    coding_file, prefixes = DATA / slug(question, arm) / "all.series", prepare(question, arm)[1]
    coding, name = load_coding(coding_file), slug(question, arm, seed)
    shutil.rmtree(RUNS / name, ignore_errors=True)
    documents = [json.loads(Path(f"{prefix}.json").read_text())["documents"] for prefix in prefixes]
    settings = {
        "data.train": json.dumps(prefixes),
        "data.weights": json.dumps([math.sqrt(count) for count in documents]),
        "data.tokenizer": coding_file,
        "data.sequence_length": coding.window_tokens,
        "train.tokens": asked.windows * coding.window_tokens,
        "train.seed": seed,
        "log.name": name,
    }
    megahp("train", HERE / "run.toml", *(f"{key}={value}" for key, value in settings.items()), *words)
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

    from megahp.evaluate.sample import load_trained

    torch.set_num_threads(1)
    trained, sets = load_trained(RUNS / slug(question, arm, seed)), all_sets()
    coding = trained.tokenizer.coding
    windows = [(name, *cut) for name in QUESTIONS[question].sets for cut in cuts(sets[name], coding.horizon)]
    given = np.full((len(windows), coding.conditioning), np.nan)
    for row, (_, _, history, _) in zip(given, windows, strict=True):
        recent = history[-coding.conditioning :]
        row[-len(recent) :] = recent
    futures, names = np.array([w[3] for w in windows]), np.array([w[0] for w in windows])
    samples = np.concatenate([sample(trained, part, seed) for part in np.array_split(given, -(-len(given) * SAMPLES // AT_ONCE))])
    quantiles = np.quantile(samples, QUANTILES, axis=1)
    tokens, scale = coding.encode(np.concatenate((given, futures), 1))
    with torch.no_grad():
        rows = torch.from_numpy(tokens)
        losses = torch.cat([trained.model(part[:, :-1], part[:, 1:]) for part in rows.split(64)]).double().numpy()
    nats = coding.nats(losses[:, coding.prompt_tokens - 1 :], futures, scale)
    np.savez_compressed(RUNS / slug(question, arm, seed) / "forecasts.npz", quantiles=quantiles, futures=futures, names=names, given=given)
    from megahp.series.measures import crps

    for name in QUESTIONS[question].sets:
        here = names == name
        which = np.array([w[1] for w in windows])[here]
        errors = crps(futures[here], samples[here].swapaxes(0, 1))
        more = {"nats": float(np.nanmean(nats[here])), "crps": float(np.nanmean(errors) / np.nanmean(np.abs(futures[here])))}
        line = {"question": question, "arm": arm, "seed": seed, "set": name}
        print(json.dumps(line | measures(futures[here], quantiles[:, here], which) | more))


def sample(trained: Any, given: np.ndarray, seed: int) -> np.ndarray:
    """Return samples [rows, SAMPLES, horizon] of what follows the rows' values."""
    import torch

    from megahp.evaluate.decode import Decoder, draw
    from megahp.series.coding import Scale

    coding, random = trained.tokenizer.coding, np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    prompt, scale = coding.prompt(given)
    decoder = Decoder(trained.model, coding.window_tokens)
    logits = decoder(torch.from_numpy(prompt)).repeat_interleave(SAMPLES, 0)
    decoder.repeat(SAMPLES)
    tokens: list[Any] = []
    for place in range(coding.horizon_tokens):
        logits = decoder(tokens[-1]) if tokens else logits
        ids = coding.ids_at(place)
        tokens.append(draw(logits[:, ids.start : ids.stop].float(), 1.0, 0, generator) + ids.start)
    sampled = torch.cat(tokens, 1).numpy().reshape(len(given), SAMPLES, -1)
    z = coding.forecast(sampled, random.uniform(size=(*sampled.shape[:2], coding.horizon)))
    return Scale(scale.minimum[:, None], scale.span[:, None]).undo(z)


def read() -> list[Line]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(lines: Sequence[Line]) -> None:
    with open(RESULTS, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


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


if __name__ == "__main__":
    main()
