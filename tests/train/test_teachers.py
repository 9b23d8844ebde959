"""Distillation: the loss and its gradient from whole logits, resumption, replay, and what is refused. That layouts do
the same is test_layouts.py's; that slices of the vocabulary do, test_cross_entropy.py's."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus import write_corpus
from distributed import runs, world
from distributed.training import Training, settings_of, write_model

from megahp import checkpoint
from megahp.checkpoint.shards import Tensors
from megahp.config import DistillConfig
from megahp.diagnose.verify import shrink_config
from megahp.errors import UserError
from megahp.evaluate.sample import single_rank_model
from megahp.log.replay import replay
from megahp.parallel.layout import fit
from megahp.parallel.parameters import model_state

RUN = (
    *('data.train=["corpus"]', "model.vocab_size=300", "data.validation_fraction=0.1", "log.tensorboard=false"),
    *("train.validation_samples=4", "batch.policy=measured", "batch.table=[]", "batch.calibrate_every=2"),
)
WEIGHT = 0.7


def words_of(teachers: list[str], weight: float = WEIGHT) -> tuple[str, str]:
    return f"distill.teachers={json.dumps(teachers)}", f"distill.weight={weight}"


def by_hand(folder: Path) -> dict[str, Any]:
    """Loss, gradients and evaluated loss of a step: ours, and torch's kl_div and cross_entropy of whole logits."""
    words = ("train.dtype=float64", "model.vocab_size=90")
    teachers = [write_model(folder / name, name, *words) for name in ("gemma", "moe")]
    before = [checkpoint.fingerprint(Path(name)) for name in teachers]
    config = settings_of("alibi", *words, *words_of(teachers))  # which masks documents
    ours, plain = Training(config), Training(settings_of("alibi", *words)).engine.stages[0]
    others = []
    for name in teachers:
        settings = checkpoint.settings_of(Path(name))
        others.append(single_rank_model(settings))
        checkpoint.load(Path(name), model_state(others[-1]))
    plan = ours.next_step()
    assert plan
    total, evaluated = 0.0, 0.0
    for batch in ours.batches(plan):
        x, y = batch.tokens[:, :-1], batch.tokens[:, 1:]
        with torch.no_grad():
            mean = torch.stack([other(x, None, batch.documents)[..., :90].softmax(-1) for other in others]).mean(0)
        learned = plain(x, None, batch.documents)[..., :90].log_softmax(-1)
        hard = F.nll_loss(learned.flatten(0, 1), y.flatten(), reduction="sum")
        soft = F.kl_div(learned, mean, reduction="sum") + torch.special.entr(mean).sum()
        loss = (WEIGHT * soft + (1 - WEIGHT) * hard) / plan.tokens
        loss.backward()
        total += loss.item()
        evaluated += hard.item()
    groups = torch.ones(len(batch.tokens), 1, dtype=torch.bool)
    found = sum(ours.engine.evaluate(batch, groups).item() for batch in ours.batches(plan))
    step = ours.step()
    return {
        "loss": (step["measured"]["loss"], total),
        "grads": (step["grads"], {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}),
        "evaluated": (found, evaluated),
        "same": before == [checkpoint.fingerprint(Path(name)) for name in teachers],
    }


def train(folder: Path, name: str, steps: int, *words: str, resume: bool = False) -> dict[str, Any]:
    with contextlib.chdir(folder):
        config = runs.go(settings_of("llama", *RUN, f"log.name={name}", f"train.steps={steps}", *words), resume)
        path = checkpoint.find(config.directory)
        differences = replay(config.directory).differences
        tensors = dict(Tensors(path).items())
        return {"distill": config.distill, "tensors": tensors, "replay": differences}


def refused(folder: Path, *arguments: Any, **options: Any) -> str:
    try:
        train(folder, *arguments, **options)
    except UserError as error:
        return str(error)
    return ""


def in_runs(folder: Path) -> dict[str, Any]:
    write_corpus(folder / "corpus", 0.05)
    alone = train(folder, "first", 2)
    train(folder, "second", 2, "train.seed=2")
    with contextlib.chdir(folder):
        others = {
            "vocabulary": write_model(Path("other"), "llama", "model.vocab_size=301"),
            "short": write_model(Path("short"), "llama", "model.vocab_size=300", "data.sequence_length=8"),
            "float64": write_model(Path("double"), "llama", "model.vocab_size=300", "train.dtype=float64"),
            "tokenizer": write_model(
                Path("tokenizer"), "llama", "model.vocab_size=300", f"data.tokenizer_fingerprint={'0' * 64}"
            ),
        }
    both = words_of(["runs/first", "runs/second"])
    found = {
        "alone": alone,
        "whole": train(folder, "whole", 6, *both),
        "cut": train(folder, "cut", 3, *both),
        "resumed": train(folder, "cut", 6, *both, resume=True),
    }
    found["refused"] = {
        "other teachers": refused(folder, "whole", 8, *words_of(["runs/first"]), resume=True),
        "no teachers": refused(folder, "whole", 8, resume=True),
        "another weight": refused(folder, "whole", 8, *words_of(["runs/first", "runs/second"], 0.5), resume=True),
        "fingerprints": refused(folder, "new", 3, *both, 'distill.fingerprints=["0", "1"]'),
        "nothing there": refused(folder, "new", 3, *words_of(["runs/none"])),
        **{name: refused(folder, "new", 3, *words_of([path])) for name, path in others.items()},
    }
    return found


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world.run(1, by_hand, tmp_path_factory.mktemp("hand"))[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world.run(1, in_runs, tmp_path_factory.mktemp("runs"))[0]


def test_a_step_is_that_of_whole_logits(hand: dict[str, Any]) -> None:
    ours, theirs = hand["loss"]
    assert ours == pytest.approx(theirs, rel=1e-12)
    got, wanted = hand["grads"]
    assert got.keys() == {name for name in wanted if not name.endswith("probe")}
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-13)


def test_evaluation_is_of_the_data(hand: dict[str, Any]) -> None:
    ours, theirs = hand["evaluated"]
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_teachers_stay_as_they_are(hand: dict[str, Any], found: dict[str, Any]) -> None:
    """On the disk; and a student's checkpoint holds the student alone."""
    assert hand["same"]
    names = {name for name in found["whole"]["tensors"] if name.startswith("model.")}
    assert names == {name for name in found["alone"]["tensors"] if name.startswith("model.")}


def test_it_resumes_to_the_bit(found: dict[str, Any]) -> None:
    whole, resumed = found["whole"]["tensors"], found["resumed"]["tensors"]
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)


def test_batch_decisions_are_replayed(found: dict[str, Any]) -> None:
    assert found["whole"]["replay"] == found["resumed"]["replay"] == []


def test_a_run_names_its_teachers_checkpoints(found: dict[str, Any]) -> None:
    distill = found["whole"]["distill"]
    assert distill.teachers == tuple(f"runs/{name}/checkpoints/step-00000002" for name in ("first", "second"))
    assert [len(each) for each in distill.fingerprints] == [64, 64] and len(set(distill.fingerprints)) == 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other teachers", "was trained with other distill.teachers, runs/first"),
        ("no teachers", "was trained with other distill.teachers, runs/first"),
        ("another weight", "distill.weight = 0.5 but"),
        ("fingerprints", "distill.fingerprints are of other checkpoints than distill.teachers; name those"),
        ("nothing there", "runs/none is neither a checkpoint nor a run directory that has one"),
        ("vocabulary", "has 301 token ids and the run 300; set model.vocab_size=301, or name another"),
        ("short", "has read at most 8 tokens at a time and the run has sequences of 16; shorten them"),
        ("float64", "has weights for train.dtype = 'float64', not 'float32'; use one, or name another"),
        ("tokenizer", "is not the one tokenizer/checkpoints/step-00000001 was trained with"),
    ],
)
def test_what_does_not_go_together_is_one_line(found: dict[str, Any], what: str, words: str) -> None:
    assert words in found["refused"][what] and "\n" not in found["refused"][what]


def test_a_layout_is_verified_without_teachers() -> None:
    """They have the sizes of the run, and not of its small model."""
    config = settings_of("llama", *words_of(["runs/first"]))
    assert shrink_config(config, fit(config.parallel, 1)).distill == DistillConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel.pp=2",), "distill.teachers = ['runs/first'] is not supported with parallel.pp = 2"),
        (("parallel.ep=2", "model.experts=4"), "is not supported with parallel.ep = 2; set parallel.ep=1"),
        (("parallel.engine=deepspeed",), "is not supported with parallel.engine = 'deepspeed'"),
        (("distill.teachers=[]", "distill.weight=0.5"), "has no effect with distill.teachers = []"),
        (("distill.weight=0",), "distill.weight = 0.0 (test) must be above 0"),
    ],
)
def test_settings_that_do_not_combine(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        settings_of("llama", 'distill.teachers=["runs/first"]', *words)
