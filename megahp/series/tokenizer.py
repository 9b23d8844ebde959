"""A coding of series in the place of a run's tokenizer: it has a vocabulary, but encodes no text."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from megahp.errors import UserError
from megahp.series.coding import load_coding


class SeriesTokenizer:
    """The coding of a *.series file, with a tokenizer's ids: a window's begin token both begins a document and ends the
    one before (megahp/data/tokenizer.py: Tokenizer)."""

    adds_bos = True

    def __init__(self, path: str, eos: str = "", bos: str = "") -> None:
        self.path, self.coding = path, load_coding(Path(path))
        self.vocab_size = self.coding.vocab_size
        self.eod = self.coding.begin
        self.bos: int | None = self.eod
        if not {eos, bos} <= {"", str(self.eod)}:
            raise UserError(f"tokenizer {path!r} with --eos {eos!r} and --bos {bos!r}: both are {self.eod}; omit them")

    def encode(self, text: str) -> list[int]:
        self._refuse()

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        self._refuse()

    def encode_batch(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        self._refuse()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as words."""
        return " ".join(map(str, ids))

    def _refuse(self) -> NoReturn:
        raise UserError(f"tokenizer {self.path!r} codes series, and no text; forecast with `megahp forecast`")
