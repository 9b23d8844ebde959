"""README, "From one machine to a cluster", line by line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from corpus import write_corpus
from launch.test_mpi import ALLOWED
from slurm.cluster import ROOT, running
from slurm.site import ON_SLURM

pytestmark = [*ON_SLURM, pytest.mark.slow]
RECIPE = "megahp recipe --width 128 --layers 2 --tokens 2e5 --sequence-length 64 --tokenizer bytes --data corpus"
HERE = {"device": '"cpu"', "global_batch": "16", "name": '"run"'}  # what the emulated cluster asks of the run file


def commands() -> list[str]:
    """The lines of the section's two blocks, without their comments."""
    section = (ROOT / "README.md").read_text().split("## From one machine to a cluster")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_every_command_of_the_section(tmp_path: Path) -> None:
    """In a folder that has the repository's tools, data, and a run file by `megahp recipe`, on CPUs."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "tools").symlink_to(ROOT / "tools")
    write_corpus(site / "corpus", 0.05)
    (tmp_path / "slurm").mkdir()
    with running(tmp_path / "slurm", 4) as cluster:

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            return done.stdout + done.stderr

        environment = {**cluster.environment, **ALLOWED}
        run(*RECIPE.split(), "--out", "run.toml")
        text = (site / "run.toml").read_text()
        for key, value in HERE.items():
            before, _, after = text.rpartition(f"\n{key} = ")
            text = f"{before}\n{key} = {value}\n" + after.partition("\n")[2]
        (site / "run.toml").write_text(text)
        jobs = []
        for number, line in enumerate(commands()):
            name = "" if "log.name" in line or number > 2 else f" log.name=local-{number}"
            said = run("bash", "-c", line + name)
            jobs += re.findall(r"^job (\d+)", said, re.MULTILINE)
        assert len(jobs) == 4
        cluster.wait(lambda: not cluster("squeue", "-h"), 300)
        for name in ("local-0", "local-1", "local-2", "run", "grown"):
            assert "finished" in run("megahp", "status", f"runs/{name}")
        found = run("bash", "-c", commands()[-1])
        assert "3 points, 3 of them already finished" in found
