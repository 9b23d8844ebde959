from itertools import islice

import numpy as np
import pytest

from megahp.data import epochs
from megahp.data.epochs import KeyedEpoch
from megahp.data.split import Documents, split_documents


class Corpus:
    """What an order needs of a dataset: here documents of `sizes` tokens."""

    prefix, fingerprint = "corpus", "f"

    def __init__(self, sizes):
        self.documents = len(sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.total_tokens = int(self.starts[-1])

    def document_starts(self, documents):
        return self.starts[documents]

    def document_tokens(self, documents):
        return self.starts[documents + 1] - self.starts[documents]


def epoch(sizes, name="1 0", windows=1, fraction=0.0, part="training"):
    corpus = Corpus(np.asarray(sizes))
    return KeyedEpoch(Documents(corpus, split_documents(corpus.documents, fraction), part), windows, name)


def stream(keyed):
    """The documents of an epoch, in order."""
    return np.array([document for document, _, _ in keyed.read(0)])


@pytest.fixture(params=[1, 10])
def block(request, monkeypatch):
    """With 50,000 documents, blocks of one or of ten."""
    monkeypatch.setattr(epochs, "MOST_BLOCKS", 50_000 // request.param)
    return request.param


@pytest.mark.parametrize(("fraction", "part"), [(0.0, "training"), (0.03, "training"), (0.03, "validation")])
def test_every_document_comes_once(block, fraction, part):
    sizes = np.arange(50_000) % 5  # every fifth is empty
    keyed = epoch(sizes, fraction=fraction, part=part)
    ids = Documents(Corpus(sizes), split_documents(50_000, fraction), part).ids()
    assert np.array_equal(np.sort(stream(keyed)), ids[sizes[ids] > 0])


@pytest.mark.parametrize("start", [0, 1, 777, 49_000, 99_999])
def test_the_stream_is_read_from_any_token(block, start):
    keyed = epoch(np.arange(50_000) % 5)
    documents = [(document, tokens) for document, _, tokens in keyed.read(0)]
    tokens = [(document, token) for document, size in documents for token in range(size)]
    read = [(document, token) for document, first, size in keyed.read(start) for token in range(first, size)]
    assert len(tokens) == 100_000 and read == tokens[start:]


@pytest.mark.parametrize("kept", [1, 3, 1000])
def test_what_is_looked_up_together_is_the_same(block, kept, monkeypatch):
    """However many groups are kept."""
    alone, together = (epoch(np.arange(50_000) % 5) for _ in range(2))
    monkeypatch.setattr(epochs, "GROUPS_KEPT", kept)
    starts = np.array([99_000, 5, 2050, 2050, 60_000, 31_234])
    for _ in range(2):
        together.prepare(starts)
        assert len(together._groups) <= kept
        for start in starts.tolist():
            assert [*islice(together.read(start), 900)] == [*islice(alone.read(start), 900)]


def test_the_stream_is_pinned(block):
    expected = {1: [33153, 20366, 43812, 8105, 7569, 9034], 10: [9621, 606, 41263, 37295, 39955, 14732]}
    assert [document for document, _, _ in islice(epoch(np.ones(50_000, int)).read(25_000), 6)] == expected[block]


def test_documents_are_spread_evenly_over_the_stream(block):
    """Each tenth of the stream holds as much of each tenth of the corpus as chance would give it; of blocks, whose
    documents come together, as if there were fewer of them."""
    chi2 = []
    for name in range(4):
        tenths = np.zeros((10, 10))
        np.add.at(tenths, (np.arange(50_000) // 5000, stream(epoch(np.ones(50_000, int), str(name))) // 5000), 1)
        chi2.append(((tenths - 500) ** 2 / 500).sum() / block)
    assert abs(np.mean(chi2) - 81) < 5 * np.sqrt(2 * 81 / 4)


@pytest.mark.parametrize("lag", [1, 2, 5, 100])
def test_neighbours_in_the_stream_are_not_correlated(block, lag):
    """But for documents of one block, which are within a group of 1,024."""
    documents = stream(epoch(np.ones(50_000, int)))
    correlation = np.corrcoef(documents[:-lag], documents[lag:])[0, 1]
    of_one_block = (block - 1) / 1019
    assert abs(correlation - of_one_block) < 4.5 / np.sqrt(50_000)
    assert abs((documents[:-lag] // block == documents[lag:] // block).sum() - 50_000 * of_one_block) < 100


def test_epochs_have_nothing_in_common(block):
    one, other = (stream(epoch(np.ones(50_000, int), name)) for name in ("1 0", "1 1"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(50_000)
    neighbours = {(a, b) for a, b in zip(one, one[1:], strict=False)}
    assert sum((a, b) in neighbours for a, b in zip(other, other[1:], strict=False)) < 30


def test_windows_are_permuted():
    keyed = epoch(np.ones(10, int), windows=30_000)
    windows = np.array([keyed.window(place) for place in range(30_000)])
    assert np.array_equal(np.sort(windows), np.arange(30_000))
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 4.5 / np.sqrt(30_000)
    assert abs(np.corrcoef(windows, np.arange(30_000))[0, 1]) < 4.5 / np.sqrt(30_000)


def test_memory_is_a_hundredth_of_the_documents(block):
    """Beside the groups looked up last."""
    keyed = epoch(np.ones(50_000, int))
    assert sum(value.nbytes for value in vars(keyed).values() if isinstance(value, np.ndarray)) <= 8 * (50_000 // 1000)
