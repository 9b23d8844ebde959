"""Tokenizers in others' formats, and what each of a tokenizer's tokens adds to a text."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahp.convert.sidecar import write_json
from megahp.data.tokenizer import END_OF_DOCUMENT, META_SPACE, Tokenizer, load_tokenizer
from megahp.errors import UserError


def tokenizer_in(folder: Path, named: str) -> str:
    """The tokenizer of a folder of theirs; named: the one we once wrote it from. Raises UserError."""
    if named == "bytes":
        return named
    found = [file for file in (folder / "tokenizer.json", folder / "tokenizer.model") if file.exists()]
    alike = [file for file in found if file.suffix == Path(named).suffix]
    if not found:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; name a tokenizer by --tokenizer")
    return str((alike or found)[0])


def write_tokenizer(folder: Path, named: str, tokenizer: Tokenizer) -> None:
    """Have transformers make the same tokens of a text."""
    file = folder / f"tokenizer{'.json' if named == 'bytes' else Path(named).suffix}"
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if named == "bytes":
        file.write_text(json.dumps(bytes_tokenizer(tokenizer.eod)), encoding="utf-8")
    else:
        shutil.copyfile(named, file)
    if file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=named)
        told |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False}
        told |= {"add_prefix_space": pieces.encode("a", out_type=str)[0].startswith(META_SPACE), "bos_token": None}
        told |= {"unk_token": pieces.id_to_piece(pieces.unk_id()), "eos_token": pieces.id_to_piece(tokenizer.eod)}
    else:
        from tokenizers import Tokenizer as Fast

        told["eos_token"] = Fast.from_file(str(file)).id_to_token(tokenizer.eod)
    write_json(folder / "tokenizer_config.json", told)


def bytes_tokenizer(eod: int) -> dict[str, Any]:
    """tokenizer.json of our bytes: a byte-level BPE without merges."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": eod, "content": END_OF_DOCUMENT[0], "special": True, **flags}],
        "pre_tokenizer": plain,
        "decoder": plain,
        "model": {"type": "BPE", "vocab": BYTES, "merges": []},
    }


def byte_letters() -> dict[int, str]:
    """The letter of each byte in byte-level tokenizers: one that cannot be shown has a letter above 255, as GPT-2 has
    it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in letters)}


BYTES = {letter: byte for byte, letter in byte_letters().items()}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what each of its tokens adds to a text."""

    named: str
    tokenizer: Tokenizer
    tokens: Sequence[bytes]


def vocabulary(named: str) -> Vocabulary:
    """A tokenizer's. Raises UserError."""
    tokenizer = load_tokenizer(named)
    if named == "bytes":
        return Vocabulary(named, tokenizer, [*(bytes([byte]) for byte in range(256)), END_OF_DOCUMENT[0].encode()])
    if not named.endswith(".model"):
        return Vocabulary(named, tokenizer, _of_json(named))
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=named)
    return Vocabulary(named, tokenizer, [_spelled(pieces.id_to_piece(each)) for each in range(pieces.vocab_size())])


def _of_json(named: str) -> list[bytes]:
    """Of Hugging Face's: byte-level, or with SentencePiece's spaces and bytes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(named)
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": None}
    kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise UserError(
            f"tokenizer {named!r} has the decoder {decoder['type']!r}, by which its tokens' bytes are not known; name "
            "one that is byte-level, or as SentencePiece's"
        )
    spelled = _of_letters if "ByteLevel" in kinds else _spelled
    added = {number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {number: added.get(number) or spelled(piece) for piece, number in vocab.items()}
    if lacking := set(range(max(tokens) + 1)) - set(tokens):
        raise UserError(f"tokenizer {named!r} has no token {min(lacking)}; give it one")
    return [tokens[number] for number in sorted(tokens)]


def _of_letters(piece: str) -> bytes:
    """The bytes of a byte-level tokenizer's name of a token. Raises UserError."""
    if strange := set(piece) - set(BYTES):
        raise UserError(f"the byte-level token {piece!r} has {min(strange)!r}, which stands for no byte; name it anew")
    return bytes(BYTES[letter] for letter in piece)


def _spelled(piece: str) -> bytes:
    """The bytes of SentencePiece's name of a token."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(META_SPACE, " ").encode()
