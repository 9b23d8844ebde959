"""Tokenize text into PREFIX.bin and PREFIX.idx (Megatron-LM's format), with a description in PREFIX.json.

    megahp preprocess --input corpus/ --output data/code --tokenizer data/code.model \\
        --train-sentencepiece 4096

Input is any mix of text files (one document each), JSON lines (one document per line; .jsonl, .jsonl.gz, .jsonl.zst)
and folders of such files. You see the progress, then documents, tokens and speed. The output depends only on the input
and the tokenizer, not on --workers.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from megahp.data.indexed import IndexedWriter
from megahp.data.texts import Document, find_files, read_documents
from megahp.data.tokenizer import Tokenizer, encode_part, fingerprint_of, load_tokenizer, train_sentencepiece
from megahp.errors import UserError

CHUNK_CHARACTERS = 1 << 20  # of the documents that a worker gets at a time
PIECE_CHARACTERS = 1 << 18  # of a document that are tokenized at a time
SECONDS_BETWEEN_LINES = 30
SPACES = "a\n\n\tb   c\n"
Chunk = list[Document]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    add("--tokenizer", required=True, metavar="TOK", help="'bytes', a *.model or a *.json file")
    add("--train-sentencepiece", type=int, metavar="VOCAB", help="train --tokenizer on the input if it does not exist")
    add("--json-key", default="text", metavar="KEY", help="field of the text in JSON lines")
    add("--extensions", nargs="+", default=[".py", ".rst", ".txt"], help="of files to read from folders")
    add("--exclude", nargs="+", default=[], metavar="NAME", help="folders to skip inside folders")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: cores, %(default)s)")
    add("--no-eod", action="store_true", help="do not end documents with the end-of-document token")
    words = "by name or id (default: as the files beside the tokenizer say)"
    add("--eos", default="", metavar="TOKEN", help=f"the token that ends a document, {words}")
    add("--bos", default="", metavar="TOKEN", help="begin each document with this token, by name or id (default: none)")
    add("--overwrite", action="store_true", help="replace existing output")


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk of documents."""

    ids: np.ndarray  # int32, all documents concatenated
    lengths: list[int]  # tokens of each document
    size: int  # UTF-8 bytes of their text
    lost: int  # unknown tokens, or characters that the tokenizer drops
    skipped: int  # documents that are no valid text
    consumed: int  # input bytes


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    for name in (f"{arguments.output}.bin", f"{arguments.output}.idx", f"{arguments.output}.json"):
        if Path(name).exists() and not arguments.overwrite:
            raise UserError(f"--output {name!r} exists: choose another or add --overwrite")
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}: give at least 1")
    files = find_files(arguments.input, arguments.extensions, arguments.exclude)
    if arguments.train_sentencepiece and not Path(arguments.tokenizer).exists():
        started = time.monotonic()
        documents = read_documents(files, arguments.json_key)
        texts = (document.text for document in documents if document.text)
        train_sentencepiece(texts, Path(arguments.tokenizer), arguments.train_sentencepiece)
        print(f"trained {arguments.tokenizer} in {time.monotonic() - started:.1f} s")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos, arguments.bos)
    started = time.monotonic()
    tally = tokenize(files, tokenizer, arguments)
    description = {
        "tokenizer": arguments.tokenizer,
        "tokenizer_fingerprint": fingerprint_of(arguments.tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "bos": tokenizer.bos,
        "documents": tally["documents"],
        "tokens": tally["tokens"],
    }
    partial_file = Path(f"{arguments.output}.json.{uuid.uuid4().hex}.tmp")
    partial_file.write_text(json.dumps(description, indent=2) + "\n")
    partial_file.replace(f"{arguments.output}.json")
    megabytes, seconds = tally["size"] / 1e6, time.monotonic() - started
    counts = f"{tally['documents']} documents, {tally['tokens']} tokens, {megabytes:.1f} MB of text, {seconds:.1f} s"
    rates = f"({megabytes / seconds:.1f} MB/s), {tally['tokens'] / tally['size']:.3f} tokens/byte"
    print(f"{arguments.output}: {counts} {rates}")
    if tally["lost"]:
        loss = f"{tally['lost']} unknown tokens, or characters that {arguments.tokenizer} drops"
        print(f"{arguments.output}: {loss}; a tokenizer that falls back to bytes has none")
    if (kept := tokenizer.decode(tokenizer.encode(SPACES))) != SPACES:  # as SentencePiece's default normalizer does
        print(f"{arguments.output}: {arguments.tokenizer} does not keep all spaces: of {SPACES!r} it keeps {kept!r}")
    if tally["skipped"]:
        print(f"{arguments.output}: skipped {tally['skipped']} documents that are no valid text")
    return 0


def tokenize(files: list[Path], tokenizer: Tokenizer, arguments: argparse.Namespace) -> Counter[str]:
    """Read, encode and write in parallel and in order; memory holds a few chunks per worker.

    Returns what was written: documents, tokens, bytes of text (size), documents skipped.
    """
    tally = Counter[str]()
    chunks = make_chunks(read_documents(files, arguments.json_key))
    encode = partial(encode_chunk, (arguments.tokenizer, arguments.eos, arguments.bos), not arguments.no_eod)
    with (
        IndexedWriter(arguments.output, tokenizer.vocab_size, arguments.overwrite) as writer,
        show_progress(sum(file.stat().st_size for file in files)) as advance,
    ):
        for encoded in map_in_order(encode, chunks, arguments.workers):
            for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths else []:
                writer.add_document(ids)
            tally.update(documents=len(encoded.lengths), tokens=len(encoded.ids))
            tally.update(size=encoded.size, skipped=encoded.skipped, lost=encoded.lost)
            advance(encoded.consumed)
        if tally["documents"] == 0:  # raised inside, so that the writer discards its files
            unreadable = f"({tally['skipped']} unreadable)"
            raise UserError(f"--input {' '.join(arguments.input)} holds no text {unreadable}: check it")
    return tally


def make_chunks(documents: Iterable[Document]) -> Iterator[Chunk]:
    """Group documents into chunks of about CHUNK_CHARACTERS."""
    chunk: Chunk = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text or "") + 64  # or a chunk of empty documents would have no end
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


load_tokenizer_once = lru_cache(maxsize=1)(load_tokenizer)  # per worker process


def encode_chunk(tokenizer_words: tuple[str, str, str], append_eod: bool, chunk: Chunk) -> Encoded:
    """Tokenize a chunk, in a worker process. Empty documents are dropped. tokenizer_words: path, --eos, --bos."""
    tokenizer = load_tokenizer_once(*tokenizer_words)
    beginning = np.array([tokenizer.bos] if tokenizer_words[2] and tokenizer.bos is not None else [], np.int32)
    ending = np.array([tokenizer.eod] if append_eod else [], np.int32)
    ids: list[np.ndarray] = []
    size = lost = 0
    for document in chunk:
        if document.text:
            parts = enumerate(split_text(document.text))
            pieces = [encode_part(tokenizer, part, number == 0) for number, part in parts]
            ids.append(np.concatenate([beginning, *(np.array(piece, np.int32) for piece, _ in pieces), ending]))
            lost += sum(count for _, count in pieces)
            size += len(document.text.encode())
    skipped = sum(document.text is None for document in chunk)
    consumed = sum(document.consumed for document in chunk)
    joined = np.concatenate([np.empty(0, np.int32), *ids])
    return Encoded(joined, [len(i) for i in ids], size, lost, skipped, consumed)


def split_text(text: str) -> Iterator[str]:
    """Cut a text after a newline about every PIECE_CHARACTERS: tokenizers need many times a text's memory.

    The tokens are those of the whole text if no token spans a newline (`encode_part`), as in a tokenizer trained here.
    """
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        stop = newline + 1 if newline >= 0 else start + 2 * PIECE_CHARACTERS
        yield text[start:stop]
        start = stop


def map_in_order(encode: Callable[[Chunk], Encoded], chunks: Iterable[Chunk], workers: int) -> Iterator[Encoded]:
    """Map `encode` over the chunks, in order, in worker processes, with a few chunks in flight."""
    if workers == 1:
        yield from map(encode, chunks)
        return
    pending: deque[Future[Encoded]] = deque()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for chunk in chunks:
                pending.append(pool.submit(encode, chunk))
                if len(pending) > 2 * workers:  # bounds memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(f"a worker of --workers {workers} died, probably out of memory: use fewer") from error


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes read: it updates a bar on a terminal, else prints a line now and then."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("tokenizing", total=total)
            yield lambda consumed: bar.advance(task, consumed)
        return

    started = printed = time.monotonic()
    done = 0

    def advance(consumed: int) -> None:
        nonlocal printed, done
        done += consumed
        now = time.monotonic()
        if now - printed < SECONDS_BETWEEN_LINES:
            return
        printed = now
        speed = done / (now - started)
        left = (total - done) / speed if speed else float("inf")
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        print(f"tokenizing: {amount}, {speed / 1e6:.1f} MB/s, {left:.0f} s left", file=sys.stderr)

    yield advance
