"""Which weights of three sources serve two held-out sets best: searched by `megahp mix`, or by a population?

    python examples/mixture/study.py [--seeds 1 2 3]

Bytes of Shakespeare (1 MB), Python's standard library (11 MB) and torch's C++ headers (11 MB); the loss is the mean of
held-out Shakespeare and Python. Both searches have runs of the final size and length; the table says what they cost in
tokens. What they find, mix.json and population.json, is trained anew with other seeds, beside weights that take no
search. A population's weights change during the run. Needs `optuna`.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import (
    Line,
    Run,
    Study,
    code,
    english,
    half_interval,
    main,
    mean_and_interval,
    prepare,
    print_table,
    run_megahp,
)

MILLIONS = 0.2
TRIALS, MEMBERS, INTERVALS = 16, 8, 8
SETS = "english", "code"
SOURCES = *SETS, "headers"


def headers() -> list[str]:
    """Return the C++ headers of torch's tensors, but for a file per operator, 11 MB, in the order of their names."""
    import torch

    folder = Path(torch.__file__).parent / "include/ATen"
    return [file.read_text() for file in sorted(folder.rglob("*.h")) if "ops" not in file.relative_to(folder).parts]


def prepare_data() -> None:
    for name, documents in zip(SOURCES, (english, code, headers), strict=True):
        prepare(name, documents)


def searched(study: Study) -> dict[str, Any]:
    """Return what both commands found, after running them if there is nothing yet; each on a core."""
    folder = study.results.parent
    # the searches' runs have a seed that the final ones do not
    settings = [study.folder / "run.toml", f"train.tokens={study.tokens(MILLIONS)}", "train.seed=0"]
    trials, members, intervals = (max(2, round(study.scale * size)) for size in (TRIALS, MEMBERS, INTERVALS))
    words = {
        "mix": ["--trials", trials],
        "population": ["--search", "data.weights=0.01:1", "--members", members, "--intervals", intervals],
    }
    if missing := [name for name in words if not (folder / f"{name}.json").exists()]:
        if study.only_show:
            sys.exit(f"{folder} lacks {missing[0]}.json; repeat without --only-show")
        prepare_data()
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            for done in [
                pool.submit(
                    run_megahp,
                    *(name, *settings, *words[name], "--out", study.runs / name, "--json", folder / f"{name}.json"),
                )
                for name in missing
            ]:
                done.result()
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in words}


def mixed(found: dict[str, Any]) -> list[float]:
    """Return the best weights of `megahp mix`: of the lowest loss among mixtures that had all tokens."""
    whole = [mixture for mixture in found["mix"]["mixtures"] if "9" in mixture["losses"]]
    return min(whole, key=lambda mixture: mixture["losses"]["9"])["weights"]


def arms(study: Study) -> dict[str, list[tuple[int, list[float]]]]:
    """Return the weights of every arm from these tokens on; none: in proportion to the sources' tokens."""
    found = searched(study)
    steps = found["population"]["schedule"]
    return {
        "own proportions": [],
        "equal": [(0, [1, 1, 1])],
        "as in the target": [(0, [1, 1, 0])],
        "mix": [(0, mixed(found))],
        "population": [(step["tokens"], step["data.weights"]) for step in steps],
    }


def costs(study: Study) -> dict[str, float]:
    """Return the tokens of each search, in millions."""
    found, tokens = searched(study), study.tokens(MILLIONS) / 1e6
    shares = [int(max(mixture["losses"], key=int)) for mixture in found["mix"]["mixtures"]]
    rungs = {1: 1, 3: 1 + 3, 9: 1 + 3 + 9}  # each share of the tokens is a run of its own
    members = len(found["population"]["intervals"][0]["losses"])
    return {"mix": tokens * sum(rungs[share] for share in shares) / 9, "population": tokens * members}


def runs(study: Study, seeds: list[int]) -> list[Run]:
    chosen = []
    for arm, schedule in arms(study).items():
        words = [f"train.tokens={study.tokens(MILLIONS)}"]
        if schedule:
            later = [f"{tokens}:{','.join(map(str, weights))}" for tokens, weights in schedule[1:]]
            words += [f"data.weights={schedule[0][1]}", f"data.mixtures={json.dumps(later)}"]
        chosen += [Run(f"{arm}/{seed}", [*words, f"train.seed={seed}"]) for seed in seeds]
    return chosen


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print losses, also less those of own proportions, and the searches' cost; draw losses and weights."""
    from megahp.report.figures import PALETTE, plot_in

    def losses(arm: str, names: tuple[str, ...] = SETS) -> list[float]:
        return [sum(lines[f"{arm}/{seed}"]["losses"][name] for name in names) / len(names) for seed in seeds]

    schedules, rows = arms(study), []
    with plot_in(study.figure, 7, 3) as figure:
        left, right = figure.subplots(1, 2)
        for arm, schedule in schedules.items():
            mine, weights = losses(arm), schedule[-1][1] if schedule else []
            others = [a - b for a, b in zip(mine, losses("own proportions"), strict=True)]
            shares = " : ".join(f"{100 * weight / sum(weights):.0f}" for weight in weights)
            cost = costs(study).get(arm)
            rows.append(
                [
                    arm,
                    f"{shares}, at the end" if len(schedule) > 1 else shares,
                    mean_and_interval(mine),
                    "" if arm == "own proportions" else mean_and_interval(others, 4),
                    *(mean_and_interval(losses(arm, (name,))) for name in SETS),
                    f"{cost:.1f} M" if cost else "0",
                ]
            )
            left.errorbar([sum(mine) / len(mine)], [arm], xerr=[half_interval(mine)], fmt="o", color=PALETTE["accent"])
        left.invert_yaxis()
        left.set_xlabel("loss, nats per byte")
        schedule, end = schedules["population"], study.tokens(MILLIONS)
        for number, source in enumerate(SOURCES):
            style = {"color": PALETTE[f"run{number}"], "lw": 1.5}
            values = [weights[number] for _, weights in schedule]
            right.stairs(values, [*(tokens for tokens, _ in schedule), end], baseline=None, label=source, **style)
            right.axhline(schedules["mix"][0][1][number], ls=":", **style)
        right.set(xlabel="tokens", ylabel="weight: population, and mix (dotted)", ylim=(0, 1))
        right.legend(frameon=False, fontsize=7)
    columns = ("weights", " : ".join(SOURCES), "loss", "to own proportions", *SETS, "tokens of the search")
    print_table(columns, rows)


if __name__ == "__main__":
    main(__file__, __doc__, prepare_data, runs, show)
