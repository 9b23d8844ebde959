"""Convert real files by the real command; transformers is the reference for its own format."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from convert.test_huggingface import GPT2, GQA, MOE, MPT, NEOX
from distributed import runs, world
from tokenizers import Tokenizer as Fast
from tokenizers import models
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megahp import checkpoint, cli
from megahp.checkpoint.shards import Tensors
from megahp.commands import convert as convert_command
from megahp.config import Config, resolve
from megahp.convert import huggingface
from megahp.convert.tokenizers import write_tokenizer
from megahp.data.indexed import IndexedWriter
from megahp.data.tokenizer import load_tokenizer, train_sentencepiece
from megahp.evaluate.sample import single_rank_model
from megahp.exit_codes import NOT_CHECKED
from megahp.parallel.parameters import model_state, storage
from megahp.scaling.parameterization import table_of
from megahp.train.run import state_of_weights

ROOT = Path(__file__).parents[2]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
BASE = {
    "model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48, "vocab_size": 300},
    "data": {"sequence_length": 48},
}
MULTIPLIERS = {"embedding_multiplier": 3.0, "output_multiplier": 0.7}
TABLES: dict[str, dict[str, Any]] = {
    "sp": {"name": "sp"},
    "two": {"name": "completep", "base_width": 16, "base_layers": 1, "embedding_multiplier": 4.0},  # no other factor
    "any": {"name": "completep", "base_width": 10, "base_layers": 1, "depth_alpha": 0.7, **MULTIPLIERS},
    "smupar": {"name": "smupar", "base_width": 10, **MULTIPLIERS},
}
SPARSE = {"sparsity": {"method": "static", "density": 0.5}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("any", {**GQA}),
    "llama, sp": ("sp", {**GQA, "bias": True, "head_size": 12}),
    "llama, tied": ("any", {"tied_embeddings": True}),
    "qwen3": ("two", {**GQA, "qk_norm": True, "head_size": 16}),
    "neox": ("two", {**NEOX, "head_size": 0, "width": 64}),
    "gpt2": ("sp", {**GPT2, "tied_embeddings": True}),
    "gpt2, no biases": ("any", {**GPT2, "bias": False}),
    "mpt": ("any", {**MPT, "tied_embeddings": True}),
    "mixtral": ("two", {**MOE, "router_score": "softmax", "head_size": 16}),
    "olmo3": ("any", {**GQA, "norm_placement": "post", "qk_norm": True, "qk_norm_whole": True, "window": 9}),
    "glm4 moe": ("any", {**MOE, "dense_layers": 1, "shared_experts": 2, "mlp_width": 48, "qk_norm": True}),
}


@pytest.fixture(autouse=True)
def group_of_its_own() -> Iterator[None]:
    """Leave the process group that a model of this process joined, for the tests that begin one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def convert(source: str, target: str, *words: object) -> tuple[int, str]:
    """Return the command's exit code and output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = cli.main(["convert", "--from", source, "--to", target, *map(str, words)])
    return code, output.getvalue()


def settings_of(table: str, model: dict[str, Any], **more: Any) -> Config:
    layers = [BASE, {"model": model, "parameterization": TABLES[table]}, more]
    return resolve.resolve([("test", layer) for layer in layers]).config


@torch.no_grad()
def written(config: Config, folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, including the vocabulary's padding."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in model_state(single_rank_model(config)).items():
        value = storage(weight)
        if "router.bias" not in name or config.model.router_score == "sigmoid":
            value = value + torch.randn(value.shape, generator=generator) * 0.2
        if config.sparsity.method != "none" and "blocks" in name and "norm" not in name:
            mask = torch.rand(value.shape, generator=generator) < 0.5
            tensors[f"mask.{name.removeprefix('model.')}"], value = mask, value * mask
        tensors[name] = value
    place = checkpoint.path(folder / "checkpoints", 7)
    checkpoint.write(place, iter(tensors.items()), state_of_weights(config), 10**9)
    return tensors


def ulps(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, in units in the last place of the smaller value."""
    if one.dtype == torch.bool or one.equal(other):
        return 0.0 if one.equal(other) else torch.inf
    least = torch.minimum(one.abs(), other.abs())
    spacing = torch.nextafter(least, torch.full_like(least, torch.inf)) - least
    return ((one - other).abs() / spacing).max().item()


def there_and_back(
    table: str, model: dict[str, Any], folder: Path, words: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    config = settings_of(table, model, **more)
    before = written(config, folder / "ours")
    exported = convert("megahp", "huggingface", folder / "ours", folder / "theirs", *words)
    back = convert("huggingface", "megahp", folder / "theirs", folder / "back")
    path = checkpoint.find(folder / "back")
    after, state = Tensors(path), checkpoint.read_state(path)
    return {
        "codes": (exported[0], back[0]),
        "said": exported[1] + back[1],
        "same names": set(before) == set(after),
        "ulps": max(ulps(before[name], after[name]) for name in before),
        "problems": checkpoint.problems(path),
        "settings": all(
            vars(getattr(resolve.from_dict(state["config"], "state"), section)) == vars(getattr(config, section))
            for section in ("model", "parameterization", "sparsity")
        ),
    }


def of_transformers(folder: Path) -> dict[str, tuple[int, str]]:
    """Import folders that transformers itself wrote, without a sidecar, and in other dtypes."""
    from transformers import AutoModelForCausalLM

    results = {}
    for name in ("llama", "gpt2", "neox"):
        theirs = AutoModelForCausalLM.from_pretrained(folder / name / "theirs")
        theirs.to(torch.bfloat16 if name == "llama" else torch.float32)
        theirs.save_pretrained(folder / name / "saved", max_shard_size="20KB")
        shutil.copy(folder / name / "theirs" / "tokenizer.json", folder / name / "saved")
        assert (folder / name / "saved" / "model.safetensors.index.json").exists()
        results[name] = convert("huggingface", "megahp", folder / name / "saved", folder / name / "of theirs")
    return results


def sharded(folder: Path) -> dict[str, Any]:
    """Convert in small files, with a SentencePiece tokenizer."""
    text = Path(contextlib.__file__).read_text()
    train_sentencepiece([text], folder / "own.model", 400)
    config = settings_of("any", {**GQA, "vocab_size": 420}, data={"tokenizer": str(folder / "own.model")})
    before = written(config, folder / "ours")
    exported = convert("megahp", "huggingface", folder / "ours", folder / "theirs", "--file-size", 3e-5)
    back = convert("huggingface", "megahp", folder / "theirs", folder / "back", "--file-size", 3e-5)
    sizes = [file.stat().st_size for file in (folder / "theirs").glob("model-*.safetensors")]
    after = Tensors(checkpoint.find(folder / "back"))
    return {
        "codes": (exported[0], back[0]),
        "files": len(sizes),
        "small": sum(size < 3.1e4 for size in sizes),  # but those of one tensor that is larger
        "ulps": max(ulps(before[name], after[name]) for name in before),
        "tokenizers": [(folder / place).read_bytes() for place in ("own.model", "back/tokenizer.model")],
    }


def forgotten(folder: Path) -> tuple[int, str]:
    """Export without folding a multiplier: the check must fail."""
    config = settings_of("any", GQA)
    written(config, folder / "ours")
    patch = mock.patch.object(huggingface, "table_of", lambda config: replace(table_of(config), residual=1.0))
    with patch:
        return convert("megahp", "huggingface", folder / "ours", folder / "theirs")


def touched(folder: Path) -> dict[str, str]:
    """Return the errors for folders that were changed after the export."""
    from safetensors.torch import load_file, save_file

    output = {}
    for what, file, change in (
        ("masked", "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1)),
        ("missing", "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ("without", "megahp.safetensors", lambda tensors: tensors.clear()),
    ):
        copy = shutil.copytree(folder / "sparse" / "theirs", folder / what)
        tensors = load_file(copy / file)
        change(tensors)
        save_file(tensors, copy / file)
        output[what] = convert("huggingface", "megahp", copy, folder / "never")[1]
    copy = shutil.copytree(folder / "sparse" / "theirs", folder / "theta")
    hf_config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**hf_config, "rope_theta": 77.0}))
    output["theta"] = convert("huggingface", "megahp", copy, folder / "never")[1]
    words = "huggingface", "megahp", folder / "sparse" / "theirs", folder / "never", "model.layers=3", "--no-check"
    output["layers"] = convert(*words)[1]
    copy = shutil.copytree(folder / "llama" / "theirs", folder / "heads")
    hf_config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**hf_config, "num_key_value_heads": 4}))
    (copy / "megahp.json").unlink()
    output["heads"] = convert("huggingface", "megahp", copy, folder / "never", "--no-check")[1]
    with (folder / "llama" / "theirs" / "model.safetensors").open("r+b") as whole:
        whole.truncate(5000)
    output["cut"] = convert("huggingface", "megahp", folder / "llama" / "theirs", folder / "never")[1]
    shard = next(checkpoint.find(folder / "gpt2" / "ours").glob("shard*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    output["flipped"] = convert("megahp", "huggingface", folder / "gpt2" / "ours", folder / "never")[1]
    assert not (folder / "never").exists() and not list(folder.glob(".partial*"))
    return output


def gone_on(folder: Path) -> dict[str, Any]:
    """Train a step, and sample, from an imported model."""
    from megahp.evaluate.sample import generate

    with IndexedWriter(str(folder / "corpus"), 257) as writer:
        for seed in range(20):
            writer.add_document(np.random.RandomState(seed).randint(0, 256, 200).tolist())
    words = f"data.train=['{folder}/corpus'] log.root={folder} log.name=more log.tensorboard=false"
    words += " train.steps=1 train.validation_samples=0 batch.global_batch=4 batch.micro_batch=4 schedule.warmup=0"
    imported = folder / "sparse" / "back"
    config = resolve.load(imported / "config.toml", [*words.split(), "optimizer.lr=1e-15"]).config
    directory = runs.go(config).directory
    before, after = Tensors(checkpoint.find(imported)), Tensors(checkpoint.find(directory))
    weights = [name.removeprefix("model.") for name in before if name.startswith("model.")]
    first, second = ([after[f"{moment}.{name}"] for name in weights] for moment in ("exp_avg", "exp_avg_sq"))
    return {
        "weights": max((before[name].double() - after[name].double()).abs().max().item() for name in before),
        "moments": all(
            torch.allclose((a / 0.1).square(), b / 0.05, rtol=1e-4) for a, b in zip(first, second, strict=True)
        ),
        "gradients": min(a.abs().max().item() for a in first),
        "sample": generate(imported, "import os", 3, 0, 0, 1)[0],
    }


def losses(folder: Path) -> tuple[float, float]:
    """Return a text's loss in nats per token: ours, and transformers' of the exported model."""
    from transformers import AutoModelForCausalLM

    from megahp.evaluate.perplexity import evaluate
    from megahp.evaluate.sample import load_trained

    text, origin = "What both make of it", load_trained(folder / "ours")
    (score,) = evaluate(origin, [[text]], 48, 24)
    ids = torch.tensor([[origin.tokenizer.eod, *origin.tokenizer.encode(text)]])
    theirs = AutoModelForCausalLM.from_pretrained(folder / "theirs")(input_ids=ids, labels=ids).loss
    return score.nats / score.tokens, theirs.item()


def both_ways(form: str, table: str, model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export a model to Megatron's format, and import it again."""
    before = written(settings_of(table, model), folder / "ours")
    exported = convert("megahp", form, folder / "ours", folder / "theirs")
    more = ["--allow-pickle"] if form == "megatron-legacy" else []
    back = convert(form, "megahp", folder / "theirs", folder / "back", "--tokenizer", "bytes", *more)
    assert (exported[0], back[0]) == (NOT_CHECKED, NOT_CHECKED), exported[1] + back[1]
    after = Tensors(checkpoint.find(folder / "back"))
    return {"names": set(before) == set(after), "ulps": max(ulps(before[name], after[name]) for name in before)}


def padded(folder: Path) -> dict[str, tuple[str, bool, bool]]:
    """What an export to Megatron's format says of the padding rows, and whether they are the mean of the others, or as
    they were."""
    found = {}
    for padding in ("masked", "included"):
        place = folder / padding
        before = written(settings_of("sp", {**GQA, "padding": padding}), place / "ours")["model.unembedding.weight"]
        output = convert("megahp", "megatron-legacy", place / "ours", place / "theirs", "--no-check")[1]
        state = torch.load(place / "theirs/release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
        rows, mean = state["output_layer.weight"][300:], before[:300].mean(0)
        assert rows.shape == (84, 32)
        found[padding] = output.partition("\n")[0], torch.allclose(rows, mean.expand(84, -1)), rows.equal(before[300:])
    return found


class Stranger:
    """A class that a reader may not have."""


def parallel(folder: Path) -> dict[str, Any]:
    """Write Megatron's files by hand from our weights: 2 x 2 ranks, Transformer Engine's names, stacked by DCP."""
    from torch.distributed import checkpoint as dcp

    config = settings_of("sp", {**GQA, "bias": True, "rope_theta": 10000.0, "padding": "included"})
    ours = {name.removeprefix("model."): value for name, value in written(config, folder / "ours").items()}
    dims = {"attention.out.weight": 1, "mlp.down.weight": 1, "attention.out.bias": None, "mlp.down.bias": None}
    products = {"self_attention.linear_qkv": "attention.qkv", "self_attention.linear_proj": "attention.out"}
    products |= {"mlp.linear_fc2": "mlp.down", "gate": "mlp.gate", "up": "mlp.up"}

    def layer(number: int, rank: int | None) -> dict[str, Tensor]:
        """Return a rank's shard of a layer, or the whole."""
        made = {}
        for kind in ("weight", "bias"):
            for theirs, name in products.items():
                whole, dim = ours[f"blocks.{number}.{name}.{kind}"], dims.get(f"{name}.{kind}", 0)
                made[f"{theirs}.{kind}"] = whole if rank is None or dim is None else whole.chunk(2, dim)[rank].clone()
            made[f"mlp.linear_fc1.{kind}"] = torch.cat((made.pop(f"gate.{kind}"), made.pop(f"up.{kind}")))
        for theirs, name in (("self_attention.linear_qkv", "attention_norm"), ("mlp.linear_fc1", "mlp_norm")):
            made[f"{theirs}.layer_norm_weight"] = ours[f"blocks.{number}.{name}.weight"]
        return made

    model = config.model
    args = Namespace(
        num_layers=2, hidden_size=32, num_attention_heads=4, group_query_attention=True, num_query_groups=2,
        kv_channels=8, ffn_hidden_size=48, swiglu=True, normalization="RMSNorm", norm_epsilon=model.norm_eps,
        position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0, add_bias_linear=True,
        untie_embeddings_and_output_weights=True, padded_vocab_size=384, max_position_embeddings=48,
        bias_gelu_fusion=True, params_dtype=torch.float32, strange=Stranger(),
    )  # fmt: skip
    for stage in range(2):
        for rank in range(2):
            tensors = {f"decoder.layers.0.{name}": value for name, value in layer(stage, rank).items()}
            if stage == 0:
                tensors["embedding.word_embeddings.weight"] = ours["embedding.weight"].chunk(2)[rank].clone()
            else:
                tensors["output_layer.weight"] = ours["unembedding.weight"].chunk(2)[rank].clone()
                tensors["decoder.final_layernorm.weight"] = ours["final_norm.weight"]
            place = folder / "legacy" / "iter_0000005" / f"mp_rank_{rank:02d}_{stage:03d}"
            place.mkdir(parents=True)
            state = {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": tensors, "rng": Stranger()}
            state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            torch.save(state, place / "model_optim_rng.pt")
    (folder / "legacy" / "latest_checkpointed_iteration.txt").write_text("5")
    layers = [layer(number, None) for number in range(2)]
    stacked = {f"decoder.layers.{name}": torch.stack([each[name] for each in layers]) for name in layers[0]}
    stacked["embedding.word_embeddings.weight"] = ours["embedding.weight"]
    stacked["output_layer.weight"] = ours["unembedding.weight"]
    stacked["decoder.final_layernorm.weight"] = ours["final_norm.weight"]
    stacked["optimizer.state.exp_avg.output_layer.weight"] = ours["unembedding.weight"] + 1
    dcp.save(stacked, storage_writer=dcp.FileSystemWriter(folder / "dist" / "iter_0000005"))
    torch.save({"args": args, "iteration": 5}, folder / "dist" / "iter_0000005" / "common.pt")
    (folder / "dist" / "latest_checkpointed_iteration.txt").write_text("5")
    results = {}
    for form, place, *more in (("megatron-legacy", "legacy", "--allow-pickle"), ("megatron", "dist")):
        words = [folder / place, folder / f"{place} back", "model.vocab_size=384", "--tokenizer", "bytes", *more]
        code, output = convert(form, "megahp", *words)
        assert code == NOT_CHECKED, output
        after = Tensors(checkpoint.find(folder / f"{place} back"))
        results[place] = set(after) == {f"model.{name}" for name in ours} and all(
            after[f"model.{name}"].equal(value) for name, value in ours.items()
        )
    for rank in (folder / "legacy").glob("iter_*/mp_rank_01_*"):
        shutil.rmtree(rank)
    words = [folder / "legacy", folder / "never", "model.vocab_size=384", "--tokenizer", "bytes", "--allow-pickle"]
    results["a rank alone"] = convert("megatron-legacy", "megahp", *words, "--no-check")
    convert("megahp", "megatron", folder / "ours", folder / "sent", "--file-size", 3e-5)
    empty = {name: torch.zeros_like(value) for name, value in stacked.items() if "optimizer" not in name}
    dcp.load(empty, storage_reader=dcp.FileSystemReader(folder / "sent" / "release"))
    results["read by DCP"] = all(value.equal(stacked[name]) for name, value in empty.items())
    return results


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def malicious(folder: Path) -> dict[str, tuple[bool, int]]:
    """Return, for each file with a malicious pickle, whether it was executed, and the exit code."""
    results, mark = {}, folder / "executed"
    config = settings_of("sp", GQA)
    written(config, folder / "ours")
    for form, file in (
        ("megatron", "release/common.pt"),
        ("megatron", "release/.metadata"),
        ("megatron", "release/__0_0.distcp"),
        ("megatron-legacy", "release/mp_rank_00/model_optim_rng.pt"),
    ):
        theirs = folder / file.replace("/", "-")
        assert convert("megahp", form, folder / "ours", theirs, "--no-check")[0] == 0
        if file.endswith(".metadata"):
            (theirs / file).write_bytes(pickle.dumps(Malicious(mark)))
        elif file.endswith(".distcp"):
            torch.save(Malicious(mark), theirs / file)
        else:
            state = torch.load(theirs / file, weights_only=False)
            torch.save({**state, "more": Malicious(mark)}, theirs / file)
        more = ["--allow-pickle"] if form == "megatron-legacy" else []
        code, _ = convert(form, "megahp", theirs, folder / f"{theirs.name} back", "--tokenizer", "bytes", *more)
        results[file] = mark.exists(), code
    torch.load(theirs / file, weights_only=False)
    assert mark.exists()  # by torch.load as it is
    return results


MEGATRON: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("any", GQA),
    "gpt": ("sp", {**GPT2, "tied_embeddings": True}),
    "qk norm": ("two", {**GQA, "qk_norm": True, "head_size": 16}),
    "no biases": ("any", {**GPT2, "bias": False, "activation": "gelu-exact", "positions": "none"}),
    "relu2": ("any", {"activation": "relu2", "bias": True}),
    "quantized": ("any", {**GQA, "quantize": "int4", "quantize_group": 8}),
}
FORMS = ("megatron", "megatron-legacy")


def everything(folder: Path) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    results: dict[str, Any] = {case: there_and_back(*CASES[case], folder / case) for case in CASES}
    results["granite"] = there_and_back(
        "any", {"tied_embeddings": True}, folder / "granite", ["--architecture", "granite"]
    )
    results["sparse"] = there_and_back("smupar", GQA, folder / "sparse", **SPARSE)
    results["gone on"] = gone_on(folder)
    results["losses"] = losses(folder / "llama")
    results["of transformers"] = of_transformers(folder)
    results["sharded"] = sharded(folder / "sharded")
    results["forgotten"] = forgotten(folder / "forgotten")
    with mock.patch("importlib.util.find_spec", lambda name: None):
        results["alone"] = there_and_back("any", GQA, folder / "alone")
    results["touched"] = touched(folder)
    results["megatron"] = {
        (case, form): both_ways(form, *MEGATRON[case], folder / f"{case} {form}") for case in MEGATRON for form in FORMS
    }
    results["padded"] = padded(folder / "padded")
    results["parallel"] = parallel(folder / "parallel")
    results["malicious"] = malicious(folder / "malicious")
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.run_afresh(1, everything, tmp_path_factory.mktemp("convert"))[0]


@needs_transformers
@pytest.mark.parametrize("case", [*CASES, "sparse", "alone"])
def test_there_and_back(results: Any, case: str) -> None:
    """Bitwise equal where no multiplier rounds, else within an ulp; the logits are the same both ways."""
    result = results[case]
    alone = case == "alone"  # without transformers
    through = "its own import of huggingface" if alone else "transformers"
    assert result["said"].count(f"through megahp and {through}") == 2, result["said"]
    assert result["said"].count("not checked: ") == 2 * alone
    assert result["codes"] == ((NOT_CHECKED, NOT_CHECKED) if alone else (0, 0)) and result["problems"] == []
    assert result["same names"] and result["settings"]
    rounds = CASES[case][0] == "any" if case in CASES else True
    assert (0 < result["ulps"] <= 1) if rounds else result["ulps"] == 0


@needs_transformers
def test_an_architecture_of_the_users_choice_keeps_its_multipliers(results: Any) -> None:
    """Granite has muP's multipliers: nothing is folded into a weight, and a tied head stays tied."""
    result = results["granite"]
    assert result["codes"] == (0, 0) and result["same names"] and result["settings"]
    assert result["ulps"] == 0


@needs_transformers
def test_training_continues_from_an_import(results: Any) -> None:
    """Training starts from its weights and moments of 0: after one step these are of one gradient."""
    result = results["gone on"]
    assert result["weights"] < 1e-9 and result["gradients"] > 0 and result["moments"]
    assert result["sample"].startswith("import os")


@needs_transformers
def test_the_loss_is_transformers_own(results: Any) -> None:
    ours, theirs = results["losses"]
    assert ours == pytest.approx(theirs, rel=1e-6)


@needs_transformers
def test_what_transformers_wrote(results: Any) -> None:
    assert {name: code for name, (code, _) in results["of transformers"].items()} == {"llama": 0, "gpt2": 0, "neox": 0}


@needs_transformers
def test_several_files_and_sentencepiece(results: Any) -> None:
    result = results["sharded"]
    one, other = result.pop("tokenizers")
    assert one == other
    assert result["codes"] == (0, 0) and 0 < result["ulps"] <= 1
    assert result["files"] > 3 and result["small"] >= result["files"] - 2


@needs_transformers
def test_another_model_is_an_error(results: Any) -> None:
    code, output = results["forgotten"]
    assert code == 1 and "would be another model" in output and "written" not in output.replace("not written", "")


@needs_transformers
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("masked", "blocks.1.mlp.up.weight is not 0 where it is masked; remove"),
        ("missing", "1 tensors of the llama model are missing, such as model.layers.1.mlp.up_proj.weight"),
        ("without", "lacks mask."),
        ("theta", "rope_theta is 77.0 and was 500.0; remove"),
        ("layers", "tensors are missing, such as model.blocks.2.attention"),
        ("heads", "self_attn.k_proj.weight [16, 32], "),
        ("cut", "model.safetensors cannot be read"),
        ("flipped", "is damaged"),
    ],
)
def test_a_changed_folder_is_refused(results: Any, what: str, words: str) -> None:
    output = results["touched"][what]
    assert words in output and output.startswith("megahp: ") and output.count("\n") == 1, output


@needs_transformers
@pytest.mark.parametrize("case", MEGATRON)
@pytest.mark.parametrize("form", FORMS)
def test_megatron_and_back(results: Any, case: str, form: str) -> None:
    result = results["megatron"][case, form]
    assert result["names"]
    assert (0 < result["ulps"] <= 1) if MEGATRON[case][0] == "any" else result["ulps"] == 0


@needs_transformers
def test_megatrons_padding(results: Any) -> None:
    """The softmax there is over padding rows; they are told as what they were in training."""
    assert results["padded"] == {
        "masked": (
            "84 rows pad the vocabulary: the run's softmax was not over them, and Megatron's is, "
            "so each is the mean of the others there",
            True,
            False,
        ),
        "included": ("84 rows pad the vocabulary: Megatron's softmax is over them, as the run's was", False, True),
    }


@needs_transformers
def test_megatrons_layout(results: Any) -> None:
    """Shards of 2 tp x 2 pp ranks, and DCP's own files, are read as our weights; DCP reads ours."""
    code, output = results["parallel"].pop("a rank alone")
    assert code == 2 and "the embedding has 192 rows, and vocab_size is 384; get the missing files" in output, output
    assert results["parallel"] == {"legacy": True, "dist": True, "read by DCP": True}


@needs_transformers
def test_no_pickle_is_executed(results: Any) -> None:
    """Objects beside the model are ignored; a file that is nothing else cannot be read."""
    codes = {place: code for place, (executed, code) in results["malicious"].items() if not executed}
    assert codes == {
        "release/common.pt": NOT_CHECKED,
        "release/.metadata": 2,
        "release/__0_0.distcp": 2,
        "release/mp_rank_00/model_optim_rng.pt": NOT_CHECKED,
    }


LARGE = """
import resource, sys, torch
from pathlib import Path
from megahp import checkpoint, cli
from megahp.commands import convert
from megahp.config import (resolve)
from megahp.train.run import state_of_weights

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

model = {"layers": 60, "width": 256, "heads": 4, "mlp_width": 1024, "vocab_size": 257}
tree = {"model": model, "parameterization": {"name": "completep", "base_width": 100}}
settings = resolve.resolve([("test", tree)]).config
block = {"attention.qkv": (768, 256), "attention.out": (256, 256), "mlp.up": (1024, 256), "mlp.gate": (1024, 256)}
block |= {"mlp.down": (256, 1024), "attention_norm": (256,), "mlp_norm": (256,)}
shapes = {f"blocks.{n}.{name}": shape for n in range(60) for name, shape in block.items()}
shapes |= {"embedding": (384, 256), "unembedding": (384, 256), "final_norm": (256,)}
folder = Path(sys.argv[1])
tensors = ((f"model.{name}.weight", torch.rand(shape)) for name, shape in shapes.items())
checkpoint.write(checkpoint.path(folder / "checkpoints", 1), tensors, state_of_weights(settings), 10**7)
before = peak()
options = ["--file-size", "0.01", "--no-check"]
for source, target, *words in (("megahp", "huggingface", "", "hf"), ("huggingface", "megahp", "hf", "back")):
    places = [str(folder / word) for word in words]
    assert cli.main(["convert", "--from", source, "--to", target, *places, *options]) == 0
size = sum(file.stat().st_size for file in (folder / "hf").glob("model-*")) / 2**20
print(size, peak() - before, peak())
"""


def test_memory_holds_one_file(tmp_path: Path) -> None:
    """A model of 240 MB in files of 10 MB takes little more memory than two files."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, more, _ = map(float, done.stdout.splitlines()[-1].split())
    assert size > 200 and more < 60, done.stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--from megahp --to megahp a b", "one of the two must be megahp"),
        ("--from megahp --to huggingface a .", ". exists"),
        ("--from megahp --to huggingface a b train.dtype=float32", "settings are for --to megahp"),
        ("--from megahp --to huggingface a b --file-size 0", "--file-size 0 must be above 0"),
        ("--from megahp --to huggingface a b --text t --no-check", "--text t is for the check"),
        ("--from megahp --to huggingface a b --text none", "--text none is not a file with text"),
        ("--from megahp --to huggingface a b", "a is neither a checkpoint nor a run directory"),
        ("--from huggingface --to megahp a b", "a/config.json does not exist"),
        ("--from megatron --to megahp a b --tokenizer bytes", "a/common.pt cannot be read"),
        ("--from megatron-legacy --to megahp a b --tokenizer bytes", "a is a pickle; --allow-pickle"),
        ("--from megatron-legacy --to megahp a b --tokenizer bytes --allow-pickle", "a has no mp_rank_TP"),
        ("--from megatron --to megahp a b --allow-pickle", "--allow-pickle is for --from megatron-legacy"),
    ],
)
def test_invalid_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    source, target, *more = words.replace("--from ", "").replace("--to ", "").split()
    code, output = convert(source, target, *more)
    assert code == 2 and why in output and output.count("\n") == 1, output


def test_the_end_of_document_of_any_tokenizer(tmp_path: Path) -> None:
    """A Unigram's vocabulary is a list."""
    file = tmp_path / "unigram.json"
    Fast(models.Unigram([("<unk>", 0.0), ("<|endoftext|>", 0.0), ("a", -1.0)], unk_id=0)).save(str(file))
    (tmp_path / "theirs").mkdir()
    write_tokenizer(tmp_path / "theirs", str(file), load_tokenizer(str(file), "<|endoftext|>"))
    assert json.loads((tmp_path / "theirs/tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    "changed",
    [
        {"use_rope_scaling": True},
        {"rotary_seq_len_interpolation_factor": 4},
        {"no_rope_freq": [0, 1]},
        {"window_size": (128, 0)},
        {"qk_l2_norm": True},
        {"softmax_type": "off-by-one"},
        {"use_mup": True},
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
    ],
)
def test_what_megatron_computes_and_we_do_not(tmp_path: Path, changed: dict[str, Any]) -> None:
    args = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "norm_epsilon": 1e-5}
    args |= {"vocab_size": 300, "max_position_embeddings": 48, "kv_channels": 8, "add_bias_linear": False}
    torch.save({"args": Namespace(**args, **changed)}, tmp_path / "common.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    code, output = convert("megatron", "megahp", tmp_path, tmp_path / "never", "--tokenizer", "bytes")
    ((key, value),) = changed.items()
    assert code == 2 and f"{key} = {value!r} is not supported; megahp has" in output, output


def deep_llama(folder: Path, dtype: str) -> float:
    """Write a narrow llama of 30 layers whose large weights amplify rounding. Returns how far transformers' float32 is
    from its float64, over the largest logit."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 30}
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 + (weight.dim() == 1))
        model.save_pretrained(folder)
        hf_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**hf_config, "dtype": dtype, "torch_dtype": dtype}))
        tokens = torch.arange(64)[None]
        single, double = model(tokens).logits, model.double()(tokens).logits
        return ((single - double).abs().max() / double.abs().max()).item()


@needs_transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_amplifies_rounding(tmp_path: Path, dtype: str) -> None:
    """F17, F18: compared in float64, whatever config.json's dtype, the two agree far below what float32 allows."""
    noise = deep_llama(tmp_path / "theirs", dtype)
    words = "--tokenizer", "bytes"
    code, said = convert("huggingface", "megahp", tmp_path / "theirs", tmp_path / "ours", *words)
    by = float(said.split(" of the largest logit")[0].split()[-1])
    assert code == 0 and by < 1e-3 * noise, (said, noise)
    assert noise > 1e-5, "a comparison in float32 would have passed"


@needs_transformers
def test_folding_rounds_what_a_model_amplifies(tmp_path: Path) -> None:
    """F18, the other way: folded multipliers round the weights once, as float32 would; this is another model only
    where it is more than that."""
    deep = {**GQA, "layers": 30}
    written(settings_of("any", deep), tmp_path / "ours")
    code, said = convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "theirs")
    assert code == 0, said
    with mock.patch.object(huggingface, "table_of", lambda config: replace(table_of(config), logits=1.0)):
        code, said = convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "never")
    assert code == 1 and "would be another model" in said and not (tmp_path / "never").exists(), said


@needs_transformers
def test_a_model_that_memory_does_not_hold_is_not_checked(tmp_path: Path) -> None:
    written(settings_of("sp", GQA), tmp_path / "ours")
    with mock.patch.object(convert_command, "memory_here", lambda: 100_000):
        code, said = convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "theirs")
    assert code == NOT_CHECKED and "not checked: its weights take 0 GB in float64, and this machine has 0 GB" in said
    assert (tmp_path / "theirs/config.json").exists()


@pytest.mark.parametrize("form", ["huggingface", "megatron", "megatron-legacy"])
def test_a_full_disk_is_one_line_and_nothing_left(tmp_path: Path, form: str) -> None:
    """F19: at any point of either direction."""
    written(settings_of("sp", GQA), tmp_path / "ours")
    assert convert("megahp", form, tmp_path / "ours", tmp_path / "theirs", "--no-check")[0] == 0
    back = ["--tokenizer", "bytes", *(["--allow-pickle"] if form == "megatron-legacy" else [])]
    (small := tmp_path / "small").mkdir()
    for kilobytes in (8, 100, 180):
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(small)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here, which takes root")
        try:
            ways = [("megahp", form, "ours", []), (form, "megahp", "theirs", back)]
            for source, target, place, more in ways:
                code, said = convert(source, target, tmp_path / place, small / "out", "--no-check", *more)
                assert code == 2 and "make room" in said and said.count("\n") == 1, said
                assert not list(small.iterdir())
        finally:
            subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGHUP"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, signal_name: str) -> None:
    """The weights are written, and the tokenizer is about to be; afterwards the signal is handled as before."""
    written(settings_of("sp", GQA), tmp_path / "ours")
    number, before = getattr(signal, signal_name), signal.getsignal(getattr(signal, signal_name))
    seen = []

    def interrupt(folder: Path, *_: object) -> None:
        seen.append(sorted(file.name for file in folder.iterdir()))
        os.kill(os.getpid(), number)

    with mock.patch.object(convert_command, "write_tokenizer", interrupt), pytest.raises(SystemExit) as ended:
        convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "theirs")
    assert ended.value.code == 128 + number and "model.safetensors" in seen[0]
    assert [file.name for file in tmp_path.iterdir()] == ["ours"] and signal.getsignal(number) == before
