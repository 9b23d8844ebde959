"""Describe the settings for people: in a terminal, and as a page.

python -m megahp.config.describe > docs/settings.md
"""

import textwrap
from typing import Literal, Union, get_args, get_origin

from megahp.config.resolve import BOUNDS, KINDS, suggest, values_in_words
from megahp.config.schema import AUTO, FIELDS, SECTIONS, TYPES, fixed_when, toml_value
from megahp.errors import UserError

WIDTH = 100  # columns of a terminal
FIXED = {
    "on resume": "on resume",
    "always": "on resume, and in a branch (train.start_from)",
    "unless dense": "on resume, and in a branch (train.start_from) unless it is dense",
}
COLUMNS = "| setting | type and bounds | default | meaning | remarks |"
HEAD = """\
# Settings

All settings of a run file; `megahp config --describe [SECTION|KEY]` prints the same. They are defined in
[`megahp/config/schema.py`](../megahp/config/schema.py), and this page is generated from there by
`python -m megahp.config.describe > docs/settings.md`.

*Only with*: the setting has an effect only with these values of another setting; setting it otherwise is an error.
*Fixed on resume*: `--resume auto` refuses a value that differs from the checkpoint's. *In a branch*: so does a new run
that starts from the checkpoint ([continuing.md](continuing.md)). Everything else may change; the change is logged as an
event.
"""


def describe(name: str = "") -> str:
    """Return the description of a setting (section.key), of a section, or of all sections, for a terminal.

    Raises UserError for any other name.
    """
    if name in FIELDS:
        facts = _facts(name)
        meaning = facts.pop("meaning")
        return "\n".join([f"{name}: {meaning}", *(f"  {what:<11}{fact}" for what, fact in facts.items())])
    section, _, key = name.partition(".")
    if section in SECTIONS and key:
        raise UserError(f"{name} is not a setting; {suggest(key, TYPES[section])}")
    if name and name not in SECTIONS:
        near = ", ".join(full for full in FIELDS if full.endswith(f".{name}"))
        remedy = f"did you mean {near}?" if near else suggest(section, SECTIONS)
        raise UserError(f"{name} is neither a section nor a setting; {remedy}")
    return "\n\n".join(map(_describe_section, [name] if name else SECTIONS))


def _facts(key: str) -> dict[str, str]:
    """Return what is known of a setting: its meaning, type, bounds, default, only with, fixed; without empty ones."""
    section, name = key.split(".")
    metadata = FIELDS[key].metadata
    other, *values = metadata.get("only_with", ("",))
    declared = TYPES[section][name]
    if get_origin(declared) is Literal:
        kind = f"one of {', '.join(map(toml_value, get_args(declared)))}"
    elif get_origin(declared) is tuple:
        kind = f"a list of {KINDS[get_args(declared)[0]].removeprefix('a ')}s"
    elif get_origin(declared) is Union:
        kind = f"{KINDS[get_args(declared)[0]]} or {toml_value(AUTO)}"
    else:
        kind = KINDS[declared]
    facts = {
        "meaning": metadata["meaning"],
        "type": kind,
        "bounds": ", ".join(f"{bound.replace('_', ' ')} {metadata[bound]:g}" for bound in BOUNDS if bound in metadata),
        "default": toml_value(FIELDS[key].default),
        "only with": f"{other}: {values_in_words(values, toml_value)}" if other else "",
        "fixed": FIXED.get(fixed_when(key), ""),
    }
    return {what: fact for what, fact in facts.items() if fact}


def _describe_section(name: str) -> str:
    """Return a section's settings, one wrapped entry each, with the meanings aligned in a column."""
    rows = [(key, _facts(f"{name}.{key}")) for key in TYPES[name]]
    starts = [f"  {key} = {facts['default']}  " for key, facts in rows]
    margin = max(map(len, starts))
    lines = [f"[{name}]  {SECTIONS[name].__doc__}"]
    for start, (_, facts) in zip(starts, rows, strict=True):
        only = f"; only with {facts['only with']}" if "only with" in facts else ""
        text = f"{start:<{margin}}{facts['meaning']} ({_type_and_bounds(facts)}{only})"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * margin, break_on_hyphens=False)
    return "\n".join(lines)


def _type_and_bounds(facts: dict[str, str]) -> str:
    return ", ".join(facts[what] for what in ("type", "bounds") if what in facts)


def markdown() -> str:
    """Return the page docs/settings.md: a table for each section."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        lines += [f"## `[{name}]`\n\n{section.__doc__}\n", COLUMNS, "|---|---|---|---|---|"]
        for key in TYPES[name]:
            facts = _facts(f"{name}.{key}")
            remarks = "; ".join(f"{what} {facts[what]}" for what in ("only with", "fixed") if what in facts)
            cells = (f"`{name}.{key}`", _type_and_bounds(facts), f"`{facts['default']}`", facts["meaning"], remarks)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
