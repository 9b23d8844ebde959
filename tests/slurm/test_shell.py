"""What job.sh makes of answers that the emulated cluster never gives: a site's own sbatch, a refused requeue, a node
that is gone, a module that is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import megahp
from megahp.cluster.job import submit
from megahp.errors import UserError

SLURM = Path(megahp.__file__).parent / "slurm"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of slurm/ and a folder of stubs first on the path, which write down what they are called with."""
    shutil.copytree(SLURM, tmp_path / "slurm", ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "bin").mkdir()
    for name, value in {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "MEGAHP_SLURM": str(tmp_path / "slurm"),
        "SLURM_JOB_ID": "12",
        "SLURM_CPUS_ON_NODE": "4",
        "USER": "somebody",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    stub(tmp_path, "srun", "exit 0")  # megahp requeue says: again
    stub(tmp_path, "sinfo", "printf 'n1\\nn2\\nn3\\n'")
    stub(tmp_path, "scontrol", "exit 0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stub(site: Path, name: str, body: str) -> None:
    file = site / "bin" / name
    file.write_text(f'#!/bin/bash\necho "{name} $*" >>"{site}/called"\n{body}\n')
    file.chmod(0o755)


def bash(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'source "$MEGAHP_SLURM/job.sh"\n{text}'], capture_output=True, text=True, timeout=30
    )


def called(site: Path, name: str) -> list[str]:
    return [line for line in (site / "called").read_text().splitlines() if line.startswith(name)]


def test_an_element_of_an_array_is_queued_again_alone(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bash("end 75 run.toml").returncode == 0
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")  # the last element of an array has its number
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert bash("end 75 run.toml").returncode == 0
    assert called(site, "scontrol") == ["scontrol requeue 12", "scontrol requeue 12_3"]


@pytest.mark.parametrize("code", [75, 1, 137])
def test_a_refused_requeue_is_no_success(site: Path, code: int) -> None:
    stub(site, "scontrol", "exit 1")
    done = bash(f"end {code} run.toml")
    assert done.returncode == code and "Slurm did not requeue job 12" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_conversion_ends_as_the_command_does(site: Path, code: int) -> None:
    """3 says that the model was not checked."""
    stub(site, "srun", f"exit {code}")
    done = subprocess.run(["bash", site / "slurm/convert.sbatch", "--from", "megahp"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    (line,) = called(site, "srun")
    assert line.endswith("python -m megahp convert --from megahp")


def test_of_bad_nodes_those_are_left_out_that_there_are(site: Path) -> None:
    (site / "bad-nodes.txt").write_text("n1\ngone\nn3\n")
    done = bash("end 1 run.toml")
    assert done.returncode == 0 and "bad-nodes.txt names gone, which Slurm does not know" in done.stderr
    assert called(site, "scontrol")[-1] == "scontrol update JobId=12 ExcNodeList=n1,n3"
    (site / "bad-nodes.txt").write_text("gone\n")
    before = len(called(site, "scontrol"))
    assert bash("end 1 run.toml").returncode == 0
    assert len(called(site, "scontrol")) == before + 1  # the requeue alone


@pytest.mark.parametrize("line", ["module load cuda/99", "source nowhere/bin/activate", "false"])
def test_an_environment_that_fails_stops_the_job_at_its_line(site: Path, line: str) -> None:
    with (site / "slurm/environment.sh").open("a") as file:
        file.write(f"module() {{ return 1; }}\n[ -e nowhere ] && true\n! false\n{line}\nexport AFTER=1\n")
    number = (site / "slurm/environment.sh").read_text().splitlines().index(line) + 1
    done = bash("echo went on")
    assert done.returncode == 2 and "went on" not in done.stdout
    assert f"megahp: line {number} of " in done.stderr and f"failed: {line}; fix it" in done.stderr


def test_what_fails_inside_of_another_s_file_is_theirs(site: Path) -> None:
    (site / "activate").write_text("false\ntrue\n")
    with (site / "slurm/environment.sh").open("a") as file:
        file.write("source ./activate\n")
    assert bash("echo went on").stdout == "went on\n"


PRINTED = {
    "12": "12",
    "12;cluster": "12",
    "Welcome to the site\n123;big\nyou have 3 hours left": "123",
    "12 is a fine number\n": "",
    "": "",
}


@pytest.mark.parametrize("text", PRINTED)
def test_the_number_of_a_job_in_what_sbatch_prints(site: Path, text: str) -> None:
    (site / "printed").write_text(text)
    assert bash('id_of "$(cat printed)"').stdout.strip() == PRINTED[text]
    stub(site, "sbatch", f"cat <<'EOF'\n{text}\nEOF")
    if PRINTED[text]:
        assert submit("#!/bin/bash\n") == PRINTED[text]
    else:
        with pytest.raises(UserError, match="instead of a job id"):
            submit("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("nodes", "tasks", "cpus"),
    [("4(x3),2", 1, 2), ("2,4(x3)", 2, 1), ("16(x4)", 4, 4), ("10,8,9", 2, 4), ("1(x2)", 4, 1)],
)
def test_tasks_have_as_many_cpus_as_the_smallest_node(
    site: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, tasks: int, cpus: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", nodes)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", str(tasks))
    assert bash('echo "${step[0]}"').stdout == f"--cpus-per-task={cpus}\n"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert bash('echo "${step[0]}"').stdout == "--cpus-per-task=7\n"
