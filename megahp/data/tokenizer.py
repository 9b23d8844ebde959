"""Convert text to token ids and back: bytes, SentencePiece, Hugging Face `tokenizers`."""

from __future__ import annotations

import hashlib
import io
import os
import random
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megahp.errors import UserError
from megahp.files import LARGEST, refuse_irregular

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")

# SentencePiece stores a space as this character, so the character itself must be encoded as its three bytes.
META_SPACE = "\u2581"

TRAINING_CHARACTERS = 24_000_000  # of text, at most, that SentencePiece is trained on


class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size); `eod` is the id that ends a document."""

    vocab_size: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin or end tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, ignoring end-of-document ids."""
        ...


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer at `path`: "bytes", a SentencePiece `*.model` or a Hugging Face `*.json`.

    Raises UserError if the file is missing, damaged, of another kind, or has no end-of-document token.
    """
    if path == "bytes":
        return ByteTokenizer()
    kinds: dict[str, Callable[[str], Tokenizer]] = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    kind = kinds.get(Path(path).suffix)
    if kind is None:
        raise UserError(f"tokenizer {path!r} is none of the known kinds: use 'bytes', a *.model or a *.json file")
    remedy = "check the path, or train one with `megahp preprocess`"
    if not Path(path).exists():
        raise UserError(f"tokenizer {path!r} does not exist: {remedy}")
    refuse_irregular(Path(path), "tokenizer", remedy, LARGEST)  # which the libraries would read whole
    return kind(path)


class ByteTokenizer:
    """The 256 byte values of UTF-8 text, and one end-of-document id."""

    vocab_size = 257
    eod = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model; `eod` is its end-of-sentence piece."""

    def __init__(self, path: str) -> None:
        sentencepiece = _import("sentencepiece")
        try:
            self._processor: SentencePieceProcessor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {path!r} is not a SentencePiece model; train or download it again") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        unknown, to_id = self._processor.unk_id(), self._processor.piece_to_id
        if self.eod < 0:
            self.eod = _first_known((i for i in map(to_id, END_OF_DOCUMENT) if i != unknown), path)
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        # The byte pieces of META_SPACE; empty if the model has none, or prepends a space to a text: that space would
        # then come before every part that encode() cuts out.
        ids = [to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        prepends = self._processor.encode("a", out_type=str)[0].startswith(META_SPACE)
        self._meta_space = [] if prepends or unknown in ids else ids

    def encode(self, text: str) -> list[int]:
        if not self._meta_space or META_SPACE not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(META_SPACE))
        return first + [i for part in rest for i in self._meta_space + part]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json`; `eod` is the first of END_OF_DOCUMENT in its vocabulary."""

    def __init__(self, path: str) -> None:
        tokenizers = _import("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {path!r} is not a Hugging Face tokenizer.json; download it again") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Encode an end-of-document string inside a text as plain text: only the preprocessor may end a document.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps, so not len(vocabulary)
        self.eod = _first_known((vocabulary[token] for token in END_OF_DOCUMENT if token in vocabulary), path)
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)


def train_sentencepiece(texts: Iterable[str], path: Path, vocab_size: int, seed: int = 0) -> None:
    """Train a lossless BPE model and write it to `path`, atomically.

    Whitespace is kept as it is, every digit is a token, rare characters fall back to bytes, and "\\n" is a token of its
    own: no other token contains a newline. Texts of any size are sampled evenly to TRAINING_CHARACTERS. Raises
    UserError for an existing file, no text, or a `vocab_size` that the text cannot fill or that cannot hold the
    characters.
    """
    if path.exists():
        raise UserError(f"tokenizer {str(path)!r} exists; remove it or train to another path")
    if path.suffix != ".model":
        raise UserError(f"tokenizer {str(path)!r} is trained by SentencePiece; give it a name ending in .model")
    lines = _sample_lines(texts, TRAINING_CHARACTERS, seed)
    if not lines:
        raise UserError(f"tokenizer {str(path)!r} cannot be trained, the input holds no text; see --extensions")
    sentencepiece = _import("sentencepiece")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,  # the rest falls back to bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT[0],
            max_sentence_length=1 << 20,  # bytes; longer lines are ignored
            num_threads=os.cpu_count() or 1,
            minloglevel=3,  # errors only
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split("] ")[-1].split())
        raise UserError(f"tokenizer {str(path)!r} with {vocab_size} pieces cannot be trained: {reason}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    unfinished.write_bytes(model.getvalue())
    unfinished.replace(path)


def _sample_lines(texts: Iterable[str], characters: int, seed: int) -> list[str]:
    """Return a uniform random sample of the lines of `texts`, of at most `characters` in all.

    Memory stays bounded: whenever the sample overflows, half of it is dropped, and the probability of new lines halved.
    """
    random_ = random.Random(seed)
    kept: list[str] = []
    size, probability = 0, 1.0
    for line in (line for text in texts for line in text.split("\n") if line):
        if probability < 1 and random_.random() >= probability:
            continue
        kept.append(line)
        size += len(line)
        while size > characters and len(kept) > 1:
            probability /= 2
            kept = [line for line in kept if random_.random() < 0.5] or kept[:1]
            size = sum(map(len, kept))
    return kept


def _first_known(ids: Iterable[int], path: str) -> int:
    for i in ids:
        return i
    raise UserError(f"tokenizer {path!r} has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT)}")


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"this tokenizer needs the package {package!r}; pip install {package}") from error
