"""Damaged and hostile files in the place of every kind that megahp reads: each command ends at once and in words, runs
nothing of them, and what it refuses it has not begun."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard
from corpus import write_corpus
from fuzz import forked
from fuzz.files import WAYS, reseal, spoil
from fuzz.run_files import RUN
from tokenizers import Tokenizer as Fast
from tokenizers import models

from megahp.convert.tokenizers import bytes_tokenizer
from megahp.data.tokenizer import train_sentencepiece
from megahp.errors import UserError
from megahp.exit_codes import NOT_CHECKED
from megahp.recipe.law_file import LawFile, write
from megahp.scaling.laws import PowerLaw

CPU = 2.0  # seconds above what the command takes with good files
CHECKPOINT = "runs/done/checkpoints/step-00000003/"
TRAIN = "train run.toml log.name=new"
RESUME = "train run.toml log.name=done train.steps=4 --resume auto"
TEXT = "preprocess --tokenizer bytes --workers 1 --output new --input"


class Kind(NamedTuple):
    """Files of a kind, and what reads them; a command that ends with 0 may have written what it is for."""

    files: list[str]
    commands: list[str]


SECRET, LATEST = ".megahp-secret", "latest_checkpointed_iteration.txt"
SHARD, INDEX = "model-00001-of-*.safetensors", "{}.safetensors.index.json"
CONVERT = "convert --from {} --to megahp {} new --tokenizer bytes"
EXPORT = "convert --from megahp --to huggingface runs/done new"
WIDER = "extend-vocabulary runs/done new --rule mean --tokenizer wider.json"
SWEEP = "train.steps=2 --grid optimizer.lr=0.01,0.02 --family model.layers=1,2 --seeds 1 --out sweep"
LOGS = [f"runs/done/{name}" for name in ("metrics.jsonl", "events.jsonl", "baselines.json", "config.toml")]
KINDS = {
    "data": Kind(["corpus.bin", "corpus.idx"], [TRAIN, RESUME]),
    "a drawn sample order": Kind(["cache/order-*.npy"], [f"{TRAIN} train.seed=2 data.order=drawn"]),
    "data with a description": Kind(["told.bin", "told.idx", "told.json"], [f"{TRAIN} data.train=['told']"]),
    "tokenizer": Kind(["tok.model", "tok.json"], ["preprocess --tokenizer {} --workers 1 --output new --input text"]),
    "larger tokenizer": Kind(["wider.json"], [WIDER]),
    "text": Kind(
        ["text/a.txt", "text/b.jsonl", "text/c.jsonl.gz", "text/d.jsonl.zst"], [f"{TEXT} {{}}", "evaluate runs/done {}"]
    ),
    "text for a check": Kind(["text/a.txt"], [f"{EXPORT} --text {{}}", f"{WIDER} --text {{}}"]),
    "checkpoint": Kind(
        [CHECKPOINT + name for name in ("state.json", "index.json", "manifest.json", "shard-00000.safetensors")],
        [
            RESUME,
            f"{TRAIN} train.start_from=runs/done",
            "sample runs/done --tokens 2",
            "checkpoint ls runs/done",
            "checkpoint verify runs/done",
            "checkpoint diff runs/done runs/other",
            "checkpoint prune runs/done --keep 1",
            EXPORT,
            WIDER,
            "evaluate runs/done text/a.txt",
            "measure noise-scale runs/done --batches 2",
            "launch run.toml log.name=done train.steps=4 --nodes 1 --dry-run",
        ],
    ),
    "log": Kind(
        [*LOGS, "runs/done/sample.txt", "runs/done/.lock"],
        ["report runs/done", "report runs/other runs/done", "status runs/done", "runs", "replay runs/done", RESUME],
    ),
    "log of a job": Kind(LOGS[:2], ["requeue 1 run.toml log.name=done"]),
    "logs of a sweep": Kind(
        [f"sweep/all/2/0.02/1/{name}" for name in ("metrics.jsonl", "events.jsonl", "config.toml")],
        [f"transfer-sweep run.toml {SWEEP} --show", "fit runs.jsonl sweep --loss --out new.toml"],
    ),
    "run settings": Kind(["runs/done/config.toml"], ["sample runs/done --tokens 2", "measure noise-scale runs/done"]),
    "of transformers": Kind(
        ["hf/config.json", "hf/model.safetensors", "hf/megahp.json", "hf/megahp.safetensors", "hf/tokenizer.json"],
        [CONVERT.format("huggingface", "hf")],
    ),
    "of transformers, in parts": Kind(
        [f"parts/{INDEX.format('model')}", f"parts/{INDEX.format('megahp')}", f"parts/{SHARD}"],
        [CONVERT.format("huggingface", "parts")],
    ),
    "of megatron": Kind(
        [f"mcore/{name}" for name in ("release/.metadata", "release/common.pt", "release/__0_0.distcp", LATEST)],
        [CONVERT.format("megatron", "mcore")],
    ),
    "of megatron's legacy": Kind(
        [f"legacy/{name}" for name in ("release/mp_rank_00/model_optim_rng.pt", LATEST)],
        [CONVERT.format("megatron-legacy", "legacy") + " --allow-pickle"],
    ),
    "law": Kind(["law.toml"], ["recipe --params 1e8 --tokens 2e9 --law {}"]),
    "loss law": Kind(["loss.toml"], ["recipe --params 1e8 --tokens 2e9 --loss-law {}"]),
    "table of runs": Kind(["runs.jsonl"], ["fit {} --loss --out new.toml"]),
    "run file": Kind(
        ["run.toml"], ["config {}", "recipe --base {} --params 1e8 --tokens 2e9", "launch {} --nodes 1 --dry-run"]
    ),
    "nodes": Kind(
        ["bad-nodes.txt"],
        ["launch run.toml --nodes 1 --dry-run --exclude {}", "check-cluster --device cpu --exclude-file {}"],
    ),
    "secret": Kind([SECRET], ["check-cluster --device cpu --patience 1"]),
}
CASES = [
    (file, command.replace("{}", file)) for kind in KINDS.values() for file in kind.files for command in kind.commands
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind, all good."""
    folder = tmp_path_factory.mktemp("good")
    write_corpus(folder / "corpus", 0.02)
    (folder / "run.toml").write_text(RUN + "[checkpoint]\nevery = 1\nkeep = 9\n")
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("the quick brown fox jumps over the lazy dog, again and again. " * 40)
    lines = "".join(json.dumps({"text": f"text number {number} of a few words"}) + "\n" for number in range(40))
    (folder / "text/b.jsonl").write_text(lines)
    with gzip.open(folder / "text/c.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "text/d.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    train_sentencepiece([lines, (folder / "text/a.txt").read_text()] * 4, folder / "tok.model", 320)
    fast = Fast(models.BPE({"<|endoftext|>": 0, **{chr(32 + number): number + 1 for number in range(95)}}, []))
    fast.add_special_tokens(["<|endoftext|>"])
    fast.save(str(folder / "tok.json"))
    wider = bytes_tokenizer(256)
    wider["model"]["vocab"] |= {"<|endoftext|>": 256, "th": 257, "the": 258}
    wider["model"]["merges"] = [["t", "h"], ["th", "e"]]
    (folder / "wider.json").write_text(json.dumps(wider))
    write(
        folder / "law.toml",
        LawFile(
            timescale=PowerLaw(1.0, -0.5, "test", "unverified"), optimal_batch=PowerLaw(1.0, 0.4, "test", "unverified")
        ),
    )
    sizes = [(params, tokens) for params in (1e5, 1e6, 1e7) for tokens in (1e7, 1e8, 1e9)]
    rows = ({"parameters": n, "tokens": d, "loss": 1.7 + 10 / n**0.34 + 10 / d**0.28} for n, d in sizes)
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad-nodes.txt").write_text("n1\nn2\n")
    for words in (
        f"{TEXT.replace('new', 'told')} text/b.jsonl",
        "train run.toml log.name=done train.steps=3 log.baselines=true",
        "train run.toml log.name=other train.steps=3 train.seed=2 data.order=drawn",
        "sample runs/done --tokens 2 --save",
        EXPORT.replace(" new", " hf"),
        EXPORT.replace(" new", " parts --file-size 1e-6"),
        "fit runs.jsonl --loss --out loss.toml",
        "convert --from megahp --to megatron runs/done mcore",
        "convert --from megahp --to megatron-legacy runs/done legacy",
    ):
        ended = forked.run(folder, words.split(), 60)
        assert ended.code == (NOT_CHECKED if "megatron" in words else 0), ended
    cells = [(layers, lr) for layers in (1, 2) for lr in (0.01, 0.02)]
    for layers, lr in cells:
        name = f"log.root=sweep log.name=all/{layers}/{lr}/1 log.baselines=true checkpoint.keep=1"
        words = f"train run.toml train.steps=2 model.layers={layers} optimizer.lr={lr} train.seed=1 {name}"
        assert forked.run(folder, words.split(), 60).code == 0
    (folder / SECRET).write_text("0123456789abcdef")
    (folder / SECRET).chmod(0o600)
    return folder


def sort(
    good: Path, here: Path, file: str, command: str, way: str, seconds: float, draw: random.Random
) -> tuple[str, str]:
    """Spoil the file, and return what a command that reads it does, and what was spoilt. AssertionError where it should
    not have done that."""
    shutil.copytree(good, here)
    file = str(min(here.glob(file)).relative_to(here))
    what = f"{way}: {spoil(here / file, draw, way)}"
    if file.startswith(CHECKPOINT) and draw.random() < 0.7 and not file.endswith("manifest.json"):
        with_seal = (here / file).is_file() and not (here / file).is_symlink() and (here / file).stat().st_size < 10**7
        what += ", sealed" if with_seal and reseal(here / CHECKPOINT) else ""
    before = forked.everything(here)
    ended = forked.run(here, command.split(), 30, forked.first_of_two if file == SECRET else forked.at_home)
    told = f"{what}\n{ended}"[:1500]
    owned = [path for path in (here / "owned", here.parent / "owned") if path.exists()]
    after = forked.everything(here)
    for path in here.rglob("*"):
        if not path.is_symlink() and path.is_file() and not os.access(path, os.W_OK):
            path.chmod(0o600)
    shutil.rmtree(here)
    if ended.code == forked.HUNG:
        return "hung", told
    if owned:
        return "ran it", told
    lines = ended.err.splitlines()
    if (
        ended.code not in (0, 1, 2, NOT_CHECKED)
        or "Traceback" in ended.err
        or len(lines) > 4
        or (ended.code and not (lines or ended.out))
    ):
        return "fell", told
    if ended.seconds > seconds + CPU:
        return "took long", told
    if ended.code == 2:
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        harmless = {path for path in changed if path.endswith((".lock", "/runs/done", "cache")) or "/cache/" in path}
        if changed - harmless and not command.startswith(("train", "preprocess")):
            return "wrote", f"{told}\n{sorted(changed - harmless)[:4]}"
        return "refused", told
    return ("passed" if ended.code in (0, NOT_CHECKED) else "told"), told


def sorted_out(good: Path, here: Path, seed: int, count: int) -> Counter[str]:
    base: dict[str, float] = {}
    found, faults = Counter[str](), []
    cases = list(CASES)
    random.Random(seed).shuffle(cases)
    for number in range(count):
        file, command = cases[number % len(cases)]
        if command not in base:
            shutil.copytree(good, here)
            ended = forked.run(here, command.split(), 60, forked.first_of_two if file == SECRET else forked.at_home)
            shutil.rmtree(here)
            assert ended.code in (0, 1, NOT_CHECKED) or command.startswith("status"), (
                command,
                ended,
            )  # or nothing would be tested
            base[command] = ended.seconds
        way = WAYS[sum(divmod(number, len(cases))) % len(WAYS)]  # each case meets one after the other
        kind, told = sort(good, here, file, command, way, base[command], random.Random(f"{seed} {number}"))
        found[kind] += 1
        if kind in ("hung", "ran it", "fell", "took long", "wrote"):
            faults.append(f"{number} {kind}: {command} with {file}: {told}")
            print(faults[-1], file=sys.stderr)
    assert not faults, f"{len(faults)} of {count}, seed {seed}:\n" + "\n\n".join(faults)
    return found


def test_some(good: Path, tmp_path: Path) -> None:
    found = sorted_out(good, tmp_path / "here", 1, 50)
    assert found["refused"] > 13 and found["passed"] > 5, found  # a line of a log that is damaged is skipped


@pytest.mark.slow
def test_a_thousand(good: Path, tmp_path: Path) -> None:
    """FUZZ_SEED=7 for other ones."""
    found = sorted_out(good, tmp_path / "here", int(os.environ.get("FUZZ_SEED", "2")), 1000)
    print(json.dumps(found), file=sys.stderr)


def test_a_seal_can_be_made(good: Path, tmp_path: Path) -> None:
    """Or resealed checkpoints would test what damaged ones do."""
    from megahp import checkpoint

    shutil.copytree(good / CHECKPOINT, tmp_path / "step-00000003")
    (tmp_path / "step-00000003/state.json").write_text("{}")
    assert reseal(tmp_path / "step-00000003") and not checkpoint.problems(tmp_path / "step-00000003", shards=False)
    with pytest.raises(UserError):
        checkpoint.read_state(tmp_path / "step-00000003")
