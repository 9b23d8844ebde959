"""A plan as a person reads it, in 120 columns: numbers and formulas, then what each footnote's source is."""

import textwrap
from collections.abc import Sequence

from megahp.recipe.hyperparameter_laws import Choice
from megahp.recipe.rows import RecipeRow

COLUMNS = 120


def table(rows: Sequence[RecipeRow], notes: Sequence[str]) -> str:
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
    """Rates at the peak, as applied to hidden matrices; batches in tokens."""
    form = "{:<20}{:>10}{:>14}{:>14}{:>8}  {}"
    lines = [form.format("rule", "LR hidden", "batch, tokens", "weight decay", "beta2", "the rate is")]
    for each in choices:
        decay, beta2 = ("open" if value is None else f"{value:.4g}" for value in (each.weight_decay, each.beta2))
        lines.append(form.format(each.rule, f"{each.lr:.4g}", f"{each.batch:,.0f}", decay, beta2, each.rate))
    about = "Learning rates of different parameterizations are rates of different things; open = the rule does not say."
    lines += ["", about]
    for each in choices:
        outside = f"; {each.outside}" if each.outside else ""
        lines += _wrapped(f"{each.rule}: {each.source} ({each.confidence}){outside}", 2)
    return "\n".join(lines)


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if 1e4 <= value < 1e14 or isinstance(value, int) and value < 1e14 else f"{value:.4g}"


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent=" " * indent, replace_whitespace=False, drop_whitespace=True)
