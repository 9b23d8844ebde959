"""Recipes: the papers' own runs, every way to say a size, every mistake, and a run file that trains."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megahp import cli, config
from megahp.config import resolve
from megahp.data.indexed import IndexedWriter
from megahp.errors import UserError
from megahp.exit_codes import USER_ERROR
from megahp.recipe import law_file, pareto
from megahp.recipe import rows as recipe_rows
from megahp.recipe import text as recipe_text
from megahp.recipe.law_file import LossLaw, PowerLaw
from megahp.recipe.loss_laws import LOSS_LAWS
from megahp.recipe.recipe import PROXY, Laws, Plan, plan, steps_of
from megahp.recipe.sizing import Given
from megahp.scaling import power_laws
from megahp.scaling.batch import BatchPlan, Progress
from megahp.scaling.parameterization import Role

LAWS = Laws(LOSS_LAWS["besiroglu"])


def of(laws: Laws = LAWS, preset: str = "", **given: float) -> Plan:
    return plan(Given(**given), replace(PROXY, preset=preset), laws)


def value(found: Plan, name: str) -> float | str:
    return next(row.value for row in recipe_rows.rows(found) if row.name == name)


# Parameters, tokens and, at this batch, weight decay of hidden matrices and D_min.
PAPERS = [
    ("power-lines-111m", (768, 10), 111e6, 2.19e9, 192, None, None),
    ("power-lines-610m", (2048, 10), 610e6, 12.1e9, 504, 0.18844, 9.5902e9),
    ("power-lines-610m", (2048, 10), 610e6, 12.1e9, 2016, 0.75374, 5.0162e9),
    ("power-lines-610m", (2048, 10), 610e6, 48.5e9, 504, 0.09761, 4.2882e10),
    ("power-lines-3.3b", (2048, 64), 3.3e9, 66.5e9, 1024, None, None),
]


@pytest.mark.parametrize(("preset", "shape", "size", "tokens", "batch", "decay", "least"), PAPERS)
def test_power_lines_own_runs(
    preset: str,
    shape: tuple[int, int],
    size: float,
    tokens: float,
    batch: int,
    decay: float | None,
    least: float | None,
) -> None:
    """Checks 1 to 6: a plan of their shape, tokens and batch has their rate, decay, timescale and batches."""
    found = of(preset=preset, width=shape[0], layers=shape[1], tokens=tokens, batch=batch)
    assert found.parameters == pytest.approx(size, rel=0.02)
    assert found.lr == pytest.approx(1.62e-2 * 256 / shape[0])
    tpp, batch_tokens = tokens / found.parameters, batch * 2048
    tau = power_laws.timescale(found.lr, found.weight_decay, batch_tokens, tokens)
    assert tau == pytest.approx(1.084 * tpp**-0.527) == value(found, "tau_opt")
    if decay and least:
        assert found.weight_decay == pytest.approx(decay, rel=5e-3)  # theirs is of 20 or 80 TPP, not of 19.9
        assert found.least_tokens == pytest.approx(least, rel=1e-3)
    assert value(found, "B_opt, sequences") == pytest.approx(0.0306 * tokens**0.383)
    assert value(found, "B_crit, sequences") == pytest.approx(0.0471 * found.least_tokens**0.462)
    rule = found.table.rules[Role.HIDDEN]
    assert rule.lr * rule.weight_decay == pytest.approx(1, abs=1e-12)  # so eta lambda is the base's at any size
    assert found.run.optimizer.weight_decay * shape[0] / 256 == pytest.approx(found.weight_decay)
    assert value(found, "init std, hidden matrices") == pytest.approx(0.0867 / math.sqrt(shape[0] / 256))


def test_at_its_base_the_plan_is_the_proxy() -> None:
    """Check 12: no multiplier, so CompleteP there is muP, under which it was tuned."""
    found = of(width=256, layers=24, tokens=800e6, batch=256)
    rule = found.table.rules[Role.HIDDEN]
    assert (rule.init_std, rule.lr, rule.weight_decay, rule.eps, found.table.residual) == (1, 1, 1, 1, 1)
    assert found.parameters == pytest.approx(39e6, rel=0.2) and found.table.attention == 1 / 64


def test_each_sufficient_subset_gives_the_same_run() -> None:
    first = of(params=3e8, tokens=9e9)
    n, d, loss = first.parameters, first.tokens, LAWS.loss(first.parameters, first.tokens)
    ways: list[dict[str, float]] = [
        {"params": n, "tpp": d / n},
        {"params": n, "flops": 6 * n * d},
        {"params": n, "target_loss": loss},
        {"width": first.run.model.width, "layers": first.run.model.layers, "tokens": d},
        {"tokens": d, "tpp": d / n},
        {"tokens": d, "flops": 6 * n * d},
        {"tokens": d, "target_loss": loss},
        {"tpp": d / n, "flops": 6 * n * d},
        {"tpp": d / n, "target_loss": loss},
    ]
    for way in ways:
        found = of(**way)
        assert found.run.model == first.run.model, way
        assert found.tokens == pytest.approx(d, rel=1e-6), way
    assert of(params=n).tokens == pytest.approx(20 * n)


def test_compute_and_loss_alone_are_spent_as_the_law_has_it() -> None:
    for law in (LOSS_LAWS["besiroglu"], LOSS_LAWS["hoffmann-rounded"]):
        flops = of(Laws(law), flops=1e21)
        assert 6 * flops.parameters * flops.tokens == pytest.approx(1e21, rel=1e-6)
        assert flops.parameters == pytest.approx(law.optimum(1e21)[0], rel=0.05)
        loss = law(flops.parameters, flops.tokens)
        target = of(Laws(law), target_loss=loss)
        assert law(target.parameters, target.tokens) == pytest.approx(loss, rel=1e-6)
        assert 6 * target.parameters * target.tokens == pytest.approx(1e21, rel=0.02)
    days = of(days=10, gpus=64, peak_flops=989e12, mfu=0.5)
    assert value(days, "days") == pytest.approx(10, rel=1e-6)
    assert value(days, "FLOPs, exact") == pytest.approx(10 * 86400 * 64 * 989e12 * 0.5, rel=1e-6)


@pytest.mark.parametrize("wanted", [5e7, 3e8, 1.5e9, 7e10])
def test_shapes_have_the_size_and_completep_s_ratio(wanted: float) -> None:
    found = of(params=wanted)
    model = found.run.model
    assert found.parameters == pytest.approx(wanted, rel=0.05)
    assert model.width / model.layers == pytest.approx({5e7: 40, 3e8: 50, 1.5e9: 62}.get(wanted, 100), rel=0.3)
    assert model.width == model.heads * 64 and (model.width % 128 == 0 or model.width < 512)
    assert model.mlp_width == resolve.mlp_width("swiglu", model.width)
    assert of(params=wanted, layers=20).run.model.layers == 20
    assert wanted > 1e9 or of(params=wanted, width=448).run.model.width == 448


def test_a_preset_s_proportions_are_kept_at_another_size() -> None:
    llama = replace(PROXY, told={"model": {"width": 512, "heads": 8, "kv_heads": 2, "mlp_width": 1792}})
    model = plan(Given(params=3e8), llama, LAWS).run.model
    assert model.heads == 4 * model.kv_heads and model.mlp_width == pytest.approx(3.5 * model.width, abs=32)


@pytest.mark.parametrize(
    "given",
    [
        {"params": 5e7},
        {"params": 6e8, "gpus": 24, "peak_flops": 1e15},
        {"params": 2e7, "tpp": 300},
        {"params": 1e7, "batch": 24},
    ],
)
def test_steps_are_those_the_batch_plan_takes(given: dict[str, float]) -> None:
    found = of(**given)
    batches, progress = BatchPlan(found.run, found.ranks), Progress()
    while step := batches.step(progress):
        progress = progress.after(step)
        batches.look(progress, None)
    assert steps_of(found.run, found.ranks) == found.steps == progress.step
    assert found.run.batch.global_batch % (found.ranks * found.run.batch.micro_batch) == 0


def test_the_growing_batch_saves_steps_for_a_fifth_more_data() -> None:
    found = of(params=6e8)
    first = 0.2 * power_laws.critical_batch_along(0.01 * found.tokens) / 2048
    assert found.run.batch.global_batch == pytest.approx(first, abs=found.run.batch.micro_batch / 2)
    assert found.steps < 0.7 * found.tokens / power_laws.OPTIMAL_BATCH(found.tokens)
    assert found.tokens / found.least_tokens == pytest.approx(1.2, abs=0.04)


def test_every_row_has_source_and_confidence_and_fits() -> None:
    for given in (
        {"params": 1e9, "density": 0.5},
        {"params": 1e7, "gpus": 8, "peak_flops": 1e15},
        {"target_loss": 2.4},
    ):
        for rule in ("power-lines", "step-law", "deepseek"):
            found = of(Laws(LOSS_LAWS["hoffmann"], rule=rule), **given)
            rows = recipe_rows.rows(found)
            assert len(rows) > 30 and all(row.formula and row.source and row.confidence for row in rows)
            text = recipe_text.table(rows, recipe_rows.notes(found))
            text += "\n" + recipe_text.comparison(recipe_rows.choices(found))
            assert max(map(len, text.splitlines())) <= 120
            assert found.run == resolve.from_dict(json.loads(json.dumps(config.to_dict(found.run))), "again")


def test_outside_a_law_s_range_is_said() -> None:
    inside, outside = of(params=6.1e8, tpp=30), of(params=1e8, tokens=3e8)
    assert recipe_rows.notes(inside) == []
    told = "\n".join(recipe_rows.notes(outside))
    for words in ("loss: D = 3e+08", "tau_opt: TPP = 2.9", "B_opt: D", "B_crit: D_min"):
        assert words in told
    assert (
        "llama-3-8b is swiglu rmsnorm rope"
        in recipe_rows.notes(of(preset="llama-3-8b", width=4096, layers=32, tpp=20))[-1]
    )


def test_other_rules_give_rate_and_batch_and_leave_the_rest_open() -> None:
    found = of(Laws(LAWS.loss, rule="step-law"), width=2048, layers=16, tokens=1e11)
    n = found.outside_embeddings
    assert found.run.parameterization.name == "sp" and found.run.batch.policy == "constant"
    assert found.lr == found.run.optimizer.lr == pytest.approx(1.79 * n**-0.713 * 1e11**0.307)
    assert found.run.batch.global_batch * 2048 == pytest.approx(1_107_715, rel=0.01)
    assert found.run.optimizer.weight_decay == 0.1 and value(found, "weight decay") == 0.1
    names = [choice.rule for choice in recipe_rows.choices(found)]
    assert names == ["megahp, step-law", "deepseek", "nanochat-like", "olmo-ladder"]


def test_a_density_of_1_is_a_dense_plan() -> None:
    """Check 29: L(N_avg) is Chinchilla's L for a constant N."""
    dense, same = recipe_rows.rows(of(params=1e9)), recipe_rows.rows(of(params=1e9, density=1.0))
    assert same == dense


def test_gpus_that_the_layout_cannot_use_are_refused() -> None:
    piped = replace(PROXY, tree={**PROXY.tree, "parallel": {"pp": 4}})
    with pytest.raises(UserError, match="--gpus 6 is no multiple of the 4 .* 4, 8"):
        plan(Given(params=1e9, tokens=2e10, gpus=6, peak_flops=1e15), piped, LAWS)


def test_a_base_with_a_pipeline_tells_its_bubble() -> None:
    """Eight ranks, one of data parallelism, and a batch of so many microbatches of one sequence."""
    piped = replace(PROXY, tree={**PROXY.tree, "parallel": {"pp": 8}})
    found = plan(Given(params=1e9, tokens=2e10, batch=64, gpus=8, peak_flops=1e15), piped, LAWS)
    microbatches = 64 // found.run.batch.micro_batch
    assert value(found, "pipeline bubble") == f"{7 / microbatches:.1%}"
    assert "pipeline bubble" not in [row.name for row in recipe_rows.rows(of(params=1e9))]


def test_pruning_has_the_loss_of_its_average_density() -> None:
    dense, pruned = of(params=1e9), of(params=1e9, density=0.5)
    average = dense.parameters - dense.outside_embeddings * (1 - 0.6929)
    assert value(pruned, "N_avg") == pytest.approx(average, rel=1e-3)
    loss = float(str(value(pruned, "loss, nats per token")).split()[0])
    assert loss == pytest.approx(LAWS.loss(average, pruned.tokens), abs=1e-3)
    assert (pruned.run.sparsity.method, pruned.run.sparsity.density) == ("gradual", 0.5)
    assert dense.run.sparsity.method == "none"


def test_the_frontier_is_what_nothing_beats() -> None:
    """Against comparing each with each; Power Lines: below 20 tokens per parameter all are beaten."""
    loss, critical = LAWS.loss, power_laws.CRITICAL_BATCH
    found = pareto.frontier(2.6, loss, critical, points=60)
    least = [power_laws.least_tokens(d, b, critical) for d, b in zip(found.tokens, found.batch, strict=True)]
    assert loss(found.parameters, np.array(least)) == pytest.approx(2.6)
    assert found.compute == pytest.approx(6 * found.parameters * found.tokens)
    assert found.time == pytest.approx(found.parameters * found.tokens / found.batch)
    rng = np.random.default_rng(0)
    n = rng.uniform(2.5e8, 4e9, 2000)
    d_min = (loss.b / (2.6 - loss.floor - loss.a / n**loss.alpha)) ** (1 / loss.beta)
    share = 10 ** rng.uniform(-2, 1, 2000)
    compute, time = 6 * n * d_min * (1 + share), n * d_min / critical(d_min) * (1 + 1 / share)
    beaten = (found.compute[:, None] > 1.02 * compute) & (found.time[:, None] > 1.02 * time)
    assert not beaten.any()
    ratio = found.tokens / found.parameters
    assert 18 < ratio.min() < 27 and (np.diff(found.time) < 0).all()


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
        ("--days 3 --gpu H100", "--days needs --gpus"),
        ("--params 1e9 --gpus 8", "--gpus needs --gpu or --peak-flops"),
        ("--params 1e9 --mfu 0.5", "no effect without --gpus"),
        ("--params 1e9 --gpus 8 --gpu V200", "--gpu V200 is unknown; there are A100, H100, H200, B200"),
        ("--params 1e9 --gpus 8 --gpu H100 --peak-flops 1e15", "--gpu and --peak-flops"),
        ("--target-loss 1.8", "--target-loss 1.8 is not above 1.817, the floor of the loss law"),
        ("--target-loss 2 --params 1e8", "--target-loss 2 is not reached with 1.02e+08 parameters"),
        ("--target-loss 2 --tokens 1e8", "--target-loss 2 is not reached with these tokens"),
        ("--params 1e9 --tokens 1000", "train.tokens = 1000 is less than one batch"),
        ("--params 1e9 --tokens 1e6 --batch 4096", "train.tokens = 1000000 is less than one batch of 4096 x 2048"),
        ("--params 1e9 --law steplaw", "--law steplaw is no law and no law file; did you mean step-law?"),
        ("--params 1e9 --loss-law kaplan", "there are: hoffmann-rounded, hoffmann, besiroglu, gadre"),
        ("--params -1", "--params -1 must be above 0"),
        ("--params nan --tokens 1e9", "--params nan must be above 0"),
        ("--params 1e9 --tokens inf", "--tokens inf must be above 0"),
        ("--params 1e9 --density 1.5", "--density 1.5 must be above 0 and at most 1"),
        ("--flops 1e20 --density 0.5", "--density needs a given size and data"),
        ("--params 1e9 --batch 0", "--batch 0 must be above 0"),
        ("--params 1e9 --batch 30 --gpus 8 --gpu H100", "--batch 30 cannot be shared out over 8 data-parallel ranks"),
        (
            "--params 1e9 --width 1000",
            "--width 1000 is not a multiple of the head size 64; nearest that are: 960, 1024",
        ),
        ("--params 1e5", "no shape has about 1e+05 parameters"),
        ("--params 1e9 --vocab-size 0", "--vocab-size 0 must be above 0"),
        ("--preset lama --tpp 20", "--preset lama is unknown"),
        ("--preset llama-2-7b --tpp 20 --width 512", "leave out --width and --layers"),
        ("--params 1e9 --base nowhere.toml", "nowhere.toml does not exist"),
        ("--params 1e9 --tokenizer nowhere.model", "nowhere.model"),
        ("--params 1e9 --pareto new.png", "give --target-loss"),
        ("--params 1e9 --out run.toml", "--out run.toml exists"),
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
    assert run(words) == USER_ERROR
    output = capsys.readouterr()
    assert told in output.err and len(output.err.splitlines()) == 1 and not output.out
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("[parameterization]\nname = 'sp'", "transfers nothing"),
        ("[model]\nexperts = 4", "laws here are of dense models"),
        ("[sparsity]\nmethod = 'static'\ndensity = 0.5", "laws here are of dense models"),
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
    law_file.write(tmp_path / "laws.toml", law_file.Laws(loss=loss, timescale=tau, critical_batch=critical))
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
    assert json.loads(json.dumps(config.to_dict(written))) == printed["run"]
    law_file.write(tmp_path / "loss.toml", law_file.Laws(loss=loss))
    assert run(f"--params 1e9 --law {tmp_path / 'loss.toml'}") == USER_ERROR
    assert "--loss-law" in capsys.readouterr().err


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
    assert (found.train.steps, found.schedule.name, found.batch.policy) == (0, "decay-to-zero", "law")
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
    settings = resolve.load("run.toml")
    assert settings.origins["data.train"] == "run.toml" and settings.config.data.train == ("corpus",)
    command = [sys.executable, "-m", "megahp", "train", "run.toml", "train.steps=2", "train.validation_samples=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len((settings.config.directory / "metrics.jsonl").read_text().splitlines()) == 2
