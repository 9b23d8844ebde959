"""The run's log: what is written comes back, exactly, through crashes and resumes."""

import itertools
import json
import math
import os
import random
import sys

import numpy as np
import pytest

from megahp.errors import UserError
from megahp.log import metrics
from megahp.log.metrics import RunLog, newest_events, newest_metrics, read_events, read_metrics, read_run


def record(step, **values):
    return {"step": step, "tokens": step * 512, "loss": 4.0 - step / 100, **values}


def logged(directory, steps):
    log = RunLog(directory)
    for step in range(1, steps + 1):
        log.metrics(record(step))
    return log


def test_round_trip_keeps_values_and_order(tmp_path):
    log = RunLog(tmp_path)
    first = record(1, skipped=True, grad_norm=None, noise_scale_layers={"layers.0.norm": 3.5, "norm": None})
    log.metrics(first)
    log.event("batch", "noise scale reached 128", kappa=2, batch=[64, 128])
    assert read_metrics(tmp_path) == [first]  # already there, with the log still open
    assert list(read_metrics(tmp_path)[0]) == list(first)
    (event,) = read_events(tmp_path)
    assert list(event) == ["step", "tokens", "time", "event", "reason", "kappa", "batch"]
    assert (event["step"], event["tokens"], event["kappa"], event["batch"]) == (1, 512, 2, [64, 128])


def test_an_event_may_say_when_it_was(tmp_path):
    log = RunLog(tmp_path)
    log.event("resume", "checkpoint 7", step=7, tokens=3584)
    (event,) = read_events(tmp_path)
    assert (event["step"], event["tokens"]) == (7, 3584)


def test_floats_come_back_bit_for_bit(tmp_path):
    draw = random.Random(0)
    floats = [draw.random() * 10 ** draw.randint(-300, 300) for _ in range(1000)]
    floats += [0.1, 1 / 3, 5e-324, sys.float_info.max, -0.0]
    floats = [number for number in floats if number < 1e300]  # none that is logged is larger
    RunLog(tmp_path).metrics(record(1, values=dict(enumerate(floats))))
    back = read_metrics(tmp_path)[0]["values"].values()
    assert [number.hex() for number in back] == [number.hex() for number in floats]


def test_nan_and_infinity_are_null(tmp_path):
    RunLog(tmp_path).metrics(record(1, grad_norm=math.nan, deep={"a": {"b": math.inf, "c": -math.inf, "d": 1.0}}))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read_metrics(tmp_path)[0]["grad_norm"] is None
    assert read_metrics(tmp_path)[0]["deep"] == {"a": {"b": None, "c": None, "d": 1.0}}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    logged(tmp_path, 3).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -min(cut, len(json.dumps(record(3))))])
    steps = [found["step"] for found in read_metrics(tmp_path)]
    assert steps == ([1, 2, 3] if cut == 1 else [1, 2])  # without the newline alone the object is whole


STEP = '"step": 2, "tokens": 1024'
DAMAGED = [
    *('{"step": 2, "tok', "[]", "3", "null", "", "\xff", "[" * 100_000, "{" + STEP + ', "loss": NaN}'),
    *("{" + STEP + f', "loss": {value}}}' for value in ('"3.5"', '""', "[1]", "[]", "1e999", "1" * 400, "9" * 5000)),
    *("{" + STEP + f', "noise_scale_layers": {{"norm": {value}}}}}' for value in ('"3.5"', "[1]", "Infinity")),
    *('{"tokens": 1024}', '{"step": 2}', '{"step": "2", "tokens": 1024}', '{"step": 2.5, "tokens": 1024}'),
    *('{"step": -2, "tokens": 1024}', '{"step": true, "tokens": 1024}', '{"step": 2, "tokens": 1e3}'),
    f'{{"step": 2, "tokens": {2**63}}}',
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:60])
def test_a_damaged_line_is_skipped_and_counted(tmp_path, capsys, line):
    logged(tmp_path, 3).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line.encode("latin-1"), lines[2], line.encode("latin-1"), b""]))
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 3]
    said = f"megahp: {path}: skipped 2 damaged lines, the first is line 2\n"
    assert capsys.readouterr().err == said
    assert read_metrics(tmp_path) and capsys.readouterr().err == ""  # said once
    assert [found["step"] for found in newest_metrics(tmp_path)] == [3, 1]
    assert capsys.readouterr().err == f"megahp: {path}: skipped damaged lines\n"
    (tmp_path / "events.jsonl").touch()
    if "noise_scale_layers" not in line:  # what is cut out of a line is not looked into
        assert read_run(tmp_path).column("step").tolist() == [1, 3]


EVENT = {"step": 2, "tokens": 1024, "time": 1.8e9, "event": "batch", "reason": "more"}


@pytest.mark.parametrize("key", EVENT)
@pytest.mark.parametrize("value", ["absent", None, [1], -1e300, "text", 1e300])
def test_an_event_without_what_each_has_is_skipped_and_counted(tmp_path, capsys, key, value):
    wrong = {name: here for name, here in (EVENT | {key: value}).items() if here != "absent"}
    is_right = value == "text" and key in ("event", "reason")
    (tmp_path / "events.jsonl").write_text(f"{json.dumps(wrong)}\n{json.dumps(EVENT)}\n")
    assert read_events(tmp_path) == [wrong, EVENT][is_right is False :]
    assert list(newest_events(tmp_path)) == read_events(tmp_path)[::-1]
    assert ("skipped 1 damaged line, the first is line 1" in capsys.readouterr().err) != is_right


@pytest.mark.parametrize("block", [1, 7, 64, 2**16])
def test_a_log_is_read_from_its_end_no_further_than_is_asked_for(tmp_path, monkeypatch, block):
    logged(tmp_path, 300).close()
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert list(newest_metrics(tmp_path)) == read_metrics(tmp_path)[::-1]
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 301, "tok')  # being written
    parsed, parse = [], metrics._parse
    monkeypatch.setattr(metrics, "_parse", lambda line: parsed.append(line) or parse(line))
    assert [found["step"] for found in itertools.islice(newest_metrics(tmp_path), 2)] == [300, 299]
    assert len(parsed) == 3


def test_columns_hold_every_number_and_the_newest_layers(tmp_path):
    """Against the objects themselves, whatever keys each has; of what is cut out nothing remains."""
    log, draw = RunLog(tmp_path), random.Random(0)
    for step in range(1, 1001):
        values = {key: draw.choice([draw.gauss(0, 1), None, 7]) for key in "abcde" if draw.random() < 0.5}
        layers = {"noise_scale_layers": {"layers.0.norm": float(step)}} if step % 7 == 0 else {}
        log.metrics(record(step, **values, **layers, expert_load_max={"router": 2.0}))
    log.close()
    run, steps = read_run(tmp_path), read_metrics(tmp_path)
    for key in ("step", "tokens", "loss", *"abcde"):
        expected = [math.nan if step.get(key) is None else step[key] for step in steps]
        np.testing.assert_array_equal(run.column(key), expected)
    assert run.layers == {"layers.0.norm": 994.0}
    assert np.isnan(run.column("expert_load_max")).all() and np.isnan(run.column("absent")).all()


@pytest.mark.parametrize("name", ["config.toml", "sample.txt", "baselines.json"])
def test_what_stands_beside_a_log_is_no_pipe(tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 1.0}\n')
    (tmp_path / "events.jsonl").touch()
    assert len(read_run(tmp_path).column("loss")) == 1
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        read_run(tmp_path)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    for read in (read_metrics, read_run, lambda path: next(newest_metrics(path))):
        with pytest.raises(UserError, match=r"metrics\.jsonl is not a regular file"):
            read(tmp_path)


def test_a_resumed_run_has_every_step_once(tmp_path):
    log = logged(tmp_path, 10)
    log.event("batch", "at step 10")
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:6]
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 11, "tok\x00\xff')  # kill -9 in the middle of a line

    log = RunLog(tmp_path)
    log.resume(6)
    assert log.step == 6 and log.tokens == 6 * 512
    log.event("resume", "after kill -9")
    for step in range(7, 13):
        log.metrics(record(step))
    log.close()

    assert [found["step"] for found in read_metrics(tmp_path)] == list(range(1, 13))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:6] == before
    assert [found["event"] for found in read_events(tmp_path)] == ["batch", "resume"]
    assert not list(tmp_path.glob("*.part"))


def test_a_resume_drops_what_is_no_step(tmp_path):
    logged(tmp_path, 3).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": "2", "tokens": 1}\n' + path.read_bytes() + b'{"tokens": 5}\n')
    RunLog(tmp_path).resume(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_resume_from_the_beginning_forgets_all_steps(tmp_path):
    log = logged(tmp_path, 3)
    log.resume(0)
    log.metrics(record(1))
    assert [found["step"] for found in read_metrics(tmp_path)] == [1]


def test_tensorboard_gets_every_step_once_through_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, tensorboard=True)
    for step in range(1, 6):
        log.metrics(record(step, noise_scale=None, noise_scale_layers={"norm": 2.0 * step}))
    log.resume(3)
    log.metrics(record(4, noise_scale_layers={"norm": 80.0}))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [scalar.value for scalar in events.Scalars("noise_scale_layers/norm")] == [2.0, 4.0, 6.0, 80.0]
    assert "noise_scale" not in events.Tags()["scalars"]


def test_missing_tensorboard_is_reported_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunLog(tmp_path)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path, tensorboard=True)


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent/metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(UserError, match=r"events\.jsonl does not exist"):
        read_events(tmp_path)
    RunLog(tmp_path).close()
    with pytest.raises(UserError, match="holds no step yet"):
        read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be created"):
        RunLog(tmp_path / "file")


def test_an_old_log_has_the_norm_layers_noise_scale_alone(tmp_path):
    """The whole model's follows from the run's own ratio, or from what it was by default."""
    log = RunLog(tmp_path)
    log.metrics(record(1, noise_scale=3.0))
    log.metrics(record(2, noise_scale=3.0, noise_scale_total=5.0))
    log.close()
    for config, derived in (
        ("", 4.2),
        ("[batch]\nnoise_to_total = 2.0\n", 6.0),
        ("[batch]\nnoise_to_total = []\n", 4.2),
    ):
        (tmp_path / "config.toml").write_text(config)
        assert read_run(tmp_path).column("noise_scale_total").tolist() == pytest.approx([derived, 5.0])


def test_a_run_is_read_whole(tmp_path):
    logged(tmp_path, 2).close()
    assert read_run(tmp_path).baselines == {} and read_run(tmp_path).config == ""
    (tmp_path / "config.toml").write_text("[model]\n")
    (tmp_path / "baselines.json").write_text('{"unigram": 7.5}')
    run = read_run(tmp_path)
    assert (run.name, run.config, run.baselines) == (tmp_path.name, "[model]\n", {"unigram": 7.5})
    assert run.column("tokens").tolist() == [512.0, 1024.0]
    assert all(map(math.isnan, run.column("mfu")))
    (tmp_path / "baselines.json").write_text('{"unigram": ')
    with pytest.raises(UserError, match=r"baselines\.json is not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "baselines.json").write_text('{"unigram": "low"}')
    with pytest.raises(UserError, match=r"baselines\.json holds something other than numbers"):
        read_run(tmp_path)
