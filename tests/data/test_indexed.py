import errno
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megahp.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megahp.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8]]


def hand_made(prefix, sequences, document_index, code, format_, modes=b""):
    """Both files, assembled byte by byte from the format's table."""
    size = struct.calcsize("<" + format_)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:k]) for k in range(len(lengths))]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    idx += struct.pack("<QQ", len(lengths), len(document_index))
    idx += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    idx += struct.pack(f"<{len(document_index)}q", *document_index) + modes
    prefix.with_suffix(".idx").write_bytes(idx)
    ids = [i for sequence in sequences for i in sequence]
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(ids)}{format_}", *ids))
    return str(prefix)


def write(prefix, documents, vocab_size=100, **options):
    with IndexedWriter(str(prefix), vocab_size, **options) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def read(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.tokens(d).tolist() for d in range(dataset.documents)]


@pytest.mark.parametrize(("vocab_size", "code", "format_"), [(65_499, 8, "H"), (65_500, 4, "i")])
def test_written_bytes_are_those_of_the_table(tmp_path, vocab_size, code, format_):
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    hand_made(tmp_path / "hand", DOCUMENTS, range(5), code, format_)
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"hand.{suffix}").read_bytes()


def test_eight_documents_have_an_index_of_202_bytes(tmp_path):
    write(tmp_path / "toy", [[k] for k in range(8)])
    assert (tmp_path / "toy.idx").stat().st_size == 34 + 12 * 8 + 8 * 9 == 202


def test_token_dtype_changes_at_65500():
    assert (token_dtype(65_499), token_dtype(65_500)) == (np.uint16, np.int32)


@pytest.mark.parametrize(("code", "format_"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
@pytest.mark.parametrize("modes", [b"", b"\0\1\0\0"])
def test_reads_every_integer_dtype_and_several_sequences_per_document(tmp_path, code, format_, modes):
    sequences = [[1, 2], [3], [4, 5, 6], []]
    prefix = hand_made(tmp_path / "many", sequences, [0, 2, 2, 4], code, format_, modes)
    dataset = IndexedDataset(prefix)
    assert (dataset.dtype, dataset.documents) == (np.dtype("<" + format_), 3)
    assert dataset.total_tokens == 6 and dataset.document_starts(np.arange(4)).tolist() == [0, 3, 3, 6]
    tokens = dataset.document_tokens(np.arange(3))
    assert tokens.dtype == np.int64 and tokens.tolist() == [3, 0, 3]
    assert read(prefix) == [[1, 2, 3], [], [4, 5, 6]]
    assert dataset.tokens(0, 1, 3).tolist() == [2, 3] and dataset.tokens(2, 1, 99).tolist() == [5, 6]


def test_no_documents(tmp_path):
    assert read(write(tmp_path / "none", [])) == []


def test_index_longer_than_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr("megahp.data.indexed.BLOCK", 3)
    documents = [list(range(k)) for k in (5, 0, 2, 7, 1, 3, 4)]
    prefix = write(tmp_path / "blocks", documents)
    hand_made(tmp_path / "hand", documents, range(8), 8, "H")
    assert (tmp_path / "blocks.idx").read_bytes() == (tmp_path / "hand.idx").read_bytes()
    assert read(prefix) == documents


def patched(offset, content):
    return lambda data: data[:offset] + content + data[offset + len(content) :]


POINTERS, INDEX = 34 + 4 * 4, 34 + 12 * 4


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        ("idx", lambda data: data[:20], "fewer than a header"),
        ("idx", lambda data: data[:-1], "sequences need"),
        ("idx", lambda data: data + b"\0\0", "sequences need"),
        ("idx", lambda data: b"", "fewer than a header"),
        ("idx", patched(0, b"TNTIDX"), "instead of b'MMIDIDX"),
        ("idx", patched(9, b"\2"), "version is 2"),
        ("idx", patched(17, b"\7"), "dtype code 7"),
        ("idx", patched(18, b"\xff" * 8), "sequences need"),
        ("idx", patched(34, struct.pack("<i", -3)), "negative length"),
        ("idx", patched(POINTERS + 8, struct.pack("<q", 2)), "back to back"),
        ("idx", patched(INDEX, struct.pack("<q", 1)), "from 0 to 4"),
        ("idx", patched(INDEX + 8 * 4, struct.pack("<q", 3)), "from 0 to 4"),
        ("idx", patched(INDEX + 8, struct.pack("<q", 3)), "not ascending"),
        ("bin", lambda data: data[:-1], "the index describes 16"),
        ("bin", lambda data: data + b"\0\0", "the index describes 16"),
        ("bin", lambda data: b"", "the index describes 16"),
    ],
)
def test_corrupt_files_are_refused_by_name(tmp_path, suffix, damage, reason):
    prefix = write(tmp_path / "data", DOCUMENTS)
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=reason) as error:
        IndexedDataset(prefix)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_missing_file_is_named(tmp_path, suffix):
    prefix = write(tmp_path / "data", DOCUMENTS)
    (tmp_path / f"data.{suffix}").unlink()
    with pytest.raises(UserError, match=f"data.{suffix}' does not exist"):
        IndexedDataset(prefix)


def test_the_writer_knows_its_largest_id(tmp_path):
    with IndexedWriter(str(tmp_path / "data"), 100) as writer:
        assert writer.largest == -1
        for document in ([3, 9], [], [7]):
            writer.add_document(document)
    assert writer.largest == 9


@pytest.mark.parametrize("bad", [70, -1])
def test_documents_with_ids_outside_the_vocabulary_are_found(tmp_path, monkeypatch, bad):
    """F7: between empty documents too, and across the blocks of the scan."""
    sequences = [[], [1, 2], [], [3, bad, bad], [4], [], [bad], []]
    dataset = IndexedDataset(hand_made(tmp_path / "data", sequences, range(9), 4, "i"))
    for block in (1, 2, 3, 100):
        monkeypatch.setattr("megahp.data.indexed.BLOCK", block)
        assert dataset.outside(70, 10).tolist() == [3, 6] and dataset.outside(70, 1).tolist() == [3]
    assert dataset.outside(71, 10).tolist() == ([] if bad > 0 else [3, 6])


def test_a_file_that_changes_or_fails_while_it_is_read(tmp_path, monkeypatch):
    """A mapped file would end the process with a signal."""
    dataset = IndexedDataset(write(tmp_path / "data", DOCUMENTS))
    with open(tmp_path / "data.bin", "r+b") as file:
        file.truncate(10)
    assert dataset.tokens(2).tolist() == [4]
    with pytest.raises(UserError, match="fewer than the 16 bytes that it had") as error:
        dataset.tokens(3)
    assert not error.value.may_pass
    monkeypatch.setattr("os.pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(UserError, match="document 2 of data file.*Input/output error.*data.skip") as error:
        dataset.tokens(2)
    assert error.value.may_pass
    with pytest.raises(UserError, match="data.bin' cannot be read"):
        IndexedDataset(str(tmp_path / "data"))


def test_a_changed_file_is_told_from_another(tmp_path):
    random = np.random.RandomState(0)
    documents = [random.randint(0, 100, 500).tolist() for _ in range(40)]
    before = asdict(IndexedDataset(write(tmp_path / "data", documents)).identity)
    documents[7][3:40] = [1] * 37
    documents[30][0] = 2
    changed = IndexedDataset(write(tmp_path / "changed", documents)).identity
    assert changed.fingerprint != before["fingerprint"] and 32 <= changed.likeness(before) < 64
    for number, change in enumerate((lambda one: [i + 1 for i in one], lambda one: [*one, 5], lambda one: one[1:])):
        other = write(tmp_path / f"other{number}", [change(document) for document in documents], vocab_size=200)
        assert IndexedDataset(other).identity.likeness(before) == 0


def test_nothing_is_left_behind_on_an_exception(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(str(tmp_path / "data"), 100) as writer:
        writer.add_document([1])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_index_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("megahp.data.indexed._index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "data", DOCUMENTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [[100], [-1], [3, 70_000]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(UserError, match="outside a vocabulary of 100"):
        write(tmp_path / "data", [ids])


def test_existing_output_is_kept_unless_asked(tmp_path):
    prefix = write(tmp_path / "data", DOCUMENTS)
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "data", [[9]])
    assert read(prefix) == DOCUMENTS
    assert read(write(tmp_path / "data", [[9]], overwrite=True)) == [[9]]


def test_an_overwrite_broken_off_never_pairs_old_index_and_new_data(tmp_path, monkeypatch):
    prefix = write(tmp_path / "data", [[1, 2], [3]])
    rename = Path.replace

    def fail_on_index(self, target):
        if str(target).endswith(".idx"):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_index)
    with pytest.raises(UserError, match="no space left"):
        write(tmp_path / "data", [[4], [5, 6]], overwrite=True)
    with pytest.raises(UserError, match="data.idx"):
        IndexedDataset(prefix)
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_fingerprint_follows_content_not_path(tmp_path):
    one, same = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "same", DOCUMENTS)
    other = write(tmp_path / "other", [*DOCUMENTS, [1]])
    assert IndexedDataset(one).fingerprint == IndexedDataset(same).fingerprint != IndexedDataset(other).fingerprint


def test_what_is_kept_of_the_index_is_mapped(tmp_path):
    """Or each rank would hold 8 bytes and more for each document."""
    dataset = IndexedDataset(write(tmp_path / "data", [[1, 2], [], [3]] * 10))
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 2 and not any(array.flags.owndata for array in arrays)
