"""Change settings of a run file in place: all other lines, and their comments, stay."""

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from megahp.config.schema import toml_value
from megahp.errors import UserError


def edited(text: str, values: Mapping[str, Any]) -> str:
    """Return a run file's text with these settings, section.key -> value; None removes one. Raises UserError for a file
    that writes them otherwise than in lines of their sections."""
    left, lines, section = dict(values), list[str](), ""
    headers: dict[str, int] = {}
    for line in text.splitlines():
        if header := re.match(r"\s*\[([\w-]+)\]", line):
            section = header[1]
        written = re.match(r"\s*([\w-]+)\s*=", line)
        if written and (key := f"{section}.{written[1]}") in left:
            if (value := left.pop(key)) is None:
                continue
            line = f"{written[1]} = {toml_value(value)}"
        lines.append(line)
        if header:
            headers[section] = len(lines)
    added: dict[str, list[str]] = {}
    for key, value in left.items():
        section, _, name = key.partition(".")
        if value is not None:
            added.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    for section in sorted(added, key=lambda section: headers.get(section, 0), reverse=True):  # places before one stay
        if section in headers:
            lines[headers[section] : headers[section]] = added[section]
        else:
            lines += ["", f"[{section}]", *added[section]]
    changed = "\n".join([*lines, ""])
    if _tree(changed) != _with_values(_tree(text), values):
        by_hand = "; ".join(f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None)
        raise UserError(f"the run file's settings are not in lines of their own, so write them yourself: {by_hand}")
    return changed


def _tree(text: str) -> dict[str, Any]:
    try:
        return {name: section for name, section in tomllib.loads(text).items() if section != {}}
    except tomllib.TOMLDecodeError:
        return {}


def _with_values(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {}).pop(name, None)
        if value is not None:
            tree[section][name] = value
    return {name: section for name, section in tree.items() if section != {}}
