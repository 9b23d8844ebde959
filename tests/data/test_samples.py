import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megahp.data import epochs
from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.data.samples import SampleOrder
from megahp.data.split import Documents, split_documents
from megahp.errors import UserError

LENGTH = 7
# Some documents fill several windows, some are shorter than one, some are empty.
SIZES = [3, 40, 0, 1, 9, 0, 0, 25, 2, 2, 2, 14, 7, 8, 1, 30]


@pytest.fixture
def dataset(tmp_path):
    """Every token of the corpus has its own id, so a token tells where it comes from."""
    with IndexedWriter(str(tmp_path / "data"), 1000) as writer:
        for start, size in zip(np.cumsum([0, *SIZES]), SIZES, strict=False):
            writer.add_document(range(start, start + size))
    return IndexedDataset(str(tmp_path / "data"))


@pytest.fixture(params=["keyed", "keyed in groups", "drawn"])
def kind(request, monkeypatch):
    """These tests hold for both orders, and for the keyed one of a corpus of many groups of blocks too."""
    if request.param == "keyed in groups":
        for name, value in (("MOST_BLOCKS", 6), ("LARGEST_BLOCK", 2), ("GROUP", 6), ("BLOCKS_AT_A_TIME", 5)):
            monkeypatch.setattr(epochs, name, value)
    return request.param.split()[0]


def order(dataset, cache, kind, seed=1, fraction=0.0, length=LENGTH, **more):
    documents = Documents(dataset, split_documents(dataset.documents, fraction))
    return SampleOrder(documents, length, seed, Path(cache), order=kind, **more)


def document_of(token):
    return int(np.searchsorted(np.cumsum(SIZES), token, side="right"))


def epoch(samples, number):
    start = number * samples.windows
    return [samples.sample(j, LENGTH) for j in range(start, start + samples.windows)]


@pytest.mark.parametrize("number", [0, 1, 5])
def test_windows_of_an_epoch_join_to_whole_documents(dataset, tmp_path, number, kind):
    windows = [tokens.tolist() for tokens, *_ in epoch(order(dataset, tmp_path / "c", kind), number)]
    assert len(windows) == (sum(SIZES) - 1) // LENGTH
    following = {window[0]: window for window in windows}
    heads = set(following) - {window[-1] for window in windows}
    assert len(following) == len(windows) and len(heads) == 1
    stream = [heads.pop()]
    while stream[-1] in following:
        stream += following[stream[-1]][1:]
    assert len(stream) == len(windows) * LENGTH + 1
    # The stream is whole documents in some order; only the last may be cut.
    parts = [list(range(start, start + size)) for start, size in zip(np.cumsum([0, *SIZES]), SIZES, strict=False)]
    while stream:
        part = parts[document_of(stream[0])]
        assert stream[: len(part)] == part[: len(stream)]
        stream = stream[len(part) :]


def test_every_input_token_comes_once_an_epoch_but_for_the_remainder(dataset, tmp_path, kind):
    samples = order(dataset, tmp_path / "c", kind)
    for number in range(4):
        seen = Counter(int(i) for tokens, *_ in epoch(samples, number) for i in tokens[:-1])
        assert set(seen.values()) == {1} and len(seen) == samples.windows * LENGTH


def test_document_numbers_follow_the_tokens(dataset, tmp_path, kind):
    samples = order(dataset, tmp_path / "c", kind)
    for j in range(3 * samples.windows):
        tokens, documents, _ = samples.sample(j, LENGTH)
        assert (tokens.dtype, documents.dtype) == (np.int64, np.int32)
        assert (tokens.shape, documents.shape) == ((LENGTH + 1,), (LENGTH,))
        origins = [document_of(token) for token in tokens[:-1]]
        changes = np.cumsum([0] + [a != b for a, b in zip(origins, origins[1:], strict=False)])
        assert documents.tolist() == changes.tolist()


def test_a_sample_depends_only_on_seed_and_number(dataset, tmp_path, kind):
    first, second = order(dataset, tmp_path / "one", kind), order(dataset, tmp_path / "two", kind)
    ids = [400, 3, 17, 0, 250, 3, 60]
    forward = {j: first.sample(j, LENGTH)[0].tolist() for j in range(401)}
    assert [second.sample(j, LENGTH)[0].tolist() for j in ids] == [forward[j] for j in ids]


def test_epochs_and_seeds_differ(dataset, tmp_path, kind):
    orders = [order(dataset, tmp_path / "c", kind, seed) for seed in (1, 2)]
    epochs = [str([t.tolist() for t, *_ in epoch(samples, number)]) for samples in orders for number in range(3)]
    assert len(set(epochs)) == 6


@pytest.mark.parametrize(
    ("pinned", "fraction", "first", "key"),
    [
        ("drawn", 0, [124, 75, 79, 34, 65], "2d0b0a8436bddec9d594eaa81ace3603"),
        ("drawn", 0.2, [2, 44, 132, 116, 24], "5756e1694e3be835b9a5e27e9b04827b"),
        ("keyed", 0, [15, 80, 91, 67, 127], "9db32f6ad2cbaa7377e43b48af45c05e"),
        ("keyed", 0.2, [107, 42, 0, 126, 11], "5b9cc62a8671e4b4e70f48a234ac06d5"),
    ],
)
def test_orders_are_pinned(dataset, tmp_path, pinned, fraction, first, key):
    """A resumed run relies on these numbers: a change of the order is a change of every run's data."""
    samples = order(dataset, tmp_path / "c", pinned, seed=1234, fraction=fraction)
    assert [int(samples.sample(j, LENGTH)[0][0]) for j in (0, 1, 2, 20, 21)] == first
    assert samples.key == key


def test_too_few_tokens_for_one_sample(dataset, tmp_path, kind):
    exact = order(dataset, tmp_path / "c", kind, length=sum(SIZES) - 1)
    assert exact.windows == 1 and sorted(exact.sample(5, sum(SIZES) - 1)[0]) == list(range(sum(SIZES)))
    with pytest.raises(UserError, match=f"fewer than the {sum(SIZES) + 1} of one sample"):
        order(dataset, tmp_path / "c", kind, length=sum(SIZES))


@pytest.fixture(params=["keyed", "drawn"])
def long(tmp_path, request):
    """A corpus of 200 windows of 12 tokens and some more, in more than one group of windows."""
    with IndexedWriter(str(tmp_path / "long"), 5000) as writer:
        for start in range(0, 2410, 10):
            writer.add_document(range(start, start + 10))
    return order(IndexedDataset(str(tmp_path / "long")), tmp_path / "c", request.param, length=12)


@pytest.mark.parametrize("length", [1, 3, 4, 12])
def test_parts_of_windows_hold_every_token_once(long, length):
    samples = long.windows * 12 // length
    for number in range(2):
        rows = [long.sample(number * samples + j, length)[0] for j in range(samples)]
        inputs = np.concatenate([row[:-1] for row in rows])
        assert len(np.unique(inputs)) == len(inputs) == 2400
        followed = dict(zip(inputs.tolist(), np.concatenate([row[1:] for row in rows]).tolist(), strict=True))
        whole = [long.sample(number * long.windows + j, 12)[0].tolist() for j in range(long.windows)]
        assert all(followed[a] == b for row in whole for a, b in zip(row, row[1:], strict=False))


def test_parts_of_a_window_are_far_apart(long):
    """Neighbours in the text would make the examples of a batch alike."""
    at = {int(long.sample(j, 3)[0][0]): j for j in range(800)}
    windows = [long.sample(j, 12)[0] for j in range(200)]
    places = np.array([[at[int(window[part])] for part in (0, 3, 6, 9)] for window in windows])
    assert set(np.diff(places, axis=1)[:192].ravel()) == {12} == {long.group}
    assert set(np.diff(places, axis=1)[192:].ravel()) == {200 - 192}


@pytest.mark.parametrize("taken", [0, 1, 5, 255, 256, 257, 500, 769, 800, 801, 1700])
@pytest.mark.parametrize("lengths", [(3, 12), (12, 3), (3, 6, 12), (12, 4, 12), (6, 6), (3, 1)])
def test_another_length_repeats_nothing_and_skips_less_than_a_group(long, taken, lengths):
    seen, tokens, j = [], taken * 3, 0
    for before, now in zip(lengths, (*lengths[1:], None), strict=True):
        count = tokens // before
        seen += [int(token) for number in range(j, j + count) for token in long.sample(number, before)[0][:-1]]
        j = long.convert_position(j + count, before, now) if now else j + count
    used = j * lengths[-1]  # of the order, counted in tokens, with what was passed over
    assert 0 <= used - len(seen) <= (len(lengths) - 1) * long.group * 12
    assert lengths != (6, 6) or used == len(seen)
    times = np.bincount(seen, minlength=2410)
    epochs = -(-used // 2400)
    assert times.max() <= epochs  # never twice in an epoch


def test_cache_is_used_and_a_damaged_one_is_rebuilt(dataset, tmp_path):
    cache = tmp_path / "c"
    expected = [t.tolist() for t, *_ in epoch(order(dataset, cache, "drawn"), 0)]
    (path,) = cache.iterdir()
    good = path.read_bytes()
    order(dataset, cache, "drawn").sample(0, LENGTH)
    assert path.read_bytes() == good and len(list(cache.iterdir())) == 1
    flipped = good[:-30] + bytes([good[-30] ^ 1]) + good[-29:]
    for bad in (b"", good[:50], good[:-8], good + b"\0", flipped, b"\0" * len(good)):
        path.write_bytes(bad)
        assert [t.tolist() for t, *_ in epoch(order(dataset, cache, "drawn"), 0)] == expected
        assert bad == good + b"\0" or path.read_bytes() == good
    path.unlink()
    os.mkfifo(path)  # which nobody writes to
    assert [t.tolist() for t, *_ in epoch(order(dataset, cache, "drawn"), 0)] == expected
    assert path.read_bytes() == good


def test_cache_names_differ_with_all_they_depend_on(dataset, tmp_path):
    cache = tmp_path / "c"
    for samples in (
        order(dataset, cache, "drawn"),
        order(dataset, cache, "drawn", seed=2),
        order(dataset, cache, "drawn", length=8),
        order(dataset, cache, "drawn", fraction=0.1),
    ):
        samples.sample(0, LENGTH)
        samples.sample(samples.windows, LENGTH)
    assert len(list(cache.iterdir())) == 8


def read_all(prefix, cache, barrier, results):
    samples = order(IndexedDataset(prefix), cache, "drawn")
    barrier.wait()
    results.put([samples.sample(j, LENGTH)[0].tolist() for j in range(20 * samples.windows)])


def test_processes_race_for_the_same_cache(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (dataset.prefix, tmp_path / "c", barrier, results)
    ranks = [context.Process(target=read_all, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    read = [results.get(timeout=20) for _ in ranks]
    for rank in ranks:
        rank.join()
    samples = order(dataset, tmp_path / "alone", "drawn")
    alone = [samples.sample(j, LENGTH)[0].tolist() for j in range(20 * samples.windows)]
    assert read == [alone] * 4
    assert len(list((tmp_path / "c").iterdir())) == 20


def test_what_is_skipped_moves_nothing_else(dataset, tmp_path, kind):
    """Each sample that holds a skipped document is the next one that does not; all others stay."""
    plain = order(dataset, tmp_path / "c", kind)
    skipped = order(dataset, tmp_path / "c", kind, skip=[range(7, 8), range(15, 16)])
    origins = [{document_of(token) for token in plain.sample(j, LENGTH)[0]} for j in range(60)]
    good = [j for j, documents in enumerate(origins) if not documents & {7, 15}]
    assert 0 < len(good) < 50
    for j in range(40):
        expected = next(each for each in good if each >= j)
        assert np.array_equal(skipped.sample(j, LENGTH)[0], plain.sample(expected, LENGTH)[0])
        assert skipped.sample(j, LENGTH).wrong == []
    everything = order(dataset, tmp_path / "c", kind, skip=[range(99)])
    with pytest.raises(UserError, match="every sample is left out"):
        everything.sample(3, LENGTH)


def test_an_id_outside_the_vocabulary_is_passed_over_and_named(dataset, tmp_path, kind):
    """F7. The last document holds the 30 largest ids."""
    plain = order(dataset, tmp_path / "c", kind)
    stricter = order(dataset, tmp_path / "c", kind, vocab_size=sum(SIZES) - 30)
    with_wrong = [j for j in range(20) if plain.sample(j, LENGTH)[0].max() >= sum(SIZES) - 30]
    assert with_wrong
    for j in range(20):
        found = stricter.sample(j, LENGTH)
        assert found.tokens.max() < sum(SIZES) - 30 and bool(found.wrong) == (j in with_wrong)
        passed = 0
        while np.any(plain.sample(j + passed, LENGTH)[0] != found.tokens):
            passed += 1
        assert len(found.wrong) == passed
        if passed:
            token = next(i for i in plain.sample(j, LENGTH)[0] if i >= sum(SIZES) - 30)
            where = f"token {token} in document {document_of(token)}, at its place {token - (sum(SIZES) - 30)}"
            assert where in found.wrong[0] and f"ends at {sum(SIZES) - 30}" in found.wrong[0]
