"""Derive parameters, tokens and shape of a run from what the user gives: a size, tokens, compute or a loss.

By the loss law, compute as 6 N D, and CompleteP's best ratio of width to depth.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megahp.config import ModelConfig, resolve
from megahp.errors import UserError, nearest_multiples
from megahp.scaling import flops
from megahp.scaling.laws import LossLaw, PowerLaw, increasing_root

# Tokens per parameter if only a size is given: what Hoffmann et al. (arXiv 2203.15556) trained Chinchilla with.
TPP = 20.0
MFU = 0.4  # an assumption, if --mfu is not given
TOLERANCE = 0.03  # of a size: a better ratio of width to depth is worth being that far off
# Width over layers, of the weights outside the embeddings.
RATIO = PowerLaw(
    4.07,
    0.129,
    "CompleteP, arXiv 2505.01618: 40, 50, 62 are best at 50M, 300M, 1.5B; the power law through them is ours",
    "secondary source",
    fitted=(5e7, 1.5e9),
)


@dataclass(frozen=True)
class Given:
    """What the user gives, by the names of the command's options; None: not given."""

    params: float | None = None
    epochs: float | None = None  # over the data that there is, from which the tokens follow
    tokens: float | None = None
    tpp: float | None = None
    flops: float | None = None
    days: float | None = None
    target_loss: float | None = None
    width: int | None = None
    layers: int | None = None
    batch: int | None = None
    density: float | None = None
    gpus: int | None = None
    peak_flops: float | None = None  # FLOP/s of one GPU
    mfu: float | None = None

    @property
    def speed(self) -> float:
        """FLOP/s the cluster reaches; 0 if its GPUs or their peak are not given."""
        return (self.gpus or 0) * (self.peak_flops or 0) * (self.mfu or MFU)

    @property
    def compute(self) -> float:
        """FLOPs of the run; 0 if not given."""
        return 86400 * self.days * self.speed if self.days else self.flops or 0.0


def refuse_mistakes(given: Given, law: LossLaw) -> None:
    """Raise UserError for impossible values, and for options that say too little or too much to determine a run."""
    for f in fields(given):
        value, share = getattr(given, f.name), f.name in ("mfu", "density")
        if value is not None and not (0 < value < math.inf and (value <= 1 or not share)):
            raise UserError(f"{_option(f.name)} {value:g} must be above 0{' and at most 1' if share else ''}")
    if given.days and not given.speed:
        raise UserError(f"--days {given.days:g} needs --gpus, and --gpu or --peak-flops; add them, or give --flops")
    if given.mfu and given.gpus and not given.peak_flops:
        raise UserError(f"--mfu {given.mfu:g} is a share of a peak; add --gpu or --peak-flops, or remove it")
    if (given.peak_flops or given.mfu) and not given.gpus:
        raise UserError("--gpu, --peak-flops and --mfu have no effect without --gpus; add it, or remove them")
    if given.target_loss and given.target_loss <= law.floor:
        raise UserError(
            f"--target-loss {given.target_loss:g} is not above {law.floor:.4g}, the floor of the loss law "
            f"({law.source}); give a higher one, or another --loss-law"
        )
    shape = {"params": bool(given.width and given.layers), "flops": bool(given.days)}
    names = ("params", "tokens", "tpp", "flops", "target_loss")
    known = [name for name in names for value in (getattr(given, name), shape.get(name)) if value]
    alone = len(known) == 1 and known[0] in ("params", "flops", "target_loss")
    if not alone and (len(set(known)) != 2 or len(known) != 2 or set(known) == {"flops", "target_loss"}):
        raise UserError(
            f"{' '.join(map(_option, known)) or 'nothing'} {'is too much' if len(known) > 1 else 'is too little'} to "
            "determine a run; give two of --params (or --width and --layers, or --preset), --tokens, --tpp, --flops "
            "(or --days); or --params or --flops alone; or --target-loss alone or with --params, --tokens or --tpp"
        )
    if given.density and {"flops", "target_loss"} & set(known):
        raise UserError("--density needs a given size and data; give --params with --tokens or --tpp beside it")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parameters_for(given: Given, law: LossLaw) -> tuple[float, str]:
    """Return N and its formula."""
    compute, tokens, tpp, target = given.compute, given.tokens, given.tpp, given.target_loss
    if given.params:
        return given.params, "given"
    if tokens and target:
        excess = target - law.floor - law.b / tokens**law.beta
        return _inverse(excess, law.a, law.alpha, given, "these tokens"), "N of L(N, D) = target"
    if tokens:
        return (tokens / tpp, "D / TPP") if tpp else (compute / (6 * tokens), "C / 6 D")
    if tpp and target:
        return increasing_root(lambda n: -law(n, tpp * n), -target, 1e3, 1e16), "N of L(N, TPP N) = target"
    if tpp:
        return math.sqrt(compute / (6 * tpp)), "sqrt(C / 6 TPP)"
    if target:
        compute = increasing_root(lambda c: -law(*law.optimum(c)), -target, 1e9, 1e32)
    return law.optimum(compute)[0], "of least L(N, D) at 6 N D = C"


def tokens_for(parameters: float, per_token: float, given: Given, law: LossLaw) -> tuple[float, str]:
    """Return D and its formula. per_token: exact training FLOPs of a token, since --days is time, not 6 N D."""
    if given.tokens:
        return given.tokens, f"{given.epochs:g} epochs of the data" if given.epochs else "given"
    if given.days:
        return given.compute / per_token, "C / exact FLOPs"
    if given.compute:
        return given.compute / 6 / parameters, "C / 6 N"
    if given.target_loss:
        excess = given.target_loss - law.floor - law.a / parameters**law.alpha
        return _inverse(excess, law.b, law.beta, given, f"{parameters:.3g} parameters"), "D of L(N, D) = target"
    return (given.tpp or TPP) * parameters, "TPP N" if given.tpp else f"{TPP:g} N, the default"


def _inverse(excess: float, scale: float, exponent: float, given: Given, other: str) -> float:
    """Solve scale / x^exponent = excess for x. Raises UserError if no x is large enough."""
    if excess <= 0:
        unreachable = f"--target-loss {given.target_loss:g} is not reached with {other} by the loss law"
        raise UserError(f"{unreachable}; give a higher one")
    return (scale / excess) ** (1 / exponent)


def shaped(template: ModelConfig, given: Given, law: LossLaw, length: int) -> tuple[ModelConfig, str]:
    """Return the model and the formula of its size: of the shapes within TOLERANCE of the size, or near that, the one
    with the best ratio of width to depth. Raises UserError if no shape is near the size."""
    if given.width and given.layers:
        return scaled(template, given.width, given.layers), "of the given shape"
    target, formula = parameters_for(given, law)

    def distance(model: ModelConfig) -> float:
        size_error = abs(math.log(flops.parameters(model, length, active=True) / target))
        ratio_error = abs(math.log(model.width / model.layers / RATIO(outside_embeddings(model, length))))
        return 30 * max(0.0, size_error - TOLERANCE) + ratio_error  # 30: beyond it the size comes first

    model = min(_shapes(template, target, given, length), key=distance, default=None)
    if model is None or abs(math.log(flops.parameters(model, length, active=True) / target)) > 0.25:
        raise UserError(
            f"no shape has about {target:.3g} parameters with heads of {template.head_size} and a vocabulary of "
            f"{template.vocab_size}; give --width and --layers, a --preset or another vocabulary"
        )
    return model, formula


def _shapes(template: ModelConfig, target: float, given: Given, length: int) -> Iterator[ModelConfig]:
    """Yield, at each width, the depth nearest in size to the target. Widths are multiples of the head size, from
    eight heads on of twice that."""
    head = template.head_size
    for width in [given.width] if given.width else [k * head for k in range(1, 1024) if k <= 8 or k % 2 == 0]:
        one = scaled(template, width, template.layers)
        least = 1 + template.dense_layers  # a layer at least has the experts
        first, second = (
            flops.parameters(replace(one, layers=layers), length, active=True) for layers in (least, least + 1)
        )
        layers = given.layers or max(least, least + round((target - first) / (second - first)))  # linear in depth
        if layers <= width and one.heads % one.kv_heads == 0:
            yield replace(one, layers=layers)


def scaled(template: ModelConfig, width: int, layers: int) -> ModelConfig:
    """Return the template at another width and depth: same head size, query heads per key head, ratio of MLP and
    experts to the width, number of experts. Raises UserError."""
    if template.experts and layers <= template.dense_layers:
        raise UserError(
            f"--layers {layers} leaves no block with experts after model.dense_layers = {template.dense_layers}; give "
            f"at least {template.dense_layers + 1}"
        )
    if width == template.width:
        return replace(template, layers=layers)
    if width % template.head_size:
        near = nearest_multiples(template.head_size, width)
        raise UserError(
            f"--width {width} is not a multiple of the head size {template.head_size}; the nearest are {near}"
        )
    heads, mlp = width // template.head_size, resolve.mlp_width(template.activation, width)
    if template.mlp_width != resolve.mlp_width(template.activation, template.width):  # not the default proportion
        mlp = max(1, round(template.mlp_width * width / template.width / 64)) * 64
    expert = max(1, round(template.expert_width * width / template.width / 64)) * 64 if template.experts else 0
    kv_heads = max(1, heads * template.kv_heads // template.heads)
    model = replace(template, width=width, layers=layers, heads=heads, kv_heads=kv_heads)
    return replace(model, mlp_width=mlp, expert_width=expert)


def outside_embeddings(model: ModelConfig, length: int) -> int:
    """Count the active weights that are neither token nor position embeddings."""
    tables = (1 if model.tied_embeddings else 2) * model.padded_vocab
    positions = length if model.positions == "learned" else 0
    return flops.parameters(model, length, active=True) - (tables + positions) * model.width
