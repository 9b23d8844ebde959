"""Machines: all of ours can be read, and a file that is wrong is refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megahp.errors import UserError
from megahp.plan.machine import FOLDER, load_machine, machine_names


@pytest.mark.parametrize("name", machine_names())
def test_ours(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name and machine.usable < machine.memory
    # every number of a data sheet has its source beside it
    lines = (FOLDER / f"{name}.toml").read_text().partition("[efficiency]")[0].splitlines()
    assert [line for line in lines if "=" in line and "#" not in line] == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("memory = 84.9e9", "memory = -84.9e9", "memory = -84900000000.0 must be between"),
        ("memory = 84.9e9", "memory = '80 GB'", "memory = '80 GB' must be a number"),
        ("memory = 84.9e9", "", "memory is missing"),
        ("units = 132", "units = 13.2", "units = 13.2 must be a whole number"),
        ("float16 = 989e12", "float16 = 989", "peak.float16 = 989 must be between"),
        ("float16 = 989e12", "float16 = nan", "peak.float16 = nan must be between"),
        ("[links]", "[link]", "link is not known"),
        ("network_latency", "latency", "links.latency is not known"),
        ("[links]", "[links", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    text = (FOLDER / "h100.toml").read_text()
    assert old in text
    (tmp_path / "own.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        load_machine(str(tmp_path / "own.toml"))
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"--cluster h1000 is unknown.* h100, "):
        load_machine("h1000")
    with pytest.raises(UserError, match="does not exist"):
        load_machine("none.toml")
