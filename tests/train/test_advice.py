"""What is said of a run before it begins, though it can be trained."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from megahp.cli import main
from megahp.config import Config, resolve
from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.data.loader import TrainingData
from megahp.errors import UserError
from megahp.parallel.device import cores_here
from megahp.parallel.layout import Layout
from megahp.train.advice import advice, beyond_cpus
from megahp.train.prepare import open_data

LENGTH, DOCUMENT = 16, 100  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 10,000 and 1,000 tokens, a tenth of which is held out."""
    folder = tmp_path_factory.mktemp("advice")
    for name, documents in (("large", 100), ("small", 10)):
        with IndexedWriter(str(folder / name), 257) as writer:
            for number in range(documents):
                writer.add_document([number % 256] * DOCUMENT)
    return folder


def config_of(folder: Path, *words: str) -> Config:
    tree = {
        "model": {"vocab_size": 257, "layers": 1, "width": 16, "heads": 1},
        "data": {"train": [str(folder / "large"), str(folder / "small")], "validation_fraction": 0.1},
        "train": {"tokens": 20_000, "validation_samples": 8},
        "batch": {"global_batch": 10},
    }
    tree["data"] |= {"sequence_length": LENGTH, "cache": str(folder / "cache")}
    return resolve.resolve([("run.toml", tree), ("command line", resolve.parse_overrides(words))]).config


def said(folder: Path, *words: str, ranks: int = 1, device: str = "cpu", begin: int = 0) -> list[str]:
    config = config_of(folder, *words)
    return list(advice(config, open_data(config), ranks, device, begin))


def test_nothing_is_said_of_a_run_as_it_should_be(folder: Path) -> None:
    assert said(folder) == said(folder, "train.tokens=39_000", "train.validate_every=200") == []


def test_sparse_matrices_need_the_factors_of_density(folder: Path) -> None:
    sparse = ("sparsity.method=static", "sparsity.density=0.25")
    (line,) = said(folder, *sparse)
    assert "too low for sparse matrices" in line and line.endswith("run with parameterization.scale_density=true")
    (line,) = said(folder, *sparse, "parameterization.name=mup")
    assert line.endswith("begin a run with parameterization.name=smupar")
    for rules in ("name=smupar", "name=sp", "scale_density=true"):
        assert said(folder, *sparse, f"parameterization.{rules}") == []
    for words in (("method=rigl", "density=0.25"), ("method=static", "density=1")):
        assert said(folder, *(f"sparsity.{word}" for word in words)) == []


def test_sides_that_matrix_units_cannot_load_are_told_on_gpus(folder: Path) -> None:
    words = ("train.tokens=2000", "checkpoint.every=1", "model.mlp_width=1364")
    (line,) = said(folder, *words, device="cuda")
    assert line.startswith("model.mlp_width = 1364 is not a multiple of 8") and line.endswith("1360, 1368")
    (line,) = said(folder, *words, "parallel.tp=2", "model.heads=2", "model.mlp_width=1368", device="cuda", ranks=2)
    assert "model.mlp_width / parallel.tp = 684" in line
    assert said(folder, *words) == said(folder, *words, "model.mlp_width=1360", device="cuda") == []


def test_a_router_that_cannot_learn_is_told(folder: Path) -> None:
    """The weight of the only expert, over the sum of one, is 1 whatever the router says."""
    words = ("model.experts=4", "model.experts_per_token=1")
    (line,) = said(folder, *words)
    assert "the router gets no gradient from the loss; set model.router_normalize=false" in line
    assert said(folder, *words, "model.router_normalize=false") == said(folder, "model.experts=4") == []


def test_epochs_are_counted_for_each_source(folder: Path) -> None:
    (line,) = said(folder, "train.tokens=40_000")
    assert f"{folder / 'large'!s}' is read 4.0 times in 40k tokens, and 1 other prefixes more than 4 times" in line
    assert "more than 4 times" in line and "arXiv 2305.16264" in line
    (line,) = said(folder, "data.weights=[1, 1]", "train.tokens=10_000")
    assert f"{folder / 'small'!s}' is read 5.6 times in 10k tokens; data" in line
    assert said(folder, "data.weights=[1, 1]", "train.tokens=10_000", "train.steps=40") == []
    assert said(folder, "train.tokens=50_000", begin=40_000) == []


def test_epochs_are_those_of_the_samples_that_are_dealt(folder: Path) -> None:
    """Counted over the stages of a run whose mixture changes, from a checkpoint's tokens on."""
    words = ("data.weights=[1, 3]", 'data.mixtures=["8000:1,0"]', "train.tokens=16_000")
    config = resolve.resolve(
        [
            ("run.toml", {"data": {"train": [str(folder / "large"), str(folder / "small")]}}),
            ("", {"data": {"sequence_length": LENGTH, "cache": str(folder / "cache"), "validation_fraction": 0.1}}),
            ("", {"model": {"vocab_size": 257}, "batch": {"global_batch": 10}}),
            ("", resolve.parse_overrides(words)),
        ]
    ).config
    data = open_data(config)
    found = np.array(list(data.epochs(4000, 16_000).values()))
    assert found * [9000, 900] == pytest.approx(dealt(data, range(250, 1000)), abs=2 * LENGTH)


def dealt(data: TrainingData, samples: range) -> list[int]:
    """Training tokens of each source in these samples of a run whose second stage begins at sample 500."""
    counts = np.zeros(2, int)
    for sample in samples:
        stage, first = (0, 0) if sample < 500 else (1, 500)
        counts[data._blends[stage].locate(np.array([sample - first]))[0][0]] += LENGTH
    return counts.tolist()


@pytest.mark.parametrize(
    ("every", "ranks", "device", "told"),
    [
        (0, 1, "cpu", "checkpoint.every = 0: no checkpoint before the end, and a fault would cost 45 min"),
        (1000, 1, "cpu", "checkpoint.every = 1000"),  # of 218 steps
        (218, 1, "cpu", ""),
        (0, 2, "cpu", ""),
        (0, 1, "cuda", ""),
    ],
)
def test_a_long_run_without_checkpoints(folder: Path, every: int, ranks: int, device: str, told: str) -> None:
    """6 x 12 x 4096^2 x 64 FLOPs a token, 3.5e4 tokens: 2.7e15, at 1e12 a second."""
    size = ("model.width=4096", "model.heads=32", "model.layers=64", "model.mlp_width=16384", "model.activation=gelu")
    lines = said(folder, *size, "train.tokens=35_000", f"checkpoint.every={every}", ranks=ranks, device=device)
    assert len(lines) == bool(told) and told in "".join(lines)


def test_validation_that_cannot_happen(folder: Path) -> None:
    (line,) = said(folder, "train.validate_every=126")
    assert "train.validate_every = 126: the run has at most 125 steps" in line
    assert said(folder, "train.steps=5", "train.validate_every=6") == []  # a run that is only tried
    assert said(folder, "train.validation_samples=0", "data.validation_fraction=0", "train.tokens=30_000") == []


def test_more_validation_than_is_held_out_is_refused_with_what_would_do(folder: Path) -> None:
    """F10: ten documents of the large source and one of the small hold 62 and 6 windows."""

    def windows(*words: str) -> int:
        with contextlib.chdir(folder):
            data = open_data(config_of(folder, *words))
            return len(data.validation(int(words[0].partition("=")[2])).batch.tokens)

    weights = "data.weights=[10, 1]"
    assert windows("train.validation_samples=68", weights) == 68
    with pytest.raises(
        UserError, match="= 69 takes 63 sequences of .*large.* holds out only 62; set it to 68, or"
    ) as error:
        windows("train.validation_samples=69", weights)
    enough = re.findall(r"or raise it to about ([\d.]+)", str(error.value))[0]
    assert windows("train.validation_samples=69", weights, f"data.validation_fraction={enough}") == 69
    with pytest.raises(UserError, match="= 1000 takes 91 sequences of .*small.*only 6; set it to 68, or add data"):
        windows("train.validation_samples=1000", weights)


def test_what_is_too_much_for_this_machine() -> None:
    def of(layout: Layout, here: int, **train: float) -> str:
        model = {"vocab_size": 257, "layers": 32, "width": 4096, "heads": 32}
        config = resolve.resolve([("run.toml", {"model": model, "train": train})]).config
        return beyond_cpus(config, layout, here)

    long = of(Layout(), 1, tokens=1e9)
    days = float(re.findall(r"about ([\d,]+) days", long)[0].replace(",", ""))
    operations = 1e9 * 6 * 6.5e9
    assert days == pytest.approx(operations / (cores_here() * 5e10 * 86400), rel=0.3)
    assert "6.4" in long and "GB of memory" in long
    shared = of(Layout(dp_shard=10**6), 1, tokens=1e9)  # a millionth of it on each of a million machines
    assert "memory" not in shared and "days" not in shared


def test_launch_and_train_say_it_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "run.toml").write_text(
        "[model]\nlayers = 1\nwidth = 16\nheads = 1\n[data]\ntrain = ['small']\nsequence_length = 16\n"
        "validation_fraction = 0.1\n[batch]\nglobal_batch = 4\nmicro_batch = 2\n"
        "[train]\ntokens = 6_400\nvalidation_samples = 4\ndevice = 'cpu'\n[log]\ntensorboard = false\n"
    )
    told = "megahp: warning: data.train: 'small' is read 7.1 times"
    assert main(["launch", "run.toml", "--nodes", "2", "--dry-run"]) == 0
    assert capfd.readouterr().err.count(told) == 1
    assert main(["train", "run.toml", "--ranks", "2", "resilience.stop_after=0.001"]) == 75
    assert capfd.readouterr().err.count(told) == 1
    assert main(["launch", "run.toml", "--nodes", "2", "--dry-run"]) == 0  # it would go on from the checkpoint
    assert told not in capfd.readouterr().err


def test_the_default_number_of_validation_samples_is_lowered_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """F10: to what keeps the mixture's weights; of 64, the small source would give 51, and holds out 6."""
    monkeypatch.chdir(folder)
    (folder / "default.toml").write_text(
        "[model]\nlayers = 1\nwidth = 16\nheads = 1\n[data]\ntrain = ['large', 'small']\nweights = [0.2, 0.8]\n"
        "sequence_length = 16\nvalidation_fraction = 0.1\n[batch]\nglobal_batch = 4\nmicro_batch = 2\n"
        "[train]\ntokens = 6_400\ndevice = 'cpu'\n[log]\ntensorboard = false\nname = 'default'\n"
    )
    assert main(["train", "default.toml", "--ranks", "2", "train.steps=1"]) == 0
    told = capfd.readouterr()
    assert told.err.count("warning: train.validation_samples = 8 in place of the default, 64: ") == 1
    assert "validated on 2 of large, 6 of small" in told.out
    assert main(["train", "default.toml", "log.name=asked", "train.validation_samples=65"]) == 2
    assert "train.validation_samples = 65 takes 52 sequences of 'small'" in capfd.readouterr().err


def test_more_sources_than_files_may_be_open(folder: Path) -> None:
    """Each keeps its file open; the limit is raised as far as the system allows."""
    many = [str(folder / f"part-{number}") for number in range(200)]
    for number, prefix in enumerate(many):
        with IndexedWriter(prefix, 257) as writer:
            for document in range(2):
                writer.add_document([number, document] * LENGTH)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
    try:
        config = config_of(folder, f"data.train={many}")
        assert open_data(config).batch(np.arange(400), False).tokens[:, 0].unique().numel() > 190
        with pytest.raises(UserError, match="Too many open files.*raise ulimit -n"):
            resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
            kept = [IndexedDataset(prefix) for prefix in many]
            assert kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
