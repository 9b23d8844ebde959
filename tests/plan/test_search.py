"""The search: what it finds can run and fits, nothing better is left out, and a trace has the last word."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from plan.small import GPUS, RUN, config, machine

from megahp.config import Config, get_setting, resolve, with_values
from megahp.config.checks import find_conflicts
from megahp.errors import UserError
from megahp.parallel.layout import fit
from megahp.plan import text, trace
from megahp.plan.formulas import rank_works
from megahp.plan.search import KEYS, MICRO_BATCHES, RECOMPUTE, STATES, Candidate, confirm, distinct, search, why_slower
from megahp.plan.step_time import estimate
from megahp.plan.work import Work
from megahp.train.prepare import check_batch


def test_what_is_found_can_run_and_fits() -> None:
    cluster = machine(40)
    found = search(config(), GPUS, cluster)
    assert found.fitting and found.too_large
    for each in found.fitting:
        assert find_conflicts(each.config) == [] and fit(each.config.parallel, GPUS) == each.layout
        check_batch(each.config, each.layout, 64)
        assert each.estimate.bytes <= cluster.usable and each.estimate == estimate(each.config, GPUS, cluster)
        assert each.config.batch.global_batch == 64 and each.config.model == config().model
    seconds = [each.estimate.seconds for each in found.fitting]
    assert seconds == sorted(seconds)
    assert max(Counter(each.layout for each in distinct(found.fitting)).values()) == 1


@pytest.mark.parametrize("gib", [12, 40])
def test_nothing_faster_is_left_out(gib: float) -> None:
    """Against every combination of tensor parallelism, shards, ZeRO, micro batch and recomputation, without mercy for
    the time that this takes."""
    cluster, plain = machine(gib), config(parallel={"pp": 1, "tp": 1})
    best = None
    for tp, (zero, reduce), micro, recompute in product((1, 2, 4, 8), STATES, MICRO_BATCHES, RECOMPUTE):
        values = {
            "parallel.tp": tp,
            "parallel.sequence_parallel": tp > 1,
            "parallel.zero": zero,
            "parallel.reduce": reduce,
        }
        tried = with_values(plain, {**values, "batch.micro_batch": micro, "compute.recompute": recompute})
        try:
            check_batch(tried, fit(tried.parallel, GPUS), 64)
        except UserError:
            continue
        if find_conflicts(tried) or (found := estimate(tried, GPUS, cluster)).bytes > cluster.usable:
            continue
        best = min(best or found.seconds, found.seconds)
    fixed = {"parallel.pp", "parallel.cp"}
    assert best is not None and search(plain, GPUS, cluster, fixed).fitting[0].estimate.seconds <= best


def test_settings_that_are_fixed_stay() -> None:
    found = search(config(batch={"micro_batch": 2}), GPUS, machine(70), {"parallel.tp", "batch.micro_batch"})
    assert {(each.layout.tp, each.config.batch.micro_batch) for each in found.fitting} == {(4, 2)}
    sized = config(parallel={"pp": 1, "tp": 1, "dp_shard": 4, "dp_replicate": 2})
    kept = {"parallel.dp_shard", "parallel.dp_replicate"}
    assert {
        (each.layout.dp_replicate, each.layout.dp_shard) for each in search(sized, GPUS, machine(70), kept).fitting
    } == {(2, 4)}
    zbv = search(config(parallel={"schedule": "zbv"}), GPUS, machine(70), {"parallel.schedule"})
    assert {(each.config.parallel.schedule, each.layout.pp > 1) for each in zbv.fitting} == {("zbv", True)}


def test_settings_make_the_layout() -> None:
    """A run file with the settings of a layout, and none of another's, is that layout."""
    for each in search(config(), GPUS, machine(40)).fitting[:20]:
        tree = {"parallel": {}, "compute": {}, "batch": {"global_batch": 64}}
        for key, value in each.settings.items():
            tree.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
        again = resolve.resolve([("test", {**RUN, **tree})]).config
        assert [get_setting(again, key) for key in KEYS] == [get_setting(each.config, key) for key in KEYS]


def test_what_cannot_be() -> None:
    for gpus, cluster, fixed, problem in (
        (0, machine(40), set(), "--gpus 0 must be at least 1"),
        (GPUS, machine(3), set(), "no layout fits 8 GPUs of h100, of which 3.0 GiB can be used; the leanest takes"),
        (2, machine(40), {"parallel.tp"}, "no layout of --gpus 2 divides .* parallel.tp = 4; choose"),
    ):
        with pytest.raises(UserError, match=problem):
            search(config(), gpus, cluster, fixed)


def test_a_trace_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest by formulas does not fit by its trace: the next that does is first."""
    cluster = machine(40)
    found = search(config(), GPUS, cluster)
    sizes = iter([cluster.usable + 1, cluster.usable + 1, cluster.usable])
    traced: list[Config] = []

    def trace_step(config: Config, *_: int) -> Work:
        traced.append(config)
        return replace(rank_works(config, GPUS)[0], peak=Counter(weights=int(next(sizes))))

    monkeypatch.setattr(trace, "trace_step", trace_step)
    confirmed = confirm(found, GPUS, cluster)
    assert [each.config for each in found.fitting[:3]] == traced
    assert confirmed.fitting[0].config == traced[2] and confirmed.fitting[0].traced
    assert [each.config for each in confirmed.too_large[:2]] == traced[:2]


def test_the_table() -> None:
    cluster = machine(40)
    found = search(config(), GPUS, cluster)
    lines = text.layouts(found, GPUS, cluster).splitlines()
    assert lines[0].startswith("8 x h100, 40.0 GiB of each usable") and "too large: " in lines[-1]
    best, other = distinct(found.fitting)[:2]
    assert str(best) in lines[2] and lines[3].endswith(why_slower(other, best))
    assert text.sections(best).startswith("[parallel]\n") and "[batch]\nmicro_batch = " in text.sections(best)


def test_a_candidate_says_what_it_is() -> None:
    settings = {"parallel.tp": 2, "parallel.pp": 2, "parallel.schedule": "interleaved", "compute.recompute": "full"}
    tried = with_values(config(), settings)
    found = Candidate(tried, fit(tried.parallel, GPUS), estimate(tried, GPUS, machine(40)))
    assert str(found) == "tp 2, pp 2, interleaved of 4 stages, 2 shards, zero 1, micro batch 1, recompute full"
