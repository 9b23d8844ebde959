"""A site: the emulated cluster, and jobs of megahp's on it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpus import write_corpus
from logged import numbers
from slurm.cluster import MISSING, ROOT, Cluster

from megahp.cli import main
from megahp.log.metrics import read_events

ON_SLURM = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install, see .ci/run)"),
]
STEPS = 60
RUN = f"""
[model]
layers = 2
width = 16
heads = 2
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 4
micro_batch = 1
[train]
tokens = {64 * STEPS}
device = "cpu"
validation_samples = 4
[checkpoint]
every = 10
[log]
tensorboard = false
baselines = false
"""

GROWING = ("batch.policy=table", "batch.table=['640:8','1664:16']")  # after 10 and 8 steps


class Site:
    """A cluster, the folder this process is in and submits from, and jobs submitted at first, which run, or wait, while
    what takes no node is tested."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        write_corpus(folder / "corpus", 0.02)
        (folder / "run.toml").write_text(RUN)
        # steps after the checkpoint of step 10, whose files another rank may still be writing
        killed = self.fault("torchrun", kind="kill", rank=1, step=18) | self.checked()
        two = ("--nodes=2",)
        self.jobs = {
            "limited": self.launch(
                "limited",
                "--time=1",
                "--sbatch=--signal=USR1@55",
                **self.fault("limited", kind="wait", rank=0, step=12),
            ),
            "undisturbed": self.launch("undisturbed"),
            "torchrun": self.sbatch(
                "pretrain_torchrun", "run.toml", "log.name=torchrun", options=two, RANKS_PER_NODE="1", **killed
            ),
            "lost": self.launch("lost", **self.fault("lost", kind="node", rank=1, step=16)),
            "mistake": self.sbatch("pretrain", "run.toml", "log.name=mistake", "model.width=15"),
            "cancelled": self.launch(
                "cancelled", "--grow", "4", *GROWING, nodes=1, **self.fault("cancelled", kind="wait", rank=0, step=3)
            ),
            "grown": self.launch("grown", "--grow", "4", *GROWING, nodes=1),
        }

    def fault(self, name: str, **fault: Any) -> dict[str, str]:
        """The environment in which a run meets a fault (tests/faults/inject)."""
        (self.folder / f"{name}.json").write_text(json.dumps([fault]))
        return {"FAULTS": f"{self.folder}/{name}.json", "PYTHONPATH": f"{ROOT}/tests/faults/inject:{ROOT}"}

    def checked(self) -> dict[str, str]:
        """The environment of a job whose slurm/ was fitted to the site: nodes are checked first, and the first node of
        its first life is found unfit."""
        unfit = '[ "$SLURM_PROCID" != 0 ] || [ -e bad.txt ] || { echo "$SLURMD_NODENAME" >bad.txt; exit 1; }\n'
        (self.folder / "check.sh").write_text(unfit)
        return {"MEGAHP_SLURM": str(self.fitted("our-slurm", "bash check.sh")), "exclude": "bad.txt"}

    def fitted(self, name: str, preflight: str) -> Path:
        """A copy of slurm/ with this check before training."""
        ours = Path(shutil.copytree(ROOT / "slurm", self.folder / name))
        words = (ours / "environment.sh").read_text()
        assert words.count("\npreflight=()\n") == 1
        (ours / "environment.sh").write_text(words.replace("\npreflight=()\n", f"\npreflight=({preflight})\n"))
        return ours

    def launch(self, name: str, *options: str, nodes: int = 2, **more: str) -> str:
        """The number of the job."""
        with pytest.MonkeyPatch.context() as patch:
            for key, value in more.items():
                patch.setenv(key, value)
            code, said = megahp("launch", "run.toml", f"log.name={name}", "--nodes", str(nodes), *options)
        assert code == 0, said
        return said.split("job ")[1].split(";")[0]

    def sbatch(self, script: str, *words: str, options: tuple[str, ...] = (), **more: str) -> str:
        """The number of the job."""
        more = {"MEGAHP_SLURM": f"{ROOT}/slurm", **more}
        return self.cluster("sbatch", "--parsable", *options, f"{ROOT}/slurm/{script}.sbatch", *words, **more).strip()

    def finished(self, name: str) -> str:
        """The number of the first jobs' one, which has ended well."""
        assert self.cluster.finished(self.jobs[name]) == "COMPLETED", self.said()
        return self.jobs[name]

    def over(self, name: str) -> None:
        """Wait until nothing is left of a chain of jobs."""
        self.cluster.wait(lambda: not self.cluster("squeue", "-h", "-n", name), 120)

    def same(self, one: str, other: str) -> None:
        """Assert that two runs, on whatever layouts, had the same samples, and losses equal but for rounding."""
        steps = [self.numbers(one), self.numbers(other)]
        exact, rounded = ("step", "tokens", "samples", "lr", "global_batch"), ("loss", "grad_norm", "noise_scale")
        assert [[step[key] for key in exact] for step in steps[0]] == [
            [step[key] for key in exact] for step in steps[1]
        ]
        for key in rounded:
            assert [step[key] for step in steps[0]] == pytest.approx([step[key] for step in steps[1]], rel=1e-5), key

    def said(self) -> str:
        """All logs, for a failure's sake."""
        logs = [*self.folder.glob("*.out"), *self.folder.rglob("slurm/*.out")]
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs)

    def numbers(self, name: str) -> list[dict[str, Any]]:
        return numbers(self.folder / "runs" / name)

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / "runs" / name) if event["event"] in kinds]


def megahp(*words: str) -> tuple[int, str]:
    """Exit code of a command, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(words), said.getvalue()
