"""What the studies of known models share: corpora, chains of runs, paired differences.

A study is a list of runs, some of which start from others. Each that is missing in its results.jsonl is trained on one
thread, after the run it starts from, and becomes a line there. Interrupted, a study resumes.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megahp.diagnose.statistics import half_interval

HERE = Path(__file__).parent
DATA = Path("data/studies")
HELD_OUT = 16  # every sixteenth document is
STEP = 1024  # tokens of a step, in every study here
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of a study.

    name: of its line, and of its directory under the study's. settings: over those of its run file. parent: the run
    whose newest checkpoint it starts from. extend: the tokenizer file and options of `megahp extend-vocabulary`, which
    make the parent's model into that which this run begins with; its progress begins at 0 then. file: its run file, by
    default the study's run.toml.
    """

    name: str
    settings: Sequence[str]
    parent: str = ""
    extend: Sequence[str] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Study:
    """Where a study's runs and results are, and what is measured of each run beside its losses.

    At another scale, or with overrides of its run file, runs and results are others than the committed ones.
    """

    folder: Path  # of the script
    scale: float = 1  # of every number of tokens
    measure: Callable[[Path], Line] | None = None
    overrides: Sequence[str] = ()
    only_show: bool = False

    @property
    def runs(self) -> Path:
        scale = f"-{self.scale:g}" if self.scale != 1 else ""
        overrides = f"-{zlib.crc32(' '.join(self.overrides).encode()):08x}" if self.overrides else ""
        return Path("runs") / (self.folder.name + scale + overrides)

    @property
    def results(self) -> Path:
        return (self.folder if self.is_committed else self.runs) / "results.jsonl"

    @property
    def figure(self) -> Path:
        return Path(f"docs/figures/{self.folder.name}.svg") if self.is_committed else self.runs / "figure.svg"

    @property
    def is_committed(self) -> bool:
        return self.scale == 1 and not self.overrides

    def tokens(self, millions: float) -> int:
        """Return whole steps of tokens, so that a run ends where the next begins."""
        return round(self.scale * millions * 1e6 / STEP) * STEP

    def read(self) -> dict[str, Line]:
        """Return the line of each run that has one."""
        return {line["run"]: line for line in read_lines(self.results)}


def read_lines(file: Path) -> list[Line]:
    """Return the lines of JSON of a file, none if it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main(
    script: str,
    description: str | None,
    prepare: Callable[[], object],
    runs: Callable[[Study, list[int]], list[Run]],
    show: Callable[[Study, dict[str, Line], list[int]], None],
    measure: Callable[[Path], Line] | None = None,
) -> None:
    """Run a study's command: train what is missing, unless only shown, and show the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at once, of one thread each")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--scale", type=float, default=1, help="of all tokens; results other than those of 1 are below runs/")
    add("--only-show", action="store_true", help="train nothing")
    options = parser.parse_args()
    study = Study(Path(script).parent, options.scale, measure, only_show=options.only_show)
    wanted = runs(study, options.seeds)
    if not options.only_show:
        prepare()
        train_all(study, wanted, options.jobs)
    lines = study.read()
    if missing := [run.name for run in wanted if run.name not in lines]:
        sys.exit(f"{study.results} lacks {len(missing)} runs, such as {missing[0]}; repeat without --only-show")
    show(study, {run.name: lines[run.name] for run in wanted}, options.seeds)


def run_megahp(*words: object) -> None:
    """Run a command of megahp on one thread; print its output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "megahp", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nmegahp {' '.join(map(str, words))} failed")


def english() -> list[str]:
    """Return the scenes of Shakespeare, 1.1 MB."""
    lines = (HERE / "batch-growth/shakespeare.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def code() -> list[str]:
    """Return the modules of Python's standard library, 11 MB, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = (file for file in sorted(library.rglob("*.py")) if not outside & set(file.relative_to(library).parts))
    return [text for file in files if (text := file.read_text(errors="ignore")).strip()]


def prepare(name: str, documents: Callable[[], Iterable[str]], tokenizer: str = "bytes") -> tuple[Path, Path]:
    """Tokenize documents, once: every sixteenth is held out. Return the prefixes of both parts."""
    prefixes = DATA / name, DATA / f"{name}-held-out"
    for prefix, chosen in zip(prefixes, (False, True), strict=True):
        if prefix.with_suffix(".idx").exists():
            continue
        DATA.mkdir(parents=True, exist_ok=True)
        with open(f"{prefix}.jsonl", "w") as file:
            for number, text in enumerate(documents()):
                if (number % HELD_OUT == HELD_OUT - 1) == chosen:
                    file.write(json.dumps({"text": text}) + "\n")
        run_megahp("preprocess", "--input", f"{prefix}.jsonl", "--tokenizer", tokenizer, "--output", prefix)
    return prefixes


def held_out_code(length: int, count: int) -> Any:
    """Return the first windows of held-out code, int64 [count, length + 1]: of each document one in eight."""
    return windows(prepare("code", code)[1], length, 8)[:count]


def windows(prefix: Path, length: int, every: int) -> Any:
    """Return every n-th window of each document of a corpus, int64 [windows, length + 1]."""
    import torch

    from megahp.data.indexed import IndexedDataset

    documents = IndexedDataset(str(prefix))
    lengths = documents.document_tokens(np.arange(documents.documents))
    found = [
        documents.tokens(document, start, start + length + 1)
        for document in np.flatnonzero(lengths > length).tolist()
        for start in range(0, int(lengths[document]) - length, every * length)
    ]
    return torch.from_numpy(np.stack(found).astype(np.int64))


def mean_loss(model: Any, rows: Any, count: int) -> float:
    """Return a model's mean loss of windows, int64 [windows, length + 1], `count` at a time."""
    import torch

    with torch.no_grad():
        return torch.cat([model(part[:, :-1], part[:, 1:]) for part in rows.split(count)]).double().mean().item()


def train_all(study: Study, runs: Sequence[Run], jobs: int) -> None:
    """Train what is missing, as many runs at once as there are jobs. A run comes after its parent in `runs`."""
    lines = study.read()
    missing = {run.name for run in runs if run.name not in lines}
    for run in reversed(runs):  # a child's parent too, if its checkpoint has been deleted
        if run.name in missing and run.parent and not (study.runs / run.parent / "checkpoints").exists():
            missing.add(run.parent)
    waiting = [run for run in runs if run.name in missing]
    began, total = time.monotonic(), len(waiting)
    context, training = multiprocessing.get_context("spawn"), dict[Future[Line], str]()
    study.results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, context, begin_worker) as pool, contextlib.ExitStack() as at_end:
        at_end.callback(pool.shutdown, cancel_futures=True)  # after an error, what waits would be trained, and lost
        while waiting or training:
            for run in [run for run in waiting if run.parent not in missing]:
                training[pool.submit(train, study, run)] = run.name
                waiting.remove(run)
            for future in wait(training, return_when=FIRST_COMPLETED).done:
                name, line = training.pop(future), future.result()
                missing.remove(name)
                if name not in lines:
                    with open(study.results, "a") as out:
                        out.write(json.dumps(line) + "\n")
                eta = (time.monotonic() - began) / (total - len(missing)) * len(missing)
                print(f"{name}: {line['loss']:.4f}; {len(missing)} runs left, {eta / 60:.0f} min", flush=True)


@functools.cache
def store() -> Any:
    """Join this process's own world, of one rank, once."""
    from megahp import launch

    return launch.join(launch.World(), False)


def begin_worker() -> None:
    import torch

    from megahp import launch

    launch.die_with_parent(signal.SIGKILL)  # a run that SIGTERM stops would be followed by the pool's next one
    torch.set_num_threads(1)
    store()


def train(study: Study, run: Run) -> Line:
    """Train a run in this process, and return its line."""
    from megahp import launch
    from megahp.config import resolve
    from megahp.log.metrics import newest_metrics
    from megahp.parallel.layout import fit
    from megahp.train.loop import train as train_run
    from megahp.train.prepare import prepare as prepare_run

    began = time.monotonic()
    directory, parent = study.runs / run.name, study.runs / run.parent
    words = [*run.settings, f"log.root={study.runs}", f"log.name={run.name}"]
    if run.extend:
        wider = study.runs / f"{run.name}-wider"
        if not wider.exists():
            run_megahp("extend-vocabulary", parent, wider, "--tokenizer", *run.extend)
        parent = wider
    if run.parent:
        words.append(f"train.start_from={parent}")
    config = resolve.load(run.file or study.folder / "run.toml", words).config
    layout = fit(config.parallel, 1)
    config = prepare_run(config, layout, 1, resume=True)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "train.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if not train_run(config, launch.World(), store(), layout, True):
            raise RuntimeError(f"{run.name} was stopped; the same command resumes it")
        measured = study.measure(directory) if study.measure else {}
    last = next(iter(newest_metrics(directory)))
    line = {"run": run.name, "loss": last["validation_loss"], "losses": last.get("validation_losses", {})}
    return line | measured | {"tokens": last["tokens"], "seconds": round(time.monotonic() - began, 1)}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))


def mean_and_interval(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean with half of its 95 % interval, to print."""
    half = half_interval(np.asarray(values))
    return f"{np.mean(values):.{digits}f}" + ("" if np.isnan(half) else f" +- {half:.{digits}f}")
