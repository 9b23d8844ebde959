"""Files that others wrote: one line says what is wrong, whatever they hold, and nothing is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megahp.errors import UserError
from megahp.files import LARGEST, read_json, read_text, read_toml

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
        "pipe": "no regular file",
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
    with pytest.raises(UserError, match="no regular file"):
        read_text(Path("/dev/zero"), "thing")


def test_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "file", "thing") == {"ä": [1]}
    (tmp_path / "file").write_text('a = "ä"', encoding="utf-8")
    assert read_toml(tmp_path / "file", "thing") == {"a": "ä"}
