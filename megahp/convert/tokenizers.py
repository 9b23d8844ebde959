"""Read and write tokenizers in Hugging Face's formats, and list the bytes that each token stands for."""

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


def write_tokenizer(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Write tokenizer files with which transformers encodes a text to the same tokens."""
    file = folder / f"tokenizer{'.json' if name == 'bytes' else Path(name).suffix}"
    tokenizer_config: dict[str, Any]
    if name == "bytes":
        file.write_text(json.dumps(bytes_tokenizer(tokenizer.eod)), encoding="utf-8")
    else:
        shutil.copyfile(name, file)
    if file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=name)
        tokenizer_config = {
            "tokenizer_class": "LlamaTokenizer",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "legacy": False,  # or transformers would add spaces after special tokens
            # whether the model's own normalizer puts a space before a text
            "add_prefix_space": pieces.encode("a", out_type=str)[0].startswith(META_SPACE),
            "bos_token": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "eos_token": pieces.id_to_piece(tokenizer.eod),
        }
    else:
        from tokenizers import Tokenizer as FastTokenizer

        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": FastTokenizer.from_file(str(file)).id_to_token(tokenizer.eod),
        }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def bytes_tokenizer(eod: int) -> dict[str, Any]:
    """Return the tokenizer.json of our bytes: a byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": eod, "content": END_OF_DOCUMENT[0], "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": BYTE_OF_LETTER, "merges": []},
    }


def byte_letters() -> dict[int, str]:
    """Return the letter of each byte in byte-level tokenizers: bytes that cannot be printed have one above 255, as in
    GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in letters)}


BYTE_OF_LETTER = {letter: byte for byte, letter in byte_letters().items()}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the bytes of each of its tokens."""

    name: str
    tokenizer: Tokenizer
    tokens: Sequence[bytes]


def load_vocabulary(name: str, eos: str = "", bos: str = "") -> Vocabulary:
    """Load a tokenizer, with these end and begin tokens, and its vocabulary. Raises UserError."""
    tokenizer = load_tokenizer(name, eos, bos)
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
