"""Train the run of a TOML file, on the ranks of a launcher or on ranks started here.

    megahp train run.toml                               on one rank
    megahp train run.toml optimizer.lr=2e-3 --ranks 2   with another setting, on two
    megahp train run.toml --ranks 2 --resume auto       resume from the newest checkpoint

The file names tokenized text, as `megahp preprocess` writes it, and the settings that differ from their defaults:

    [data]
    train = ["data/mine"]
    tokenizer = "data/mine.model"
    [train]
    tokens = 100_000_000

`megahp recipe` writes one from a size or a budget; `megahp config run.toml` prints every setting.
"""

import os
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp import launch
from megahp.commands.arguments import add_run_file, must_spawn
from megahp.config import Config, resolve
from megahp.errors import Fault, UserError, complain
from megahp.exit_codes import FAULT, FINISHED, STOPPED, USER_ERROR
from megahp.faults.notice import exit_on_signals
from megahp.log.streams import tolerate_closed_streams
from megahp.parallel.device import keep_heap, may_use_cuda
from megahp.parallel.layout import Layout, fit


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    resume = "resume from the newest checkpoint; without one auto = start anew, required = fail"
    parser.add_argument("--resume", choices=("auto", "required"), help=resume)
    ignore = "on CUDA, start though the predicted peak exceeds the device's memory"
    parser.add_argument("--ignore-memory", action="store_true", help=ignore)
    parser.add_argument("--restarts", type=int, metavar="N", help="restart the ranks after a fault, at most N times")


def run(options: Namespace, words: Sequence[str]) -> int:
    """Check the settings; start ranks, or train in this process as one rank. torch is imported only then."""
    tolerate_closed_streams()  # first: the next pipe opened must not get the number of a closed stdout or stderr
    exit_on_signals()
    config = resolve.load(options.run_file, options.overrides).config
    if options.resume:
        refuse_elsewhere(config, options.run_file)
    world = launch.world()
    ranks = world.size if options.ranks is None else options.ranks
    layout = fit(config.parallel, ranks)

    starting = must_spawn(options.ranks, world.size)
    if config.compute.keep_heap and not starting and not may_use_cuda(config):
        keep_heap()  # before torch is imported

    from megahp.train.prepare import prepare, refuse_without_checkpoint

    # A process that trains checks its machine and, as rank 0, warns. One that only starts ranks does neither, and need
    # not wait for torch's import: they repeat the checks.
    warn = None if starting or options.restarts is not None or world.rank else complain
    local_ranks = 0 if starting else options.ranks or world.local_size
    config = prepare(config, layout, local_ranks, options.resume is not None, warn)
    if options.resume == "required":
        refuse_without_checkpoint(config)
    if local_ranks and not options.ignore_memory:
        check_device_memory(config, ranks, world)
    if options.restarts is not None:
        return train_with_restarts(options, config, world)
    if starting:
        return launch.spawn(words, ranks, at_notice=STOPPED)
    return train_rank(config, world, layout, options.resume is not None)


def check_device_memory(config: Config, ranks: int, world: launch.World) -> None:
    """Print the predicted peak beside this device's memory, on CUDA. Raises UserError where a step cannot fit."""
    from megahp.parallel.device import uses_cuda

    if not uses_cuda(config) or config.parallel.engine != "megahp":  # other engines are not planned
        return
    import torch

    from megahp.plan.guard import check_fits, machine_here

    device = torch.cuda.get_device_properties(0)  # others of a machine are like it
    line = check_fits(config, ranks, machine_here(device.name, device.total_memory))
    if world.rank == 0:
        print(line)


def refuse_elsewhere(config: Config, run_file: Path) -> None:
    """Raise UserError when a run is to resume that is not in the working folder, but where the run file is, or above:
    the paths of a run file are relative to the working folder, and a second run would begin here."""
    if config.checkpoint.remote or (config.directory / "checkpoints").exists():
        return
    for folder in run_file.resolve().parents:
        if (folder / config.directory / "checkpoints").exists():
            where = f"{config.directory} is not in the working folder {os.getcwd()}, but in {folder}"
            raise UserError(f"{where}; resume from there, or choose another log.name for a new run")


def train_with_restarts(options: Namespace, config: Config, world: launch.World) -> int:
    """Start ranks, and restart them after a fault. Returns the exit code of the last start."""
    from megahp.faults.relaunch import until_done

    if not options.ranks or world.size > 1 or options.restarts < 0:
        raise UserError(
            f"--restarts {options.restarts} must be at least 0, and needs --ranks N; under srun and torchrun the "
            "launcher restarts the job"
        )
    arguments = ["train", str(options.run_file), *options.overrides, *["--ignore-memory"] * options.ignore_memory]
    minutes, started = config.resilience.stop_after, time.monotonic()

    def start(resume: bool) -> int:
        words = ["--resume", "auto"] if resume or options.resume else []
        if minutes:  # stop_after limits all starts together
            words.append(f"resilience.stop_after={max(minutes - (time.monotonic() - started) / 60, 0.001)!r}")
        return launch.spawn([*arguments, *words], options.ranks, at_notice=STOPPED)

    return until_done(start, config.directory, options.restarts)


def report_run(directory: Path) -> None:
    """Print a finished run's summary, and write its report; or say why not: the run has finished all the same."""
    from megahp.report.page import read_runs, text_summary, write_report

    try:
        runs = read_runs([directory])
        print(text_summary(runs[0]))
        print(f"report: {write_report(runs, directory / 'report.html')}")
    except (UserError, OSError) as error:
        print(f"no report: {error}")


def train_rank(config: Config, world: launch.World, layout: Layout, resume: bool) -> int:
    """Train as one rank, and exit without tearing down the process group (launch.leave)."""
    import torch

    from megahp.faults.crash import report_crash
    from megahp.faults.watchdog import collective_timeout
    from megahp.parallel.device import uses_cuda
    from megahp.train.loop import train

    store = launch.join(world, uses_cuda(config), collective_timeout(config.resilience.hang_after))
    if world.size == 1 and not uses_cuda(config) and (threads := torch.get_num_threads()) > 1:
        print(f"one rank with {threads} threads", flush=True)
    try:
        code = FINISHED if train(config, world, store, layout, resume) else STOPPED
        if world.rank == 0 and code == FINISHED:
            report_run(config.directory)
    except UserError as error:
        code = FAULT if error.may_pass else USER_ERROR
        if launch.claim_report(store, "user error"):
            complain(error)
        launch.keep_store_alive(world)
    except Exception as error:
        # A rank that exits for a user error breaks the collectives of the others; only the first cause is reported.
        code = USER_ERROR if launch.was_reported(store, "user error") else FAULT
        if code == FAULT:
            report_crash(config.directory, world.rank, traceback.format_exc())
            if launch.is_lost_connection(error):
                complain(Fault(f"rank {world.rank} lost its connection to a peer; exiting"))
            elif launch.claim_report(store, "fault"):
                complain(error) if isinstance(error, Fault) else traceback.print_exc()
    launch.leave(code)
    return code
