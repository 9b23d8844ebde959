"""Slurm jobs: render a script of slurm/ for a run, submit it, and query the queue."""

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import megahp
from megahp.config import Config
from megahp.errors import UserError, masked
from megahp.files import read_text

BAD_NODES = Path("bad-nodes.txt")
OWNER = "megahp "  # begins the comment of our jobs; the run directory follows
COLUMNS = "%i|%T|%M|%l|%D|%R|%k"  # of squeue; the comment, which may contain |, comes last
RESERVED = ("nodes", "ntasks", "ntasks-per-node", "array", "comment", "output")  # options that megahp sets


@dataclass(frozen=True)
class Job:
    """A script of slurm/, and the resources and options to request for it."""

    script: str
    nodes: int
    ranks_per_node: int = 1
    tasks_per_node: int = 1
    time: str | None = None  # D-HH:MM:SS
    partition: str | None = None
    account: str | None = None
    exclude: Path = BAD_NODES
    sbatch: str = ""  # more options, as in a shell
    reserved: tuple[str, ...] = RESERVED  # options that may not be among them
    without: Collection[str] = ()  # options to remove from the script, because a site does not allow them
    variables: str = ""  # shell assignments that configure the script

    def render(self, config: Config, words: Sequence[str], **more: str) -> str:
        """Return the script with our sbatch options (those of the job, and `more`) set among its own.

        Variables, and the words that are its arguments, follow below them. Raises UserError.
        """
        text = (folder() / self.script).read_text().splitlines()
        if shown := next((masked(word) for word in words if masked(word) != word), ""):
            raise UserError(
                f"{shown} holds a password, which all users of the cluster could see; write it in the run file"
            )
        options = {**self._options(config), **more}
        existing = [option_of(line) for line in text if line.startswith("#SBATCH")]
        if unknown := set(self.without) - set(existing):
            raise UserError(f"--without {min(unknown)} is not an option of {self.script}; it has {', '.join(existing)}")
        text = [line for line in text if not line.startswith("#SBATCH") or option_of(line) not in self.without]
        lines_of = {option_of(line): index for index, line in enumerate(text) if line.startswith("#SBATCH")}
        for option, value in options.items():
            if not value.isprintable() or '"' in value:  # a second line of it would be a command of the script
                raise UserError(f"--{option}={value!r} cannot be written in an sbatch script; rename what it names")
            quoted = f'"{value}"' if re.search(r"\s", value) else value
            line = f"#SBATCH --{option}={quoted}" if value else f"#SBATCH --{option}"
            if option in lines_of:
                text[lines_of[option]] = line
            else:
                lines_of[option] = max(lines_of.values()) + 1
                text.insert(lines_of[option], line)
        signals = f"--signal={options['signal']}" if "signal" in options else "\n".join(text)
        if options.get("time"):
            _refuse_short("--time", options["time"], signals)
        else:
            _refuse_short("the partition's time limit", limit_of(options.get("partition", "")), signals)
        end = max(lines_of.values()) + 1  # below the options: sbatch ignores any that follow a command
        lines = [
            f"export MEGAHP_SLURM={shlex.quote(str(folder()))} RANKS_PER_NODE={self.ranks_per_node}",
            f"logs={shlex.quote(f'{config.directory}/slurm')} exclude={shlex.quote(str(self.exclude))}",
            *([self.variables] if self.variables else []),
            f"set -- {shlex.join(words)}",
        ]
        return "\n".join([*text[:end], "", *lines, *text[end:], ""])

    def _options(self, config: Config) -> dict[str, str]:
        """Return name without dashes -> value, empty for an option that takes none. Raises UserError."""
        bad_nodes = read_text(self.exclude, "--exclude", "name a file").split() if self.exclude.exists() else []
        given = {
            "job-name": re.sub(r"[^\w.+-]", "-", config.log.name),
            "comment": f"{OWNER}{config.directory.resolve()}",
            "output": f"{config.directory}/slurm/%j.out",
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.tasks_per_node),
            "gpus-per-node": str(self.ranks_per_node) if config.train.device != "cpu" else None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "exclude": str(self.exclude.absolute()) if bad_nodes else None,  # sbatch refuses an empty file
        }
        try:
            words = shlex.split(self.sbatch)
        except ValueError as error:
            raise UserError(f"--sbatch {self.sbatch!r} cannot be read ({error}); quote it as in a shell") from None
        more = {}
        for word in words:
            if not word.startswith("--"):
                raise UserError(f"--sbatch {self.sbatch!r}: {word!r} is not a long option; write --name=value")
            name, _, value = word.removeprefix("--").partition("=")
            if name in self.reserved:
                raise UserError(f"--sbatch {word}: megahp sets --{name} itself, from its own options; remove it")
            more[name] = value
        if any(name.startswith(("gpus", "gres")) for name in more):  # two requests for GPUs would conflict
            del given["gpus-per-node"]
        return {name: value for name, value in given.items() if value is not None} | more


def limit_of(partition: str) -> str:
    """Return the time limit that a partition, by default the default one, gives a job that requests none.

    "" if Slurm cannot be queried.
    """
    command = ["sinfo", "--noheader", "--format=%P|%L|%l", *([f"--partition={partition}"] if partition else [])]
    try:
        printed = _slurm(command)
    except UserError:
        return ""
    for line in printed.splitlines():
        if line.count("|") != 2:  # a message of the site
            continue
        name, default, maximum = line.split("|")
        if partition or name.endswith("*"):
            return maximum if default == "n/a" else default
    return ""


def _refuse_short(what: str, time: str, signals: str) -> None:
    """Raise UserError if a time limit, "" for none, leaves no time before the notice that --signal requests.

    what: names the limit in the error. signals: text that contains --signal=...@SECONDS.
    """
    notice = re.search(r"--signal=\S*@(\d+)", signals)
    if notice and time and 0 < (seconds := seconds_of(time)) <= int(notice[1]):
        why = f"{what}, {time}, ends {seconds:,} s after the start, but the job is told to stop {notice[1]} s before"
        raise UserError(f"{why}: nothing would be trained; give a longer --time, or --sbatch=--signal=USR1@SECONDS")


def seconds_of(time: str) -> int:
    """Return the seconds of a Slurm time limit: M, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS; 0 for none.

    Raises UserError.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found and time.lower() not in ("infinite", "unlimited", "0"):
        raise UserError(f"--time {time!r} is not a Slurm time; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = found.groups() if found else (None,)
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def option_of(line: str) -> str:
    """Return the name of the option that a line of #SBATCH sets."""
    return line.split()[1].removeprefix("--").partition("=")[0]


def folder() -> Path:
    """Return the folder of the scripts: MEGAHP_SLURM, else that of the package. Raises UserError."""
    path = Path(os.environ.get("MEGAHP_SLURM", Path(megahp.__file__).parent / "slurm")).resolve()
    if not (path / "environment.sh").exists():
        raise UserError(f"MEGAHP_SLURM = {path} has no environment.sh; name a copy of megahp's slurm/, or unset it")
    return path


class Queued(NamedTuple):
    """A job in Slurm's queue."""

    id: str
    state: str  # as in squeue, in lower case: pending, running, ...
    words: str  # its times and nodes, as text

    def __str__(self) -> str:
        return f"job {self.id}: {self.state}, {self.words}"


def jobs() -> dict[str, list[Queued]]:
    """Return the user's jobs by run directory. Raises UserError if Slurm cannot be queried."""
    jobs_of: dict[str, list[Queued]] = {}
    for line in _slurm(["squeue", "--me", "-h", "-o", COLUMNS], remedy="try again when Slurm answers").splitlines():
        job, state, used, limit, nodes, where, comment = (line.split("|", 6) + [""] * 6)[:7]
        if comment.startswith(OWNER):
            queued = Queued(job, state.lower(), f"{used} of {limit}, {nodes} nodes {where}")
            jobs_of.setdefault(comment.removeprefix(OWNER), []).append(queued)
    return jobs_of


def submit(script: str) -> str:
    """Submit a script, after a test by Slurm whether it could run at all. Return the job's id. Raises UserError."""
    _slurm(["sbatch", "--test-only"], script)
    printed = _slurm(["sbatch", "--parsable"], script)
    # 12, or 12;cluster, possibly among messages of the site
    if match := re.search(r"^(\d+)(;\S*)?$", printed, re.MULTILINE):
        return match[1]
    raise UserError(f"sbatch printed {printed!r} instead of a job id; check with squeue whether there is a job")


def _slurm(command: Sequence[str], text: str = "", remedy: str = "change the options it names") -> str:
    """Return the output of a Slurm command. Raises UserError with its error message."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed on this machine; use a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}; {remedy}")
    return done.stdout.strip()
