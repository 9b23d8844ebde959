"""The command that writes run files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megahp import cli
from megahp.config import config_to_dict, resolve
from megahp.data.indexed import IndexedWriter
from megahp.errors import UserError
from megahp.exit_codes import USER_ERROR
from megahp.parallel.layout import fit
from megahp.plan.machine import load_machine
from megahp.plan.search import search
from megahp.plan.step_time import estimate
from megahp.recipe import law_file
from megahp.recipe.law_file import LossLaw, PowerLaw
from megahp.train.prepare import check_batch


def run(words: str) -> int:
    return cli.main(["recipe", *words.split()])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "nothing is too little to determine a run; give two of --params"),
        ("--tokens 1e9", "--tokens is too little"),
        ("--tpp 20", "--tpp is too little"),
        ("--params 1e9 --tokens 1e9 --tpp 20", "--params --tokens --tpp is too much"),
        ("--params 1e9 --width 512 --layers 8", "--params --params is too much"),
        ("--flops 1e20 --target-loss 2.5", "--flops --target-loss is too much"),
        ("--flops 1e20 --days 3 --gpus 8 --gpu H100", "--flops --flops is too much"),
        ("--days 3 --gpu H100", "--days 3 needs --gpus"),
        ("--days 3 --gpus 8", "--days 3 needs --gpus, and --gpu or --peak-flops"),
        ("--params 1e9 --gpus 8 --mfu 0.5", "--mfu 0.5 is a share of a peak; add --gpu"),
        ("--params 1e9 --mfu 0.5", "no effect without --gpus"),
        ("--params 1e9 --gpus 8 --gpu V200", "--gpu V200 is unknown; choose from a100-40, a100-80, b200"),
        ("--params 1e9 --gpus 8 --gpu H100 --peak-flops 1e15", "--gpu and --peak-flops"),
        ("--target-loss 1.8", "--target-loss 1.8 is not above 1.817, the floor of the loss law"),
        ("--target-loss 11", "--target-loss 11 is not below ln 50257 = 10.82"),
        ("--params 1X --tokens 1B", "argument --params: '1X' is no number; write one such as 1.5e9, 300M or 1B"),
        ("--params M", "argument --params: 'M' is no number"),
        ("--target-loss 2 --params 1e8", "--target-loss 2 is not reached with 1.02e+08 parameters"),
        ("--target-loss 2 --tokens 1e8", "--target-loss 2 is not reached with these tokens"),
        ("--params 1e9 --tokens 1000", "train.tokens = 1000 is less than one batch"),
        ("--params 1e9 --tokens 1e6 --batch 4096", "train.tokens = 1000000 is less than one batch of 4096 x 2048"),
        ("--params 1e9 --law steplaw", "--law steplaw is neither a law nor a law file; did you mean step-law?"),
        ("--params 1e9 --loss-law kaplan", "the laws are: hoffmann-rounded, hoffmann, besiroglu, gadre"),
        ("--params -1", "--params -1 must be above 0"),
        ("--params nan --tokens 1e9", "--params nan must be above 0"),
        ("--params 1e9 --tokens inf", "--tokens inf must be above 0"),
        ("--params 1e9 --density 1.5", "--density 1.5 must be above 0 and at most 1"),
        ("--flops 1e20 --density 0.5", "--density needs a given size and data"),
        ("--params 1e9 --batch 0", "--batch 0 must be above 0"),
        ("--params 1e9 --batch 30 --gpus 8 --gpu H100", "--batch 30 cannot be divided over 8 data-parallel ranks"),
        ("--params 1e9 --width 1000", "--width 1000 is not a multiple of the head size 64; the nearest are 960, 1024"),
        ("--params 1e9 --epochs 8", "--epochs counts how often data is read; name prefixes that are there in --data"),
        ("--params 1e9 --epochs 8 --data none", "name prefixes that are there in --data, or --tokens"),
        ("--params 1e9 --epochs 8 --tokens 1e9", "--epochs and --tokens both set the tokens; remove one"),
        ("--params 1e5", "no shape has about 1e+05 parameters"),
        ("--params 1e9 --vocab-size 0", "--vocab-size 0 must be above 0"),
        ("--preset lama --tpp 20", "--preset lama is unknown"),
        ("--preset llama-2-7b --tpp 20 --width 512", "remove --width and --layers"),
        ("--params 1e9 --base nowhere.toml", "nowhere.toml does not exist"),
        ("--params 1e9 --tokenizer nowhere.model", "nowhere.model"),
        ("--params 1e9 --pareto new.png", "give --target-loss"),
        ("--params 1e9 --out run.toml", "--out would replace 'run.toml', which megahp did not write"),
        ("--params 1e9 --out nowhere/new.toml", "--out nowhere/new.toml cannot be written"),
        ("--target-loss 2.6 --pareto nowhere/new.png", "nowhere/new.png cannot be written"),
        ("--target-loss 2.6 --pareto new.xyz", "new.xyz cannot be drawn"),
    ],
)
def test_a_mistake_is_one_line(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("")
    try:
        code = run(words)
    except SystemExit as end:  # an option's mistake, below its usage
        code = end.code
    output = capsys.readouterr()
    assert code == USER_ERROR and not output.out
    assert told in output.err and len(output.err.split("megahp recipe: error: ")[-1].splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("[parameterization]\nname = 'sp'", "transfers nothing"),
        ("[sparsity]\nmethod = 'static'\ndensity = 0.5", "laws are of dense models"),
    ],
)
def test_a_base_must_transfer(section: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.toml").write_text(section)
    assert run(f"--params 1e8 --base {tmp_path / 'base.toml'}") == USER_ERROR
    assert told in capsys.readouterr().err


def test_a_law_file_takes_the_place_of_power_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its critical batch is the run's too; what it lacks is Power Lines', whose rows say so."""
    critical = PowerLaw(40.0, 0.5, "my runs", "fitted", fitted=(1e6, 1e12), draws=((39.0, 0.5), (41.0, 0.5)))
    tau = PowerLaw(0.5, -0.3, "my decays", "fitted")
    loss = LossLaw(1.5, 300.0, 900.0, 0.33, 0.33, "my losses", "fitted", draws=((1.4, 300.0, 900.0, 0.33, 0.33),) * 9)
    law_file.write(tmp_path / "laws.toml", law_file.LawFile(loss=loss, timescale=tau, critical_batch=critical))
    out = tmp_path / "run.toml"
    assert run(f"--params 1e9 --law {tmp_path / 'laws.toml'} --json --out {out}") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in printed["rows"]}
    assert rows["B_crit, sequences"]["source"] == "my runs" and "Power Lines" in rows["B_opt, sequences"]["source"]
    assert "10 % to 90 %" in rows["loss, nats per token"]["formula"] and "my losses" in str(
        rows["loss, nats per token"]
    )
    written = resolve.load(out).config
    assert written.batch.critical_batch == (40.0, 0.5)
    batch, decay = written.batch.global_batch * 2048, rows["weight decay, hidden"]["value"]
    timescale = batch / (rows["peak LR, hidden matrices"]["value"] * decay * written.train.tokens)
    assert timescale == pytest.approx(0.5 * rows["tokens per parameter"]["value"] ** -0.3)
    assert json.loads(json.dumps(config_to_dict(written))) == printed["run"]
    law_file.write(tmp_path / "loss.toml", law_file.LawFile(loss=loss))
    for words in ("", f"--loss-law {tmp_path / 'loss.toml'}"):  # as docs/fit.md names one file twice
        assert run(f"--params 1e9 --law {tmp_path / 'loss.toml'} --json {words}") == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
        assert rows["loss, nats per token"]["source"] == "my losses" and "Power Lines" in rows["tau_opt"]["source"]


def test_epochs_are_of_the_training_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 40 documents a tenth is held out; and what is repeated often is told."""
    with IndexedWriter(str(tmp_path / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document([1] * 2500)
    (tmp_path / "base.toml").write_text("[data]\nvalidation_fraction = 0.1\nsequence_length = 32\n")
    data = f"--data {tmp_path / 'corpus'} --tokenizer bytes --base {tmp_path / 'base.toml'}"
    assert run(f"--params 1M --epochs 16 {data} --json") == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["rows"] if row["name"] == "tokens"]
    assert row["value"] == pytest.approx(16 * 90_000, rel=0.01) and row["formula"] == "16 epochs of the data"
    assert any("is read 16.0 times" in note and "optimizer.weight_decay" in note for note in found["notes"])


@pytest.mark.parametrize("words", ["--params 1e9 --tokens 2e10", "--params 1B --tokens 20b", "--params 1000M --tpp 20"])
def test_numbers_as_people_write_them_and_the_run_s_name(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{words} --json") == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert found["log"]["name"] in ("1B-20B", "1B-19.7B") and 1.97e10 < found["train"]["tokens"] <= 2e10
    assert run(f"{words} --out {tmp_path / 'mine.1.toml'}") == 0
    assert resolve.load(tmp_path / "mine.1.toml").config.log.name == "mine.1"


def test_a_run_file_saves_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty at least, and on a cluster one every 30 minutes; as the base says where it does."""

    def plan(words: str) -> tuple[int, int, float]:
        assert run(f"--json {words}") == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["name"]: row["value"] for row in found["rows"]}
        return found["run"]["checkpoint"]["every"], rows["steps"], 86_400 * rows.get("days", 0)

    every, steps, seconds = plan("--params 1B --tokens 20B")
    assert steps / 20 >= every > 0.9 * steps / 20 and not seconds
    every, steps, seconds = plan("--params 1B --tokens 20B --gpus 2 --gpu A100")
    assert 0.9 * 1800 < every * seconds / steps <= 1800
    every, steps, _ = plan("--params 1M --tokens 8192 --tokenizer bytes --sequence-length 64")
    assert every == 1 and steps < 20
    (tmp_path / "base.toml").write_text("[checkpoint]\nevery = 7\n")
    assert plan(f"--params 100M --base {tmp_path / 'base.toml'}")[0] == 7


def test_beyond_a_law_s_reach_no_number_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--params 1M --tokens 8192 --tokenizer bytes --sequence-length 64 --json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["loss, nats per token"]["value"] == "unknown" and rows["steps saved"]["value"] == "none"
    assert "the law gives 83.02, and guessing 5.549 = ln 257" in found["notes"][0] and "megahp fit" in found["notes"][0]
    assert run("--params 1e9 --json") == 0
    assert not any("guessing" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_epochs_over_the_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with IndexedWriter("mine", 257) as writer:
        for _ in range(100):
            writer.add_document([7] * 1000)
    assert run("--params 100M --data mine --tokenizer bytes") == 0
    assert "data.validation_fraction = 0.01 holds out 1,000 tokens" in " ".join(capsys.readouterr().out.split())
    assert run("--params 100M --data mine --tokenizer bytes --sequence-length 512") == 0
    assert "'mine' is read 20," in " ".join(capsys.readouterr().out.split())
    assert run("--params 100M --data absent --tokenizer bytes") == 0  # to be written yet


@pytest.mark.parametrize(
    ("words", "told"),
    [("--params 100M --tpp 30", "days on"), ("--params 3e12", "GB of memory, of which there are"), ("--params 1M", "")],
)
def test_a_plan_beyond_this_machine_names_what_it_trains(
    words: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def notes(words: str) -> list[str]:
        assert run(f"{words} --vocab-size 4096 --sequence-length 256 --json") == 0
        return [note for note in json.loads(capsys.readouterr().out)["notes"] if "for a cluster give --gpus" in note]

    found = notes(words)
    assert len(found) == bool(told) and told in "".join(found)
    if told:
        smaller = re.search(r"--params \S+ --tpp \d+", found[0])
        assert smaller and notes(smaller[0]) == [] and notes(f"{words} --gpus 8 --peak-flops 989e12") == []


@pytest.mark.parametrize("words", ["--tpp 20", "--tpp 20 --mfu 0.5", "--preset llama-2-7b --tokens 1e10"])
def test_a_gpu_gets_the_layout_that_a_plan_finds(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fits, and none is faster by a tenth (its batch is rounded only once the layout is chosen); days by its
    utilisation, unless another is given."""
    size = "" if "preset" in words else "--params 3e8 "
    assert run(f"{size}{words} --gpus 16 --gpu A100-40 --json --out {tmp_path / 'run.toml'}") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    resolved = resolve.load(tmp_path / "run.toml")
    machine, layout = load_machine("a100-40"), fit(resolved.config.parallel, 16)
    chosen, best = estimate(resolved.config, 16, machine), search(resolved.config, 16, machine).fitting[0]
    assert chosen.bytes <= machine.usable and chosen.seconds <= 1.1 * best.estimate.seconds
    assert rows["layout"]["source"] == "megahp plan"
    check_batch(resolved.config, layout, resolved.config.batch.global_batch)
    share = 0.5 if "--mfu" in words else chosen.mfu
    assert float(re.findall(r"x ([\d.]+) MFU", rows["days"]["formula"])[0]) == pytest.approx(share, rel=0.1)


def test_a_run_file_is_replaced_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    for tokens in ("1M", "2M --overwrite"):
        assert run(f"--params 1M --tokenizer bytes --sequence-length 64 --out {out} --tokens {tokens}") == 0
    assert resolve.load(out).config.train.tokens == 2e6


@pytest.mark.parametrize("tokens", ["150k", "300k", "600k", "5M", "50M", "2B"])
def test_the_batch_is_one_that_ranks_can_share(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of them where no cluster is given, however odd B_opt is; as many as are given; and it is said."""
    for words, ranks in (("", 2), ("--gpus 3", 3)):
        assert run(f"--params 1M --tokens {tokens} --tokenizer bytes --sequence-length 1024 --json {words}") == 0
        found = json.loads(capsys.readouterr().out)
        config = resolve.from_dict(found["run"], "recipe")
        check_batch(config, fit(config.parallel, ranks), config.batch.global_batch)
        wanted = next(row["value"] for row in found["rows"] if row["name"] == "B_opt, sequences")
        off = abs(config.batch.global_batch / wanted - 1)
        assert off <= 0.26 or ranks == 3
        assert any("rounded to" in note for note in found["notes"]) == (off > 0.05)


def test_a_batch_that_ranks_cannot_share_names_the_microbatch_that_could() -> None:
    config = resolve.resolve([("run.toml", {"batch": {"global_batch": 24, "micro_batch": 8}})]).config
    with pytest.raises(UserError, match="nearest valid: 16, 32; or set batch.micro_batch=4"):
        check_batch(config, fit(config.parallel, 2), 24)
    with pytest.raises(UserError, match="nearest valid: 20, 25$"):  # which no microbatch helps
        check_batch(replace(config, batch=replace(config.batch, micro_batch=1)), fit(config.parallel, 5), 24)


def test_a_base_s_horizon_and_size_are_said_where_they_were_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.toml"
    base.write_text("[model]\nwidth = 128\nlayers = 2\nheads = 2\n[train]\ntokens = 1_000_000\n")

    def notes(words: str) -> list[str]:
        assert run(f"{words} --base {base} --sequence-length 256 --json") == 0
        return [note for note in json.loads(capsys.readouterr().out)["notes"] if "base.toml was tuned at" in note]

    assert notes("--width 128 --layers 4 --tokens 1.5M") == []
    (tokens,) = notes("--width 128 --layers 4 --tokens 20M")
    assert "tuned at 1M tokens, and 20M are 20 times as many" in tokens and "transfer over tokens" in tokens
    (tokens,) = notes("--width 128 --layers 4 --tokens 250k")
    assert "are 1/4 as many" in tokens
    (size,) = notes("--width 1024 --layers 8 --tokens 1M")
    assert "parameters" in size and "the parameterization's extrapolation" in size
    assert notes("--width 128 --layers 4 --tokens 20M --law step-law") == []  # which takes nothing from it


def test_a_tuned_run_is_a_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        '[model]\nwidth = 64\nheads = 2\nlayers = 3\nbias = true\nnorm = "layernorm"\n'
        '[parameterization]\nbase_width = 64\nbase_layers = 3\n[data]\ntrain = ["mine"]\nsequence_length = 128\n'
        "[optimizer]\nlr = 1e-2\nbeta2 = 0.9\n[train]\ntokens = 1e6\nsteps = 3\nseed = 7\n[batch]\nmicro_batch = 2\n"
        '[schedule]\nname = "cosine"\n[log]\nname = "tuned"\n'
    )
    assert run(f"--params 1e7 --base {tmp_path / 'base.toml'} --out {tmp_path / 'run.toml'}") == 0
    found = resolve.load(tmp_path / "run.toml").config
    assert (found.parameterization.base_width, found.optimizer.lr, found.optimizer.beta2) == (64, 1e-2, 0.9)
    assert (found.model.head_size, found.model.bias, found.model.norm, found.model.vocab_size) == (
        32,
        True,
        "layernorm",
        257,
    )
    assert (found.data.train, found.data.sequence_length, found.train.seed) == (("mine",), 128, 7)
    assert (found.train.steps, found.schedule.name, found.batch.policy) == (0, "decay-to-zero", "measured")
    assert cli.main(f"recipe --preset debug --tpp 20 --base {tmp_path / 'base.toml'}".split()) == 0  # of no vocabulary
    assert found.batch.micro_batch <= 2 and found.log.name != "tuned" and found.model.width > 64


def test_the_run_file_trains_and_the_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with IndexedWriter("corpus", 257) as writer:
        for _ in range(100):
            writer.add_document(list(b"some text, again and again " * 8))
    words = "--params 1e6 --tokens 2e5 --tokenizer bytes --data corpus --sequence-length 64 --out run.toml --compare"
    assert run(words) == 0
    assert run("--target-loss 2.6 --pareto pareto.png") == 0
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    config = resolve.load("run.toml")
    assert config.origins["data.train"] == "run.toml" and config.config.data.train == ("corpus",)
    command = [sys.executable, "-m", "megahp", "train", "run.toml", "train.steps=2", "train.validation_samples=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len((config.config.directory / "metrics.jsonl").read_text().splitlines()) == 2
