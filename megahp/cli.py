"""The `megahp` command."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahp import commands, config, launch
from megahp.commands.arguments import add_run_file
from megahp.config import Config, resolve
from megahp.errors import Fault, UserError
from megahp.exit_codes import FAULT, FINISHED, INTERRUPTED, STOPPED, USER_ERROR
from megahp.parallel.layout import Layout, fit

SHOWN = 20  # differences between layouts, the first parameters first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for a user's mistake, told in one line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options, more = parser.parse_known_args(words)  # settings may stand anywhere, between options too
    if more and not hasattr(options, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if more:
            options.overrides += more
        return options.command(options, words)
    except UserError as error:
        if launch.is_first_here():  # what is found before the ranks meet, all of them find
            _complain(error)
        return USER_ERROR
    except Fault as error:
        _complain(error)
        return FAULT
    except KeyboardInterrupt:
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """No abbreviations: an option that is not spelled out is a mistake, not a guess."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megahp", description="Pretrain language models that set their own hyperparameters.")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = parsers.add_parser("train", help="train the run of a TOML file")
    add_run_file(train)
    train.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    train.add_argument("--resume", choices=("auto",), help="go on from the newest checkpoint, if there is one")
    train.add_argument(
        "--restarts", type=int, metavar="N", help="after a fault start the ranks again, up to so many times"
    )
    train.set_defaults(command=_train)

    show = parsers.add_parser("config", help="print every setting and where its value comes from")
    add_run_file(show)
    show.set_defaults(command=_config)

    verify = parsers.add_parser("verify-layout", help="check that a run's layout trains the same model as one rank")
    add_run_file(verify)
    verify.add_argument("--ranks", type=int, required=True, metavar="N", help="start N ranks on this machine")
    verify.set_defaults(command=_verify_layout)

    sample = parsers.add_parser("sample", help="generate text from a run's newest checkpoint")
    sample.add_argument("run", type=Path, metavar="RUN", help="run directory")
    sample.add_argument("--prompt", default="", help="text to go on from")
    sample.add_argument("--tokens", type=int, default=200, help="tokens to generate (default 200)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 = the likeliest token (default 0.8)")
    sample.add_argument(
        "--top-k", type=int, default=50, help="choose among so many likeliest tokens; 0 = all (default 50)"
    )
    sample.add_argument("--seed", type=int, default=1, help="of the choices (default 1)")
    sample.add_argument("--save", action="store_true", help="keep it in the run directory, for the report")
    sample.set_defaults(command=_sample)

    replay = parsers.add_parser("replay", help="decide a run's batch changes again from its log, and compare")
    replay.add_argument("run", type=Path, metavar="RUN", help="run directory")
    replay.set_defaults(command=_replay)

    report = parsers.add_parser("report", help="write report.html of one run, or of several overlaid")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first RUN)")
    report.set_defaults(command=_report)

    commands.add_to(parsers)
    return parser


def _train(options: argparse.Namespace, words: Sequence[str]) -> int:
    settings = resolve.load(options.run_file, options.overrides).config
    place = launch.world()
    ranks = place.size if options.ranks is None else options.ranks
    layout = fit(settings.parallel, ranks)

    from megahp.train.prepare import prepare

    if options.ranks and place.size not in (1, options.ranks):
        raise UserError(f"--ranks {options.ranks}, but the launcher started {place.size}; leave --ranks out")
    settings = prepare(settings, layout, options.ranks or place.local_size, options.resume == "auto")
    if options.restarts is not None:
        return _train_again_and_again(options, settings, place)
    if ranks > place.size:
        return launch.spawn(words, ranks)
    return _train_rank(settings, place, layout, options.resume == "auto")


def _train_again_and_again(options: argparse.Namespace, settings: Config, place: launch.World) -> int:
    """Start ranks, and after a fault again."""
    from megahp.faults.relaunch import until_done

    if not options.ranks or place.size > 1 or options.restarts < 0:
        raise UserError(
            f"--restarts {options.restarts} goes with --ranks N, and is at least 0; under srun and torchrun the job "
            "is started again by whatever started it"
        )
    arguments = ["train", str(options.run_file), *options.overrides]
    minutes, began = settings.resilience.stop_after, time.monotonic()

    def start(resume: bool) -> int:
        words = ["--resume", "auto"] if resume or options.resume else []
        if minutes:  # what is left of them
            words.append(f"resilience.stop_after={max(minutes - (time.monotonic() - began) / 60, 0.001)!r}")
        return launch.spawn([*arguments, *words], options.ranks)

    return until_done(start, settings.directory, options.restarts)


def _train_rank(settings: Config, place: launch.World, layout: Layout, resume: bool) -> int:
    """Train as one rank, and leave without tearing the process group down (launch.leave)."""
    from megahp.faults.crash import report_crash
    from megahp.faults.watchdog import patience
    from megahp.parallel.device import cuda_wanted
    from megahp.train.loop import train

    code = FINISHED
    store = launch.join(place, cuda_wanted(settings), patience(settings.resilience.hang_after))
    try:
        code = FINISHED if train(settings, place, store, layout, resume) else STOPPED
        if place.rank == 0 and code == FINISHED:
            _finish(settings.directory)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except UserError as error:
        code = USER_ERROR
        if launch.is_first_to_tell(store, "user error"):
            _complain(error)
        launch.outlast_questions(place)
    except Exception as error:
        code = USER_ERROR if launch.is_told(store, "user error") else FAULT
        if code == FAULT:
            report_crash(settings.directory, place.rank, traceback.format_exc())
            if launch.is_lost_connection(error):
                _complain(Fault(f"rank {place.rank} has lost its connection to another, and ends too"))
            elif launch.is_first_to_tell(store, "fault"):
                _complain(error) if isinstance(error, Fault) else traceback.print_exc()
    launch.leave(code)
    return code


def _finish(directory: Path) -> None:
    """The report, and where it is. Where it cannot be drawn the run is still a finished one."""
    from megahp.report.page import text_summary, write_report

    print(text_summary(directory))
    try:
        print(f"report: {write_report([directory], directory / 'report.html')}")
    except UserError as error:
        print(f"no report: {error}")


def _config(options: argparse.Namespace, words: Sequence[str]) -> int:
    resolved = resolve.load(options.run_file, options.overrides)
    print(config.to_toml(resolved.config, resolved.origins), end="")
    return 0


def _verify_layout(options: argparse.Namespace, words: Sequence[str]) -> int:
    from megahp.diagnose.verify import verify

    settings = resolve.load(options.run_file, options.overrides).config
    found = verify(settings, options.ranks)
    for difference in found[:SHOWN]:
        print(difference)
    verdict = f"{len(found)} differences" if found else "the same model: loss, gradients, norms and weights agree"
    print(f"{verdict}, on {options.ranks} ranks and on one")
    return 1 if found else 0


def _sample(options: argparse.Namespace, words: Sequence[str]) -> int:
    from megahp.evaluate.sample import generate

    text = generate(options.run, options.prompt, options.tokens, options.temperature, options.top_k, options.seed)
    print(text)
    if options.save:
        (options.run / "sample.txt").write_text(text, encoding="utf-8")
    return 0


def _replay(options: argparse.Namespace, words: Sequence[str]) -> int:
    from megahp.log.replay import replay

    replayed = replay(options.run)
    for step, change in replayed.changes:
        print(f"step {step:,}: {change.reason}")
    for difference in replayed.differences:
        print(f"not as logged: {difference}", file=sys.stderr)
    if not replayed.differences:
        print(f"{len(replayed.changes)} changes of the global batch, each as logged")
    return 1 if replayed.differences else 0


def _report(options: argparse.Namespace, words: Sequence[str]) -> int:
    from megahp.report.page import write_report

    print(f"report: {write_report(options.runs, options.out or options.runs[0] / 'report.html')}")
    return 0


def _complain(error: Exception) -> None:
    print(f"megahp: {error}", file=sys.stderr)
