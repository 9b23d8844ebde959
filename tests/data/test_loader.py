import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scaling.batch.schedulers import config

from megahp.config import Phase
from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.data.loader import Loader, TrainingData, rank_samples
from megahp.errors import UserError
from megahp.scaling.batch import BatchScheduler, Progress

LENGTH = 8
CPU = torch.device("cpu")


@pytest.fixture
def sources(tmp_path):
    """Two sources of 40 documents of 30 tokens; no token id occurs twice."""
    for k, name in enumerate(("one", "two")):
        with IndexedWriter(str(tmp_path / name), 3000) as writer:
            for document in range(40):
                start = 1200 * k + 30 * document
                writer.add_document(range(start, start + 30))
    return {str(tmp_path / "one"): 3.0, str(tmp_path / "two"): 1.0}


def training_data(sources, tmp_path, seed=1, fraction=0.1, length=LENGTH, more=()):
    phases = [Phase(0.0, length, tuple(sources.values())), *more]
    return TrainingData([IndexedDataset(prefix) for prefix in sources], phases, seed, fraction, tmp_path / "cache")


def test_no_sample_is_repeated_or_skipped_when_batch_and_layout_change() -> None:
    progress, seen = Progress(), []
    for batch, micro, dp, steps in [(8, 2, 1, 3), (16, 4, 2, 2), (24, 1, 4, 2), (12, 3, 2, 3)]:
        for _ in range(steps):
            plan = BatchScheduler(config(batch, micro), dp).step(progress)
            assert plan is not None
            numbers = plan.first_sample, plan.global_batch, plan.micro_batch
            ids = [rank_samples(*numbers, rank, dp) for rank in range(dp)]
            assert {len(part) for parts in ids for part in parts} == {micro}
            assert {len(parts) for parts in ids} == {plan.num_microbatches(dp)}
            seen.append(np.sort(np.concatenate([part for parts in ids for part in parts])))
            progress = progress.after(plan)
    assert np.array_equal(np.concatenate(seen), np.arange(progress.samples))
    assert progress.tokens == progress.samples * 16


def test_microbatches_that_follow_the_batch_have_its_samples_in_nearly_equal_parts() -> None:
    """Where they are equal, they are those of a fixed size."""
    for share, largest, sizes in [(4, 3, [2, 2]), (8, 3, [3, 3, 2]), (5, 9, [5]), (7, 1, [1] * 7), (12, 4, [4, 4, 4])]:
        words = {"batch__micro_batch": "auto", "batch__largest_micro_batch": largest}
        plan = BatchScheduler(config(2 * share, **words), 2).step(Progress(0, 100, 0))
        assert plan is not None
        ids = [rank_samples(plan.first_sample, plan.global_batch, plan.micro_batch, rank, 2) for rank in range(2)]
        assert [[len(part) for part in parts] for parts in ids] == [sizes, sizes]
        assert np.array_equal(np.sort(np.concatenate(sum(ids, []))), np.arange(100, 100 + 2 * share))
    assert [part.tolist() for part in ids[1]] == [[104, 105, 106, 107], [112, 113, 114, 115], [120, 121, 122, 123]]


def test_batches_do_not_depend_on_how_they_are_cut(sources, tmp_path):
    data = training_data(sources, tmp_path)
    whole = data.batch(np.arange(64), documents=True)
    assert (whole.tokens.dtype, whole.tokens.shape) == (torch.int64, (64, LENGTH + 1))
    assert (whole.documents.dtype, whole.documents.shape) == (torch.int32, (64, LENGTH))
    for rows in (np.arange(5, 9), np.array([63, 0, 17])):
        part = training_data(sources, tmp_path).batch(rows, documents=True)
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(part.documents, whole.documents[rows])
        assert part.ids.tolist() == rows.tolist()
    assert data.batch(np.arange(4), documents=False).documents is None


def test_sources_are_dealt_by_weight(sources, tmp_path):
    tokens = training_data(sources, tmp_path).batch(np.arange(400), documents=False).tokens
    assert ((tokens[:, 0] < 1200).sum() - 300).abs() <= 1


def test_one_epoch_of_a_source_repeats_nothing(sources, tmp_path):
    data = training_data(dict([*sources.items()][:1]), tmp_path)
    inputs = data.batch(np.arange((data.tokens - 1) // LENGTH), documents=False).tokens[:, :-1]
    assert data.tokens == 36 * 30 and inputs.unique().numel() == inputs.numel()


def test_validation_is_held_out_blended_and_the_same_for_all(sources, tmp_path):
    data = training_data(sources, tmp_path)
    everything = data.validation(18).batch.tokens
    assert len(everything) == 18 == len({row[0] for row in everything.tolist()})
    trained = data.batch(np.arange(3000), documents=False).tokens.unique()
    assert not np.isin(everything.numpy(), trained.numpy()).any()
    few = data.validation(8).batch
    assert ((few.tokens[:, 0] < 1200).sum().item(), len(few.tokens)) == (6, 8)
    assert torch.equal(few.tokens, data.validation(12).batch.tokens[:8])
    assert torch.equal(few.tokens, training_data(sources, tmp_path, seed=9).validation(8).batch.tokens)
    assert few.documents.shape == (8, LENGTH)


def test_validation_of_nothing_is_refused(sources, tmp_path):
    with pytest.raises(UserError, match="validation_fraction is 0"):
        training_data(sources, tmp_path, fraction=0.0).validation(1)
    with pytest.raises(
        UserError, match="holds out 30 tokens of a source at most, and one sequence is 201: raise it to about 0.074"
    ):
        training_data(sources, tmp_path, fraction=0.01, length=200)


def test_a_single_document_cannot_be_split(tmp_path):
    with IndexedWriter(str(tmp_path / "book"), 100) as writer:
        writer.add_document([1] * 1000)
    with pytest.raises(UserError, match="split the data into more documents"):
        training_data({str(tmp_path / "book"): 1.0}, tmp_path)


def test_fingerprint_names_everything_but_the_path(sources, tmp_path):
    base = training_data(sources, tmp_path).fingerprint
    copies = {}
    for prefix, weight in sources.items():
        for suffix in ("bin", "idx"):
            content = Path(f"{prefix}.{suffix}").read_bytes()
            (tmp_path / f"copy-{weight}.{suffix}").write_bytes(content)
        copies[str(tmp_path / f"copy-{weight}")] = 2 * weight
    assert training_data(copies, tmp_path).fingerprint == base
    others = [
        training_data(sources, tmp_path, seed=2),
        training_data(sources, tmp_path, length=9),
        training_data(sources, tmp_path, fraction=0.2),
        training_data(dict([*sources.items()][::-1]), tmp_path),
        training_data(dict(zip(sources, (3.0, 2.0), strict=True)), tmp_path),
        training_data(sources, tmp_path, more=[Phase(80.0, LENGTH, (1.0, 1.0))]),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 7


def test_bad_sources_are_refused(sources, tmp_path):
    for bad, reason in (({}, "no source"), ({"/none": 1.0}, "/none.idx"), ({min(sources): -1.0}, "weight -1.0")):
        with pytest.raises(UserError, match=reason):
            training_data(bad, tmp_path)


def test_training_chunks_are_the_first_samples_up_to_an_epoch(sources, tmp_path):
    data = training_data(sources, tmp_path)
    (chunk,) = data.training_chunks(limit=100)
    assert np.array_equal(chunk, data.batch(np.arange(12), documents=False).tokens)
    assert sum(len(chunk) for chunk in data.training_chunks(limit=10**9)) == data.tokens // LENGTH


FLIP = Phase(200.0, LENGTH, (1.0, 3.0))
LONG = Phase(400.0, 4 * LENGTH, (0.0, 1.0))


def tokens_of(data, first, count):
    return data.batch(np.arange(first, first + count), documents=False).tokens[:, :-1]


def test_stages_change_mixture_and_length_and_repeat_nothing(sources, tmp_path):
    data = training_data(sources, tmp_path, more=[FLIP, LONG])
    seen = [tokens_of(data, 0, 25)]
    data.enter_phase(1, 25)
    seen.append(tokens_of(data, 25, 40))
    data.enter_phase(2, 65)
    seen.append(tokens_of(data, 65, 5))
    assert [part.shape for part in seen] == [(25, LENGTH), (40, LENGTH), (5, 4 * LENGTH)]
    ones = [(part[:, 0] < 1200).sum().item() for part in seen]
    assert ones == [19, 10, 0]
    everything = torch.cat([part.reshape(-1) for part in seen])
    assert everything.unique().numel() == everything.numel()


def test_another_mixture_skips_nothing(sources, tmp_path):
    """Each source's samples are, in their order, those it would have given alone."""
    data = training_data(sources, tmp_path, more=[FLIP])
    first = tokens_of(data, 0, 25)
    data.enter_phase(1, 25)
    rows = torch.cat([first, tokens_of(data, 25, 40)])
    for prefix, of in ((0, rows[:, 0] < 1200), (1, rows[:, 0] >= 1200)):
        alone = training_data({list(sources)[prefix]: 1.0}, tmp_path)
        assert torch.equal(rows[of], tokens_of(alone, 0, int(of.sum())))


@pytest.mark.parametrize("at", [0, 10, 25, 30, 64, 65, 67])
def test_a_restored_order_continues_as_if_uninterrupted(sources, tmp_path, at):
    def deal(data, first, last):
        rows = []
        for i in range(first, last):
            phase = 0 if i < 25 else 1 if i < 65 else 2
            if data.phase != phase:
                data.enter_phase(phase, i)
            rows.append(tokens_of(data, i, 1)[0].tolist())
        return rows

    whole, data = (training_data(sources, tmp_path, more=[FLIP, LONG]) for _ in range(2))
    deal(data, 0, at)
    state = json.loads(json.dumps(data.state(at)))
    again = training_data(sources, tmp_path, more=[FLIP, LONG])
    again.load_state(state)
    assert deal(again, at, 69) == deal(whole, 0, 69)[at:]


def test_a_branch_continues_every_source_at_its_position(sources, tmp_path):
    one, two = sources
    data = training_data({one: 1.0}, tmp_path)
    seen = [tokens_of(data, 0, 40)]
    both = training_data(sources, tmp_path, more=[Phase(1e9, LENGTH, (1.0, 0.0))])
    both.branch(data.state(40), 40 * LENGTH, 40)
    assert both.phase == 0
    seen.append(tokens_of(both, 40, 40))
    other = training_data({two: 1.0}, tmp_path)  # forgets nothing of the first
    other.branch(both.state(80), 80 * LENGTH, 80)
    seen.append(tokens_of(other, 80, 30))
    back = training_data({one: 1.0}, tmp_path)
    back.branch(other.state(110), 110 * LENGTH, 110)
    seen.append(tokens_of(back, 110, 40))
    everything = torch.cat([part.reshape(-1) for part in seen])
    assert everything.unique().numel() == everything.numel() == 150 * LENGTH
    alone = tokens_of(training_data({one: 1.0}, tmp_path), 0, 110)
    assert torch.equal(seen[-1], alone[70:])


def test_a_branch_enters_the_stage_its_tokens_are_in(sources, tmp_path):
    data = training_data(sources, tmp_path)
    branch = training_data(sources, tmp_path, more=[FLIP])
    branch.branch(data.state(30), 30 * LENGTH, 30)
    assert branch.phase == 1


def test_validation_is_the_same_in_every_stage(sources, tmp_path):
    data = training_data(sources, tmp_path, more=[FLIP])
    before = data.validation(8).batch.tokens
    data.enter_phase(1, 25)
    assert torch.equal(data.validation(8).batch.tokens, before)
    assert (before[:, 0] < 1200).sum() == 2, "dealt by what the run ends with"


@pytest.mark.parametrize("count", [5, 20, 64])
def test_validation_quotas_are_the_weights_or_refused(tmp_path, count):
    """F10: 0.2 of one, 0.8 of a small one, whose windows do not suffice."""
    for name, documents in (("large", 400), ("small", 60)):
        with IndexedWriter(str(tmp_path / name), 3000) as writer:
            for document in range(documents):
                writer.add_document([document + 1000 * (name == "small")] * (LENGTH + 1))
    data = training_data({str(tmp_path / "large"): 0.2, str(tmp_path / "small"): 0.8}, tmp_path)
    small = (6 * (LENGTH + 1) - 1) // LENGTH  # of the six documents held out
    if 0.8 * count > small:
        asked = f"validation_samples = {count} takes {round(0.8 * count)} sequences of .*small' by its weight"
        with pytest.raises(UserError, match=f"{asked}.*holds out only {small}; set it to ([0-9]+)") as error:
            data.validation(count)
        fits = int(re.findall(r"set it to (\d+)", str(error.value))[0])
        assert round(0.8 * fits) == small and round(0.8 * (fits + 1)) > small
        count = fits
    found = data.validation(count)
    of_small = found.batch.tokens[:, 0].numpy() >= 1000
    assert len(of_small) == count and of_small.sum() == round(0.8 * count)
    assert np.array_equal(found.groups[str(tmp_path / "small")], of_small)
    assert np.array_equal(found.groups[str(tmp_path / "large")], ~of_small)
    assert found.groups[""].all() and len(found.groups) == 3


def test_named_sets_are_validated_on_beside_the_mixture(sources, tmp_path):
    """A set has the count that was asked, in full, whatever is held out; its loss is not part of the mixture's."""
    for name, first in (("web", 2400), ("code", 2700)):
        with IndexedWriter(str(tmp_path / name), 3000) as writer:
            for document in range(10):
                writer.add_document(range(first + 30 * document, first + 30 * document + 30))
    sets = {name: IndexedDataset(str(tmp_path / name)) for name in ("web", "code")}
    datasets, phases = [IndexedDataset(prefix) for prefix in sources], [Phase(0.0, LENGTH, (3.0, 1.0))]
    data = TrainingData(datasets, phases, 1, 0.1, tmp_path / "cache", sets=sets)
    found = data.validation(12)
    assert list(found.groups) == ["", *sources, "web", "code"]
    assert torch.equal(
        found.batch.tokens[found.groups[""]], training_data(sources, tmp_path).validation(12).batch.tokens
    )
    for name, first, end in (("web", 2400, 2700), ("code", 2700, 3000)):
        rows = found.batch.tokens[found.groups[name]]
        assert len(rows) == 12 == len(rows.unique(dim=0)) and rows.min() >= first and rows.max() < end
    with pytest.raises(UserError, match=r"web.*\(data.validation: web\) has 37 sequences.*at most 37"):
        TrainingData(datasets, phases, 1, 0.5, tmp_path / "cache", sets=sets).validation(38)
    alone = TrainingData(datasets, phases, 1, 0.0, tmp_path / "cache", sets=sets).validation(12)
    assert alone.groups[""].all() and len(alone.batch.tokens) == 24
    with pytest.raises(UserError, match="data.validation: again.*is trained on"):
        TrainingData(datasets, phases, 1, 0.1, tmp_path / "cache", sets={"again": IndexedDataset(min(sources))})


def test_wrong_and_skipped_samples_are_replaced_alike_however_batches_are_cut(sources, tmp_path):
    """F7: in the slot of each stands the next sample of its source; every other sample is as it was."""
    one, two = (IndexedDataset(prefix) for prefix in sources)
    phases, plain = [Phase(0.0, LENGTH, (3.0, 1.0))], training_data(sources, tmp_path).batch(np.arange(120), True)
    skip = {one.prefix: [range(5, 6)], "": [range(3, 4), range(4, 5)]}
    data = TrainingData([one, two], phases, 1, 0.1, tmp_path / "cache", 2250, skip)
    whole = data.batch(np.arange(120), documents=True)
    source, j = data._blends[0].locate(np.arange(120))
    changed = (whole.tokens != plain.tokens).any(1).numpy()
    for i in range(100):
        holds = set((plain.tokens[i] // 30).tolist())
        is_left_out = i in (3, 4) or 5 in holds or plain.tokens[i].max() >= 2250
        assert changed[i] == is_left_out
        if is_left_out:
            later = [k for k in range(i + 1, 120) if source[k] == source[i] and not changed[k]]
            assert torch.equal(whole.tokens[i], plain.tokens[later[0]])
    assert {5, *changed.nonzero()[0]} > {3, 4}
    named = [int(re.findall(r"sample (\d+): ", wrong)[0]) for wrong in whole.wrong]
    assert named == [i for i in range(120) if plain.tokens[i].max() >= 2250 and i not in (3, 4)] and named
    for rows in (np.arange(50, 90), np.array([7, 3, 64])):
        part = data.batch(rows, documents=True)
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(part.documents, whole.documents[rows])
    windows = data.validation(8).batch.tokens
    assert windows.max() < 2250 and 5 not in set((windows // 30).unique().tolist())


def test_epochs_are_those_of_the_samples_read(sources, tmp_path):
    data = training_data(sources, tmp_path, more=[FLIP, LONG])
    assert set(data.epochs_read(0).values()) == {0}
    data.enter_phase(1, 25)
    assert list(data.epochs_read(65).values()) == [29 * LENGTH / 1080, 36 * LENGTH / 1080]


def test_a_changed_source_is_recognized(sources, tmp_path):
    before = training_data(sources, tmp_path)
    identities, fingerprint, state = before.identities(), before.fingerprint, before.state(40)
    path = tmp_path / "two.bin"
    content = bytearray(path.read_bytes())
    content[100:102] = b"\0\0"
    path.write_bytes(content)
    data = training_data(sources, tmp_path)
    assert data.fingerprint != fingerprint
    assert data.recognize(identities[::-1]) == [str(tmp_path / "two")] and data.fingerprint == fingerprint
    data.load_state(state)  # whose keys are those of old
    changed = training_data(sources, tmp_path)
    assert changed.recognize(data.identities()) == [str(tmp_path / "two")], "a checkpoint after it knows both"
    other = training_data({str(tmp_path / "two"): 1.0}, tmp_path)
    assert other.recognize(identities[:1]) == []


class Recorded:
    """Stands in for TrainingData: says which thread asked for which ids, and fails on a negative one."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def batch(self, ids, documents):
        self.asked.append((ids.tolist(), threading.current_thread() is threading.main_thread()))
        if ids.min() < 0:
            raise RuntimeError("no such sample")
        return self.data.batch(ids, documents)


@pytest.fixture
def recorded(sources, tmp_path):
    return Recorded(training_data(sources, tmp_path))


@pytest.fixture
def loader(recorded):
    loader = Loader(recorded, CPU, documents=True)
    yield loader
    loader.close()


def test_what_was_announced_is_gathered_once_in_the_background(loader, recorded):
    steps = [np.arange(4 * k, 4 * k + 4) for k in range(5)]
    for now, then in zip(steps, [*steps[1:], None], strict=True):
        batch = loader.take(now, then)
        expected = recorded.data.batch(now, documents=True)
        assert batch.ids.tolist() == now.tolist()
        assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.documents, expected.documents)
    assert recorded.asked == [(step.tolist(), k == 0) for k, step in enumerate(steps)]


def test_a_batch_that_grew_after_the_announcement(loader, recorded):
    loader.take(np.arange(4), then=np.arange(4, 8))
    batch = loader.take(np.arange(4, 12), then=np.arange(12, 20))
    assert torch.equal(batch.tokens, recorded.data.batch(np.arange(4, 12), documents=False).tokens)
    assert loader.take(np.arange(12, 20)).ids.tolist() == list(range(12, 20))
    assert recorded.asked[-1] == (list(range(12, 20)), False)


def test_errors_of_the_thread_surface_where_the_batch_is_used(loader):
    loader.take(np.arange(4), then=np.array([-1]))
    with pytest.raises(RuntimeError, match="no such sample"):
        loader.take(np.array([-1]))
    loader.take(np.arange(4), then=np.array([-1]))
    assert loader.take(np.arange(4, 8)).ids.tolist() == [4, 5, 6, 7]


def test_close_ends_the_thread(recorded):
    before = threading.active_count()
    loader = Loader(recorded, CPU, documents=False)
    assert loader.take(np.arange(2), then=np.arange(2, 4)).documents is None
    loader.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu(recorded):
    loader = Loader(recorded, torch.device("cuda"), documents=True)
    for start in range(0, 40, 8):
        batch = loader.take(np.arange(start, start + 8), then=np.arange(start + 8, start + 16))
        expected = recorded.data.batch(batch.ids, documents=True)
        assert batch.tokens.device.type == batch.documents.device.type == "cuda"
        assert torch.equal(batch.tokens.cpu(), expected.tokens)
        assert torch.equal(batch.documents.cpu(), expected.documents)
    loader.close()
