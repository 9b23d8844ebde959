"""Measure loss, bits per byte and perplexity of text files under a checkpoint.

    megahp evaluate runs/mine held_out.txt other.jsonl.zst [--context N] [--stride N] [--json]

You see a row per file, and one of all. A file of JSON lines has a document per line, any other file is one document.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path

from megahp.commands.arguments import add_text_arguments
from megahp.data.texts import check_key, inspect, read_texts
from megahp.errors import UserError

LINE = "{:<{width}}{:>14}{:>14}{:>12}{:>12}{:>14}"
HEADER = ("tokens", "bytes", "nats/token", "bits/byte", "perplexity")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run directory: its newest")
    add("files", type=Path, nargs="+", metavar="FILE", help="text, JSON lines, Parquet ..., as for megahp preprocess")
    add_text_arguments(parser)
    add("--context", type=int, metavar="N", help="tokens of a window (default: a training sample's)")
    add("--stride", type=int, metavar="N", help="tokens from a window to the next (default: half of --context)")
    add("--json", action="store_true", help="print JSON")


def run(options: Namespace, words: Sequence[str]) -> int:
    from megahp.evaluate.perplexity import Score, context_of, evaluate
    from megahp.evaluate.sample import load_trained

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
    trained = load_trained(options.checkpoint)
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
        results = {"checkpoint": str(trained.path), "context": context, "stride": stride, "files": files}
        print(json.dumps(results, indent=2))
        return 0
    print(f"{trained.path}, windows of {context} tokens, {stride} apart")
    width = max(len(name) for name, _ in rows) + 1
    print(LINE.format("", *HEADER, width=width))
    for name, score in rows:
        loss, bits, perplexity = score.numbers().values()
        columns = (f"{score.tokens:,}", f"{score.bytes:,}", f"{loss:.4f}", f"{bits:.4f}", f"{perplexity:.6g}")
        print(LINE.format(name, *columns, width=width))
    return 0
