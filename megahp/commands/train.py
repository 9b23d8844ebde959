"""Train the run of a TOML file, on the ranks a launcher has started or on ranks of its own.

    megahp train run.toml                               on one rank
    megahp train run.toml optimizer.lr=2e-3 --ranks 2   with another setting, on two
    megahp train run.toml --ranks 2 --resume auto       go on from the newest checkpoint

The file names tokenized text, as `megahp preprocess` writes it, and what is not to be as by default:

    [data]
    train = ["data/mine"]
    tokenizer = "data/mine.model"
    [train]
    tokens = 100_000_000

`megahp recipe` writes one from a size or a budget; `megahp config run.toml` prints every setting.
"""

import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp import launch
from megahp.commands.arguments import add_run_file, must_spawn
from megahp.config import Config, resolve
from megahp.errors import Fault, UserError, complain
from megahp.exit_codes import FAULT, FINISHED, STOPPED, USER_ERROR
from megahp.faults.notice import exit_on_signals
from megahp.log.streams import outlive_streams
from megahp.parallel.layout import Layout, fit


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    load_state = "go on from the newest checkpoint: auto = if there is one, else begin; required = or refuse"
    parser.add_argument("--resume", choices=("auto", "required"), help=load_state)
    again = "after a fault start the ranks again, up to so many times"
    parser.add_argument("--restarts", type=int, metavar="N", help=again)


def run(options: Namespace, words: Sequence[str]) -> int:
    """Check, then start ranks or be one. What needs torch is imported once the settings are known to be right."""
    outlive_streams()  # first: a pipe must not become a stream that was closed
    exit_on_signals()
    config = resolve.load(options.run_file, options.overrides).config
    place = launch.world()
    ranks = place.size if options.ranks is None else options.ranks
    layout = fit(config.parallel, ranks)

    from megahp.train.prepare import prepare, refuse_without_checkpoint

    starting = must_spawn(options.ranks, place.size)
    warn = None if starting or options.restarts is not None or place.rank else complain  # once, by the first rank
    config = prepare(config, layout, options.ranks or place.local_size, options.resume is not None, warn)
    if options.resume == "required":
        refuse_without_checkpoint(config)
    if options.restarts is not None:
        return train_again_and_again(options, config, place)
    if starting:
        return launch.spawn(words, ranks, at_notice=STOPPED)
    return train_rank(config, place, layout, options.resume is not None)


def train_again_and_again(options: Namespace, config: Config, place: launch.World) -> int:
    """Start ranks, and after a fault again."""
    from megahp.faults.relaunch import until_done

    if not options.ranks or place.size > 1 or options.restarts < 0:
        wanted = f"--restarts {options.restarts} goes with --ranks N, and is at least 0"
        raise UserError(f"{wanted}; under srun and torchrun the job is started again by whatever started it")
    arguments = ["train", str(options.run_file), *options.overrides]
    minutes, began = config.resilience.stop_after, time.monotonic()

    def start(resume: bool) -> int:
        words = ["--resume", "auto"] if resume or options.resume else []
        if minutes:  # what is left of them
            words.append(f"resilience.stop_after={max(minutes - (time.monotonic() - began) / 60, 0.001)!r}")
        return launch.spawn([*arguments, *words], options.ranks, at_notice=STOPPED)

    return until_done(start, config.directory, options.restarts)


def train_rank(config: Config, place: launch.World, layout: Layout, resume: bool) -> int:
    """Train as one rank, and leave without tearing the process group down (launch.leave)."""
    from megahp.faults.crash import report_crash
    from megahp.faults.watchdog import collective_timeout
    from megahp.parallel.device import uses_cuda
    from megahp.train.loop import train

    store = launch.join(place, uses_cuda(config), collective_timeout(config.resilience.hang_after))
    try:
        code = FINISHED if train(config, place, store, layout, resume) else STOPPED
        if place.rank == 0 and code == FINISHED:
            from megahp.report.page import read_runs, text_summary, write_report

            try:
                runs = read_runs([config.directory])
                print(text_summary(runs[0]))
                print(f"report: {write_report(runs, config.directory / 'report.html')}")
            except (UserError, OSError) as error:  # where nothing can be told of it the run is still a finished one
                print(f"no report: {error}")
    except UserError as error:
        code = FAULT if error.may_pass else USER_ERROR
        if launch.is_first_to_report(store, "user error"):
            complain(error)
        launch.keep_store_alive(place)
    except Exception as error:
        code = USER_ERROR if launch.is_reported(store, "user error") else FAULT
        if code == FAULT:
            report_crash(config.directory, place.rank, traceback.format_exc())
            if launch.is_lost_connection(error):
                complain(Fault(f"rank {place.rank} has lost its connection to another, and ends too"))
            elif launch.is_first_to_report(store, "fault"):
                complain(error) if isinstance(error, Fault) else traceback.print_exc()
    launch.leave(code)
    return code
