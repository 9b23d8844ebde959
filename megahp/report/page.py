"""The report: one HTML page about a run, or several runs compared, and a summary of a few lines of text."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from itertools import cycle
from pathlib import Path

from megahp.errors import UserError, complain, in_one_line
from megahp.files import open_unlinked
from megahp.log.metrics import LoggedRun, read_run
from megahp.log.progress import human_count
from megahp.report import figures, numbers

COMMON = 30  # events of one kind; more of them would hide all others in the figure


def read_runs(directories: Sequence[Path]) -> list[LoggedRun]:
    """Read run directories, in parallel; runs of the same name are named by their paths.

    Of several, one that is not a run, is damaged or has no steps yet is skipped with a warning. Raises UserError if
    none remains.
    """
    if len(directories) == 1:  # no processes to start, nothing to skip
        return [read_run(directories[0])]
    with ProcessPoolExecutor(min(len(directories), os.cpu_count() or 1)) as pool:
        results = list(pool.map(_run_or_error, directories))
    runs = [run for run in results if isinstance(run, LoggedRun)]
    errors = [error for error in results if isinstance(error, UserError)]
    if not runs:
        raise errors[0]
    for error in errors:
        complain(f"warning: skipped: {error}")
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else replace(run, name=str(run.directory)) for run in runs]


def _run_or_error(directory: Path) -> LoggedRun | UserError:
    try:
        return read_run(directory)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"{directory}: {in_one_line(error)}")


def write_report(runs: Sequence[LoggedRun], out: Path) -> Path:
    """Write the page about one run, or several overlaid, to the file `out`, and return it. Raises UserError.

    The page needs no network and no other file.
    """
    text, part = page(runs), out.with_suffix(".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open_unlinked(part, "w") as file:  # a browser may reload the page at any time
            file.write(text)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another file") from None
    return out


def text_summary(run: LoggedRun) -> str:
    """Return the summary of one run for a terminal."""
    rows = {label: value for label, value in numbers.summary(run).items() if value}
    width = max(map(len, rows))
    lines = [f"{label:<{width}}  {value}" for label, value in rows.items()]
    checks = [f"{'ok  ' if passed else 'WARN'}  {text}" for passed, text in numbers.health(run)]
    return "\n".join([run.name, "", *lines, "", *checks])


def page(runs: Sequence[LoggedRun]) -> str:
    """Return the whole page as HTML."""
    names = escape(", ".join(run.name for run in runs))
    heading = names if len(runs) == 1 else f"{len(runs)} runs compared"
    marks = events_to_mark(runs)
    target = "target of the batch policy" if numbers.recorded(runs, "batch_target") else ""
    batch = line_key(runs, "global batch", "noise scale", target) + "In sequences. Numbered lines are the events below."
    norms = line_key(runs, "mean over single examples", "the batch's mean gradient")
    rates = line_key(runs, "learning rate", "of a growing batch: times sqrt(batch / initial batch)")
    squares, layers = numbers.recorded(runs, "grad_sq_example", "grad_sq_batch"), any(run.layers for run in runs)
    parts = [
        f'<header><p class="kicker">megahp run report</p><h1>{heading}</h1></header>',
        f'<section class="top{" many" if len(runs) > 1 else ""}">{summary_table(runs)}{health_cards(runs)}</section>',
        section(runs, "Loss", loss_caption(runs), numbers.recorded(runs, "loss", "validation_loss"),
                figures.loss_figure),
        section(runs, "Batch size and noise scale", batch, numbers.recorded(runs, "global_batch", "noise_scale_total"),
                lambda runs: figures.batch_figure(runs, marks)),
        events_section(runs, marks),
        section(runs, "Updates in the weights", weights_caption(runs), numbers.recorded(runs, "weight_decay"),
                weights_of),
        '<div class="pairs">',
        section(runs, "Learning rate", rates, numbers.recorded(runs, "lr"), figures.learning_rate_figure),
        section(runs, "Throughput", "Tokens per second.", numbers.recorded(runs, "tokens_per_second"),
                figures.throughput_figure),
        section(runs, "Squared gradient norm", norms, squares, figures.gradient_figure),
        section(runs, "Noise scale by layer", layers_caption(runs), layers, figures.layer_figure),
        "</div>",
        *(SAMPLE.format(escape(run.name), escape(run.sample)) for run in runs if run.sample),
        *(SETTINGS.format(escape(run.name), escape(run.config or "config.toml is missing.")) for run in runs),
        "<footer>Every number is in the run directory: metrics.jsonl and events.jsonl.</footer>",
    ]  # fmt: skip
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{names}{TITLE}\n<style>{LIGHT}\n{css}</style></head>\n"
        "<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def section(
    runs: Sequence[LoggedRun], title: str, caption: str, is_recorded: bool, figure: Callable[[Sequence[LoggedRun]], str]
) -> str:
    """Return a figure under its heading, caption and legend, or a note that there is nothing to draw."""
    drawing = figure(runs) if is_recorded else '<p class="none">Not recorded.</p>'
    legend = "".join(f"<li>{swatch(index)}{escape(run.name)}</li>" for index, run in enumerate(runs))
    legend = f'<ul class="legend">{legend}</ul>' if len(runs) > 1 else ""
    heading = f'<h2>{title}</h2><p class="caption">{caption}</p>{legend}'
    return f"<section>{heading}<figure>{drawing}</figure></section>"


def swatch(index: int) -> str:
    """Return a patch of a run's colour."""
    return f'<span class="swatch" style="background:var(--{figures.colour(index)})"></span>'


def line_key(runs: Sequence[LoggedRun], solid: str, dashed: str, dotted: str = "") -> str:
    """Return the key of a figure's line styles; no dotted line if it has no name."""
    first, second = ("run0", "accent") if len(runs) == 1 else ("muted", "muted")
    lines = [("solid", first, solid), ("dashed", second, dashed), ("dotted", first, dotted)]
    form = '<span class="stroke" style="border-top:2px {} var(--{})"></span>{}'
    return "".join(form.format(*line) for line in lines if line[-1]) + ". "


def summary_table(runs: Sequence[LoggedRun]) -> str:
    """Return the summary, a row per quantity and a column per run, without rows that no run knows."""
    columns = [numbers.summary(run) for run in runs]
    rows = [label for label in columns[0] if any(column[label] for column in columns)]
    names = (f'<th scope="col">{swatch(index)}{escape(run.name)}</th>' for index, run in enumerate(runs))
    head = f"<thead><tr><td></td>{''.join(names)}</tr></thead>" if len(runs) > 1 else ""
    body = ""
    for label in rows:
        cells = "".join(f"<td>{column[label] or '–'}</td>" for column in columns)
        body += f'<tr><th scope="row">{label}</th>{cells}</tr>'
    return f'<div class="scroll"><table class="summary">{head}<tbody>{body}</tbody></table></div>'


def health_cards(runs: Sequence[LoggedRun]) -> str:
    """Return a card per run: whether it looks healthy, and the checks behind that."""
    cards = []
    for index, run in enumerate(runs):
        checks = numbers.health(run)
        failed = sum(not passed for passed, _ in checks)
        verdict = f"Needs attention: {failed} of {len(checks)} checks failed" if failed else "Looks healthy"
        name = f"{swatch(index)}{escape(run.name)}: " if len(runs) > 1 else ""
        items = ""
        for passed, text in checks:
            kind, sign = ("good", "✓") if passed else ("bad", "!")
            items += f'<li class="{kind}"><b>{sign}</b><span>{escape(text)}</span></li>'
        cards.append(
            f'<div class="health {"bad" if failed else "good"}"><h2>{name}{verdict}</h2><ul>{items}</ul></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def loss_caption(runs: Sequence[LoggedRun]) -> str:
    parts = ["Faint: every logged step. Line: the mean over 2 % of the run."]
    if numbers.recorded(runs, "validation_loss"):
        parts.append("Circles: validation.")
    if any(numbers.skipped(run).any() for run in runs):
        parts.append("Red ticks: skipped steps.")
    return " ".join(parts)


def layers_caption(runs: Sequence[LoggedRun]) -> str:
    marked = zip(numbers.layer_kinds(runs), cycle(figures.MARKERS), strict=False)
    kinds = "".join(f'<span class="kind">{written} {escape(kind)}</span> ' for kind, (_, written) in marked)
    return f"At the last step. {kinds}"


def weights_caption(runs: Sequence[LoggedRun]) -> str:
    """Return what the dual form of AdamW says, and its two numbers for each run."""
    parts = [
        "With weight decay the final weights are an average of all updates. The line shows how much each update counts "
        "in it, relative to an even average; for hidden matrices whose rate times weight decay is the base's."
    ]
    for index, run in enumerate(runs):
        if numbers.has_weight_decay(run):
            name = f"{swatch(index)}{escape(run.name)}: " if len(runs) > 1 else ""
            first, shares = numbers.update_shares(run)
            newest = f"half of the rest from the last {100 * numbers.newest_half(run, shares):.0f} % of the tokens"
            parts.append(f"{name}Initial weights {100 * first:.1f} %, {newest}.")
    return " ".join(parts)


def weights_of(runs: Sequence[LoggedRun]) -> str:
    """Return the figure of updates in the weights, or a note if no weights decayed."""
    if any(map(numbers.has_weight_decay, runs)):
        return figures.weights_figure(runs)
    return '<p class="none">Weight decay is 0: the weights are a sum of all updates, not an average.</p>'


def events_to_mark(runs: Sequence[LoggedRun]) -> list[figures.Mark]:
    """Return the events to draw, numbered in the order of tokens, without kinds that are common."""
    marks = []
    for index, run in enumerate(runs):
        counts = Counter(event["event"] for event in run.events)
        marks += [(index, event) for event in run.events if counts[event["event"]] <= COMMON]
    marks.sort(key=lambda mark: mark[1]["tokens"])
    return [(number, index, event) for number, (index, event) in enumerate(marks, start=1)]


def events_section(runs: Sequence[LoggedRun], marks: Sequence[figures.Mark]) -> str:
    """Return the table of drawn events, each with its number, and the counts of all others."""
    rows = ""
    for number, index, event in marks:
        kind = (swatch(index) if len(runs) > 1 else "") + escape(str(event["event"]))
        when = f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d %H:%M}"
        reason, tokens = escape(str(event["reason"])), human_count(event["tokens"])
        cells = (number, kind, f"{event['step']:,}", tokens, when, reason)
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    counts = Counter(event["event"] for run in runs for event in run.events)
    # A kind may be common in one run and drawn in another: subtract what is drawn.
    counts.subtract(event["event"] for _, _, event in marks)
    rest = ", ".join(f"{count:,} × {escape(str(event))}" for event, count in counts.items() if count > 0)
    rest = f'<p class="caption">Too many to draw: {rest}. See events.jsonl.</p>' if rest else ""
    if not marks:
        return f"<section><h2>Events</h2>{rest or '<p class=none>None.</p>'}</section>"
    labels = ("#", "Event", "Step", "Tokens", "Time (UTC)", "Reason")
    head = "".join(f'<th scope="col">{label}</th>' for label in labels)
    table = f'<table class="events"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>Events</h2><div class="scroll tall">{table}</div>{rest}</section>'


TITLE = " - megahp</title>"
SAMPLE = "<section><h2>Sample of {}</h2><blockquote>{}</blockquote></section>"
SETTINGS = "<details><summary>Settings of {}</summary><pre>{}</pre></details>"  # closed until clicked
HUES = " ".join(f"--{name}: {hue};" for name, hue in figures.PALETTE.items())
LIGHT = f":root {{ color-scheme: light dark; --card: #ffffff; --good: #2d7a4f; {HUES} }}"
