"""Convert text to token ids and back: bytes, SentencePiece, Hugging Face `tokenizers`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megahp.errors import UserError
from megahp.files import LARGEST, read_json, refuse_irregular, replacing
from megahp.series.coding import SUFFIX, load_coding
from megahp.series.tokenizer import SeriesTokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from megahp.config.schema import DataConfig

# names of end and begin tokens where no configuration tells: special tokens only, since texts hold `</s>` too
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
BEGIN_OF_DOCUMENT = ("<|begin_of_text|>", "<s>", "<bos>")

# SentencePiece stores a space as this character, so the character itself must be encoded as its three bytes.
META_SPACE = "\u2581"

# normalizers of a tokenizer.json that remove characters
REMOVING = re.compile('"(Strip|StripAccents|BertNormalizer|Nmt|Precompiled)"|"content": ""')

TRAINING_CHARACTERS = 24_000_000  # of text, at most, that SentencePiece is trained on


class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size). No text is encoded to the end or begin token, or to another special token.

    path: as given to load_tokenizer.
    eod: the id that ends a document. bos: the id that begins one; None if none is known.
    adds_bos: whether its own configuration puts `bos` before a text.
    """

    path: str
    vocab_size: int
    eod: int
    bos: int | None
    adds_bos: bool

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin or end tokens."""
        ...

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        """Return the ids of `text`, and how much of it they do not hold: unknown tokens, or characters where some are
        dropped without one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """Return the ids of each text (int32), and how much of it they do not hold, as `encode_counting`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, ignoring end and begin tokens."""
        ...


def load_tokenizer(path: str, eos: str = "", bos: str = "") -> Tokenizer:
    """Load the tokenizer at `path`: "bytes", a SentencePiece `*.model`, a Hugging Face `*.json`, or a `*.series`, which
    encodes no text.

    eos, bos: its end and begin token, by name or id; bos "none": it has none. Empty: as the files beside it say, or
    else as the tokenizer itself. Raises UserError if the file is missing, damaged, of another kind, or has no end.
    """
    if path == "bytes":
        return ByteTokenizer(eos, bos)
    _check_file(path)
    if path.endswith(SUFFIX):
        return SeriesTokenizer(path, eos, bos)
    return (SentencePieceTokenizer if path.endswith(".model") else HuggingFaceTokenizer)(path, eos, bos)


def encode_parts(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> Iterator[tuple[np.ndarray, int]]:
    """Encode parts of texts, each with whether it is the first of its text, as `Tokenizer.encode_batch`. What a
    tokenizer puts before a text, such as a space, comes before first parts alone.

    The ids of all parts are those of the whole text if each begins a line and no token spans a newline.
    """
    (newline,), (lost_there,) = tokenizer.encode_batch(["\n"])
    batch = tokenizer.encode_batch([text if is_first else f"\n{text}" for text, is_first in parts])
    for (text, is_first), ids, lost in zip(parts, *batch, strict=True):
        if is_first:
            yield ids, lost
        elif np.array_equal(ids[: len(newline)], newline):
            yield ids[len(newline) :], lost - lost_there
        else:
            (alone,), (lost,) = tokenizer.encode_batch([text])
            yield alone, lost


def tokenizer_of(data: DataConfig, path: str = "") -> Tokenizer:
    """Load the tokenizer that a checkpoint's settings record, with its end and begin tokens, from `path` if given.
    Raises UserError for another one, of the same size too."""
    refuse_other(path or data.tokenizer, data.tokenizer_fingerprint, "the model was trained with")
    # a checkpoint without a begin token is of a megahp that put the end token before every text, whatever the files say
    return load_tokenizer(path or data.tokenizer, data.eos, data.bos or "none")


def fingerprint_of(path: str) -> str:
    """Return a hash of what a tokenizer encodes: vocabulary, merges, and settings that ids depend on. Raises UserError.

    A tokenizer.json may be saved again, with truncation, other end tokens or other whitespace, and keeps it.
    """
    if path == "bytes":
        return hashlib.sha256(b"bytes").hexdigest()
    _check_file(path)
    if path.endswith(SUFFIX):
        return load_coding(Path(path)).fingerprint
    return _hash_of_file(path) if path.endswith(".model") else _fingerprint(path, _hash_of_file(path))


@lru_cache(maxsize=4)  # a start asks for it several times, and a large vocabulary takes seconds
def _fingerprint(path: str, hash_of_file: str) -> str:
    """Return the fingerprint of a tokenizer.json with this content."""
    try:
        settings = json.loads(_import("tokenizers").Tokenizer.from_file(path).to_str())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {path!r} is not a Hugging Face tokenizer.json; download it again") from error
    model = settings["model"]
    model.pop("dropout", None)
    if "merges" in model:  # older versions of the library write a pair as one string
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # how special tokens are found in texts does not matter: they are not
    added = [(t["id"], t["content"], "special") if t["special"] else t for t in settings["added_tokens"]]
    kept = {"added_tokens": added, **{key: settings[key] for key in ("normalizer", "pre_tokenizer", "model")}}
    return hashlib.sha256(json.dumps(_set(kept), sort_keys=True).encode()).hexdigest()


def refuse_other(path: str, recorded: str, what: str) -> None:
    """Raise UserError unless the tokenizer at `path` has this fingerprint; empty, as in checkpoints before version 0.2:
    any. what: the holder of the fingerprint, and what it did with the tokenizer, for the error."""
    # Descriptions of data from before version 0.2 hold the hash of the file; to be dropped with version 1.
    if recorded and path != "bytes" and Path(path).exists() and recorded == _hash_of_file(path):
        return
    if recorded and (found := fingerprint_of(path)) != recorded:
        raise UserError(
            f"data.tokenizer = {path!r} is not the one {what}, which has the fingerprint {recorded[:12]} and not "
            f"{found[:12]}; restore that one, or name it"
        )


def _check_file(path: str) -> None:
    """Raise UserError unless this is a file of a known kind."""
    if Path(path).suffix not in (".model", ".json", SUFFIX):
        kinds = f"a *.model, a *.json or, for series, a *{SUFFIX} file"
        raise UserError(f"tokenizer {path!r} is none of the known kinds: use 'bytes', {kinds}")
    remedy = "check the path, or train one with `megahp preprocess`"
    if not Path(path).exists():
        raise UserError(f"tokenizer {path!r} does not exist: {remedy}")
    refuse_irregular(Path(path), "tokenizer", remedy, LARGEST)  # which the libraries would read whole


def _hash_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class ByteTokenizer:
    """The 256 byte values of UTF-8 text, and one end-of-document id."""

    path = "bytes"
    vocab_size = 257
    eod = 256
    bos: int | None = None
    adds_bos = False

    def __init__(self, eos: str = "", bos: str = "") -> None:
        if eos not in ("", "256", END_OF_DOCUMENT[0]) or bos not in ("", "none"):
            raise UserError(f"tokenizer 'bytes' with --eos {eos!r} and --bos {bos!r}: its end is 256; omit them")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        return self.encode(text), 0

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts], [0] * len(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model. Its control symbols are its special tokens, which no text is encoded to.

    unknown: the id of what it lacks.
    """

    def __init__(self, path: str, eos: str = "", bos: str = "") -> None:
        sentencepiece, self.path = _import("sentencepiece"), path
        try:
            model = Path(path).read_bytes()
            self._processor: SentencePieceProcessor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {path!r} is not a SentencePiece model; train or download it again") from error
        processor, self.vocab_size = self._processor, self._processor.vocab_size()
        self.unknown, to_id = processor.unk_id(), processor.piece_to_id

        def known(name: str) -> int | None:
            return None if (i := to_id(name)) == self.unknown else i

        def own(configured: int, names: Iterable[str]) -> Iterator[int]:
            yield from (i for i in [configured] if i >= 0)
            yield from (i for name in names if (i := known(name)) is not None and processor.is_control(i))

        size, ends, begins = self.vocab_size, own(processor.eos_id(), END_OF_DOCUMENT), BEGIN_OF_DOCUMENT
        self.eod = _end(path, _special(path, "eos", eos, known, size, ends))
        self.bos = _special(path, "bos", bos, known, size, own(processor.bos_id(), begins))
        self.adds_bos = self.bos is not None and read_beside(path, "tokenizer_config.json").get("add_bos_token") is True
        if texts := {i for i in (self.eod, self.bos) if i is not None and not processor.is_control(i)}:
            model = _as_control_symbols(model, texts)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # The byte pieces of META_SPACE; empty if the model has none, or prepends a space to a text: that space would
        # then come before every part that encode() cuts out.
        ids = [to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        prepends = self._processor.encode("a", out_type=str)[0].startswith(META_SPACE)
        self._meta_space = [] if prepends or self.unknown in ids else ids

    def encode(self, text: str) -> list[int]:
        if not self._meta_space or META_SPACE not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(META_SPACE))
        return first + [i for part in rest for i in self._meta_space + part]

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        return (ids := self.encode(text)), ids.count(self.unknown)

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        return _as_arrays(map(self.encode_counting, texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def plain(self) -> bytes | None:
        """Return the model with names that no text holds for the pieces that no text is encoded to; None where it
        changes texts before it encodes them."""
        model = self._processor.serialized_model_proto()
        normalizer = _protobuf().ModelProto.FromString(model).normalizer_spec
        if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
            return None
        hidden = {i for i in range(self.vocab_size) if self._processor.is_control(i) or i == self.unknown}
        return _as_control_symbols(model, hidden, rename=uuid.uuid4().hex)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without what else such a file may hold: truncation, padding, random merges (dropout).

    unknown: the id of what it lacks, -1 if none is known.
    """

    def __init__(self, path: str, eos: str = "", bos: str = "") -> None:
        tokenizers, self.path = _import("tokenizers"), path
        settings = read_json(Path(path), "tokenizer", "download it again")
        try:
            settings["model"].pop("dropout", None)
            added = settings.get("added_tokens") or []
            special = {token["content"] for token in added if token["special"]}
            if settings["model"].get("byte_fallback"):  # needs its bytes, which some trainers make special
                special -= {f"<0x{byte:02X}>" for byte in range(256)}
            self._load(tokenizers, settings, special)
            size = self.vocab_size
            ends, begins = (
                (self._ids[name] for name in names if name in special and name in self._ids)
                for names in (END_OF_DOCUMENT, BEGIN_OF_DOCUMENT)
            )
            self.eod = _end(path, _special(path, "eos", eos, self._ids.get, size, ends))
            self.bos = _special(path, "bos", bos, self._ids.get, size, begins)
            named = {name for name, i in self._ids.items() if i in (self.eod, self.bos)}
            if not named <= special:
                self._load(tokenizers, settings, special | named)
            self.adds_bos = self._adds_bos()
            model = settings["model"]
            unknown = model.get("unk_token") if model["type"] != "Unigram" else model.get("unk_id")
            self.unknown: int = unknown if isinstance(unknown, int) else self._ids.get(unknown or "", -1)
            # What is lost then leaves no trace in the ids: a BPE without these drops the characters that it lacks.
            kinds = json.dumps([settings.get("normalizer"), settings.get("pre_tokenizer")])
            drops = self.unknown < 0 and not model.get("byte_fallback") and '"ByteLevel"' not in kinds
            self._is_lossy = drops or REMOVING.search(kinds) is not None
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception, and a file from elsewhere may hold any type
            raise UserError(f"tokenizer {path!r} is not a Hugging Face tokenizer.json; download it again") from error

    def _load(self, tokenizers: Any, settings: dict[str, Any], special: Set[str]) -> None:
        """Build the tokenizer such that no text is encoded to a special token: those in the vocabulary of the model
        itself, which it would find in a text, get a name there that no text has."""
        model = settings["model"]
        pieces = [piece for piece, _ in model["vocab"]] if isinstance(model["vocab"], list) else model["vocab"]
        mark = uuid.uuid4().hex
        inside = {name: f"<{mark}:{number}>" for number, name in enumerate(sorted(special & set(pieces)))}
        added = [
            token | {"special": token["content"] in special}
            for token in settings.get("added_tokens") or []
            if token["content"] not in inside
        ]
        off = {"truncation": None, "padding": None, "added_tokens": added, "model": _renamed(model, inside)}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings | off))
        self._tokenizer.encode_special_tokens = True  # as text: only the preprocessor may end a document
        self._names = {hidden: name for name, hidden in inside.items()}
        self._mark = re.compile(f"<{mark}:[0-9]+>")
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._ids: dict[str, int] = {self._names.get(name, name): i for name, i in vocabulary.items()}
        self.vocab_size: int = max(vocabulary.values()) + 1  # ids may have gaps, so not len(vocabulary)

    def _adds_bos(self) -> bool:
        """Return what the configuration beside it says, or else whether its post-processor puts `bos` before a text."""
        configured = read_beside(self.path, "tokenizer_config.json").get("add_bos_token")
        adds = self._tokenizer.encode("a").ids[:1] == [self.bos] if configured is None else configured is True
        return adds and self.bos is not None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if not self._is_lossy:
            return ids, ids.count(self.unknown)
        lost = last = 0
        spans = [span for i, span in zip(ids, encoding.offsets, strict=True) if i != self.unknown]
        for begin, end in (*spans, (len(text), len(text))):
            if begin > last:  # spaces apart, which many of these drop between words
                lost += len("".join(text[last:begin].split()))
            last = max(last, end)
        return ids, lost

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        if self._is_lossy:
            return _as_arrays(map(self.encode_counting, texts))
        # the fast one does not tell which characters each token is of
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _as_arrays((ids, ids.count(self.unknown)) for ids in (each.ids for each in encodings))

    def plain(self) -> str | None:
        """Return the tokenizer.json without special tokens; None where it drops parts of a text that are counted."""
        settings = json.loads(self._tokenizer.to_str())
        settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["special"]]
        return None if self._is_lossy else json.dumps(settings)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i != self.eod and i != self.bos]
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        return self._mark.sub(lambda hidden: self._names[hidden[0]], text)


def _as_arrays(counted: Iterable[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[int]]:
    pairs = [(np.array(ids, np.int32), lost) for ids, lost in counted]
    return [ids for ids, _ in pairs], [lost for _, lost in pairs]


def _renamed(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the model of a tokenizer.json with pieces renamed, and without the merges that make one or use it."""
    vocab, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocab, list):
        return model | {"vocab": [[names.get(piece, piece), score] for piece, score in vocab]}
    changed: dict[str, Any] = {"vocab": {names.get(piece, piece): i for piece, i in vocab.items()}}
    if unknown in names:
        changed["unk_token"] = names[unknown]
    if names and model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        made = ((one, other, one + other.removeprefix(prefix)) for one, other in pairs)
        changed["merges"] = [pair for pair, pieces in zip(pairs, made, strict=True) if names.keys().isdisjoint(pieces)]
    return model | changed


def _set(value: Any) -> Any:
    """Return JSON without what is null or false: a newer library writes more of those for the same tokenizer."""
    if isinstance(value, dict):
        return {key: _set(inner) for key, inner in value.items() if inner is not None and inner is not False}
    return [_set(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _as_control_symbols(model: bytes, ids: Collection[int], rename: str = "") -> bytes:
    """Return a SentencePiece model in which these pieces are control symbols, which it never finds in a text.

    rename: if given, what their names begin with from now on, for a library that would find them.
    """
    proto = _protobuf().ModelProto.FromString(model)
    for i in ids:
        proto.pieces[i].type = proto.SentencePiece.CONTROL
        proto.pieces[i].piece = f"<{rename}:{i}>" if rename else proto.pieces[i].piece
    return proto.SerializeToString()


def _protobuf() -> Any:
    """Return the module that reads SentencePiece models. Raises UserError."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        why = "what this SentencePiece model is needed for takes the package 'protobuf'"
        raise UserError(f"{why}; pip install protobuf") from error
    return sentencepiece_model_pb2


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
    with replacing(path) as unfinished:
        unfinished.write_bytes(model.getvalue())


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


def _special(
    path: str, role: str, given: str, known: Callable[[str], int | None], size: int, own: Iterator[int]
) -> int | None:
    """Return the id of the end ("eos") or begin ("bos") token: as given, by name or id; as the files beside the
    tokenizer say; or else the first of its own. None if there is none. Raises UserError for one that it lacks.

    known: the id of a token's name. size: of the vocabulary.
    """
    if role == "bos" and (given == "none" or not given and _says_none(path)):
        return None
    asked = [(f"--{role}", int(given) if given.isdecimal() else given)] if given else _configured(path, role)
    for source, value in asked:
        found = known(value) if isinstance(value, str) else value
        if found is not None and 0 <= found < size:
            return found
        if given or Path(path).stem == "tokenizer":  # else those files may be another tokenizer's
            raise UserError(f"{source} names {value!r}, which tokenizer {path!r} lacks; give --{role}, a name or an id")
    return next(own, None)


def _configured(path: str, role: str) -> Iterator[tuple[str, str | int]]:
    """Yield the file and the name or id of an end or begin token in each of the files beside a tokenizer that has one,
    the tokenizer's own files first."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        settings = read_beside(path, file)
        value, number = settings.get(f"{role}_token"), settings.get(f"{role}_token_id")
        value = value.get("content") if isinstance(value, dict) else value
        number = number[0] if isinstance(number, list) and number else number
        source = str(Path(path).with_name(file))
        if isinstance(value, str) and value:
            yield source, value
        if type(number) is int:  # True is an int too
            yield source, number


def _says_none(path: str) -> bool:
    """Return whether the tokenizer's own configuration names no begin token: the model's may still have an id for it,
    which transformers and lm-eval then do not use."""
    own = [read_beside(path, name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    return any(own) and not any(settings.get("bos_token") for settings in own)


def read_beside(path: str, name: str) -> dict[str, Any]:
    """Return the object of a JSON file beside a tokenizer; empty where there is none. Raises UserError."""
    file = Path(path).with_name(name)
    return read_json(file, "the tokenizer's settings", "correct or remove it") if file.exists() else {}


def _end(path: str, found: int | None) -> int:
    if found is None:
        names = "the name or id of one of its tokens"
        raise UserError(f"tokenizer {path!r} has no end-of-document token; give --eos (a run: data.eos), {names}")
    return found


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"this tokenizer needs the package {package!r}; pip install {package}") from error
