"""Read and write tokenizers in Hugging Face's formats, and list the bytes that each token stands for."""

import base64
import json
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahp.config.resolve import shown
from megahp.convert.sidecar import write_json
from megahp.data.tokenizer import END_OF_DOCUMENT, META_SPACE, Tokenizer, load_tokenizer, read_beside
from megahp.errors import UserError
from megahp.files import LARGEST, refuse_irregular
from megahp.series.tokenizer import SeriesTokenizer

# of a Hugging Face folder, what its tokenizer and the generation of text depend on; without code
OF_A_MODEL = ("generation_config.json", "config.json")
KEPT = (
    *OF_A_MODEL,
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# keys of tokenizer_config.json that say which class of transformers builds the tokenizer, and how
OF_A_CLASS = ("legacy", "add_prefix_space", "sp_model_kwargs", "use_default_system_prompt", "from_slow")
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)  # of an added token
UNIGRAM, BPE = 1, 2  # kinds of SentencePiece models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # roles of their pieces


def find_tokenizer(folder: Path, original: str) -> str:
    """Return the tokenizer of a Hugging Face folder. original: the one it was exported from, whose format is
    preferred. Raises UserError."""
    if original == "bytes":
        return original
    files = [file for file in (folder / "tokenizer.json", folder / "tokenizer.model") if file.exists()]
    if not files:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; name a tokenizer by --tokenizer")
    same_format = [file for file in files if file.suffix == Path(original).suffix]
    return str((same_format or files)[0])


def keep_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy what a Hugging Face folder says of its tokenizer, special tokens and generation, for a later export; what
    the target has already stays. Raises UserError."""
    for name in names:
        if (source / name).exists() and not (target / name).exists():
            refuse_irregular(source / name, "file", "remove it, or get it again", LARGEST)
            shutil.copyfile(source / name, target / name)


def special_tokens(name: str, eod: int) -> dict[str, Any]:
    """Return the keys of config.json that name special tokens: as in the one kept beside a tokenizer, or else the
    end-of-document token alone. Raises UserError."""
    kept = _beside(name, "config.json")
    ids: dict[str, Any] = {key: kept[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in kept}
    for key, value in ids.items():
        each_id = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in each_id):
            file = Path(name).parent / "config.json"
            raise UserError(f"{file}: {key} = {shown(value)} is neither a token's id nor a list of them; fix it")
    return {"bos_token_id": None, "eos_token_id": eod, **ids}


def write_tokenizer(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Write tokenizer files with which transformers encodes a text to the same tokens, and the other files that were
    kept beside the tokenizer: templates, special tokens, generation settings. Raises UserError."""
    kept = _beside(name, "tokenizer_config.json")
    kept.pop("auto_map", None)  # names classes in files that are not kept
    built = None
    if name == "bytes":
        built, end = bytes_tokenizer(tokenizer.eod), END_OF_DOCUMENT[0]
    elif name.endswith(".model"):
        built = of_sentencepiece(name)
        vocab = built["model"]["vocab"]
        names = [piece for piece, _ in vocab] if isinstance(vocab, list) else list(vocab)
        end, begin = names[tokenizer.eod], kept.get("bos_token")
        begin = begin.get("content") if isinstance(begin, Mapping) else begin
        if kept.get("add_bos_token") is True and isinstance(begin, str) and begin in names:
            built["post_processor"] = _adding(begin, names.index(begin))
        # not of a class that builds a tokenizer of its own, which puts other spaces before a text
        kept = {key: value for key, value in kept.items() if key not in OF_A_CLASS}
        kept |= {"tokenizer_class": "PreTrainedTokenizerFast"} if kept else {}
    else:
        from tokenizers import Tokenizer as FastTokenizer

        end = FastTokenizer.from_file(name).id_to_token(tokenizer.eod) or ""
    if built:
        (folder / "tokenizer.json").write_text(json.dumps(built), encoding="utf-8")
    if name != "bytes":
        shutil.copyfile(name, folder / f"tokenizer{Path(name).suffix}")
        if Path(name).stem == "tokenizer":
            keep_files(Path(name).parent, folder, KEPT)
    fresh = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
    write_json(folder / "tokenizer_config.json", kept or fresh)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", special_tokens(name, tokenizer.eod))


def of_sentencepiece(name: str) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model, which encodes every text to the same tokens, apart from the
    ties of a Unigram model. Raises UserError for what no tokenizer.json can express.

    Its fields are those of sentencepiece_model.proto (https://github.com/google/sentencepiece).
    """
    model = _fields(Path(name).read_bytes())
    described = [{number: values[-1] for number, values in _fields(piece).items()} for piece in model[1]]
    pieces = [
        (piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)) for piece in described
    ]
    trainer, normalizer = ({n: values[-1] for n, values in _fields(model[n][-1]).items()} for n in (2, 3))
    kind, has_prefix, removes_spaces = trainer.get(3, UNIGRAM), normalizer.get(3, 1), normalizer.get(4, 1)
    symbols = [piece for piece, _, role in pieces if role == USER_DEFINED and len(piece) > 1]
    is_other = kind not in (UNIGRAM, BPE) or trainer.get(24, 0) or not normalizer.get(5, 1)
    if is_other or (symbols and (has_prefix or removes_spaces)):
        what = "another algorithm"
        if symbols:
            what = f"symbols such as {symbols[0]!r} and spaces put before a text or removed"
        remedy = "name its tokenizer.json, if it has one"
        raise UserError(f"tokenizer {name!r} is a SentencePiece model with {what}; {remedy}")
    steps: list[dict[str, Any]] = []
    if normalizer.get(2):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normalizer[2]).decode()})
    if removes_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if has_prefix:
        steps.append({"type": "Prepend", "prepend": META_SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE})
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [
        (i, piece.replace(META_SPACE, " ") if piece in symbols else piece, piece not in symbols)
        for i, (piece, _, role) in enumerate(pieces)
        if role in (UNKNOWN, CONTROL) or piece in symbols
    ]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": special, **FLAGS} for i, text, special in added],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model_of(pieces, kind, bool(trainer.get(35, 0))),
    }


def _model_of(pieces: Sequence[tuple[str, float, int]], kind: int, byte_fallback: bool) -> dict[str, Any]:
    """Return the model of a tokenizer.json for SentencePiece's (piece, score, role)."""
    unknown = next(i for i, (_, _, role) in enumerate(pieces) if role == UNKNOWN)
    if kind == UNIGRAM:
        vocab = [[piece, score] for piece, score, _ in pieces]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}
    scores = {piece: score for piece, score, role in pieces if role == NORMAL}
    # SentencePiece merges the two pieces that make the one of the highest score, whichever two they are
    merges = [
        (-score, at, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return {
        "type": "BPE",
        "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
        "merges": [[one, other] for *_, one, other in sorted(merges)],
        "unk_token": pieces[unknown][0],
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
    }


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Return the values of a protobuf message by their fields' numbers: integers, or bytes of a fixed size or length.
    (https://protobuf.dev/programming-guides/encoding)"""
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        size = 0 if wire == 0 else {1: 8, 5: 4}.get(wire) or varint()
        fields.setdefault(number, []).append(message[at : at + size] if wire else varint())
        at += size
    return fields


def _adding(begin: str, token: int) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that puts a begin token before a text."""
    special, text = {"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": begin, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {begin: {"id": begin, "ids": [token], "tokens": [begin]}}
    pair = [special, text, *second]
    return {"type": "TemplateProcessing", "single": [special, text], "pair": pair, "special_tokens": tokens}


def _beside(name: str, file: str) -> dict[str, Any]:
    """Return a JSON file that was kept beside a tokenizer, {} if there is none. Raises UserError."""
    return read_beside(name, file) if Path(name).stem == "tokenizer" else {}


def bytes_tokenizer(eod: int) -> dict[str, Any]:
    """Return the tokenizer.json of our bytes: a byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": eod, "content": END_OF_DOCUMENT[0], "special": True, **FLAGS}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": dict(BYTE_OF_LETTER), "merges": []},
    }


# of byte-level tokenizers: bytes that cannot be printed have a letter above 255, as in GPT-2
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
BYTE_OF_LETTER = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_LETTER |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the bytes of each of its tokens."""

    name: str
    tokenizer: Tokenizer
    tokens: Sequence[bytes]


def load_vocabulary(name: str, eos: str = "", bos: str = "") -> Vocabulary:
    """Load a tokenizer, with these end and begin tokens, and its vocabulary. Raises UserError."""
    tokenizer = load_tokenizer(name, eos, bos)
    if isinstance(tokenizer, SeriesTokenizer):
        raise UserError(f"tokenizer {name!r} codes series; its tokens stand for no text, and it cannot be extended")
    if name == "bytes":
        return Vocabulary(name, tokenizer, [*(bytes([byte]) for byte in range(256)), END_OF_DOCUMENT[0].encode()])
    if not name.endswith(".model"):
        return Vocabulary(name, tokenizer, _json_tokens(name))
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=name)
    tokens = [_sentencepiece_bytes(pieces.id_to_piece(token)) for token in range(pieces.vocab_size())]
    return Vocabulary(name, tokenizer, tokens)


def _json_tokens(name: str) -> list[bytes]:
    """Return the tokens of a tokenizer.json: byte-level, or with SentencePiece's spaces and bytes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(name)
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": None}
    kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise UserError(
            f"tokenizer {name!r} has the decoder {decoder['type']!r}, which does not tell its tokens' bytes; name one "
            "that is byte-level, or like SentencePiece's"
        )
    piece_bytes = _byte_level_bytes if "ByteLevel" in kinds else _sentencepiece_bytes
    added = {token: piece.content.encode() for token, piece in tokenizer.get_added_tokens_decoder().items()}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    # an added token stands for its content as it is, not for encoded letters
    tokens = {token: added.get(token) or piece_bytes(piece) for piece, token in vocab.items()}
    if missing := set(range(max(tokens) + 1)) - set(tokens):
        raise UserError(f"tokenizer {name!r} has no token {min(missing)}; give it one")
    return [tokens[token] for token in sorted(tokens)]


def _byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a byte-level tokenizer's piece. Raises UserError."""
    if unknown := set(piece) - set(BYTE_OF_LETTER):
        raise UserError(f"the byte-level token {piece!r} has {min(unknown)!r}, which stands for no byte; rename it")
    return bytes(BYTE_OF_LETTER[letter] for letter in piece)


def _sentencepiece_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(META_SPACE, " ").encode()
