"""Jobs of Slurm's: a script of slurm/ made one run's, and submitted."""

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
OWNER = "megahp "  # begins the comment of a job of ours; the run directory follows
COLUMNS = "%i|%T|%M|%l|%D|%R|%k"  # of squeue, the comment last
OWN = ("nodes", "ntasks", "ntasks-per-node", "array", "comment", "output")  # options that are ours to set


@dataclass(frozen=True)
class Job:
    """A script of slurm/, and what is asked of Slurm for it."""

    script: str
    nodes: int
    ranks_per_node: int = 1
    tasks_per_node: int = 1
    time: str | None = None  # D-HH:MM:SS
    partition: str | None = None
    account: str | None = None
    exclude: Path = BAD_NODES
    sbatch: str = ""  # more options
    own: tuple[str, ...] = OWN  # those that may not be among them
    without: Collection[str] = ()  # options of the script's that a site does not allow
    variables: str = ""  # that the script goes by

    def render(self, config: Config, words: Sequence[str], **more: str) -> str:
        """The script with these sbatch options, and more, in the place of, and after, its own; below them variables,
        and the words that are its arguments. Raises UserError."""
        text = (folder() / self.script).read_text().splitlines()
        if shown := next((masked(word) for word in words if masked(word) != word), ""):
            raise UserError(
                f"{shown} holds a password, which all users of the cluster could see; write it in the run file"
            )
        asked = {**self._options(config), **more}
        its = [option_of(line) for line in text if line.startswith("#SBATCH")]
        if strange := set(self.without) - set(its):
            raise UserError(f"--without {min(strange)} is no option of {self.script}; it has {', '.join(its)}")
        text = [line for line in text if not line.startswith("#SBATCH") or option_of(line) not in self.without]
        own = {option_of(line): number for number, line in enumerate(text) if line.startswith("#SBATCH")}
        for option, value in asked.items():
            if not value.isprintable() or '"' in value:  # a second line of it would be a command of the script's
                raise UserError(f"--{option}={value!r} cannot stand in a script for sbatch; rename what it names")
            quoted = f'"{value}"' if re.search(r"\s", value) else value
            line = f"#SBATCH --{option}={quoted}" if value else f"#SBATCH --{option}"
            if option in own:
                text[own[option]] = line
            else:
                text.insert(max(own.values()) + 1, line)
                own[option] = max(own.values()) + 1
        signals = f"--signal={asked['signal']}" if "signal" in asked else "\n".join(text)
        if asked.get("time"):
            _refuse_short("--time", asked["time"], signals)
        else:
            _refuse_short("the partition's time limit", limit_of(asked.get("partition", "")), signals)
        end = max(own.values()) + 1
        lines = [
            f"export MEGAHP_SLURM={shlex.quote(str(folder()))} RANKS_PER_NODE={self.ranks_per_node}",
            f"logs={shlex.quote(f'{config.directory}/slurm')} exclude={shlex.quote(str(self.exclude))}",
            *([self.variables] if self.variables else []),
            f"set -- {shlex.join(words)}",
        ]
        return "\n".join([*text[:end], "", *lines, *text[end:], ""])

    def _options(self, config: Config) -> dict[str, str]:
        """Name without dashes -> value, empty for an option that takes none. Raises UserError."""
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
            "exclude": str(self.exclude.absolute()) if bad_nodes else None,  # an empty file would be a mistake
        }
        more = self._more()
        if any(name.startswith(("gpus", "gres")) for name in more):
            del given["gpus-per-node"]
        return {name: value for name, value in given.items() if value is not None} | more

    def _more(self) -> dict[str, str]:
        """The options in self.sbatch. Raises UserError."""
        try:
            words = shlex.split(self.sbatch)
        except ValueError as error:
            raise UserError(f"--sbatch {self.sbatch!r} cannot be read ({error}); quote it as in a shell") from None
        more = {}
        for word in words:
            if not word.startswith("--"):
                raise UserError(f"--sbatch {self.sbatch!r}: {word!r} is no long option; write --name=value")
            name, _, value = word.removeprefix("--").partition("=")
            if name in self.own:
                raise UserError(f"--sbatch {word}: --{name} is set already, by other options or for them; leave it out")
            more[name] = value
        return more


def limit_of(partition: str) -> str:
    """Return the time limit of jobs in a partition, the default one where none is named, that ask for none themselves;
    "" where Slurm cannot be asked."""
    command = ["sinfo", "--noheader", "--format=%P|%L|%l", *([f"--partition={partition}"] if partition else [])]
    try:
        printed = _slurm(command)
    except UserError:
        return ""
    for line in printed.splitlines():
        if line.count("|") != 2:  # a site's own
            continue
        name, default, longest = line.split("|")
        if partition or name.endswith("*"):
            return longest if default == "n/a" else default
    return ""


def _refuse_short(what: str, time: str, signals: str) -> None:
    """Raise UserError where a time limit, "" for none, ends before the notice that these words of --signal ask for."""
    notice = re.search(r"--signal=\S*@(\d+)", signals)
    if notice and time and 0 < (seconds := seconds_of(time)) <= int(notice[1]):
        why = f"{what}, {time}, ends {seconds:,} s after the start, and notice of it is given {notice[1]} s before"
        raise UserError(f"{why}: nothing would be trained; give a longer --time, or --sbatch=--signal=USR1@SECONDS")


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit of Slurm's: M, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS; 0 for none. Raises
    UserError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found and time.lower() not in ("infinite", "unlimited", "0"):
        raise UserError(f"--time {time!r} is no time of Slurm's; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = found.groups() if found else (None,)
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def option_of(line: str) -> str:
    """The name of the option a line of #SBATCH sets."""
    return line.split()[1].removeprefix("--").partition("=")[0]


def folder() -> Path:
    """Where the scripts are: MEGAHP_SLURM, else those that came with megahp. Raises UserError."""
    found = Path(os.environ.get("MEGAHP_SLURM", Path(megahp.__file__).parent / "slurm")).resolve()
    if not (found / "environment.sh").exists():
        raise UserError(f"MEGAHP_SLURM = {found} has no environment.sh; name a copy of megahp's slurm/, or unset it")
    return found


class Queued(NamedTuple):
    """A job in Slurm's queue."""

    id: str
    state: str  # pending, running, ... as squeue calls it
    words: str  # its times and nodes

    def __str__(self) -> str:
        return f"job {self.id}: {self.state}, {self.words}"


def jobs() -> dict[str, list[Queued]]:
    """Your jobs by the run directory they were launched for. Raises UserError where Slurm cannot be asked."""
    found: dict[str, list[Queued]] = {}
    for line in _slurm(["squeue", "--me", "-h", "-o", COLUMNS], remedy="try again when Slurm answers").splitlines():
        job, state, used, limit, nodes, where, comment = (line.split("|", 6) + [""] * 6)[:7]
        if comment.startswith(OWNER):
            queued = Queued(job, state.lower(), f"{used} of {limit}, {nodes} nodes {where}")
            found.setdefault(comment.removeprefix(OWNER), []).append(queued)
    return found


def submit(script: str) -> str:
    """Submit a script that Slurm has said it could run. Returns the job's number. Raises UserError."""
    _slurm(["sbatch", "--test-only"], script)
    printed = _slurm(["sbatch", "--parsable"], script)
    # 12, or 12;cluster, with a site's own lines around it
    if found := re.search(r"^(\d+)(;\S*)?$", printed, re.MULTILINE):
        return found[1]
    raise UserError(f"sbatch printed no number of a job, but {printed!r}; see with squeue whether there is one")


def _slurm(command: Sequence[str], text: str = "", remedy: str = "change the options it names") -> str:
    """What a command of Slurm's prints. Raises UserError with what it complains of."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine; go to one of Slurm's") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}; {remedy}")
    return done.stdout.strip()
