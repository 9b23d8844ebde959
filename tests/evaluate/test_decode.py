"""Tokens generated with a cache against those of one forward pass of the whole context a token, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import world
from distributed.training import settings_of
from torch import Tensor

from megahp.data.tokenizer import tokenizer_of
from megahp.errors import UserError
from megahp.evaluate.decode import Decoder, arrange_products, draw
from megahp.evaluate.sample import TrainedModel, continuation, generate, single_rank_model
from megahp.parallel.parameters import parameters, storage

TRAINED, CONTEXT, TOKENS = 16, {"llama": 16, "alibi": 32}, 40
PROMPT = [*b"Go on"]


@torch.no_grad()
def trained(name: str) -> TrainedModel:
    config = settings_of(name, "train.dtype=float64", "model.vocab_size=300", "parameterization.output_multiplier=8.0")
    model = single_rank_model(config)
    generator = torch.Generator().manual_seed(1)
    for _, weight in parameters(model):
        storage(weight).add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return TrainedModel(Path(), config, model, tokenizer_of(config.data), torch.device("cpu"))


def one_pass_a_token(
    run: TrainedModel, context: int, ids: list[int], temperature: float, top_k: int, seed: int
) -> list[int]:
    """Sample without a cache, from the softmax of the last tokens' logits."""
    generator, found = torch.Generator().manual_seed(seed), list(ids)
    for _ in range(TOKENS):
        logits = run.model(torch.tensor([found[-context:] or [256]]))[0, -1, :257].float()
        if temperature == 0:
            found.append(int(logits.argmax()))
            continue
        kept = logits >= logits.sort().values[-top_k] if top_k else logits > -torch.inf
        weights = torch.where(kept, ((logits - logits.max()) / temperature).exp(), 0.0)
        found.append(int(torch.multinomial((weights / weights.sum())[None], 1, generator=generator)))
    return found[len(ids) :]


@torch.no_grad()
def everything() -> Any:
    found: dict[Any, Any] = {}
    for name, context in CONTEXT.items():
        run, counts = trained(name), list[int]()
        with run.model.register_forward_pre_hook(lambda _, inputs, counts=counts: counts.append(inputs[0].shape[1])):
            for ids in ([], PROMPT, PROMPT * 4):
                for how in ((0.0, 0, 1), (0.8, 0, 1), (1.5, 5, 2)):
                    own = [int(token) for (token,) in continuation(run, ids, TOKENS, *how)]
                    found[name, len(ids), how] = own, one_pass_a_token(run, context, ids, *how)
            counts.clear()
            list(continuation(run, PROMPT, TOKENS, 0.0, 0, 1))
            found[name, "tokens of each pass"] = list(counts)
        found[name, "samples"] = batches(run, context)
    return found | arranged()


def arranged() -> dict[Any, Any]:
    """Logits before and after the products are arranged, and how two matrices lie in memory then."""
    found: dict[Any, Any] = {}
    tokens = torch.tensor([[*b"some text"]])
    for name in ("gpt2", "moe"):
        for dtype in ("float64", "bfloat16"):
            model = single_rank_model(settings_of(name, f"train.dtype={dtype}"))
            before = model(tokens)
            arrange_products(model)
            products = [model.blocks["0"].mlp.up.weight, model.unembedding.weight]  # gpt2's embedding is tied
            found[name, dtype] = before, model(tokens), products, model.embedding.weight
    return found


def batches(run: TrainedModel, context: int) -> list[tuple[Tensor, Tensor]]:
    """Of two prompts with three samples each the logits of 20 steps, beside those of each sample's own pass."""
    generator, prompts = torch.Generator().manual_seed(3), Decoder(run.model, 24)
    tokens = torch.tensor([PROMPT, [*b"So it"]])
    logits = prompts(tokens).repeat_interleave(3, 0)
    decoder = prompts.repeated(3)
    tokens, found = tokens.repeat_interleave(3, 0), []
    for _ in range(20):
        found.append((logits, run.model(tokens[:, -context:])[:, -1]))
        new = draw(logits, 2.0, 0, generator)
        tokens, logits = torch.cat((tokens, new), 1), decoder(new)
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    return found


@pytest.fixture(scope="module")
def found() -> Any:
    return world.run(1, everything)[0]


@pytest.mark.parametrize("how", [(0.0, 0, 1), (0.8, 0, 1), (1.5, 5, 2)])
@pytest.mark.parametrize("prompt", [0, 5, 20])
@pytest.mark.parametrize("name", CONTEXT)
def test_the_tokens_are_those_of_a_pass_a_token(found: Any, name: str, prompt: int, how: Any) -> None:
    """Of a prompt that is shorter than the context, longer, or none; far beyond where the context slides."""
    own, expected = found[name, prompt, how]
    assert own == expected


@pytest.mark.parametrize("name", CONTEXT)
def test_a_step_computes_a_token_until_the_longest_sequence_trained_on(found: Any, name: str) -> None:
    counts, context = found[name, "tokens of each pass"], CONTEXT[name]
    assert counts == [5, *[1] * (TRAINED - 5), *(min(n, context) for n in range(TRAINED + 1, 5 + TOKENS))]


@pytest.mark.parametrize("name", CONTEXT)
def test_samples_of_a_prompt_share_it_and_nothing_else(found: Any, name: str) -> None:
    for own, expected in found[name, "samples"]:
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_the_arrangement_of_products_changes_no_logit(found: Any, name: str, dtype: str) -> None:
    before, after, products, embedding = found[name, dtype]
    most = 1e-12 if dtype == "float64" else 1e-2  # bfloat16's own rounding, in sums of another order
    torch.testing.assert_close(after, before, rtol=most, atol=most)
    assert all(product.dtype == getattr(torch, dtype) and product.mT.is_contiguous() for product in products)
    assert embedding.is_contiguous()  # its rows are looked up


def test_no_samples_are_refused() -> None:
    with pytest.raises(UserError, match="--samples 0 must be at least 1"):
        generate(Path("none"), "", 1, 0.0, 0, 1, samples=0)
