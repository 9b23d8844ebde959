"""Warnings about settings that are valid but probably mistaken, one line each, before training begins."""

import math
from collections.abc import Iterator

from megahp.config import Config, longest
from megahp.data.loader import TrainingData
from megahp.errors import nearest_multiples
from megahp.log.progress import human_count, human_duration
from megahp.parallel.device import cores_here, memory_here
from megahp.parallel.layout import Layout, shards_of
from megahp.scaling.flops import parameters, training_flops
from megahp.scaling.memory import training_bytes

# "training with up to 4 epochs of repeated data yields negligible changes to loss compared to having unique data"
# (Muennighoff et al., arXiv 2305.16264, abstract)
EPOCHS = 4
ALIGNED = 8  # numbers of 16 bits in 16 bytes
LONG = 1800.0  # seconds of training that a fault may cost without a warning
# FLOP/s of one rank, at best, so that the time is underestimated: 40 % of an H100's bfloat16; a large CPU
FASTEST = {"cuda": 4e14, "cpu": 1e12}
# FLOP/s of one core: a guess between a server's with bfloat16, measured at 1e11, and a laptop's (docs/log.md)
LIKELY = 5e10
PATIENCE = 86_400.0  # seconds that a run on CPUs may take without a warning


def advice(config: Config, data: TrainingData, ranks: int, device: str, start_tokens: int = 0) -> Iterator[str]:
    """Yield a warning for each setting that is likely a mistake. device: cuda or cpu; start_tokens: of the checkpoint
    that the run starts from."""
    train = config.train
    steps = (train.tokens - start_tokens) // config.step_tokens  # an upper bound: a batch may grow, and never shrinks
    end = min(train.tokens, start_tokens + train.steps * config.step_tokens) if train.steps else train.tokens
    tokens, epochs = end - start_tokens, data.epochs(start_tokens, end)
    prefix, most = max(epochs.items(), key=lambda pair: pair[1])
    if most > EPOCHS:
        more = sum(count > EPOCHS for count in epochs.values()) - 1
        others = f", and {more} other prefixes more than {EPOCHS} times" if more else ""
        yield (
            f"data.train: {prefix!r} is read {most:,.1f} times in {human_count(tokens)} tokens{others}; data that "
            f"is repeated more than {EPOCHS} times adds less and less (arXiv 2305.16264): add data, lower "
            "train.tokens, or tune optimizer.weight_decay for it (docs/recipe.md, Fixed data)"
        )
    seconds = tokens * training_flops(config.model, longest(config)) / (ranks * FASTEST[device])
    if seconds > LONG and not 0 < config.checkpoint.every <= steps:
        yield (
            f"checkpoint.every = {config.checkpoint.every}: no checkpoint before the end, and a fault would cost "
            f"{human_duration(seconds)} of training or more; set it"
        )
    model, tp = config.model, config.parallel.tp
    inner = ("expert_width", model.expert_width) if model.experts else ("mlp_width", model.mlp_width)
    for name, side in (("width", model.width), (f"{inner[0]} / parallel.tp" if tp > 1 else inner[0], inner[1] // tp)):
        if device == "cuda" and side % ALIGNED:
            yield (
                f"model.{name} = {side} is not a multiple of {ALIGNED}, which the matrix units of GPUs load at once "
                f"(NVIDIA's matrix multiplication guide), so its products are slower; nearest that are: "
                f"{nearest_multiples(ALIGNED, side)}"
            )
    if model.experts and model.experts_per_token == 1 and model.router_normalize:
        yield (
            "model.router_normalize = true with model.experts_per_token = 1: the weight of a token's only expert is "
            "always 1, so that the router gets no gradient from the loss; set model.router_normalize=false"
        )
    rules = config.parameterization
    factors = {"mup": "parameterization.name=smupar", "completep": "parameterization.scale_density=true"}
    density = min(config.sparsity.initial_densities(model.layers)) if config.sparsity.method == "static" else 1
    if density < 1 and rules.name in factors and not rules.scale_density:
        yield (
            f"sparsity.density = {density:g} under parameterization.name = {rules.name!r}: a learning rate tuned on a "
            "dense base is too low for sparse matrices (docs/transfer.md); unless it was tuned at this density, begin "
            f"a run with {factors[rules.name]}"
        )
    if train.validate_every > steps:
        yield (
            f"train.validate_every = {train.validate_every}: the run has at most {steps} steps, so only its end is "
            "validated; lower it"
        )


def beyond_cpus(config: Config, layout: Layout, ranks_here: int, start_tokens: int = 0, teachers: float = 0.0) -> str:
    """Return a warning that this machine cannot hold its ranks of a CPU run in memory, or that the run takes more than
    a day; "" if neither. teachers: bytes of their weights on a rank."""
    ranks, cores = math.prod(layout.shape), cores_here()
    needed = ranks_here * (training_bytes(config, shards_of(config.parallel, layout)) + teachers)
    memory = memory_here()
    operations = (config.train.tokens - start_tokens) * training_flops(config.model, longest(config))
    seconds = operations * ranks_here / (ranks * cores * LIKELY)
    takes = []
    if needed > memory:
        takes.append(f"about {needed / 1e9:,.0f} GB of memory, of which there are {memory / 1e9:,.0f},")
    if seconds > PATIENCE:
        takes.append(f"about {seconds / 86_400:,.0f} days on {cores} cores ({LIKELY / 1e9:g} GFLOP/s each assumed)")
    size, tokens = parameters(config.model, longest(config)), config.train.tokens
    what = f"training {human_count(size)} parameters on {human_count(tokens)} tokens here"
    return f"{what} takes {' and '.join(takes)}" if takes else ""
