"""Train a population of runs that change settings on the way: the worst continue from the best, with settings nearby.

    megahp population RUN.toml [section.key=value ...] --search optimizer.lr=0.001:0.1 [--search data.weights=0.01:1]
        --out FOLDER [--members 20] [--intervals 20] [--json FILE] [--plot FILE]

Population based training (Jaderberg et al., arXiv 1711.09846), all members an interval at a time. Members are runs of
RUN.toml with the same seed, schedule and tokens. Each has settings of its own, drawn from the ranges of --search,
evenly in their logarithm. train.tokens are cut into --intervals. After each, the worst fifth of the members take
weights, moments and settings from members of the best fifth, and every setting is then multiplied by 0.8 or 1.2, within
its range. The loss is the mean over the sets of data.validation or, without any, that of the held-out mixture.

What can be searched is numbers that a run may change when it starts from a checkpoint, and data.weights: a share of
each source, from the range, before they are made to add up to 1. An interval of a member is a run of its own,
FOLDER/interval/member, with all logs; its checkpoint is deleted when the next interval has ended.

Start the same command several times for as many workers; they share FOLDER, and wait for each other between intervals.
After an interruption it resumes. Who continues from whom with which settings follows from --seed and the losses alone.
It is written to FOLDER/decisions.jsonl; each repetition of the command replays it and compares. You see a line per run,
then the best one's settings in each interval; of data.weights, as settings of a run file.
"""

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megahp.commands.arguments import add_outputs, check_minimum, key_of
from megahp.commands.output import provenance, write_json
from megahp.config import Config, config_to_dict, fixed_when, get_setting, resolve, setting_names, with_values
from megahp.config.schema import TYPES, toml_value
from megahp.diagnose.child_runs import claimed, for_search, is_done, loss_of
from megahp.errors import UserError
from megahp.files import read_text, replace_text
from megahp.log.metrics import without_nan
from megahp.log.progress import human_duration
from megahp.parallel.layout import fit
from megahp.train.prepare import prepare

SHARE = 0.2  # of the members, which are replaced, and by which (arXiv 1711.09846, 4.1.1, truncation selection)
FACTORS = (0.8, 1.2)  # of every setting of one that is replaced (the same, perturb)
WEIGHTS = "data.weights"
SECTIONS = ("optimizer", "schedule", "distill", "model")  # what a run does otherwise, such as stopping, is no choice
FORM = "write section.key=LOW:HIGH, such as optimizer.lr=0.001:0.1"
Settings = dict[str, Any]  # section.key -> a number, or data.weights


@dataclass(frozen=True)
class Searched:
    """A setting and the range of its values. sources: for data.weights, their number, else None."""

    key: str
    low: float
    high: float
    sources: int | None

    def draw(self, random: np.random.Generator) -> Any:
        """Return a first value."""
        return self.rounded(np.exp(random.uniform(math.log(self.low), math.log(self.high), self.sources)))

    def explore(self, value: Any, random: np.random.Generator) -> Any:
        """Return a value near this one, in the range."""
        factors = random.choice(FACTORS, self.sources)
        while self.sources and np.ptp(factors) == 0:  # weights that all change alike would not change
            factors = random.choice(FACTORS, self.sources)
        return self.rounded(np.clip(value * factors, self.low, self.high))

    def rounded(self, value: Any) -> Any:
        """Return the value in four digits."""
        return [float(f"{each:.4g}") for each in value] if self.sources else float(f"{value:.4g}")


@dataclass(frozen=True)
class Interval:
    """A decision. before: losses at the end of the interval before, from which it follows; parents: the member that
    each continues from, most often itself."""

    before: list[float]
    parents: list[int]
    settings: list[Settings]


def of_run_file(settings: Settings) -> Settings:
    """Return the settings as a run file has them: weights that add up to 1."""
    if WEIGHTS not in settings:
        return settings
    weights = settings[WEIGHTS]
    return settings | {WEIGHTS: [float(f"{weight / sum(weights):.4g}") for weight in weights]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="override the file's settings, in every run")
    about = "a setting that changes, and its range; may be given several times"
    add("--search", action="append", required=True, metavar="KEY=LOW:HIGH", help=about)
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the runs and decisions")
    add("--members", type=int, default=20, metavar="N", help="runs at a time (default 20)")
    add("--intervals", type=int, default=20, metavar="N", help="that train.tokens are cut into (default 20)")
    add("--ranks", type=int, default=1, metavar="N", help="ranks of each run (default 1)")
    add("--seed", type=int, default=1, metavar="N", help="of the decisions; runs have train.seed (default 1)")
    add_outputs(parser, "losses and settings over the tokens")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    config, searched = checked(options)
    sizes = {name: getattr(options, name) for name in ("members", "intervals", "seed")}
    agree(options.out, 0, {"config": config_to_dict(config), "searched": [*map(asdict, searched)], **sizes})
    total, before = options.members * options.intervals, count_done(options)
    began, history = time.monotonic(), list[tuple[Interval, list[float]]]()
    interval = first_interval(searched, options.members, options.seed)
    for number in range(options.intervals):
        agree(options.out, number + 1, asdict(interval))
        runs = [of_member(options, config, number, member, interval) for member in range(options.members)]
        for member, loss in train_all(runs, options.ranks):
            done = count_done(options)
            eta = human_duration((time.monotonic() - began) / (done - before) * (total - done))
            print(f"[{done}/{total}] {describe(number, member, interval)}: {loss:.4f}; ETA {eta}", flush=True)
        losses = [loss_of(run, options.ranks) for run in runs]
        if min(losses) == math.inf:
            raise UserError(f"all members diverged in interval {number}; lower the ranges of --search")
        history.append((interval, losses))
        discard_checkpoints(options.out, number - 1, {*range(options.members)})  # nobody continues from there any more
        interval = next_interval(interval, losses, searched, options.seed, number + 1)
    best = losses.index(min(losses))
    discard_checkpoints(options.out, options.intervals - 1, {*range(options.members)} - {best})
    line = lineage([interval for interval, _ in history], best)
    print(f"\nthe best is {runs[best].directory}, whose settings were:")
    schedule = list[tuple[int, Settings]]()
    for number, (member, (interval, losses)) in enumerate(zip(line, history, strict=True)):
        begins = steps_before(config, options, number) * config.step_tokens
        schedule.append((begins, of_run_file(interval.settings[member])))
        print(f"from {begins:,} tokens: {describe(number, member, interval)}: {losses[member]:.4f}")
    if WEIGHTS in schedule[0][1]:
        print(mixtures(schedule))
    found = {
        "best": str(runs[best].directory),
        "line": line,  # the member in each interval
        "schedule": [{"tokens": tokens, **settings} for tokens, settings in schedule],
        "intervals": [{**asdict(interval), "losses": losses} for interval, losses in history],
    }
    write_json(options.json, {**provenance(words), **found})
    if options.plot:
        plot(options.plot, found, config.train.tokens)
    return 0


def checked(options: argparse.Namespace) -> tuple[Config, list[Searched]]:
    """Return the settings of every run, but for those of members and intervals, and what is searched. Raises
    UserError."""
    check_minimum(options, members=2, intervals=2, ranks=1, seed=0)
    config = resolve.load(options.run, options.overrides).config
    searched = [parse(word, config) for word in options.search]
    for number, each in enumerate(searched):
        if each.key in [other.key for other in searched[:number]] + [*map(key_of, options.overrides)]:
            raise UserError(f"{each.key} is given twice, by --search too; remove one")
    for key, why in (
        ("train.steps", "would end all intervals alike; lower train.tokens instead"),
        ("train.start_from", "is where members continue from; a population begins with new weights, so remove it"),
    ):
        if value := get_setting(config, key):
            raise UserError(f"{key} = {value} {why}")
    if not config.train.validation_samples:
        raise UserError("train.validation_samples = 0 gives no loss to compare; raise it")
    if config.batch.policy != "constant":
        policy = config.batch.policy
        raise UserError(f"batch.policy = {policy!r} has no fixed number of steps to cut into intervals; set constant")
    if (steps := config.train.tokens // config.step_tokens) < options.intervals:
        raise UserError(f"--intervals {options.intervals} are more than the {steps} steps of train.tokens; lower it")
    config = for_search(config, options.out)
    for bound in ("low", "high"):  # all checks of `megahp train`, before anything trains
        values = {each.key: each.rounded(getattr(each, bound) * np.ones(each.sources or ())) for each in searched}
        of_run = resolved(config, {**of_run_file(values), "log.name": "limits"})
        for key in (each.key for each in searched if each.key != WEIGHTS):
            if get_setting(of_run, key) != values[key]:  # a setting that is not used has its default
                raise UserError(f"--search {key} has no effect with the run's other settings; remove it")
        prepare(of_run, fit(of_run.parallel, options.ranks), options.ranks, resume=True)
    return config, searched


def parse(word: str, config: Config) -> Searched:
    """Parse section.key=LOW:HIGH. Raises UserError for what cannot be searched."""
    key, _, text = word.partition("=")
    if key not in setting_names():
        raise UserError(f"--search {word}: {key!r} is not a setting; {resolve.suggest(key, setting_names())}")
    section, name = key.split(".")
    if key != WEIGHTS and (TYPES[section][name] is not float or section not in SECTIONS):
        raise UserError(
            f"--search {word}: only fractional settings of {', '.join(SECTIONS)} and data.weights can be searched, and "
            f"{key} is none; search another"
        )
    if fixed_when(key) not in ("never", "on resume"):
        raise UserError(f"--search {word}: {key} cannot change when a run starts from a checkpoint; search another")
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"--search {word}: {text!r} is no range; {FORM}") from None
    if not 0 < low < high < math.inf:
        raise UserError(f"--search {word}: the range must ascend, and begin above 0; {FORM}")
    if high < low * FACTORS[1] / FACTORS[0]:
        raise UserError(f"--search {word}: a step, times {FACTORS[0]} or {FACTORS[1]}, would leave the range; widen it")
    if key != WEIGHTS:
        return Searched(key, low, high, None)
    if (sources := len(config.data.train)) < 2 or config.data.mixtures:
        given = f"data.train = {[*config.data.train]}, data.mixtures = {[*config.data.mixtures]}"
        raise UserError(f"--search {word} needs several sources, and mixtures that are not set: {given}")
    if not config.data.validation:
        raise UserError(f"--search {word}: mixtures need the same validation; name sets in data.validation")
    return Searched(key, low, high, sources)


def first_interval(searched: Sequence[Searched], members: int, seed: int) -> Interval:
    """Draw the settings of all members."""
    random = np.random.default_rng([seed, 0])
    return Interval([], [*range(members)], [{each.key: each.draw(random) for each in searched} for _ in range(members)])


def next_interval(
    interval: Interval, losses: list[float], searched: Sequence[Searched], seed: int, number: int
) -> Interval:
    """Decide by the losses at an interval's end how the next one, of this number, begins: the worst members, and all
    that diverged, continue from one of the best with settings near its own."""
    random, parents, settings = np.random.default_rng([seed, number]), [*range(len(losses))], [*interval.settings]
    order = sorted(parents, key=losses.__getitem__)
    count = max(1, round(SHARE * len(order)))
    best = [member for member in order[:count] if losses[member] < math.inf]
    for member in sorted(order):
        if member in order[-count:] or losses[member] == math.inf:
            parents[member] = int(random.choice(best))
            of_parent = interval.settings[parents[member]]
            settings[member] = {each.key: each.explore(np.array(of_parent[each.key]), random) for each in searched}
    return Interval(losses, parents, settings)


def agree(folder: Path, number: int, record: Mapping[str, Any]) -> None:
    """Append a line to the folder's decisions, or compare it with the one that is there. Raises UserError if they
    differ."""
    file, line = folder / "decisions.jsonl", json.dumps(without_nan(dict(record)))
    with claimed(folder / "decisions.lock", wait=True):
        lines = read_text(file, "decisions").splitlines() if file.exists() else []
        if number == len(lines):
            replace_text(file, "".join(f"{each}\n" for each in [*lines, line]))
        elif not number and lines[0] != line:
            raise UserError(f"{folder} holds a population with other settings or options; name another --out")
        elif lines[number] != line:
            why = "does not follow from the runs' losses: runs were changed since, or numpy draws otherwise"
            raise UserError(f"{file}, line {number + 1}, {why}; name another --out")


def of_member(options: argparse.Namespace, config: Config, number: int, member: int, interval: Interval) -> Config:
    """Return the config of one member's run in one interval. Raises UserError."""
    values = {**of_run_file(interval.settings[member]), "log.name": f"{number}/{member}"}
    values["train.steps"] = steps_before(config, options, number + 1)
    if number:
        values["train.start_from"] = str(options.out / f"{number - 1}/{interval.parents[member]}")
    return resolved(config, values)


def resolved(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with other values, checked anew. Raises UserError."""
    return resolve.from_dict(config_to_dict(with_values(config, values)), "population")


def steps_before(config: Config, options: argparse.Namespace, number: int) -> int:
    """Return the steps after which an interval begins."""
    return round(number * (config.train.tokens // config.step_tokens) / options.intervals)


def train_all(runs: Sequence[Config], ranks: int) -> Iterator[tuple[int, float]]:
    """Train each run that no other worker trains, and yield its number and loss; then wait until those of others have
    ended, and train what they left."""
    for wait in (False, True):
        for number, config in enumerate(runs):
            with claimed(config.directory / ".claim", wait) as is_claimed:
                if is_claimed and not is_done(config.directory):
                    yield number, loss_of(config, ranks)


def count_done(options: argparse.Namespace) -> int:
    """Return how many runs of all intervals have ended."""
    runs = itertools.product(range(options.intervals), range(options.members))
    return sum(is_done(options.out / f"{number}/{member}") for number, member in runs)


def discard_checkpoints(folder: Path, number: int, members: Iterable[int]) -> None:
    """Delete the checkpoints of some members in an interval."""
    for member in members:
        shutil.rmtree(folder / f"{number}/{member}/checkpoints", ignore_errors=True)


def lineage(intervals: Sequence[Interval], member: int) -> list[int]:
    """Return the member whose run a member's weights passed through, in each interval."""
    line = [member]
    for interval in reversed(intervals[1:]):
        line.insert(0, interval.parents[line[0]])
    return line


def describe(number: int, member: int, interval: Interval) -> str:
    """Return the name of a member's run, whom it continued from, and its settings."""
    parent = interval.parents[member]
    settings = ", ".join(
        f"{key} = {toml_value(value)}" for key, value in of_run_file(interval.settings[member]).items()
    )
    return f"{number}/{member}{'' if parent == member else f' from {number - 1}/{parent}'}: {settings}"


def mixtures(schedule: Sequence[tuple[int, Settings]]) -> str:
    """Return the weights of a schedule, [(tokens, settings)], as settings of a run file."""
    weights = [(tokens, settings[WEIGHTS]) for tokens, settings in schedule]
    changes = [step for before, step in itertools.pairwise(weights) if step[1] != before[1]]
    words = tuple(f"{tokens}:{','.join(map(str, later))}" for tokens, later in changes)
    return f"data.weights = {weights[0][1]}\ndata.mixtures = {toml_value(words)}"


def plot(file: Path, found: Mapping[str, Any], tokens: int) -> None:
    """Draw every member's losses and settings over the tokens, and the best one's line over them. Raises UserError."""
    from megahp.report.figures import PALETTE, plot_in

    intervals, edges = found["intervals"], [*(step["tokens"] for step in found["schedule"]), tokens]
    columns = {"loss": np.array([interval["losses"] for interval in intervals])}
    for key in intervals[0]["settings"][0]:
        values = np.array([[of_run_file(each)[key] for each in interval["settings"]] for interval in intervals])
        if values.ndim == 2:
            columns[key] = values
        else:
            columns |= {f"{key}[{source}]": values[:, :, source] for source in range(values.shape[2])}
    with plot_in(file, 6, 1.5 * len(columns)) as figure:
        panels = figure.subplots(len(columns), sharex=True)
        for axes, (name, values) in zip(panels, columns.items(), strict=True):
            for row in values.T:
                axes.stairs(row, edges, baseline=None, color=PALETTE["muted"], lw=0.6)
            best = values[range(len(values)), found["line"]]
            axes.stairs(best, edges, baseline=None, color=PALETTE["accent"], lw=1.8)
            axes.set(ylabel=name, yscale="linear" if name == "loss" else "log")
        panels[0].set_ylim(top=1.05 * columns["loss"][0, found["line"][0]])  # others may be far worse, or infinite
        panels[-1].set_xlabel("tokens")
