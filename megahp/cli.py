"""The `megahp` command: finds a subcommand's file in megahp/commands, and reports what goes wrong in one line."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from megahp import __version__, launch
from megahp.commands import COMMANDS, HIDDEN, LISTING, RESTARTED
from megahp.commands.output import check_outputs
from megahp.config.resolve import suggest
from megahp.errors import Fault, UserError, complain, in_one_line, is_user_error, masked
from megahp.exit_codes import FAULT, INTERRUPTED, USER_ERROR


class Parser(argparse.ArgumentParser):
    """No abbreviations: an option that is not spelled out is a mistake, not a guess. A command that is called without
    the arguments it needs prints its help."""

    def __init__(self, is_bare: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.is_bare = is_bare

    def error(self, message: str) -> NoReturn:
        if self.is_bare:
            self.print_help(sys.stderr)
            self.exit(USER_ERROR, f"\n{self.prog}: {message}\n")
        super().error(masked(message))


class LogHandler(logging.Handler):
    """Prints the package's log records to stderr as errors are. A stderr that is closed or full ends nothing.

    logging.StreamHandler would keep the stderr of its creation; training replaces it (megahp/log/streams.py).
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            complain(self.format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (megahp/exit_codes.py)."""
    if not (log := logging.getLogger("megahp")).handlers:  # by an earlier call in this process
        log.addHandler(LogHandler())
    words = sys.argv[1:] if arguments is None else list(arguments)
    command, options = parse(words)
    try:
        launch.allow_interrupts()
        check_outputs(options)
        return command.run(options, words)
    except UserError as error:
        if launch.is_local_rank0():  # what is wrong before the ranks meet, all of them find
            complain(error)
        return FAULT if error.may_pass and words[0] in RESTARTED else USER_ERROR
    except BrokenPipeError:  # of `megahp runs | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain as it exits
        return 0
    except (OSError, RecursionError, OverflowError, UnicodeError, MemoryError) as error:
        complain(in_one_line(error))  # on any rank: it may be the only one to meet it
        return FAULT if words[0] in RESTARTED and not is_user_error(error) else USER_ERROR
    except Fault as error:
        complain(error)
        return FAULT
    except KeyboardInterrupt:
        return INTERRUPTED


def parse(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the module of the command, and its options. Exits where there is no such command."""
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in (*COMMANDS, *HIDDEN)), "")
    if not name:
        parser = Parser(prog="megahp", usage="megahp COMMAND ...", epilog=f"commands:\n{LISTING}")
        parser.add_argument("--version", action="version", version=f"megahp {__version__}")
        parser.parse_known_args(words)  # --help, --version
        if not words:
            parser.print_help(sys.stderr)
            parser.exit(USER_ERROR)
        parser.error(f"{' '.join(words[:2])!r} is not a command; {suggest(words[0], COMMANDS)}")
    # only the one that is called is imported: most need no torch, whose import takes seconds
    command = import_module(f"megahp.commands.{name.replace(' ', '_').replace('-', '_')}")
    given = words[len(name.split()) :]
    parser = Parser(prog=f"megahp {name}", description=command.__doc__, is_bare=not given)
    command.add_arguments(parser)
    options, more = parser.parse_known_args(given)
    if more and not hasattr(options, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    vars(options).setdefault("overrides", []).extend(more)  # settings may stand anywhere, between options too
    return command, options
