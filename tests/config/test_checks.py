"""Which settings are refused beside one another, though each is right."""

from __future__ import annotations

import pytest

from megahp.config import Config, checks, config_to_dict, resolve, with_values
from megahp.errors import UserError

DEEPSPEED = "parallel.engine=deepspeed"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=5"], ["model.heads = 5", "model.width = 256", "4"]),
        (["model.kv_heads=3"], ["model.kv_heads = 3", "2, 4"]),
        (["parallel.tp=4", "model.heads=6", "model.kv_heads=2"], ["parallel.tp = 4", "model.heads = 6"]),
        (["parallel.tp=4", "model.heads=12", "model.kv_heads=3"], ["parallel.tp = 4", "model.kv_heads = 3", "3"]),
        (["model.rope_fraction=0.05"], ["model.rope_fraction = 0.05", "3 rotated"]),
        (["model.rope_scaling=yarn"], ["model.rope_original_length"]),
        (
            ["model.rope_scaling=llama3", "model.rope_original_length=64", "model.rope_slow=5"],
            ["model.rope_fast = 4", "model.rope_slow = 5"],
        ),
        (["parallel.tp=3"], ["parallel.tp = 3", "model.kv_heads = 4", "2, 4"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "parallel.tp = 1"]),
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
        (["train.validate_every=10", "train.validation_samples=0"], ["train.validate_every = 10", "at least 1"]),
        (["checkpoint.keep_every=10"], ["checkpoint.keep_every = 10", "checkpoint.every = 0"]),
        (["checkpoint.keep_best=true", "checkpoint.every=5"], ["checkpoint.keep_best", "train.validate_every = 0"]),
        (["checkpoint.keep_best=true", "train.validate_every=5"], ["checkpoint.keep_best", "checkpoint.every = 0"]),
        (["compute.recompute=full", "compute.recompute_every=5"], ["recompute_every = 5", "at most 4"]),
        (['data.train=["a"]', "data.weights=[1]"], ["data.weights = (1.0,)", "['a']", "at least 2 prefixes"]),
        (['data.train=["a"]', 'data.mixtures=["1e6:1"]'], ["data.mixtures", "at least 2 prefixes"]),
        (["schedule.name=wsd", "schedule.decay=0", "schedule.shape=cosine"], ["schedule.shape", "above 0"]),
        (["schedule.name=wsd", "schedule.decay=0", "schedule.floor=0.1"], ["schedule.floor = 0.1", "above 0"]),
        (["data.validation_fraction=0"], ["validation_samples", "validation_fraction"]),
        (['data.train=["a"]', 'data.skip=["b:1"]'], ["data.skip names 'b'", "data.train"]),
        (['data.train=["a"]', 'data.skip=["a:3-1"]'], ["data.skip: 'a:3-1' is not", "prefix:first-last"]),
        (['data.train=["a"]', 'data.skip=["a"]'], ["data.skip: 'a' is not"]),
        (['data.validation=["a"]'], ["data.validation: 'a' is not name:prefix"]),
        (['data.validation=["a:b", "a:c"]'], ["data.validation: 'a:c' has the name of another set"]),
        (['data.train=["b"]', 'data.validation=["a:b"]'], ["data.validation: 'a:b' is trained on"]),
        (['data.validation=["a:b"]', "train.validation_samples=0"], ["data.validation", "validation_samples = 0"]),
        (["train.validate_first=true", "train.validation_samples=0"], ["train.validate_first", "at least 1"]),
        (["resilience.spikes=rewind"], ["resilience.spikes = 'rewind'", "checkpoint.every"]),
        (["resilience.hang_after=1e-300"], ["resilience.hang_after = 1e-300", "at least 1"]),
        (["resilience.hang_after=0.99"], ["resilience.hang_after = 0.99", "0 for never"]),
        (["resilience.hang_after=1e10"], ["resilience.hang_after", "at most 1e+09"]),
        (["model.experts=8", "parallel.ep=3"], ["parallel.ep = 3", "model.experts = 8", "2, 4"]),
        (["model.experts=8", "model.experts_per_token=9"], ["model.experts_per_token = 9", "at most 8"]),
        (["model.experts=8", "model.dense_layers=4"], ["model.dense_layers = 4", "at most 3"]),
        (["model.experts=8", "model.expert_width=90", "parallel.tp=4"], ["model.expert_width = 90", "1, 2"]),
        (
            ["model.experts=8", "model.expert_width=64", "model.mlp_width=128"],
            ["model.mlp_width = 128", "dense_layers"],
        ),
        (["model.experts=8", "model.bias=true"], ["model.bias = true", "model.bias=false"]),
        (
            ["compute.fp8=torchao", "model.mlp_width=48", "parallel.tp=2"],
            ["model.mlp_width / parallel.tp = 24", "compute.fp8 = 'torchao'", "16, 32"],
        ),
        (["compute.fp8=torchao", "model.heads=5", "model.head_size=8"], ["model.heads x model.head_size", "32, 48"]),
        (["compute.fp8=torchao", "model.kv_heads=1", "model.head_size=4"], ["2 x model.kv_heads", "= 8", "16"]),
        (["compute.fp8=torchao", "model.width=264"], ["model.width = 264", "256, 272"]),
        (["compute.fp8=torchao", 'data.lengths=["1e6:8"]'], ["sequence length 8", "16"]),
        (
            ["compute.fp4_forward=mxfp4", "model.width=48"],
            ["model.width = 48", "32, the block", "fp4_forward = 'mxfp4'"],
        ),
        (
            ["compute.fp4_forward=nvfp4", "model.mlp_width=48", "parallel.tp=2"],
            ["model.mlp_width / parallel.tp = 24", "compute.fp4_forward = 'nvfp4'", "16, 32"],
        ),
        (
            ["compute.fp4_backward=mxfp4", "data.sequence_length=192", "parallel.cp=2"],
            ["sequence length 192 / (2 x parallel.cp = 2) = 48", "compute.fp4_backward = 'mxfp4'", "32, 64"],
        ),
        (["compute.fp4_backward=nvfp4", 'data.lengths=["1e6:72"]'], ["sequence length = 72", "16"]),
        (["compute.fp4_backward=nvfp4", "model.kv_heads=1", "model.head_size=4"], ["2 x model.kv_heads) x", "= 24"]),
        (["compute.fp4_backward=nvfp4", "model.experts=8"], ["compute.fp4_backward", "experts", "remove one"]),
        (["compute.fp4_forward=nvfp4", "compute.fp8=torchao"], ["compute.fp4_forward", "compute.fp8", "remove one"]),
        (["compute.fp4_forward=nvfp4", "model.quantize=int8"], ["compute.fp4_forward", "quantize", "remove one"]),
        (
            ["compute.fp4_backward=nvfp4", "compute.fp4_hadamard=both"],
            ["compute.fp4_hadamard = 'both'", "fp4_forward = 'none'", "compute.fp4_hadamard=backward"],
        ),
        (["compute.fp4_hadamard=forward"], ["fp4_forward = 'none'", "compute.fp4_hadamard=none"]),
        (["model.quantize=int4", "model.width=264"], ["model.width = 264", "model.quantize_group = 32", "divides it"]),
        (["model.quantize=int4", "model.mlp_width=96", "parallel.tp=2"], ["model.mlp_width / parallel.tp = 48", "32"]),
        (["model.quantize=int8", "model.experts=8"], ["model.quantize = 'int8'", "experts", "remove one"]),
        (["model.quantize=int8", "compute.fp8=torchao"], ["model.quantize = 'int8'", "compute.fp8", "remove one"]),
        (
            ["batch.policy=measured", "train.noise_scale=false"],
            ["batch.policy = 'measured'", "train.noise_scale = true"],
        ),
        (["batch.policy=measured", "optimizer.name=muon"], ["batch.policy = 'measured'", "'muon'", "'adamw'"]),
        (["batch.policy=measured", "optimizer.name=dct"], ["batch.policy = 'measured'", "'dct'", "'adamw'"]),
        (
            ["optimizer.name=galore", "model.width=128", "model.heads=4", "optimizer.rank=128"],
            ["optimizer.rank = 128", "model.width = 128", "such as 32"],
        ),
        (["batch.policy=measured", "batch.global_batch=1", "batch.micro_batch=1"], ["measures nothing", "at least 2"]),
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
        ([DEEPSPEED, "parallel.tp=2"], ["data parallelism alone", "parallel.tp = 2", "parallel.tp=1"]),
        ([DEEPSPEED, "parallel.pp=2"], ["data parallelism alone", "parallel.pp = 2", "parallel.pp=1"]),
        ([DEEPSPEED, "parallel.cp=2"], ["data parallelism alone", "parallel.cp = 2", "parallel.cp=1"]),
        ([DEEPSPEED, "model.experts=8", "parallel.ep=2"], ["parallel.ep = 2", "model.experts = 8", "model.experts=0"]),
        ([DEEPSPEED, "parallel.dp_replicate=2"], ["parallel.dp_replicate = 2", "parallel.dp_replicate=1"]),
        ([DEEPSPEED, "parallel.zero=2", "parallel.reduce=every"], ["parallel.reduce = 'every'", "deepspeed"]),
        ([DEEPSPEED, "parallel.prefetch=2"], ["parallel.prefetch = 2", "deepspeed"]),
        ([DEEPSPEED, "optimizer.name=muon"], ["deepspeed", "optimizer.name = 'muon'", "optimizer.name=adamw"]),
        ([DEEPSPEED, "optimizer.name=dct"], ["deepspeed", "optimizer.name = 'dct'", "optimizer.name=adamw"]),
        ([DEEPSPEED, "optimizer.engine=apex"], ["deepspeed", "optimizer.engine = 'apex'", "optimizer.engine=torch"]),
        (
            [DEEPSPEED, "sparsity.method=static", "sparsity.density=0.5"],
            ["deepspeed", "sparsity.method = 'static'", "sparsity.method=none"],
        ),
        (
            [DEEPSPEED, "train.weights=embeddings", "train.start_from=x", "train.noise_scale=false"],
            ["deepspeed", "train.weights = 'embeddings'", "train.weights=all"],
        ),
        ([DEEPSPEED, "compute.compile=true"], ["deepspeed", "compute.compile = true", "compute.compile=false"]),
        ([DEEPSPEED, "compute.fp4_forward=nvfp4"], ["deepspeed", "compute.fp4_forward = 'nvfp4'", "fp4_forward=none"]),
        ([DEEPSPEED, "model.quantize=int4"], ["deepspeed", "model.quantize = 'int4'", "model.quantize=none"]),
        ([DEEPSPEED, "compute.fp8=torchao"], ["deepspeed", "compute.fp8 = 'torchao'", "compute.fp8=none"]),
        (
            [DEEPSPEED, "compute.norms=apex", "train.noise_scale=false"],
            ["deepspeed", "compute.norms = 'apex'", "compute.norms=megahp"],
        ),
        ([DEEPSPEED, "train.dtype=float64"], ["deepspeed", "train.dtype = 'float64'", "float32"]),
        (["parallel.offload=true"], ["parallel.offload = True", "parallel.engine", "deepspeed"]),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve.resolve([("command line", resolve.parse_overrides(overrides))])
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_what_a_program_wrote_may_hold_settings_without_effect() -> None:
    """Checkpoints of a version that let them pass load; what commands change of a run is no mistake of its user's."""
    words = ["checkpoint.keep_best=true", "checkpoint.keep_every=7", "train.validate_every=3", "train.tokens=1e6"]
    tree = resolve.parse_overrides([*words, "train.validation_samples=0", "log.baselines=true"])
    assert resolve.from_dict(tree, "checkpoint") == resolve.from_dict(
        {"train": {"tokens": 1_000_000, "validation_samples": 0}}, "checkpoint"
    )
    with pytest.raises(UserError, match="checkpoint.keep_every = 7"):
        resolve.resolve([("run.toml", tree)])


def test_a_default_is_never_without_effect() -> None:
    """Nor is what `megahp config` prints of any run, set again."""
    for words in ([], ["train.validation_samples=0", "log.baselines=true"], ["model.layers=1"]):
        resolved = resolve.resolve([("command line", resolve.parse_overrides(words))])
        again = resolve.resolve([("run.toml", config_to_dict(resolved.config))])
        assert again.config == resolved.config


def test_many_mistakes_are_listed_in_part() -> None:
    with pytest.raises(UserError) as caught:
        resolve.resolve([("run.toml", {"data": {f"key{i}": i for i in range(1000)}})])
    lines = str(caught.value).splitlines()
    assert len(lines) == 51 and lines[-1] == "and 950 more"


def test_many_sources_are_counted_once() -> None:
    class Sources(tuple[str, ...]):
        def count(self, value: object) -> int:
            raise AssertionError("counted anew for each")

    sources = Sources(f"part-{i}" for i in range(3000))
    config = with_values(Config(), {"data.train": Sources((*sources, "part-7"))})
    assert any("names 'part-7' twice" in problem for problem in checks.find_conflicts(config))
