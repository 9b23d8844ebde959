"""The transformer against an independent one written from the papers, and what its attention may look at."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import MODELS, Training, settings_of
from torch import Tensor

from megahp.model import transformer
from megahp.model.positions import alibi_slopes
from megahp.parallel.parameters import storage


def plain_norm(x: Tensor, weights: dict[str, Tensor], name: str, kind: str, eps: float) -> Tensor:
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def plain_rope(x: Tensor, m: Any, windowed: bool) -> Tensor:
    """x [s, d]: the first dimensions as complex numbers x[i] + i x[i + n/2], times exp(i position frequency)."""
    length, size = len(x), int(x.shape[1] * m.rope_fraction)
    half, local = size // 2, windowed and m.window_rope_theta
    frequency = [(m.window_rope_theta if local else m.rope_theta) ** (-2 * i / size) for i in range(half)]
    if not local and m.rope_scaling != "none":
        frequency = [stretched(f, i, size, m) for i, f in enumerate(frequency)]
    angle = torch.arange(length)[:, None] * torch.tensor(frequency, dtype=torch.float64)
    radius = torch.full_like(angle, 0.1 * math.log(m.rope_factor) + 1 if m.rope_scaling == "yarn" else 1.0)
    turned = torch.complex(x[:, :half], x[:, half:size]) * torch.polar(radius, angle).to(torch.complex128)
    return torch.cat((turned.real, turned.imag, x[:, size:]), 1)


def stretched(frequency: float, i: int, size: int, m: Any) -> float:
    """A frequency for longer sequences, by the cases that the papers name."""
    turns = m.rope_original_length * frequency / (2 * math.pi)
    if m.rope_scaling == "linear" or turns <= m.rope_slow:
        return frequency / m.rope_factor
    if turns >= m.rope_fast:
        return frequency
    if m.rope_scaling == "llama3":
        share = (turns - m.rope_slow) / (m.rope_fast - m.rope_slow)
    else:  # by the index, between those of the two limits, rounded outwards
        at = [
            size / 2 * math.log(m.rope_original_length / (2 * math.pi * limit), m.rope_theta)
            for limit in (m.rope_fast, m.rope_slow)
        ]
        first, last = max(0, math.floor(at[0])), math.ceil(at[1])
        share = 1 - (i - first) / (last - first)
    return share * frequency + (1 - share) * frequency / m.rope_factor


def plain_transformer(
    tokens: Tensor, documents: Tensor | None, w: dict[str, Tensor], chosen: Any, table: Any
) -> Tensor:
    """Logits of one sequence [s] of token ids, head by head, in float64."""
    m, length = chosen.model, len(tokens)
    x = w["embedding.weight"][tokens]
    if m.positions == "learned":
        x = x + w["positions.weight"][:length]
    x = x * table.embedding
    linear = lambda y, name: y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)  # noqa: E731
    for layer in range(m.layers):
        at = f"blocks.{layer}"
        before, after = m.norm_placement != "post", m.norm_placement != "pre"
        norm = lambda y, name: plain_norm(y, w, f"{at}.{name}", m.norm, m.norm_eps)  # noqa: B023, E731
        every = m.full_attention_every
        window = m.window if m.window and not (every and layer % every == every - 1) else length
        entry = x
        qkv = linear(norm(x, "attention_norm") if before else x, f"{at}.attention.qkv")
        groups, per_group = qkv.view(length, m.kv_heads, -1, m.head_size), m.heads // m.kv_heads
        heads = []
        for head in range(m.heads):
            group = groups[:, head // per_group]
            q, k, v = group[:, head % per_group], group[:, per_group], group[:, per_group + 1]
            if m.qk_norm_whole:
                q, k = (
                    part
                    / (all_of.square().mean((1, 2))[:, None] + m.norm_eps).sqrt()
                    * w[name].view(-1, m.head_size)[i]
                    for part, all_of, name, i in (
                        (q, groups[:, :, :per_group].flatten(1, 2), f"{at}.attention.query_norm.weight", head),
                        (k, groups[:, :, per_group], f"{at}.attention.key_norm.weight", head // per_group),
                    )
                )
            elif m.qk_norm:
                q = plain_norm(q, w, f"{at}.attention.query_norm", "rmsnorm", m.norm_eps)
                k = plain_norm(k, w, f"{at}.attention.key_norm", "rmsnorm", m.norm_eps)
            if m.positions == "rope" and not (m.no_rope_every and layer % m.no_rope_every == m.no_rope_every - 1):
                q, k = plain_rope(q, m, window < length), plain_rope(k, m, window < length)
            scores = q @ k.T * table.attention
            scores = m.attention_softcap * (scores / m.attention_softcap).tanh() if m.attention_softcap else scores
            for i in range(length):
                for j in range(length):
                    apart = documents is not None and documents[i] != documents[j]
                    scores[i, j] = -math.inf if j > i or i - j >= window or apart else scores[i, j]
                    if m.positions == "alibi" and j <= i:
                        scores[i, j] -= 2 ** (-8 * (head + 1) / m.heads) * (i - j)
            heads.append(scores.softmax(-1) @ v)
        out = linear(torch.cat(heads, -1), f"{at}.attention.out")
        x = x + table.residual * (norm(out, "attention_post_norm") if after else out)
        y = entry if m.parallel_residual else x
        y = norm(y, "mlp_norm") if before else y
        if f"{at}.mlp.router.weight" in w:
            x = x + table.residual * plain_experts(y, w, f"{at}.mlp", m)
            continue
        up = linear(y, f"{at}.mlp.up")
        if m.activation == "swiglu":
            gate = linear(y, f"{at}.mlp.gate")
            up = gate * torch.sigmoid(gate) * up
        elif m.activation == "geglu":
            gate = linear(y, f"{at}.mlp.gate")
            up = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        elif m.activation == "gelu":
            up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        elif m.activation == "xielu":
            p, n = ((1 + w[f"{at}.mlp.{name}"].exp()).log() for name in ("alpha_p", "alpha_n"))
            curve = torch.where(up > 0, p * up**2, (n + 0.5) * (up.exp() - 1 - up))
            up = curve + up / 2
        else:
            up = up.clamp(min=0) ** 2
        out = linear(up, f"{at}.mlp.down")
        x = x + table.residual * (norm(out, "mlp_post_norm") if after else out)
    x = plain_norm(x, w, "final_norm", m.norm, m.norm_eps)
    logits = x @ w["embedding.weight" if m.tied_embeddings else "unembedding.weight"].T * table.logits
    return m.logits_softcap * (logits / m.logits_softcap).tanh() if m.logits_softcap else logits


def plain_experts(x: Tensor, w: dict[str, Tensor], at: str, m: Any) -> Tensor:
    """x [s, width], every token through every expert, most of them with weight 0."""
    logits = x @ w[f"{at}.router.weight"].T
    scores = logits.softmax(1) if m.router_score == "softmax" else logits.sigmoid()
    weights = scores.where(scores >= scores.sort(1).values[:, -m.experts_per_token, None], 0.0)
    weights = weights / weights.sum(1, keepdim=True) if m.router_normalize else weights
    swiglu = lambda up, gate, down: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T  # noqa: E731
    experts = [swiglu(*(w[f"{at}.experts.{name}"][i] for name in ("up", "gate", "down"))) for i in range(m.experts)]
    y = m.router_scale * torch.einsum("si,isd->sd", weights, torch.stack(experts))
    return y + swiglu(*(w[f"{at}.shared.{name}.weight"] for name in ("up", "gate", "down"))) if m.shared_experts else y


def both_logits() -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in MODELS:
        chosen = settings_of(name, "train.dtype=float64", "parameterization.output_multiplier=3.0")
        training = Training(chosen)
        for weight in training.engine.weights.values():
            storage(weight).add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        tokens = torch.from_numpy(np.random.RandomState(0).randint(0, 128, (1, 12)))
        documents = torch.tensor([[0] * 5 + [1] * 7]) if chosen.data.mask_documents else None
        model = training.engine.stages[0]
        with torch.no_grad():
            ours = model(tokens, documents=documents)[0]
            plain = plain_transformer(
                tokens[0], None if documents is None else documents[0], training.weights(), chosen, model.table
            )
        found[name] = ours, plain
    return found


def separate_documents() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits of the second of two documents, packed behind the first with the mask, and alone."""
    found = {}
    for positions in ("rope", "alibi", "none"):
        model = Training(settings_of("llama", "train.dtype=float64", f"model.positions={positions}")).engine.stages[0]
        tokens = torch.from_numpy(np.random.RandomState(0).randint(0, 128, (1, 16)))
        with torch.no_grad():
            packed = model(tokens, documents=torch.tensor([[0] * 6 + [1] * 10]))[0, 6:]
            found[positions] = packed, model(tokens[:, 6:])[0]
    return found


def untrained() -> dict[str, Tensor]:
    """Losses of models whose logits are nearly equal, 38 rows of 128 padding the vocabulary of the latter two."""
    words = {
        "whole": (),
        "masked": ("model.vocab_size=90",),
        "included": ("model.vocab_size=90", "model.padding=included"),
    }
    tokens, found = torch.from_numpy(np.random.RandomState(0).randint(0, 90, (2, 17))), {}
    for name, more in words.items():
        training = Training(settings_of("llama", "parameterization.init_std=0.001", *more))
        found[name] = training.engine.stages[0](tokens[:, :-1], tokens[:, 1:]).detach()
    return found


def drawn(init: str) -> dict[str, Tensor]:
    return Training(settings_of("moe", f"parameterization.residual_init={init}")).weights()


@pytest.fixture(scope="module")
def found() -> Any:
    return world.run(1, everything)[0]


def everything() -> Any:
    return both_logits(), separate_documents(), untrained(), drawn("same"), drawn("gpt2")


@pytest.mark.parametrize("name", MODELS)
def test_equals_an_independent_transformer(found: Any, name: str) -> None:
    ours, plain = found[0][name]
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)  # rope's angles are fp32 in ours
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_masked_documents_do_not_see_each_other(found: Any, positions: str) -> None:
    packed, alone = found[1][positions]
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("case", "rows"), [("whole", 128), ("masked", 90), ("included", 128)])
def test_an_untrained_model_knows_nothing(found: Any, case: str, rows: int) -> None:
    losses = found[2][case]
    assert losses.mean().item() == pytest.approx(math.log(rows), abs=1e-3)
    assert losses.shape == (2, 16)


def test_gpt2s_residual_init_halves_the_last_matrices_of_two_blocks_branches(found: Any) -> None:
    same, gpt2 = found[3:]
    ends = ("attention.out.weight", "mlp.down.weight", "mlp.shared.down.weight", "mlp.experts.down")
    assert {name.split(".", 2)[-1] for name in same if not same[name].equal(gpt2[name])} == set(ends)
    assert all(gpt2[name].equal(same[name] / 2) for name in same if name.endswith(ends))


def beyond_training() -> dict[str, Any]:
    """Logits at 32 tokens of a model that trains on 16 at most, and of one that trains on 32 with other slopes."""
    tokens = torch.from_numpy(np.random.RandomState(0).randint(0, 128, (2, 32)))
    words = ("model.positions=alibi", "train.dtype=float64")
    short, long = (Training(settings_of("llama", *words, *more)).engine.stages[0] for more in ((), (LONGER,)))
    with torch.no_grad():
        found = {"interpolated": short(tokens), "trained": long(tokens), "within": short(tokens[:, :16])}
        halved = mock.patch.object(transformer, "alibi_slopes", lambda heads, stretch: alibi_slopes(heads) / 2)
        with halved:
            found["halved"] = long(tokens)
        found["within, trained"] = long(tokens[:, :16])
    return found


LONGER = 'data.lengths=["640:32"]'


def test_a_model_reads_twice_its_training_length_with_half_the_slopes() -> None:
    found = world.run(1, beyond_training)[0]
    assert torch.equal(found["interpolated"], found["halved"])
    assert not torch.allclose(found["interpolated"], found["trained"])  # a length it trains on is not stretched
    assert torch.equal(found["within"], found["within, trained"])
