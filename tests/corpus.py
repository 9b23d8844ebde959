"""A small corpus for runs that a test really trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megahp.data.indexed import IndexedWriter


def write_corpus(prefix: Path, share: float = 0.1) -> None:
    """Forty documents of 50 to 300 bytes, low ones the likelier: there is something to learn. share: how likely the
    lowest is."""
    random = np.random.RandomState(0)
    with IndexedWriter(str(prefix), 257) as writer:
        for _ in range(40):
            writer.add_document(random.geometric(share, random.randint(50, 300)).clip(max=256).tolist())
