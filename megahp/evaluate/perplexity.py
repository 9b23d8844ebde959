"""How well a trained run predicts texts: the loss of every token, each scored exactly once."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megahp.errors import UserError
from megahp.evaluate.sample import TrainedModel
from megahp.log.progress import ProgressDisplay
from megahp.model.build import longest

LOGITS_AT_ONCE = 2**27  # 512 MiB of fp32
TOKENS_AT_ONCE = 2**14  # where the vocabulary is small, the blocks' activations are what is large


@dataclass(frozen=True)
class Window:
    """Tokens [n] of one text, and how many of the last are predicted, each from all before it."""

    tokens: Tensor
    scored: int


@dataclass(frozen=True)
class Score:
    """What a model loses on texts: nats summed over their tokens. bytes: of UTF-8."""

    documents: int
    tokens: int
    bytes: int
    nats: float

    def numbers(self) -> dict[str, float]:
        """Loss in nats per token, bits per byte, perplexity."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
        }


def evaluate(trained: TrainedModel, files: Sequence[Sequence[str]], context: int, stride: int) -> list[Score]:
    """The score of each file's texts, none of them empty.

    Each text stands alone, after an end-of-document token, from which its first token is predicted; its end is not
    scored. Raises UserError for losses that are not finite.
    """
    pieces: list[tuple[int, Window]] = []  # with the number of its file
    tokens, nats = [0] * len(files), [0.0] * len(files)
    for number, text in ((number, text) for number, file in enumerate(files) for text in file):
        ids = torch.tensor([trained.tokenizer.eod, *trained.tokenizer.encode(text)])
        pieces += [(number, window) for window in windows(ids, 1, context, stride)]
        tokens[number] += len(ids) - 1
    for piece, loss, _ in scores(trained, [window for _, window in pieces]):
        nats[pieces[piece][0]] += loss
    if not math.isfinite(sum(nats)):
        raise UserError(f"{trained.path} gives losses that are not finite; evaluate an earlier checkpoint")
    return [
        Score(len(file), tokens[number], sum(len(text.encode()) for text in file), nats[number])
        for number, file in enumerate(files)
    ]


def windows(tokens: Tensor, first: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of up to context + 1 tokens that score each of tokens[first:] once, from `context` tokens before it, of
    which up to stride - 1 may lack, or from all there are. first: at least 1; stride: 1 to context."""
    while first < len(tokens):
        end = min(len(tokens), max(first + stride, context + 1))
        yield Window(tokens[max(0, end - context - 1) : end], end - first)
        first = end


@torch.no_grad()
def scores(trained: TrainedModel, pieces: Sequence[Window]) -> Iterator[tuple[int, float, bool]]:
    """Of every window, the longest first: its number, the summed loss in nats of the tokens it scores, and whether each
    of them is the likeliest one. Shows progress on stderr."""
    vocabulary = trained.config.model.vocab_size
    order = sorted(range(len(pieces)), key=lambda number: -len(pieces[number].tokens))
    done, nats, start = 0, 0.0, 0
    with ProgressDisplay(sum(piece.scored for piece in pieces), stream=sys.stderr) as progress:
        while start < len(order):
            tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
            size = max(1, tokens // len(pieces[order[start]].tokens))
            batch = order[start : start + size]
            start += size
            losses, likeliest = predict(trained, [pieces[number].tokens for number in batch])
            for number, loss, hit in zip(batch, losses, likeliest, strict=True):
                end = len(pieces[number].tokens) - 1
                scored = slice(end - pieces[number].scored, end)
                total = loss[scored].sum().item()
                yield number, total, bool(hit[scored].all())
                done, nats = done + pieces[number].scored, nats + total
            progress.show(done, [("loss", f"{nats / done:.4f}")])


def predict(trained: TrainedModel, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses in nats, fp64, of each row's tokens but the first, and whether each is the likeliest, both [rows, longest
    row - 1]. The vocabulary's padding has no part in them. Rows may differ in length: what follows is never looked at.
    """
    tokens = pad_sequence(list(rows), batch_first=True).to(trained.device)
    logits = trained.model(tokens[:, :-1])[..., : trained.config.model.vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = tokens[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return losses.double().cpu(), (logits.argmax(-1) == targets).cpu()


def context_of(trained: TrainedModel, given: int | None) -> int:
    """Tokens to look back on: those given, or as many as the run was trained on. Raises UserError for more."""
    most = longest(trained.config)
    if given is not None and not 1 <= given <= most:
        raise UserError(f"--context {given} must be 1 to {most}, the tokens {trained.path} was trained to look back on")
    return given or most
