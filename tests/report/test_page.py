"""The report: the right numbers, nothing executable, any length of run."""

import json
import re
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from megahp import cli
from megahp.errors import UserError
from megahp.log.metrics import RunLog, read_run
from megahp.report.numbers import health, summary
from megahp.report.page import read_runs, text_summary, write_report

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


def test_a_run_that_cannot_be_read_is_skipped(tmp_path, capsys):
    """One line each, and the page is the others', in the folder of the first of them."""
    write_run(tmp_path / "new", steps=0)
    write_run(tmp_path / "torn", steps=3)
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 1}\n')
    write_run(tmp_path / "dead", steps=3)
    (tmp_path / "dead" / "metrics.jsonl").unlink()
    write_run(tmp_path / "owl", steps=3)
    words = [str(tmp_path / name) for name in ("absent", "new", "torn", "dead", "owl")]
    assert cli.main(["report", *words]) == 0
    said = capsys.readouterr()
    assert said.out == f"report: {tmp_path / 'owl' / 'report.html'}\n" and not (tmp_path / "absent").exists()
    lines = said.err.splitlines()
    assert len(lines) == 4 and all(line.startswith("megahp: warning: skipped: ") for line in lines)
    assert all(word in line for word, line in zip(words, lines, strict=False))
    assert "owl" in Page(tmp_path / "owl" / "report.html").text


def report(tmp_path, *runs):
    return Page(write_report(read_runs(runs), tmp_path / "report.html"))


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
        "Global batch": "32 sequences",
        "Gradient noise scale": "57.4 sequences at step 1, 196 at step 100",  # 1.4 times the norm layers'
    }


def test_the_text_for_a_terminal_has_the_same_numbers(tmp_path):
    run = read_run(write_run(tmp_path / "owl"))
    text = text_summary(run)
    numbers = {label: value for label, value in summary(run).items() if value}
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


def drawn(page, label):
    """The style and the points [n, 2] of every line, the grid's apart, of the figure whose label begins with this."""
    labels = [attributes.get("aria-label", "") if tag == "svg" else None for tag, attributes in page.tags]
    start = next(index for index, text in enumerate(labels) if text and text.startswith(label))
    end = next((index for index in range(start + 1, len(labels)) if labels[index] is not None), len(labels))
    lines = [line for tag, line in page.tags[start:end] if tag == "path" and "clip-path" in line]
    points = [np.array(re.findall(r"[\d.-]+", line["d"]), float).reshape(-1, 2) for line in lines]
    return [(line["style"], at) for line, at in zip(lines, points, strict=True) if "var(--rule)" not in line["style"]]


def test_mistakes_are_reported(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"absent/metrics\.jsonl does not exist"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(UserError, match="holds no step yet"):
        read_runs([write_run(tmp_path / "new", steps=0), tmp_path / "absent"])
    runs = read_runs([write_run(tmp_path / "owl", steps=2)])
    with pytest.raises(UserError, match="owl cannot be written"):
        write_report(runs, tmp_path / "owl")  # a directory
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        write_report(runs, tmp_path / "report.html")
