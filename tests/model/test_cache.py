"""A model that reads on from its cache against the same model that reads all tokens at once, whatever its options."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import world
from distributed.training import BASE, MODELS, settings_of
from torch import Tensor

from megahp.config import Config, ModelConfig, resolve
from megahp.evaluate.sample import single_rank_model
from megahp.model import transformer
from megahp.model.cache import Cache
from megahp.model.transformer import Transformer
from megahp.parallel.parameters import parameters, storage

LENGTH, DRAWN = 20, 28
# Not drawn: a preset is a choice of the others, sizes and eps are numbers, balance, levels, padding are of the loss.
LEFT_OUT = {"preset", "layers", "width", "mlp_width", "vocab_size", "norm_eps"}
# quantized products: tests/ops/test_quantize.py
LEFT_OUT |= {"balance_rate", "balance_loss", "levels", "padding", "quantize", "quantize_group"}


def drawn_model(number: int) -> dict[str, Any]:
    """Options of a model, each with some others."""
    random = Random(number)
    pick, maybe = random.choice, lambda share=0.5: random.random() < share
    model: dict[str, Any] = {
        "layers": 3,
        "heads": pick([4, 6]),
        "head_size": 8,
        "activation": pick(["swiglu", "geglu", "gelu", "gelu-exact", "relu2", "xielu"]),
        "norm": pick(["rmsnorm", "layernorm"]),
        "norm_placement": pick(["pre", "post", "both"]),
        "parallel_residual": maybe(),
        "positions": pick(["rope", "rope", "alibi", "learned", "none"]),
        "tied_embeddings": maybe(),
        "attention_softcap": pick([0.0, 0.0, 2.0]),
        "logits_softcap": pick([0.0, 5.0]),
        "qk_norm": maybe(),
    }
    model["kv_heads"] = pick([1, 2, model["heads"]])
    if model["qk_norm"]:
        model["qk_norm_whole"] = maybe()
    if maybe(0.3):
        model |= {"experts": 4, "expert_width": 16, "experts_per_token": pick([1, 2]), "shared_experts": pick([0, 1])}
        model |= {"dense_layers": 1, "router_score": pick(["sigmoid", "softmax"]), "router_normalize": maybe()}
        model |= {"router_scale": 1.5, "activation": pick(["swiglu", "geglu", "gelu", "gelu-exact", "relu2"])}
    elif maybe():
        model["bias"] = True
    if not model.get("bias"):
        model["qkv_bias"] = maybe()
    if maybe():
        model |= {"window": pick([1, 3, 9]), "full_attention_every": pick([0, 2])}
    if model["positions"] == "rope":
        model |= {
            "rope_theta": pick([100.0, 10000.0]),
            "rope_fraction": pick([0.5, 1.0]),
            "no_rope_every": pick([0, 2]),
        }
        if model.get("window"):
            model["window_rope_theta"] = pick([0.0, 50.0])
        model["rope_scaling"] = scaling = pick(["none", "linear", "llama3", "yarn"])
        if scaling != "none":
            model["rope_factor"] = 4.0
        if scaling in ("llama3", "yarn"):
            model |= {"rope_original_length": 16, "rope_slow": 0.5, "rope_fast": 2.0}
        if scaling == "yarn":
            model["rope_magnitude"] = pick([0.0, 1.5])
    return model


def drawn_settings(number: int, dtype: str) -> Config:
    data = {"sequence_length": LENGTH, "mask_documents": number % 3 == 0}
    tree = {"model": drawn_model(number), "train": {"dtype": dtype}, "data": data}
    return resolve.resolve([("base", BASE), ("test", tree)]).config


def test_the_draws_vary_every_option() -> None:
    """A new option of the model is drawn too, or fails here."""
    drawn = [drawn_model(number) for number in range(DRAWN)]
    varied = {key for model in drawn for key in model if len({str(m.get(key)) for m in drawn}) > 1}
    named = {key for model in drawn for key in model}
    assert named | LEFT_OUT == {field.name for field in fields(ModelConfig)}
    assert varied == named - {"layers", "head_size"}


@torch.no_grad()
def model_of(config: Config) -> Transformer:
    """A model of weights that matter: those of an initial one would make attention nearly uniform."""
    model = single_rank_model(config)
    generator = torch.Generator().manual_seed(1)
    for _, weight in parameters(model):
        storage(weight).add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def read_on(model: Transformer, tokens: Tensor, parts: list[int], documents: Tensor | None = None) -> Tensor:
    """Logits of all tokens, read in parts of so many."""
    cache, found, done = Cache(tokens.shape[1]), [], 0
    for size in parts:
        seen = None if documents is None else documents[:, : done + size]
        found.append(model(tokens[:, done : done + size], documents=seen, cache=cache))
        done += size
        assert cache.length == done
    return torch.cat(found, 1)


def difference(config: Config, number: int) -> float:
    """The largest difference of a logit between the model that reads a prompt, a few tokens more and then one a step,
    and the one that reads all at once, relative to the largest logit."""
    random, model = Random(number), model_of(config)
    tokens = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(number))
    first, more = random.choice([1, 7, 12]), random.choice([1, 4])
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 14 + [1] * 6]) if config.data.mask_documents else None
    with mock.patch.object(transformer, "QUERIES_AT_ONCE", random.choice([5, 256])):
        found = read_on(model, tokens, [first, more] + [1] * (LENGTH - first - more), documents)
    with torch.no_grad():
        whole = model(tokens, documents=documents)
    return ((found - whole).abs().max() / whole.abs().max()).item()


def differences() -> dict[str, float]:
    found = {}
    for dtype in ("float64", "float32"):
        for number in range(DRAWN):
            found[f"{dtype} {number}"] = difference(drawn_settings(number, dtype), number)
        for name in MODELS:
            config = settings_of(name, f"train.dtype={dtype}", f"data.sequence_length={LENGTH}")
            found[f"{dtype} {name}"] = difference(config, 0)
    return found


def refused() -> list[str]:
    """What a model says of a cache whose layout splits sequences: over cp, or over tp."""
    model, found = single_rank_model(drawn_settings(0, "float64")), list[str]()
    whole = model.axis
    for axis in (replace(whole, context=replace(whole.context, size=2)), replace(whole, sequence_parallel=True)):
        model.axis = axis
        with pytest.raises(ValueError) as error:
            model(torch.zeros(1, 1, dtype=torch.int64), cache=Cache(LENGTH))
        found.append(str(error.value))
    return found


def everything() -> tuple[dict[str, float], list[str]]:
    return differences(), refused()


@pytest.fixture(scope="module")
def results() -> Any:
    return world.run(1, everything)[0]


@pytest.fixture(scope="module")
def found(results: Any) -> dict[str, float]:
    return results[0]


def test_a_cache_of_split_sequences_is_refused(results: Any) -> None:
    for said, setting in zip(results[1], ("cp = 2", "sequence_parallel = True"), strict=True):
        assert setting in said


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-10), ("float32", 1e-5)])
def test_reading_on_from_a_cache_changes_no_logit(found: dict[str, float], dtype: str, most: float) -> None:
    off = {name: value for name, value in found.items() if name.startswith(dtype)}
    assert len(off) == DRAWN + len(MODELS)
    assert {name: value for name, value in off.items() if not value < most} == {}


def test_a_cache_holds_no_more_than_its_capacity() -> None:
    cache, token = Cache(2), torch.ones(1, 1, 1, 4)
    for length in (1, 2):
        keys, _ = cache.extend("0", token, token)
        cache.length = length
        assert keys.shape == (1, 1, length, 4)
    with pytest.raises(RuntimeError):
        cache.extend("0", token, token)


def test_copies_of_a_sequence_go_separate_ways() -> None:
    cache = Cache(2)
    cache.extend("0", torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), torch.tensor([3.0, 4.0]).view(2, 1, 1, 1))
    cache.length = 1
    copies = cache.repeated(2)
    keys, values = copies.extend("0", torch.arange(4.0).view(4, 1, 1, 1), torch.zeros(4, 1, 1, 1))
    assert keys.flatten().tolist() == [1, 0, 1, 1, 2, 2, 2, 3]
    assert values.flatten().tolist() == [3, 0, 3, 0, 4, 0, 4, 0]
