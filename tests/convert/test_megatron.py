"""Megatron-Core itself, from pip, reads our files, and we read its, with the same logits."""

from __future__ import annotations

import importlib.util
import multiprocessing
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import test_convert as convert_test
from convert.test_huggingface import GPT2, GQA
from distributed import world
from torch.nn import functional

from megahp import checkpoint
from megahp.benchmark.peers import on_cpu
from megahp.checkpoint.shards import Tensors
from megahp.commands.convert import our_logits, weights_of
from megahp.config import resolve
from megahp.exit_codes import NOT_CHECKED

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("megatron", "psutil")),
    reason="megatron-core and psutil, which it imports, are not installed",
)
CASES = {"llama": ("any", GQA), "gpt": ("sp", {**GPT2, "tied_embeddings": True})}
TOKENS = 3 * torch.arange(40)[None]


def of_args(args: Namespace) -> Any:
    """Build Megatron's model from a checkpoint's args, as its training script does, with random weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        add_bias_linear=args.add_bias_linear,
        gated_linear_unit=args.swiglu,
        activation_func=functional.silu if args.swiglu else lambda x: functional.gelu(x, approximate="tanh"),
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        hidden_dropout=0,
        attention_dropout=0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base,
    ).eval()


@torch.no_grad()
def difference(theirs: Any, ours: Path) -> float:
    """Return the largest difference of the logits, over our largest."""
    config = resolve.from_dict(checkpoint.read_state(ours)["config"], str(ours))
    local = our_logits(config, weights_of(Tensors(ours).items()), TOKENS)
    later = torch.ones(1, 1, 40, 40).triu(1) > 0
    logits = theirs(TOKENS, torch.arange(40)[None], later)[..., : config.model.vocab_size]
    return ((local - logits).abs().max() / local.abs().max()).item()


@on_cpu()
def both_ways(folder: Path) -> dict[str, float]:
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(1, 1)
    results = {}
    for name, (table, model) in CASES.items():
        place = folder / name
        convert_test.written(convert_test.settings_of(table, model), place / "ours")
        for form in ("megatron", "megatron-legacy"):
            output = convert_test.convert("megahp", form, place / "ours", place / form, "--no-check")
            assert output[0] == 0, output[1]
        legacy = torch.load(place / "megatron-legacy/release/mp_rank_00/model_optim_rng.pt", weights_only=False)
        theirs = of_args(legacy["args"])
        theirs.load_state_dict(legacy["model"])
        results[f"{name}: reads our legacy file"] = difference(theirs, checkpoint.find(place / "ours"))
        theirs = of_args(legacy["args"])
        expected = {"model": theirs.sharded_state_dict()}
        theirs.load_state_dict(dist_checkpointing.load(expected, str(place / "megatron/release"))["model"])
        results[f"{name}: reads our torch_dist"] = difference(theirs, checkpoint.find(place / "ours"))

        theirs = of_args(legacy["args"])  # its own random weights
        shaken(theirs.parameters())
        (place / "saved/iter_0000007").mkdir(parents=True)
        state = {"args": legacy["args"], "iteration": 7, "model": theirs.sharded_state_dict()}
        dist_checkpointing.save(state, str(place / "saved/iter_0000007"))
        (place / "saved/latest_checkpointed_iteration.txt").write_text("7")
        words = [place / "saved", place / "back", "--tokenizer", "bytes"]
        output = convert_test.convert("megatron", "megahp", *words)
        assert output[0] == NOT_CHECKED, output[1]
        results[f"{name}: its torch_dist is read"] = difference(theirs, checkpoint.find(place / "back"))
    for process in multiprocessing.active_children():  # its writers' queue, which nobody else would end
        process.terminate()
    return results


@torch.no_grad()
def shaken(parameters: Any) -> None:
    """Add noise, so that norms and biases are not ones and zeros."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def test_megatron_core_and_we_read_each_other(tmp_path: Path) -> None:
    (results,) = world.run_afresh(1, both_ways, tmp_path)
    assert len(results) == 3 * len(CASES)
    assert all(0 < off < 1e-5 for off in results.values()), results
