"""All that is known of the settings, for people to read: in a terminal, and as a page.

python -m megahp.config.describe > docs/settings.md
"""

import textwrap
from typing import Any, Literal, get_args, get_origin

from megahp.config.resolve import BOUNDS, KINDS, in_words, suggest
from megahp.config.schema import FIELDS, SECTIONS, TYPES, fixed_when, toml_value
from megahp.errors import UserError

WIDTH = 100  # of a terminal
FIXED = {
    "on resume": "on resume",
    "always": "on resume, and in a branch (train.start_from)",
    "unless dense": "on resume, and in a branch (train.start_from) unless it is dense",
}
COLUMNS = "| setting | type and bounds | default | meaning | remarks |"
HEAD = """\
# Settings

All settings of a run file; `megahp config --describe [SECTION|KEY]` tells of them too. They are defined in
[`megahp/config/schema.py`](../megahp/config/schema.py). This page is written from there, by
`python -m megahp.config.describe > docs/settings.md`.

*Only with*: beside other values of that other setting this one would do nothing, so giving it is an error. *Fixed on
resume*: `--resume auto` refuses another value than the checkpoint's. *In a branch*: so does a new run that starts from
the checkpoint ([continuing.md](continuing.md)). Everything else may change, and the change is an event.
"""


def describe(name: str = "") -> str:
    """Return what is known of one setting (section.key), of those of a section, or of all, for a terminal.

    Raises UserError for a name of neither.
    """
    if name in FIELDS:
        head, *facts = _facts(name).items()
        return "\n".join([f"{name}: {head[1]}", *(f"  {what:<11}{fact}" for what, fact in facts)])
    section, _, key = name.partition(".")
    if section in SECTIONS and key:
        raise UserError(f"{name} is no setting; {suggest(key, TYPES[section])}")
    if name and name not in SECTIONS:
        near = ", ".join(full for full in FIELDS if full.endswith(f".{name}"))
        remedy = f"did you mean {near}?" if near else suggest(section, SECTIONS)
        raise UserError(f"{name} is neither a section nor a setting; {remedy}")
    return "\n\n".join(map(_section, [name] if name else SECTIONS))


def _facts(key: str) -> dict[str, str]:
    """Collect all there is to tell of a setting, under short headings, its meaning first."""
    section, name = key.split(".")
    law = FIELDS[key].metadata
    other, *values = law.get("only_with", ("",))
    facts = {
        "meaning": law["meaning"],
        "type": _in_words(TYPES[section][name]),
        "bounds": ", ".join(f"{bound.replace('_', ' ')} {law[bound]:g}" for bound in BOUNDS if bound in law),
        "default": toml_value(FIELDS[key].default),
        "only with": f"{other}: {in_words(values, toml_value)}" if other else "",
        "fixed": FIXED.get(fixed_when(key), ""),
    }
    return {what: fact for what, fact in facts.items() if fact}


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(toml_value, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list of {KINDS[get_args(kind)[0]].removeprefix('a ')}s"
    return KINDS[kind]


def _section(name: str) -> str:
    """List a section's settings: with default, meaning, type, bounds, and what they go with."""
    rows = [(key, _facts(f"{name}.{key}")) for key in TYPES[name]]
    left = [f"  {key} = {facts['default']}  " for key, facts in rows]
    margin = max(map(len, left))
    lines = [f"[{name}]  {SECTIONS[name].__doc__}"]
    for start, (_, facts) in zip(left, rows, strict=True):
        only = f"; only with {facts['only with']}" if "only with" in facts else ""
        text = f"{start:<{margin}}{facts['meaning']} ({_kind(facts)}{only})"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * margin, break_on_hyphens=False)
    return "\n".join(lines)


def _kind(facts: dict[str, str]) -> str:
    return ", ".join(facts[what] for what in ("type", "bounds") if what in facts)


def markdown() -> str:
    """Return the page docs/settings.md: a table for each section."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        lines += [f"## `[{name}]`\n\n{section.__doc__}\n", COLUMNS, "|---|---|---|---|---|"]
        for key in TYPES[name]:
            facts = _facts(f"{name}.{key}")
            remarks = "; ".join(f"{what} {facts[what]}" for what in ("only with", "fixed") if what in facts)
            cells = (f"`{name}.{key}`", _kind(facts), f"`{facts['default']}`", facts["meaning"], remarks)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
