"""The settings: which there are, where a value comes from, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from megahp import config
from megahp.config import resolve
from megahp.config.presets import PRESETS
from megahp.config.schema import FIELDS
from megahp.errors import UserError
from megahp.parallel.layout import Layout, fit

# A setting is a promise: adding one means adding it here, and to the changelog.
SETTINGS = """
model.preset model.layers model.width model.heads model.kv_heads model.head_size model.mlp_width model.activation
model.norm model.norm_eps model.positions model.rope_theta model.bias model.qk_norm model.tied_embeddings
model.experts model.experts_per_token model.expert_width model.shared_experts model.dense_layers
model.router_score model.router_normalize model.router_scale model.balance_rate model.balance_loss model.vocab_size
parameterization.name parameterization.base_width parameterization.base_layers parameterization.depth_alpha
parameterization.init_std parameterization.embedding_multiplier parameterization.output_multiplier
data.train data.weights data.mixtures data.tokenizer data.sequence_length data.lengths data.validation_fraction
data.mask_documents data.cache
schedule.name schedule.start schedule.warmup schedule.floor schedule.decay schedule.shape
batch.policy batch.global_batch batch.micro_batch batch.largest batch.rule batch.increment batch.ramp_samples
batch.table batch.target batch.critical_batch batch.noise_to_total batch.look_every batch.delay batch.hysteresis
batch.growth
optimizer.name optimizer.lr optimizer.weight_decay optimizer.beta1 optimizer.beta2 optimizer.eps
optimizer.muon_lr optimizer.momentum optimizer.clip optimizer.engine
sparsity.method sparsity.density sparsity.layers sparsity.begin sparsity.end sparsity.drop sparsity.every
parallel.tp parallel.pp parallel.schedule parallel.stages_per_rank parallel.split parallel.cp parallel.ep
parallel.dp_replicate parallel.dp_shard parallel.sequence_parallel parallel.zero parallel.reduce parallel.prefetch
train.start_from train.weights train.tokens train.steps train.dtype train.device train.seed train.noise_scale
train.noise_half_life train.validate_every train.validation_samples
compute.compile compute.recompute compute.recompute_every compute.norms compute.fp8
checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.keep_best checkpoint.remote
resilience.stop_after resilience.stop_at_batch resilience.hang_after resilience.check_every
resilience.spikes resilience.spike_sigmas resilience.spike_window
log.name log.root log.every log.tensorboard log.baselines log.wandb log.wandb_project
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve.load(write(folder, text), overrides)
    return str(caught.value).splitlines()


def test_the_list_of_settings_is_frozen() -> None:
    assert config.names() == SETTINGS.split()


def test_every_setting_is_described() -> None:
    assert all(FIELDS[key].metadata["meaning"] for key in config.names())


def test_every_setting_is_read_somewhere() -> None:
    code = "".join(path.read_text() for path in Path(config.__file__).parents[1].rglob("*.py"))
    unread = {key for key in config.names() if f".{key.partition('.')[2]}" not in code}
    assert unread <= {
        "parallel.pp",
        "batch.policy",
    }  # axes are read by name in a loop; a choice of one decides nothing yet


def test_command_line_wins_over_file_over_preset_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npreset = "llama-3-8b"\nlayers = 3\n[train]\ntokens = 1e8\n')
    resolved = resolve.load(path, ["model.layers=5", "log.name=first"])
    assert (resolved.config.model.layers, resolved.origins["model.layers"]) == (5, "command line")
    assert (resolved.config.model.kv_heads, resolved.origins["model.kv_heads"]) == (8, "preset llama-3-8b")
    assert (resolved.config.train.tokens, resolved.origins["train.tokens"]) == (100_000_000, "run.toml")
    assert (resolved.config.optimizer.beta2, resolved.origins["optimizer.beta2"]) == (0.95, "default")
    assert resolved.origins["model.head_size"].startswith("derived")
    assert resolved.config.log.name == "first"


def test_what_is_printed_is_a_valid_run_file(tmp_path: Path) -> None:
    for preset in PRESETS:
        resolved = resolve.load(write(tmp_path, f'[model]\npreset = "{preset}"\n[data]\ntrain = ["a b", "c\\"d"]\n'))
        text = config.to_toml(resolved.config, resolved.origins)
        assert resolve.from_dict(tomllib.loads(text), "again") == resolved.config
        assert resolve.from_dict(config.to_dict(resolved.config), "again") == resolved.config


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        ((), (704, 704)),
        (("model.mlp_width=96",), (96, 96)),
        (("model.expert_width=96",), (96, 96)),
        (("model.expert_width=96", "model.dense_layers=1"), (704, 96)),
        (("model.expert_width=96", "model.dense_layers=1", "model.mlp_width=128"), (128, 96)),
    ],
)
def test_the_widths_of_experts_and_mlps(tmp_path: Path, words: tuple[str, ...], widths: tuple[int, int]) -> None:
    found = resolve.load(write(tmp_path, "[model]\nexperts = 4\n"), words).config
    assert (found.model.mlp_width, found.model.expert_width) == widths
    assert resolve.from_dict(config.to_dict(found), "again") == found


def test_all_problems_are_told_at_once_each_with_key_value_and_remedy(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        '[model]\nlyers = 3\nwidth = "wide"\nbias = 1\n[train]\ndtype = "fp8"\ntokens = 0.5\n[optimser]\nlr = 1\n',
        "optimizer.lr=-1",
        "parallel.pp=0",
    )
    told = "\n".join(found)
    assert len(found) == 8
    for words in (
        "model.lyers = 3",
        "did you mean layers",
        "model.width = 'wide'",
        "whole number",
        "true or false",
        "float32, bfloat16, float16, float64",
        "[optimser]",
        "did you mean optimizer",
        "optimizer.lr = -1.0",
        "above 0",
        "parallel.pp = 0",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=5"], ["model.heads = 5", "model.width = 256", "4"]),
        (["model.kv_heads=3"], ["model.kv_heads = 3", "2, 4"]),
        (["parallel.tp=3"], ["parallel.tp = 3", "model.kv_heads = 4", "2, 4"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "parallel.tp"]),
        (["parallel.tp=4", "parallel.sequence_parallel=true", "data.sequence_length=62"], ["62", "60, 64"]),
        (["parallel.cp=2", "data.sequence_length=62"], ["62", "multiple of 4", "parallel.cp = 2 needs", "60, 64"]),
        (
            ["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true", "data.sequence_length=60"],
            ["60", "multiple of 8", "parallel.cp = 2 and parallel.sequence_parallel", "56, 64"],
        ),
        (["parallel.cp=2", 'data.lengths=["1e6:514"]', "data.sequence_length=514"], ["data.lengths", "512, 516"]),
        (['data.train=["a"]', "data.weights=[1, 2]"], ["data.weights", "data.train"]),
        (["parallel.dp_replicate=0"], ["dp_replicate", "dp_shard"]),
        (["train.tokens=100"], ["train.tokens = 100", "batch"]),
        (["model.positions=alibi", "model.rope_theta=500"], ["model.rope_theta", "no effect", "rope"]),
        (["parameterization.name=sp", "parameterization.base_width=64"], ["parameterization.base_width", "no effect"]),
        (["model.preset=lama-3-8b"], ["lama-3-8b", "llama-3-8b"]),
        (["data.validation_fraction=0"], ["validation_samples", "validation_fraction"]),
        (["resilience.spikes=rewind"], ["resilience.spikes = 'rewind'", "checkpoint.every"]),
        (["parallel.ep=2"], ["parallel.ep = 2", "model.experts = 0", "needs at least 1"]),
        (["model.balance_rate=0.1"], ["model.balance_rate = 0.1", "model.experts = 0"]),
        (["model.experts=8", "parallel.ep=3"], ["parallel.ep = 3", "model.experts = 8", "2, 4"]),
        (["model.experts=8", "model.experts_per_token=9"], ["model.experts_per_token = 9", "at most 8"]),
        (["model.experts=8", "model.dense_layers=4"], ["model.dense_layers = 4", "at most 3"]),
        (["model.experts=8", "model.expert_width=90", "parallel.tp=4"], ["model.expert_width = 90", "1, 2"]),
        (
            ["model.experts=8", "model.expert_width=64", "model.mlp_width=128"],
            ["model.mlp_width = 128", "dense_layers"],
        ),
        (["model.experts=8", "model.bias=true"], ["model.bias = true", "model.bias=false"]),
        (["--rank", "2"], ["--rank"]),
        (
            ["compute.fp8=torchao", "model.mlp_width=48", "parallel.tp=2"],
            ["model.mlp_width / parallel.tp = 24", "compute.fp8 = 'torchao'", "16, 32"],
        ),
        (["compute.fp8=torchao", "model.heads=5", "model.head_size=8"], ["model.heads x model.head_size", "32, 48"]),
        (["compute.fp8=torchao", "model.kv_heads=1", "model.head_size=4"], ["2 x model.kv_heads", "= 8", "16"]),
        (["compute.fp8=torchao", "model.width=264"], ["model.width = 264", "256, 272"]),
        (["compute.fp8=torchao", 'data.lengths=["1e6:8"]'], ["sequence length 8", "16"]),
        (["batch.critical_batch=[90, 0.5]"], ["batch.critical_batch = (90.0, 0.5)", "no effect", "law"]),
        (["batch.policy=law", "batch.critical_batch=[90]"], ["batch.critical_batch = [90.0]", "scale, exponent"]),
        (["batch.policy=law", "batch.critical_batch=[90, -1]"], ["batch.critical_batch", "above 0"]),
        (["train.weights=embeddings", "train.noise_scale=false"], ["train.weights = 'embeddings'", "train.start_from"]),
        (["train.weights=embeddings", "train.start_from=x"], ["no norm layers", "train.noise_scale=false"]),
        (
            [
                *("train.weights=embeddings", "train.start_from=x", "train.noise_scale=false"),
                *("sparsity.method=rigl", "sparsity.density=0.5"),
            ],
            ["sparsity.method = 'rigl'", "train.weights = 'embeddings'", "sparsity.method=none"],
        ),
        (
            [
                *("train.weights=embeddings", "train.start_from=x", "train.noise_scale=false"),
                *("optimizer.engine=apex", "parallel.pp=2"),
            ],
            ["optimizer.engine = 'apex'", "parallel.pp = 2"],
        ),
        (["optimizer.engine=apex", "train.dtype=float64"], ["optimizer.engine = 'apex'", "float64"]),
        (["compute.fp8=torchao", "train.dtype=float16"], ["compute.fp8", "train.dtype = 'float16'", "bfloat16"]),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    told = "\n".join(problems_of(tmp_path, "", *overrides))
    assert all(word in told for word in words), told


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.toml does not exist"):
        resolve.load(tmp_path / "nowhere.toml")
    assert "not valid TOML" in problems_of(tmp_path, "[model\n")[0]


@pytest.mark.parametrize(
    ("parallel", "ranks", "layout"),
    [
        (config.Parallel(), 1, Layout()),
        (config.Parallel(tp=2), 8, Layout(tp=2, dp_shard=4)),
        (config.Parallel(tp=2, dp_replicate=0, dp_shard=2), 8, Layout(tp=2, dp_shard=2, dp_replicate=2)),
        (config.Parallel(tp=2, cp=4), 16, Layout(tp=2, cp=4, dp_shard=2)),
        (config.Parallel(tp=2, ep=2), 8, Layout(tp=2, dp_shard=4, ep=2)),
    ],
)
def test_data_parallelism_fills_what_is_left(parallel: config.Parallel, ranks: int, layout: Layout) -> None:
    assert fit(parallel, ranks) == layout


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (config.Parallel(tp=4), 6, "nearest: 4, 8"),
        (config.Parallel(tp=2, dp_shard=2), 2, "needs 4 ranks"),
        (config.Parallel(ep=4, dp_replicate=2), 12, "parallel.ep = 4 does not divide the 6 ranks of parallel.dp_shard"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(parallel: config.Parallel, ranks: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(parallel, ranks)
