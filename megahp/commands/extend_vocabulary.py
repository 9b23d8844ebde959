"""A model with a larger vocabulary, out of a checkpoint: rows of embedding and unembedding for the tokens that a new
tokenizer adds to the old one.

    megahp extend-vocabulary runs/first runs/wider --tokenizer wider.json --rule mean [--text FILE]
    megahp extend-vocabulary runs/first runs/wider --tokenizer wider.json --rule projection --donor runs/other

SRC is a checkpoint, or a run directory: then its newest. DST becomes a run directory without moments or progress, whose
config.toml trains on from it, with text that was tokenized anew; usually first with train.weights=embeddings, then with
all weights (docs/continuing.md).

The new tokenizer must extend the old: every id of the old one stands for the same bytes, the same id ends a document,
and there are ids beyond. How it cuts a text is its own affair. The tokens it adds begin as

    mean         the mean of the rows of the tokens that the old tokenizer cuts them into
    projection   what a linear map makes of the rows that a donor, another model of ours, has for them: the map that
                 takes the donor's rows to ours, in least squares over all tokens of SRC that both have; tokens that the
                 donor lacks begin as with mean. (The cards of the jais-adapted models, arXiv 2407.12869, describe such
                 a map over shared English tokens.)
    zeros        zeros

each in embedding and unembedding apart, if these are two. Rows that only pad the vocabulary begin, where they are new,
as the mean of all old tokens', as those of imported models do. All else is copied, a tensor at a time. Exit code 2
means a mistake in what was given.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.checkpoint.shards import Tensors
from megahp.commands.output import appearing
from megahp.config import Config, config_to_dict, with_values
from megahp.convert.run_directory import of_checkpoint, refuse_files, write_run
from megahp.convert.sidecar import VOCABULARY
from megahp.convert.tokenizers import Vocabulary, vocabulary
from megahp.errors import UserError
from megahp.model.build import longest

LEAST_SHARED = 2  # tokens for a dimension of the donor's: a map fitted on as many as it has says nothing of others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC")
    add("target", type=Path, metavar="DST")
    add("--tokenizer", required=True, metavar="FILE", help="the new one, *.model or *.json")
    add("--rule", required=True, choices=("mean", "projection", "zeros"), help="how new rows begin")
    add("--donor", type=Path, metavar="RUN", help="projection: a run, or checkpoint, with the tokens")
    add("--text", type=Path, metavar="FILE", help="tell how many tokens both make of it")
    add("--file-size", type=float, default=1, metavar="GB", help="of one file at most (default 1)")


@dataclass(frozen=True)
class Beginnings:
    """How the rows of the new tokens begin, in the order of their ids: a token stands in one of the two, or is 0."""

    parts: Mapping[int, Sequence[int]]  # new token -> the old tokens whose mean row it begins with
    known: Mapping[int, int]  # new token -> the donor's row of it
    shared: Mapping[int, int]  # old token -> the donor's row of it
    donor: Mapping[str, Tensor]  # the donor's tensors


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    refuse_files(arguments)
    if (arguments.rule == "projection") != bool(arguments.donor):
        given = f"--donor {arguments.donor}" if arguments.donor else "no --donor"
        raise UserError(f"--rule {arguments.rule} with {given}: a donor is what --rule projection needs, and no other")
    path, config = of_checkpoint(arguments.source)
    old, new = vocabulary(config.data.tokenizer), vocabulary(arguments.tokenizer)
    check_extension(old, new)
    size = max(config.model.vocab_size, len(new.tokens))
    wider = with_values(config, {"model.vocab_size": size, "data.sequence_length": longest(config)})
    tree = config_to_dict(with_values(wider, {"data.lengths": ()}))
    beginnings = begin(arguments, old, new)
    with appearing(arguments.target) as partial:
        tensors = extended(Tensors(path), wider, len(old.tokens), len(new.tokens), beginnings)
        write_run(arguments, partial, tree, {}, new.named, tensors)
    before, now = config.model.padded_vocab, wider.model.padded_vocab
    counts = {"mean": len(beginnings.parts), "projection": len(beginnings.known)}
    counts["zeros"] = len(new.tokens) - len(old.tokens) - sum(counts.values())
    rules = ", ".join(f"{count:,} by {rule}" for rule, count in counts.items() if count)
    rows = f"in matrices of {now:,} rows, {before:,} before"
    print(f"{arguments.target}: {len(new.tokens):,} tokens, {len(old.tokens):,} before, {rows}; new tokens: {rules}")
    if beginnings.shared:
        print(f"the map from {arguments.donor} is fitted on {len(beginnings.shared):,} tokens")
    if arguments.text:
        text = arguments.text.read_text(encoding="utf-8", errors="replace")
        of_old, of_new = (len(each.tokenizer.encode(text)) / len(text.encode()) for each in (old, new))
        print(f"{arguments.text}: {of_new:.4g} tokens per byte, {of_old:.4g} before")
    then = "'data.train=[...]' train.weights=embeddings train.noise_scale=false log.name=..."
    print(f"next: megahp train {arguments.target}/config.toml {then}")
    return 0


def check_extension(old: Vocabulary, new: Vocabulary) -> None:
    """Raise UserError where an old token would become another, or none is new."""
    without = f"--tokenizer {new.named} does not extend {old.named}, SRC's:"
    for number, (before, now) in enumerate(zip(old.tokens, new.tokens, strict=False)):
        if before != now:
            raise UserError(f"{without} token {number} is {now!r} and was {before!r}; let it keep its id")
    if len(new.tokens) <= len(old.tokens):
        raise UserError(f"{without} it has {len(new.tokens)} tokens, no more than {len(old.tokens)}; name a larger one")
    if new.tokenizer.eod != old.tokenizer.eod:
        ends = f"token {new.tokenizer.eod} ends a document, and {old.tokenizer.eod} did"
        raise UserError(f"{without} {ends}; keep that one")


def begin(arguments: argparse.Namespace, old: Vocabulary, new: Vocabulary) -> Beginnings:
    """How every new token begins. Raises UserError."""
    added = range(len(old.tokens), len(new.tokens))
    if arguments.rule == "zeros":
        return Beginnings({}, {}, {}, {})
    known, shared = dict[int, int](), dict[int, int]()
    donor: Mapping[str, Tensor] = {}
    if arguments.rule == "projection":
        path, config = of_checkpoint(arguments.donor)
        rows = {token: row for row, token in enumerate(vocabulary(config.data.tokenizer).tokens)}
        known = {number: rows[new.tokens[number]] for number in added if new.tokens[number] in rows}
        shared = {number: rows[token] for number, token in enumerate(old.tokens) if token in rows}
        donor = Tensors(path)
        if not known:
            raise UserError(f"--donor {arguments.donor} has none of the {len(added)} new tokens; choose --rule mean")
        if len(shared) < (least := LEAST_SHARED * config.model.width):
            few = f"--donor {arguments.donor} shares {len(shared)} tokens with SRC"
            raise UserError(f"{few}, and a map from its width needs {least}; choose --rule mean")
    single = {token: number for number, token in enumerate(old.tokens) if len(token) == 1}
    parts = {number: cut(old, single, new.tokens[number]) for number in added if number not in known}
    return Beginnings(parts, known, shared, donor)


def cut(old: Vocabulary, single: Mapping[bytes, int], token: bytes) -> list[int]:
    """The old tokens that are cut where a text has these bytes; where those are no whole characters, one for each byte,
    out of `single`. Raises UserError for what they cannot spell."""
    for before in ("", "\n", "("):  # some tokenizers put a space before a text; and some make one of a new line
        ids = old.tokenizer.encode(before + token.decode(errors="ignore"))
        sizes = accumulate(len(old.tokens[number]) for number in reversed(ids))
        count = next((count for count, size in enumerate(sizes, 1) if size >= len(token)), 0)
        if count and b"".join(old.tokens[number] for number in ids[-count:]) == token:
            return ids[-count:]
    try:
        return [single[token[place : place + 1]] for place in range(len(token))]
    except KeyError:
        raise UserError(f"{old.named} cannot spell the new token {token!r}; choose --rule zeros") from None


def extended(
    tensors: Mapping[str, Tensor], wider: Config, first: int, end: int, beginnings: Beginnings
) -> Iterator[tuple[str, Tensor]]:
    """The weights and masks of a checkpoint by name, with rows for the tokens from `first` to `end`."""
    for name in tensors:
        if name.removeprefix("model.") in VOCABULARY:
            matrix = tensors[name]
            rows = matrix[:first].mean(0).repeat(wider.model.padded_vocab, 1)
            rows[: len(matrix)] = matrix
            rows[first:end] = 0
            if beginnings.parts:
                parts = list(beginnings.parts.values())
                starts = [0, *accumulate(map(len, parts[:-1]))]
                bags = torch.tensor([number for part in parts for number in part]), matrix, torch.tensor(starts)
                rows[torch.tensor(list(beginnings.parts))] = F.embedding_bag(*bags, mode="mean")
            if beginnings.known:
                tied = name not in beginnings.donor
                donor = beginnings.donor["model.embedding.weight" if tied else name]
                here, there = (torch.tensor(list(each)) for each in (beginnings.shared, beginnings.shared.values()))
                # the map that takes the donor's rows to ours, in least squares; fitted in float64: [its width, ours]
                fitted = torch.linalg.lstsq(donor[there].double(), matrix[here].double(), driver="gelsd").solution
                known = donor[torch.tensor(list(beginnings.known.values()))].double() @ fitted
                rows[torch.tensor(list(beginnings.known))] = known.to(matrix.dtype)
            yield name, rows
        elif name.startswith(("model.", "mask.")):
            yield name, tensors[name]
