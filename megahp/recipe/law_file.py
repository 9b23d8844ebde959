"""Law files: the laws that `megahp fit` fitted to a user's own runs, as TOML, for `megahp recipe --law`.

The sections are [loss], [timescale], [optimal_batch], [critical_batch] and [task_error], those that could be fitted;
each holds every field of its law, draws included. Batches and their laws are in tokens.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megahp.config.schema import toml_value
from megahp.errors import UserError
from megahp.files import read_toml
from megahp.scaling.laws import ErrorLaw, LossLaw, PowerLaw

KINDS: dict[str, Any] = {
    "loss": LossLaw,
    **dict.fromkeys(("timescale", "optimal_batch", "critical_batch"), PowerLaw),
    "task_error": ErrorLaw,
}
_ABOVE_0 = ("scale", "a", "b", "alpha", "beta")


HEADING = "# LawFile fitted by megahp fit; megahp recipe takes them with --law and --loss-law."


@dataclass(frozen=True)
class LawFile:
    """The laws of one file; None: not fitted."""

    loss: LossLaw | None = None  # nats per token of (parameters, tokens)
    timescale: PowerLaw | None = None  # tau_opt of tokens per parameter
    optimal_batch: PowerLaw | None = None  # tokens of a batch, of the tokens of a run
    critical_batch: PowerLaw | None = None  # tokens of a batch, of D_min
    task_error: ErrorLaw | None = None  # of the loss


def write(path: Path, laws: LawFile) -> None:
    """Write the laws to the file, replacing it."""
    lines = [HEADING]
    for name in KINDS:
        if law := getattr(laws, name):
            lines += ["", f"[{name}]", *(f"{f.name} = {toml_value(getattr(law, f.name))}" for f in fields(law))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path) -> LawFile:
    """Read a law file. Raises UserError for an unknown section, and for unknown, missing or wrong fields of a law."""
    tree = read_toml(path, "law file")
    if not tree or (tree.keys() - KINDS):
        wrong = ", ".join(name for name in tree if name not in KINDS) or "nothing"
        raise UserError(f"law file {path} holds {wrong}; its sections are {', '.join(KINDS)}")
    try:
        return LawFile(**{name: _law(name, section) for name, section in tree.items()})
    except ValueError as error:
        raise UserError(f"law file {path}: {error}") from None


def _law(name: str, section: Any) -> Any:
    """Build the law of one section. Raises ValueError."""
    kind = KINDS[name]
    types = get_type_hints(kind)
    if not isinstance(section, dict) or section.keys() != types.keys():
        given = ", ".join(section) if isinstance(section, dict) else section
        raise ValueError(f"[{name}] must have the fields {', '.join(types)}; it has {given}")
    values = {}
    for key, value in section.items():
        try:
            values[key] = _convert(value, types[key])
        except TypeError as error:
            raise ValueError(f"{name}.{key} = {value!r} must be {error}") from None
        if key in _ABOVE_0 and not values[key] > 0:
            raise ValueError(f"{name}.{key} = {value!r} must be above 0")
    if name == "task_error" and not values["exponent"] > 0:
        raise ValueError(f"{name}.exponent = {values['exponent']!r} must be above 0: the error grows with the loss")
    if name == "critical_batch" and not 0 < values["exponent"] < 1:
        raise ValueError(f"{name}.exponent = {values['exponent']!r} must be above 0 and below 1")
    return kind(**values)


def _convert(value: Any, kind: Any) -> Any:
    """Check a TOML value against a field's type, and convert it. Raises TypeError naming the type."""
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, list):
            raise TypeError("a list")
        if items[-1] is ...:
            items = (items[0],) * len(value)
        if len(value) != len(items):
            raise TypeError(f"{len(items)} numbers")
        return tuple(_convert(item, part) for item, part in zip(value, items, strict=True))
    if kind is str:
        if not isinstance(value, str):
            raise TypeError("text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError("a number")
    return float(value)
