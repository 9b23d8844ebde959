"""A run's tokenizer: found, recorded and refused before anything is built."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from distributed.runs import train

from megahp import cli
from megahp.checkpoint.store import write_manifest
from megahp.commands.preprocess import load_tokenizer_once
from megahp.config import Config, resolve
from megahp.convert.tokenizers import bytes_tokenizer
from megahp.data.tokenizer import fingerprint_of
from megahp.errors import UserError
from megahp.evaluate.sample import load_trained
from megahp.parallel.layout import Layout
from megahp.train import prepare as prepare_module
from megahp.train.prepare import prepare

RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["data"]
tokenizer = "tokenizer.json"
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 8
micro_batch = 8
[train]
steps = 2
validation_samples = 0
[log]
tensorboard = false
"""
END = 256
PREFIXING = {
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
}


def tokenizer(file: Path, **model: Any) -> None:
    """Bytes as a byte-level BPE, with three special tokens."""
    tree = bytes_tokenizer(END)
    first = tree["added_tokens"][0]
    tree["added_tokens"] += [first | {"id": 257, "content": "<s>"}, first | {"id": 258, "content": "<turn>"}]
    tree["model"] |= model
    file.write_text(json.dumps(tree))


def preprocess(*words: str) -> None:
    load_tokenizer_once.cache_clear()  # of a process that runs one command
    assert (
        cli.main(["preprocess", "--tokenizer", "tokenizer.json", "--workers", "1", "--input", "in.jsonl", *words]) == 0
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run that was trained on a copy without description, and another tokenizer of the same size."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": f"a document {i} " * 9}) + "\n" for i in range(60)))
    (folder / "run.toml").write_text(RUN)
    tokenizer(folder / "tokenizer.json")
    shutil.copy(folder / "tokenizer.json", folder / "right.json")
    letters = json.loads((folder / "right.json").read_text())["model"]["vocab"]
    tokenizer(folder / "other.json", vocab=letters | {"a": letters["b"], "b": letters["a"]})
    with contextlib.chdir(folder):
        preprocess("--output", "described")
        for name in ("--output ended --eos <turn>", "--output begun --bos 257", "--output endless --no-eod"):
            preprocess(*name.split())
        for suffix in ("bin", "idx"):
            shutil.copy(f"described.{suffix}", f"data.{suffix}")
    train(folder, "done")
    return folder


@pytest.fixture(autouse=True)
def restored(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder):
        yield
    shutil.copy(folder / "right.json", folder / "tokenizer.json")


def prepared(*words: str, resume: bool = False) -> Config:
    return prepare(resolve.load(Path("run.toml"), list(words)).config, Layout(), 1, resume)


def test_a_run_records_its_tokenizer(folder: Path) -> None:
    data = prepared("log.name=new").data
    expected = fingerprint_of("tokenizer.json"), str(END), "257", "eos"
    assert (data.tokenizer_fingerprint, data.eos, data.bos, data.begin) == expected
    for place in ("runs/done/config.toml", "runs/done/checkpoints/step-00000002/state.json"):
        assert data.tokenizer_fingerprint in Path(place).read_text()


def test_f8_another_tokenizer_of_the_same_size_is_refused(folder: Path) -> None:
    """F8: under the same name, where the data has no description: on resume, branch, sample, evaluate, export."""
    assert prepared("log.name=done", resume=True) == prepared("log.name=done", 'data.eos="256"', resume=True)
    shutil.copy("other.json", "tokenizer.json")
    for words, resume in ((["log.name=done"], True), (["train.start_from=runs/done", "log.name=branch"], False)):
        with pytest.raises(UserError, match="is not the one runs/done/checkpoints/step-00000002 was trained with"):
            prepared(*words, resume=resume)
    with pytest.raises(UserError, match="is not the one the model was trained with"):
        load_trained(Path("runs/done"))
    assert cli.main(["sample", "runs/done"]) == cli.main(["evaluate", "runs/done", "run.toml"]) == 2
    words = ["--from", "megahp", "--to", "huggingface", "runs/done", "out"]
    assert cli.main(["convert", *words]) == 2 and not Path("out").exists()
    with pytest.raises(UserError, match="described was written with"):
        prepared('data.train=["data","described"]', "log.name=blend")


def test_f8_the_same_one_saved_again_is_accepted(folder: Path) -> None:
    saved = json.loads(Path("right.json").read_text())
    saved |= {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}
    Path("tokenizer.json").write_text(json.dumps(saved, indent=2))
    before = prepared("log.name=done", resume=True)
    assert before == prepared("log.name=done", 'data.train=["data"]', resume=True)
    prepared("log.name=new", 'data.train=["described"]')


def test_what_an_older_megahp_wrote_is_accepted(folder: Path) -> None:
    """A checkpoint without tokenizer; data whose description hashes the tokenizer's file."""
    shutil.copytree("runs/done", "runs/old")
    place = Path("runs/old/checkpoints/step-00000002")
    state = json.loads((place / "state.json").read_text())
    for key in ("tokenizer_fingerprint", "eos", "bos", "begin"):
        del state["config"]["data"][key]
    (place / "state.json").write_text(json.dumps(state))
    (place / "manifest.json").unlink()
    write_manifest(place)
    assert prepared("log.name=old", resume=True).data.tokenizer_fingerprint == fingerprint_of("tokenizer.json")
    prepared("log.name=new", "train.start_from=runs/old", "train.steps=3")
    description = json.loads(Path("described.json").read_text())
    del description["bos"]
    description["tokenizer_fingerprint"] = hashlib.sha256(Path("tokenizer.json").read_bytes()).hexdigest()
    for suffix in ("bin", "idx"):
        shutil.copy(f"described.{suffix}", f"older.{suffix}")
    Path("older.json").write_text(json.dumps(description))
    prepared("log.name=new", 'data.train=["older"]')


def test_a_run_keeps_what_its_settings_meant_before_they_could_say(folder: Path) -> None:
    """Softmax over padding rows, and SmuPar's weight decay with width; new runs leave both out."""
    shutil.copytree("runs/done", "runs/before")
    place = Path("runs/before/checkpoints/step-00000002")
    state = json.loads((place / "state.json").read_text())
    assert state["config"]["model"].pop("padding") == "masked"
    assert state["config"]["parameterization"].pop("weight_decay") == "width"
    smupar = {"parameterization.name": "smupar"}
    state["config"]["parameterization"] |= {"name": "smupar"}
    (place / "state.json").write_text(json.dumps(state))
    (place / "manifest.json").unlink()
    write_manifest(place)

    def chosen(*words: str, resume: bool = False) -> tuple[str, str]:
        config = prepared(*words, *(f"{key}={value}" for key, value in smupar.items()), resume=resume)
        return config.model.padding, config.parameterization.weight_decay

    assert chosen("log.name=before", resume=True) == ("included", "width")
    branch = ("log.name=new", "train.start_from=runs/before", "train.steps=3")
    assert chosen(*branch) == ("included", "width")
    assert chosen(*branch, "model.padding=masked") == ("masked", "width")
    assert chosen("log.name=new") == ("masked", "base")
    for key, value in (("model.padding", "masked"), ("parameterization.weight_decay", "base")):
        with pytest.raises(UserError, match=f"{key} = '{value}' but .* was trained with"):
            chosen("log.name=before", f"{key}={value}", resume=True)
    assert prepared("log.name=new", "parameterization.name=sp").parameterization.weight_decay == ""


def test_a_run_keeps_its_sample_order(folder: Path) -> None:
    """Of a run that names none, since it is older than the choice; a branch keeps that of the run that it is from, and
    new runs have the new one, from weights alone too."""
    for source, name in (("done", "kept"), ("done", "unnamed"), ("done", "weights")):
        shutil.copytree(f"runs/{source}", f"runs/{name}")
        place = Path(f"runs/{name}/checkpoints/step-00000002")
        state = json.loads((place / "state.json").read_text())
        if name != "kept":
            del state["config"]["data"]["order"]
        if name == "weights":
            state["data"] = None
        (place / "state.json").write_text(json.dumps(state))
        (place / "manifest.json").unlink()
        write_manifest(place)
    for name, order in (("kept", "keyed"), ("unnamed", "drawn")):
        assert prepared(f"log.name={name}", resume=True).data.order == order
        prepared(f"log.name={name}", f"data.order={order}", resume=True)
        other = {"keyed": "drawn", "drawn": "keyed"}[order]
        with pytest.raises(UserError, match=f"data.order = '{other}' but runs/{name}/.* was trained with '{order}'"):
            prepared(f"log.name={name}", f"data.order={other}", resume=True)
    for name, order in (("kept", "keyed"), ("unnamed", "drawn"), ("weights", "keyed")):
        words = "log.name=new", f"train.start_from=runs/{name}", "train.steps=3"
        assert prepared(*words).data.order == order
        assert prepared(*words, "data.order=drawn").data.order == "drawn"
    assert prepared("log.name=new").data.order == "keyed"


def test_a_run_keeps_its_dtype(folder: Path) -> None:
    """The one it was trained in, where the run file leaves it to the device, whatever that is now; so does a branch."""
    assert prepared("log.name=new", "train.dtype=auto").train.dtype == "auto"  # until the ranks have met
    for name, words in (("done", ()), ("new", ("train.start_from=runs/done", "train.steps=3"))):
        resumes = name == "done"
        assert prepared(f"log.name={name}", "train.dtype=auto", *words, resume=resumes).train.dtype == "float32"
        with pytest.raises(UserError, match="train.dtype = 'bfloat16' but runs/done/.* was trained with 'float32'"):
            prepared(f"log.name={name}", "train.dtype=bfloat16", *words, resume=resumes)


def test_bfloat16_without_instructions_is_a_warning(folder: Path) -> None:
    for has, words, count in ((False, "bfloat16", 1), (True, "bfloat16", 0), (False, "auto", 0)):
        lines: list[str] = []
        config = resolve.load(Path("run.toml"), ["log.name=new", f"train.dtype={words}", "train.device=cpu"]).config
        with mock.patch.object(prepare_module, "cpu_has_bfloat16", lambda has=has: has):
            prepare(config, Layout(), 1, resume=False, warn=lines.append)
        assert sum("set train.dtype=auto" in line for line in lines) == count


def test_the_end_token_of_the_data_is_the_runs(folder: Path) -> None:
    """--eos is in the description, and in the run that reads it; another one is refused, also of another source."""
    assert json.loads(Path("ended.json").read_text())["eod"] == 258
    ended = 'data.train=["ended"]'
    assert (
        prepared("log.name=new", ended).data.eos == prepared("log.name=new", ended, "data.eos=<turn>").data.eos == "258"
    )
    for words in ((ended, 'data.eos="256"'), ('data.train=["described","ended"]',)):
        with pytest.raises(UserError, match='data.eos is token 256 and ended was written with 258; set data.eos="258"'):
            prepared("log.name=new", *words)
    with pytest.raises(UserError, match="data.eos = '258' but runs/done/.* was trained with '256'"):
        prepared("log.name=done", "data.eos=<turn>", resume=True)


@pytest.mark.parametrize(
    ("name", "begin"), [("described", "eos"), ("data", "eos"), ("begun", "bos"), ("endless", "none")]
)
def test_how_documents_begin_is_seen_in_the_data(folder: Path, name: str, begin: str) -> None:
    """With or without a description."""
    assert prepared("log.name=new", f'data.train=["{name}"]').data.begin == begin


def test_a_begin_token_that_the_data_lacks_is_a_warning(folder: Path) -> None:
    warnings: list[str] = []
    for begin in ('"bos"', '"eos"'):
        config = resolve.load(Path("run.toml"), ["log.name=new", f"data.begin={begin}"]).config
        assert prepare(config, Layout(), 1, False, warnings.append).data.begin == "eos"
    prefixing = {"type": "Sequence", "processors": [{"type": "TemplateProcessing", **PREFIXING}]}
    Path("tokenizer.json").write_text(
        json.dumps(json.loads(Path("right.json").read_text()) | {"post_processor": prefixing})
    )
    config = resolve.load(Path("run.toml"), ["log.name=new"]).config
    assert prepare(config, Layout(), 1, False, warnings.append).data.begin == "eos"
    assert len([line for line in warnings if "begin token" in line]) == 1
