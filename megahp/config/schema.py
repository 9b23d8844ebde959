"""The one typed tree a run is described by: every setting with its default, its meaning and its law.

Trees are made, and checked, by megahp/config/resolve.py; docs/settings.md is written from here.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_type_hints

from megahp.errors import masked

VOCAB_MULTIPLE = 128  # the vocabulary is padded to this, on every layout alike, so that any usual tp divides it

SOME, SEVERAL = range(1, sys.maxsize), range(2, sys.maxsize)  # of something that is counted


class Law(TypedDict, total=False):
    """What a field says of a setting beside its default and its meaning; bounds are in the unit of the value.

    only_with: another setting, and the values, or the range of values, that it must have for this one to mean anything.
    Giving it beside others is an error, not silence.

    fixed: when it may not change once there is a checkpoint. "on resume": a run that is resumed keeps it, a new run
    that starts from the checkpoint may change it. "always": both keep it. "unless dense": both keep it, but the new run
    may be dense. "never": both may change it, and the change is an event. A field that does not say is as its class's
    own `fixed` says, or else "never".
    """

    at_least: float
    above: float
    at_most: float
    below: float
    only_with: tuple[str, *tuple[Any, ...]]
    fixed: Literal["never", "on resume", "unless dense", "always"]


def setting(default: Any, meaning: str, **law: Unpack[Law]) -> Any:
    """Make a dataclass field that carries its meaning and its law."""
    return field(default=default, metadata={"meaning": meaning, **law})


of_experts = partial(setting, only_with=("model.experts", SOME))


@dataclass(frozen=True)
class ModelConfig:
    """The decoder transformer."""

    fixed = "always"

    preset: str = setting("", "a known shape that fills in the settings below; empty = none")
    layers: int = setting(4, "transformer blocks", at_least=1)
    width: int = setting(256, "size of the residual stream", at_least=1)
    heads: int = setting(4, "query heads", at_least=1)
    kv_heads: int = setting(0, "key/value heads (grouped-query attention); 0 = as many as heads", at_least=0)
    head_size: int = setting(0, "size of one head; 0 = width / heads", at_least=0)
    mlp_width: int = setting(
        0, "hidden size of the MLP; 0 = 4 width, or 8/3 width rounded up to 64s for swiglu", at_least=0
    )
    activation: Literal["swiglu", "gelu", "gelu-exact", "relu2"] = setting(
        "swiglu", "MLP: gated SiLU, GELU (in its tanh form, or exact), squared ReLU"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "normalisation before each branch and at the end")
    norm_eps: float = setting(1e-5, "added to the variance", above=0)
    positions: Literal["rope", "alibi", "learned", "none"] = setting("rope", "how a position is known")
    rope_theta: float = setting(
        10000.0, "base of the rotary wavelengths", above=0, only_with=("model.positions", "rope")
    )
    bias: bool = setting(False, "biases on linear layers and on LayerNorm")
    qk_norm: bool = setting(False, "normalise queries and keys, per head")
    tied_embeddings: bool = setting(False, "one matrix for embedding and unembedding")
    experts: int = setting(0, "experts in place of a block's MLP (mixture of experts); 0 = dense", at_least=0)
    experts_per_token: int = of_experts(2, "experts that each token is routed to", at_least=1)
    expert_width: int = of_experts(0, "hidden size of an expert; 0 = mlp_width", at_least=0)
    shared_experts: int = of_experts(0, "further experts, that every token passes, as one MLP", at_least=0)
    dense_layers: int = of_experts(0, "the first so many blocks have an MLP all the same", at_least=0)
    router_score: Literal["sigmoid", "softmax"] = of_experts(
        "sigmoid", "from a token's router logits to experts' scores"
    )
    router_normalize: bool = of_experts(True, "divide the scores of a token's experts by their sum")
    router_scale: float = of_experts(1.0, "multiplies what the chosen experts add up to", above=0)
    balance_rate: float = of_experts(
        1e-3,
        "step of the bias with which experts below the mean load are chosen sooner, others later",
        at_least=0,
        fixed="never",
    )
    balance_loss: float = of_experts(0.0, "weight of each sequence's load-balancing loss", at_least=0, fixed="never")
    vocab_size: int = setting(
        0, "number of token ids; 0 = the tokenizer's. The matrices are padded to 128s", at_least=0
    )

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def expert_layers(self) -> int:
        """Blocks with experts: the last ones."""
        return self.layers - self.dense_layers if self.experts else 0


of_completep = partial(setting, only_with=("parameterization.name", "completep"))


@dataclass(frozen=True)
class ParameterizationConfig:
    """How init, learning rates and multipliers follow from the model's size (megahp/scaling/parameterization.py)."""

    fixed = "always"

    name: Literal["sp", "mup", "completep", "smupar"] = setting(
        "completep", "the rule table: standard, muP, CompleteP, SmuPar (muP for sparse weights)"
    )
    base_width: int = setting(
        256,
        "width at which the base hyperparameters were tuned",
        at_least=1,
        only_with=("parameterization.name", "mup", "completep", "smupar"),
    )
    base_layers: int = of_completep(2, "depth at which the base hyperparameters were tuned", at_least=1)
    depth_alpha: float = of_completep(
        1.0, "CompleteP's alpha: residual branches are scaled by m_L^-alpha", at_least=0.5, at_most=1
    )
    init_std: float = setting(0.02, "base standard deviation of every matrix", above=0)
    embedding_multiplier: float = setting(1.0, "alpha_in: scales the embedding's output", above=0)
    output_multiplier: float = setting(1.0, "alpha_out: scales the logits", above=0)


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and in which order."""

    fixed = "on resume"  # but files may move: the data is known by its fingerprint

    train: tuple[str, ...] = setting((), "prefixes of .bin/.idx pairs, relative to the working folder", fixed="never")
    weights: tuple[float, ...] = setting((), "share of samples from each prefix; empty = in proportion to its tokens")
    mixtures: tuple[str, ...] = setting((), 'weights from some tokens on: "tokens:weight,weight..." words')
    tokenizer: str = setting("bytes", "sentencepiece .model, Hugging Face tokenizer .json, or bytes", fixed="never")
    sequence_length: int = setting(256, "tokens of one sample", at_least=1)
    lengths: tuple[str, ...] = setting(
        (),
        'sequence lengths from some tokens on, at equal tokens per step: "tokens:length" words, such as "4.7e11:8192"',
    )
    validation_fraction: float = setting(0.01, "share of documents held out", at_least=0, at_most=0.5, fixed="always")
    mask_documents: bool = setting(False, "attention stays inside a document")
    cache: str = setting(
        "", "folder of the sample order's index; empty = cache/ beside the first prefix", fixed="never"
    )


of_wsd = partial(setting, only_with=("schedule.name", "wsd"))


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run's tokens, as a fraction of its peak."""

    name: Literal["decay-to-zero", "linear", "cosine", "wsd", "constant", "inverse-sqrt"] = setting(
        "decay-to-zero", "shape after the warm-up"
    )
    start: int = setting(
        0, "tokens at which it begins, in a run that starts from a checkpoint", at_least=0, at_most=1e18
    )
    warmup: float = setting(0.1, "share of its tokens spent rising linearly from 0 to the peak", at_least=0, at_most=1)
    floor: float = setting(
        0.0,
        "where it ends, as a share of the peak",
        at_least=0,
        at_most=1,
        only_with=("schedule.name", "linear", "cosine", "wsd"),
    )
    decay: float = of_wsd(0.1, "share of its tokens that wsd's decay takes", at_least=0, at_most=1)
    shape: Literal["linear", "cosine", "exponential", "minus-sqrt"] = of_wsd("minus-sqrt", "of wsd's decay")


of_noise_scale = partial(setting, only_with=("batch.policy", "noise-scale"))
of_measuring = partial(setting, only_with=("batch.policy", "noise-scale", "measured"))


@dataclass(frozen=True)
class BatchConfig:
    """How many sequences one optimizer step sees, and what follows from that (megahp/scaling/batch/)."""

    policy: Literal["constant", "ramp", "table", "law", "noise-scale", "measured"] = setting(
        "constant", "how the global batch grows; it never shrinks"
    )
    global_batch: int = setting(32, "sequences per optimizer step; where it grows, at the start", at_least=1)
    micro_batch: int = setting(8, "sequences per forward pass of one data-parallel rank", at_least=1)
    largest: int = setting(
        0,
        "the global batch grows no further, where a ramp ends; 0 = no limit",
        at_least=0,
        only_with=("batch.policy", "ramp", "table", "law", "noise-scale", "measured"),
    )
    rule: Literal["power-lines", "sqrt", "sde", "none"] = setting(
        "power-lines",
        "how learning rate, weight decay, betas and eps follow a larger batch; measured: sde",
        only_with=("batch.policy", "ramp", "table", "law", "noise-scale"),
    )
    increment: int = setting(0, "sequences added at a time", at_least=0, only_with=("batch.policy", "ramp"))
    ramp_samples: int = setting(0, "samples from start to end", at_least=0, only_with=("batch.policy", "ramp"))
    table: tuple[str, ...] = setting((), '"tokens:batch" words, such as "1e9:512"', only_with=("batch.policy", "table"))
    target: float = setting(
        0.2, "share of the critical batch that is aimed at", above=0, only_with=("batch.policy", "law", "noise-scale")
    )
    critical_batch: tuple[float, ...] = setting(
        (96.4608, 0.462),
        "the critical batch in tokens, of tokens: scale, exponent (megahp/scaling/power_laws.py); measured: forecasts",
        only_with=("batch.policy", "law", "measured"),
    )
    noise_share: float = setting(
        1.0,
        "the batch stays at or below this share of the lower end of the whole model's noise scale",
        above=0,
        only_with=("batch.policy", "measured"),
    )
    noise_to_total: float = of_measuring(
        1.4, "the whole model's noise scale over the norm layers'; measured: while calibration is less sure", above=0
    )
    calibrate_every: int = setting(
        200,
        "steps between gradients of one example in the whole model, each at most a step's time; 0 = none",
        at_least=0,
        only_with=("batch.policy", "measured"),
    )
    look_every: int = of_measuring(10, "steps between looks at the noise scale, which are always logged", at_least=1)
    delay: float = of_noise_scale(0.1, "share of train.tokens before the first change", at_least=0, at_most=1)
    hysteresis: float = of_noise_scale(1.25, "the noise scale must ask for at least this factor", at_least=1)
    growth: float = of_noise_scale(2.0, "largest factor of one change", above=1)


of_muon = partial(setting, only_with=("optimizer.name", "muon"))


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and clipping. Values are the base ones; the parameterization makes each weight's own of them."""

    name: Literal["adamw", "muon"] = setting(
        "adamw", "update rule; muon = Muon for hidden matrices, AdamW for the rest", fixed="always"
    )
    lr: float = setting(4e-3, "peak learning rate", above=0)
    weight_decay: float = setting(0.1, "decoupled weight decay (multiplied by the learning rate)", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    muon_lr: float = of_muon(0.02, "peak learning rate of hidden matrices, in units of spectral norm", above=0)
    momentum: float = of_muon(0.95, "decay of the momentum", at_least=0, below=1)
    clip: float = setting(1.0, "largest global gradient norm; 0 = no clipping", at_least=0)
    engine: Literal["torch", "apex"] = setting("torch", "whose fused AdamW")


of_rigl = partial(setting, only_with=("sparsity.method", "rigl"))
of_gradual = partial(setting, only_with=("sparsity.method", "gradual"))
of_moving = partial(setting, only_with=("sparsity.method", "gradual", "rigl"))


@dataclass(frozen=True)
class SparsityConfig:
    """Which weights of the blocks' matrices are zero, and stay so (megahp/train/masks.py)."""

    fixed = "unless dense"

    method: Literal["none", "static", "gradual", "rigl"] = setting(
        "none",
        "static = chosen at random, for the whole run; gradual = more and more of the smallest in all matrices; "
        "rigl = at first at random, then again and again the smallest in place of those with the largest gradients",
    )
    density: float = setting(
        1.0,
        "share of each matrix's weights that are not zero; gradual: of all matrices', at the end",
        above=0,
        at_most=1,
        only_with=("sparsity.method", "static", "gradual", "rigl"),
    )
    layers: tuple[float, ...] = setting(
        (), "densities, one a block, in place of density", only_with=("sparsity.method", "static", "rigl")
    )
    begin: float = of_gradual(0.25, "first change, as a share of the run's compute", at_least=0, below=1)
    end: float = of_moving(
        0.75, "last change, as a share: gradual: of the run's compute; rigl: of train.tokens", above=0, at_most=1
    )
    drop: float = of_rigl(
        0.3, "share of a matrix's weights that is replaced; it falls to 0 as a cosine", above=0, at_most=1
    )
    every: int = of_moving(100, "steps between changes", at_least=1)

    def drawn(self, layers: int) -> tuple[float, ...]:
        """Density of each block's matrices at the start."""
        if self.method in ("none", "gradual"):
            return (1.0,) * layers
        return self.layers or (self.density,) * layers


of_pipelines = partial(setting, only_with=("parallel.pp", SEVERAL))


@dataclass(frozen=True)
class ParallelConfig:
    """The layout. Data parallelism fills what the other axes leave."""

    tp: int = setting(1, "tensor parallel: each weight matrix split over so many ranks", at_least=1)
    pp: int = setting(1, "pipeline parallel: the blocks dealt to so many ranks", at_least=1)
    schedule: Literal["1f1b", "interleaved", "zero-bubble", "zbv"] = of_pipelines(
        "1f1b", "order of a pipeline's forward and backward passes"
    )
    stages_per_rank: int = of_pipelines(
        0, "stages of one pipeline rank; 0 = the schedule's least: 2 for interleaved and zbv, else 1", at_least=0
    )
    split: tuple[int, ...] = of_pipelines((), "blocks of each stage, first to last; empty = balanced by cost")
    cp: int = setting(1, "context parallel: the tokens of each sequence shared out over so many ranks", at_least=1)
    ep: int = of_experts(1, "expert parallel: the experts dealt to so many of the dp_shard ranks", at_least=1)
    dp_replicate: int = setting(1, "data parallel replicas; 0 = what is left", at_least=0)
    dp_shard: int = setting(0, "ranks that share one sharded replica (FSDP2); 0 = what is left", at_least=0)
    sequence_parallel: bool = setting(False, "split norms and residual stream along the sequence over tp")
    zero: int = setting(
        0,
        "what shards keep between uses: 1 = weights gathered for the whole step, gradients whole until its end; 2 = "
        "weights gathered for each microbatch; 3 = for its forward and its backward pass apart; 0 = 3, in pipelines 1. "
        "Like reduce and prefetch it means nothing on one such rank",
        at_least=0,
        at_most=3,
    )
    reduce: Literal["once", "every"] = setting(
        "once", "gradients are summed over the ranks once a step, or after every microbatch: less memory, more traffic"
    )
    prefetch: int = setting(0, "blocks gathered ahead of the one that computes; 0 = as FSDP2 does", at_least=0)

    @property
    def zero_level(self) -> int:
        """What zero stands for."""
        return self.zero or (3 if self.pp == 1 else 1)

    @property
    def local_stages(self) -> int:
        """Stages of one pipeline rank."""
        return self.stages_per_rank or (2 if self.schedule in ("interleaved", "zbv") else 1)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how precisely, from which seed."""

    start_from: str = setting("", "checkpoint, or run directory, whose weights and progress a new run takes over")
    weights: Literal["all", "embeddings"] = setting(
        "all",
        "which weights are trained; embeddings = embedding and unembedding alone, as after the vocabulary has grown; "
        "the gradient's norm, clipping and moments are then theirs",
        fixed="on resume",
    )
    tokens: int = setting(10_000_000, "horizon of the schedules and end of the run", at_least=1, at_most=1e18)
    steps: int = setting(0, "stop after so many optimizer steps, if sooner; 0 = no such stop", at_least=0)
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = setting(
        "float32",
        "compute type, float16 with loss scaling; weights and moments stay in float32 (float64 for float64)",
        fixed="always",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto = cuda where there is one")
    seed: int = setting(1, "of the weights and of the data order", at_least=0, fixed="on resume")
    noise_scale: bool = setting(True, "measure the gradient noise scale in the norm layers")
    noise_half_life: float = setting(
        0.02,
        "half-life of the noise scale's averages, as a share of train.tokens; its interval spans three",
        above=0,
        at_most=1,
        only_with=("train.noise_scale", True),
    )
    validate_every: int = setting(
        0, "steps between validations; 0 = only at the end", at_least=0, only_with=("train.validation_samples", SOME)
    )
    validation_samples: int = setting(64, "samples of one validation; 0 = none", at_least=0)


@dataclass(frozen=True)
class ComputeConfig:
    """How a block is computed: time against memory, the same model."""

    compile: bool = setting(False, "torch.compile every block")
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "what backward computes again rather than keeps: all of a block, or all but its matrix products"
    )
    recompute_every: int = setting(
        1, "only in every so manyth block", at_least=1, only_with=("compute.recompute", "selective", "full")
    )
    norms: Literal["megahp", "apex", "transformer-engine"] = setting(
        "megahp", "whose norm kernels; only megahp's measure the noise scale"
    )
    fp8: Literal["none", "torchao", "transformer-engine"] = setting(
        "none", "whose float8 products multiply hidden matrices, forward and backward"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, and when."""

    every: int = setting(0, "steps between checkpoints; 0 = only at the end", at_least=0)
    keep: int = setting(2, "how many of the latest checkpoints stay", at_least=1)
    keep_every: int = setting(
        0, "those at every so many steps stay too; 0 = none", at_least=0, only_with=("checkpoint.every", SOME)
    )
    keep_best: bool = setting(
        False, "that of least validation loss stays too", only_with=("train.validate_every", SOME)
    )
    remote: str = setting(
        "", "URL of a folder, such as s3://bucket/runs/x, that gets a copy of what stays; empty = none"
    )


@dataclass(frozen=True)
class ResilienceConfig:
    """What is watched while training, and what is done about it."""

    stop_after: float = setting(
        0.0, "minutes of training after which the run is saved and stops, to be gone on with; 0 = none", at_least=0
    )
    stop_at_batch: int = setting(
        0,
        "once the global batch has grown to so many sequences the run is saved and stops, to be gone on with on more "
        "ranks; 0 = never",
        at_least=0,
    )
    hang_after: float = setting(
        600.0,
        "seconds without a step after which ranks hang, and the job is ended; 0 = never, else at least 1",
        at_least=0,
        at_most=1e9,  # clocks count nanoseconds in 63 bits
    )
    save_again: float = setting(
        60.0, "seconds for which the save at the end is tried again while it fails; then exit code 75", at_least=0
    )
    check_every: int = setting(
        50, "steps between comparisons of copied weights, and of the ranks' speed; 0 = at the end only", at_least=0
    )
    spikes: Literal["tell", "skip", "rewind"] = setting(
        "tell",
        "when loss or gradient norm stand out: an event alone; the step is skipped; back to the newest checkpoint, and "
        "past the samples since then",
    )
    spike_sigmas: float = setting(6.0, "what stands out, in standard deviations above the mean", above=0)
    spike_window: int = setting(128, "steps that mean and deviation are of", at_least=2)


@dataclass(frozen=True)
class LogConfig:
    """The run directory: root/name."""

    name: str = setting("run", "name of the run")
    root: str = setting("runs", "folder that holds the runs")
    every: int = setting(1, "steps between lines of metrics.jsonl", at_least=1)
    tensorboard: bool = setting(True, "also write TensorBoard files")
    baselines: bool = setting(
        True,
        "at the end, also what a unigram and a bigram model lose in validation",
        only_with=("train.validation_samples", SOME),
    )
    wandb: Literal["off", "offline", "online"] = setting("off", "also send to Weights & Biases; offline = sync later")
    wandb_project: str = setting("megahp", "Weights & Biases project", only_with=("log.wandb", "offline", "online"))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    parameterization: ParameterizationConfig = ParameterizationConfig()
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sparsity: SparsityConfig = SparsityConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    log: LogConfig = LogConfig()

    @property
    def directory(self) -> Path:
        return Path(self.log.root) / self.log.name


SECTIONS: dict[str, Any] = get_type_hints(Config)
TYPES = {name: get_type_hints(section) for name, section in SECTIONS.items()}
FIELDS = {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}


def setting_names() -> list[str]:
    """Every setting there is, as section.key, in order."""
    return list(FIELDS)


def fixed_when(key: str) -> str:
    """Tell what may not change section.key once there is a checkpoint: see `Law`."""
    return FIELDS[key].metadata.get("fixed", getattr(SECTIONS[key.partition(".")[0]], "fixed", "never"))


def get_setting(config: Config, key: str) -> Any:
    """The value of section.key. Raises AttributeError for a key there is not."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The same tree with some settings replaced (`section.key` -> value), unchecked."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def config_differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings whose values differ: section.key -> (before, now), passwords of URLs masked, which may have
    changed without making another run of it."""
    old, new = config_to_dict(before), config_to_dict(now)
    keys = [(section, key) for section, values in old.items() for key in values]
    return {f"{s}.{key}": (old[s][key], new[s][key]) for s, key in keys if old[s][key] != new[s][key]}


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the whole tree as {section: {key: value}}, passwords of URLs masked."""
    return {
        section: {key: masked(value) if isinstance(value, str) else value for key, value in values.items()}
        for section, values in asdict(config).items()
    }


def config_to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Return the whole tree as a valid run file, passwords of URLs masked; with origins, each line says where its value
    came from."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        lines.append(f"[{name}]")
        for f in fields(section):
            line = f"{f.name} = {toml_value(getattr(getattr(config, name), f.name))}"
            lines.append(f"{line:<44}# {origins[f'{name}.{f.name}']}" if origins else line)
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A setting's value, or any nest of tuples, as TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(float(value))  # numpy's floats are floats of another repr
    if isinstance(value, str):
        return json.dumps(masked(value), ensure_ascii=False)
    return json.dumps(value) if isinstance(value, bool) else repr(value)
