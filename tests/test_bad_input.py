"""What a new user gets wrong: one clear line, exit code 2, nothing written or overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import runs
from train.test_run import RUN

from megahp import launch
from megahp.cli import main
from megahp.data.indexed import IndexedWriter
from megahp.errors import masked
from megahp.log.metrics import read_events


def copy_corpus(folder: Path, name: str) -> None:
    for suffix in (".bin", ".idx"):
        (folder / f"{name}{suffix}").write_bytes((folder / f"corpus{suffix}").read_bytes())


NEWEST = "runs/done/checkpoints/step-00000003"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good corpus, bad ones beside it, and a finished run of three steps."""
    folder = tmp_path_factory.mktemp("bad")
    with IndexedWriter(str(folder / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document(list(b"some text, again and again " * 8))
    for name in ("truncated", "magic", "short"):
        copy_corpus(folder, name)
    (folder / "truncated.idx").write_bytes((folder / "corpus.idx").read_bytes()[:60])
    (folder / "magic.idx").write_bytes(b"NOTANIDX" + (folder / "corpus.idx").read_bytes()[8:])
    (folder / "short.bin").write_bytes((folder / "corpus.bin").read_bytes()[:100])
    for name, text in (("garbled", "[]"), ("tagged", '{"tokenizer_fingerprint": "another"}')):
        (folder / f"{name}.json").write_text(text)
        copy_corpus(folder, name)
    with IndexedWriter(str(folder / "nothing"), 257) as writer:
        pass
    (folder / "run.toml").write_text(RUN)
    (folder / "runs").mkdir()
    (folder / "runs" / "file").write_text("")
    runs.train(folder, "done", "train.steps=3")
    (folder / "runs" / "empty").mkdir()
    (folder / "runs" / "empty" / "config.toml").write_text("")
    return folder


def megahp(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megahp", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train nowhere.toml", ["nowhere.toml", "does not exist"]),
        ("train run.toml model.lyers=3", ["model.lyers = 3", "layers"]),
        ("train run.toml train.tokens=many", ["train.tokens = 'many'", "whole number"]),
        ("train run.toml --ranks 0", ["--ranks 0", "at least 1"]),
        ("train run.toml optimizer.beta2=1", ["optimizer.beta2 = 1.0", "below 1"]),
        ("train run.toml optimizer.lr=inf", ["optimizer.lr = inf", "finite"]),
        ("train run.toml model.preset=[1]", ["model.preset = [1]", "text"]),
        ("train run.toml model.width=1000000000007 model.heads=6", ["model.heads = 6", "nearest"]),
        ("train run.toml log.name=", ["log.name = ''", "log.root"]),
        ("train run.toml log.name=../out", ["log.name = '../out'"]),
        ("train run.toml log.name=/out", ["log.name = '/out'"]),
        ("train run.toml log.name=file", ["runs/file is a file"]),
        ('train run.toml data.train=["nothing"]', ["nothing", "no tokens"]),
        ('train run.toml data.train=["garbled"]', ["garbled.json"]),
        ("train run.toml parallel.split=[1,1]", ["parallel.split = (1, 1)", "has no effect", "parallel.pp = 1"]),
        ("train run.toml parallel.pp=3 --ranks 3", ["parallel.pp = 3", "3 blocks", "parallel.pp=2"]),
        ("train run.toml parallel.pp=2 parallel.split=[1,2] --ranks 2", ["parallel.split = [1, 2]", "2 stages"]),
        (
            "train run.toml parallel.pp=2 parallel.stages_per_rank=2 model.layers=4 --ranks 2",
            ["stages_per_rank = 2", "'1f1b'"],
        ),
        (
            "train run.toml parallel.pp=2 parallel.schedule=zbv model.layers=4 model.tied_embeddings=true --ranks 2",
            ["'zbv'", "tied_embeddings"],
        ),
        (
            "train run.toml parallel.pp=2 parallel.schedule=zero-bubble compute.recompute=selective --ranks 2",
            ["'selective'", "'zero-bubble'", "compute.recompute=full"],
        ),
        ("train run.toml parallel.pp=2 parallel.zero=3 --ranks 2", ["parallel.zero = 3", "parallel.pp"]),
        ("train run.toml parallel.zero=1 parallel.reduce=every", ["parallel.reduce = 'every'", "parallel.zero"]),
        ("train run.toml data.weights=[-1]", ["data.weights"]),
        ("sample runs/done --temperature -1", ["--temperature -1"]),
        ("sample runs/done --temperature nan", ["--temperature nan"]),
        ("sample runs/done --tokens -5", ["--tokens -5"]),
        ("sample runs/done --seed 99999999999999999999", ["--seed"]),
        ("replay runs/nowhere", ["runs/nowhere"]),
        ("train run.toml --rank 2", ["--rank", "section.key=value"]),
        ("train run.toml parallel.tp=3", ["parallel.tp = 3", "model.kv_heads = 4", "2, 4"]),
        ("train run.toml parallel.tp=4 --ranks 6", ["tp 4", "multiple of 4 ranks", "nearest: 4, 8"]),
        ("train run.toml batch.global_batch=5", ["batch.global_batch = 5", "nearest", "4, 6"]),
        ("train run.toml batch.global_batch=2 --ranks 4", ["batch.global_batch = 2", "nearest valid: 8"]),
        ("train run.toml train.device=cuda", ["train.device", "CUDA", "cpu"]),
        ("train run.toml data.train=[]", ["data.train", "megahp preprocess"]),
        ('train run.toml data.train=["nowhere"]', ["nowhere"]),
        ('train run.toml data.train=["truncated"]', ["truncated.idx"]),
        ('train run.toml data.train=["magic"]', ["magic.idx"]),
        ('train run.toml data.train=["short"]', ["short.bin"]),
        ('train run.toml data.train=["tagged"]', ["data.tokenizer", "tagged"]),
        ("train run.toml data.sequence_length=100000 train.tokens=1e7", ["corpus", "100001"]),
        ("train run.toml data.tokenizer=nowhere.model", ["nowhere.model"]),
        ("train run.toml model.vocab_size=100", ["model.vocab_size = 100", "257"]),
        ("train run.toml log.name=done", ["runs/done", "--resume auto"]),
        ("train run.toml log.name=done --ranks 2", ["runs/done", "--resume auto"]),
        ("train run.toml log.name=done --resume auto model.width=64", ["model.width = 64", "32"]),
        ("train run.toml log.name=done --resume auto train.seed=9", ["train.seed = 9", "1"]),
        ('train run.toml data.lengths=["5000"]', ["'5000'", "tokens:length"]),
        ('train run.toml data.lengths=["5000:64","4000:32"]', ["'4000:32'", "after 5000"]),
        ('train run.toml data.lengths=["5000:48"]', ["data.sequence_length = 32", "48"]),
        ('train run.toml data.lengths=["5000:0"]', ["data.lengths = 0"]),
        ('train run.toml data.lengths=["5000:512"] batch.micro_batch=1', ["global_batch = 8", "data.lengths", "16"]),
        ('train run.toml data.mixtures=["5000:1,2"]', ["data.mixtures has 2 values"]),
        ('train run.toml data.mixtures=["5000:0"]', ["data.mixtures = [0.0]"]),
        ('train run.toml data.train=["corpus","corpus"]', ["'corpus' twice"]),
        ("train run.toml train.start_from=runs/nowhere", ["runs/nowhere", "neither a checkpoint"]),
        ("train run.toml train.start_from=runs/done model.width=64", ["model.width = 64", "32"]),
        ("train run.toml train.start_from=runs/done train.tokens=512", ["train.tokens = 512", "768"]),
        ("train run.toml train.start_from=runs/done train.tokens=1000", ["train.tokens = 1000", "no step after"]),
        ("train run.toml train.start_from=runs/done train.steps=3", ["train.steps = 3", "no step after"]),
        ("train run.toml train.start_from=runs/done data.validation_fraction=0.2", ["data.validation_fraction = 0.2"]),
        ('train run.toml data.mixtures=["10240:1"]', ["10240 tokens", "never reached"]),
        ('train run.toml data.mixtures=["inf:1"]', ["'inf:1'"]),
        ('train run.toml data.lengths=["5000:inf"]', ["'5000:inf'"]),
        ("train run.toml data.weights=[1e308,1e308]", ["data.weights has 2"]),
        ('train run.toml data.train=["corpus","./corpus"]', ["'corpus'", "the same content as another"]),
        (
            "train run.toml log.name=done --resume auto schedule.start=9000 train.start_from=runs/x",
            ["schedule.start = 9000"],
        ),
        ("train run.toml train.start_from=runs/done schedule.start=800", ["schedule.start = 800", "768"]),
        ("train run.toml schedule.start=100", ["schedule.start = 100", "train.start_from"]),
        ("train run.toml train.start_from=runs/done schedule.start=10240", ["schedule.start = 10240", "10240"]),
        ("train run.toml sparsity.density=0.5", ["sparsity.density = 0.5", "no effect", "sparsity.method = 'none'"]),
        ("train run.toml sparsity.method=static sparsity.layers=[0.5]", ["has 1 densities", "model.layers = 2"]),
        ("train run.toml sparsity.method=static sparsity.layers=[0.5,0]", ["sparsity.layers = [0.5, 0.0]"]),
        (
            "train run.toml sparsity.method=static sparsity.layers=[0.5,1] sparsity.density=0.5",
            ["sparsity.density = 0.5", "beside sparsity.layers"],
        ),
        ("train run.toml sparsity.method=rigl", ["sparsity.density = 1", "'rigl'"]),
        (
            "train run.toml sparsity.method=gradual sparsity.density=0.5 sparsity.begin=0.8",
            ["sparsity.begin = 0.8", "sparsity.end = 0.75"],
        ),
        (
            "train run.toml sparsity.method=gradual sparsity.density=0.5 parameterization.name=smupar",
            ["'smupar'", "'gradual'", "parameterization.name=mup"],
        ),
        (
            "train run.toml sparsity.method=gradual sparsity.density=0.5 parameterization.scale_density=true",
            ["parameterization.scale_density", "'gradual'", "set it to false"],
        ),
        ("train run.toml sparsity.method=static optimizer.name=muon", ["sparsity.method = 'static'", "'muon'"]),
        (
            "train run.toml sparsity.method=static optimizer.name=dct optimizer.rank=8",
            ["sparsity.method = 'static'", "'dct'"],
        ),
        ("train run.toml train.start_from=runs/done sparsity.method=static", ["sparsity.method = 'static'", "'none'"]),
        ("train run.toml log.name=done --resume auto sparsity.method=static", ["sparsity.method", "log.name"]),
        ("train run.toml compute.norms=apex", ["compute.norms = 'apex'", "train.noise_scale=false"]),
        ("train run.toml compute.norms=apex train.noise_scale=false", ["compute.norms = 'apex'", "not installed"]),
        (
            "train run.toml optimizer.engine=apex",
            ["optimizer.engine = 'apex'", "not installed", "github.com/NVIDIA/apex"],
        ),
        ("train run.toml compute.fp8=transformer-engine", ["compute.fp8 = 'transformer-engine'", "not installed"]),
        ("train run.toml compute.recompute_every=2", ["compute.recompute_every", "needs selective or full"]),
        ("train run.toml optimizer.momentum=0.9", ["optimizer.momentum", "needs muon"]),
        ("train run.toml optimizer.rank=8", ["optimizer.rank", "needs dct or galore"]),
        (
            "train run.toml log.name=done --resume auto optimizer.name=dct optimizer.rank=8",
            ["optimizer.name", "log.name"],
        ),
        ("sample runs/nowhere", ["runs/nowhere"]),
        ("report runs/nowhere", ["runs/nowhere"]),
        ("checkpoint verify runs/nowhere", ["runs/nowhere is neither a checkpoint nor a run directory"]),
        (f"checkpoint ls {NEWEST}", [f"{NEWEST} is a checkpoint; name its run directory, two folders above"]),
        (f"checkpoint prune {NEWEST} --keep 1", [f"{NEWEST} is a checkpoint"]),
        (f"sample {NEWEST} --save", [f"which {NEWEST} is not"]),
        *(
            (f"{command} runs/empty", ["runs/empty is a run that has no checkpoint yet"])
            for command in ("sample", "checkpoint verify", "checkpoint ls", "checkpoint diff runs/done")
        ),
        ("config nowhere.toml", ["nowhere.toml"]),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, words: str, told: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "join", None)  # so that what is not refused cannot train, and end this process
    before = contents(folder)
    code = main(words.split())
    output, errors = capfd.readouterr()
    assert code == 2
    assert errors.startswith("megahp: ") and errors.count("\n") == 1, errors
    assert all(word in errors for word in told), errors
    assert output == ""
    assert contents(folder) == before


def test_a_checkpoint_is_meant_by_its_own_name_its_folder_s_and_its_run_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for place in (NEWEST, "runs/done/checkpoints", "runs/done"):
        assert main(["checkpoint", "verify", place]) == 0
        assert f"{NEWEST}: as it was written" in capfd.readouterr().out
    assert main(["checkpoint", "ls", "runs/done/checkpoints"]) == 0
    assert "step-00000003" in capfd.readouterr().out


@pytest.mark.parametrize("file", ["state.json", "index.json", "manifest.json", "shard-00000.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_checkpoint_is_named(
    folder: Path, file: str, damage: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (path,) = (folder / "runs/done/checkpoints").glob(f"step-*/{file}")
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2] if damage == "cut" else b'{"version": 1}')
    words = "train run.toml log.name=done --resume auto optimizer.lr=0.5"
    try:
        test_a_mistake_is_one_line(folder, words, ["checkpoint", "step-00000003"], monkeypatch, capfd)
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize(
    "name", [".lock", "config.toml", "config.toml.part", "metrics.jsonl", "crashes", "checkpoints"]
)
def test_a_link_in_a_run_directory_is_refused(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By what writes there, and by what reads; what it names stays as it is."""
    shutil.copytree(folder / "runs/done", run := tmp_path / "runs/linked")
    place, kept = run / name, tmp_path / "kept"
    place.rename(kept) if place.exists() else kept.write_text("precious")
    place.symlink_to(kept)
    words = ["train run.toml log.name=linked --resume auto", "sample runs/linked", "report runs/linked"]
    for command in words:
        root = [f"log.root={tmp_path / 'runs'}"] if command.startswith("train") else []
        linked = " ".join([*command.replace("runs/linked", str(run)).split(), *root])
        test_a_mistake_is_one_line(folder, linked, [str(place), "symbolic link"], monkeypatch, capfd)
    place.unlink()
    place.symlink_to(tmp_path / "not there")
    test_a_mistake_is_one_line(folder, linked, [str(place), "symbolic link"], monkeypatch, capfd)
    assert not (tmp_path / "not there").exists()


def test_passwords_are_in_no_file_and_on_no_page(folder: Path) -> None:
    """Of places that are reached, and of one that is not; in what is printed too."""
    hidden = "://user:sesame@127.0.0.1:1/b"
    toml = folder / "secret.toml"
    for scheme, code in (("file", 0), ("ftp", 1)):
        toml.write_text(RUN.replace("[checkpoint]", f'[checkpoint]\nremote = "{scheme}{hidden}"'))
        for resume in ([], ["--resume", "auto"]):
            words = [f"log.name=by-{scheme}", f"train.steps={3 + bool(resume)}", *resume]
            done = megahp(folder, "train", "secret.toml", *words)
            assert done.returncode == code and "sesame" not in done.stdout + done.stderr, done.stdout + done.stderr
            shutil.rmtree(folder / f"runs/by-{scheme}/checkpoints", ignore_errors=True)  # so that the copies serve
        assert code == 0 or ":***@127.0.0.1" in done.stderr
    assert megahp(folder, "report", "runs/by-file").returncode == 0
    copies = folder / "user:sesame@127.0.0.1:1"  # which is where fsspec takes this URL to lead
    assert [event["event"] for event in read_events(folder / "runs/by-file")].count("resumed") == 1
    files = [path for path in (*(folder / "runs/by-file").rglob("*"), *copies.rglob("*")) if path.is_file()]
    assert "state.json" in {path.name for path in files}
    assert {"config.toml", "events.jsonl", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if b"sesame" in path.read_bytes()]
    assert b"file://user:***@127.0.0.1:1/b" in (folder / "runs/by-file/config.toml").read_bytes()
    for words in (
        ["config", "secret.toml"],
        ["checkpoint", "ls", f"ftp{hidden}"],
        ["checkpoint", "ls", f"none{hidden}"],
    ):
        done = megahp(folder, *words)
        assert "sesame" not in done.stdout + done.stderr and "***@127.0.0.1" in done.stdout + done.stderr
    done = megahp(folder, "train", "runs/by-file/config.toml", "log.name=again")
    assert done.returncode == 2 and "lacks the password" in done.stderr
    words = ["--nodes", "1", "--ranks-per-node", "1", f"checkpoint.remote=file{hidden}", "--dry-run"]
    done = megahp(folder, "launch", "run.toml", *words)
    assert done.returncode == 2 and "holds a password" in done.stderr and "sesame" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://user:pass@host/b", "s3://user:***@host/b"),
        ('"s3://AKIA:ab/c\'d@bucket", x@y', '"s3://AKIA:***@bucket", x@y'),
        ("sftp://me@host/x", "sftp://me@host/x"),  # a name is no password
        ("abfs://container@account.host/x", "abfs://container@account.host/x"),
        ("tcp://host:80/a@b", "tcp://host:80/a@b"),  # nor is a port
        ("s3://bucket/a and me@host: 3", "s3://bucket/a and me@host: 3"),
    ],
)
def test_passwords_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown == masked(shown)


def test_tokens_outside_the_vocabulary_are_refused_on_every_layout(folder: Path) -> None:
    with IndexedWriter(str(folder / "wide"), 5000) as writer:
        for _ in range(40):
            writer.add_document([4999] * 200)
    for words in ([], ["--ranks", "2", "parallel.tp=2"]):
        done = megahp(folder, "train", "run.toml", 'data.train=["wide"]', f"log.name=wide{len(words)}", *words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and "token 4999" in done.stderr and "257" in done.stderr, done.stderr


def test_a_run_that_diverged_ends_with_an_error(folder: Path) -> None:
    words = ["optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup=0", "log.name=diverged", "checkpoint.every=1"]
    done = megahp(folder, "train", "run.toml", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "20 steps in a row" in done.stderr and "optimizer.lr" in done.stderr


def test_a_preset_s_value_without_meaning_is_no_obstacle(folder: Path) -> None:
    """llama's rope_theta beside positions without rope: the run can be gone on with, and sampled."""
    shape = (
        "layers=1 width=32 heads=4 kv_heads=2 head_size=8 mlp_width=32 vocab_size=257 positions=alibi preset=llama-3-8b"
    )
    words = ["model.preset=llama-3-8b", "model.positions=alibi", *(f"model.{word}" for word in shape.split())]
    runs.train(folder, "preset", *words, "train.steps=2")
    runs.train(folder, "preset", *words, "train.steps=3", "--resume", "auto")
    assert megahp(folder, "sample", "runs/preset", "--tokens", "3").returncode == 0


def test_preprocessing_mistakes_are_one_line(folder: Path) -> None:
    tool = Path(__file__).parents[1] / "tools/preprocess_data.py"
    (folder / "empty").mkdir()
    (folder / "empty" / "nothing.txt").write_text("")
    for words in (["--input", "nowhere"], ["--input", "empty"], ["--input", "run.toml", "--output", "corpus"]):
        arguments = ["--output", "out", "--tokenizer", "bytes", *words]
        done = subprocess.run(
            [sys.executable, tool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
        assert not (folder / "out.bin").exists()
