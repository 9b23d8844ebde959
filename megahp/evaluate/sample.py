"""Text from a trained run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megahp import checkpoint, launch
from megahp.config import ComputeConfig, Config, ParallelConfig, with_values
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.model.build import build_model, longest
from megahp.model.transformer import Transformer
from megahp.parallel.device import device_of
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import saved


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, on this process alone."""

    path: Path
    config: Config
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device


def load_trained(place: Path) -> TrainedModel:
    """The model of a checkpoint, or of a run directory's newest. Raises UserError."""
    path = checkpoint.find(place)
    config = with_values(checkpoint.settings_of(path), {"train.device": "auto"})
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = single_rank_model(config)
    checkpoint.load(path, saved(model))
    return TrainedModel(path, config, model, tokenizer, device_of(config, launch.World()))


def generate(run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and what the run's newest checkpoint makes of it, on this process alone. Raises UserError."""
    if not (0 <= temperature < math.inf and tokens >= 0 and top_k >= 0 and 0 <= seed < 2**63):
        given = f"--temperature {temperature}, --tokens {tokens}, --top-k {top_k} and --seed {seed}"
        raise UserError(f"{given} must all be finite and not negative")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt is not valid UTF-8; give it as text")
    trained = load_trained(run)
    eod = trained.tokenizer.eod
    ids = trained.tokenizer.encode(prompt) or [eod]
    ids += islice(continuation(trained, ids, temperature, top_k, seed), tokens)
    return trained.tokenizer.decode([i for i in ids if i != eod])


def single_rank_model(config: Config) -> Transformer:
    """The model of these settings, with its initial weights, on this process alone."""
    config = replace(config, parallel=ParallelConfig(), compute=ComputeConfig())
    config = with_values(config, {"train.noise_scale": False})
    (model,) = build_model(config, single_rank_mesh(config)).stages.values()
    return model


@torch.no_grad()
def continuation(trained: TrainedModel, ids: Sequence[int], temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Tokens that follow these, without end, each drawn from the model's view of the last ones before it."""
    # The model looks back on as many as it was trained on; with ALiBi, which interpolates, on twice as many (what arXiv
    # 2310.13017 found to work).
    window = longest(trained.config) * (2 if trained.config.model.positions == "alibi" else 1)
    vocab_size = trained.tokenizer.vocab_size
    seen = torch.tensor([ids[-window:]], device=trained.device)
    generator = torch.Generator(trained.device).manual_seed(seed)
    while True:
        logits = trained.model(seen)[:, -1, :vocab_size].float()
        chosen = _choose(logits, temperature, top_k, generator)
        seen = torch.cat((seen, chosen), 1)[:, -window:]
        yield int(chosen)


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token id a row, [b, 1], from logits [b, v]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature, however low, overflows
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
