"""Tokenizers whose texts gigatoken encodes, many times as fast, while what it gives is compared with their own ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any
from unicodedata import category

import numpy as np

from megahp.data.tokenizer import META_SPACE, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megahp.errors import UserError

# Characters that are encoded twice: the first of each process, and afterwards one in a thousand, at which the slow half
# of it takes a tenth of the time.
FIRST, SHARE = 100_000, 0.001
ASCII = bytes(range(128))


@cache
def is_unassigned() -> np.ndarray:
    """Return whether Unicode had not assigned each character below U+40000 yet when this Python was made, bool; the
    last stands for all above, which are private or none."""
    return np.fromiter((category(chr(code)) == "Cn" for code in range(0x40000)), bool)


class InexactError(UserError):
    """gigatoken gave a text other ids than the tokenizer."""


class FastTokenizer:
    """A tokenizer, whose `encode_batch` alone is gigatoken's.

    Raises UserError where gigatoken is missing, or does not read the tokenizer. `encode_batch` raises InexactError.
    """

    def __init__(self, own: Tokenizer) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise UserError("--engine gigatoken needs the package 'gigatoken'; pip install 'megahp[fast]'") from error
        if not isinstance(own, HuggingFaceTokenizer | SentencePieceTokenizer) or (plain := own.plain()) is None:
            raise UserError(f"gigatoken does not encode as {own.path!r} does; use --engine library")
        try:
            load = gigatoken.Tokenizer.from_json if isinstance(plain, str) else gigatoken.Tokenizer.from_sentencepiece
            self._fast: Any = load(plain)
        except (ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"gigatoken does not read {own.path!r} ({reason}); use --engine library") from error
        self._own: Tokenizer = own
        self._unknown, self._compared, self._encoded = own.unknown, 0, 0
        self.path, self.vocab_size, self.eod, self.bos = own.path, own.vocab_size, own.eod, own.bos
        self.adds_bos = own.adds_bos

    def encode(self, text: str) -> list[int]:
        return self._own.encode(text)

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        return self._own.encode_counting(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._own.decode(ids)

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        # one by one: its own batches are no faster, and import packages that take a second
        batch = [self._fast.encode(text).view(np.int32) for text in texts]
        for place, text in enumerate(texts):
            if not text.isascii() and self._is_apart(text):
                batch[place] = np.array(self._own.encode(text), np.int32)
            elif self._compared <= FIRST + SHARE * self._encoded:
                self._compare(text, batch[place])
            self._encoded += len(text)
        return batch, [int(np.count_nonzero(ids == self._unknown)) for ids in batch]

    def _is_apart(self, text: str) -> bool:
        """Return whether a text holds characters that need a case of their own."""
        if isinstance(self._own, SentencePieceTokenizer):  # which stores a space as this one
            return META_SPACE in text
        # What is a letter to one library's tables of Unicode, and not to the other's, is cut into words differently: of
        # all characters, 4,657 that Unicode 17 brought (gigatoken 0.10, tokenizers 0.23).
        others = text.encode().translate(None, ASCII).decode()  # the other characters' bytes are all from 128 on
        characters = np.frombuffer(others.encode("utf-32-le"), "<u4")
        return bool(is_unassigned()[np.minimum(characters, 0x3FFFF)].any())

    def _compare(self, text: str, ids: np.ndarray) -> None:
        self._compared += len(text)
        own = np.array(self._own.encode(text), np.int32)
        if np.array_equal(own, ids):
            return
        size = min(len(own), len(ids))
        place = int(np.argmax(np.append(own[:size] != ids[:size], True)))
        around = slice(max(0, place - 2), place + 3)
        raise InexactError(
            f"gigatoken encodes {self._own.decode(own[around].tolist())!r} to {ids[around].tolist()} where "
            f"{self.path!r} has {own[around].tolist()}; use --engine library"
        )
