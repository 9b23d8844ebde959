"""Settings that are each right and cannot run together, on any number of ranks: one line each, with a remedy."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath

from megahp.config.schema import VOCAB_MULTIPLE, Config
from megahp.config.words import parse_table, phases_of
from megahp.errors import nearest_divisors, nearest_multiples

STAGES_PER_RANK = {
    "1f1b": range(1, 2),
    "interleaved": range(2, sys.maxsize),
    "zero-bubble": range(1, sys.maxsize),
    "zbv": range(2, 3),
}


def impossible(config: Config) -> list[str]:
    """What is wrong with the settings beside one another, everything at once."""
    return [problem for check in CHECKS for problem in check(config)]


def idle(config: Config) -> Iterator[tuple[str, str]]:
    """Find settings that change nothing beside others, where `only_with` cannot say so: each with the reason."""
    layers, sources = config.model.layers, config.data.train
    if config.compute.recompute_every > layers:
        yield "compute.recompute_every", f"model.layers = {layers}; it needs at most {layers}"
    if len(sources) == 1 and not _data(config):
        for key in ("data.weights", "data.mixtures"):
            yield key, f"data.train = {list(sources)}, all there is to read; it needs at least 2 prefixes"
    if config.schedule.name == "wsd" and not config.schedule.decay:
        for key in ("schedule.shape", "schedule.floor"):
            yield key, "schedule.decay = 0; it needs one above 0"
    if not config.checkpoint.every:
        yield "checkpoint.keep_best", "checkpoint.every = 0, whose only checkpoint is the last; it needs at least 1"


def _model(config: Config) -> Iterator[str]:
    """What is wrong with the model's shape."""
    model = config.model
    if model.width % model.heads and not model.head_size:
        yield (
            f"model.heads = {model.heads} does not divide model.width = {model.width}; "
            f"nearest that do: {nearest_divisors(model.width, model.heads)}"
        )
    if model.head_size % 2 and model.positions == "rope":
        yield f"model.head_size = {model.head_size} is odd, and rope turns pairs; make it even"
    if model.kv_heads and model.heads % model.kv_heads:
        yield (
            f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}; "
            f"nearest that do: {nearest_divisors(model.heads, model.kv_heads)}"
        )


def _tensor_parallel(config: Config) -> Iterator[str]:
    """What tensor parallelism cannot split."""
    model, parallel = config.model, config.parallel
    split = {
        "model.kv_heads": model.kv_heads,
        "model.mlp_width": model.mlp_width,
        "the padded vocabulary": VOCAB_MULTIPLE,
    }
    if model.experts:
        split["model.expert_width"] = model.expert_width
    if undivided := [f"{key} = {size}" for key, size in split.items() if size % parallel.tp]:
        yield (
            f"parallel.tp = {parallel.tp} does not divide {' nor '.join(undivided)}; "
            f"nearest that do: {nearest_divisors(math.gcd(*split.values()), parallel.tp)}"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel = true needs parallel.tp of at least 2, which is 1"


def _data_parallel(config: Config) -> Iterator[str]:
    """What is wrong with data parallelism."""
    parallel = config.parallel
    if not parallel.dp_replicate and not parallel.dp_shard:
        yield "parallel.dp_replicate and parallel.dp_shard are both 0; only one of them can fill what is left"
    if parallel.zero_level == 1 and parallel.reduce == "every":
        yield (
            "parallel.reduce = 'every' goes with parallel.zero = 2 or 3 alone, and without pipelines; set "
            "parallel.reduce=once"
        )
    if parallel.pp > 1 and parallel.zero > 1:
        yield (
            f"parallel.zero = {parallel.zero} would gather weights for each microbatch anew, which pipelines do not; "
            "leave it out with parallel.pp above 1"
        )


def _pipeline(config: Config) -> Iterator[str]:
    """What is wrong with a pipeline."""
    model, parallel = config.model, config.parallel
    if parallel.pp == 1:
        return
    stages = parallel.pp * parallel.local_stages
    if parallel.local_stages not in STAGES_PER_RANK[parallel.schedule]:
        allowed = STAGES_PER_RANK[parallel.schedule]
        yield (
            f"parallel.stages_per_rank = {parallel.stages_per_rank} does not go with parallel.schedule = "
            f"{parallel.schedule!r}, which has {allowed.start}{' or more' * (len(allowed) > 1)}; leave it out, or "
            "choose another schedule"
        )
    if stages > model.layers:
        yield (
            f"parallel.pp = {parallel.pp} with {parallel.local_stages} stages a rank needs {stages} blocks and "
            f"model.layers = {model.layers}; at most parallel.pp={max(1, model.layers // parallel.local_stages)}"
        )
    if parallel.split and (len(parallel.split), sum(parallel.split)) != (stages, model.layers):
        yield (
            f"parallel.split = {list(parallel.split)} must give the blocks of {stages} stages, {model.layers} in all; "
            "leave it out to balance them"
        )
    if min(parallel.split, default=1) < 1:
        yield f"parallel.split = {list(parallel.split)} leaves a stage without blocks; give each at least 1"
    in_two_parts = parallel.schedule in ("zero-bubble", "zbv")
    if in_two_parts and config.compute.recompute == "selective":
        yield (
            f"compute.recompute = 'selective' cannot go through a backward pass in two parts, as parallel.schedule = "
            f"{parallel.schedule!r} has; set compute.recompute=full"
        )
    if in_two_parts and config.compute.compile:
        yield (
            f"compute.compile = true has not been shown to be right with a backward pass in two parts, as "
            f"parallel.schedule = {parallel.schedule!r} has; leave it out, or choose another schedule"
        )
    if parallel.schedule == "zbv" and model.tied_embeddings:
        yield (
            "parallel.schedule = 'zbv' puts both ends of the model on one rank, where model.tied_embeddings = true "
            "would need two copies; choose another schedule"
        )


def _experts(config: Config) -> Iterator[str]:
    """What is wrong with a mixture of experts."""
    model, ep = config.model, config.parallel.ep
    if not model.experts:
        return
    if model.experts_per_token > model.experts:
        yield (
            f"model.experts_per_token = {model.experts_per_token} is more than model.experts = {model.experts}; "
            f"make it at most {model.experts}"
        )
    if model.experts % ep:
        yield (
            f"parallel.ep = {ep} does not divide model.experts = {model.experts}; "
            f"nearest that do: {nearest_divisors(model.experts, ep)}"
        )
    if model.dense_layers >= model.layers:
        yield (
            f"model.dense_layers = {model.dense_layers} leaves none of model.layers = {model.layers} to experts; "
            f"make it at most {model.layers - 1}, or leave out model.experts"
        )
    if not model.dense_layers and model.mlp_width != model.expert_width:
        yield (
            f"model.mlp_width = {model.mlp_width} has no effect beside model.expert_width = {model.expert_width} where "
            "no block is dense; leave one of them out, or set model.dense_layers"
        )
    if model.bias:
        yield "model.bias = true is not for experts, which have none; set model.bias=false"


def _data(config: Config) -> list[str]:
    """What is wrong with mixtures and sequence lengths, from the first to the last."""
    data, (multiple, why) = config.data, _unit_of_lengths(config)
    try:
        along = phases_of(data)
    except ValueError as error:
        return [f"data.lengths or data.mixtures: {error}"]
    problems = [
        f"data.train names {prefix!r} twice; give it one larger weight"
        for prefix in sorted(word for word, count in Counter(data.train).items() if count > 1)
    ]
    if late := [stage.tokens for stage in along if stage.tokens >= config.train.tokens]:
        problems.append(
            f"data.lengths or data.mixtures: a stage at {late[0]:g} tokens is never reached, since train.tokens = "
            f"{config.train.tokens}; leave it out, or raise train.tokens"
        )
    longest = max(stage.length for stage in along)
    for key, length in [("data.sequence_length", along[0].length), *(("data.lengths", s.length) for s in along[1:])]:
        if length < 1 or longest % length:
            problems.append(f"{key} = {length} does not divide the longest, {longest}; let every length divide it")
        elif length % multiple:
            problems.append(
                f"{key} = {length} is not a multiple of {multiple}, as {why}; "
                f"nearest that are: {nearest_multiples(multiple, length)}"
            )
    for key, weights in [("data.weights", along[0].weights), *(("data.mixtures", s.weights) for s in along[1:])]:
        if weights and len(weights) != len(data.train):
            problems.append(f"{key} has {len(weights)} values and data.train {len(data.train)}; give one for each")
        elif weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            problems.append(f"{key} = {list(weights)} must be shares: none below 0, and not all 0")
    return list(dict.fromkeys(problems))


def _unit_of_lengths(config: Config) -> tuple[int, str]:
    """What every sequence length must be a multiple of, and why: a cp rank holds two chunks, and tp may split them."""
    cp, tp = config.parallel.cp, config.parallel.tp if config.parallel.sequence_parallel else 1
    causes = [f"parallel.cp = {cp}"] * (cp > 1) + [f"parallel.sequence_parallel over parallel.tp = {tp}"] * (tp > 1)
    multiple = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    return multiple, f"{' and '.join(causes)} need{'s' * (len(causes) == 1)}"


def _float8(config: Config) -> list[str]:
    """What float8 products cannot take: other types around them, and sides on a rank that are no multiples of 16."""
    model, tp, fp8 = config.model, config.parallel.tp, config.compute.fp8
    if fp8 == "none":
        return []
    try:
        lengths = {
            f"sequence length {stage.length} / parallel.cp": stage.length // config.parallel.cp
            for stage in phases_of(config.data)
        }
    except ValueError:
        lengths = {}  # refused elsewhere
    sides = {
        "model.width": model.width,
        "model.mlp_width / parallel.tp": model.mlp_width // tp,
        "model.heads x model.head_size / parallel.tp": model.heads * model.head_size // tp,
        "2 x model.kv_heads x model.head_size / parallel.tp": 2 * model.kv_heads * model.head_size // tp,
        **lengths,
    }
    problems = [
        f"{name} = {size} is not a multiple of 16, as compute.fp8 = {fp8!r} needs; "
        f"nearest that are: {nearest_multiples(16, size)}"
        for name, size in sides.items()
        if size % 16
    ]
    if model.experts:
        problems.append(f"compute.fp8 = {fp8!r} is not there for experts; leave it out, or leave out model.experts")
    if config.train.dtype not in ("bfloat16", "float32"):
        problems.append(
            f"compute.fp8 = {fp8!r} gives bfloat16 or float32, not train.dtype = {config.train.dtype!r}; choose one of "
            "those, or leave it out"
        )
    return problems


def _batch(config: Config) -> list[str]:
    """What is wrong with a growing batch."""
    batch = config.batch
    if batch.largest and batch.largest < batch.global_batch:
        return [f"batch.largest = {batch.largest} is below batch.global_batch = {batch.global_batch}; raise it"]
    stop_at = config.resilience.stop_at_batch
    if stop_at and (batch.policy == "constant" or stop_at <= batch.global_batch):
        return [
            f"resilience.stop_at_batch = {stop_at} is no batch that batch.policy = {batch.policy!r} grows to from "
            f"batch.global_batch = {batch.global_batch}; raise it, or leave it out"
        ]
    if batch.policy in ("noise-scale", "measured") and not config.train.noise_scale:
        return [f"batch.policy = {batch.policy!r} needs train.noise_scale = true"]
    if batch.policy == "measured" and batch.global_batch == 1:
        return ["batch.policy = 'measured' measures nothing at batch.global_batch = 1; set it to at least 2"]
    if batch.policy == "measured" and config.optimizer.name == "muon":
        return [
            "batch.policy = 'measured' changes the hyperparameters of AdamW, and optimizer.name = 'muon' has others; "
            "set batch.policy = 'constant' or 'table', or optimizer.name = 'adamw'"
        ]
    if len(batch.critical_batch) != 2 or not all(0 < value < math.inf for value in batch.critical_batch):
        return [f"batch.critical_batch = {list(batch.critical_batch)} must be two numbers above 0: scale, exponent"]
    if batch.policy == "table" and not batch.table:
        return ['batch.table is empty; give the growth as tokens:batch words, such as ["1e9:512"]']
    if batch.policy == "ramp":
        missing = [f"batch.{key}" for key in ("largest", "increment", "ramp_samples") if not getattr(batch, key)]
        if missing:
            return [f"batch.policy = 'ramp' needs {', '.join(missing)} above 0"]
        if batch.largest == batch.global_batch or (batch.largest - batch.global_batch) % batch.increment:
            return [
                f"batch.increment = {batch.increment} does not lead from batch.global_batch = {batch.global_batch} to "
                f"batch.largest = {batch.largest}; their difference must be a multiple of it"
            ]
    try:
        steps = parse_table(batch.table)
    except ValueError as error:
        return [f"batch.table: {error}"]
    if steps and steps[0][1] <= batch.global_batch:
        return [f"batch.table begins at {steps[0][1]}, not above batch.global_batch = {batch.global_batch}; raise it"]
    return []


def _sparsity(config: Config) -> Iterator[str]:
    """What is wrong with sparse weights."""
    sparsity, layers = config.sparsity, config.model.layers
    if sparsity.layers and sparsity.density != 1:
        yield f"sparsity.density = {sparsity.density:g} has no effect beside sparsity.layers; leave one of them out"
    if sparsity.layers and len(sparsity.layers) != layers:
        yield (
            f"sparsity.layers has {len(sparsity.layers)} densities and model.layers = {layers}; give one for each block"
        )
    if not all(0 < density <= 1 for density in sparsity.layers):
        yield f"sparsity.layers = {list(sparsity.layers)} must all be above 0 and at most 1"
    if sparsity.method in ("gradual", "rigl") and sparsity.density == 1 and not sparsity.layers:
        yield (
            f"sparsity.density = 1 leaves nothing to sparsity.method = {sparsity.method!r}; make it less, such as 0.5"
        )
    if sparsity.method == "gradual" and sparsity.begin >= sparsity.end:
        yield f"sparsity.begin = {sparsity.begin:g} is not before sparsity.end = {sparsity.end:g}"
    if sparsity.method == "gradual" and config.parameterization.name == "smupar":
        yield (
            "parameterization.name = 'smupar' is for one density, which sparsity.method = 'gradual' has not; "
            "set parameterization.name=mup"
        )
    if sparsity.method == "gradual" and sparsity.end == 1:
        yield "sparsity.end = 1 leaves no steps at the final density; lower it, such as 0.75"
    if sparsity.method != "none" and config.optimizer.name == "muon":
        yield (
            f"sparsity.method = {sparsity.method!r} with optimizer.name = 'muon' would make whole matrices orthogonal, "
            "of which a mask leaves something else; set optimizer.name=adamw"
        )


def _engines(config: Config) -> Iterator[str]:
    """What other engines cannot do."""
    if config.compute.norms != "megahp" and config.train.noise_scale:
        yield (
            f"compute.norms = {config.compute.norms!r} cannot measure the noise scale; set train.noise_scale=false, or "
            "leave it out"
        )
    if config.optimizer.engine == "apex" and config.train.dtype == "float64":
        yield (
            "optimizer.engine = 'apex' has no float64, the weights' type where train.dtype = 'float64'; choose another"
        )


def _weights(config: Config) -> Iterator[str]:
    """What cannot be where only some weights are trained."""
    train = config.train
    if train.weights == "all":
        return
    chosen = f"train.weights = {train.weights!r}"
    if not train.start_from:
        yield f"{chosen} would leave all else as it was drawn; name a checkpoint in train.start_from, or leave it out"
    if train.noise_scale:
        yield f"{chosen} trains no norm layers, in which the noise scale is measured; set train.noise_scale=false"
    if config.sparsity.method in ("gradual", "rigl"):
        yield (
            f"sparsity.method = {config.sparsity.method!r} changes weights that {chosen} leaves as they are; set "
            "sparsity.method=none"
        )
    if config.optimizer.engine == "apex" and config.parallel.pp > 1:
        yield (
            f"optimizer.engine = 'apex' wants weights on every rank, and with {chosen} and parallel.pp = "
            f"{config.parallel.pp} some may train none; leave it out"
        )


def _schedule(config: Config) -> Iterator[str]:
    """What is wrong with the learning rate's schedule."""
    schedule = config.schedule
    if schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        yield (
            f"schedule.warmup = {schedule.warmup:g} and schedule.decay = {schedule.decay:g} overlap; "
            f"let them add up to at most 1"
        )
    if schedule.name == "inverse-sqrt" and not schedule.warmup:
        yield "schedule.warmup = 0 leaves inverse-sqrt without a start; make it above 0, such as 0.01"
    if schedule.start and not config.train.start_from:
        yield (
            f"schedule.start = {schedule.start} needs a run that begins there; name its checkpoint in "
            "train.start_from, or leave it out"
        )
    if schedule.start >= config.train.tokens:
        yield f"schedule.start = {schedule.start} is not before its end, train.tokens = {config.train.tokens}"


def _checkpoints(config: Config) -> Iterator[str]:
    """What asks for checkpoints that there would not be."""
    kept = config.checkpoint
    if config.resilience.spikes == "rewind" and not kept.every:
        yield (
            "resilience.spikes = 'rewind' goes back to checkpoints, and with checkpoint.every = 0 there is none before "
            "the end; set checkpoint.every"
        )
    if kept.every and kept.keep_every % kept.every:
        yield (
            f"checkpoint.keep_every = {kept.keep_every} is no multiple of checkpoint.every = "
            f"{kept.every}, so few would be kept; nearest: "
            f"{nearest_multiples(kept.every, kept.keep_every)}"
        )


def _hang(config: Config) -> Iterator[str]:
    """What is too short to tell a hang from a step."""
    if 0 < config.resilience.hang_after < 1:
        yield (
            f"resilience.hang_after = {config.resilience.hang_after:g} would take usual steps for hangs; make it at "
            "least 1, or 0 for never"
        )


def _no_path(path: str) -> str:
    """Return what is wrong with the name of a file or folder of this machine, which scripts and other programs are
    given too; "" if nothing is."""
    if not path.isprintable():
        return "holds a character that is not printable; take it out"
    if "://" in path:
        return "is a URL, and must be a path of this machine"
    if path.startswith("~"):
        return "begins with ~, which a shell alone expands; write the whole path"
    if any(len(part.encode()) > 255 for part in PurePath(path).parts):
        return "has a part of more than 255 bytes; shorten it"
    return ""


def _run(config: Config) -> Iterator[str]:
    """What is wrong with a run's name, length and validation."""
    train = config.train
    name = PurePath(config.log.name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        yield f"log.name = {config.log.name!r} names no folder inside log.root; choose one such as first"
    data, log = config.data, config.log
    places = [("log.name", log.name), ("log.root", log.root), ("data.tokenizer", data.tokenizer)]
    places += [("data.cache", data.cache), *(("data.train", prefix) for prefix in data.train)]
    yield from (f"{key} = {path!r} {wrong}" for key, path in places if (wrong := _no_path(path)))
    if train.validation_samples and not config.data.validation_fraction:
        yield (
            f"train.validation_samples = {train.validation_samples} needs documents held out, and "
            "data.validation_fraction is 0; raise it, or set train.validation_samples=0"
        )
    if train.tokens < config.data.sequence_length * config.batch.global_batch:
        yield (
            f"train.tokens = {train.tokens} is less than one batch of "
            f"{config.batch.global_batch} x {config.data.sequence_length} tokens"
        )


CHECKS = (
    _model,
    _experts,
    _tensor_parallel,
    _data_parallel,
    _pipeline,
    _data,
    _batch,
    _float8,
    _sparsity,
    _engines,
    _weights,
    _schedule,
    _checkpoints,
    _hang,
    _run,
)
