"""About how much memory training takes: an estimate to warn by, not a bound."""

from megahp.config import Config, longest
from megahp.scaling.flops import parameters

PROCESS = 4e8  # bytes of Python and torch
# Weight, gradient, two moments, and the copies of weight and moments that a checkpoint is written from; fp32 each.
PER_PARAMETER = 4 * (1 + 1 + 2 + 3)
# Of one layer, token and unit of width, at two bytes a number: what the backward pass needs without attention's matrix
# (Korthikanti et al., arXiv 2205.05198: 34 s b h; from memory, unverified). On a CPU in bfloat16: 30 and 34, and
# about 70 of one very small model (docs/log.md).
PER_ACTIVATION = 34


def training_bytes(config: Config, shards: int = 1) -> float:
    """Return the peak of a rank that holds one shard of the model, in bytes; recomputed blocks count as nothing.

    config: resolved, with its vocabulary. `megahp plan` traces what this estimates, in seconds rather than at once.
    """
    model, length = config.model, longest(config)
    weights = parameters(model, length) / shards
    tokens = config.batch.micro_batch * config.data.sequence_length / (config.parallel.cp * config.parallel.tp)
    layers = model.layers / config.parallel.pp * (config.compute.recompute == "none")
    wide = PER_ACTIVATION * {"float32": 2, "float64": 4}.get(config.train.dtype, 1)
    bias = 2 * 4 * model.heads * length**2 if model.positions == "alibi" else 0  # distances by slope, and masked
    return PROCESS + PER_PARAMETER * weights + wide * tokens * layers * model.width + bias
