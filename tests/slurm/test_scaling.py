"""The benchmark of scaling as job arrays on the emulated cluster."""

from __future__ import annotations

import json
import re

import pytest
from slurm.site import ON_SLURM, Site

from megahp import cli
from megahp.log.metrics import read_events

pytestmark = ON_SLURM
WORDS = "run.toml --out scaling --nodes 1 2 --steps 4 --warm-up 1 --slurm --sbatch=--time=5 --json found.json"


def test_arrays_of_points(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One array a number of nodes; the same command waits for them, and shows what they found."""

    def said() -> str:
        assert cli.main(["benchmark", "scaling", *WORDS.split()]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    two, one = re.findall(r"job (\d+): (\d) points on (\d) nodes", said())
    assert (two[1:], one[1:]) == (("2", "2"), ("1", "1"))  # where both begin weak and strong scaling are one point
    again = said()
    assert "3 points, 0 of them already finished" in again and f"job {two[0]}" in again and "points on" not in again
    assert [site.cluster.finished(job) for job in (two[0], one[0])] == ["COMPLETED"] * 2, site.said()
    assert "3 points, 3 of them already finished" in said()
    found = json.loads((site.folder / "found.json").read_text())
    rows = [(row["mode"], row["nodes"], row["global_batch"], row["steps"]) for row in found["rows"]]
    assert rows == [("weak", 1, 4, 3), ("weak", 2, 8, 3), ("strong", 1, 4, 3), ("strong", 2, 4, 3)]
    assert not found["emulated"]
    for row in found["rows"]:
        started = read_events(site.folder / row["run"])[0]
        assert started["layout"]["dp_shard"] == row["nodes"]
        assert not (site.folder / row["run"] / "checkpoints").exists()
