import hashlib

import numpy as np
import pytest

from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.data.split import Documents, split_documents
from megahp.errors import UserError


def ids(documents, fraction, part):
    return Documents(None, split_documents(documents, fraction), part).ids()


@pytest.mark.parametrize("documents", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.01, 0.3, 0.5, 0.999])
def test_split_is_a_partition_with_both_parts(documents, fraction):
    training, validation = (ids(documents, fraction, part) for part in ("training", "validation"))
    assert sorted([*training, *validation]) == list(range(documents))
    assert len(training) > 0
    assert (len(validation) > 0) == (fraction > 0 and documents >= 2)
    assert len(validation) <= max(1, round(fraction * documents))
    split = split_documents(documents, fraction)
    assert np.flatnonzero(split.is_held_out(np.arange(documents))).tolist() == validation.tolist()
    for part, expected in (("training", training), ("validation", validation)):
        assert len(Documents(None, split, part)) == len(expected)


def test_split_sees_every_tenth_of_the_corpus():
    validation = ids(10_000, 0.01, "validation")
    assert np.bincount(validation // 1000).tolist() == [10] * 10
    assert len(set(np.diff(validation))) > 20, "evenly spaced ids would follow any period of the corpus"


def test_splits_are_pinned():
    """Every run of this data relies on them: a document that moves from one part to the other was trained on."""
    assert ids(1000, 0.01, "validation").tolist() == [53, 148, 215, 312, 482, 510, 606, 705, 895, 971]
    for documents, fraction, hashes in (
        (80, 0.1, ("09f870c776ae4954", "7825d138937d2275")),
        (1_000_003, 0.013, ("205a61942c01de8a", "8f9b96ccbc2cd2bd")),
        (3, 0.5, ("d86e8112f3c4c444", "9d34149fbd1fe777")),
    ):
        for part, expected in zip(("training", "validation"), hashes, strict=True):
            assert hashlib.sha256(ids(documents, fraction, part)).hexdigest()[:16] == expected


def test_large_splits_are_drawn_in_blocks(monkeypatch):
    whole = split_documents(100_000, 0.2).within
    monkeypatch.setattr("megahp.data.split.BLOCK", 999)
    assert np.array_equal(split_documents(100_000, 0.2).within, whole)


def test_split_refuses_a_bad_fraction():
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="validation_fraction"):
            split_documents(10, fraction)


def test_tokens_of_both_parts(tmp_path):
    sizes = [3, 0, 4, 1, 5, 9, 2, 6, 5, 3, 5, 0]
    with IndexedWriter(str(tmp_path / "data"), 100) as writer:
        for size in sizes:
            writer.add_document([1] * size)
    dataset = IndexedDataset(str(tmp_path / "data"))
    parts = [Documents(dataset, split_documents(12, 0.3), part) for part in ("training", "validation")]
    for part in parts:
        assert part.tokens == sum(sizes[i] for i in part.ids())
        assert np.flatnonzero(part.contain(np.arange(12))).tolist() == part.ids().tolist()
    assert sum(part.tokens for part in parts) == sum(sizes)
