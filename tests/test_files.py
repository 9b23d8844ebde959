"""Files that others wrote: one line says what is wrong, whatever they hold, and nothing is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megahp.errors import UserError
from megahp.files import LARGEST, open_unlinked, read_json, read_text, read_toml, refuse_links

TOML = {
    b"a = " + b"[" * 3000 + b"]" * 3000: "nested too deeply",
    b"a = " + b"9" * 5000: "not valid TOML: Exceeds the limit",
    b"a = 1\na = 2": "not valid TOML",
    b"a = \xe9": "cannot be read: .*utf-8",
    b"\x00": "not valid TOML",
}
JSON = {
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' + b"9" * 5000 + b"}": "not valid JSON: Exceeds the limit",
    b"[1]": "holds no object, but a list",
    b"": "not valid JSON",
    b'{"a"': "not valid JSON",
    b"\xff\xfe": "cannot be read",
}


@pytest.mark.parametrize("text", TOML)
def test_toml(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(UserError, match=f"^thing {tmp_path}/file .*{TOML[text]}"):
        read_toml(tmp_path / "file", "thing")


@pytest.mark.parametrize("text", JSON)
def test_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(UserError, match=f"^thing {tmp_path}/file .*{JSON[text]}"):
        read_json(tmp_path / "file", "thing")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST + 1)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, told in {
        "pipe": "not a regular file",
        "large": "268,435,457 bytes",
        "loop": "Too many levels|does not exist",
        ".": "a folder",
        "none": "does not exist",
        "a\0b": "null byte",
        "n" * 300: "File name too long",
        "large/more": "Not a directory|does not exist",
    }.items():
        with pytest.raises(UserError, match=told) as raised:
            read_text(tmp_path / name, "thing")
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="not a regular file"):
        read_text(Path("/dev/zero"), "thing")


def test_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "file", "thing") == {"ä": [1]}
    (tmp_path / "file").write_text('a = "ä"', encoding="utf-8")
    assert read_toml(tmp_path / "file", "thing") == {"a": "ä"}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    refuse_links(tmp_path / "run")
    refuse_links(tmp_path / "none")
    for target in (tmp_path / "precious", tmp_path / "not there"):
        (tmp_path / "run/.lock").symlink_to(target)
        for mode in ("w", "a", "a+", "wb"):
            with pytest.raises(UserError, match="lock is a symbolic link"):
                open_unlinked(tmp_path / "run/.lock", mode)
        with pytest.raises(UserError, match="lock is a symbolic link"):
            refuse_links(tmp_path / "run")
        (tmp_path / "run/.lock").unlink()
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "not there").exists()
    with open_unlinked(tmp_path / "run/.lock", "w") as file:
        file.write("\N{GREEK SMALL LETTER ETA}")
    assert (tmp_path / "run/.lock").read_bytes() == b"\xce\xb7"
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    refuse_links(tmp_path / "linked")  # a run directory may be kept elsewhere


def test_nobody_waits_for_the_reader_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for mode in ("w", "a", "wb"):
        with pytest.raises(UserError, match="pipe is not a regular file"):
            open_unlinked(tmp_path / "pipe", mode)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="pipe is not a regular file"):
        open_unlinked(tmp_path / "pipe", "w")
    os.close(reader)
