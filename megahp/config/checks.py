"""Cross-field validation of settings: combinations that cannot run on any number of ranks.

Each problem is one line that names the settings, their values and the remedy.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from megahp.config.phases import parse_skip, parse_table, parse_validation, phases_of
from megahp.config.schema import AUTO, FP4_BLOCKS, VOCAB_MULTIPLE, Config
from megahp.errors import nearest_divisors, nearest_multiples

STAGES_PER_RANK = {
    "1f1b": range(1, 2),
    "interleaved": range(2, sys.maxsize),
    "zero-bubble": range(1, sys.maxsize),
    "zbv": range(2, 3),
}


def find_conflicts(config: Config) -> list[str]:
    """Return the problems of settings that do not go together, all at once."""
    return [problem for check in CHECKS for problem in check(config)]


def find_unused(config: Config) -> Iterator[tuple[str, str]]:
    """Yield settings without effect, each with the reason, for conditions that `only_with` cannot express."""
    layers, sources = config.model.layers, config.data.train
    if config.compute.recompute_every > layers:
        yield "compute.recompute_every", f"model.layers = {layers}; it needs at most {layers}"
    if len(sources) == 1 and not list(_data(config)):
        for key in ("data.weights", "data.mixtures"):
            yield key, f"data.train = {list(sources)}, the only source; it needs at least 2 prefixes"
    if config.schedule.name == "wsd" and not config.schedule.decay:
        for key in ("schedule.shape", "schedule.floor"):
            yield key, "schedule.decay = 0; it needs one above 0"
    if not config.distill.teachers:
        for key in ("distill.fingerprints", "distill.weight"):
            yield key, "distill.teachers = []; it needs at least one"
    if not {"nvfp4", "ue5m3"} & set(config.compute.fp4.values()):
        formats = (
            f"compute.fp4_forward = {config.compute.fp4_forward!r} and fp4_backward = {config.compute.fp4_backward!r}"
        )
        yield "compute.fp4_tensor_scale", f"{formats}; it needs nvfp4 or ue5m3 in one of them"
    if not config.checkpoint.every:
        yield "checkpoint.keep_best", "checkpoint.every = 0, which saves one at the end only; it needs at least 1"


def _not_a_divisor(key: str, value: int, whole_key: str, whole: int) -> str:
    near = nearest_divisors(whole, value)
    return f"{key} = {value} does not divide {whole_key} = {whole}; nearest that do: {near}"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.width % model.heads and not model.head_size:
        yield _not_a_divisor("model.heads", model.heads, "model.width", model.width)
    rotated = int(model.head_size * model.rope_fraction)
    if model.positions == "rope" and (rotated % 2 or model.head_size and not rotated):
        share = f" with model.rope_fraction = {model.rope_fraction:g}" if model.rope_fraction < 1 else ""
        yield (
            f"model.head_size = {model.head_size}{share} has {rotated} rotated dimensions, but rope rotates pairs of "
            "them; make it even"
        )
    if model.rope_scaling in ("llama3", "yarn"):
        if not model.rope_original_length:
            yield f"model.rope_scaling = {model.rope_scaling!r} needs model.rope_original_length; set it above 0"
        if model.rope_fast <= model.rope_slow:
            yield f"model.rope_fast = {model.rope_fast:g} must be above model.rope_slow = {model.rope_slow:g}; raise it"
    if model.kv_heads and model.heads % model.kv_heads:
        yield _not_a_divisor("model.kv_heads", model.kv_heads, "model.heads", model.heads)
    if model.levels and (min(model.levels) < 2 or 0 < model.vocab_size < sum(model.levels)):
        levels, size = list(model.levels), model.vocab_size
        yield (
            f"model.levels = {levels} must be 2 ids or more each, and at most model.vocab_size = {size} "
            "together; remove it, the tokenizer fills it in"
        )


def _experts(config: Config) -> Iterator[str]:
    model, ep = config.model, config.parallel.ep
    if not model.experts:
        return
    if model.experts_per_token > model.experts:
        top_k = f"model.experts_per_token = {model.experts_per_token}"
        yield f"{top_k} is more than model.experts = {model.experts}; make it at most {model.experts}"
    if model.experts % ep:
        yield _not_a_divisor("parallel.ep", ep, "model.experts", model.experts)
    if model.dense_layers >= model.layers:
        yield (
            f"model.dense_layers = {model.dense_layers} leaves no block of model.layers = {model.layers} for experts; "
            f"make it at most {model.layers - 1}, or remove model.experts"
        )
    if not model.dense_layers and model.mlp_width != model.expert_width:
        yield (
            f"model.mlp_width = {model.mlp_width} has no effect beside model.expert_width = {model.expert_width} "
            "without dense blocks; remove one of them, or set model.dense_layers"
        )
    if model.bias:
        yield "model.bias = true, but experts have no biases; set model.bias=false"
    if model.activation == "xielu":
        yield "model.activation = 'xielu' is not for experts; choose another, or remove model.experts"


def _tensor_parallel(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    # with fewer key/value heads than ranks several ranks share one, and its query heads
    kv_heads = model.kv_heads or model.heads
    shared = kv_heads < parallel.tp
    split = {
        "model.heads" if shared else "model.kv_heads": model.heads if shared else kv_heads,
        "model.mlp_width": model.mlp_width,
        "the padded vocabulary": VOCAB_MULTIPLE,
    }
    if model.experts:
        split["model.expert_width"] = model.expert_width
    rows = (model.heads + 2 * kv_heads) * model.head_size
    if undivided := [f"{key} = {size}" for key, size in split.items() if size % parallel.tp]:
        yield (
            f"parallel.tp = {parallel.tp} does not divide {' nor '.join(undivided)}; "
            f"nearest that do: {nearest_divisors(math.gcd(*split.values()), parallel.tp)}"
        )
    elif shared and (parallel.tp % kv_heads or rows % parallel.tp):
        yield (
            f"parallel.tp = {parallel.tp} cannot share model.kv_heads = {kv_heads} of model.head_size = "
            f"{model.head_size}; nearest that can: {nearest_divisors(kv_heads, parallel.tp)}"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel = true has no ranks to split over with parallel.tp = 1; set at least 2"


def _data_parallel(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.dp_replicate and not parallel.dp_shard:
        yield "parallel.dp_replicate and parallel.dp_shard are both 0; only one can take the remaining ranks"
    if parallel.zero_level == 1 and parallel.reduce == "every":
        yield "parallel.reduce = 'every' needs parallel.zero = 2 or 3, and no pipeline; set parallel.reduce=once"
    if parallel.pp > 1 and parallel.zero > 1:
        yield f"parallel.zero = {parallel.zero} does not support parallel.pp = {parallel.pp}; remove one of them"


def _pipeline(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if parallel.pp == 1:
        return
    schedule = f"parallel.schedule = {parallel.schedule!r}"
    stages = parallel.pp * parallel.local_stages
    if parallel.local_stages not in (allowed := STAGES_PER_RANK[parallel.schedule]):
        yield (
            f"parallel.stages_per_rank = {parallel.stages_per_rank} does not work with {schedule}, which has "
            f"{allowed.start}{' or more' * (len(allowed) > 1)}; remove it, or choose another schedule"
        )
    if stages > model.layers:
        yield (
            f"parallel.pp = {parallel.pp} with {parallel.local_stages} stages per rank needs {stages} blocks, but "
            f"model.layers = {model.layers}; at most parallel.pp={max(1, model.layers // parallel.local_stages)}"
        )
    if parallel.split and (len(parallel.split), sum(parallel.split)) != (stages, model.layers):
        yield (
            f"parallel.split = {list(parallel.split)} must list the blocks of {stages} stages, {model.layers} in all; "
            "remove it to balance them automatically"
        )
    if min(parallel.split, default=1) < 1:
        yield f"parallel.split = {list(parallel.split)} leaves a stage without blocks; give each at least 1"
    # These schedules compute the gradients of inputs and of weights in separate passes.
    split_backward = parallel.schedule in ("zero-bubble", "zbv")
    if split_backward and config.compute.recompute == "selective":
        yield f"compute.recompute = 'selective' does not support {schedule}; set compute.recompute=full"
    if split_backward and config.compute.compile is True:
        yield f"compute.compile = true is not verified with {schedule}; remove it, or choose another schedule"
    if config.batch.micro_batch == AUTO:
        yield (
            f"batch.micro_batch = {AUTO!r} does not support parallel.pp = {parallel.pp}, whose idle time the number of "
            "microbatches decides; set a number"
        )
    if parallel.schedule == "zbv" and model.tied_embeddings:
        yield (
            f"{schedule} puts both ends of the model on one rank, where model.tied_embeddings = true would need two "
            "copies; choose another schedule"
        )


def _data(config: Config) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    try:
        phases = phases_of(data)
    except ValueError as error:
        yield f"data.lengths or data.mixtures: {error}"
        return
    for prefix in sorted(prefix for prefix, count in Counter(data.train).items() if count > 1):
        yield f"data.train names {prefix!r} twice; give it one larger weight"
    if late := [phase.tokens for phase in phases if phase.tokens >= config.train.tokens]:
        yield (
            f"data.lengths or data.mixtures: a phase at {late[0]:g} tokens is never reached, since train.tokens = "
            f"{config.train.tokens}; remove it, or raise train.tokens"
        )
    # A cp rank holds two chunks of a sequence, for causal balance; with sequence_parallel tp splits these further.
    cp, tp = parallel.cp, parallel.tp if parallel.sequence_parallel else 1
    multiple = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    causes = [f"parallel.cp = {cp}"] * (cp > 1) + [f"parallel.sequence_parallel over parallel.tp = {tp}"] * (tp > 1)
    longest = max(phase.length for phase in phases)
    problems: list[str] = []
    for index, phase in enumerate(phases):
        key, length = "data.lengths" if index else "data.sequence_length", phase.length
        if length < 1 or longest % length:
            problems.append(f"{key} = {length} does not divide the longest, {longest}; use lengths that do")
        elif length % multiple:
            problems.append(
                f"{key} = {length} is not a multiple of {multiple}, as {' and '.join(causes)} "
                f"need{'s' * (len(causes) == 1)}; nearest that are: {nearest_multiples(multiple, length)}"
            )
    for index, phase in enumerate(phases):
        key, weights = "data.mixtures" if index else "data.weights", phase.weights
        if weights and len(weights) != len(data.train):
            problems.append(f"{key} has {len(weights)} values but data.train {len(data.train)}; give one for each")
        elif weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            problems.append(f"{key} = {list(weights)} must be shares: none below 0, and not all 0")
    yield from dict.fromkeys(problems)  # once each: a phase repeats the values that it does not change


def _batch(config: Config) -> Iterator[str]:
    """Yield the first problem of the batch policy: the others would follow from it."""
    batch, stop_at = config.batch, config.resilience.stop_at_batch
    policy = f"batch.policy = {batch.policy!r}"
    ramp = [f"batch.{key}" for key in ("largest", "increment", "ramp_samples") if not getattr(batch, key)]
    try:
        table, wrong_word = parse_table(batch.table), None
    except ValueError as error:
        table, wrong_word = [], error
    if batch.largest and batch.largest < batch.global_batch:
        yield f"batch.largest = {batch.largest} is below batch.global_batch = {batch.global_batch}; raise it"
    elif stop_at and (not batch.grows or stop_at <= batch.global_batch):
        yield (
            f"resilience.stop_at_batch = {stop_at} is not reached by growth from batch.global_batch = "
            f"{batch.global_batch} with {policy}; raise it, or remove it"
        )
    elif batch.policy in ("noise-scale", "measured") and not config.train.noise_scale:
        yield f"{policy} needs the noise scale; set train.noise_scale = true"
    elif batch.policy == "measured" and batch.global_batch == 1:
        yield f"{policy} measures nothing at batch.global_batch = 1; set it to at least 2"
    elif batch.policy == "measured" and config.optimizer.name != "adamw":
        name = f"optimizer.name = {config.optimizer.name!r}"
        yield (
            f"{policy} rescales the hyperparameters of AdamW, but {name} has others; "
            "set batch.policy = 'constant' or 'table', or optimizer.name = 'adamw'"
        )
    elif len(batch.critical_batch) != 2 or not all(0 < value < math.inf for value in batch.critical_batch):
        yield (
            f"batch.critical_batch = {list(batch.critical_batch)} must be two numbers above 0: scale, exponent, as in "
            "[96.4608, 0.462]"
        )
    elif batch.policy == "table" and not batch.table:
        yield 'batch.table is empty; give the growth as tokens:batch words, such as ["1e9:512"]'
    elif batch.policy == "ramp" and ramp:
        yield f"{policy} needs {', '.join(ramp)}; set {'it' if len(ramp) == 1 else 'them'} above 0"
    elif batch.policy == "ramp" and (
        batch.largest == batch.global_batch or (batch.largest - batch.global_batch) % batch.increment
    ):
        yield (
            f"batch.increment = {batch.increment} does not lead from batch.global_batch = {batch.global_batch} to "
            f"batch.largest = {batch.largest}; make their difference a multiple of it"
        )
    elif wrong_word:
        yield f"batch.table: {wrong_word}"
    elif table and table[0][1] <= batch.global_batch:
        yield f"batch.table begins at {table[0][1]}, not above batch.global_batch = {batch.global_batch}; raise it"


def _float8(config: Config) -> Iterator[str]:
    """Float8 kernels need sides that are multiples of 16 on every rank, and bfloat16 or float32 around them."""
    model, tp, fp8 = config.model, config.parallel.tp, config.compute.fp8
    if fp8 == "none":
        return
    sides = _inputs(config) | {
        "2 x model.kv_heads x model.head_size / parallel.tp": 2 * model.kv_heads * model.head_size // tp
    }
    for length in _lengths(config):
        sides[f"sequence length {length} / parallel.cp"] = length // config.parallel.cp
    for name, size in sides.items():
        if size % 16:
            yield (
                f"{name} = {size} is not a multiple of 16, as compute.fp8 = {fp8!r} needs; "
                f"nearest that are: {nearest_multiples(16, size)}"
            )
    if model.experts:
        yield f"compute.fp8 = {fp8!r} does not support experts; remove it, or remove model.experts"
    if config.train.dtype not in ("bfloat16", "float32", AUTO):
        yield (
            f"compute.fp8 = {fp8!r} outputs bfloat16 or float32, not train.dtype = {config.train.dtype!r}; choose one "
            "of those, or remove it"
        )


def _fp4(config: Config) -> Iterator[str]:
    """Blocks must lie within a rank's part of what a product sums over: of the inputs forward; backward of the outputs,
    and of a sequence's tokens, of which context parallelism gives a rank two spans."""
    model, compute, tp, cp = config.model, config.compute, config.parallel.tp, config.parallel.cp
    inputs, heads = [*_inputs(config).items()], model.heads + 2 * model.kv_heads
    spans, name = (2 * cp, f"sequence length {{}} / (2 x parallel.cp = {cp})") if cp > 1 else (1, "sequence length")
    sides = {
        "forward": inputs,
        "backward": [
            *inputs[:2],  # outputs as well: of attention and the MLP, and of its first products
            ("(model.heads + 2 x model.kv_heads) x model.head_size / parallel.tp", heads * model.head_size // tp),
            *((name.format(length), length // spans) for length in _lengths(config)),
        ],
    }
    for direction, kind in compute.fp4.items():
        for name, size in sides[direction]:
            if size % (block := FP4_BLOCKS[kind]):
                yield (
                    f"{name} = {size} is not a multiple of {block}, the block of compute.fp4_{direction} = {kind!r}; "
                    f"nearest that are: {nearest_multiples(block, size)}"
                )
    if compute.fp4:
        others = {
            "experts": model.experts > 0,
            "compute.fp8": compute.fp8 != "none",
            "model.quantize": model.quantize != "none",
        }
        for key, is_set in others.items():
            if is_set:
                yield f"compute.fp4_{next(iter(compute.fp4))} does not support {key}; remove one of them"
    wanted = {"both": ("forward", "backward"), "none": ()}.get(compute.fp4_hadamard, (compute.fp4_hadamard,))
    for direction in wanted:
        if direction not in compute.fp4:
            yield (
                f"compute.fp4_hadamard = {compute.fp4_hadamard!r} rotates nothing with compute.fp4_{direction} = "
                f"'none'; set one, or compute.fp4_hadamard={next(iter(compute.fp4), 'none')}"
            )


def _inputs(config: Config) -> dict[str, int]:
    """Return the inputs of the hidden matrices on a rank, by what decides them."""
    model, tp = config.model, config.parallel.tp
    return {
        "model.width": model.width,
        "model.mlp_width / parallel.tp": model.mlp_width // tp,
        "model.heads x model.head_size / parallel.tp": model.heads * model.head_size // tp,
    }


def _lengths(config: Config) -> list[int]:
    """Return the lengths of the phases' sequences."""
    try:
        return list(dict.fromkeys(phase.length for phase in phases_of(config.data)))
    except ValueError:
        return []  # reported by _data


def _quantize(config: Config) -> Iterator[str]:
    """Groups must lie within a rank's weights."""
    model = config.model
    if model.quantize == "none":
        return
    for name, size in _inputs(config).items():
        if size % model.quantize_group:
            yield (
                f"{name} = {size} is not a multiple of model.quantize_group = {model.quantize_group}; choose a group "
                "that divides it"
            )
    for key, is_set in {"experts": model.experts > 0, "compute.fp8": config.compute.fp8 != "none"}.items():
        if is_set:
            yield f"model.quantize = {model.quantize!r} does not support {key}; remove one of them"


def _sparsity(config: Config) -> Iterator[str]:
    sparsity, layers = config.sparsity, config.model.layers
    method = f"sparsity.method = {sparsity.method!r}"
    if sparsity.layers and sparsity.density != 1:
        yield f"sparsity.density = {sparsity.density:g} has no effect beside sparsity.layers; remove one of them"
    if sparsity.layers and len(sparsity.layers) != layers:
        yield f"sparsity.layers has {len(sparsity.layers)} densities but model.layers = {layers}; give one per block"
    if not all(0 < density <= 1 for density in sparsity.layers):
        yield f"sparsity.layers = {list(sparsity.layers)} must all be above 0 and at most 1"
    if sparsity.method in ("gradual", "rigl") and sparsity.density == 1 and not sparsity.layers:
        yield f"sparsity.density = 1 masks nothing with {method}; lower it, such as 0.5"
    if sparsity.method == "gradual" and sparsity.begin >= sparsity.end:
        yield f"sparsity.begin = {sparsity.begin:g} is not before sparsity.end = {sparsity.end:g}; lower it"
    if sparsity.method == "gradual" and config.parameterization.name == "smupar":
        yield f"parameterization.name = 'smupar' needs a constant density, not {method}; set parameterization.name=mup"
    if sparsity.method == "gradual" and config.parameterization.scale_density:
        yield f"parameterization.scale_density needs a constant density, not {method}; set it to false"
    if sparsity.method == "gradual" and sparsity.end == 1:
        yield "sparsity.end = 1 leaves no steps at the final density; lower it, such as 0.75"
    if sparsity.method != "none" and config.optimizer.name != "adamw":
        yield (
            f"{method} would mask the updates that optimizer.name = {config.optimizer.name!r} makes of whole matrices; "
            "set optimizer.name=adamw"
        )


def _optimizer(config: Config) -> Iterator[str]:
    model, optimizer = config.model, config.optimizer
    if optimizer.name in ("dct", "galore") and optimizer.rank >= model.width:
        yield (
            f"optimizer.rank = {optimizer.rank} saves no moments, since matrices have model.width = {model.width} on a "
            f"side; make it smaller, such as {max(1, model.width // 4)}, or set optimizer.name=adamw"
        )


def _engines(config: Config) -> Iterator[str]:
    if config.compute.norms != "megahp" and config.train.noise_scale:
        norms = f"compute.norms = {config.compute.norms!r}"
        yield f"{norms} cannot measure the noise scale; set train.noise_scale=false, or remove it"
    if config.optimizer.engine == "apex" and config.train.dtype == "float64":
        yield "optimizer.engine = 'apex' does not support train.dtype = 'float64'; choose another"
    if config.compute.compile is True and config.batch.varies_micro_batch:
        yield (
            "compute.compile = true compiles blocks anew for every size of microbatches, and batch.micro_batch = "
            f"{AUTO!r} has many under batch.policy = {config.batch.policy!r}; set a number, or compute.compile=auto"
        )


def _deepspeed(config: Config) -> Iterator[str]:
    """Yield what DeepSpeed does not compute, or megahp has not checked with it."""
    parallel, compute = config.parallel, config.compute
    if parallel.engine != "deepspeed":
        return
    engine = "parallel.engine = 'deepspeed'"
    for axis in ("tp", "pp", "cp", "ep"):
        if (size := getattr(parallel, axis)) > 1:
            yield f"{engine} supports data parallelism alone, not parallel.{axis} = {size}; set parallel.{axis}=1"
    if parallel.dp_replicate != 1:
        yield (
            f"{engine} shards over all ranks, not over replicas (parallel.dp_replicate = {parallel.dp_replicate}); "
            "set parallel.dp_replicate=1"
        )
    if parallel.reduce == "every":
        yield f"{engine} reduces once a step in ZeRO 1, every time in 2 and 3; remove parallel.reduce = 'every'"
    if parallel.prefetch:
        yield f"{engine} decides itself what to gather ahead; remove parallel.prefetch = {parallel.prefetch}"
    unsupported = {
        "model.experts": (config.model.experts, 0),
        "optimizer.name": (config.optimizer.name, "adamw"),
        "optimizer.engine": (config.optimizer.engine, "torch"),
        "sparsity.method": (config.sparsity.method, "none"),
        "train.weights": (config.train.weights, "all"),
        "compute.compile": (compute.compile is True, False),
        "compute.fp8": (compute.fp8, "none"),
        "compute.fp4_forward": (compute.fp4_forward, "none"),
        "compute.fp4_backward": (compute.fp4_backward, "none"),
        "model.quantize": (config.model.quantize, "none"),
        "compute.norms": (compute.norms, "megahp"),
    }
    for key, (value, supported) in unsupported.items():
        if value != supported:
            yield f"{engine} does not support {key} = {_word(value)}; set {key}={_word(supported).strip(chr(39))}"
    if config.train.dtype == "float64":
        yield f"{engine} keeps master weights in float32, not train.dtype = 'float64'; choose another"


def _word(value: Any) -> str:
    """Return a setting's value as a message shows it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _trained_weights(config: Config) -> Iterator[str]:
    train = config.train
    if train.weights == "all":
        return
    chosen = f"train.weights = {train.weights!r}"
    if not train.start_from:
        yield f"{chosen} would leave all other weights untrained; name a checkpoint in train.start_from, or remove it"
    if train.noise_scale:
        yield f"{chosen} trains no norm layers, which the noise scale is measured in; set train.noise_scale=false"
    if config.sparsity.method in ("gradual", "rigl"):
        method = f"sparsity.method = {config.sparsity.method!r}"
        yield f"{method} changes weights that {chosen} freezes; set sparsity.method=none"
    if config.optimizer.engine == "apex" and config.parallel.pp > 1:
        yield (
            f"optimizer.engine = 'apex' needs weights on every rank, but with {chosen} and parallel.pp = "
            f"{config.parallel.pp} some ranks may train none; remove it"
        )


def _distill(config: Config) -> Iterator[str]:
    """Yield the layouts on which teachers do not predict."""
    parallel, teachers = config.parallel, config.distill.teachers
    if not teachers:
        return
    one = f"distill.teachers = {list(teachers)}"
    for key, size in (("parallel.pp", parallel.pp), ("parallel.ep", parallel.ep)):
        if size > 1:
            yield f"{one} is not supported with {key} = {size}; set {key}=1, or remove it"
    if parallel.engine == "deepspeed":
        yield f"{one} is not supported with parallel.engine = 'deepspeed'; set parallel.engine=megahp, or remove it"


def _schedule(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        both = f"schedule.warmup = {schedule.warmup:g} and schedule.decay = {schedule.decay:g}"
        yield f"{both} overlap; let them add up to at most 1"
    if schedule.name == "inverse-sqrt" and not schedule.warmup:
        yield "schedule.warmup = 0 gives inverse-sqrt no reference point; set it above 0, such as 0.01"
    if schedule.start and not config.train.start_from:
        yield f"schedule.start = {schedule.start} needs train.start_from; name the checkpoint to begin at, or remove it"
    if schedule.start >= config.train.tokens:
        yield f"schedule.start = {schedule.start} is not before its end, train.tokens = {config.train.tokens}; lower it"


def _resilience(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if config.resilience.spikes == "rewind" and not checkpoint.every:
        yield "resilience.spikes = 'rewind' needs checkpoints to return to, but checkpoint.every = 0; set it above 0"
    if checkpoint.every and checkpoint.keep_every % checkpoint.every:
        near = nearest_multiples(checkpoint.every, checkpoint.keep_every)
        both = f"checkpoint.keep_every = {checkpoint.keep_every} is not a multiple of checkpoint.every"
        yield f"{both} = {checkpoint.every}, so few would be kept; nearest: {near}"
    if 0 < config.resilience.hang_after < 1:
        yield (
            f"resilience.hang_after = {config.resilience.hang_after:g} would take usual steps for hangs; make it at "
            "least 1, or 0 for never"
        )


def _run(config: Config) -> Iterator[str]:
    train, data, log = config.train, config.data, config.log
    name = PurePath(log.name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        yield f"log.name = {log.name!r} is not a folder inside log.root; choose one such as first"
    paths = [("log.name", log.name), ("log.root", log.root), ("data.tokenizer", data.tokenizer)]
    paths += [("data.cache", data.cache), *(("data.train", prefix) for prefix in data.train)]
    sets: dict[str, str] = {}
    try:
        sets = parse_validation(data)
        paths += [("data.validation", prefix) for prefix in sets.values()]
    except ValueError as error:
        yield f"data.validation: {error}"
    try:
        if unknown := sorted(parse_skip(data.skip).keys() - {"", *data.train, *sets.values()}):
            yield f"data.skip names {unknown[0]!r}, which data.train does not; write the prefix as there"
    except ValueError as error:
        yield f"data.skip: {error}"
    yield from (f"{key} = {path!r} {problem}" for key, path in paths if (problem := _path_problem(path)))
    if train.validation_samples and not data.validation_fraction and not data.validation:
        yield (
            f"train.validation_samples = {train.validation_samples} needs held-out documents, but "
            "data.validation_fraction = 0; raise it, or set train.validation_samples=0"
        )
    if train.tokens < config.step_tokens:
        yield (
            f"train.tokens = {train.tokens} is less than one batch of "
            f"{config.batch.global_batch} x {data.sequence_length} tokens; raise it"
        )


def _path_problem(path: str) -> str:
    """Return what is wrong with a local path, "" if nothing. Scripts and other programs are given these paths too."""
    if not path.isprintable():
        return "holds a character that is not printable; take it out"
    if "://" in path:
        return "is a URL; give a local path"
    if path.startswith("~"):
        return "begins with ~, which only a shell expands; write the whole path"
    if any(len(part.encode()) > 255 for part in PurePath(path).parts):
        return "has a part of more than 255 bytes; shorten it"
    return ""


CHECKS = (
    _model,
    _experts,
    _tensor_parallel,
    _data_parallel,
    _pipeline,
    _data,
    _batch,
    _float8,
    _fp4,
    _quantize,
    _sparsity,
    _optimizer,
    _engines,
    _deepspeed,
    _trained_weights,
    _distill,
    _schedule,
    _resilience,
    _run,
)
