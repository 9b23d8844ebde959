"""The estimate of training's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus
from distributed import world
from distributed.training import Training, settings_of

from megahp.config import resolve
from megahp.scaling.memory import PER_PARAMETER, PROCESS, checkpoint_bytes, training_bytes

WORDS = [
    "model.layers=8",
    "model.width=256",
    "model.heads=4",
    "model.positions=alibi",
    "data.sequence_length=256",
    "batch.micro_batch=16",
    "batch.global_batch=16",
    "train.steps=1",
    "train.dtype=bfloat16",
    "train.validation_samples=0",
    "log.tensorboard=false",
    "data.validation_fraction=0",
    "train.device=cpu",
]


def test_the_parts(tmp_path: Path) -> None:
    def of(*words: str, shards: int = 1) -> float:
        tree = {"model": {"vocab_size": 257}}
        overrides = resolve.parse_overrides([*WORDS, *words])
        return training_bytes(resolve.resolve([("run.toml", tree), ("command line", overrides)]).config, shards)

    whole, bias = of("model.positions=rope"), 2 * 4 * 4 * 256**2
    assert of() == whole + bias and of("compute.recompute=full") < of()
    assert of("model.positions=rope", "train.dtype=float32") - whole == 34 * 16 * 256 * 8 * 256
    weights = whole - of("model.positions=rope", shards=2)
    assert 2 * weights / PER_PARAMETER == pytest.approx(8 * 12 * 256**2, rel=0.1)
    saved = whole - of("model.positions=rope", "optimizer.name=muon")  # a moment, and its copy
    assert saved == pytest.approx(8 * 8 * 12 * 256**2, rel=0.05)
    low_rank = whole - of("model.positions=rope", "optimizer.name=dct", "optimizer.rank=64")
    assert low_rank == pytest.approx(1.5 * saved)  # of both moments three quarters
    assert of("model.positions=rope", "parallel.cp=2") < whole
    assert of("model.positions=rope", "model.attention_softcap=30") - whole == 6 * 8 * 4 * 256 * 16 * 256
    experts = ("model.experts=8", "model.experts_per_token=2", "model.expert_width=512")
    rows = of("model.positions=rope", *experts) - of("model.positions=rope", *experts, "batch.micro_batch=8")
    assert rows == (34 * 256 + 2 * 2 * (2 * 256 + 3 * 512)) * 8 * 256 * 8


def saved_bytes(words: tuple[str, ...]) -> tuple[int, float]:
    """What weights and moments take, and the estimate."""
    training = Training(settings_of("moe", *words))
    saved = [*training.engine.trained.values(), *training.optimizer.state().values()]
    return sum(each.numel() * 4 for each in saved if each.is_floating_point()), checkpoint_bytes(training.config)


@pytest.mark.parametrize("words", [(), ("optimizer.name=muon",), ("optimizer.name=galore", "optimizer.rank=8")])
def test_a_checkpoint_takes_as_much(words: tuple[str, ...]) -> None:
    saved, estimated = world.run(1, saved_bytes, words)[0]
    assert estimated == pytest.approx(saved, rel=0.05)  # of padding rows of the vocabulary


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kB")
def test_a_run_takes_about_as_much(tmp_path: Path) -> None:
    """The peak of a real process, a few hundred MB above Python and torch."""
    write_corpus(tmp_path / "corpus", 0.05)
    (tmp_path / "run.toml").write_text('[data]\ntrain = ["corpus"]\n')
    command = [sys.executable, "-m", "megahp", "train", "run.toml", *WORDS]
    code = f"import subprocess, resource, sys; subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    peak = int(subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True))
    config = resolve.load(tmp_path / "run.toml", [*WORDS, "model.vocab_size=257"]).config
    assert training_bytes(config) == pytest.approx(peak, rel=0.25) and peak > 1.3 * PROCESS
