"""The report: the right numbers, nothing executable, any length of run."""

import json
import re
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from megahp.errors import UserError
from megahp.log.metrics import LoggedRun, RunLog, read_run
from megahp.report.numbers import (
    health,
    layer_points,
    newest_half,
    smooth,
    summary,
    thin,
    training_seconds,
    update_density,
    update_shares,
)
from megahp.report.page import text_summary, write_report

pytest.importorskip("matplotlib")


def record(step, **values):
    """A step of a run of batch 32 and 512 tokens a sample, 4 s each."""
    return {
        "step": step, "tokens": step * 32 * 512, "samples": step * 32, "loss": 3.0 + 5.0 / step,
        "lr": 2e-3 / step, "weight_decay": 0.1, "global_batch": 32, "grad_norm": 1.0,
        "grad_sq_example": 20.0 / step, "grad_sq_batch": 1.0 / step,
        "noise_scale": 40.0 + step, "noise_scale_tokens": 512 * (40.0 + step),
        "noise_scale_layers": {"layers.0.norm": 30.0, "layers.1.norm": 60.0 + step, "final_norm": None},
        "tokens_per_second": 4096.0, "step_seconds": 4.0, **values,
    }  # fmt: skip


def write_run(directory, steps=100, events=(), baselines=None, config=None, sample=None, **values):
    log = RunLog(directory)
    for step in range(1, steps + 1):
        log.metrics(record(step, **values))
    for event, reason, inputs in events:
        log.event(event, reason, **inputs)
    log.close()
    if baselines is not None:
        (directory / "baselines.json").write_text(json.dumps(baselines))
    if config is not None:
        (directory / "config.toml").write_text(config)
    if sample is not None:
        (directory / "sample.txt").write_text(sample)
    return directory


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its text, the rows of its tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.open, self.texts = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1].append(data)


def report(tmp_path, *runs):
    return Page(write_report(runs, tmp_path / "report.html"))


def test_the_numbers_are_right(tmp_path):
    run = write_run(tmp_path / "owl", validation_loss=3.5, baselines={"unigram": 7.25, "bigram": 4.75})
    rows = dict(row for row in report(tmp_path, run).rows if len(row) == 2)
    assert rows == {
        "Final loss": "3.0510",
        "Validation loss": "3.5000",
        "Unigram baseline": "7.2500 (3.7500 below)",
        "Bigram baseline": "4.7500 (1.2500 below)",
        "Tokens": "1,638,400",
        "Steps": "100",
        "Steps skipped": "0",
        "Training time": "6 min 40 s",
        "Tokens per second": "4.1k",
        "Peak learning rate": "0.002",
        "Global batch": "32",
        "Noise scale": "41 to 140",
    }


def test_the_text_for_a_terminal_has_the_same_numbers(tmp_path):
    run = write_run(tmp_path / "owl")
    text = text_summary(run)
    numbers = {label: value for label, value in summary(read_run(run)).items() if value}
    assert all(re.search(rf"^{label} +{re.escape(value)}$", text, re.M) for label, value in numbers.items())
    assert "Unigram" not in text  # unknown: not mentioned
    assert "ok    Throughput is steady." in text


def test_the_page_stands_alone_and_nothing_in_it_runs(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>&\"' $a_1$ #1c2128"
    run = write_run(
        tmp_path / "<b>owl",
        baselines={"unigram": 7.0},
        sample=evil,
        config=f'name = "{evil}"',
        events=[(evil, evil, {"step": 50, "tokens": 50 * 32 * 512})],
        noise_scale_layers={evil: 3.0, "layers.1.norm": 60.0},
    )
    page = report(tmp_path, run)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(names)
    assert names.count("b") == len(health(read_run(run)))  # the signs of the checks, not the run's name
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.tags)
    assert "url(http" not in page.source and "@import" not in page.source
    assert page.text.count("<script>alert(1)</script>") >= 5  # sample, config, event, reason, layer
    assert f'name = "{evil}"' in page.text and "<b>owl" in page.text


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


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_run(tmp_path / "owl", baselines={"unigram": 7.0, "bigram": 4.0})
    first = report(tmp_path, run).source
    assert report(tmp_path, run).source == first


def test_runs_are_overlaid_each_in_its_colour(tmp_path):
    one = write_run(tmp_path / "a" / "owl", baselines={"unigram": 7.0})
    two = write_run(tmp_path / "b" / "owl", steps=50, loss=2.5, events=[("batch", "grew", {})])
    page = report(tmp_path, one, two)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["Final loss"] == ["3.0510", "2.5000"] and rows["Steps"] == ["100", "50"]
    assert rows["Unigram baseline"][1] == "–"
    assert str(one) in page.text and str(two) in page.text  # the same name: told apart by path
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 7
    assert "var(--run0)" in page.source and "stroke: var(--run1)" in page.source


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_has_just_begun(tmp_path, steps):
    run = write_run(tmp_path / "owl", steps=steps, baselines={"unigram": 7.0, "bigram": 4.0})
    page = report(tmp_path, run)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 7


def test_nulls_everywhere(tmp_path):
    nulls = {key: None for key in record(1) if key not in ("step", "tokens", "samples")}
    run = write_run(tmp_path / "owl", steps=30, skipped=True, **nulls)
    page = report(tmp_path, run, write_run(tmp_path / "lark", noise_scale=None, noise_scale_layers=None))
    assert {row[0]: row[1] for row in page.rows if row}["Steps skipped"] == "30"
    assert "No step has a finite loss." in page.text
    alone = report(tmp_path, run)
    assert alone.text.count("Not recorded.") == 7 and "nan" not in alone.text.lower()


def test_a_long_run_is_thinned_and_quick(tmp_path):
    steps = 50_000
    log = RunLog(tmp_path / "owl")
    noise = np.random.default_rng(0).normal(size=steps)
    for step in range(1, steps + 1):
        extra = {"skipped": True} if step % 5000 == 0 else {}
        loss = None if extra else 3.0 + 5.0 / step + 0.05 * float(noise[step - 1])
        log.metrics(record(step, loss=loss, **extra))
    for step in range(0, steps, 100):
        log.event("checkpoint", "every 100 steps", step=step, tokens=step * 32 * 512)
    log.event("batch", "64 -> 128", step=40, tokens=40 * 32 * 512)
    log.close()
    start = time.monotonic()
    page = report(tmp_path, tmp_path / "owl")
    assert time.monotonic() - start < 10
    assert len(page.source) < 1_500_000
    assert "500 × checkpoint" in page.text and page.text.count("every 100 steps") == 0
    assert "64 -> 128" in page.text


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


def test_layers_lie_at_their_depth():
    layers = {"layers.0.a": 1.0, "layers.0.b": None, "layers.1.a": 3.0, "final": 4.0}
    run = LoggedRun("owl", [{"noise_scale_layers": layers}, {"noise_scale_layers": None}], [], {}, "", "")
    assert layer_points(run) == [("layers.*.a", 0, 1.0), ("layers.*.a", 1, 3.0), ("final", 2, 4.0)]


def checks(*losses, baselines=None, **values):
    steps = [record(step, loss=loss, **values) for step, loss in enumerate(losses, start=1)]
    return health(LoggedRun("owl", steps, [], baselines or {}, "", ""))


def test_health_sees_what_is_wrong():
    assert all(good for good, _ in checks(5.0, 4.0, 3.0, baselines={"unigram": 7.0, "bigram": 4.5}))
    found = checks(5.0, 3.0, 6.0, skipped=True, global_batch=90, noise_scale=45.0)
    assert {text for good, text in found if not good} == {
        "Loss went from 5.00 to 6.00.",
        "Loss ends 3.00 nats above its lowest level: look for a spike or a jump.",
        "3 of 3 logged steps were skipped: gradient not finite.",
        "Global batch is 2.00 times the noise scale: in SGD's quadratic picture a step makes 67 % of the progress an "
        "infinite batch would, from more examples than the gradient needs.",
    }
    assert checks(7.0, 5.0, baselines={"unigram": 7.0, "bigram": 4.5})[0] == (
        False,
        "Loss is 0.50 nats above the bigram baseline: the model knows less than which token follows which.",
    )
    stale = checks(5.0, 3.0, 9.0, baselines={"unigram": 7.0}, validation_loss=3.0)[0]
    assert stale[0] is False and stale[1].startswith("Loss is 2.00 nats above the unigram baseline")


def drawn(page, label):
    """The style and the points [n, 2] of every line, the grid's apart, of the figure whose label begins with this."""
    labels = [attributes.get("aria-label", "") if tag == "svg" else None for tag, attributes in page.tags]
    start = next(index for index, text in enumerate(labels) if text and text.startswith(label))
    end = next((index for index in range(start + 1, len(labels)) if labels[index] is not None), len(labels))
    lines = [line for tag, line in page.tags[start:end] if tag == "path" and "clip-path" in line]
    points = [np.array(re.findall(r"[\d.-]+", line["d"]), float).reshape(-1, 2) for line in lines]
    return [(line["style"], at) for line, at in zip(lines, points, strict=True) if "var(--rule)" not in line["style"]]


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


def test_mistakes_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"absent/metrics\.jsonl does not exist"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(UserError, match="holds no step yet"):
        text_summary(write_run(tmp_path / "new", steps=0))
    run = write_run(tmp_path / "owl", steps=2)
    with pytest.raises(UserError, match="owl cannot be written"):
        write_report([run], run)  # a directory
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        write_report([run], tmp_path / "report.html")
