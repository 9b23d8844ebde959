"""The figures of a report."""

from __future__ import annotations

import warnings

import pytest
from report.test_page import drawn, record, report, write_run

from megahp.log.metrics import RunLog
from megahp.report.figures import plot_in


def test_figures_can_be_read_and_follow_the_page(tmp_path):
    events = [("batch", "noise scale reached 64", {"step": 9, "tokens": 9 * 32 * 512})]
    page = report(tmp_path, write_run(tmp_path / "owl", baselines={"bigram": 4.75}, events=events))
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 7 and all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert "bigram 4.75" in page.text and "batch: noise scale reached 64" in page.text
    svg = page.source[page.source.index("<svg") :]
    assert "var(--run0)" in svg and "#2b5fa8" not in svg  # no colour is fixed
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def dotted(page):
    """The lines that are the batch's colour and not solid."""
    lines = drawn(page, "Global batch")
    return [points for style, points in lines if "stroke-dasharray" in style and "var(--run0)" in style]


def test_the_target_of_the_batch_is_drawn_where_there_is_one(tmp_path):
    without = report(tmp_path, write_run(tmp_path / "owl", steps=30, batch_target=None), write_run(tmp_path / "lark"))
    assert "target" not in without.text
    assert len(dotted(without)) == 1  # of two runs, the first's noise scale is in its own colour
    log = RunLog(tmp_path / "wren")
    for step in range(1, 31):
        log.metrics(record(step, batch_target=None if step < 7 else 48.0 if step < 30 else 32.0))
    log.close()
    page = report(tmp_path, tmp_path / "wren")
    assert "dotted" in page.source and "target of the batch policy" in page.text
    (points,) = dotted(page)
    batch, right = (drawn(page, "Global batch")[0][1][at] for at in (0, -1))
    assert points[-1] == pytest.approx(right)  # where the two are equal
    assert points[0, 1] < right[1] - 5  # 48 is above 32
    assert (points[0, 0] - batch[0]) / (right[0] - batch[0]) == pytest.approx(7 / 30, abs=1e-4)
    assert dotted(report(tmp_path, write_run(tmp_path / "kite", steps=30))) == []
    both = report(tmp_path, tmp_path / "owl", tmp_path / "wren")  # one run with and one without
    assert "target of the batch policy" in both.text and len(dotted(both)) == 1


def test_wild_first_estimates_do_not_flatten_the_rest(tmp_path):
    for name, wild in (("owl", 2e3), ("lark", 1e9)):
        log = RunLog(tmp_path / name)
        for step in range(1, 101):
            found = {1: wild, 2: 1 / wild, 3: wild}.get(step, 40.0 + step)
            log.metrics(record(step, noise_scale=found, batch_target=0.2 * found))
        log.close()
    (_, tame), (_, wild) = (drawn(report(tmp_path, tmp_path / name), "Global batch")[0] for name in ("owl", "lark"))
    assert tame == pytest.approx(wild)  # the batch's line lies where it lay


def test_a_measured_batch_shows_its_bounds_and_the_drift_of_a_step(tmp_path):
    log, samples = RunLog(tmp_path / "owl"), 0
    for step in range(1, 41):
        batch = 32 if step <= 20 else 64
        samples += batch
        bounds = {"batch_bound_noise": 100.0 + step, "batch_bound_stability": None if step < 5 else 1600 / (41 - step)}
        values = {
            "samples": samples,
            "tokens": samples * 512,
            "lr": 2e-3 if step <= 20 else 1e-3,
            "global_batch": batch,
        }
        log.metrics(record(step, **values, **bounds, noise_scale_total=200.0))
    log.close()
    page = report(tmp_path, tmp_path / "owl")
    assert "33% of 60 steps at the initial batch" in page.text  # 40 steps for the tokens of 60
    source = page.source[page.source.index("Global batch and noise scale") :]
    assert ">noise</text>" in source and ">stability</text>" in source
    (drift,) = [points for style, points in drawn(page, "Learning rate") if "stroke-dasharray" in style]
    (rate,) = [points for style, points in drawn(page, "Learning rate") if "stroke-dasharray" not in style]
    assert drift[0] == pytest.approx(rate[0])  # the drift is over that of the first batch
    (bottom, top), height = (rate[-1, 1], rate[0, 1]), drift[-1, 1]
    assert (bottom - height) / (bottom - top) == pytest.approx(2**0.5 - 1, rel=0.02)  # the root of 2, between 1 and 2
    assert "saved" not in report(tmp_path, write_run(tmp_path / "wren", steps=30)).text


def test_what_has_no_logarithm_draws_no_warning(tmp_path):
    """A gradient that is 0, and noise scales below it, as of a model that an enormous multiplier has saturated."""
    layers = {"layers.0.norm": -30.0, "layers.1.norm": 0.0}
    nothing = {"grad_sq_example": 0.0, "grad_sq_batch": 0.0, "noise_scale": -1.0, "noise_scale_layers": layers}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(tmp_path, write_run(tmp_path / "owl", **nothing))


def test_a_logarithmic_axis_of_a_plot_has_plain_numbers(tmp_path):
    """Not matplotlib's formulas, since a $ is text here; the ticks that a plot sets itself stay."""
    with plot_in(tmp_path / "plot.svg", 4, 3) as figure:
        left, right = figure.subplots(1, 2)
        left.loglog([3, 3000], [0.1, 100])
        right.plot([16, 64], [1, 2])
        right.set_xscale("log")
        right.set_xticks([16, 64], ["sixteen", "64"])
    text = (tmp_path / "plot.svg").read_text()
    assert "mathdefault" not in text and ">1k<" in text and ">0.1<" in text and ">sixteen<" in text
