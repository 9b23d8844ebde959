"""The numbers behind a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report.test_page import drawn, record, report, write_run

from megahp.log.metrics import LoggedRun, RunLog, read_run
from megahp.report.numbers import (
    health,
    layer_points,
    newest_half,
    smooth,
    steps_saved,
    thin,
    time_saved,
    training_seconds,
    trend,
    update_density,
    update_shares,
)


def logged(steps):
    """A run of these steps."""
    keys = {key for step in steps for key in step if key != "noise_scale_layers"}
    columns = {key: np.array([step.get(key) for step in steps], np.float64) for key in keys}
    return LoggedRun("owl", columns, {}, [], {}, "", "", Path("owl"))


def test_thin_keeps_the_ends_the_spikes_and_the_gaps():
    x = np.arange(100_000.0)
    y = np.sin(x / 9000)
    y[12_345], y[70_001], y[40_000:41_000] = 50.0, -50.0, np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 2002
    assert {0.0, 12_345.0, 70_001.0, 99_999.0} <= set(thin_x)
    assert np.nanmax(thin_y) == 50 and np.nanmin(thin_y) == -50
    assert np.isnan(thin_y[(thin_x >= 40_100) & (thin_x < 40_900)]).all()
    assert thin(x[:10], y[:10])[0].tolist() == x[:10].tolist()


def test_smooth_is_a_mean_that_skips_nan():
    assert smooth(np.full(50, 2.5), 7) == pytest.approx(np.full(50, 2.5))
    ramp = np.arange(50.0)
    assert smooth(ramp, 5)[5:-5] == pytest.approx(ramp[5:-5])  # centred: no lag
    ramp[20] = np.nan
    assert np.isnan(smooth(ramp, 5)[20]) and np.isfinite(smooth(ramp, 5)[[19, 21]]).all()
    assert smooth(ramp, 1) == pytest.approx(ramp, nan_ok=True)


def test_the_course_of_a_long_run_is_that_of_all_its_steps():
    x = np.arange(100_000.0)
    y = np.sin(x / 9000) + np.random.default_rng(0).normal(scale=0.1, size=len(x))
    y[30_000:36_000] = np.nan
    at, values = trend(x, y)
    whole = np.interp(at, x, smooth(y, 2000))
    inside = np.isfinite(whole) & (at > 2000) & (at < 98_000)
    assert len(at) == 2000 and np.isnan(values[(at > 30_100) & (at < 35_900)]).all()
    assert values[inside] == pytest.approx(whole[inside], abs=0.01)
    assert trend(x[:50], x[:50])[1].tolist() == x[:50].tolist()


def test_layers_lie_at_their_depth():
    layers = {"layers.0.a": 1.0, "layers.0.b": None, "layers.1.a": 3.0, "final": 4.0}
    run = replace(logged([record(1)]), layers=layers)
    assert layer_points(run) == [("layers.*.a", 0, 1.0), ("layers.*.a", 1, 3.0), ("final", 2, 4.0)]


def test_what_growth_saved_in_steps_and_in_time():
    """Against the initial batch throughout: 100 steps of 8 and 50 of 16, which take half as long by the token."""
    steps, tokens = [], 0
    for step in range(1, 151):
        batch = 8 if step <= 100 else 16
        tokens += batch * 100
        speed = 400.0 if step <= 100 else 800.0
        seconds = batch * 100 / speed
        steps.append(record(step, tokens=tokens, global_batch=batch, tokens_per_second=speed, step_seconds=seconds))
    grown = logged(steps)
    assert steps_saved(grown) == "25% of 200 steps at the initial batch"
    assert time_saved(grown) == "25% of 6 min 40 s at the initial batch's speed"
    constant = logged(steps[:100])
    assert steps_saved(constant) == time_saved(constant) == ""


def checks(*losses, baselines=None, **values):
    steps = [record(step, loss=loss, **values) for step, loss in enumerate(losses, start=1)]
    return health(replace(logged(steps), baselines=baselines or {}))


def test_health_sees_what_is_wrong():
    assert all(good for good, _ in checks(5.0, 4.0, 3.0, baselines={"unigram": 7.0, "bigram": 4.5}))
    found = checks(5.0, 3.0, 6.0, skipped=True, global_batch=90, noise_scale_total=45.0)
    assert {text for good, text in found if not good} == {
        "Loss went from 5.00 to 6.00.",
        "Loss ends 3.00 nats above its lowest level: look for a spike or a jump.",
        "3 of 3 logged steps were skipped: gradient not finite.",
        "Global batch is 2.00 times the whole model's noise scale: in a quadratic model of SGD, a step makes 67 % of "
        "the progress that an infinite batch would make, but averages more examples than the gradient needs.",
    }
    assert checks(7.0, 5.0, baselines={"unigram": 7.0, "bigram": 4.5})[0] == (
        False,
        "Loss is 0.50 nats above the bigram baseline: the model has not learned which token follows which.",
    )
    stale = checks(5.0, 3.0, 9.0, baselines={"unigram": 7.0}, validation_loss=3.0)[0]
    assert stale[0] is False and stale[1].startswith("Loss is 2.00 nats above the unigram baseline")


def write_averaged(directory, every, start, skips, steps=40):
    """A run whose batch, rate and decay change: the steps that are logged, every step's rate, every step's tokens."""
    logged = [step for step in range(start + 1, start + steps + 1) if step % every == 0 or step % 10 == 0]
    log, tokens, rates, sizes = RunLog(directory), start * 32 * 512, {}, {}
    if start:
        log.event("branched", "from another run", step=start, tokens=tokens)
    for step in range(start + 1, start + steps + 1):
        due = next(one for one in logged if one >= step)
        decay, batch = (0.8, 32) if due <= start + 20 else (1.6, 64)
        lr = 0.1 * (start + steps + 1 - due) / steps
        rates[step], sizes[step] = 0.0 if step in skips else lr * decay, batch * 512
        tokens += sizes[step]
        if step == due:
            values = {"tokens": tokens, "lr": lr, "weight_decay": decay, "global_batch": batch}
            log.metrics(record(step, **values, **({"skipped": True} if step in skips else {})))
    log.close()
    return logged, rates, sizes


AVERAGED = [(1, 0, ()), (4, 0, ()), (7, 0, ()), (1, 0, (24, 31)), (4, 0, (24,)), (1, 1000, ()), (4, 1000, (1024,))]


@pytest.mark.parametrize(("every", "start", "skips"), AVERAGED)
def test_what_the_weights_are_made_of_is_what_a_loop_over_the_steps_finds(tmp_path, every, start, skips):
    """w <- (1 - a) w + a x, step by step, on vectors that say how much of w is the initial weights and each x."""
    logged, rates, sizes = write_averaged(tmp_path / "owl", every, start, skips)
    made_of = {start: 1.0}
    for step, rate in rates.items():
        made_of = {name: (1 - rate) * share for name, share in made_of.items()} | {step: rate}
    assert sum(made_of.values()) == pytest.approx(1)
    expected, before = [], start
    for due in logged:
        between = range(before + 1, due + 1)
        share = sum(made_of[step] for step in between)
        expected.append(share / (sum(sizes[step] for step in between) / sum(sizes.values())))
        before = due

    run = read_run(tmp_path / "owl")
    first, shares = update_shares(run)
    assert first == pytest.approx(made_of[start], rel=1e-9) and first + shares.sum() == pytest.approx(1)
    assert update_density(run) == pytest.approx(expected, rel=1e-9)
    if every == 1:
        assert all((density == 0) == (step in skips) for step, density in zip(logged, expected, strict=True))
    page = report(tmp_path, tmp_path / "owl")
    assert f"Initial weights {100 * made_of[start]:.1f} %" in page.text
    line = next(points for style, points in drawn(page, "Share of each update") if "var(--run0)" in style)
    heights = line[0::2, 1]  # every second point of the stairs is the end of a tread
    assert len(heights) == len(expected) + 1
    slope, offset = np.polyfit(expected, heights[1:], 1)
    assert slope < 0 and heights[1:] == pytest.approx(offset + slope * np.array(expected), abs=1e-3)


def test_the_newest_half(tmp_path):
    run = read_run(write_run(tmp_path / "owl", steps=40))
    assert newest_half(run, np.ones(40)) == pytest.approx(0.5)
    assert newest_half(run, np.where(np.arange(40) < 30, 0.0, 0.07)) == pytest.approx(0.125)


def test_a_run_from_a_checkpoint_counts_its_own_steps(tmp_path):
    write_averaged(tmp_path / "owl", 4, 1000, ())
    assert training_seconds(read_run(tmp_path / "owl")) == 40 * 4.0


def test_without_weight_decay_there_is_no_average(tmp_path):
    plain = write_run(tmp_path / "owl", steps=30, weight_decay=0.0)
    page = report(tmp_path, plain)
    assert "Weight decay is 0" in page.text and "Initial weights" not in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 6
    both = report(tmp_path, plain, write_run(tmp_path / "lark", steps=30))
    assert "Weight decay is 0" not in both.text and both.text.count("Initial weights") == 1
    styles = [style for style, _ in drawn(both, "Share of each update")]
    assert any("var(--run1)" in style for style in styles) and not any("var(--run0)" in style for style in styles)
