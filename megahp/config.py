"""The one typed tree a run is described by: every setting with its default and meaning, loading, overriding, checking.

A value comes from the first of: command line, run file, preset, default. Anything unknown, of the wrong type or
impossible is refused here, before torch is imported or a process started; all problems are told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megahp.errors import UserError
from megahp.presets import PRESETS

VOCAB_MULTIPLE = 128  # the vocabulary is padded to this, on every layout alike, so that any usual tp divides it


def setting(
    default: Any, doc: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """A dataclass field with its meaning and its bounds (the same unit as the value)."""
    return field(default=default, metadata={"doc": doc, "at_least": at_least, "above": above, "at_most": at_most})


@dataclass(frozen=True)
class Model:
    """The decoder transformer."""

    preset: str = setting("", "a known shape that fills in the settings below; empty = none")
    layers: int = setting(4, "transformer blocks", at_least=1)
    width: int = setting(256, "size of the residual stream", at_least=1)
    heads: int = setting(4, "query heads", at_least=1)
    kv_heads: int = setting(0, "key/value heads (grouped-query attention); 0 = as many as heads", at_least=0)
    head_size: int = setting(0, "size of one head; 0 = width / heads", at_least=0)
    mlp_width: int = setting(
        0, "hidden size of the MLP; 0 = 4 width, or 8/3 width rounded up to 64s for swiglu", at_least=0
    )
    activation: Literal["swiglu", "gelu", "relu2"] = setting(
        "swiglu", "MLP: gated SiLU, GELU (tanh form), squared ReLU"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "normalisation before each branch and at the end")
    norm_eps: float = setting(1e-5, "added to the variance", above=0)
    positions: Literal["rope", "alibi", "learned", "none"] = setting("rope", "how a position is known")
    rope_theta: float = setting(10000.0, "base of the rotary wavelengths", above=0)
    bias: bool = setting(False, "biases on linear layers and on LayerNorm")
    qk_norm: bool = setting(False, "normalise queries and keys, per head")
    tied_embeddings: bool = setting(False, "one matrix for embedding and unembedding")
    vocab_size: int = setting(
        0, "number of token ids; 0 = the tokenizer's. The matrices are padded to 128s", at_least=0
    )

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Parameterization:
    """How init, learning rates and multipliers follow from the model's size (megahp/scaling/parameterization.py)."""

    name: Literal["sp", "mup", "completep"] = setting("completep", "the rule table: standard, muP, CompleteP")
    base_width: int = setting(256, "width at which the base hyperparameters were tuned", at_least=1)
    base_layers: int = setting(2, "depth at which the base hyperparameters were tuned", at_least=1)
    depth_alpha: float = setting(
        1.0, "CompleteP's alpha: residual branches are scaled by m_L^-alpha", at_least=0.5, at_most=1
    )
    init_std: float = setting(0.02, "base standard deviation of every matrix", above=0)
    embedding_multiplier: float = setting(1.0, "alpha_in: scales the embedding's output", above=0)
    output_multiplier: float = setting(1.0, "alpha_out: scales the logits", above=0)


@dataclass(frozen=True)
class Data:
    """Where tokens come from and in which order."""

    train: tuple[str, ...] = setting((), "prefixes of .bin/.idx pairs, relative to the working directory")
    weights: tuple[float, ...] = setting((), "share of samples from each prefix; empty = in proportion to its tokens")
    tokenizer: str = setting("bytes", "sentencepiece .model, Hugging Face tokenizer .json, or bytes")
    sequence_length: int = setting(256, "tokens of one sample", at_least=1)
    validation_fraction: float = setting(0.01, "share of the documents held out", at_least=0, at_most=0.5)
    mask_documents: bool = setting(False, "attention stays inside a document")
    cache: str = setting("", "folder of the sample order's index; empty = cache/ beside the first prefix")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run's tokens, as a fraction of its peak."""

    name: Literal["decay-to-zero", "constant"] = setting("decay-to-zero", "shape after the warm-up")
    warmup: float = setting(
        0.1, "share of train.tokens spent rising linearly from 0 to the peak", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class Batch:
    """How many sequences one optimizer step sees."""

    policy: Literal["constant"] = setting("constant", "how the global batch evolves")
    global_batch: int = setting(32, "sequences per optimizer step", at_least=1)
    micro_batch: int = setting(8, "sequences per forward pass of one data-parallel rank", at_least=1)


@dataclass(frozen=True)
class Optimizer:
    """AdamW and clipping. Values are the base ones; the parameterization turns them into each weight's own."""

    name: Literal["adamw"] = setting("adamw", "update rule")
    lr: float = setting(4e-3, "peak learning rate", above=0)
    weight_decay: float = setting(0.1, "decoupled weight decay (multiplied by the learning rate)", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, at_most=1)
    beta2: float = setting(0.95, "decay of the second moment", at_least=0, at_most=1)
    eps: float = setting(1e-8, "added to the root of the second moment", at_least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0 = no clipping", at_least=0)


@dataclass(frozen=True)
class Parallel:
    """The layout. Data parallelism fills what the other axes leave."""

    tp: int = setting(1, "tensor parallel: each weight matrix split over so many ranks", at_least=1)
    pp: int = setting(1, "pipeline parallel stages (only 1 so far)", at_least=1, at_most=1)
    cp: int = setting(1, "context parallel: a sequence split over so many ranks (only 1 so far)", at_least=1, at_most=1)
    ep: int = setting(1, "expert parallel (only 1 so far)", at_least=1, at_most=1)
    dp_replicate: int = setting(1, "data parallel replicas; 0 = what is left", at_least=0)
    dp_shard: int = setting(0, "ranks that share one sharded replica (FSDP2); 0 = what is left", at_least=0)
    sequence_parallel: bool = setting(False, "split norms and residual stream along the sequence over tp")


@dataclass(frozen=True)
class Train:
    """How long, how precisely, from which seed."""

    tokens: int = setting(10_000_000, "horizon of the schedules and end of the run", at_least=1)
    steps: int = setting(0, "stop after so many optimizer steps, if sooner; 0 = no such stop", at_least=0)
    dtype: Literal["float32", "bfloat16", "float64"] = setting(
        "float32", "compute type; weights and moments stay in float32 (float64 for float64)"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto = cuda where there is one")
    seed: int = setting(1, "of the weights and of the data order", at_least=0)
    noise_scale: bool = setting(True, "measure the gradient noise scale in the norm layers")
    noise_half_life: float = setting(
        0.02, "half-life of the noise scale's averages, as a share of train.tokens", above=0, at_most=1
    )
    validate_every: int = setting(0, "steps between validations; 0 = only at the end", at_least=0)
    validation_samples: int = setting(64, "samples of one validation; 0 = none", at_least=0)


@dataclass(frozen=True)
class Checkpoint:
    """What is kept, and when."""

    every: int = setting(0, "steps between checkpoints; 0 = only at the end", at_least=0)
    keep: int = setting(2, "how many of the latest checkpoints stay", at_least=1)


@dataclass(frozen=True)
class Log:
    """The run directory: root/name."""

    name: str = setting("run", "name of the run")
    root: str = setting("runs", "folder that holds the runs")
    every: int = setting(1, "steps between lines of metrics.jsonl", at_least=1)
    tensorboard: bool = setting(True, "also write TensorBoard files")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: Model = Model()
    parameterization: Parameterization = Parameterization()
    data: Data = Data()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def directory(self) -> Path:
        return Path(self.log.root) / self.log.name


SECTIONS: dict[str, Any] = get_type_hints(Config)
TYPES = {name: get_type_hints(section) for name, section in SECTIONS.items()}

# A setting that only means something beside another one: giving it elsewhere is an error, not silence.
USED_ONLY_WITH = {
    "model.rope_theta": ("model.positions", ("rope",)),
    "parameterization.base_width": ("parameterization.name", ("mup", "completep")),
    "parameterization.base_layers": ("parameterization.name", ("completep",)),
    "parameterization.depth_alpha": ("parameterization.name", ("completep",)),
    "train.noise_half_life": ("train.noise_scale", (True,)),
}


@dataclass(frozen=True)
class Resolved:
    """A checked tree, and where each of its values came from (`section.key` -> origin)."""

    config: Config
    origins: Mapping[str, str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """The run described by a TOML file and by `section.key=value` words. Raises UserError naming every problem."""
    layers = [(Path(path).name, _read(Path(path))), ("command line", _parse_overrides(overrides))]
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
    problems += _unused(config, origins)
    config = _derive(config, origins)
    problems += impossible(config)
    _refuse(problems)
    return Resolved(config, {key: origins.get(key, "default") for key in names()})


def names() -> list[str]:
    """Every setting there is, as section.key, in order."""
    return [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)]


def get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The same tree with some settings replaced (`section.key` -> value), unchecked."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def from_dict(tree: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """The tree written by `to_dict`, checked again."""
    return resolve([(origin, tree)]).config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The whole tree as a valid run file; with origins, each line says where its value came from."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        lines.append(f"[{name}]")
        for f in fields(section):
            line = f"{f.name} = {_toml(getattr(getattr(config, name), f.name))}"
            lines.append(f"{line:<44}# {origins[f'{name}.{f.name}']}" if origins else line)
        lines.append("")
    return "\n".join(lines)


def describe(key: str) -> str:
    """The meaning of one setting, as written where it is defined."""
    section, name = key.split(".")
    return next(f.metadata["doc"] for f in fields(SECTIONS[section]) if f.name == name)


def impossible(config: Config) -> list[str]:
    """Combinations that cannot run on any number of ranks, one line each."""
    model, parallel, data = config.model, config.parallel, config.data
    problems = []
    if model.width % model.heads and not model.head_size:
        problems.append(
            f"model.heads = {model.heads} does not divide model.width = {model.width}; "
            f"nearest that do: {_nearest_divisors(model.width, model.heads)}"
        )
    if model.head_size % 2 and model.positions == "rope":
        problems.append(f"model.head_size = {model.head_size} is odd, and rope turns pairs; make it even")
    if model.kv_heads and model.heads % model.kv_heads:
        problems.append(
            f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}; "
            f"nearest that do: {_nearest_divisors(model.heads, model.kv_heads)}"
        )
    for key, size in (("model.kv_heads", model.kv_heads), ("model.mlp_width", model.mlp_width)):
        if size % parallel.tp:
            problems.append(
                f"parallel.tp = {parallel.tp} does not divide {key} = {size}; "
                f"nearest that do: {_nearest_divisors(size, parallel.tp)}"
            )
    if VOCAB_MULTIPLE % parallel.tp:
        problems.append(
            f"parallel.tp = {parallel.tp} does not divide the vocabulary's padding of {VOCAB_MULTIPLE}; "
            f"nearest that do: {_nearest_divisors(VOCAB_MULTIPLE, parallel.tp)}"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel = true needs parallel.tp of at least 2, which is 1")
    if parallel.sequence_parallel and data.sequence_length % parallel.tp:
        problems.append(
            f"data.sequence_length = {data.sequence_length} is not a multiple of parallel.tp = {parallel.tp}, "
            "as parallel.sequence_parallel needs; "
            f"nearest that are: {_nearest_multiples(parallel.tp, data.sequence_length)}"
        )
    if data.weights and len(data.weights) != len(data.train):
        problems.append(
            f"data.weights has {len(data.weights)} values and data.train {len(data.train)}; give one for each"
        )
    if any(weight <= 0 for weight in data.weights):
        problems.append(f"data.weights = {list(data.weights)} must all be above 0")
    if config.train.validation_samples and not data.validation_fraction:
        problems.append(
            f"train.validation_samples = {config.train.validation_samples} needs documents held out, and "
            "data.validation_fraction is 0; raise it, or set train.validation_samples=0"
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


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"run file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"run file {path} is not valid TOML: {error}") from None


def _parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
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
    if name and name not in PRESETS:
        problems.append(f"model.preset = {name!r} is unknown; {_suggest(str(name), PRESETS)}")
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
    words = {"at_least": "at least", "above": "above", "at_most": "at most"}
    broken = {
        "at_least": lambda limit: not value >= limit,
        "above": lambda limit: not value > limit,
        "at_most": lambda limit: not value <= limit,
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
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise TypeError(f"must be {names[kind]}")
    return value


def _unused(config: Config, origins: Mapping[str, str]) -> list[str]:
    problems = []
    for key, (other, values) in USED_ONLY_WITH.items():
        given = key in origins and not origins[key].startswith("preset")
        if given and get(config, other) not in values and get(config, key) != get(Config(), key):
            problems.append(
                f"{key} = {get(config, key)!r} ({origins[key]}) has no effect with "
                f"{other} = {get(config, other)!r}; it needs {' or '.join(map(str, values))}"
            )
    return problems


def _derive(config: Config, origins: dict[str, str]) -> Config:
    """Zeros that stand for a derived value, replaced by it."""
    model = config.model
    wide = -(-8 * model.width // (3 * 64)) * 64 if model.activation == "swiglu" else 4 * model.width
    derived = {
        "model.kv_heads": (model.heads, "derived from model.heads"),
        "model.head_size": (model.width // model.heads, "derived from model.width and model.heads"),
        "model.mlp_width": (wide, "derived from model.width and model.activation"),
    }
    for key, (value, why) in derived.items():
        if get(config, key) == 0 and (key != "model.head_size" or model.width % model.heads == 0):
            config = with_values(config, {key: value})
            origins[key] = why
    return config


def _nearest_divisors(number: int, to: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - to))[:3])))


def _nearest_multiples(of: int, to: int) -> str:
    below = to // of * of
    return ", ".join(str(value) for value in (below, below + of) if value)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
