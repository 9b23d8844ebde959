"""Convert to and from transformers: its own code is the reference, reading and writing real files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import world
from distributed.training import mesh_of, whole
from torch import Tensor

from megahp.config import Config, resolve, with_values
from megahp.convert import families, huggingface, huggingface_folder
from megahp.errors import UserError
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel.layout import Layout
from megahp.parallel.parameters import model_state, storage
from megahp.scaling.parameterization import table_of

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
BASE = {
    "model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48, "vocab_size": 120, "norm_eps": 1e-4},
    "data": {"train": ["none"], "sequence_length": 16},
    "train": {"noise_scale": False},
}
GQA = {"kv_heads": 2, "rope_theta": 500.0}
GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True}
NEOX = {"norm": "layernorm", "activation": "gelu", "bias": True, "rope_theta": 500.0}
MPT = {"norm": "layernorm", "positions": "alibi", "activation": "gelu-exact", "mlp_width": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "llama, tied": ("llama", {"tied_embeddings": True}),
    "llama, biases, head size": ("llama", {**GQA, "bias": True, "head_size": 12}),
    "mistral": ("mistral", {"heads": 6, "head_size": 4, **GQA}),  # 6 heads do not divide the width
    "qwen3": ("qwen3", {**GQA, "qk_norm": True, "head_size": 12}),
    "arcee": ("arcee", {**GQA, "activation": "relu2", "bias": True}),
    "neox": ("gpt_neox", NEOX),
    "neox, tied, no biases": ("gpt_neox", {**NEOX, "activation": "relu2", "bias": False, "tied_embeddings": True}),
    "starcoder2": ("starcoder2", {**NEOX, **GQA, "head_size": 12}),
    "gpt2": ("gpt2", {**GPT2, "tied_embeddings": True}),
    "gpt2, no biases": ("gpt2", {**GPT2, "activation": "gelu-exact", "bias": False}),
    "mpt": ("mpt", {**MPT, "tied_embeddings": True}),
    "mpt, 6 heads": ("mpt", {**MPT, "width": 36, "mlp_width": 144, "heads": 6}),
}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 8, "rope_slow": 0.3}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 64, "rope_theta": 50.0, "rope_fast": 4.0}
GEMMA = {"activation": "geglu", "norm_placement": "both", "window": 5, "full_attention_every": 2, "head_size": 12}
OLMO = {"norm_placement": "post", "qk_norm": True, "qk_norm_whole": True}
CASES |= {
    "llama 3.1": ("llama", {**GQA, **LLAMA3, "tied_embeddings": True}),
    "llama, linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama, geglu": ("llama", {**GQA, "activation": "geglu"}),
    "arcee, yarn": ("arcee", {**GQA, "activation": "relu2", **YARN}),
    "arcee, yarn of a magnitude": ("arcee", {**GQA, "activation": "relu2", **YARN, "rope_magnitude": 1.3}),
    "mistral, window": ("mistral", {**GQA, "window": 5}),
    "qwen2": ("qwen2", {**GQA, "qkv_bias": True}),
    "starcoder2, window": ("starcoder2", {**NEOX, **GQA, "window": 5}),
    "pythia": ("gpt_neox", {**NEOX, "parallel_residual": True, "rope_fraction": 0.25}),
    "phi3": ("phi3", {**GQA, "rope_fraction": 0.5, "window": 5}),
    "smollm3": ("smollm3", {**GQA, "no_rope_every": 2}),
    "nemotron": ("nemotron", {**GQA, "norm": "layernorm", "activation": "relu2", "rope_fraction": 0.5}),
    "olmo2": ("olmo2", {**OLMO, **LLAMA3}),
    "olmo2, grouped": ("olmo2", {**OLMO, **GQA}),
    "olmo3": ("olmo3", {**OLMO, **YARN, "window": 5, "full_attention_every": 2, "window_rope_theta": 50.0}),
    "apertus": ("apertus", {**GQA, **LLAMA3, "activation": "xielu", "qk_norm": True}),
    "gemma2": ("gemma2", {**GEMMA, **GQA, "attention_softcap": 2.0, "logits_softcap": 3.0, "tied_embeddings": True}),
    "gemma3": ("gemma3_text", {**GEMMA, **GQA, "qk_norm": True, "window_rope_theta": 70.0, **YARN}),
    "gemma3, one theta": ("gemma3_text", {**GEMMA, "qk_norm": True, "rope_scaling": "linear", "rope_factor": 8.0}),
}
MOE = {**GQA, "experts": 5, "mlp_width": 0, "expert_width": 24, "experts_per_token": 2}
CASES |= {
    "mixtral": ("mixtral", {**MOE, "router_score": "softmax", "head_size": 12}),
    "qwen3 moe": ("qwen3_moe", {**MOE, "qk_norm": True, "router_score": "softmax", "router_normalize": False}),
    "glm4 moe": (
        "glm4_moe",
        {**MOE, "dense_layers": 1, "mlp_width": 48, "shared_experts": 2, "router_scale": 1.7, "qk_norm": True},
    ),
    "glm4 moe, biases": ("glm4_moe", {**MOE, "qkv_bias": True, "rope_fraction": 0.5}),
    "glm4 moe, nothing shared": ("glm4_moe", {**MOE, "router_normalize": False, "tied_embeddings": True}),
}
MULTIPLIERS = {"base_width": 10, "embedding_multiplier": 3.0, "output_multiplier": 0.7}  # so that no factor is 1
TABLES: dict[str, dict[str, Any]] = {
    "sp": {"name": "sp"},
    "mup": {"name": "mup", **MULTIPLIERS},
    "completep": {"name": "completep", "base_layers": 1, "depth_alpha": 0.7, **MULTIPLIERS},
    "smupar": {"name": "smupar", **MULTIPLIERS},
}
RTOL = 1e-5


def settings_of(case: str, table: str, dtype: str = "float32") -> Config:
    parameterization = TABLES[table] | ({"embedding_multiplier": 32**0.5} if case.startswith("gemma") else {})
    layers = [BASE, {"model": CASES[case][1], "parameterization": parameterization, "train": {"dtype": dtype}}]
    return resolve.resolve([("test", layer) for layer in layers]).config


def drawn(config: Config) -> Transformer:
    """Return a model with random weights and biases; a router's bias where a family has one."""
    (model,), generator = build_model(config, mesh_of(Layout())).stages.values(), torch.Generator().manual_seed(1)
    for name, weight in model_state(model).items():
        if not name.endswith("router.bias") or config.model.router_score == "sigmoid":
            storage(weight).add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def filled(config: Config, weights: Mapping[str, Tensor]) -> Transformer:
    """Return a model with exactly these weights."""
    (model,) = build_model(config, mesh_of(Layout())).stages.values()
    named = {name.removeprefix("model."): weight for name, weight in model_state(model).items()}
    assert named.keys() == weights.keys()
    for name, weight in named.items():
        assert weight.shape == weights[name].shape
        storage(weight).copy_(weights[name])
    return model


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name.removeprefix("model."): whole(weight) for name, weight in model_state(model).items()}


def tokens() -> Tensor:
    return torch.randint(0, 120, (2, 16), generator=torch.Generator().manual_seed(2))


def write(folder: Path, hf_config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def loaded(folder: Path) -> Any:
    """Load a folder in transformers; no tensor may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def difference(model: Transformer, theirs: Any) -> float:
    """Return the largest difference of the logits, over the largest logit."""
    ours, logits = model(tokens())[..., :120], theirs(tokens()).logits
    assert ours.dtype == logits.dtype and ours.shape == logits.shape
    return ((ours - logits).abs().max() / logits.abs().max()).item()


def exported(config: Config, folder: Path) -> float:
    """Return the difference between our model and transformers' of its export."""
    model = drawn(config)
    hf_config, tensors = huggingface.export(config, weights_of(model))
    return difference(model, loaded(write(folder, hf_config, dict(tensors))))


def quantized(folder: Path) -> dict[str, float]:
    """Return the same for a model that reads its weights in 4 bits, before and after torchao quantizes the export."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    config = with_values(settings_of("llama", "mup"), {"model.quantize": "int4", "model.quantize_group": 16})
    model = drawn(config)
    hf_config, tensors = huggingface.export(config, weights_of(model))
    theirs = loaded(write(folder, hf_config, dict(tensors)))
    before = difference(model, theirs)
    mapping = MappingType.SYMMETRIC_NO_CLIPPING_ERR
    quantize_(theirs.model.layers, IntxWeightOnlyConfig(torch.int4, PerGroup(16), mapping))
    return {"before": before, "after": difference(model, theirs)}


def there_and_back(case: str, folder: Path) -> dict[str, Any]:
    """Export a model, have transformers save it, and import it again."""
    config = settings_of(case, "sp")
    before = weights_of(drawn(config))
    hf_config, tensors = huggingface.export(config, before)
    sent = dict(tensors)
    theirs = loaded(write(folder / "sent", hf_config, sent))
    theirs.save_pretrained(folder / "saved")
    model, after = imported(folder / "saved")
    again_config, again = huggingface.export(*after)
    # Gemma's norms add 1 to their weights
    close = partial(torch.allclose, rtol=3e-7) if case.startswith("gemma") else torch.equal
    return {
        "type": hf_config["model_type"],
        "difference": difference(model, theirs),
        "weights": all(close(unpadded(name, after[1][name]), unpadded(name, before[name])) for name in before),
        "only zeros besides": not any(after[1][name].any() for name in after[1].keys() - before.keys()),
        "again": again_config == hf_config and same(dict(again), sent),
    }


def imported(folder: Path) -> tuple[Transformer, tuple[Config, dict[str, Tensor]]]:
    """Import a folder. Returns the model, its config and weights."""
    layer, tensors = huggingface.import_(*read(folder))
    run = {"data": BASE["data"], "train": BASE["train"]}
    config, weights = resolve.resolve([("test", run), ("config.json", layer)]).config, dict(tensors)
    return filled(config, weights), (config, weights)


def unpadded(name: str, weight: Tensor) -> Tensor:
    return weight[:120] if name.endswith("embedding.weight") else weight


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def some_biases(folder: Path) -> dict[str, float]:
    """Import models in which only some modules have biases."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 120, "max_position_embeddings": 16}
    starcoder2 = transformers.Starcoder2Config(**sizes, use_bias=False, norm_epsilon=1e-3)
    sizes["rms_norm_eps"] = 1e-4
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    configs = {
        "qwen2": transformers.Qwen2Config(**sizes),
        "qwen3": transformers.Qwen3Config(**sizes, head_dim=12, attention_bias=True),
        "llama": transformers.LlamaConfig(**sizes, mlp_bias=True),
        "starcoder2": starcoder2,
        "gpt_neox": transformers.GPTNeoXConfig(
            **{key: sizes[key] for key in list(sizes)[:3]},
            **{"intermediate_size": 96, "vocab_size": 120, "attention_bias": False, "use_parallel_residual": False},
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
        ),
        "mistral": transformers.MistralConfig(**sizes, sliding_window=None),
        "mixtral": transformers.MixtralConfig(**sizes, num_local_experts=3),
        "mpt": transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=120),
        "qwen3_moe": transformers.Qwen3MoeConfig(**sizes, **experts, num_experts=3),
        "glm4_moe": transformers.Glm4MoeConfig(
            **(sizes | experts | {"n_routed_experts": 3}),
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
        ),
    }
    results = {}
    for name, chosen in configs.items():
        theirs = transformers.AutoModelForCausalLM.from_config(chosen)
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.normal_(std=0.2)
        theirs.save_pretrained(folder / name)
        results[name] = difference(imported(folder / name)[0], theirs)
    return results


def first_gpt2(folder: Path) -> float:
    """Import a file like the first GPT-2's: names without prefix, a mask among the tensors, missing keys."""
    model = drawn(settings_of("gpt2", "sp"))
    hf_config, tensors = huggingface.export(settings_of("gpt2", "sp"), weights_of(model))
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors}
    old["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    del hf_config["tie_word_embeddings"], hf_config["scale_attn_weights"]
    hf_config["activation_function"] = "gelu_new"
    write(folder / "gpt2-old", hf_config, old)
    return difference(imported(folder / "gpt2-old")[0], loaded(folder / "gpt2-old"))


def lost_bias() -> str:
    """Return the error for a router's bias that the family does not have."""
    config = settings_of("mixtral", "sp")
    weights = weights_of(drawn(config))
    weights["blocks.1.mlp.router.bias"][3] = 0.1
    with pytest.raises(UserError) as error:
        dict(huggingface.export(config, weights)[1])
    return str(error.value)


def padding() -> dict[str, float]:
    """Return the padding's probability where all logits are about -60: as imported, and as zeros."""
    model = drawn(settings_of("gpt2", "sp"))
    weights = weights_of(model)
    shift = torch.ones(32)
    weights["embedding.weight"] += shift
    weights["final_norm.bias"] -= 2 * shift
    hf_config, tensors = huggingface.export(settings_of("gpt2", "sp"), weights)
    _, pairs = huggingface.import_(hf_config, dict(tensors))
    weights = dict(pairs)
    results = {}
    for name in ("mean", "zeros"):
        with torch.no_grad():
            logits = filled(settings_of("gpt2", "sp"), weights)(tokens())
        assert logits[..., :120].amax() < -30
        results[name] = logits.softmax(-1)[..., 120:].sum(-1).amax().item()
        weights["embedding.weight"][120:] = 0
    return results


def with_table(**changed: float) -> Any:
    """Patch the multipliers that are folded into the weights."""
    return mock.patch.object(huggingface, "table_of", lambda config: replace(table_of(config), **changed))


def with_family(family: families.Family, **changed: Any) -> Any:
    return mock.patch.object(families, "FAMILIES", (replace(family, **changed),))


def swapped(family: families.Family, one: str, other: str) -> dict[str, str]:
    return {**family.per_block, one: family.per_block[other], other: family.per_block[one]}


def mistakes() -> Iterator[tuple[str, str, Any]]:
    """Yield a description, a case, and the patch that makes the mistake."""
    for case in ("llama", "qwen3", "gpt2"):
        size = settings_of(case, "sp").model.head_size
        yield f"{case}: attention's multiplier forgotten", case, with_table(attention=size**-0.5)
        for name in ("embedding", "residual", "logits"):
            yield f"{case}: {name} multiplier forgotten", case, with_table(**{name: 1.0})
    yield "experts: residual multiplier forgotten", "glm4 moe", with_table(residual=1.0)
    llama, neox, mixtral = families.LLAMA, families.NEOX, families.MIXTRAL
    backwards = {**llama.per_block, "attention.qkv": " ".join(reversed(llama.per_block["attention.qkv"].split()))}
    yield "gate and up swapped", "llama", with_family(llama, per_block=swapped(llama, "mlp.gate", "mlp.up"))
    experts = swapped(mixtral, "mlp.experts.gate", "mlp.experts.up")
    yield "experts: gate and up swapped", "mixtral", with_family(mixtral, per_block=experts)
    yield "norms swapped", "llama", with_family(llama, per_block=swapped(llama, "attention_norm", "mlp_norm"))
    yield "keys and queries swapped", "llama, tied", with_family(llama, per_block=backwards)
    yield "heads not grouped", "neox", with_family(neox, qkv="stacked")
    yield "heads grouped", "gpt2", with_family(families.GPT2, qkv="grouped")
    yield (
        "one transpose forgotten",
        "gpt2",
        mock.patch.object(huggingface, "LINEAR", families.LINEAR[:1] + families.MLP),
    )
    for setting in ("rope_theta", "norm_eps"):
        yield f"{setting} by no key of theirs", "llama", with_family(llama, keys={**llama.keys, setting: "nothing"})
    yield "the other GELU", "neox", mock.patch.dict(families.ACTIVATIONS, {"gelu": "gelu", "gelu_new": "gelu-exact"})


def everything(folder: Path) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    one_way = {
        (case, table): exported(settings_of(case, table), folder / f"{case} {table}")
        for case in CASES
        for table in ("mup", "completep", "smupar")
    }
    planted = {}
    for number, (name, case, patch) in enumerate(mistakes()):
        with patch:
            planted[name] = exported(settings_of(case, "completep"), folder / f"mistake {number}")
    return {
        "one way": one_way,
        "float64": exported(settings_of("gpt2", "completep", "float64"), folder / "float64"),
        "both ways": {case: there_and_back(case, folder / case) for case in CASES},
        "quantized": quantized(folder / "quantized"),
        "some biases": some_biases(folder),
        "first gpt2": first_gpt2(folder),
        "padding": padding(),
        "lost bias": lost_bias(),
        "planted": planted,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.run_afresh(1, everything, tmp_path_factory.mktemp("huggingface"))[0]


@needs_transformers
def test_transformers_computes_our_logits(results: Any) -> None:
    far = {case: by for case, by in results["one way"].items() if not by <= RTOL}
    assert not far
    assert results["float64"] < 1e-14


@needs_transformers
def test_torchao_quantizes_an_export_as_it_was_trained(results: Any) -> None:
    assert results["quantized"]["after"] <= RTOL < 0.01 < results["quantized"]["before"]


@needs_transformers
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(results: Any, case: str) -> None:
    """SP's weights are bitwise equal; a bias that one side lacks is zeros on the other."""
    result = results["both ways"][case]
    assert result.pop("difference") <= RTOL
    assert result == {"type": CASES[case][0], "weights": True, "only zeros besides": True, "again": True}


@needs_transformers
def test_their_models_are_ours(results: Any) -> None:
    assert {name: by for name, by in results["some biases"].items() if not by <= RTOL} == {}
    assert results["first gpt2"] <= RTOL


@needs_transformers
def test_padding_takes_no_probability(results: Any) -> None:
    assert results["padding"]["mean"] <= 8 / 128
    assert results["padding"]["zeros"] > 0.99


@needs_transformers
def test_a_bias_is_not_lost(results: Any) -> None:
    assert results["lost bias"].startswith("blocks.1.mlp.router.bias is not 0, and MixtralForCausalLM")


@needs_transformers
def test_mistakes_are_seen(results: Any) -> None:
    assert {name: by for name, by in results["planted"].items() if not by > 4 * RTOL} == {}
    assert len(results["planted"]) == 23


class Counted(Mapping[str, Tensor]):
    """Weights that record their lookups."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.looked_up = weights, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.looked_up.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def plain_gpt2() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the export of a small GPT-2."""
    config = settings_of("gpt2", "sp")
    shapes = {"attention.qkv": (96, 32), "attention.out": (32, 32), "mlp.up": (48, 32), "mlp.down": (32, 48)}
    shapes |= {"embedding": (128, 32), "positions": (16, 32), "final_norm": (32,)}
    shapes |= {"attention_norm": (32,), "mlp_norm": (32,)}
    weights = {}
    for name, shape in shapes.items():
        inside = name not in ("embedding", "positions", "final_norm")
        for place in [f"blocks.{layer}.{name}" for layer in range(2)] if inside else [name]:
            weights[f"{place}.weight"] = torch.zeros(shape)
            weights[f"{place}.bias"] = torch.zeros(shape[0])
    hf_config, tensors = huggingface.export(config, weights)
    return hf_config, dict(tensors)


def test_one_tensor_at_a_time() -> None:
    """Tensors are read one at a time, so that a model need not fit into memory."""
    hf_config, tensors = plain_gpt2()
    weights = Counted(tensors)
    _, ours = huggingface.import_(hf_config, weights)
    for number, _ in enumerate(ours, 1):
        assert len(weights.looked_up) == number
    back = Counted(dict(huggingface.import_(hf_config, tensors)[1]))
    for number, _ in enumerate(huggingface.export(settings_of("gpt2", "sp"), back)[1], 1):
        assert len(back.looked_up) == number


@pytest.mark.parametrize(
    ("model", "nearest", "needs"),
    [
        ({"positions": "none"}, "LlamaForCausalLM", "model.positions = 'rope', not 'none'"),
        ({"qk_norm": True, "bias": True}, "LlamaForCausalLM", "model.qk_norm = False, not True"),
        (
            {"qk_norm": True, "activation": "relu2"},
            "Qwen3ForCausalLM",
            "model.activation = 'swiglu' or 'geglu', not 'relu2'",
        ),
        ({**GPT2, "qk_norm": True}, "GPT2LMHeadModel", "model.qk_norm = False, not True"),
        ({**MPT, "mlp_width": 96}, "MptForCausalLM", "model.mlp_width = 128, not 96"),
        (
            {**MOE, "positions": "none", "rope_theta": 10000.0},
            "Glm4MoeForCausalLM",
            "model.positions = 'rope', not 'none'",
        ),
        (
            {**MOE, "router_score": "softmax", "router_scale": 2.0},
            "MixtralForCausalLM",
            "model.router_scale = 1.0, not 2.0",
        ),
        (
            {**GPT2, "heads": 5, "head_size": 8, "activation": "swiglu"},
            "GPT2LMHeadModel",
            "model.head_size = 6, not 8 and model.activation = 'gelu' or 'gelu-exact' or 'relu2', not 'swiglu' and "
            "model.heads = 5 to divide model.width = 32",
        ),
    ],
)
def test_a_model_that_they_do_not_have(model: dict[str, Any], nearest: str, needs: str) -> None:
    config = resolve.resolve([("test", BASE), ("test", {"model": model})]).config
    with pytest.raises(UserError) as error:
        huggingface.export(config, {})
    words = f"Hugging Face has no architecture of this model; {nearest}, the nearest, needs {needs}"
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model_type": "bert"}, "model_type = 'bert'"),
        ({"model_type": ["gpt2"]}, r"model_type = \['gpt2'\]"),
        ({"activation_function": ["gelu"]}, r"activation_function = \['gelu'\]"),
        ({"rope_scaling": "x"}, "rope_scaling = 'x' is not a table"),
        ({"n_head": "four"}, "model.heads"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"n_head": 5}, "model.heads = 5"),
        ({"n_layer": 3}, "missing, such as transformer.h.2.attn.c_attn.bias"),
        ({"n_layer": 1}, "do not belong to it, such as transformer.h.1.attn.c_attn.bias"),
        ({"n_layer": None}, "model.layers = 0"),
    ],
)
def test_a_model_that_we_do_not_have(changed: dict[str, Any], word: str) -> None:
    hf_config, tensors = plain_gpt2()
    with pytest.raises(UserError, match=word):
        huggingface.import_(hf_config | changed, tensors)


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("config.json", "[1]", "config.json holds no object, but a list"),
        ("model.safetensors.index.json", '{"metadata": {}}', "index.json has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"wte.weight": 1}}', "index.json has no weight_map"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, file: str, text: str, word: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(plain_gpt2()[0]))
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=word):
        huggingface_folder.read(tmp_path)


def test_a_configuration_that_is_not_whole() -> None:
    hf_config, tensors = plain_gpt2()
    del hf_config["n_embd"]
    with pytest.raises(UserError, match="n_embd"):
        huggingface.import_(hf_config, tensors)


def test_other_attention_in_a_table_of_a_table() -> None:
    """MPT has its attention's settings in a table, which may have more keys, or be missing."""
    config = resolve.resolve([("test", BASE), ("test", {"model": MPT})]).config
    hf_config, _ = huggingface.export(config, {})
    for attention, fits in ((None, True), ({"attn_impl": "torch"}, True), ({"clip_qkv": 8}, False)):
        with pytest.raises(UserError, match="tensors" if fits else "attn_config"):
            huggingface.import_({**hf_config, "attn_config": attention}, {})
