"""About how much memory training takes: an estimate to warn by and to choose microbatches by, not a bound."""

from collections import Counter

from megahp.config import AUTO, Config, ModelConfig, longest
from megahp.scaling.flops import parameters

PROCESS = 4e8  # bytes of Python and torch
# Weight, gradient, two moments, and the copies of weight and moments that a checkpoint is written from; fp32 each.
PER_PARAMETER = 4 * (1 + 1 + 2 + 3)
PER_MOMENT = 4 * (1 + 1)  # with its copy
# Of one layer, token and unit of width, at two bytes a number: what the backward pass needs without attention's matrix
# (Korthikanti et al., arXiv 2205.05198: 34 s b h; from memory, unverified). On a CPU in bfloat16: 30 and 34, and
# about 70 of one very small model (docs/log.md).
PER_ACTIVATION = 34
# The same of a layer that is recomputed: its input; with selective recomputation also the results of its products
# (queries, keys, values, attention, both outputs, and an MLP of 8/3 width with a gate)
RECOMPUTED = {"none": PER_ACTIVATION, "selective": 25, "full": 2}
SPARE = 0.5  # of the memory that is free is left: the estimate may be half of what a model takes


def training_bytes(config: Config, shards: int = 1, sequences: int | None = None) -> float:
    """Return the peak of a rank that holds one shard of the model, in bytes.

    config: resolved, with its vocabulary. sequences: in a forward pass, of the first length; by default
    batch.micro_batch, or one where that follows the batch. `megahp plan` traces what this estimates, in seconds rather
    than at once.
    """
    model, length = config.model, longest(config)
    if sequences is None:
        sequences = config.batch.micro_batch if isinstance(config.batch.micro_batch, int) else 1
    weights = parameters(model, length) / shards
    # by moments that the optimizer does not keep
    saved = PER_MOMENT * (2 - moments_per_weight(config)) * hidden_weights(model) / shards
    tokens = sequences * config.data.sequence_length / (config.parallel.cp * config.parallel.tp)
    layers, every = model.layers / config.parallel.pp, config.compute.recompute_every
    kept = layers * (PER_ACTIVATION * (every - 1) + RECOMPUTED[config.compute.recompute]) / every
    if config.compute.recompute != "none":
        kept += PER_ACTIVATION  # of the one that is being recomputed
    if model.experts:  # of each token's experts the rows, and three of an expert's width
        rows = 2 * (2 * model.width + 3 * model.expert_width) * model.experts_per_token
        kept += model.expert_layers / model.layers * layers * rows / model.width
    kept *= {"float32": 2, "float64": 4, AUTO: 2}.get(config.train.dtype, 1)
    # capped attention keeps three numbers of each score, and two bytes of each
    scores = 6 * layers * model.heads * length * tokens if model.attention_softcap else 0
    bias = 2 * 4 * model.heads * length**2 if model.positions == "alibi" else 0  # distances by slope, and masked
    return PROCESS + PER_PARAMETER * weights - saved + kept * tokens * model.width + scores + bias


def checkpoint_bytes(config: Config) -> float:
    """Return the bytes of a checkpoint: the weights and the optimizer's moments in float32."""
    weights, hidden = parameters(config.model, longest(config)), hidden_weights(config.model)
    return 4 * (3 * weights - (2 - moments_per_weight(config)) * hidden)


def moments_per_weight(config: Config) -> float:
    """Return the numbers that the optimizer keeps for each weight of the hidden matrices, on average."""
    optimizer = config.optimizer
    if optimizer.name in ("adamw", "muon"):
        return 2 if optimizer.name == "adamw" else 1
    shapes = matrix_shapes(config.model)
    # of each matrix both moments, [larger side, rank], and GaLore's basis, [smaller side, rank]
    bases = 1 if optimizer.name == "galore" else 0
    kept = sum(n * min(optimizer.rank, side) * (2 * larger + bases * side) for (side, larger), n in shapes.items())
    return kept / hidden_weights(config.model)


def hidden_weights(model: ModelConfig) -> int:
    """Return the weights of all hidden matrices."""
    return sum(n * side * larger for (side, larger), n in matrix_shapes(model).items())


def matrix_shapes(model: ModelConfig) -> Counter[tuple[int, int]]:
    """Return how many hidden matrices the model has of each shape, smaller side first."""
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    layers, inner = model.expert_layers, 3 if model.gated else 2
    sides = (
        *((queries, 2 * model.layers), (keys, 2 * model.layers)),
        (model.mlp_width, inner * (model.layers - layers)),
        (model.expert_width, inner * model.experts * layers),
        (model.shared_experts * model.expert_width, inner * layers),
    )
    shapes = Counter[tuple[int, int]]()
    for side, count in sides:  # beside the width
        shapes[min(side, model.width), max(side, model.width)] += count
    return shapes


def fitting_sequences(config: Config, shards: int, free: float) -> int:
    """Return the sequences of the first length, a power of two, that a forward pass of a rank can have in `free` bytes,
    SPARE of which are left; at least one."""
    fixed, one = (training_bytes(config, shards, sequences) for sequences in (0, 1))
    fitting = max(1, int(((1 - SPARE) * free - fixed) / (one - fixed)))
    return 1 << (fitting.bit_length() - 1)
