"""Enlarge a checkpoint's vocabulary: add rows to embedding and unembedding for the tokens of a larger tokenizer.

    megahp extend-vocabulary runs/first runs/wider --tokenizer wider.json --rule mean [--text FILE]
    megahp extend-vocabulary runs/first runs/wider --tokenizer wider.json --rule projection --donor runs/other

SRC is a checkpoint, or a run directory: its newest. DST becomes a run directory without moments or progress, whose
config.toml continues training on text tokenized by the new tokenizer; usually first with train.weights=embeddings, then
with all weights (docs/continuing.md).

The new tokenizer must extend the old one: every old id stands for the same bytes, the same id ends a document, and
there are more ids. How it splits a text may differ. New tokens' rows are initialized to

    mean         the mean of the rows of the tokens that the old tokenizer splits them into
    projection   a linear map of the rows that a donor, another megahp model, has for them: the map of the donor's rows
                 to SRC's, by least squares over all tokens of SRC that both have; tokens that the donor lacks get
                 their mean. (The model cards of jais-adapted, arXiv 2407.12869, describe such a map over shared
                 English tokens.)
    zeros        zeros

separately in embedding and unembedding, if these are two. New rows that only pad the vocabulary are the mean of all old
tokens', as in imported models. Everything else is copied, a tensor at a time. You see how many rows each rule set, and
the command to train next. Exit code 2: invalid input.
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
from megahp.commands.output import atomic_folder
from megahp.config import Config, config_to_dict, longest, with_values
from megahp.convert.run_directory import check_files, find_checkpoint, write_run
from megahp.convert.sidecar import VOCABULARY
from megahp.convert.tokenizers import Vocabulary, load_vocabulary
from megahp.data.tokenizer import refuse_other
from megahp.errors import UserError

MIN_SHARED = 2  # tokens per dimension of the donor: as many as dimensions fit any map, which says nothing of others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC")
    add("target", type=Path, metavar="DST")
    add("--tokenizer", required=True, metavar="FILE", help="the new one, *.model or *.json")
    add("--rule", required=True, choices=("mean", "projection", "zeros"), help="initialization of new rows")
    add("--donor", type=Path, metavar="RUN", help="projection: a run or checkpoint with the tokens")
    add("--text", type=Path, metavar="FILE", help="print how many tokens both encode it to")
    add("--file-size", type=float, default=1, metavar="GB", help="maximum size of a file (default 1)")


@dataclass(frozen=True)
class Initialization:
    """How rows of new tokens are initialized, by id: a token is in one of the first two, or its row is 0."""

    parts: Mapping[int, Sequence[int]]  # new token -> the old tokens whose rows' mean it gets
    donated: Mapping[int, int]  # new token -> its row in the donor
    shared: Mapping[int, int]  # old token -> its row in the donor
    donor: Mapping[str, Tensor]  # the donor's tensors


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    check_files(arguments)
    if (arguments.rule == "projection") != bool(arguments.donor):
        donor = f"--donor {arguments.donor}" if arguments.donor else "no --donor"
        raise UserError(f"--rule {arguments.rule} with {donor}: only --rule projection needs a donor")
    path, config = find_checkpoint(arguments.source)
    refuse_other(config.data.tokenizer, config.data.tokenizer_fingerprint, f"{path} was trained with")
    names = config.data.tokenizer, arguments.tokenizer
    old, new = (load_vocabulary(name, config.data.eos, config.data.bos) for name in names)
    check_extension(old, new)
    size = max(config.model.vocab_size, len(new.tokens))
    wider = with_values(config, {"model.vocab_size": size, "data.sequence_length": longest(config)})
    settings = config_to_dict(with_values(wider, {"data.lengths": (), "data.tokenizer_fingerprint": ""}))
    rows = plan_rows(arguments, old, new)
    with atomic_folder(arguments.target) as partial:
        tensors = extend(Tensors(path), wider, len(old.tokens), len(new.tokens), rows)
        write_run(arguments, partial, settings, {}, new.name, tensors)
    counts = {"mean": len(rows.parts), "projection": len(rows.donated)}
    counts["zeros"] = len(new.tokens) - len(old.tokens) - sum(counts.values())
    rules = ", ".join(f"{count:,} by {rule}" for rule, count in counts.items() if count)
    tokens = f"{len(new.tokens):,} tokens, {len(old.tokens):,} before"
    matrices = f"in matrices of {wider.model.padded_vocab:,} rows, {config.model.padded_vocab:,} before"
    print(f"{arguments.target}: {tokens}, {matrices}; new tokens: {rules}")
    if rows.shared:
        print(f"the map from {arguments.donor} is fitted on {len(rows.shared):,} tokens")
    if arguments.text:
        text = arguments.text.read_text(encoding="utf-8", errors="replace")
        before, now = (len(each.tokenizer.encode(text)) / len(text.encode()) for each in (old, new))
        print(f"{arguments.text}: {now:.4g} tokens per byte, {before:.4g} before")
    options = "'data.train=[...]' train.weights=embeddings train.noise_scale=false log.name=..."
    print(f"next: megahp train {arguments.target}/config.toml {options}")
    return 0


def check_extension(old: Vocabulary, new: Vocabulary) -> None:
    """Raise UserError where an old token would change, or none is new."""
    problem = f"--tokenizer {new.name} does not extend {old.name}, SRC's:"
    for token, (before, now) in enumerate(zip(old.tokens, new.tokens, strict=False)):
        if before != now:
            raise UserError(f"{problem} token {token} is {now!r} and was {before!r}; let it keep its id")
    if len(new.tokens) <= len(old.tokens):
        raise UserError(f"{problem} it has {len(new.tokens)} tokens, no more than {len(old.tokens)}; name a larger one")
    if new.tokenizer.eod != old.tokenizer.eod:
        ends = f"token {new.tokenizer.eod} ends a document, and {old.tokenizer.eod} did"
        raise UserError(f"{problem} {ends}; keep that one")


def plan_rows(arguments: argparse.Namespace, old: Vocabulary, new: Vocabulary) -> Initialization:
    """Return how the row of every new token is initialized. Raises UserError."""
    added = range(len(old.tokens), len(new.tokens))
    if arguments.rule == "zeros":
        return Initialization({}, {}, {}, {})
    donated, shared = dict[int, int](), dict[int, int]()
    donor: Mapping[str, Tensor] = {}
    if arguments.rule == "projection":
        path, config = find_checkpoint(arguments.donor)
        donor_rows = {token: row for row, token in enumerate(load_vocabulary(config.data.tokenizer).tokens)}
        donated = {token: donor_rows[new.tokens[token]] for token in added if new.tokens[token] in donor_rows}
        shared = {token: donor_rows[text] for token, text in enumerate(old.tokens) if text in donor_rows}
        donor = Tensors(path)
        if not donated:
            raise UserError(f"--donor {arguments.donor} has none of the {len(added)} new tokens; choose --rule mean")
        if len(shared) < (minimum := MIN_SHARED * config.model.width):
            few = f"--donor {arguments.donor} shares {len(shared)} tokens with SRC"
            raise UserError(f"{few}, and a map from its width needs {minimum}; choose --rule mean")
    single_bytes = {text: token for token, text in enumerate(old.tokens) if len(text) == 1}
    parts = {token: split_token(old, single_bytes, new.tokens[token]) for token in added if token not in donated}
    return Initialization(parts, donated, shared, donor)


def split_token(old: Vocabulary, single_bytes: Mapping[bytes, int], text: bytes) -> list[int]:
    """Return the old tokens that a new one's bytes are encoded to; bytes that are no whole characters become a token
    each, from `single_bytes`. Raises UserError for bytes that the old tokens cannot spell."""
    # some tokenizers put a space before a text, and some make one of a new line: one of these contexts has neither
    for context in ("", "\n", "("):
        ids = old.tokenizer.encode(context + text.decode(errors="ignore"))
        sizes = accumulate(len(old.tokens[token]) for token in reversed(ids))
        count = next((count for count, size in enumerate(sizes, 1) if size >= len(text)), 0)
        if count and b"".join(old.tokens[token] for token in ids[-count:]) == text:
            return ids[-count:]
    try:
        return [single_bytes[text[index : index + 1]] for index in range(len(text))]
    except KeyError:
        raise UserError(f"{old.name} cannot spell the new token {text!r}; choose --rule zeros") from None


def extend(
    tensors: Mapping[str, Tensor], wider: Config, first: int, end: int, initialization: Initialization
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and masks of a checkpoint by name, with rows for the tokens from `first` to `end`."""
    parts, donated, donor = initialization.parts, initialization.donated, initialization.donor
    shared = initialization.shared
    for name in tensors:
        if name.removeprefix("model.") in VOCABULARY:
            matrix = tensors[name]
            rows = matrix[:first].mean(0).repeat(wider.model.padded_vocab, 1)
            rows[: len(matrix)] = matrix
            rows[first:end] = 0
            if parts:
                starts = torch.tensor([0, *accumulate(map(len, list(parts.values())[:-1]))])
                tokens = torch.tensor([token for part in parts.values() for token in part])
                rows[torch.tensor(list(parts))] = F.embedding_bag(tokens, matrix, starts, mode="mean")
            if donated:
                donor_matrix = donor[name if name in donor else "model.embedding.weight"]  # its head may be tied
                ours, theirs = (torch.tensor(list(ids)) for ids in (shared, shared.values()))
                # least squares in float64: [donor's width, our width]
                source, target = donor_matrix[theirs].double(), matrix[ours].double()
                fitted = torch.linalg.lstsq(source, target, driver="gelsd").solution
                mapped = donor_matrix[torch.tensor(list(donated.values()))].double() @ fitted
                rows[torch.tensor(list(donated))] = mapped.to(matrix.dtype)
            yield name, rows
        elif name.startswith(("model.", "mask.")):
            yield name, tensors[name]
