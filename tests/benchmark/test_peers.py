"""The peers of the training benchmark are the baseline's model: the same loss of the same weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from distributed import world
from torch import nn

from megahp.benchmark import nanogpt, peers
from megahp.config import resolve

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "megatron", "psutil")),
    reason="transformers, megatron-core or psutil, which it imports, are not installed",
)
SHAPE = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "vocab_size": 64}
LENGTH = 16


def losses() -> tuple[float, dict[str, float]]:
    """Of all three with one set of weights."""
    model = resolve.from_dict({"model": SHAPE}, "test").model
    torch.manual_seed(0)
    ours = nanogpt.GPT(model, LENGTH)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    theirs = {"huggingface": peers.HuggingFaceLlama(model, LENGTH)}
    theirs["megatron-core"] = peers.MegatronGPT(model, LENGTH, torch.float32)
    copy_to_huggingface(ours, theirs["huggingface"].model)
    copy_to_megatron(ours, theirs["megatron-core"].model, model.heads)
    tokens = torch.randint(0, 64, (2, LENGTH + 1))
    given = tokens[:, :-1], tokens[:, 1:]
    return ours(*given).item(), {name: peer(*given).item() for name, peer in theirs.items()}


def copy_to(target: nn.Module, weights: dict[str, Any]) -> None:
    own = {name: value for name, value in target.state_dict().items() if torch.is_tensor(value)}
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    for name, value in own.items():
        value.copy_(weights[name])


@torch.no_grad()
def copy_to_huggingface(ours: nanogpt.GPT, llama: nn.Module) -> None:
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for number, block in enumerate(ours.blocks):
        query, key, value = block.attention.qkv.weight.chunk(3)
        weights |= {
            f"model.layers.{number}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.norm_1.weight,
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": block.attention.out.weight,
                "post_attention_layernorm": block.norm_2.weight,
                "mlp.gate_proj": block.mlp.gate.weight,
                "mlp.up_proj": block.mlp.up.weight,
                "mlp.down_proj": block.mlp.down.weight,
            }.items()
        }
    copy_to(llama, weights)


@torch.no_grad()
def copy_to_megatron(ours: nanogpt.GPT, gpt: nn.Module, heads: int) -> None:
    weights: dict[str, Any] = {
        "embedding.word_embeddings.weight": ours.embedding.weight,
        "decoder.final_layernorm.weight": ours.norm.weight,
        "output_layer.weight": ours.head.weight,
    }
    for number, block in enumerate(ours.blocks):
        parts = [part.unflatten(0, (heads, -1)) for part in block.attention.qkv.weight.chunk(3)]
        weights |= {
            f"decoder.layers.{number}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.norm_1.weight,
                "self_attention.linear_qkv": torch.cat(parts, 1).flatten(0, 1),  # head by head
                "self_attention.linear_proj": block.attention.out.weight,
                "pre_mlp_layernorm": block.norm_2.weight,
                "mlp.linear_fc1": torch.cat((block.mlp.gate.weight, block.mlp.up.weight)),
                "mlp.linear_fc2": block.mlp.down.weight,
            }.items()
        }
    copy_to(gpt, weights)


@needs_packages
def test_they_are_one_model() -> None:
    ours, theirs = world.run_afresh(1, losses)[0]
    assert theirs == pytest.approx(dict.fromkeys(theirs, ours), rel=1e-5)
