"""Every setting of a run, with its default, meaning and constraints, as one tree of typed dataclasses.

resolve.py builds and checks the trees; docs/settings.md is generated from this file by describe.py.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_type_hints

from megahp.errors import masked

# The vocabulary is padded to a multiple of this on every layout alike, so that every usual tp divides it and a
# checkpoint fits all of them.
VOCAB_MULTIPLE = 128

ONE_OR_MORE, TWO_OR_MORE = range(1, sys.maxsize), range(2, sys.maxsize)  # values of another setting, for only_with


class Constraints(TypedDict, total=False):
    """Constrain one setting; the bounds are in the setting's own unit.

    only_with: (other setting, *values): this setting has an effect only if the other has one of these values, or lies
    in one of these ranges. Setting it otherwise is an error, so that no line of a run file is silently ignored.

    fixed: when the value must match the checkpoint's. "on resume": when a run resumes, but a new run that starts from
    the checkpoint may change it. "always": for both. "unless dense": for both, but the new run may be dense. "never":
    both may change it, and the change is logged as an event. The default is the section's `fixed`, else "never".

    before: what settings written before there was this one mean, where that is not the default.
    """

    at_least: float
    above: float
    at_most: float
    below: float
    only_with: tuple[str, *tuple[Any, ...]]
    fixed: Literal["never", "on resume", "unless dense", "always"]
    before: str


def setting(default: Any, meaning: str, **constraints: Unpack[Constraints]) -> Any:
    """Return a dataclass field that carries its meaning and constraints as metadata."""
    return field(default=default, metadata={"meaning": meaning, **constraints})


GATED = ("swiglu", "geglu")  # activations whose MLP multiplies by a gate
LEAST_EPS = 1e-30  # below float32's 1e-38, at any root of kappa, it would be 0, and 0 / 0 ends a run

AUTO = "auto"  # the value of a setting that the run decides at its start (megahp/train/auto_settings.py)
Auto = Literal["auto"]

nonnegative = partial(setting, at_least=0)
at_least_1 = partial(setting, at_least=1)
positive = partial(setting, above=0)
fraction = partial(setting, at_least=0, at_most=1)
moe_only = partial(setting, only_with=("model.experts", ONE_OR_MORE))
rope_only = partial(setting, only_with=("model.positions", "rope"))
selective_rope = partial(setting, only_with=("model.rope_scaling", "llama3", "yarn"))
window_only = partial(setting, only_with=("model.window", ONE_OR_MORE))
validating_only = partial(setting, only_with=("train.validation_samples", ONE_OR_MORE))


FP4_BLOCKS = {"mxfp4": 32, "nvfp4": 16, "ue5m3": 16}  # elements that share a scale
Fp4 = Literal["none", "mxfp4", "nvfp4", "ue5m3"]
Directions = Literal["none", "forward", "backward", "both"]


def is_nth(block: int, every: int) -> bool:
    """Return whether a block, counted from 0, is an every-th one; every: 0 = none is."""
    return every > 0 and (block + 1) % every == 0


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer."""

    fixed = "always"

    preset: str = setting("", "a known model shape that fills in the settings below; empty = none")
    layers: int = at_least_1(4, "number of transformer blocks")
    width: int = at_least_1(256, "size of the residual stream")
    heads: int = at_least_1(4, "number of query heads")
    kv_heads: int = nonnegative(0, "number of key/value heads (grouped-query attention); 0 = as many as heads")
    head_size: int = nonnegative(0, "size of one head; 0 = width / heads")
    mlp_width: int = nonnegative(0, "hidden size of the MLP; 0 = 4 width, or 8/3 width rounded up to 64s for swiglu")
    activation: Literal["swiglu", "geglu", "gelu", "gelu-exact", "relu2", "xielu"] = setting(
        "swiglu",
        "MLP activation: gated SiLU, gated GELU (tanh approximation), GELU (tanh approximation or exact), squared "
        "ReLU, or xIELU, whose curvatures are learned",
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "normalization of each branch and after the blocks")
    norm_eps: float = setting(1e-5, "added to the variance inside the norm", at_least=LEAST_EPS)
    norm_placement: Literal["pre", "post", "both"] = setting(
        "pre", "a branch's norm is before it, after it (before its output is added to the stream), or both"
    )
    parallel_residual: bool = setting(
        False, "a block's MLP reads the stream that its attention read, not the sum with attention's output"
    )
    positions: Literal["rope", "alibi", "learned", "none"] = setting(
        "rope", "position encoding: rotary, ALiBi, learned embeddings, or none"
    )
    rope_theta: float = rope_only(10000.0, "base of the rotary wavelengths", above=0)
    rope_fraction: float = rope_only(
        1.0, "share of a head's dimensions, the first, that are rotated", above=0, at_most=1
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = rope_only(
        "none", "how wavelengths are stretched to read longer sequences: all of them, or by Llama 3's or YaRN's rule"
    )
    rope_factor: float = at_least_1(
        1.0, "how far wavelengths are stretched", only_with=("model.rope_scaling", "linear", "llama3", "yarn")
    )
    rope_original_length: int = selective_rope(0, "length of the sequences that were read before", at_least=0)
    rope_slow: float = selective_rope(
        1.0,
        "wavelengths that turn at most this often in the original length are stretched by the whole factor",
        above=0,
    )
    rope_fast: float = selective_rope(
        0.0, "wavelengths that turn at least this often stay as they are; 0 = 4 for llama3, 32 for yarn", at_least=0
    )
    rope_magnitude: float = nonnegative(
        0.0,
        "multiplies rotated queries and keys; 0 = 0.1 ln(rope_factor) + 1",
        only_with=("model.rope_scaling", "yarn"),
    )
    no_rope_every: int = rope_only(0, "every n-th block has no position encoding; 0 = all have", at_least=0)
    window: int = nonnegative(0, "tokens, itself included, that a token attends to; 0 = all before it")
    full_attention_every: int = window_only(0, "every n-th block attends without the window; 0 = none", at_least=0)
    window_rope_theta: float = window_only(
        0.0, "rope_theta of the blocks with a window, where it is never scaled; 0 = as in other blocks", at_least=0
    )
    attention_softcap: float = nonnegative(0.0, "attention logits x become c tanh(x / c); 0 = no cap")
    logits_softcap: float = nonnegative(0.0, "the model's logits x become c tanh(x / c); 0 = no cap")
    bias: bool = setting(False, "add biases to linear layers and LayerNorm")
    qkv_bias: bool = setting(False, "add biases to queries, keys and values alone", only_with=("model.bias", False))
    qk_norm: bool = setting(False, "normalize queries and keys, per head")
    qk_norm_whole: bool = setting(
        False, "normalize all heads' queries as one vector, and so the keys", only_with=("model.qk_norm", True)
    )
    tied_embeddings: bool = setting(False, "share one matrix between embedding and unembedding")
    experts: int = nonnegative(0, "experts that replace a block's MLP (mixture of experts); 0 = dense")
    experts_per_token: int = moe_only(2, "experts that each token is routed to (top-k)", at_least=1)
    expert_width: int = moe_only(0, "hidden size of one expert; 0 = mlp_width", at_least=0)
    shared_experts: int = moe_only(0, "additional experts that process every token, computed as one MLP", at_least=0)
    dense_layers: int = moe_only(0, "number of first blocks that keep a dense MLP", at_least=0)
    router_score: Literal["sigmoid", "softmax"] = moe_only("sigmoid", "from a token's router logits to expert scores")
    router_normalize: bool = moe_only(True, "divide the scores of a token's chosen experts by their sum")
    router_scale: float = moe_only(1.0, "multiplies the sum of the chosen experts' outputs", above=0)
    balance_rate: float = moe_only(
        1e-3,
        "step size of the routing bias, which is raised for experts below the mean load and lowered for others",
        at_least=0,
        fixed="never",
    )
    balance_loss: float = moe_only(0.0, "weight of the per-sequence load-balancing loss", at_least=0, fixed="never")
    vocab_size: int = nonnegative(
        0, "number of token ids; 0 = the tokenizer's. Matrices are padded to a multiple of 128"
    )
    levels: tuple[int, ...] = setting(
        (),
        "how many of the first ids each level of coded numbers has: a token is predicted among those of its level; "
        "filled in from a *.series tokenizer; empty = text, predicted among all",
    )
    padding: Literal["", "masked", "included"] = setting(
        "",
        "whether the rows that pad the vocabulary take part in the softmax of training's loss: masked = no, included = "
        "yes, as in runs before there was the choice; empty = as in the checkpoint that the run continues, else masked",
        fixed="on resume",
        before="included",
    )
    quantize: Literal["none", "int8", "int4"] = setting(
        "none",
        "how the products read the blocks' matrices, which are trained in full precision: rounded to so many bits "
        "(quantisation-aware training); none = as they are",
        fixed="on resume",
    )
    quantize_group: int = setting(
        32,
        "weights that share a scale, consecutive inputs of an output",
        at_least=1,
        only_with=("model.quantize", "int8", "int4"),
        fixed="on resume",
    )

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def softmax_size(self) -> int:
        """The number of rows of the unembedding, the first, that the loss's softmax is over."""
        return self.padded_vocab if self.padding == "included" else self.vocab_size

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate."""
        return self.activation in GATED

    def window_of(self, block: int) -> int:
        """Return the attention window of a block, counted from 0; 0 = none."""
        return 0 if is_nth(block, self.full_attention_every) else self.window

    def rotates(self, block: int) -> bool:
        """Return whether a block, counted from 0, has rotary positions."""
        return self.positions == "rope" and not is_nth(block, self.no_rope_every)

    @property
    def expert_layers(self) -> int:
        """Number of blocks with experts; the dense blocks come first."""
        return self.layers - self.dense_layers if self.experts else 0


completep_only = partial(setting, only_with=("parameterization.name", "completep"))


@dataclass(frozen=True)
class ParameterizationConfig:
    """How initialization, learning rates and multipliers scale with model size (megahp/scaling/parameterization.py)."""

    fixed = "always"

    name: Literal["sp", "mup", "completep", "smupar"] = setting(
        "completep", "the rule table: standard, muP, CompleteP, SmuPar (muP for sparse weights)"
    )
    base_width: int = at_least_1(
        256,
        "width at which the base hyperparameters were tuned",
        only_with=("parameterization.name", "mup", "completep", "smupar"),
    )
    base_layers: int = completep_only(2, "depth at which the base hyperparameters were tuned", at_least=1)
    depth_alpha: float = completep_only(
        1.0,
        "CompleteP's alpha: residual branches are scaled by (layers / base_layers)^-alpha, the learning rate by "
        "alpha - 1 in place of -alpha; 0 = no depth factor, as in muP. Below 1/2 activations grow with depth",
        at_least=0,
        at_most=1,
    )
    scale_density: bool = completep_only(
        False, "also divide hidden init by the root of density and the hidden learning rate by density, as smupar does"
    )
    weight_decay: Literal["", "base", "width", "timescale"] = setting(
        "",
        "weight decay of hidden matrices and routers: base = optimizer.weight_decay; width = times width / base_width; "
        "timescale = divided by the learning rate's multiplier, so that tau is the base's at any size and density; "
        "empty = as in the checkpoint that the run continues, else as in the papers: base for smupar, width for others",
        before="width",
        only_with=("parameterization.name", "mup", "completep", "smupar"),
    )
    init_std: float = positive(0.02, "base standard deviation of every matrix at initialization")
    residual_init: Literal["same", "gpt2"] = setting(
        "same",
        "initial standard deviation of the last matrix of each branch: same = as of other hidden matrices; gpt2 = that "
        "divided by sqrt(2 layers)",
    )
    embedding_multiplier: float = positive(1.0, "alpha_in: multiplies the embedding's output")
    output_multiplier: float = positive(1.0, "alpha_out: multiplies the logits")
    residual_multiplier: float = positive(1.0, "multiplies what each branch adds to the residual stream")
    attention_multiplier: float = positive(1.0, "multiplies the attention logits")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from, and in which order."""

    fixed = "on resume"  # the files themselves may move: the data is identified by its fingerprint

    train: tuple[str, ...] = setting((), "prefixes of .bin/.idx pairs, relative to the working folder", fixed="never")
    weights: tuple[float, ...] = setting((), "sampling weight of each prefix; empty = in proportion to its tokens")
    mixtures: tuple[str, ...] = setting(
        (), 'later weights, as "tokens:weight,weight..." words: new weights after that many tokens; empty = no change'
    )
    tokenizer: str = setting(
        "bytes",
        "SentencePiece .model, Hugging Face tokenizer .json, bytes, or a .series coding of numbers",
        fixed="never",
    )
    tokenizer_fingerprint: str = setting(
        "", "hash of what the tokenizer encodes; another one is refused; empty = filled in at the start", fixed="always"
    )
    eos: str = setting("", "token that ends a document, by name or id; empty = the data's, else the tokenizer's own")
    bos: str = setting(
        "", "token that begins one, by name or id, or none; empty = the data's, else the tokenizer's own"
    )
    begin: Literal["", "bos", "eos", "none"] = setting(
        "",
        "token before a document's first one in training, and so before evaluated texts: filled in from the data; "
        "empty = not known: bos if there is one, else eos",
        fixed="never",
    )
    sequence_length: int = at_least_1(256, "tokens per sample")
    lengths: tuple[str, ...] = setting(
        (),
        'later sequence lengths, at constant tokens per step, as "tokens:length" words, such as "4.7e11:8192", or '
        '"doubling:3": doubled so often, after equal shares of train.tokens; empty = no change',
    )
    validation_fraction: float = nonnegative(0.01, "fraction of documents held out", at_most=0.5, fixed="always")
    validation: tuple[str, ...] = validating_only(
        (),
        'further sets to validate on, as "name:prefix" words, such as "wiki:data/wiki-held-out"; empty = none',
        fixed="never",
    )
    order: Literal["", "keyed", "drawn"] = setting(
        "",
        "how documents and windows are shuffled: keyed = computed where it is asked for; drawn = drawn and stored, as "
        "in runs before there was the other; empty = as in the checkpoint that the run continues, else keyed",
    )
    mask_documents: bool = setting(False, "restrict attention to tokens of the same document")
    wrong_samples: Literal["refuse", "skip"] = setting(
        "refuse",
        "response to ids outside the vocabulary: end the run, before it begins if possible; or log an event, and read "
        "the next sample of that source twice instead",
        fixed="never",
    )
    skip: tuple[str, ...] = setting(
        (),
        'what is left out, with the next sample of its source read twice instead: documents as "prefix:number" or '
        '"prefix:first-last" words, counted from 0, and samples as "number" or "first-last"; empty = nothing',
        fixed="never",
    )
    cache: str = setting("", "folder of the sample order index; empty = cache/ beside the first prefix", fixed="never")


wsd_only = partial(setting, only_with=("schedule.name", "wsd"))


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the tokens of the run, as a fraction of its peak."""

    name: Literal["decay-to-zero", "linear", "cosine", "wsd", "constant", "inverse-sqrt"] = setting(
        "decay-to-zero", "shape after warmup"
    )
    start: int = nonnegative(0, "tokens at which the schedule begins, if a run starts from a checkpoint", at_most=1e18)
    warmup: float = fraction(0.1, "fraction of the schedule's tokens in which it rises linearly from 0 to the peak")
    floor: float = fraction(
        0.0, "final learning rate, as a fraction of the peak", only_with=("schedule.name", "linear", "cosine", "wsd")
    )
    decay: float = wsd_only(0.1, "fraction of the schedule's tokens in wsd's decay", at_least=0, at_most=1)
    shape: Literal["linear", "cosine", "exponential", "minus-sqrt"] = wsd_only("minus-sqrt", "shape of wsd's decay")


noise_scale_only = partial(setting, only_with=("batch.policy", "noise-scale"))
measuring_only = partial(setting, only_with=("batch.policy", "noise-scale", "measured"))


@dataclass(frozen=True)
class BatchConfig:
    """Sequences per optimizer step, and what follows from that (megahp/scaling/batch/)."""

    policy: Literal["constant", "ramp", "table", "law", "noise-scale", "measured"] = setting(
        "constant", "how the global batch grows; it never shrinks"
    )
    global_batch: int = at_least_1(32, "sequences per optimizer step; if the batch grows, at the start")
    micro_batch: int | Auto = at_least_1(
        8,
        "sequences per forward pass of one data-parallel rank; every batch is a multiple. auto = a rank's share of "
        "the batch in as few nearly equal parts as largest_micro_batch allows; batches are multiples of the ranks",
    )
    largest_micro_batch: int = nonnegative(
        0,
        "most sequences per forward pass, of the first length; 0 = filled in at the start: what half of the free "
        "memory holds and, on CPUs, at most 4,096 tokens",
        only_with=("batch.micro_batch", AUTO),
    )
    largest: int = nonnegative(
        0,
        "largest global batch, in sequences; a ramp ends there; 0 = no limit",
        only_with=("batch.policy", "ramp", "table", "law", "noise-scale", "measured"),
    )
    rule: Literal["power-lines", "sqrt", "sde", "none"] = setting(
        "power-lines",
        "how learning rate, weight decay, betas and eps are rescaled as the batch grows; measured: sde",
        only_with=("batch.policy", "ramp", "table", "law", "noise-scale"),
    )
    increment: int = nonnegative(0, "sequences added at a time", only_with=("batch.policy", "ramp"))
    ramp_samples: int = nonnegative(0, "samples from start to end", only_with=("batch.policy", "ramp"))
    table: tuple[str, ...] = setting(
        (), 'new global batches as "tokens:batch" words, such as "1e9:512"', only_with=("batch.policy", "table")
    )
    target: float = positive(0.2, "target batch over critical batch", only_with=("batch.policy", "law", "noise-scale"))
    critical_batch: tuple[float, ...] = setting(
        (96.4608, 0.462),
        "(a, p) in B_crit(D) = a D^p, in tokens (megahp/scaling/power_laws.py); measured: for forecasts alone",
        only_with=("batch.policy", "law", "measured"),
    )
    noise_share: float = positive(
        1.0,
        "upper limit of the batch, as a fraction of the lower confidence bound of the whole model's noise scale",
        only_with=("batch.policy", "measured"),
    )
    noise_to_total: float = measuring_only(
        1.4, "ratio of the whole model's noise scale to the norm layers'; measured: until calibration is surer", above=0
    )
    calibrate_every: int = nonnegative(
        200,
        "steps between calibrations: one example's gradient in the whole model, at most one step's time; 0 = never",
        only_with=("batch.policy", "measured"),
    )
    look_every: int = measuring_only(
        10, "steps between batch decisions from the noise scale; it is logged at every step anyway", at_least=1
    )
    delay: float = noise_scale_only(0.1, "fraction of train.tokens before the first change", at_least=0, at_most=1)
    hysteresis: float = noise_scale_only(
        1.25, "grow only if the target is at least this many times the batch", at_least=1
    )
    growth: float = noise_scale_only(2.0, "largest factor of a single change", above=1)

    @property
    def grows(self) -> bool:
        """Whether the batch may grow. One that may not is global_batch at every step, also of a resumed run."""
        return self.policy != "constant"

    @property
    def varies_micro_batch(self) -> bool:
        """Whether microbatches come in many sizes, for each of which blocks would be compiled anew."""
        return self.micro_batch == AUTO and self.grows


muon_only = partial(setting, only_with=("optimizer.name", "muon"))
low_rank_only = partial(setting, only_with=("optimizer.name", "dct", "galore"))


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and clipping. The parameterization derives each weight's values from these base values."""

    name: Literal["adamw", "muon", "dct", "galore"] = setting(
        "adamw",
        "update rule; muon = Muon for hidden matrices, AdamW for the rest; dct, galore = the same with AdamW whose "
        "moments are of low rank, in a subspace of cosines or of the gradient's singular vectors",
        fixed="always",
    )
    lr: float = positive(4e-3, "peak learning rate")
    weight_decay: float = nonnegative(0.1, "decoupled weight decay (multiplied by the learning rate)")
    beta1: float = nonnegative(0.9, "decay of the first moment", below=1)
    beta2: float = nonnegative(0.95, "decay of the second moment", below=1)
    eps: float = setting(1e-8, "added to the square root of the second moment", at_least=LEAST_EPS)
    muon_lr: float = muon_only(0.02, "peak learning rate of hidden matrices, in units of spectral norm", above=0)
    momentum: float = muon_only(0.95, "decay of Muon's momentum", at_least=0, below=1)
    rank: int = low_rank_only(128, "dimensions of each hidden matrix's subspace", at_least=1, fixed="always")
    refresh: int = low_rank_only(200, "updates from one choice of the subspaces to the next", at_least=1)
    remainder: bool = low_rank_only(True, "add the gradient's part outside the subspace, scaled as that inside")
    clip: float = nonnegative(1.0, "clip the global gradient norm to this; 0 = no clipping")
    engine: Literal["torch", "apex"] = setting("torch", "library whose fused AdamW is used")


rigl_only = partial(setting, only_with=("sparsity.method", "rigl"))
gradual_only = partial(setting, only_with=("sparsity.method", "gradual"))
dynamic_only = partial(setting, only_with=("sparsity.method", "gradual", "rigl"))


@dataclass(frozen=True)
class SparsityConfig:
    """Masks that hold weights of the blocks' matrices at zero (megahp/train/masks.py)."""

    fixed = "unless dense"

    method: Literal["none", "static", "gradual", "rigl"] = setting(
        "none",
        "static = a random mask for the whole run; gradual = prune more and more of the smallest weights of all "
        "matrices; rigl = start random, then repeatedly swap the smallest weights for those of largest gradient",
    )
    density: float = positive(
        1.0,
        "fraction of each matrix's weights that are not masked; gradual: of all matrices together, at the end",
        at_most=1,
        only_with=("sparsity.method", "static", "gradual", "rigl"),
    )
    layers: tuple[float, ...] = setting(
        (), "density of each block; empty = density for all", only_with=("sparsity.method", "static", "rigl")
    )
    begin: float = gradual_only(0.25, "first change, as a fraction of the run's compute", at_least=0, below=1)
    end: float = dynamic_only(
        0.75, "last change, as a fraction of the run's compute (gradual) or of train.tokens (rigl)", above=0, at_most=1
    )
    drop: float = rigl_only(
        0.3, "fraction of a matrix's weights replaced at the first change; falls to 0 as a cosine", above=0, at_most=1
    )
    every: int = dynamic_only(100, "steps between changes of the masks", at_least=1)

    def initial_densities(self, layers: int) -> tuple[float, ...]:
        """Return the density of each block's matrices at the start of the run."""
        if self.method in ("none", "gradual"):
            return (1.0,) * layers
        return self.layers or (self.density,) * layers


pipeline_only = partial(setting, only_with=("parallel.pp", TWO_OR_MORE))


@dataclass(frozen=True)
class ParallelConfig:
    """The layout over ranks. Data parallelism takes the ranks that the other axes leave."""

    tp: int = at_least_1(1, "tensor parallel: ranks that each weight matrix is split over")
    pp: int = at_least_1(1, "pipeline parallel: ranks that the blocks are distributed over")
    schedule: Literal["1f1b", "interleaved", "zero-bubble", "zbv"] = pipeline_only(
        "1f1b", "order of the pipeline's forward and backward passes"
    )
    stages_per_rank: int = pipeline_only(
        0, "pipeline stages per rank; 0 = the schedule's minimum: 2 for interleaved and zbv, else 1", at_least=0
    )
    split: tuple[int, ...] = pipeline_only((), "blocks of each stage, first to last; empty = balanced by cost")
    cp: int = at_least_1(1, "context parallel: ranks that the tokens of each sequence are split over")
    ep: int = moe_only(1, "expert parallel: ranks, out of dp_shard, that the experts are distributed over", at_least=1)
    dp_replicate: int = nonnegative(1, "data-parallel replicas; 0 = all remaining ranks")
    dp_shard: int = nonnegative(0, "ranks that share one sharded replica (FSDP2); 0 = all remaining ranks")
    sequence_parallel: bool = setting(False, "split norms and residual stream along the sequence over tp")
    zero: int = nonnegative(
        0,
        "ZeRO level, over the dp_shard ranks: 1 = gather weights once per step and keep whole gradients until its end; "
        "2 = gather weights once per microbatch; 3 = once for its forward and once for its backward pass; 0 = 3, or 1 "
        "with pipelines. Like reduce and prefetch, without effect on a single such rank",
        at_most=3,
    )
    reduce: Literal["once", "every"] = setting(
        "once",
        "reduce gradients over the ranks once per step, or after every microbatch (less memory, more communication)",
    )
    prefetch: int = nonnegative(0, "blocks to gather ahead of the one being computed; 0 = FSDP2's default")
    engine: Literal["megahp", "deepspeed"] = setting(
        "megahp",
        "what shards weights and reduces gradients over the dp_shard ranks: FSDP2, or DeepSpeed's ZeRO of the stage "
        "that zero names, without other parallel axes",
    )
    offload: bool = setting(
        False,
        "keep moments and master weights in the CPU's memory, and update them there",
        only_with=("parallel.engine", "deepspeed"),
    )

    @property
    def zero_level(self) -> int:
        """The ZeRO level in effect, 1 to 3."""
        return self.zero or (3 if self.pp == 1 else 1)

    @property
    def local_stages(self) -> int:
        """Pipeline stages per rank in effect."""
        return self.stages_per_rank or (2 if self.schedule in ("interleaved", "zbv") else 1)


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and seed of training."""

    start_from: str = setting(
        "", "checkpoint or run directory whose weights and progress a new run takes; empty = none"
    )
    weights: Literal["all", "embeddings"] = setting(
        "all",
        "which weights are trained; embeddings = embedding and unembedding only, as after extending the vocabulary; "
        "gradient norm, clipping and moments then cover those only",
        fixed="on resume",
    )
    tokens: int = at_least_1(10_000_000, "tokens at which run and schedules end", at_most=1e18)
    steps: int = nonnegative(0, "stop after this many optimizer steps, if sooner; 0 = no such limit")
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = setting(
        "float32",
        "compute dtype; auto = bfloat16 where every rank's device has instructions for it, else float32, decided when "
        "the run begins; float16 uses loss scaling; weights and moments stay in float32 (float64 for float64)",
        fixed="always",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to train on; auto = cuda if available, else cpu")
    seed: int = nonnegative(1, "random seed of the initial weights and the data order", fixed="on resume")
    noise_scale: bool = setting(True, "measure the gradient noise scale in the norm layers")
    noise_half_life: float = positive(
        0.02,
        "half-life of the noise scale's moving averages, as a fraction of train.tokens; its confidence interval covers "
        "three half-lives",
        at_most=1,
        only_with=("train.noise_scale", True),
    )
    validate_every: int = validating_only(0, "steps between validations; 0 = only at the end", at_least=0)
    validate_first: bool = validating_only(False, "also validate before the first step")
    validation_samples: int = nonnegative(
        64,
        "samples per validation, of each source by its weight, and of each further set; 0 = no validation; 64 is "
        "lowered, and any other number refused, where fewer are held out",
    )


@dataclass(frozen=True)
class DistillConfig:
    """Runs whose predictions a run learns from beside its data's tokens (megahp/train/teachers.py)."""

    fixed = "on resume"

    teachers: tuple[str, ...] = setting(
        (),
        "checkpoints, or run directories for their newest, of the same tokenizer: the mean of their probabilities is "
        "learned; empty = none",
        fixed="never",  # files may move: they are identified by their fingerprints
    )
    fingerprints: tuple[str, ...] = setting(
        (), "hashes of the teachers' checkpoints; others are refused; empty = filled in at the start"
    )
    weight: float = setting(
        1.0,
        "share of the teachers in what a token is to be predicted as; the token itself has the rest",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True)
class ComputeConfig:
    """How a block is computed: trades time for memory without changing the model."""

    compile: bool | Auto = setting(
        False, "torch.compile every block; auto = where the run's start finds that it pays: long runs on CPUs"
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "activations recomputed in backward: none, all but matrix products (selective), or all"
    )
    recompute_every: int = at_least_1(
        1, "recompute every n-th block only", only_with=("compute.recompute", "selective", "full")
    )
    keep_heap: bool = setting(
        True,
        "CPU ranks keep the memory that tensors free, in huge pages, instead of returning it at every use; without "
        "effect where the environment sets malloc (GLIBC_TUNABLES, MALLOC_*, LD_PRELOAD)",
    )
    norms: Literal["megahp", "apex", "transformer-engine"] = setting(
        "megahp", "library of the norm kernels; only megahp's measure the noise scale"
    )
    fp8: Literal["none", "torchao", "transformer-engine"] = setting(
        "none", "library of the float8 matrix products in hidden layers, forward and backward; none = no float8"
    )
    fp4_forward: Fp4 = setting(
        "none", "4-bit format that the hidden layers' forward products are simulated in; none = as train.dtype has them"
    )
    fp4_backward: Fp4 = setting(
        "none", "4-bit format of the products that give those layers' gradients, simulated; none = as train.dtype"
    )
    fp4_hadamard: Directions = setting(
        "none", "4-bit products whose operands are rotated, block by block, by a Hadamard matrix with random signs"
    )
    fp4_tensor_scale: Directions = setting(
        "both", "4-bit products whose operands have a scale of the whole tensor beside their blocks'; never in mxfp4"
    )
    fp4_stochastic: bool = setting(
        False,
        "round the gradients of outputs up or down at random, so that their mean is right",
        only_with=("compute.fp4_backward", *FP4_BLOCKS),
    )

    @property
    def fp4(self) -> dict[str, str]:
        """The directions whose products are simulated in 4 bits, and their formats."""
        formats = {"forward": self.fp4_forward, "backward": self.fp4_backward}
        return {direction: kind for direction, kind in formats.items() if kind != "none"}


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = nonnegative(0, "steps between checkpoints; 0 = only at the end")
    keep: int = at_least_1(2, "number of newest checkpoints to keep")
    keep_every: int = nonnegative(
        0, "also keep the checkpoints of every n-th step; 0 = none", only_with=("checkpoint.every", ONE_OR_MORE)
    )
    keep_best: bool = setting(
        False, "also keep the checkpoint of lowest validation loss", only_with=("train.validate_every", ONE_OR_MORE)
    )
    remote: str = setting("", "URL of a folder to copy kept checkpoints to, such as s3://bucket/runs/x; empty = none")


@dataclass(frozen=True)
class ResilienceConfig:
    """Faults and anomalies that are watched for during training, and the response to each."""

    stop_after: float = nonnegative(
        0.0, "minutes of training after which to stop and save, so that the run can resume; 0 = never"
    )
    stop_at_batch: int = nonnegative(
        0,
        "stop and save, so that the run can resume on more ranks, once the global batch reaches this many sequences; "
        "0 = never",
    )
    hang_after: float = nonnegative(
        600.0,
        "abort if no step finishes within this many seconds; 0 = never, otherwise at least 1",
        at_most=1e9,  # clocks count nanoseconds in 63 bits
    )
    save_again: float = nonnegative(60.0, "seconds to retry a failing final save before exiting with code 75")
    check_every: int = nonnegative(50, "steps between checks of replicated weights and rank speed; 0 = only at the end")
    spikes: Literal["tell", "skip", "rewind"] = setting(
        "tell",
        "response to a spike of the loss or gradient norm: log an event; skip the step; or rewind to the newest "
        "checkpoint and skip the samples since",
    )
    spike_sigmas: float = positive(6.0, "a spike is this many standard deviations above the mean")
    spike_window: int = setting(128, "steps over which that mean and standard deviation are computed", at_least=2)


@dataclass(frozen=True)
class LogConfig:
    """The run directory, root/name, and what is logged."""

    name: str = setting("run", "name of the run")
    root: str = setting("runs", "folder that holds the run directories")
    every: int = at_least_1(1, "steps between lines of metrics.jsonl")
    tensorboard: bool = setting(False, "also write TensorBoard files (needs the package tensorboard)")
    baselines: bool = validating_only(
        True,
        "at the end, also compute the validation loss of a unigram and a bigram model; not of series (model.levels)",
    )
    wandb: Literal["off", "offline", "online"] = setting(
        "off", "also log to Weights & Biases; offline = write files for a later `wandb sync`"
    )
    wandb_project: str = setting("megahp", "Weights & Biases project", only_with=("log.wandb", "offline", "online"))


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    parameterization: ParameterizationConfig = ParameterizationConfig()
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sparsity: SparsityConfig = SparsityConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    log: LogConfig = LogConfig()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.log.root) / self.log.name

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of batch.global_batch sequences, the least of any step."""
        return self.batch.global_batch * self.data.sequence_length


SECTIONS: dict[str, Any] = get_type_hints(Config)  # section -> its dataclass
TYPES = {name: get_type_hints(section) for name, section in SECTIONS.items()}  # section -> {key: type}
FIELDS = {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}  # section.key -> field


def setting_names() -> list[str]:
    """Return the name of every setting, section.key, in the order of definition."""
    return list(FIELDS)


def fixed_when(key: str) -> str:
    """Return when section.key must match the checkpoint's value: see `Constraints`."""
    return FIELDS[key].metadata.get("fixed", getattr(SECTIONS[key.partition(".")[0]], "fixed", "never"))


def get_setting(config: Config, key: str) -> Any:
    """Return the value of section.key. Raises AttributeError for an unknown key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with some settings replaced (section.key -> value), unchecked."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def config_differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings whose values differ: section.key -> (before, after).

    URLs are compared, and returned, with their passwords masked: a new password does not make another run.
    """
    old, new = config_to_dict(before), config_to_dict(after)
    keys = [(section, key) for section, values in old.items() for key in values]
    return {f"{s}.{key}": (old[s][key], new[s][key]) for s, key in keys if old[s][key] != new[s][key]}


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the config as {section: {key: value}}, passwords of URLs masked."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(shown, value))
        return masked(value) if isinstance(value, str) else value

    return {section: {key: shown(value) for key, value in values.items()} for section, values in asdict(config).items()}


def config_to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Return the config as a valid run file, passwords of URLs masked.

    origins: section.key -> where its value came from, added to each line as a comment.
    """
    lines: list[str] = []
    for name, section in SECTIONS.items():
        lines.append(f"[{name}]")
        for f in fields(section):
            line = f"{f.name} = {toml_value(getattr(getattr(config, name), f.name))}"
            lines.append(f"{line:<44}# {origins[f'{name}.{f.name}']}" if origins else line)
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """Return a setting's value, or nested tuples of such values, as TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(float(value))  # numpy's floats are floats too, but print as np.float64(...)
    if isinstance(value, str):
        return json.dumps(masked(value), ensure_ascii=False)
    return json.dumps(value) if isinstance(value, bool) else repr(value)
