"""Resolve a run file and command-line overrides to a checked Config.

A value comes from the first of: command line, run file, preset, default. Unknown keys, wrong types and impossible
combinations are refused here, before torch is imported or a process started, and all reported at once.
"""

import difflib
import math
import operator
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from megahp.config.checks import find_conflicts, find_unused
from megahp.config.presets import PRESETS
from megahp.config.schema import AUTO, FIELDS, GATED, SECTIONS, TYPES, Config, get_setting, setting_names, with_values
from megahp.errors import UserError
from megahp.files import read_toml, refuse_links

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
HERE = "{here}"
MAX_PROBLEMS = 50  # reported at once


@dataclass(frozen=True)
class Resolved:
    """A checked config, and where each of its values came from (section.key -> origin)."""

    config: Config
    origins: Mapping[str, str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Load a TOML run file and apply section.key=value overrides. Raises UserError listing every problem."""
    tree = placed(read_toml(Path(path), "run file"), Path(path).parent)
    return resolve([(Path(path).name, tree), ("command line", parse_overrides(overrides))])


def read_config(directory: Path) -> Config:
    """Return the resolved config of a run directory. Raises UserError."""
    refuse_links(directory)
    path = directory / "config.toml"
    tree = read_toml(path, "run settings", "name a run directory, such as runs/quickstart")
    return from_dict(placed(tree, path.parent), str(path))


def placed(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of a run file, or of a run's checkpoint, with paths that begin with {here} in this folder: a
    converted model's run directory can be moved and renamed."""

    def place(value: Any) -> Any:
        return f"{folder}{value[len(HERE) :]}" if isinstance(value, str) and value.startswith(HERE) else value

    return {
        name: {key: place(value) for key, value in section.items()} if isinstance(section, Mapping) else section
        for name, section in tree.items()
    }


def resolve(layers: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], written: bool = False) -> Resolved:
    """Merge (origin, {section: {key: value}}) layers, later ones winning, and check the result. Raises UserError.

    written: a program wrote the layers; a setting without effect is then reset to its default rather than refused.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, tree in _with_preset(layers, problems):
        for key, value in _flatten(tree, origin, problems):
            values[key], origins[key] = _check(key, value, origin, problems), origin
    # Values of the wrong type would crash the checks below, so report them first.
    _refuse(problems)
    config = _reset_unused(with_values(Config(), values), origins, "" if written else "preset")
    for key, why in _unused(config):
        if get_setting(config, key) != FIELDS[key].default:
            problems.append(f"{key} = {get_setting(config, key)!r} ({origins[key]}) has no effect with {why}")
    config = _derive(config, origins)
    _refuse([*problems, *find_conflicts(config)])
    return Resolved(config, {key: origins.get(key, "default") for key in setting_names()})


def from_dict(tree: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """Return the config that `config_to_dict` wrote, here or in an older megahp, checked again. Raises UserError."""
    older: dict[str, dict[str, Any]] = {}
    for key, field in FIELDS.items():
        if "before" in field.metadata:
            section, name = key.split(".")
            older.setdefault(section, {})[name] = field.metadata["before"]
    return resolve([("before there was the setting", older), (origin, tree)], written=True).config


def parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse section.key=value words to {section: {key: value}}, unchecked. Raises UserError for any other word.

    A value is read as TOML if it is valid TOML, else as text, so that log.name=first needs no quotes.
    """
    tree: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        if not (equals and dot):
            raise UserError(
                f"{shown(word)} is neither an option nor a setting; write section.key=value, such as train.steps=10"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        tree.setdefault(section, {})[name] = value
    return tree


def _with_preset(layers: Sequence[tuple[str, Mapping[str, Any]]], problems: list[str]) -> list[tuple[str, Any]]:
    """Return the layers with that of the preset, which the last layer to set model.preset names, put first."""
    name = ""
    for _, tree in layers:
        section = tree.get("model", {})
        name = section.get("preset", name) if isinstance(section, Mapping) else name
    if not name or not isinstance(name, str):  # _check reports a value of the wrong type
        return list(layers)
    if name not in PRESETS:
        problems.append(f"model.preset = {shown(name)} is unknown; {suggest(name, PRESETS)}")
        return list(layers)
    return [(f"preset {name}", {"model": PRESETS[name]}), *layers]


def _flatten(tree: Mapping[str, Any], origin: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (section.key, value) of the known settings in a tree; report all else."""
    for name, section in tree.items():
        if name not in SECTIONS:
            problems.append(f"[{name}] ({origin}) is not a section; {suggest(name, SECTIONS)}")
        elif not isinstance(section, Mapping):
            problems.append(f"{name} = {shown(section)} ({origin}) is a section; write [{name}] and its keys below")
        else:
            for key, value in section.items():
                if key in TYPES[name]:
                    yield f"{name}.{key}", value
                else:
                    near = suggest(key, TYPES[name])
                    problems.append(f"{name}.{key} = {shown(value)} ({origin}) is not a setting; {near}")


def shown(value: Any) -> str:
    """Return an untrusted value as in Python, shortened if long or deeply nested: repr fails on 500 nested lists."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 300
    return short.repr(value)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the known words closest to a wrong one, or all of them, as the remedy of an error."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"choose one of: {', '.join(known)}"


def _check(key: str, value: Any, origin: str, problems: list[str]) -> Any:
    """Return the value converted to its declared type; report a wrong type or a value out of bounds."""
    section, name = key.split(".")
    try:
        value = _convert(value, TYPES[section][name])
    except TypeError as error:
        problems.append(f"{key} = {shown(value)} ({origin}) {error}")
        return value
    if isinstance(value, int) and abs(value) >= 2**63:  # the largest integer that TOML and torch's int64 hold
        problems.append(f"{key} = {shown(value)} ({origin}) must be below 2^63")
    constraints = FIELDS[key].metadata
    for bound, holds in BOUNDS.items():
        if bound in constraints and value != AUTO and not holds(value, constraints[bound]):
            limit = f"{bound.replace('_', ' ')} {constraints[bound]:g}"
            problems.append(f"{key} = {shown(value)} ({origin}) must be {limit}")
    return value


def _convert(value: Any, kind: Any) -> Any:
    """Return the value as a type of the schema. Raises TypeError.

    Types must match exactly, except that an integer serves as a float, and a whole float (1e9) as an integer.
    """
    if get_origin(kind) is Union:  # of a type and AUTO
        kind = get_args(kind)[0]
        try:
            return value if value == AUTO else _convert(value, kind)
        except TypeError:
            raise TypeError(f"must be {KINDS[kind]}, or {AUTO}") from None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"must be one of: {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list")
        return tuple(_convert(item, get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int:  # not a bool, which is an int to isinstance
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise TypeError(f"must be {KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise TypeError("must be finite")
    if kind is str and "\0" in value:  # most settings of text name files, and no name of one holds it
        raise TypeError("must not contain a NUL character")
    return value


def _unused(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the settings that have no effect beside the others, each with the cause and what it needs."""
    for key, field in FIELDS.items():
        if "only_with" in field.metadata:
            other, *values = field.metadata["only_with"]
            current = get_setting(config, other)
            if not any(current in value if isinstance(value, range) else current == value for value in values):
                yield key, f"{other} = {current!r}; it needs {values_in_words(values)}"
    yield from find_unused(config)


def values_in_words(values: Sequence[Any], show: Callable[[Any], str] = str) -> str:
    """Return the values and ranges of only_with as text."""
    return " or ".join(f"at least {value.start}" if isinstance(value, range) else show(value) for value in values)


def _reset_unused(config: Config, origins: dict[str, str], origin: str) -> Config:
    """Reset the settings of origins that begin with `origin` to their default if they have no effect.

    A preset or a program may set more than the user's own choices leave room for. One reset can idle another setting,
    hence the loop.
    """
    while unused := {key for key, _ in _unused(config) if key in origins and origins[key].startswith(origin)}:
        config = with_values(config, {key: FIELDS[key].default for key in unused})
        for key in unused:
            del origins[key]
    return config


def _derive(config: Config, origins: dict[str, str]) -> Config:
    """Replace the zeros that stand for a derived value."""
    model, default_width = config.model, mlp_width(config.model.activation, config.model.width)
    derived: dict[str, tuple[float, str]] = {
        "model.kv_heads": (model.heads, "derived from model.heads"),
        "model.mlp_width": (default_width, "derived from model.width and model.activation"),
    }
    if model.width % model.heads == 0:  # else find_conflicts reports it
        derived["model.head_size"] = (model.width // model.heads, "derived from model.width and model.heads")
    if model.experts:
        derived["model.expert_width"] = (model.mlp_width or default_width, "derived from model.mlp_width")
    if model.expert_width and not model.dense_layers:
        derived["model.mlp_width"] = (model.expert_width, "derived from model.expert_width")
    if model.rope_scaling in ("llama3", "yarn"):
        fast = 4.0 if model.rope_scaling == "llama3" else 32.0
        derived["model.rope_fast"] = (fast, "derived from model.rope_scaling")
    if model.rope_scaling == "yarn":  # arXiv 2309.00071, eq. 22: its square scales the logits
        derived["model.rope_magnitude"] = (0.1 * math.log(model.rope_factor) + 1, "derived from model.rope_factor")
    for key, (value, why) in derived.items():
        if get_setting(config, key) == 0:
            config = with_values(config, {key: value})
            origins[key] = why
    data = config.data
    if len(data.lengths) == 1 and (times := re.fullmatch("doubling:([1-9])", data.lengths[0])):
        parts = int(times[1]) + 1
        words = [f"{config.train.tokens * n // parts}:{data.sequence_length << n}" for n in range(1, parts)]
        config = with_values(config, {"data.lengths": tuple(words)})
        origins["data.lengths"] = f"derived from {data.lengths[0]} and train.tokens"
    return config


def mlp_width(activation: str, width: int) -> int:
    """Return the default hidden size of an MLP.

    A gated MLP has three matrices where others have two, so 8/3 width has the parameters of 4 width.
    """
    return -(-8 * width // (3 * 64)) * 64 if activation in GATED else 4 * width


def _refuse(problems: Sequence[str]) -> None:
    """Raise UserError listing the problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS:,} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError("\n".join([*problems[:MAX_PROBLEMS], *more]))
