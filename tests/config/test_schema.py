"""Which settings there are, and that what is known of each holds together."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import pytest

from megahp.config import (
    Config,
    config_to_dict,
    config_to_toml,
    fixed_when,
    resolve,
    schema,
    setting_names,
    with_values,
)
from megahp.config.presets import PRESETS
from megahp.config.schema import FIELDS, TYPES

# A setting is a promise: adding one means adding it here, and to the changelog.
SETTINGS = """
model.preset model.layers model.width model.heads model.kv_heads model.head_size model.mlp_width model.activation
model.norm model.norm_eps model.norm_placement model.parallel_residual model.positions model.rope_theta
model.rope_fraction model.rope_scaling model.rope_factor model.rope_original_length model.rope_slow model.rope_fast
model.rope_magnitude model.no_rope_every model.window model.full_attention_every model.window_rope_theta
model.attention_softcap model.logits_softcap model.bias model.qkv_bias model.qk_norm model.qk_norm_whole
model.tied_embeddings
model.experts model.experts_per_token model.expert_width model.shared_experts model.dense_layers
model.router_score model.router_normalize model.router_scale model.balance_rate model.balance_loss model.vocab_size
model.levels
model.padding model.quantize model.quantize_group
parameterization.name parameterization.base_width parameterization.base_layers parameterization.depth_alpha
parameterization.scale_density
parameterization.weight_decay parameterization.init_std parameterization.residual_init
parameterization.embedding_multiplier parameterization.output_multiplier
parameterization.residual_multiplier parameterization.attention_multiplier
data.train data.weights data.mixtures data.tokenizer data.tokenizer_fingerprint data.eos data.bos data.begin
data.sequence_length data.lengths data.validation_fraction data.validation data.order data.mask_documents
data.wrong_samples
data.skip data.cache
schedule.name schedule.start schedule.warmup schedule.floor schedule.decay schedule.shape
batch.policy batch.global_batch batch.micro_batch batch.largest_micro_batch batch.largest batch.rule
batch.increment batch.ramp_samples
batch.table batch.target batch.critical_batch batch.noise_share batch.noise_to_total batch.calibrate_every
batch.look_every batch.delay batch.hysteresis batch.growth
optimizer.name optimizer.lr optimizer.weight_decay optimizer.beta1 optimizer.beta2 optimizer.eps
optimizer.muon_lr optimizer.momentum optimizer.rank optimizer.refresh optimizer.remainder optimizer.clip
optimizer.engine
sparsity.method sparsity.density sparsity.layers sparsity.begin sparsity.end sparsity.drop sparsity.every
parallel.tp parallel.pp parallel.schedule parallel.stages_per_rank parallel.split parallel.cp parallel.ep
parallel.dp_replicate parallel.dp_shard parallel.sequence_parallel parallel.zero parallel.reduce parallel.prefetch
parallel.engine parallel.offload
train.start_from train.weights train.tokens train.steps train.dtype train.device train.seed train.noise_scale
train.noise_half_life train.validate_every train.validate_first train.validation_samples
distill.teachers distill.fingerprints distill.weight
compute.compile compute.recompute compute.recompute_every compute.keep_heap compute.norms compute.fp8
compute.fp4_forward compute.fp4_backward compute.fp4_hadamard compute.fp4_tensor_scale compute.fp4_stochastic
checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.keep_best checkpoint.remote
resilience.stop_after resilience.stop_at_batch resilience.hang_after resilience.save_again resilience.check_every
resilience.spikes resilience.spike_sigmas resilience.spike_window
log.name log.root log.every log.tensorboard log.baselines log.wandb log.wandb_project
"""


def test_the_list_of_settings_is_frozen() -> None:
    assert setting_names() == SETTINGS.split()


def test_every_setting_is_described() -> None:
    assert all(FIELDS[key].metadata["meaning"] for key in setting_names())


def test_every_setting_is_read_somewhere() -> None:
    code = "".join(path.read_text() for path in Path(schema.__file__).parents[1].rglob("*.py"))
    unread = {key for key in setting_names() if f".{key.partition('.')[2]}" not in code}
    assert unread <= {
        "parallel.pp",
        "batch.policy",
    }  # axes are read by name in a loop; a choice of one decides nothing yet


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if "only_with" in field.metadata])
def test_what_a_setting_goes_with_is_possible_and_may_be_lacking(key: str) -> None:
    other, *values = FIELDS[key].metadata["only_with"]
    section, name = other.split(".")
    kind = TYPES[section][name]
    if get_origin(kind) is Union:
        assert values == ["auto"]
    elif get_origin(kind) is Literal:
        assert set(values) < set(get_args(kind))
    else:
        assert [type(value) for value in values] == [{int: range, bool: bool}[kind]]


@pytest.mark.parametrize(
    ("key", "fixed"),
    [
        ("model.width", "always"),
        ("parameterization.name", "always"),
        ("train.dtype", "always"),
        ("optimizer.name", "always"),
        ("data.validation_fraction", "always"),
        ("sparsity.method", "unless dense"),
        ("data.sequence_length", "on resume"),
        ("train.seed", "on resume"),
        ("train.weights", "on resume"),
        ("model.quantize", "on resume"),
        ("data.train", "never"),
        ("model.balance_rate", "never"),
        ("optimizer.lr", "never"),
    ],
)
def test_what_may_not_change_once_there_is_a_checkpoint(key: str, fixed: str) -> None:
    assert fixed_when(key) == fixed


def test_what_is_printed_is_a_valid_run_file() -> None:
    for preset in PRESETS:
        tree = {"model": {"preset": preset}, "data": {"train": ["a b", 'c"d']}}
        resolved = resolve.resolve([("run.toml", tree)])
        text = config_to_toml(resolved.config, resolved.origins)
        assert resolve.from_dict(tomllib.loads(text), "again") == resolved.config
        assert resolve.from_dict(config_to_dict(resolved.config), "again") == resolved.config


def test_passwords_are_masked_in_lists_too() -> None:
    config = with_values(Config(), {"distill.teachers": ("s3://me:word@host/a", "runs/b")})
    assert config_to_dict(config)["distill"]["teachers"] == ("s3://me:***@host/a", "runs/b")
    assert "word" not in config_to_toml(config)
