"""The script of a job: what a user or a folder is called never becomes a command of it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megahp.cluster.job import Job, seconds_of
from megahp.config import Config, with_values
from megahp.errors import UserError

HOSTILE = ("$(touch owned)", "`touch owned`", "a b", "';touch owned;'", "a&touch owned&", "größe", "-n", "*")


def config(name: str = "run", root: str = "runs") -> Config:
    return with_values(Config(), {"log.name": name, "log.root": root})


@pytest.mark.parametrize("name", HOSTILE)
def test_words_and_names_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    script = Job("pretrain.sbatch", 1).render(config(name, name), ["run.toml", f"log.name={name}"])
    head = script[: script.index("source ")]  # all of it that is not the file's own
    printed = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s\\n" "$logs" "$@"'], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == [f"{config(name, name).directory}/slurm", "run.toml", f"log.name={name}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["time", "partition", "account"])
@pytest.mark.parametrize("value", ["a\ntouch owned", "a\r#SBATCH --uid=0", 'a" --uid="0', "a\0b"])
def test_what_would_be_another_line_is_refused_by_name(field: str, value: str) -> None:
    job = replace(Job("pretrain.sbatch", 1), **{field: value})
    with pytest.raises(UserError, match=f"--{field}(=| .* is not a Slurm time)"):
        job.render(config(), ["run.toml"])


def test_a_list_of_bad_nodes_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("pipe", "binary", "."):
        with pytest.raises(UserError, match=f"--exclude {tmp_path / name}"):
            Job("pretrain.sbatch", 1, exclude=tmp_path / name).render(config(), ["run.toml"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-1", 176_400), ("1-1:30", 91_800), ("1-0:0:5", 86_405)],
)
def test_times_of_slurm(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    assert seconds_of("UNLIMITED") == 0
    with pytest.raises(UserError, match="not a Slurm time"):
        seconds_of(f"{time}h")


def test_a_time_limit_leaves_room_for_the_notice() -> None:
    for job in (
        Job("pretrain.sbatch", 1, time="5"),
        Job("pretrain.sbatch", 1, sbatch="--time=4:00"),
        Job("pretrain.sbatch", 1, time="1", sbatch="--signal=B:USR1@60"),
    ):
        with pytest.raises(UserError, match=r"--time, (5|4:00|1), ends .* (300|60) s before"):
            job.render(config(), ["run.toml"])
    for job in (
        Job("pretrain.sbatch", 1, time="6"),
        Job("pretrain.sbatch", 1, time="0"),
        Job("pretrain.sbatch", 1, time="1", sbatch="--signal=USR1@55"),
        Job("convert.sbatch", 1, time="1"),
    ):
        assert "#SBATCH --time=" in job.render(config(), ["run.toml"])


def test_a_folder_above_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a\ntouch owned").mkdir()
    monkeypatch.chdir(tmp_path / "a\ntouch owned")
    with pytest.raises(UserError, match="--comment="):
        Job("pretrain.sbatch", 1).render(config(), ["run.toml"])


@pytest.mark.parametrize(
    ("partition", "printed", "limit"),
    [
        (None, "debug|5:00|1:00:00\nmain*|4:00|2:00\n", "4:00"),
        ("debug", "debug|5:00|1:00:00\n", "5:00"),
        ("debug", "debug|n/a|3:00\n", "3:00"),
        ("debug", "debug|n/a|infinite\n", ""),
        (None, "debug|1:00|1:00\nmain*|n/a|infinite\n", ""),
        ("debug", "", ""),
    ],
)
def test_a_partition_s_time_limit_leaves_room_for_the_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str | None, printed: str, limit: str
) -> None:
    """Where none is asked for; of the default partition where none is named."""
    stub = tmp_path / "sinfo"
    stub.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = Job("pretrain.sbatch", 1, partition=partition)
    if limit:
        with pytest.raises(UserError, match=f"the partition's time limit, {limit}, ends .* 300 s before"):
            job.render(config(), ["run.toml"])
        replace(job, time="10").render(config(), ["run.toml"])
    else:
        job.render(config(), ["run.toml"])


def test_what_a_site_refuses_can_be_left_out() -> None:
    job = Job("pretrain.sbatch", 1, without=["mem", "exclusive"])
    script = job.render(config(), ["run.toml"])
    assert "--mem" not in script and "--exclusive" not in script and "#SBATCH --requeue" in script
    with pytest.raises(UserError, match="--without memory is not an option of pretrain.sbatch; it has job-name, "):
        replace(job, without=["memory"]).render(config(), ["run.toml"])
