"""The command: what it lists, finds and refuses, and that what it lists is there."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest

import megahp
from megahp import __version__, cli
from megahp.commands import COMMANDS, HIDDEN
from megahp.exit_codes import FAULT

ROOT = Path(__file__).parents[1]
FILES = {path.stem for path in (Path(megahp.__file__).parent / "commands").glob("*.py")}
HELPERS = {"__init__", "arguments", "chain", "output", "preprocess_series"}


def file_of(command: str) -> str:
    return command.replace(" ", "_").replace("-", "_")


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return end.value.code, *capsys.readouterr()


def test_each_command_is_a_file_and_each_file_a_command() -> None:
    assert {file_of(command) for command in (*COMMANDS, *HIDDEN)} == FILES - HELPERS
    for command in (*COMMANDS, *HIDDEN):
        module = import_module(f"megahp.commands.{file_of(command)}")
        assert module.__doc__ and callable(module.add_arguments) and callable(module.run)


def test_commands_are_listed_but_those_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = ended(["--help"], capsys)
    assert code == 0
    assert all(re.search(rf"^  {command} +\S", said, re.MULTILINE) for command in COMMANDS)
    assert not any(hidden in said for hidden in HIDDEN)


# The others measure with torch, and import it to declare what they do.
WITHOUT_TORCH = (
    *(
        "preprocess",
        "merge",
        "recipe",
        "config",
        "train",
        "sample",
        "forecast",
        "evaluate",
        "report",
        "replay",
        "fit",
        "checkpoint",
    ),
    *("launch", "status", "verify-layout", *HIDDEN),
)
IMPORTED = """
import sys
from megahp import cli
for command in sys.argv[1:]:
    try:
        cli.parse([command, "--help"])
    except SystemExit:
        assert "torch" not in sys.modules, command
"""


def test_options_are_read_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED, *WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, *HIDDEN])
def test_a_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = ended([*command.split(), "--help"], capsys)
    assert code == 0 and said.startswith(f"usage: megahp {command} ")


@pytest.mark.parametrize("command", [*COMMANDS, *HIDDEN])
def test_a_command_that_lacks_everything_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one screen, with exit code 2; one that needs nothing is not asked."""
    try:
        cli.parse(command.split())
    except SystemExit as end:
        said = capsys.readouterr()
        assert end.code == 2 and said.err.startswith(f"usage: megahp {command} ") and not said.out
        assert said.err.splitlines()[-1].startswith(f"megahp {command}: ") and "options:" in said.err
        if command == "train":
            assert 'train = ["data/mine"]' in said.err and "megahp train run.toml --ranks 2" in said.err
            assert len(said.err.splitlines()) < 45
    else:
        assert command != "train"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["--version"], capsys)[:2] == (0, f"megahp {__version__}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "usage: megahp COMMAND"),
        (["trian", "run.toml"], "'trian run.toml' is not a command; did you mean train"),
        (["benchmark"], "did you mean benchmark norm"),
        (["benchmark", "norn"], "did you mean benchmark norm"),
        (["report", "runs/x", "--colour"], "unrecognized arguments: --colour"),
        (["train", "run.toml", "--rank", "2"], ""),  # an abbreviation is no setting either
    ],
)
def test_what_is_no_command_or_option_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("")
    if told:
        code, _, error = ended(words, capsys)
    else:
        code, error, told = cli.main(words), capsys.readouterr().err, "'--rank' is neither an option nor a setting"
    assert code == 2 and told in error


def test_megahp_alone_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out and "no command" not in said.err and "  preprocess  " in said.err


# what a command may meet that nobody caught, and whether a user gave it
UNCAUGHT = {
    "megahp: Stale file handle; try again": (OSError(116, "Stale file handle"), False),
    "megahp: data/x.bin: Input/output error; try again": (OSError(5, "Input/output error", "data/x.bin"), False),
    "megahp: data/x.bin: Permission denied; change its permissions": (
        PermissionError(13, "Permission denied", "data/x.bin"),
        True,
    ),
    "megahp: File name too long; name another": (OSError(36, "File name too long"), True),
    "megahp: RecursionError: maximum recursion depth exceeded": (
        RecursionError("maximum recursion depth exceeded"),
        True,
    ),
    "megahp: OverflowError: cannot convert float infinity": (OverflowError("cannot convert float infinity"), True),
    "megahp: UnicodeError: a surrogate": (UnicodeError("a\nsurrogate"), True),
    "megahp: MemoryError: ": (MemoryError(), False),
}


@pytest.mark.parametrize("told", UNCAUGHT)
@pytest.mark.parametrize("command", ["train run.toml", "requeue 1 run.toml", "report runs/x"])
def test_what_nobody_caught_is_one_line_of_every_rank(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault of a machine, so that what started a run starts it again, or a mistake of a user, so that it does not."""
    error, is_user_error = UNCAUGHT[told]
    module = import_module(f"megahp.commands.{command.split()[0]}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(module, "run", Mock(side_effect=error))
    assert cli.main(command.split()) == (2 if is_user_error or command.startswith("report") else FAULT)
    assert capsys.readouterr().err.rstrip("\n") == told.rstrip()


def test_log_records_are_lines_of_stderr_without_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once each, however often a command has run in this process, on the stderr of the moment; none that fails to be
    written raises."""
    for _ in range(2):
        assert cli.main(["runs", "nowhere"]) == 2
    log = logging.getLogger("megahp.launch.rendezvous")
    capsys.readouterr()
    log.warning("waiting for s3://me:secret@host/run")
    assert capsys.readouterr().err == "megahp: waiting for s3://me:***@host/run\n"
    for error in (OSError(28, "No space left on device"), ValueError("I/O operation on closed file")):
        monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=error)))
        log.warning("a line that nobody reads")
        assert sys.stderr.write.called


def test_tools_are_the_same_commands_by_path(tmp_path: Path) -> None:
    """One that imports little, from another folder."""
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"gpu_check"}  # which is no command of megahp's
    called = {re.search(r"`megahp (.*?)`", (ROOT / f"tools/{tool}.py").read_text()).group(1) for tool in tools}  # type: ignore[union-attr]
    assert called <= set(COMMANDS) and len(called) == len(tools) == 15
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for tool, command in (("preprocess_data", "preprocess"), ("benchmark_norm", "benchmark norm")):
        words = [sys.executable, ROOT / f"tools/{tool}.py", "--help"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: megahp {command} "), done.stderr


def test_what_readme_names_is_there() -> None:
    """Every `megahp COMMAND` of README, docs and the examples."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.sh")]
    named = {
        words
        for page in pages
        if page.name != "log.md"
        for words in re.findall(r"(?:^|[`\n ])megahp ([a-z][a-z-]+(?: [a-z][a-z-]+)?)", page.read_text())
    }
    commands = {words for words in named if words.split()[0] in {name.split()[0] for name in COMMANDS}}
    for words in commands:
        assert words in COMMANDS or words.split()[0] in COMMANDS or words.split()[0] in ("benchmark", "measure"), words
    assert len(commands) > 15
