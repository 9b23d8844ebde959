"""Parameters and operations in closed form, against the papers', the built model and PyTorch's own counter."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from distributed import world
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megahp.config import Config, ModelConfig, resolve
from megahp.model.build import build_model
from megahp.parallel import cross_entropy
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.parallel.parameters import parameters as named_parameters
from megahp.scaling.flops import parameters, pipeline_bubble, training_flops

LENGTH = 2048
GPT3 = (96, 12288, 96, 1536, 1.7462e11, 4.51097e18)
TRILLION = (128, 25600, 160, 3072, 1.00804e12, 5.13905e19)


def gpt(layers: int, width: int, heads: int) -> ModelConfig:
    model = {"layers": layers, "width": width, "heads": heads, "mlp_width": 4 * width, "vocab_size": 51200}
    kind = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True}
    return resolve.from_dict({"model": model | kind}, "test").model


@pytest.mark.parametrize(("l", "h", "heads", "batch", "weights", "operations"), [GPT3, TRILLION])
def test_megatrons_formulas(l: int, h: int, heads: int, batch: int, weights: float, operations: float) -> None:  # noqa: E741
    """Check 36: P and F of arXiv 2104.04473, F with everything recomputed but the logits, and all of attention."""
    model, s, v = gpt(l, h, heads), LENGTH, 51200
    p = 12 * l * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * l * h))
    f = 96 * batch * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))
    assert parameters(model, LENGTH) == pytest.approx(p, rel=1e-6)  # theirs leaves out the last norm
    flops = batch * s * training_flops(model, s, causal=False, recomputed_layers=l)
    assert flops == pytest.approx(f, rel=1e-12)
    assert (p, f) == (pytest.approx(weights, rel=3e-5), pytest.approx(operations, rel=1e-6))


def test_the_bubble_of_a_pipeline() -> None:
    """Check 36: eight ranks, eight microbatches; 32; four stages a rank."""
    assert (pipeline_bubble(8, 8), pipeline_bubble(8, 32), pipeline_bubble(8, 32, 4)) == (0.875, 0.21875, 0.0546875)


def test_recomputation_adds_one_forward_pass_of_its_layers() -> None:
    model = gpt(4, 256, 4)
    plain, one, all_four = (training_flops(model, 64, recomputed_layers=n) for n in (0, 1, 4))
    assert all_four - plain == pytest.approx(4 * (one - plain))
    assert 3 * (all_four - plain) == plain - 3 * 2 * 256 * 51200  # logits are not recomputed


def test_causal_attention_counts_half() -> None:
    model = gpt(4, 256, 4)
    both = [training_flops(model, 64, causal) for causal in (False, True)]
    assert both[0] - both[1] == 3 * 4 * 2 * 64 * 256


def test_a_window_counts_what_it_attends_to() -> None:
    """Of 64 queries the first 16 attend to 1 to 16 keys, the others to 16; one block of two has no window."""
    full = gpt(2, 256, 4)
    half = replace(full, window=16, full_attention_every=2)
    pairs = sum(min(query + 1, 16) for query in range(64)) - 16 / 2  # the diagonal counts half, as without a window
    assert (training_flops(full, 64) - training_flops(half, 64)) == 3 * 2 * 2 * 256 * (64 / 2 - pairs / 64)


MODELS = {
    "llama": {"kv_heads": 2},
    "qk norm": {"qk_norm": True, "head_size": 32},
    "gpt2": {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True},
    "alibi": {"activation": "relu2", "norm": "layernorm", "positions": "alibi", "bias": True, "vocab_size": 130},
    "swiglu with biases": {"bias": True},
    "post-norms": {"activation": "geglu", "norm_placement": "both", "kv_heads": 2, "qkv_bias": True},
    "xielu": {"activation": "xielu", "norm_placement": "post", "qk_norm": True, "qk_norm_whole": True, "kv_heads": 2},
    "experts": {"experts": 6, "experts_per_token": 3, "expert_width": 32, "shared_experts": 2, "dense_layers": 1},
}


def settings_of(model: dict) -> Config:
    base = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 96, "vocab_size": 128}
    return resolve.from_dict({"model": base | model, "data": {"sequence_length": 16}}, "test")


def counted() -> dict[str, tuple[int, int, int]]:
    """Weights of each built model, those that a token meets, and what PyTorch counts of a forward and backward pass
    over 3 x 16 tokens."""
    found = {}
    mesh = make_mesh(Layout(), torch.device("cpu"))
    for name, words in MODELS.items():
        config = settings_of(words)
        (model,) = build_model(config, mesh).stages.values()
        tokens = torch.randint(128, (3, 16))
        # as products it knows: the CPU's own attention kernel is one that the counter passes over
        recomputed = mock.patch.object(cross_entropy, "KEPT", 0)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), recomputed:
            model(tokens, tokens).sum().backward()
        weights = {name: math.prod(weight.shape) for name, weight in named_parameters(model)}
        idle = sum(count for name, count in weights.items() if ".experts." in name) // 2  # 3 of 6 experts
        total = sum(weights.values())
        found[name] = total, total - idle, counter.get_total_flops()
    return found


def test_the_built_model_has_as_many_and_pytorch_counts_the_same() -> None:
    """Both count matrix products alone. PyTorch counts all of attention, for a causal mask saves its kernel nothing,
    and the logits again, where the loss computes them anew in its backward pass: work of the hardware's alone."""
    (found,) = world.run(1, counted)
    for name, (weights, active, flops) in found.items():
        model = settings_of(MODELS[name]).model
        assert (parameters(model, 16), parameters(model, 16, active=True)) == (weights, active), name
        again = 2 * model.width * model.padded_vocab
        assert 3 * 16 * (training_flops(model, 16, causal=False) + again) == flops, name
