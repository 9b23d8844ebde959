"""Published loss laws by name, with their sources.

A law predicts the loss, in nats per token, of its own tokenizer and text, so two laws differ by more than the errors of
their fits: choose one, or fit your own with `megahp fit`.
"""

import difflib
import math
from collections.abc import Iterable
from pathlib import Path

from megahp.errors import UserError
from megahp.recipe import law_file
from megahp.scaling.laws import LossLaw

_HOFFMANN = "Hoffmann et al., arXiv 2203.15556"
# The ranges of N and D are those of the models Hoffmann et al. trained, by their abstract.
_HOFFMANN_RUNS = "verified in code: epoch-research/analyzing-chinchilla", (7e7, 1.6e10), (5e9, 5e11)
_UNROUNDED = math.exp(0.5267228), math.exp(6.0073404), math.exp(6.0179186), 0.33917084, 0.2849083
_BESIROGLU = (
    "Besiroglu et al., arXiv 2404.10102, a second fit of Hoffmann's runs; standard errors 0.03, 125, 1293, 0.015, 0.021"
)
_GADRE = (
    "Gadre et al., arXiv 2403.08540: RedPajama runs, loss on C4",
    "computed from the authors' released runs; gives the two errors their notebook prints, 0.71 % and 0.73 %",
)

LOSS_LAWS = {
    # As printed; the rounded constants give 93 tokens per parameter at 5.76e23 FLOPs, where the paper trained with 20.
    "hoffmann-rounded": LossLaw(1.69, 406.4, 410.7, 0.34, 0.28, f"{_HOFFMANN}, as printed", *_HOFFMANN_RUNS),
    "hoffmann": LossLaw(*_UNROUNDED, f"{_HOFFMANN}, unrounded, from its TeX source", *_HOFFMANN_RUNS),
    "besiroglu": LossLaw(1.8169, 482.01, 2085.43, 0.3478, 0.3658, _BESIROGLU, *_HOFFMANN_RUNS),
    # mlfoundations/scaling prints no constants: these are the least-squares solution of its five RedPajama runs and
    # their losses on C4, and miss its two held-out runs by the 0.7103 % and 0.7320 % that its notebook prints.
    "gadre": LossLaw(1.836648, 166.2110, 287.1681, 0.2728507, 0.2728507, *_GADRE, (1.06e7, 4.12e8), (2.1e8, 8.3e9)),
}
DEFAULT = "besiroglu"
# laws that are asked for, of which no constants were read in the paper, its data or two sources that agree
UNREAD = {
    # L = exp(a3 N^g + b3) + exp(a2 N^b + b2) D^(-exp(a1 N^a + b1)): the form is a secondary source's
    "farseer": "Farseer (arXiv 2506.10972)"
}
# Relative error on the larger of two held-out runs, of 6.9B parameters. (verified in code: the authors' notebook)
GADRE_ERROR = 0.0073
SAME_RUNS = ("hoffmann-rounded", "hoffmann", "besiroglu")  # fits of the same runs


def named(word: str) -> LossLaw:
    """Return a law by name, or the loss law of a law file. Raises UserError."""
    if word in LOSS_LAWS:
        return LOSS_LAWS[word]
    refuse_unknown("--loss-law", word, LOSS_LAWS)
    if law := law_file.read(Path(word)).loss:
        return law
    raise UserError(
        f"--loss-law {word} has no [loss]; fit one with megahp fit --loss, or name one of {', '.join(LOSS_LAWS)}"
    )


def refuse_unknown(option: str, word: str, known: Iterable[str]) -> None:
    """Raise UserError if a word is neither a known name nor a file."""
    names = list(known)
    if word in UNREAD and not Path(word).is_file():
        why = f"the constants of {UNREAD[word]} are known from memory alone, unverified"
        raise UserError(f"{option} {word}: {why}; fit your own runs with megahp fit, or name one of {', '.join(names)}")
    if word not in names and not Path(word).is_file():
        close = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{option} {word} is neither a law nor a law file; {hint}the laws are: {', '.join(names)}")


def interval(law: LossLaw, parameters: float, tokens: float) -> tuple[tuple[float, float] | None, str]:
    """Return an interval of L(N, D), and what it is made of.

    Quantiles of the law's draws; else the span of the published fits to the same runs, of which the law's own may be an
    end; else a published error; else None.
    """
    if spread := law.interval(parameters, tokens):
        return spread, "10 % to 90 % of the fit's bootstrap draws"
    if law in [LOSS_LAWS[name] for name in SAME_RUNS]:
        losses = [LOSS_LAWS[name](parameters, tokens) for name in SAME_RUNS]
        return (min(losses), max(losses)), "span of the three published fits of the same runs"
    if law == LOSS_LAWS["gadre"]:
        loss = law(parameters, tokens)
        return (loss * (1 - GADRE_ERROR), loss * (1 + GADRE_ERROR)), "its relative error on held-out runs"
    return None, "the law has no draws"
