"""The scripts of slurm/ and `megahp launch` on a real Slurm of four emulated nodes, started once."""

from __future__ import annotations

import json
import re
import socket
import subprocess

import pytest
from slurm.cluster import ROOT
from slurm.site import GROWING, ON_SLURM, STEPS, Site, megahp

pytestmark = ON_SLURM
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
ARRAY = ("--array=0-1",)


def test_scripts_are_sound_bash() -> None:
    files = [str(path) for path in (*SCRIPTS, *(ROOT / "slurm").glob("*.sh"))]
    assert [subprocess.call(["bash", "-n", file]) for file in files] == [0] * len(files)
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_slurm_would_run_the_script(site: Site, script: str) -> None:
    """As it is, and with options a user adds."""
    for options in ((), ("--nodes=2", "--ntasks-per-node=1", "--time=10"), ("--array=0-3",)):
        site.cluster("sbatch", "--test-only", *options, f"{ROOT}/slurm/{script}")


def test_launch_prints_what_it_would_submit(site: Site) -> None:
    (site.folder / "worse.txt").write_text("127.0.0.3\n127.0.0.4\n")
    words = ["launch", "run.toml", "train.steps=3", "--nodes", "2", "--ranks-per-node", "2", "--time", "1:00:00"]
    words += ["--exclude", "worse.txt", "--sbatch", "--signal=USR1@90 --hold", "--dry-run"]
    code, script = megahp(*words)
    assert code == 0 and "\nset -- run.toml train.steps=3\n" in script and script.count("#SBATCH --signal") == 1
    (site.folder / "job.sh").write_text(script)
    job = site.cluster("sbatch", "--parsable", "job.sh").strip()
    told = site.cluster("scontrol", "show", "job", job)
    site.cluster("scancel", job)
    for wanted in ("NumNodes=2", "NumTasks=4", "TimeLimit=01:00:00", "ExcNodeList=127.0.0.[3-4]", "Requeue=1"):
        assert wanted in told
    assert f"Comment=megahp {site.folder}/runs/run" in told and "JobHeldUser" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--nodes", "3", "parallel.tp=2"), "needs a multiple of 2 ranks and there are 3"),
        (("--nodes", "0"), "--nodes 0 must be at least 1"),
        (("--nodes", "9", "batch.global_batch=9"), "sbatch --test-only"),
        (("--nodes", "2", "--partition", "none"), "invalid partition"),
        (("--nodes", "2", "--sbatch", "-p none"), "write --name=value"),
        (("--nodes", "2", "data.train=['nothing']"), "nothing"),
    ],
)
def test_what_cannot_run_is_not_submitted(site: Site, words: tuple[str, ...], told: str) -> None:
    code, said = megahp("launch", "run.toml", "log.name=none", *words)
    assert code == 2 and told in said and said.count("\n") == 1
    assert not site.cluster("squeue", "-h", "-t", "all", "-n", "none")


def test_a_port_that_is_taken_is_passed_over(site: Site) -> None:
    words = "source $MEGAHP_SLURM/job.sh; rendezvous; echo $MASTER_ADDR $MASTER_PORT"
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "127.0.0.[2-4]", "SLURM_CPUS_ON_NODE": "4"}
    with socket.socket() as other:
        other.bind(("", 22345))
        other.listen()
        said = site.cluster("bash", "-c", words, MEGAHP_SLURM=f"{ROOT}/slurm", **job)
    assert said == "127.0.0.2 22346\n"


def test_a_job_is_queued_again_as_long_as_that_leads_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """75 always; after a fault while there are new checkpoints, and restarts; a mistake and the end never."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")

    def after(code: int, checkpoint: int = 0) -> int:
        if checkpoint:
            (site.folder / f"runs/futile/checkpoints/step-{checkpoint:08d}").mkdir(parents=True)
        return megahp("requeue", str(code), "run.toml", "log.name=futile", "--restarts", "6")[0]

    assert [after(code) for code in (137, 1, 75, 76, 1, 2, 0, 93)] == [0, 0, 0, 0, 93, 2, 0, 93]
    assert [after(1, checkpoint) for checkpoint in (10, 20, 30, 40)] == [0, 0, 0, 1]
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert after(1) == 0


def test_told_at_the_time_limit_and_queued_again(site: Site) -> None:
    """Slurm gives notice ahead of the time limit, the ranks save and leave, and the job goes on from there."""
    job, events = site.jobs["limited"], site.folder / "runs/limited/events.jsonl"
    site.cluster.wait(lambda: events.exists() and "requeued" in events.read_text(), 120)
    site.cluster("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # or the next life is told as soon
    site.finished("limited")
    site.finished("undisturbed")
    told = ("started", "stopped", "requeued", "resumed", "finished")
    _, stopped, requeued, resumed, _ = along = site.events("limited", *told)
    assert [event["event"] for event in along] == list(told)
    assert "SIGUSR1" in stopped["reason"] and requeued["code"] == 75
    assert resumed["step"] == stopped["step"] >= 12
    assert site.numbers("limited") == site.numbers("undisturbed")
    assert "Restarts=1" in site.cluster("scontrol", "show", "job", job)
    code, said = megahp("status", "runs/limited")
    assert code == 0 and f"step {STEPS}, loss" in said and "3.84k/3.84k tokens 100%" in said and "finished" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", "/nonexistent")
        code, said = megahp("status", "runs/limited")
        assert code == 0 and "finished: step" in said and said.count("Slurm does not answer") == 1
        code, said = megahp("runs")
        assert code == 0 and re.search(rf"^runs/limited +finished +{STEPS} ", said, re.MULTILINE)


def test_one_task_a_rank(site: Site) -> None:
    job = site.finished("undisturbed")
    assert len(site.numbers("undisturbed")) == STEPS
    (started,) = site.events("undisturbed", "started")
    assert started["layout"]["dp_shard"] == 2
    logs = {path.name for path in (site.folder / "runs/undisturbed/slurm").iterdir()}
    assert logs == {f"{job}.out", f"undisturbed-{job}-0.out", f"undisturbed-{job}-1.out"}


def test_status_of_jobs(site: Site) -> None:
    assert megahp("status", "runs/nothing") == (
        2,
        "megahp: runs/nothing is not a run directory; name one, such as runs/mine\n",
    )
    code, said = megahp("status")  # the cancelled job's end is yet to come, others may have theirs behind them
    assert code == 0 and f"{site.folder}/runs/cancelled\n" in said and f"  job {site.jobs['cancelled']}: " in said


def test_a_run_has_one_job(site: Site) -> None:
    words = ["launch", "run.toml", "log.name=twice", "--nodes", "1"]
    assert megahp(*words, "--sbatch=--hold")[0] == 0
    job = site.cluster("squeue", "-h", "-n", "twice", "-o", "%i").strip()
    code, said = megahp(*words)
    assert code == 2 and f"runs/twice has job {job}: pending" in said and said.count("\n") == 1
    assert megahp(*words, "--dry-run")[0] == 0
    assert megahp(*words, "--without=exclusive,mem", "--sbatch=--hold --dependency=singleton")[0] == 0
    told = site.cluster("squeue", "-h", "-n", "twice", "-o", "%i %h").split()
    assert told[1::2].count("NO") == 1  # of the two the exclusive one
    site.cluster("scancel", "-n", "twice")


def test_a_mistake_is_not_repeated(site: Site) -> None:
    job = site.jobs["mistake"]
    assert site.cluster.finished(job) == "FAILED"
    told = site.cluster("scontrol", "show", "job", job)
    assert "Restarts=0" in told and "ExitCode=2:0" in told


def test_a_preprocessing_array(site: Site) -> None:
    """Three files by an array of two; what is there is not made again."""
    for number in range(3):
        (site.folder / f"{number}.txt").write_text(f"text {number} " * 20)
    words = ("--tokenizer", "bytes", "--input", "0.txt", "1.txt", "2.txt")
    for _ in range(2):
        job = site.sbatch("preprocess", "part", *words, options=ARRAY)
        assert site.cluster.finished(job) == "COMPLETED", site.said()
    told = [json.loads((site.folder / f"part-0000{part}.json").read_text()) for part in range(2)]
    assert [each["documents"] for each in told] == [2, 1]
    assert (site.folder / f"preprocess-{job}-1.out").read_text() == "nothing to do for part-00001\n"


def test_a_cancelled_job_is_the_end_of_its_chain(site: Site) -> None:
    site.cluster.wait((site.folder / "cancelled.json.0").exists, 120)
    site.cluster("scancel", site.jobs["cancelled"])
    site.over("cancelled")
    assert [event["event"] for event in site.events("cancelled", "started", "resumed")] == ["started"]
    assert len(site.cluster("squeue", "-h", "-t", "all", "-n", "cancelled").splitlines()) == 2


def test_a_sweep_array(site: Site) -> None:
    words = ["run.toml", "train.steps=3", "--grid", "optimizer.lr=0.001,0.01", "--family", "model.layers=1,2"]
    sweep = ["python", f"{ROOT}/tools/transfer_sweep.py", *words, "--seeds", "1", "--out", "sweep"]
    job = re.search(r"job (\d+)", site.cluster(*sweep, "--slurm", "2"))[1]  # type: ignore[index]
    assert site.cluster.finished(job) == "COMPLETED", site.said()
    assert "4 cells, 4 of them there already" in site.cluster(*sweep)


def test_conversion_and_benchmark(site: Site) -> None:
    site.finished("undisturbed")
    words = ("--from", "megahp", "--to", "huggingface", "runs/undisturbed", "exported", "--no-check")
    jobs = [site.sbatch("convert", *words)]
    words = ("benchmark_training.py", "--shape", "1x16", "--sequence", "16", "--turns", "1", "--vocabulary", "64")
    jobs.append(site.sbatch("benchmark", *words, "--contestants", "megahp", "--dtype", "float32"))
    assert [site.cluster.finished(job) for job in jobs] == ["COMPLETED"] * 2, site.said()
    assert (site.folder / "exported/config.json").exists()


def test_one_torchrun_a_node(site: Site) -> None:
    """The check finds a node unfit, which is left out from then on; later a rank is killed, whose exit code is the
    job's. Both times it is queued again."""
    job = site.finished("torchrun")
    unfit = (site.folder / "bad.txt").read_text().strip()
    assert f"ExcNodeList={unfit} " in site.cluster("scontrol", "show", "job", job).replace("\n", " ")
    requeued = [(event["code"], event["checkpoints"]) for event in site.events("torchrun", "requeued")]
    assert requeued == [(1, []), (137, ["step-00000010"])]
    assert site.numbers("torchrun") == site.numbers("undisturbed")


def test_a_lost_node(site: Site) -> None:
    """A node dies with all that runs on it; the job begins again on others, from its last checkpoint."""
    job = site.finished("lost")
    (node,) = (name for name, slurmd in site.cluster.nodes.items() if slurmd.poll() is not None)
    told = site.cluster("scontrol", "show", "job", job)
    assert "Restarts=1" in told and node not in told
    (resumed,) = site.events("lost", "resumed")
    assert resumed["step"] == 10 and site.numbers("lost") == site.numbers("undisturbed")
    site.cluster.start(node)


def test_a_run_takes_more_nodes_as_its_batch_grows(site: Site) -> None:
    """A chain of jobs on 1, 2 and 4 nodes trains what one rank does whose batch grows alike."""
    site.cluster("megahp", "train", "run.toml", "log.name=stayed", *GROWING)
    site.over("grown")
    assert starts(site, "grown") == [(0, 1), (10, 2), (18, 4)] and site.events("grown", "finished")
    site.same("grown", "stayed")
    assert megahp("replay", "runs/grown") == megahp("replay", "runs/stayed")
    plan = (site.folder / f"runs/grown/slurm/{site.jobs['grown']}.out").read_text()
    rows = ("0 to 640 4 to 4 10 1 ", "640 to 1.66k 8 to 8 8 2 ", "1.66k to 3.71k 16 to 16 8 4 ")
    assert all(row in " ".join(plan.split()) for row in rows)


def test_a_growing_run_goes_on_without_a_lost_node_and_without_those_it_cannot_get(site: Site) -> None:
    """On two of the three nodes that are left when one of its two is lost, and when it wants four."""
    fault = site.fault("shrunk", kind="node", rank=1, step=6)
    site.launch("shrunk", "--grow", "4", "--patience", "0.02", *GROWING, "checkpoint.every=4", **fault)
    site.cluster.wait((site.folder / "shrunk.json.0").exists, 60)
    (node,) = (name for name, slurmd in site.cluster.nodes.items() if slurmd.poll() is not None)
    site.cluster("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    site.over("shrunk")
    assert starts(site, "shrunk") == [(0, 2), (4, 2), (10, 2)] and site.events("shrunk", "finished")
    site.same("shrunk", "stayed")


@pytest.mark.slow
def test_a_chain_that_leads_nowhere_ends(site: Site) -> None:
    """Four jobs whose check fails, and no more."""
    ours = {"MEGAHP_SLURM": str(site.fitted("futile", "false"))}
    site.launch("unfit", "--grow", "4", *GROWING, nodes=1, **ours)
    site.over("unfit")
    assert [event["code"] for event in site.events("unfit", "requeued")] == [1, 1, 1]
    jobs = site.cluster("squeue", "-h", "-t", "all", "-n", "unfit", "-o", "%i %T").split()
    assert len(jobs[::2]) == 5 and jobs[1::2].count("FAILED") == 1 and "CANCELLED" in jobs


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 4])
def test_every_script_on_one_node_and_on_four(site: Site, nodes: int) -> None:
    """All that start ranks but the growing chain, which has its tests."""
    for node in [name for name, slurmd in site.cluster.nodes.items() if slurmd.poll() is not None]:
        site.cluster.start(node)  # which was lost in another test
    site.cluster.wait(lambda: "down" not in site.cluster("sinfo", "-h", "-o", "%T"), 60)
    many = (f"--nodes={nodes}", f"--ntasks-per-node={2 if nodes == 1 else 1}")
    words = ("train.steps=8", "checkpoint.every=4")
    for launcher in ("srun", "torchrun"):
        site.launch(f"{launcher}-{nodes}", f"--launcher={launcher}", *words, nodes=nodes)
    sizes = ("--sizes", "1K", "--repeats", "1", "--json", f"{nodes}.json")
    jobs = [site.sbatch("benchmark", "communication", *sizes, options=many)]
    points = f"run.toml --out scaling-{nodes} --nodes {nodes} --steps 3 --warm-up 1 --slurm --sbatch=--time=5"
    code, said = megahp("benchmark", "scaling", *points.split())
    assert code == 0, said
    jobs += re.findall(r"job (\d+)", said)
    assert [site.cluster.finished(job) for job in jobs] == ["COMPLETED"] * len(jobs), site.said()
    assert json.loads((site.folder / f"{nodes}.json").read_text())
    for name in (f"srun-{nodes}", f"torchrun-{nodes}"):
        site.over(name)
        assert site.events(name, "started")[0]["layout"]["dp_shard"] == nodes and site.events(name, "finished")
    site.same(f"srun-{nodes}", f"torchrun-{nodes}")
    checked = site.cluster("srun", *many, "python", "-m", "megahp", "check-cluster", "--slack", "0.9")
    assert "no node is bad" in checked


def starts(site: Site, name: str) -> list[tuple[int, int]]:
    """(step, ranks) of a run's every start."""
    return [(event["step"], event["layout"]["dp_shard"]) for event in site.events(name, "started", "resumed")]
