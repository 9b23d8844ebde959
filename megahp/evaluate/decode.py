"""Generate tokens one after the other: what a model predicts after sequences that grow, and draws from it."""

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.model.cache import Cache
from megahp.model.compute import hidden_products
from megahp.model.transformer import Transformer
from megahp.ops.quantize import BITS, quantized
from megahp.parallel.parameters import Module
from megahp.parallel.tensor import ColumnParallelLinear
from megahp.scaling.parameterization import Role


@torch.no_grad()
def arrange_products(model: Transformer) -> None:
    """Store the matrices of a model, on a single rank, as products with one token read them fastest, with the same
    results to rounding: in the compute dtype, to which every pass would cast them, and on a CPU by columns, which it
    reads in longer runs (docs/benchmarks/generation.md). Not embeddings, whose rows are looked up: one that is tied
    gets a copy for the logits."""
    if model.model.quantize != "none":  # once, not in every pass
        for product in hidden_products(model):
            weight = product.weight.data.to(model.dtype)
            product.weight.data = quantized(weight, BITS[model.model.quantize], model.model.quantize_group)
            product.linear = F.linear
    if model.unembedding is None:
        width, vocabulary = model.model.width, model.model.padded_vocab
        model.unembedding = ColumnParallelLinear(width, vocabulary, False, Role.UNEMBEDDING)
        model.unembedding.weight = nn.Parameter(model.embedding.weight.detach())
    for module in model.modules():
        for name, row in module.rows.items() if isinstance(module, Module) else ():
            if row.role in (Role.HIDDEN, Role.UNEMBEDDING):
                weight = getattr(module, name)
                cast = weight.data.to(model.dtype)
                weight.data = cast.mT.contiguous().mT if cast.device.type == "cpu" else cast


class Decoder:
    """Predict the tokens that follow sequences which grow, a batch of equal lengths.

    Each token is predicted from as many tokens before it as in training; with ALiBi, which interpolates positions, from
    twice as many (arXiv 2310.13017 found this to work).

    Up to the longest sequence trained on keys and values are cached, so that a step computes the new tokens alone.
    Beyond, each step computes the whole context: its first token drops out, on which the others' keys depend from the
    second block on, and ALiBi's slopes change with the length.

    length: of the sequences at the end, for which memory is allocated at the first tokens.
    """

    def __init__(self, model: Transformer, length: int) -> None:
        self.model = model
        self.context = model.longest * (2 if model.model.positions == "alibi" else 1)
        self.cache = Cache(min(model.longest, length))
        self.read: Tensor | None = None  # the tokens so far, [b, n]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return logits [b, padded vocabulary] of the token after the sequences and these next tokens [b, n]."""
        self.read = tokens if self.read is None else torch.cat((self.read, tokens), 1)
        if self.read.shape[1] <= self.cache.capacity:
            return self.model(tokens, cache=self.cache)[:, -1]
        return self.model(self.read[:, -self.context :])[:, -1]

    def repeated(self, samples: int) -> "Decoder":
        """Return a decoder of `samples` copies of the sequences, those of each in a row, which share what has been
        computed of them and go on by themselves."""
        copies = copy(self)
        copies.cache = self.cache.repeated(samples)
        copies.read = None if self.read is None else self.read.repeat_interleave(samples, 0)
        return copies


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Return a token for each row of logits [b, vocabulary], [b, 1].

    temperature: 0 = the likeliest; top_k: among this many likeliest ones, 0 = all.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature, however low, overflows
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
