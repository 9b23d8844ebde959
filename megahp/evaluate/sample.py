"""Load a trained run on one process, and generate text with it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from megahp import checkpoint, launch
from megahp.config import ComputeConfig, Config, ParallelConfig, longest, with_values
from megahp.data.tokenizer import Tokenizer, tokenizer_of
from megahp.errors import UserError
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel.device import claim_device, fast_dtype
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, on a single rank."""

    path: Path
    config: Config
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device

    @property
    def start(self) -> list[int]:
        """Return what stood before a document's first token in training, where its other tokens saw it too: a begin
        token, or the end token of the document before. Attention that is restricted to documents hides the latter."""
        data, tokenizer = self.config.data, self.tokenizer
        # not known: as lm-eval's hf backend, since the model was imported
        if tokenizer.bos is not None and data.begin in ("bos", ""):
            return [tokenizer.bos]
        return [] if data.begin == "none" or data.mask_documents else [tokenizer.eod]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text that the model continues, after a begin token where all documents had one."""
        return [*(self.start if self.config.data.begin == "bos" else []), *self.tokenizer.encode(text)]


def load_trained(location: Path) -> TrainedModel:
    """Load the model of a checkpoint, or of a run directory's newest checkpoint. Raises UserError."""
    path = checkpoint.find(location)
    # A run trained with CUDA may be evaluated on a machine without, and one in bfloat16 where that is slow.
    config = with_values(checkpoint.settings_of(path), {"train.device": "auto"})
    tokenizer, device = tokenizer_of(config.data), claim_device(config, launch.World())
    if config.train.dtype == "bfloat16":
        config = with_values(config, {"train.dtype": fast_dtype(device)})
    model = single_rank_model(config)
    checkpoint.load(path, model_state(model))
    return TrainedModel(path, config, model, tokenizer, device)


def generate(run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """Return the prompt and a continuation of it by the run's newest checkpoint. Raises UserError.

    temperature: 0 = always the likeliest token. top_k: sample among this many likeliest tokens; 0 = all.
    """
    if not (0 <= temperature < math.inf and tokens >= 0 and top_k >= 0 and 0 <= seed < 2**63):
        given = f"--temperature {temperature}, --tokens {tokens}, --top-k {top_k} and --seed {seed}"
        raise UserError(f"{given} must all be finite and at least 0")
    # Bytes of the command line that are not UTF-8 arrive as surrogates, which no tokenizer can encode.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt is not valid UTF-8; give it as text")
    trained = load_trained(run)
    ids = trained.encode_prompt(prompt) or trained.start
    ids += islice(continuation(trained, ids, temperature, top_k, seed), tokens)
    return trained.tokenizer.decode(ids)


def single_rank_model(config: Config) -> Transformer:
    """Build the model of these settings on a single rank, with initial weights and without any parallelism."""
    config = replace(config, parallel=ParallelConfig(), compute=ComputeConfig())
    config = with_values(config, {"train.noise_scale": False})
    (model,) = build_model(config, single_rank_mesh(config)).stages.values()
    return model


@torch.no_grad()
def continuation(trained: TrainedModel, ids: Sequence[int], temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Yield tokens that continue `ids`, without end, each sampled given the last tokens before it. Without any, the
    first is sampled after an end token, as a document's first token in training, which the others do not see."""
    # The context is as long as in training; with ALiBi, which interpolates positions, twice as long (arXiv 2310.13017
    # found this to work).
    window = longest(trained.config) * (2 if trained.config.model.positions == "alibi" else 1)
    vocab_size = trained.tokenizer.vocab_size  # the model's may be larger, but its further ids have no text
    starts = not ids
    context = torch.tensor([ids[-window:] or [trained.tokenizer.eod]], device=trained.device)
    generator = torch.Generator(trained.device).manual_seed(seed)
    while True:
        logits = trained.model(context)[:, -1, :vocab_size].float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if 0 < top_k < vocab_size:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
            logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature, however low, overflows
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        context = token if starts else torch.cat((context, token), 1)[:, -window:]
        starts = False
        yield int(token)
