"""Text from a trained run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megahp import checkpoint, config, launch
from megahp.data.tokenizer import load_tokenizer
from megahp.errors import UserError
from megahp.model.build import build_model, longest
from megahp.model.transformer import Transformer
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.parallel.parameters import saved
from megahp.train.loop import device_of
from megahp.train.run import cuda_wanted, read_config


def generate(run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and what the run's newest checkpoint makes of it, on this process alone. Raises UserError."""
    if not (0 <= temperature < math.inf and tokens >= 0 and top_k >= 0 and 0 <= seed < 2**63):
        raise UserError(
            f"--temperature {temperature}, --tokens {tokens}, --top-k {top_k} and --seed {seed} must all be finite and "
            "not negative"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt is not valid UTF-8; give it as text")
    settings = config.with_values(read_config(run), {"train.device": "auto"})
    path = checkpoint.latest(run / "checkpoints")
    if path is None:
        raise UserError(f"{run} has no checkpoint yet; train it first")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    model = alone(settings)
    checkpoint.load(path, saved(model))
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eod]], device=device_of(settings, launch.World()))
    ids = continued(model, ids, tokens, window_of(settings), temperature, top_k, tokenizer.vocab_size, seed)
    return tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eod])


def alone(settings: config.Config) -> Transformer:
    """The model of these settings, with its initial weights, on this process alone."""
    if not dist.is_initialized():
        launch.join(launch.World(), cuda_wanted(settings))
    settings = replace(settings, parallel=config.Parallel(), compute=config.Compute())
    settings = config.with_values(settings, {"train.noise_scale": False})
    (model,) = build_model(settings, make_mesh(Layout(), device_of(settings, launch.World()))).stages.values()
    return model


def window_of(settings: config.Config) -> int:
    """How many tokens the model looks back on: as many as it was trained on; with ALiBi, which interpolates, twice
    that (what arXiv 2310.13017 found to work)."""
    return longest(settings) * (2 if settings.model.positions == "alibi" else 1)


@torch.no_grad()
def continued(
    model: Transformer,
    ids: Tensor,
    tokens: int,
    window: int,
    temperature: float,
    top_k: int,
    vocab_size: int,
    seed: int,
) -> Tensor:
    """ids [b, n] with `tokens` more, each drawn from the model's view of the last `window` before it."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    for _ in range(tokens):
        logits = model(ids[:, -window:])[:, -1, :vocab_size].float()
        ids = torch.cat((ids, _choose(logits, temperature, top_k, generator)), 1)
    return ids


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token id a row, [b, 1], from logits [b, v]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature, however low, overflows
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
