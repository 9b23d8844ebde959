"""Merge tokenized data, as of the elements of a Slurm array, into one PREFIX.bin, .idx and .json.

    megahp merge data/part-00000 data/part-00001 --output data/all

The parts must be of one tokenizer. Their documents follow each other in the order in which the parts are named, by
their prefixes or by any of their files (data/part-*). The parts stay as they are.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahp.commands.output import check_replaceable, data_files, write_description
from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.errors import UserError
from megahp.files import read_json

OWN = ("tokenizer", "documents", "tokens", "largest_id", "fingerprint")  # what parts of one tokenizer may differ in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="+", metavar="PREFIX", help="as megahp preprocess wrote them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output of megahp's")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    # once each: data/part-* names three files of a part
    parts = list(dict.fromkeys(re.sub(r"\.(bin|idx|json)$", "", part) for part in arguments.parts))
    datasets = [IndexedDataset(part) for part in parts]
    description, *others = (read_json(Path(f"{part}.json"), "description") for part in parts)
    for part, other in zip(parts[1:], others, strict=True):
        check_alike(parts[0], description, part, other)
    outputs = data_files(arguments.output)
    check_replaceable("--output", outputs, [file for part in parts for file in data_files(part)], arguments.overwrite)
    vocab_size = description.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(
            f"description {parts[0]}.json has vocab_size {vocab_size!r}; write it again with megahp preprocess"
        )
    with IndexedWriter(arguments.output, vocab_size, arguments.overwrite) as writer:
        for dataset in datasets:
            for document in range(dataset.documents):
                writer.add_document(dataset.tokens(document))
    counts = {
        "documents": sum(dataset.documents for dataset in datasets),
        "tokens": sum(dataset.total_tokens for dataset in datasets),
        "largest_id": writer.largest,
    }
    write_description(arguments.output, {**description, **counts})
    print(f"{arguments.output}: {counts['documents']} documents, {counts['tokens']} tokens of {len(parts)} parts")
    return 0


def check_alike(first: str, description: dict[str, Any], part: str, other: dict[str, Any]) -> None:
    """Raise UserError for parts that are not of one tokenizer, known by its fingerprint, in old data by its path."""
    own = set(OWN) if "tokenizer_fingerprint" in description else set(OWN) - {"tokenizer"}
    for key in sorted((description.keys() | other.keys()) - own):
        if description.get(key) != other.get(key):
            values = f"{description.get(key)!r} in {first}.json and {other.get(key)!r} in {part}.json"
            raise UserError(f"{key} is {values}; merge what one tokenizer wrote")
