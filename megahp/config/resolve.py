"""From a run file and command-line words to a checked tree of settings.

A value comes from the first of: command line, run file, preset, default. Anything unknown, of the wrong type or
impossible is refused here, before torch is imported or a process started; all problems are told at once.
"""

import difflib
import math
import operator
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megahp.config.checks import idle, impossible
from megahp.config.presets import PRESETS
from megahp.config.schema import FIELDS, SECTIONS, TYPES, Config, get_setting, setting_names, with_values
from megahp.errors import UserError
from megahp.files import read_toml

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
MOST = 50  # problems that are told at once
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Resolved:
    """A checked tree, and where each of its values came from (`section.key` -> origin)."""

    config: Config
    origins: Mapping[str, str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """The run described by a TOML file and by `section.key=value` words. Raises UserError naming every problem."""
    return resolve([(Path(path).name, read_toml(Path(path), "run file")), ("command line", parse_overrides(overrides))])


def resolve(layers: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], written: bool = False) -> Resolved:
    """The tree from (origin, {section: {key: value}}) layers, later ones winning. Raises UserError.

    written: by a program, so that what has no effect is no mistake of the user's, and goes back to its default.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, tree in _with_preset(layers, problems):
        for key, value in _flatten(tree, origin, problems):
            values[key], origins[key] = _check(key, value, origin, problems), origin
    _refuse(problems)
    config = _without_idle(with_values(Config(), values), origins, "" if written else "preset")
    problems += _unused(config, origins)
    config = _derive(config, origins)
    problems += impossible(config)
    _refuse(problems)
    return Resolved(config, {key: origins.get(key, "default") for key in setting_names()})


def from_dict(tree: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """The tree written by `config_to_dict`, checked again."""
    return resolve([(origin, tree)], written=True).config


def parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """section.key=value words as {section: {key: value}}, unchecked. Raises UserError for what is no such word."""
    tree: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        if not (equals and dot):
            raise UserError(
                f"{shown(word)} is neither an option nor a setting; write section.key=value, such as train.steps=10"
            )
        tree.setdefault(section, {})[name] = _parse_value(text)
    return tree


def _parse_value(text: str) -> Any:
    """As in TOML where it parses, else a plain string, so that log.name=first needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _with_preset(layers: Sequence[tuple[str, Mapping[str, Any]]], problems: list[str]) -> list[tuple[str, Any]]:
    name = ""
    for _, tree in layers:
        section = tree.get("model", {})
        name = section.get("preset", name) if isinstance(section, Mapping) else name
    if not isinstance(name, str):
        return list(layers)  # refused, like any value of the wrong type
    if name and name not in PRESETS:
        problems.append(f"model.preset = {shown(name)} is unknown; {suggest(name, PRESETS)}")
        name = ""
    return [(f"preset {name}", {"model": PRESETS[name]}), *layers] if name else list(layers)


def _flatten(tree: Mapping[str, Any], origin: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for name, section in tree.items():
        if name not in SECTIONS:
            problems.append(f"[{name}] ({origin}) is no section; {suggest(name, SECTIONS)}")
        elif not isinstance(section, Mapping):
            problems.append(f"{name} = {shown(section)} ({origin}) is a section; write [{name}] and its keys below")
        else:
            for key, value in section.items():
                if key in TYPES[name]:
                    yield f"{name}.{key}", value
                else:
                    problems.append(
                        f"{name}.{key} = {shown(value)} ({origin}) is no setting; {suggest(key, TYPES[name])}"
                    )


def shown(value: Any) -> str:
    """Return a value of others as in Python, shortened where it is long or deep: repr fails on 500 nested lists."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 300
    return short.repr(value)


def suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(known)}"


def _check(key: str, value: Any, origin: str, problems: list[str]) -> Any:
    """The value in its declared type and inside its bounds, or a problem."""
    section, name = key.split(".")
    try:
        value = _convert(value, TYPES[section][name])
    except TypeError as error:
        problems.append(f"{key} = {shown(value)} ({origin}) {error}")
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        problems.append(f"{key} = {shown(value)} ({origin}) must be below 2^63")
    law = FIELDS[key].metadata
    for bound, holds in BOUNDS.items():
        if bound in law and not holds(value, law[bound]):
            problems.append(f"{key} = {shown(value)} ({origin}) must be {bound.replace('_', ' ')} {law[bound]:g}")
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
        raise TypeError(f"must be {KINDS[kind]}")
    return value


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    """Find the settings that mean nothing beside the others, each with the cause and what it needs."""
    laws = {key: field.metadata["only_with"] for key, field in FIELDS.items() if "only_with" in field.metadata}
    for key, (other, *values) in laws.items():
        now = get_setting(config, other)
        if not any(now in value if isinstance(value, range) else now == value for value in values):
            yield key, f"{other} = {now!r}; it needs {in_words(values)}"
    yield from idle(config)


def in_words(values: Sequence[Any], show: Callable[[Any], str] = str) -> str:
    """Write what another setting must be, as only_with has it."""
    return " or ".join(f"at least {value.start}" if isinstance(value, range) else show(value) for value in values)


def _unused(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Settings that are given and mean nothing beside the others."""
    for key, why in _idle(config):
        if get_setting(config, key) != FIELDS[key].default:
            yield f"{key} = {get_setting(config, key)!r} ({origins[key]}) has no effect with {why}"


def _without_idle(config: Config, origins: dict[str, str], origin: str) -> Config:
    """A value of such an origin goes back to the default where another choice left it without meaning."""
    while without := [key for key, _ in _idle(config) if key in origins and origins[key].startswith(origin)]:
        config = with_values(config, {key: FIELDS[key].default for key in without})
        for key in set(without):
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
        if get_setting(config, key) == 0 and (key != "model.head_size" or model.width % model.heads == 0):
            config = with_values(config, {key: value})
            origins[key] = why
    return config


def mlp_width(activation: str, width: int) -> int:
    """Hidden size of an MLP that is not given one."""
    return -(-8 * width // (3 * 64)) * 64 if activation == "swiglu" else 4 * width


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - MOST:,} more"] if len(problems) > MOST else []
        raise UserError("\n".join([*problems[:MOST], *more]))
