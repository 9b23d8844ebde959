"""Format a recipe for the terminal, in 120 columns: numbers and formulas, with sources as footnotes."""

import textwrap
from collections.abc import Sequence

from megahp.recipe.hyperparameter_laws import Choice
from megahp.recipe.rows import RecipeRow

COLUMNS = 120


def table(rows: Sequence[RecipeRow], notes: Sequence[str]) -> str:
    """Format the rows of a recipe, each with the number of its source, then the sources and the notes."""
    sources = list(dict.fromkeys((row.source, row.confidence) for row in rows))
    lines = []
    for row in rows:
        number = 1 + sources.index((row.source, row.confidence))
        lines += _wrapped(f"{row.name:<27}{shown(row.value):<26} {row.formula}  [{number}]", 54)
    lines.append("")
    for number, (source, confidence) in enumerate(sources, 1):
        lines += _wrapped(f"[{number}] {source} ({confidence})", 4)
    for note in notes:
        lines += _wrapped(f"Note: {note}", 6)
    return "\n".join(lines)


def comparison(choices: Sequence[Choice]) -> str:
    """Format the choices of several rules, a line each; peak rates, as applied to hidden matrices."""
    form = "{:<20}{:>10}{:>14}{:>14}{:>8}  {}"
    lines = [form.format("rule", "LR hidden", "batch, tokens", "weight decay", "beta2", "learning rate of")]
    for choice in choices:
        decay, beta2 = ("open" if value is None else f"{value:.4g}" for value in (choice.weight_decay, choice.beta2))
        lines.append(form.format(choice.rule, f"{choice.lr:.4g}", f"{choice.batch:,.0f}", decay, beta2, choice.rate))
    lines += ["", "Learning rates of different parameterizations do not compare; open = the rule does not say."]
    for choice in choices:
        outside = f"; {choice.outside}" if choice.outside else ""
        lines += _wrapped(f"{choice.rule}: {choice.source} ({choice.confidence}){outside}", 2)
    return "\n".join(lines)


def shown(value: float | str) -> str:
    """Format a value: counts in full with thousands separators, other numbers with four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if 1e4 <= value < 1e14 or isinstance(value, int) and value < 1e14 else f"{value:.4g}"


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent=" " * indent, replace_whitespace=False, drop_whitespace=True)
