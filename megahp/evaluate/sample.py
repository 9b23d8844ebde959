"""Load a trained run on one process, and generate text with it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megahp import checkpoint, launch
from megahp.config import ComputeConfig, Config, ParallelConfig, longest, with_values
from megahp.data.tokenizer import Tokenizer, fingerprint_of, tokenizer_of
from megahp.errors import UserError
from megahp.evaluate.decode import Decoder, arrange_products, draw
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel.device import claim_device, fast_dtype
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, on a single rank.

    others: those that its probabilities are averaged with (`ensemble`), in `log_probabilities` alone.
    """

    path: Path
    config: Config
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device
    others: "tuple[TrainedModel, ...]" = ()

    @property
    def start(self) -> list[int]:
        """Return what stood before a document's first token in training, where its other tokens saw it too: a begin
        token, or the end token of the document before. Attention that is restricted to documents hides the latter."""
        data, tokenizer = self.config.data, self.tokenizer
        # not known: as lm-eval's hf backend, since the model was imported
        if tokenizer.bos is not None and data.begin in ("bos", ""):
            return [tokenizer.bos]
        return [] if data.begin == "none" or data.mask_documents else [tokenizer.eod]

    @property
    def context(self) -> int:
        """Return the longest context that it, and the others, were trained with, in tokens."""
        return min(longest(each.config) for each in (self, *self.others))

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Return the logarithm of the probability of each next token, its mean over the others too: [b, n, vocabulary]
        after tokens [b, n], in fp32, or fp64 for a model in fp64."""
        members = (self, *self.others)
        total: Tensor | None = None
        for member in members:
            logits = member.model(tokens)[..., : self.config.model.vocab_size]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 would round the loss
            own = logits.log_softmax(-1)
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None
        return total - math.log(len(members)) if self.others else total

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
    arrange_products(model)
    return TrainedModel(path, config, model, tokenizer, device)


def ensemble(members: Sequence[TrainedModel]) -> TrainedModel:
    """Return the first with the others, whose probabilities are averaged with its own. Raises UserError where they do
    not predict the same tokens after the same ones."""
    first, *others = members
    for other in others:
        names = f"{first.path} and {other.path}"
        before, after = (fingerprint_of(each.config.data.tokenizer) for each in (first, other))
        if before != after or first.config.model.vocab_size != other.config.model.vocab_size:
            raise UserError(f"{names} have different tokenizers or vocabularies; average runs of the same")
        if (first.start, first.config.data.begin) != (other.start, other.config.data.begin):
            raise UserError(f"{names} saw other tokens before a document in training; average runs of the same")
    return replace(first, others=tuple(others))


def generate(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int, samples: int = 1
) -> list[str]:
    """Return the prompt with each of so many continuations of it by the run's newest checkpoint. Raises UserError.

    temperature: 0 = always the likeliest token. top_k: sample among this many likeliest tokens; 0 = all.
    """
    if not (0 <= temperature < math.inf and tokens >= 0 and top_k >= 0 and 0 <= seed < 2**63):
        given = f"--temperature {temperature}, --tokens {tokens}, --top-k {top_k} and --seed {seed}"
        raise UserError(f"{given} must all be finite and at least 0")
    if samples < 1:
        raise UserError(f"--samples {samples} must be at least 1")
    # Bytes of the command line that are not UTF-8 arrive as surrogates, which no tokenizer can encode.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt is not valid UTF-8; give it as text")
    trained = load_trained(run)
    ids = trained.encode_prompt(prompt) or trained.start
    new = [*continuation(trained, ids, tokens, temperature, top_k, seed, samples)]
    rows = torch.stack(new, 1).tolist() if new else [[]] * samples
    return [trained.tokenizer.decode([*ids, *row]) for row in rows]


def single_rank_model(config: Config) -> Transformer:
    """Build the model of these settings on a single rank, with initial weights and without any parallelism."""
    config = replace(config, parallel=ParallelConfig(), compute=ComputeConfig())
    config = with_values(config, {"train.noise_scale": False})
    (model,) = build_model(config, single_rank_mesh(config)).stages.values()
    return model


@torch.no_grad()
def continuation(
    trained: TrainedModel, ids: Sequence[int], tokens: int, temperature: float, top_k: int, seed: int, samples: int = 1
) -> Iterator[Tensor]:
    """Yield so many tokens that continue `ids`, [samples] at a time, each sampled given those before it. Without any,
    the first is sampled after an end token, as a document's first token in training, which the others do not see."""
    generator = torch.Generator(trained.device).manual_seed(seed)
    decoder = Decoder(trained.model, len(ids) + tokens)
    if ids:
        logits = decoder(torch.tensor([ids], device=trained.device))
        decoder = decoder.repeated(samples)
    else:
        logits = trained.model(torch.tensor([[trained.tokenizer.eod]], device=trained.device))[:, -1]
    logits = logits.expand(samples, -1)
    for left in reversed(range(tokens)):
        # the model's vocabulary may be larger than the tokenizer's, but its further ids have no text
        new = draw(logits[:, : trained.tokenizer.vocab_size].float(), temperature, top_k, generator)
        yield new[:, 0]
        if left:
            logits = decoder(new)
