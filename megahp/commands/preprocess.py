"""Tokenize text into PREFIX.bin and PREFIX.idx (Megatron-LM's format), with a description in PREFIX.json.

    megahp preprocess --input corpus/ --output data/code --tokenizer data/code.model \\
        --train-sentencepiece 4096

Input is any mix of text files (one document each), JSON lines, JSON arrays, Parquet and Arrow files (one document per
record), compressed by gzip, zstd, bzip2 or xz or not, folders of such files, and - for standard input. What a file is,
is told from its content and its name, and a file of which it cannot be told is refused; --format says it for all.

You see the progress, then documents, tokens and speed, and what was left out and why. If more than --most-bad of the
documents are bad, nothing is written. The output depends only on the input and the tokenizer, not on --workers. After
a signal or the death of a worker the same command resumes (PREFIX.unfinished holds what is done).

With --series the input is numbers, and each window of a series becomes a document (docs/series.md):

    megahp preprocess --series --input hourly.csv --output data/hourly --tokenizer data/hourly.series \\
        --conditioning 168 --horizon 24
"""

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from megahp.commands import preprocess_series
from megahp.commands.arguments import add_text_arguments
from megahp.commands.output import check_replaceable, data_files, ending_signals, write_description
from megahp.data.fast_tokenizer import FastTokenizer, InexactError
from megahp.data.indexed import IndexedWriter
from megahp.data.texts import (
    EMPTY,
    RECORDS,
    LeftOut,
    Piece,
    Source,
    check_key,
    check_share,
    find_sources,
    note,
    read_pieces,
    split_text,
)
from megahp.data.tokenizer import Tokenizer, encode_parts, fingerprint_of, load_tokenizer, train_sentencepiece
from megahp.errors import UserError
from megahp.series.coding import SUFFIX

CHUNK_CHARACTERS = 1 << 20  # of the documents that a worker gets at a time
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_SAVES = 30  # of what a killed process leaves for the next
SPACES = "a\n\n\tb   c\n"
Chunk = list[Piece]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders; - for standard input")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    add("--tokenizer", required=True, metavar="TOK", help="'bytes', a *.model or a *.json file")
    add("--train-sentencepiece", type=int, metavar="VOCAB", help="train --tokenizer on the input if it does not exist")
    add_text_arguments(parser)
    endings = [".py", ".rst", ".txt", *RECORDS]
    words = f"of files to read from folders (default: {' '.join(endings)})"
    add("--extensions", nargs="+", default=endings, help=words)
    add("--exclude", nargs="+", default=[], metavar="NAME", help="folders to skip inside folders")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: cores, %(default)s)")
    words = (
        "what encodes: the tokenizer's own library; or gigatoken, many times as fast, whose ids are compared with it"
    )
    engines, default = ["auto", "library", "gigatoken"], "(default: auto, gigatoken where it is installed and reads it)"
    add("--engine", choices=engines, default="auto", help=f"{words} {default}")
    add("--no-eod", action="store_true", help="do not end documents with the end-of-document token")
    words = "by name or id (default: as the files beside the tokenizer say)"
    add("--eos", default="", metavar="TOKEN", help=f"the token that ends a document, {words}")
    add("--bos", default="", metavar="TOKEN", help="begin each document with this token, by name or id (default: none)")
    add("--overwrite", action="store_true", help="replace existing output of megahp's")
    preprocess_series.add_arguments(parser)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk of documents."""

    ids: np.ndarray  # int32, all documents concatenated
    lengths: list[tuple[int, bool]]  # tokens of each piece of a document, and whether it is the last
    size: int  # UTF-8 bytes of their text
    lost: int  # unknown tokens, or characters that the tokenizer drops
    left_out: list[tuple[str, int, int]]  # why, in which file, and its number there
    last: Piece  # of the chunk, without its text


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, whose number is the argument, came."""


class WorkerDied(Exception):
    """A worker process ended by itself."""


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    refuse_options_of_others(arguments)
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}: give at least 1")
    outputs = data_files(arguments.output)
    named = map(Path, [*arguments.input, arguments.tokenizer])
    check_replaceable("--output", outputs, named, arguments.overwrite)  # before standard input is read
    try:
        with interrupted_by_signals():
            if arguments.series:
                return preprocess_series.run(arguments)
            return preprocess(arguments, outputs)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        print(f"{arguments.output}: stopped by {number.name}; the same command resumes", file=sys.stderr)
        return 128 + number
    except WorkerDied as error:
        why = f"a worker of --workers {arguments.workers} died, probably out of memory"
        raise UserError(f"{why}: use fewer, and the same command resumes") from error


def refuse_options_of_others(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that has no effect, with --series or without it, and for a coding of series without
    it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    changed = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    common = ("input", "output", "tokenizer", "overwrite", "series", "overrides")
    for name in changed:
        if name not in common and arguments.series != (name in preprocess_series.OPTIONS):
            effect = "has no effect with --series" if arguments.series else "goes with --series alone"
            raise UserError(f"--{name.replace('_', '-')} {effect}; remove it")
    if not arguments.series and arguments.tokenizer.endswith(SUFFIX):
        raise UserError(f"--tokenizer {arguments.tokenizer!r} codes series; add --series")


def preprocess(arguments: argparse.Namespace, outputs: dict[Path, Callable[[Path], bool]]) -> int:
    folder = Path(arguments.output).parent
    scratch = folder if folder.is_dir() else None
    named = arguments.input, arguments.extensions, arguments.exclude, arguments.format
    sources, left_out = find_sources(*named, scratch)
    check_key(sources, arguments.json_key)
    check_replaceable("--output", outputs, (source.path for source in sources))  # those in folders too
    if arguments.train_sentencepiece and not Path(arguments.tokenizer).exists():
        started = time.monotonic()
        texts = (piece.text for piece in read_pieces(sources, arguments.json_key) if piece.text)
        train_sentencepiece(texts, Path(arguments.tokenizer), arguments.train_sentencepiece)
        print(f"trained {arguments.tokenizer} in {time.monotonic() - started:.1f} s")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos, arguments.bos)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers processes are as many as were asked for
    started = time.monotonic()
    description = {
        "tokenizer": arguments.tokenizer,
        "tokenizer_fingerprint": fingerprint_of(arguments.tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "bos": tokenizer.bos,
    }
    try:
        engine = engine_of(arguments)
        tally = tokenize(sources, tokenizer, engine, arguments, description, left_out)
    except InexactError as error:
        if arguments.engine == "gigatoken":
            raise
        print(f"{arguments.output}: {error}; begins again with the tokenizer's own library", file=sys.stderr)
        tally = tokenize(sources, tokenizer, "library", arguments, description, left_out)
    counts = {key: tally[key] for key in ("documents", "tokens", "largest_id")}
    write_description(arguments.output, {**description, **counts})
    megabytes, seconds = tally["size"] / 1e6, time.monotonic() - started
    amounts = f"{tally['documents']} documents, {tally['tokens']} tokens, {megabytes:.1f} MB of text, {seconds:.1f} s"
    speed = (tally["size"] - tally["size before"]) / 1e6 / seconds
    print(f"{arguments.output}: {amounts} ({speed:.1f} MB/s), {tally['tokens'] / tally['size']:.3f} tokens/byte")
    if tally["lost"]:
        loss = f"{tally['lost']} unknown tokens, or characters that {arguments.tokenizer} drops"
        print(f"{arguments.output}: {loss}; a tokenizer that falls back to bytes has none")
    if (kept := tokenizer.decode(tokenizer.encode(SPACES))) != SPACES:  # as SentencePiece's default normalizer does
        print(f"{arguments.output}: {arguments.tokenizer} does not keep all spaces: of {SPACES!r} it keeps {kept!r}")
    for reason, (count, first) in left_out.items():
        print(f"{arguments.output}: left out {count}: {reason}, the first {first}")
    return 0


def engine_of(arguments: argparse.Namespace) -> str:
    """Return what encodes: of --engine auto, gigatoken where it is installed and reads the tokenizer. Raises UserError
    where gigatoken was asked for, and does not."""
    asked = arguments.engine
    if asked == "library" or (asked == "auto" and importlib.util.find_spec("gigatoken") is None):
        return "library"
    try:
        load_tokenizer_once(arguments.tokenizer, arguments.eos, arguments.bos, "gigatoken")
    except UserError:
        if asked == "gigatoken":
            raise
        return "library"
    return "gigatoken"


def tokenize(
    sources: list[Source],
    tokenizer: Tokenizer,
    engine: str,
    arguments: argparse.Namespace,
    description: dict[str, Any],
    left_out: LeftOut,
) -> Counter[str]:
    """Read, encode and write in parallel and in order; memory holds a few chunks per worker. Resumes where an earlier
    process was ended that had the same description and settings, and the same files until there.

    Returns what was written: documents, tokens, the largest id, bytes of text (size; before it resumed: size before),
    and what was lost. left_out: what is left out is added.
    """
    tokenizer_words = arguments.tokenizer, arguments.eos, arguments.bos, engine
    digests = digest([*description.items(), tokenizer_words, arguments.json_key, arguments.no_eod], sources)
    encode = partial(encode_chunk, tokenizer_words, not arguments.no_eod)
    ends = np.cumsum([source.size for source in sources]).tolist()
    with IndexedWriter(arguments.output, tokenizer.vocab_size, arguments.overwrite, resume=True) as writer:
        tally, after, bad = resume(writer, digests, arguments.output)
        tally["size before"], saved = tally["size"], time.monotonic()
        chunks = make_chunks(read_pieces(sources, arguments.json_key, after))
        results = closing(map_in_order(encode, chunks, arguments.workers))
        with results as encoded_chunks, show_progress(ends[-1]) as advance:
            for encoded in encoded_chunks:
                start = 0
                for length, is_last in encoded.lengths:
                    writer.add_document(encoded.ids[start : start + length], goes_on=not is_last)
                    start += length
                    tally["documents"] += is_last
                tally.update(tokens=len(encoded.ids), size=encoded.size, lost=encoded.lost)
                for reason, file, number in encoded.left_out:
                    note(bad, reason, sources[file].place(number))
                file, number = encoded.last.file, encoded.last.number
                state = {"inputs": digests[file], "after": (file, number), "tally": dict(tally), "bad": dict(bad)}
                writer.mark(state)
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    writer.save()
                    saved = time.monotonic()
                advance(ends[file] - sources[file].size + encoded.last.read)
        check_share(bad, tally["documents"], arguments.most_bad)  # raised inside, so that the writer discards its files
        if tally["documents"] == 0:
            raise UserError(f"--input {' '.join(arguments.input)} holds no text: check it")
    left_out.update(bad)
    tally["largest_id"] = writer.largest
    return tally


def resume(writer: IndexedWriter, digests: Sequence[str], output: str) -> tuple[Counter[str], tuple[int, int], LeftOut]:
    """Return what the writer holds of these inputs and settings already: its tally, the (file, number) of its last
    document, what was left out. Other unfinished work is dropped."""
    try:
        file, number = writer.state["after"]
        tally, after = Counter[str](writer.state["tally"]), (int(file), int(number))
        bad = {reason: (count, first) for reason, (count, first) in writer.state["bad"].items()}
        is_ours = writer.state["inputs"] == digests[file]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):  # no state, or a damaged one
        is_ours = False
    if is_ours:
        print(f"{output}: resumes after {tally['documents']} documents", file=sys.stderr)
        return tally, after, bad
    if writer.state:
        print(f"{output}: unfinished work of other inputs, settings or --engine is dropped", file=sys.stderr)
    writer.restart()
    return Counter[str](), (0, 0), LeftOut()


def digest(settings: Sequence[object], sources: Sequence[Source]) -> list[str]:
    """Return for each source a hash of what the output up to it was made with and from."""
    digests: list[str] = []
    for source in sources:
        made_from = digests[-1:] or settings, source.name, source.kind, source.size, source.version
        digests.append(hashlib.sha256(repr(made_from).encode(errors="surrogatepass")).hexdigest())
    return digests


def make_chunks(pieces: Iterable[Piece]) -> Iterator[Chunk]:
    """Group documents into chunks of about CHUNK_CHARACTERS. One that is longer ends its chunk, since no work can be
    saved in its middle."""
    chunk: Chunk = []
    characters, is_long = 0, False
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text or "") + 64  # or a chunk of empty documents would have no end
        if characters >= CHUNK_CHARACTERS or (is_long and piece.ends):
            yield chunk
            chunk, characters, is_long = [], 0, not piece.ends
    if chunk:
        yield chunk


@lru_cache(maxsize=1)  # per worker process
def load_tokenizer_once(path: str, eos: str, bos: str, engine: str) -> Tokenizer:
    tokenizer = load_tokenizer(path, eos, bos)
    return FastTokenizer(tokenizer) if engine == "gigatoken" else tokenizer


def encode_chunk(tokenizer_words: tuple[str, str, str, str], append_eod: bool, chunk: Chunk) -> Encoded:
    """Tokenize a chunk, in a worker process. Empty documents are dropped.

    tokenizer_words: path, --eos, --bos, and the engine that encodes.
    """
    tokenizer = load_tokenizer_once(*tokenizer_words)
    beginning = [np.array([tokenizer.bos], np.int32)] if tokenizer_words[2] and tokenizer.bos is not None else []
    ending = [np.array([tokenizer.eod], np.int32)] if append_eod else []
    ids: list[np.ndarray] = [np.empty(0, np.int32)]
    lengths: list[tuple[int, bool]] = []
    size = lost = 0
    cut = [(piece, list(split_text(piece.text))) for piece in chunk if piece.text]
    parts = [(part, piece.begins and not number) for piece, texts in cut for number, part in enumerate(texts)]
    encoded = encode_parts(tokenizer, parts)
    for piece, texts in cut:
        pieces = [*(beginning if piece.begins else [])]
        for part_ids, missing in islice(encoded, len(texts)):
            pieces.append(part_ids)
            lost += missing
        pieces += ending if piece.ends else []
        ids += pieces
        lengths.append((sum(map(len, pieces)), piece.ends))
        size += sum(len(text.encode()) for text in texts)
    left_out = [(piece.fault or EMPTY, piece.file, piece.number) for piece in chunk if not piece.text]
    return Encoded(np.concatenate(ids), lengths, size, lost, left_out, chunk[-1]._replace(text=None))


def map_in_order(
    encode: Callable[[Chunk], Encoded], chunks: Iterable[Chunk], workers: int
) -> Generator[Encoded, None, None]:
    """Map `encode` over the chunks, in order, in worker processes, with a few chunks in flight. Raises WorkerDied.

    Each worker has a pipe of its own, whose other end it alone holds. In the shared pipes of a ProcessPoolExecutor,
    the rest of a result is waited for forever when the worker that was writing it is killed.
    """
    if workers == 1:
        yield from map(encode, chunks)
        return
    context, processes, idle = multiprocessing.get_context("spawn"), [], SimpleQueue[Any]()

    def ask(chunk: Chunk) -> Encoded:
        worker = idle.get()
        try:
            worker.send(chunk)
            answer = worker.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        finally:
            idle.put(worker)
        if isinstance(answer, UserError):
            raise answer
        return answer

    pending: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers) as threads:  # a thread waits for each worker
        try:
            # Ctrl-C reaches all processes of a terminal: this one ends its workers, which would complain.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(encode, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()  # or its end would go unnoticed
                idle.put(ours)
            signal.signal(signal.SIGINT, before)
            for chunk in chunks:
                pending.append(threads.submit(ask, chunk))
                if len(pending) > 2 * workers:  # bounds memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # do not wait for work that nobody will take
            threads.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()


def serve(encode: Callable[[Chunk], Encoded], parent: Connection) -> None:
    """Encode the parent's chunks, in a worker process, until the parent ends or kills it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Slurm sends to all processes of a job
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            chunk = parent.recv()
            try:
                parent.send(encode(chunk))
            except UserError as error:
                parent.send(error)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise Terminated in the block at SIGTERM and SIGHUP, as ctrl-C raises KeyboardInterrupt."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, terminate) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes read so far: it updates a bar on a terminal, else prints lines."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("tokenizing", total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    started = printed = time.monotonic()
    first = -1

    def advance(done: int) -> None:
        nonlocal printed, first
        first = done if first < 0 else first  # or a resumed one would be thought as fast as all that is done
        now = time.monotonic()
        if now - printed < SECONDS_BETWEEN_LINES:
            return
        printed = now
        speed = (done - first) / (now - started)
        left = (total - done) / speed if speed else float("inf")
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        print(f"tokenizing: {amount}, {speed / 1e6:.1f} MB/s, {left:.0f} s left", file=sys.stderr)

    yield advance
