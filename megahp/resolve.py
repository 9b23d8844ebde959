"""From a run file and command-line words to a checked tree of settings.

A value comes from the first of: command line, run file, preset, default. Anything unknown, of the wrong type or
impossible is refused here, before torch is imported or a process started; all problems are told at once.
"""

from __future__ import annotations

import difflib
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

from megahp.config import SECTIONS, TYPES, VOCAB_MULTIPLE, Config, get, names, parse_table, stages, with_values
from megahp.errors import UserError, nearest_divisors, nearest_multiples
from megahp.presets import PRESETS

SOME, SEVERAL = range(1, sys.maxsize), range(2, sys.maxsize)
OF_EXPERTS = (
    "experts_per_token expert_width shared_experts dense_layers router_score router_normalize router_scale "
    "balance_rate balance_loss"
)
STAGES_PER_RANK = {"1f1b": range(1, 2), "interleaved": SEVERAL, "zero-bubble": SOME, "zbv": range(2, 3)}
# A setting that only means something beside another one: giving it elsewhere is an error, not silence.
USED_ONLY_WITH: dict[str, tuple[str, Sequence[Any]]] = {
    "model.rope_theta": ("model.positions", ("rope",)),
    **{f"model.{key}": ("model.experts", SOME) for key in OF_EXPERTS.split()},
    "parallel.ep": ("model.experts", SOME),
    "parallel.schedule": ("parallel.pp", SEVERAL),
    "parallel.stages_per_rank": ("parallel.pp", SEVERAL),
    "parallel.split": ("parallel.pp", SEVERAL),
    "parameterization.base_width": ("parameterization.name", ("mup", "completep")),
    "parameterization.base_layers": ("parameterization.name", ("completep",)),
    "parameterization.depth_alpha": ("parameterization.name", ("completep",)),
    "schedule.floor": ("schedule.name", ("linear", "cosine", "wsd")),
    "schedule.decay": ("schedule.name", ("wsd",)),
    "schedule.shape": ("schedule.name", ("wsd",)),
    "batch.largest": ("batch.policy", ("ramp", "table", "law", "noise-scale")),
    "batch.rule": ("batch.policy", ("ramp", "table", "law", "noise-scale")),
    "batch.increment": ("batch.policy", ("ramp",)),
    "batch.ramp_samples": ("batch.policy", ("ramp",)),
    "batch.table": ("batch.policy", ("table",)),
    "batch.target": ("batch.policy", ("law", "noise-scale")),
    "batch.critical_batch": ("batch.policy", ("law",)),
    "batch.noise_to_total": ("batch.policy", ("noise-scale",)),
    "batch.look_every": ("batch.policy", ("noise-scale",)),
    "batch.delay": ("batch.policy", ("noise-scale",)),
    "batch.hysteresis": ("batch.policy", ("noise-scale",)),
    "batch.growth": ("batch.policy", ("noise-scale",)),
    "optimizer.muon_lr": ("optimizer.name", ("muon",)),
    "optimizer.momentum": ("optimizer.name", ("muon",)),
    "compute.recompute_every": ("compute.recompute", ("selective", "full")),
    "log.wandb_project": ("log.wandb", ("offline", "online")),
    "train.noise_half_life": ("train.noise_scale", (True,)),
}


@dataclass(frozen=True)
class Resolved:
    """A checked tree, and where each of its values came from (`section.key` -> origin)."""

    config: Config
    origins: Mapping[str, str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """The run described by a TOML file and by `section.key=value` words. Raises UserError naming every problem."""
    layers = [(Path(path).name, _read(Path(path))), ("command line", parse_overrides(overrides))]
    return resolve(layers)


def resolve(layers: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> Resolved:
    """The tree from (origin, {section: {key: value}}) layers, later ones winning. Raises UserError."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, tree in _with_preset(layers, problems):
        for key, value in _flatten(tree, origin, problems):
            checked = _check(key, value, origin, problems)
            values[key], origins[key] = checked, origin
    _refuse(problems)
    config = Config(
        **{
            name: section(
                **{f.name: values[f"{name}.{f.name}"] for f in fields(section) if f"{name}.{f.name}" in values}
            )
            for name, section in SECTIONS.items()
        }
    )
    config = _without_idle_presets(config, origins)
    problems += _unused(config, origins)
    config = _derive(config, origins)
    problems += impossible(config)
    _refuse(problems)
    return Resolved(config, {key: origins.get(key, "default") for key in names()})


def from_dict(tree: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """The tree written by `to_dict`, checked again."""
    return resolve([(origin, tree)]).config


def impossible(config: Config) -> list[str]:
    """Combinations that cannot run on any number of ranks, one line each."""
    model, parallel, data = config.model, config.parallel, config.data
    problems = []
    if model.width % model.heads and not model.head_size:
        problems.append(
            f"model.heads = {model.heads} does not divide model.width = {model.width}; "
            f"nearest that do: {nearest_divisors(model.width, model.heads)}"
        )
    if model.head_size % 2 and model.positions == "rope":
        problems.append(f"model.head_size = {model.head_size} is odd, and rope turns pairs; make it even")
    if model.kv_heads and model.heads % model.kv_heads:
        problems.append(
            f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}; "
            f"nearest that do: {nearest_divisors(model.heads, model.kv_heads)}"
        )
    split = {
        "model.kv_heads": model.kv_heads,
        "model.mlp_width": model.mlp_width,
        "the padded vocabulary": VOCAB_MULTIPLE,
    }
    if model.experts:
        split["model.expert_width"] = model.expert_width
        problems += _experts(config)
    if undivided := [f"{key} = {size}" for key, size in split.items() if size % parallel.tp]:
        problems.append(
            f"parallel.tp = {parallel.tp} does not divide {' nor '.join(undivided)}; "
            f"nearest that do: {nearest_divisors(math.gcd(*split.values()), parallel.tp)}"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel = true needs parallel.tp of at least 2, which is 1")
    name = PurePath(config.log.name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        problems.append(f"log.name = {config.log.name!r} names no folder inside log.root; choose one such as first")
    problems += _pipeline(config)
    problems += _data_stages(config)
    problems += _float8(config)
    if config.train.validation_samples and not data.validation_fraction:
        problems.append(
            f"train.validation_samples = {config.train.validation_samples} needs documents held out, and "
            "data.validation_fraction is 0; raise it, or set train.validation_samples=0"
        )
    problems += _batch_policy(config)
    if config.compute.norms != "megahp" and config.train.noise_scale:
        problems.append(
            f"compute.norms = {config.compute.norms!r} cannot measure the noise scale; set train.noise_scale=false, or "
            "leave it out"
        )
    if config.optimizer.engine == "apex" and config.train.dtype == "float64":
        problems.append(
            "optimizer.engine = 'apex' has no float64, the weights' type where train.dtype = 'float64'; choose another"
        )
    if config.schedule.name == "wsd" and config.schedule.warmup + config.schedule.decay > 1:
        problems.append(
            f"schedule.warmup = {config.schedule.warmup:g} and schedule.decay = {config.schedule.decay:g} overlap; "
            f"let them add up to at most 1"
        )
    if config.schedule.name == "inverse-sqrt" and not config.schedule.warmup:
        problems.append("schedule.warmup = 0 leaves inverse-sqrt without a start; make it above 0, such as 0.01")
    if config.schedule.start and not config.train.start_from:
        problems.append(
            f"schedule.start = {config.schedule.start} needs a run that begins there; name its checkpoint in "
            "train.start_from, or leave it out"
        )
    if config.schedule.start >= config.train.tokens:
        problems.append(
            f"schedule.start = {config.schedule.start} is not before its end, train.tokens = {config.train.tokens}"
        )
    if not parallel.dp_replicate and not parallel.dp_shard:
        problems.append(
            "parallel.dp_replicate and parallel.dp_shard are both 0; only one of them can fill what is left"
        )
    if config.train.tokens < data.sequence_length * config.batch.global_batch:
        problems.append(
            f"train.tokens = {config.train.tokens} is less than one batch of "
            f"{config.batch.global_batch} x {data.sequence_length} tokens"
        )
    return problems


def _pipeline(config: Config) -> list[str]:
    """What is wrong with the settings of a pipeline."""
    model, parallel, problems = config.model, config.parallel, []
    if parallel.zero_level == 1 and parallel.reduce == "every":
        problems.append(
            "parallel.reduce = 'every' goes with parallel.zero = 2 or 3 alone, and without pipelines; set "
            "parallel.reduce=once"
        )
    if parallel.pp > 1 and parallel.zero > 1:
        problems.append(
            f"parallel.zero = {parallel.zero} would gather weights for each microbatch anew, which pipelines do not; "
            "leave it out with parallel.pp above 1"
        )
    if parallel.pp == 1:
        return problems
    stages = parallel.pp * parallel.local_stages
    if parallel.local_stages not in STAGES_PER_RANK[parallel.schedule]:
        allowed = STAGES_PER_RANK[parallel.schedule]
        problems.append(
            f"parallel.stages_per_rank = {parallel.stages_per_rank} does not go with parallel.schedule = "
            f"{parallel.schedule!r}, which has {allowed.start}{' or more' * (len(allowed) > 1)}; leave it out, or "
            "choose another schedule"
        )
    if stages > model.layers:
        problems.append(
            f"parallel.pp = {parallel.pp} with {parallel.local_stages} stages a rank needs {stages} blocks and "
            f"model.layers = {model.layers}; at most parallel.pp={max(1, model.layers // parallel.local_stages)}"
        )
    if parallel.split and (len(parallel.split), sum(parallel.split)) != (stages, model.layers):
        problems.append(
            f"parallel.split = {list(parallel.split)} must give the blocks of {stages} stages, {model.layers} in all; "
            "leave it out to balance them"
        )
    if min(parallel.split, default=1) < 1:
        problems.append(f"parallel.split = {list(parallel.split)} leaves a stage without blocks; give each at least 1")
    in_two_parts = parallel.schedule in ("zero-bubble", "zbv")
    if in_two_parts and config.compute.recompute == "selective":
        problems.append(
            f"compute.recompute = 'selective' cannot go through a backward pass in two parts, as parallel.schedule = "
            f"{parallel.schedule!r} has; set compute.recompute=full"
        )
    if in_two_parts and config.compute.compile:
        problems.append(
            f"compute.compile = true has not been shown to be right with a backward pass in two parts, as "
            f"parallel.schedule = {parallel.schedule!r} has; leave it out, or choose another schedule"
        )
    if parallel.schedule == "zbv" and model.tied_embeddings:
        problems.append(
            "parallel.schedule = 'zbv' puts both ends of the model on one rank, where model.tied_embeddings = true "
            "would need two copies; choose another schedule"
        )
    return problems


def _experts(config: Config) -> list[str]:
    """What is wrong with a mixture of experts."""
    model, ep = config.model, config.parallel.ep
    problems = []
    if model.experts_per_token > model.experts:
        problems.append(
            f"model.experts_per_token = {model.experts_per_token} is more than model.experts = {model.experts}; "
            f"make it at most {model.experts}"
        )
    if model.experts % ep:
        problems.append(
            f"parallel.ep = {ep} does not divide model.experts = {model.experts}; "
            f"nearest that do: {nearest_divisors(model.experts, ep)}"
        )
    if model.dense_layers >= model.layers:
        problems.append(
            f"model.dense_layers = {model.dense_layers} leaves none of model.layers = {model.layers} to experts; "
            f"make it at most {model.layers - 1}, or leave out model.experts"
        )
    if not model.dense_layers and model.mlp_width != model.expert_width:
        problems.append(
            f"model.mlp_width = {model.mlp_width} has no effect beside model.expert_width = {model.expert_width} where "
            "no block is dense; leave one of them out, or set model.dense_layers"
        )
    if model.bias:
        problems.append("model.bias = true is not for experts, which have none; set model.bias=false")
    return problems


def _data_stages(config: Config) -> list[str]:
    """What is wrong with mixtures and sequence lengths, from the first to the last."""
    data, (multiple, why) = config.data, _unit_of_lengths(config)
    try:
        along = stages(data)
    except ValueError as error:
        return [f"data.lengths or data.mixtures: {error}"]
    problems = [f"data.train names {prefix!r} twice; give it one larger weight" for prefix in _repeated(data.train)]
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
            for stage in stages(config.data)
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


def _repeated(words: Sequence[str]) -> list[str]:
    return sorted({word for word in words if words.count(word) > 1})


def _batch_policy(config: Config) -> list[str]:
    """What is wrong with the settings of a growing batch."""
    batch = config.batch
    if batch.largest and batch.largest < batch.global_batch:
        return [f"batch.largest = {batch.largest} is below batch.global_batch = {batch.global_batch}; raise it"]
    if batch.policy == "noise-scale" and not config.train.noise_scale:
        return ["batch.policy = 'noise-scale' needs train.noise_scale = true"]
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


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"run file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"run file {path} is not valid TOML: {error}") from None


def parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """section.key=value words as {section: {key: value}}, unchecked. Raises UserError for what is no such word."""
    tree: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        if not (equals and dot):
            raise UserError(
                f"{word!r} is neither an option nor a setting; write section.key=value, such as train.steps=10"
            )
        tree.setdefault(section, {})[name] = _parse_value(text)
    return tree


def _parse_value(text: str) -> Any:
    """As in TOML where it parses, else a plain string, so that log.name=first needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with_preset(layers: Sequence[tuple[str, Mapping[str, Any]]], problems: list[str]) -> list[tuple[str, Any]]:
    name = ""
    for _, tree in layers:
        section = tree.get("model", {})
        name = section.get("preset", name) if isinstance(section, Mapping) else name
    if not isinstance(name, str):
        return list(layers)  # refused, like any value of the wrong type
    if name and name not in PRESETS:
        problems.append(f"model.preset = {name!r} is unknown; {_suggest(name, PRESETS)}")
        name = ""
    return [(f"preset {name}", {"model": PRESETS[name]}), *layers] if name else list(layers)


def _flatten(tree: Mapping[str, Any], origin: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for name, section in tree.items():
        if name not in SECTIONS:
            problems.append(f"[{name}] ({origin}) is no section; {_suggest(name, SECTIONS)}")
        elif not isinstance(section, Mapping):
            problems.append(f"{name} = {section!r} ({origin}) is a section; write [{name}] and its keys below")
        else:
            for key, value in section.items():
                if key in TYPES[name]:
                    yield f"{name}.{key}", value
                else:
                    problems.append(f"{name}.{key} = {value!r} ({origin}) is no setting; {_suggest(key, TYPES[name])}")


def _suggest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(known)}"


def _check(key: str, value: Any, origin: str, problems: list[str]) -> Any:
    """The value in its declared type and inside its bounds, or a problem."""
    section, name = key.split(".")
    try:
        value = _convert(value, TYPES[section][name])
    except TypeError as error:
        problems.append(f"{key} = {value!r} ({origin}) {error}")
        return value
    bounds = next(f.metadata for f in fields(SECTIONS[section]) if f.name == name)
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    broken = {
        "at_least": lambda limit: not value >= limit,
        "above": lambda limit: not value > limit,
        "at_most": lambda limit: not value <= limit,
        "below": lambda limit: not value < limit,
    }
    for kind, breaks in broken.items():
        if bounds[kind] is not None and breaks(bounds[kind]):
            problems.append(f"{key} = {value!r} ({origin}) must be {words[kind]} {bounds[kind]:g}")
    return value


def _convert(value: Any, kind: Any) -> Any:
    """Exact types, but an integer serves as a float and a whole float (1e9) as an integer. Raises TypeError."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"must be one of: {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list")
        return tuple(_convert(item, get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise TypeError("must be finite")
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise TypeError(f"must be {names[kind]}")
    return value


def _unused(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Settings that are given and mean nothing beside the others."""
    for key, (other, values) in USED_ONLY_WITH.items():
        if get(config, other) not in values and get(config, key) != get(Config(), key):
            needed = f"at least {values.start}" if isinstance(values, range) else " or ".join(map(str, values))
            yield (
                f"{key} = {get(config, key)!r} ({origins[key]}) has no effect with "
                f"{other} = {get(config, other)!r}; it needs {needed}"
            )


def _without_idle_presets(config: Config, origins: dict[str, str]) -> Config:
    """A preset's value goes back to the default where another choice left it without meaning."""
    for key, (other, values) in USED_ONLY_WITH.items():
        if origins.get(key, "").startswith("preset") and get(config, other) not in values:
            config = with_values(config, {key: get(Config(), key)})
            del origins[key]
    return config


def _derive(config: Config, origins: dict[str, str]) -> Config:
    """Zeros that stand for a derived value, replaced by it."""
    model, wide = config.model, mlp_width(config.model.activation, config.model.width)
    derived = {
        "model.kv_heads": (model.heads, "derived from model.heads"),
        "model.head_size": (model.width // model.heads, "derived from model.width and model.heads"),
        "model.mlp_width": (wide, "derived from model.width and model.activation"),
    }
    if model.experts:
        derived["model.expert_width"] = (model.mlp_width or wide, "derived from model.mlp_width")
    if model.expert_width and not model.dense_layers:
        derived["model.mlp_width"] = (model.expert_width, "derived from model.expert_width")
    for key, (value, why) in derived.items():
        if get(config, key) == 0 and (key != "model.head_size" or model.width % model.heads == 0):
            config = with_values(config, {key: value})
            origins[key] = why
    return config


def mlp_width(activation: str, width: int) -> int:
    """Hidden size of an MLP that is not given one."""
    return -(-8 * width // (3 * 64)) * 64 if activation == "swiglu" else 4 * width


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))
