"""Perplexity of a trained run on texts: the loss of every token, each scored exactly once."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megahp.errors import UserError
from megahp.evaluate.sample import TrainedModel
from megahp.log.progress import ProgressDisplay

MAX_LOGITS = 2**27  # per forward pass: 512 MiB of fp32
MAX_TOKENS = 2**14  # per forward pass: with a small vocabulary the activations of the blocks dominate


@dataclass(frozen=True)
class Window:
    """Tokens [n] of one text, of which the last `scored` are predicted, each from all before it."""

    tokens: Tensor
    scored: int


@dataclass(frozen=True)
class Score:
    """A model's loss on texts. nats: summed over their tokens; bytes: of UTF-8."""

    documents: int
    tokens: int
    bytes: int
    nats: float

    def numbers(self) -> dict[str, float]:
        """Return loss in nats per token, bits per byte, perplexity."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
        }


def evaluate(trained: TrainedModel, files: Sequence[Sequence[str]], context: int, stride: int) -> list[Score]:
    """Return the score of each file's texts, none of which may be empty.

    Each text stands alone, as a document did in training (`document_windows`); its end is not scored. Raises UserError
    for losses that are not finite.
    """
    pieces: list[tuple[int, Window]] = []  # (index of the file, window)
    tokens, sizes, nats = [0] * len(files), [0] * len(files), [0.0] * len(files)
    for index, file in enumerate(files):
        for text in file:
            ids = trained.tokenizer.encode(text)
            found = [*document_windows(trained, ids, context, stride)]
            scored = sum(window.scored for window in found)
            pieces += [(index, window) for window in found]
            tokens[index] += scored
            # a first token that nothing precedes is not scored, and neither are its bytes
            unscored = commonprefix([trained.tokenizer.decode(ids[: len(ids) - scored]), text])
            sizes[index] += len(text.encode()) - len(unscored.encode())
    for piece, loss, _ in scores(trained, [window for _, window in pieces]):
        nats[pieces[piece][0]] += loss
    if not math.isfinite(sum(nats)):  # of a diverged run: a perplexity of NaN would look like a result
        raise UserError(f"{trained.path} gives losses that are not finite; evaluate an earlier checkpoint")
    return [Score(len(file), tokens[index], sizes[index], nats[index]) for index, file in enumerate(files)]


def document_windows(trained: TrainedModel, ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Yield windows that score each token of a document once, with before it what was there in training.

    Where documents are masked, an end token precedes the first token, in whose place training predicts it, and no
    other. Where documents had no end token, nothing predicts the first one, and it is not scored.
    """
    start, data = trained.start, trained.config.data
    if not start and data.begin != "none" and ids:
        yield Window(torch.tensor([trained.tokenizer.eod, ids[0]]), 1)
    yield from windows(torch.tensor([*start, *ids]), max(1, len(start)), context, stride)


def windows(tokens: Tensor, first: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows of up to context + 1 tokens that score each of tokens[first:] once.

    Each token is predicted from the context - stride + 1 to context tokens before it, or from all if there are fewer.
    first: at least 1; stride: 1 to context.
    """
    while first < len(tokens):
        end = min(len(tokens), max(first + stride, context + 1))
        yield Window(tokens[max(0, end - context - 1) : end], end - first)
        first = end


@torch.no_grad()
def scores(trained: TrainedModel, pieces: Sequence[Window]) -> Iterator[tuple[int, float, bool]]:
    """Yield each window's index, the summed loss of its scored tokens in nats, and whether all are the likeliest ones.

    Long windows come first: those of similar length share a batch, and a lack of memory shows at once. Shows progress
    on stderr.
    """
    vocabulary = trained.config.model.vocab_size
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].tokens))
    done, nats, start = 0, 0.0, 0
    with ProgressDisplay(sum(piece.scored for piece in pieces), stream=sys.stderr) as progress:
        while start < len(order):
            tokens = min(MAX_TOKENS, MAX_LOGITS // vocabulary)
            batch = order[start : start + max(1, tokens // len(pieces[order[start]].tokens))]
            start += len(batch)
            losses, likeliest = predict(trained, [pieces[index].tokens for index in batch])
            for index, loss, hit in zip(batch, losses, likeliest, strict=True):
                end = len(pieces[index].tokens) - 1
                scored = slice(end - pieces[index].scored, end)
                total = loss[scored].sum().item()
                yield index, total, bool(hit[scored].all())
                done, nats = done + pieces[index].scored, nats + total
            progress.show(done, [("loss", f"{nats / done:.4f}")])


def predict(trained: TrainedModel, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss in nats (fp64) of each row's tokens but the first, and whether each is the likeliest one.

    Both are [rows, longest row - 1]. Rows may differ in length: under causal attention the padding behind a row has no
    effect on it. The vocabulary's padding is cut off.
    """
    tokens = pad_sequence(list(rows), batch_first=True).to(trained.device)
    found, targets = trained.log_probabilities(tokens[:, :-1]), tokens[:, 1:]
    losses = -found.gather(-1, targets[..., None]).squeeze(-1)
    return losses.double().cpu(), (found.argmax(-1) == targets).cpu()


def context_of(trained: TrainedModel, given: int | None) -> int:
    """Return the context length: as given, or else as in training. Raises UserError for a longer one."""
    most = trained.context
    if given is not None and not 1 <= given <= most:
        raise UserError(f"--context {given} must be 1 to {most}, the context that {trained.path} was trained with")
    return given or most
