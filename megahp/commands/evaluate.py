"""Measure loss, bits per byte and perplexity of text files under a checkpoint.

    megahp evaluate runs/mine held_out.txt other.jsonl.zst [--context N] [--stride N] [--json]
    megahp evaluate runs/a runs/b runs/c held_out.txt

You see a row per file, and one of all. A file of JSON lines has a document per line, any other file is one document. Of
several checkpoints, or run directories, the probabilities are averaged.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, astuple
from itertools import takewhile
from pathlib import Path

from megahp.commands.arguments import add_text_arguments
from megahp.data.texts import check_key, inspect, read_texts
from megahp.errors import UserError

LINE = "{:<{width}}{:>14}{:>14}{:>12}{:>12}{:>14}"
HEADER = ("tokens", "bytes", "nats/token", "bits/byte", "perplexity")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run directory: its newest")
    files = "text, JSON lines, Parquet ..., as for megahp preprocess; folders before them: further checkpoints"
    add("files", type=Path, nargs="+", metavar="FILE", help=files)
    add_text_arguments(parser)
    add("--context", type=int, metavar="N", help="tokens of a window (default: a training sample's)")
    add("--stride", type=int, metavar="N", help="tokens from a window to the next (default: half of --context)")
    add("--json", action="store_true", help="print JSON")


def run(options: Namespace, words: Sequence[str]) -> int:
    from megahp.evaluate.perplexity import Score, context_of, evaluate
    from megahp.evaluate.sample import ensemble, load_trained

    more = list(takewhile(Path.is_dir, options.files))
    del options.files[: len(more)]
    if not options.files:
        raise UserError(f"{more[-1]} is a checkpoint or run directory, and no file to evaluate; name one after it")
    texts = []
    sources = [inspect(file, options.format) for file in options.files]
    check_key(sources, options.json_key)
    for source in sources:
        found, left_out = read_texts(source, options.json_key, options.most_bad)
        if not found:
            raise UserError(f"{source.name} holds no text; name another file")
        for reason, (count, first) in left_out.items():
            print(f"{source.name}: left out {count}: {reason}, the first {first}", file=sys.stderr)
        texts.append(found)
    trained = ensemble([load_trained(each) for each in (options.checkpoint, *more)])
    context = context_of(trained, options.context)
    stride = max(1, context // 2) if options.stride is None else options.stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride {stride} must be 1 to {context}, the tokens of a window; a larger one skips tokens")
    scores = evaluate(trained, texts, context, stride)
    if empty := [file for file, score in zip(options.files, scores, strict=True) if not score.tokens]:
        raise UserError(f"{empty[0]} holds no text that makes tokens; name another file")
    rows = [(str(file), score) for file, score in zip(options.files, scores, strict=True)]
    if len(rows) > 1:
        rows.append(("all", Score(*map(sum, zip(*map(astuple, scores), strict=True)))))
    if options.json:
        files = [{"file": name} | asdict(score) | score.numbers() for name, score in rows]
        others = [str(each.path) for each in trained.others]
        measured = {"checkpoint": str(trained.path), "averaged_with": others, "context": context, "stride": stride}
        print(json.dumps({**measured, "files": files}, indent=2))
        return 0
    names = " + ".join(str(each.path) for each in (trained, *trained.others))
    print(f"{names}, windows of {context} tokens, {stride} apart")
    width = max(len(name) for name, _ in rows) + 1
    print(LINE.format("", *HEADER, width=width))
    for name, score in rows:
        loss, bits, perplexity = score.numbers().values()
        columns = (f"{score.tokens:,}", f"{score.bytes:,}", f"{loss:.4f}", f"{bits:.4f}", f"{perplexity:.6g}")
        print(LINE.format(name, *columns, width=width))
    return 0
