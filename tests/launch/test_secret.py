"""The secret by which ranks know each other, and who may read it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megahp.errors import UserError
from megahp.launch.secret import FILE, shared_secret


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_ranks_that_start_at_once_have_one_secret(home: Path) -> None:
    with ThreadPoolExecutor(16) as ranks:
        found = set(ranks.map(lambda _: shared_secret(environment={}), range(64)))
    (common,) = found
    assert len(common) == 64
    assert [path.name for path in home.iterdir()] == [FILE]
    assert stat.S_IMODE((home / FILE).stat().st_mode) == 0o600
    assert shared_secret(environment={"MEGAHP_SECRET": "0123456789abcdef"}) == b"0123456789abcdef"


SPOILT: dict[str, Callable[[Path], object]] = {
    "read by others": lambda path: (path.write_text("0" * 64), path.chmod(0o640)),
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a folder": lambda path: path.mkdir(0o700),
    "a pipe": lambda path: os.mkfifo(path, 0o600),
    "short": lambda path: (path.write_text("0" * 15), path.chmod(0o600)),
    "no text": lambda path: (path.write_bytes(b"\xff" * 64), path.chmod(0o600)),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_others_may_know_is_refused(home: Path, spoil: str) -> None:
    (home / "elsewhere").write_text("0" * 64)
    (home / "elsewhere").chmod(0o600)
    SPOILT[spoil](home / FILE)
    with pytest.raises(UserError, match=f"{FILE}.*set MEGAHP_SECRET to the same random text") as refused:
        shared_secret(environment={})
    assert "\n" not in str(refused.value) and "0" * 15 not in str(refused.value)


def test_a_home_that_is_not_there_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="set MEGAHP_SECRET"):
        shared_secret(environment={})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # of one machine's ranks
    assert len(shared_secret(True, {})) == 64 and shared_secret(True, {}) == shared_secret(True, {})
    assert [path.name for path in tmp_path.iterdir()] == [f"{FILE}-{os.geteuid()}"]


def test_a_short_secret_is_a_mistake() -> None:
    with pytest.raises(UserError, match="MEGAHP_SECRET has 5 characters and needs 16") as refused:
        shared_secret(environment={"MEGAHP_SECRET": "tiger"})
    assert "tiger" not in str(refused.value)
