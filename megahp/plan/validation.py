"""Hold the formulas against published measurements: each source predicted by what the others say, and the verdict.

A prediction's error is |predicted / published - 1|. Of every source a quarter of the dense rows may serve calibration;
a source's own errors are given twice: with none of its rows in the fit, and with that quarter, for its other rows.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megahp.plan.calibration import Calibration, Factors, chosen_rows
from megahp.plan.published import Case, Row, read_all
from megahp.plan.step_time import estimate

LEAST_RANKED = 8  # rows of a source, model and GPU that are worth ranking


@dataclass(frozen=True)
class Prediction:
    """A published row and what was predicted of it."""

    case: Case
    row: Row
    seconds: float  # of a step, with no row of its source in the calibration
    seconds_own: float  # with a quarter of its source's rows in it
    bytes: float  # at the peak, as the source counts it
    activations: float
    calibrates: bool  # whether it is of that quarter

    @property
    def error(self) -> float:
        """Predicted over published step time, less one."""
        return self.seconds / (self.case.seconds or np.nan) - 1

    @property
    def error_own(self) -> float:
        return self.seconds_own / (self.case.seconds or np.nan) - 1

    @property
    def memory_error(self) -> float:
        if self.case.activations:
            return self.activations / self.case.activations - 1
        return self.bytes / (self.case.memory or np.nan) - 1


@dataclass(frozen=True)
class Validation:
    """Every published row, predicted or with the reason why it is not."""

    rows: Sequence[Row]
    predictions: Sequence[Prediction]
    reasons: dict[int, str]
    factors: Factors  # fitted to the quarters of all sources

    def of(self, source: str = "", kind: str = "dense") -> list[Prediction]:
        """Return the predictions with a published step time of a source, or of all."""
        return [
            each
            for each in self.predictions
            if each.case.seconds and each.case.kind == kind and source in ("", each.case.source)
        ]

    def sources(self, kind: str = "dense") -> list[str]:
        return list(dict.fromkeys(each.case.source for each in self.of(kind=kind)))


def validate(rows: Sequence[Row]) -> Validation:
    """Predict every row that can be read, each source by a calibration on the others."""
    cases, reasons = read_all(rows)
    calibration, chosen = Calibration(cases), chosen_rows(cases)
    fitted = calibration.fit(chosen)
    predictions: dict[int, Prediction] = {}
    for source in dict.fromkeys(case.source for case in cases):
        others = calibration.refit(fitted, [index for index in chosen if cases[index].source != source])
        for index, case in enumerate(cases):
            if case.source == source:
                found = calibration.estimate(index, others)
                predictions[index] = Prediction(
                    case,
                    rows[case.number],
                    found.seconds,
                    calibration.estimate(index, fitted.factors).seconds,
                    found.bytes * (1 + case.beside[1]) + case.beside[0],
                    found.peak["activations"],
                    index in chosen,
                )
    return Validation(rows, [predictions[index] for index in range(len(cases))], reasons, fitted.factors)


def rankings(validation: Validation) -> dict[str, tuple[int, float]]:
    """Return rows and Spearman's rank correlation, in tokens a second and GPU, of each source's layouts of one model on
    one kind of GPU."""
    sets: dict[tuple[str, ...], list[Prediction]] = {}
    for each in validation.predictions:
        if each.case.seconds:
            key = (each.row["source"], each.case.source, each.row["model"], each.case.gpu)
            sets.setdefault(key, []).append(each)
    found = {}
    for (_, source, model, gpu), members in sets.items():
        if len(members) >= LEAST_RANKED:
            work = [each.case.config.step_tokens / each.case.ranks for each in members]
            published = [tokens / (each.case.seconds or np.nan) for tokens, each in zip(work, members, strict=True)]
            predicted = [tokens / each.seconds for tokens, each in zip(work, members, strict=True)]
            found[f"{source}, {model}, {gpu}"] = (len(members), spearman(published, predicted))
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of ranks, equal values sharing the mean of theirs."""

    def ranks(values: Sequence[float]) -> list[float]:
        numbers = np.array(values)
        return [float((numbers < value).sum() + (numbers == value).sum() / 2) for value in numbers]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def numbers(validation: Validation) -> dict[str, float]:
    """Return what is held against the targets."""
    dense, memory = validation.of(), [each for each in validation.predictions if each.case.memory]
    rest = [each for each in dense if not each.calibrates]
    failed = [each for each in validation.predictions if each.case.out_of_memory]

    def of_sources(error: Callable[[Prediction], float], rows: Iterable[Prediction]) -> float:
        by_source: dict[str, list[float]] = {}
        for each in rows:
            by_source.setdefault(each.case.source, []).append(abs(error(each)))
        return float(np.median([np.median(errors) for errors in by_source.values()]))

    return {
        "time": of_sources(lambda each: each.error, dense),
        "time within 20 %": float(np.mean([abs(each.error) <= 0.2 for each in dense])),
        "time, own quarter": of_sources(lambda each: each.error_own, rest),
        "time within 15 %, own quarter": float(np.mean([abs(each.error_own) <= 0.15 for each in rest])),
        "ranking": float(np.median([correlation for _, correlation in rankings(validation).values()])),
        "memory": float(np.median([abs(each.memory_error) for each in memory])),
        "activations": float(
            np.median([abs(each.memory_error) for each in validation.predictions if each.case.activations])
        ),
        "out of memory": float(sum(each.bytes > each.case.machine.memory for each in failed)),
        "out of memory, of": float(len(failed)),
    }


def report(validation: Validation) -> str:
    """Return tables and verdict in Markdown, as they stand in docs/plan.md."""
    lines = ["| source | rows | median error | within 20 % | bias | own quarter: median, within 15 % | memory |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for kind in ("dense", "fp8"):
        for source in validation.sources(kind):
            lines.append(_source_line(validation, source, kind))
    lines += ["", "| ranked layouts of | rows | Spearman |", "|---|---:|---:|"]
    lines += [f"| {name} | {count} | {value:.2f} |" for name, (count, value) in rankings(validation).items()]
    found = numbers(validation)
    verdict = (
        f"- Step time, dense: median of the sources' medians {found['time']:.1%} (target 8 %), "
        f"{found['time within 20 %']:.0%} of rows within 20 % (90 %).",
        f"- With a source's own quarter: {found['time, own quarter']:.1%} (5 %), "
        f"{found['time within 15 %, own quarter']:.0%} within 15 % (90 %).",
        f"- Layouts ranked: Spearman {found['ranking']:.2f} in the median (0.9).",
        f"- Peak memory: median error {found['memory']:.1%} (10 %); activations {found['activations']:.1%}; "
        f"{found['out of memory']:.0f} of {found['out of memory, of']:.0f} rows that ran out of memory are predicted "
        "above the device's.",
        f"- {len(validation.predictions)} of {len(validation.rows)} rows are predicted, "
        f"{sum(each.calibrates for each in validation.predictions)} serve calibration. Left out: "
        + "; ".join(f"{count}, {reason}" for reason, count in Counter(validation.reasons.values()).items())
        + ".",
    )
    lines += ["", *(textwrap.fill(line, 120, subsequent_indent="  ") for line in verdict)]
    return "\n".join(lines)


def _source_line(validation: Validation, source: str, kind: str) -> str:
    rows = validation.of(source, kind)
    errors = np.array([each.error for each in rows])
    own = np.array([each.error_own for each in rows if not each.calibrates])
    memory = [abs(each.memory_error) for each in rows if each.case.memory]
    cells = [
        source + (" (float8)" if kind == "fp8" else ""),
        str(len(rows)),
        f"{np.median(np.abs(errors)):.1%}",
        f"{np.mean(np.abs(errors) <= 0.2):.0%}",
        f"{np.median(errors):+.1%}",
        f"{np.median(np.abs(own)):.1%}, {np.mean(np.abs(own) <= 0.15):.0%}",
        f"{np.median(memory):.1%} of {len(memory)}" if memory else "",
    ]
    return f"| {' | '.join(cells)} |"


def records(validation: Validation) -> list[dict[str, Any]]:
    """Return a record a row: source, published and predicted in the row's own unit, error, and its part in the fit; or
    why it is left out."""
    found = left_out(validation.rows, validation.reasons)
    for each in validation.predictions:
        found.append(record(each.case, each.row, each.seconds, each.bytes, each.activations))
        found[-1]["calibrates"] = each.calibrates
        if each.case.seconds:
            found[-1]["error_own_quarter"] = each.error_own
    return sorted(found, key=lambda each: each["row"])


def left_out(rows: Sequence[Row], reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a record for each row that is not predicted."""
    return [{"row": number, "source": rows[number]["source"], "left_out": reasons[number]} for number in reasons]


def record(case: Case, row: Row, seconds: float, peak: float, activations: float) -> dict[str, Any]:
    """Return what was published of a row and what is predicted, in the row's own unit; and the peak in GB."""
    unit, published = row["measured_unit"], None
    if row["measured_value"].replace(".", "", 1).isdigit():
        published = float(row["measured_value"])
    if case.seconds and published:
        predicted = seconds if unit == "s/step" else published * case.seconds / seconds
    elif case.activations:
        predicted = activations / 2**30
    elif unit == "tok/s/GPU":
        predicted = case.config.step_tokens / seconds / case.ranks
    else:
        predicted = peak / 1e9 if unit.startswith("GB") else seconds
    return {
        "row": case.number,
        "source": row["source"],
        "model": row["model"],
        "gpu": case.gpu,
        "gpus": case.ranks,
        "kind": case.kind,
        "unit": unit,
        "published": "OOM" if case.out_of_memory else published,
        "predicted": predicted,
        "error": predicted / published - 1 if published else None,
        "seconds": seconds,
        "peak_gb": peak / 1e9,
        "published_peak_gb": case.memory and case.memory / 1e9,
        "out_of_memory": peak > case.machine.memory,
    }


def predict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a record a row, predicted with the machines' own efficiencies."""
    cases, reasons = read_all(rows)
    found = left_out(rows, reasons)
    for case in cases:
        each = estimate(case.config, case.ranks, case.machine, case.stack)
        peak = each.bytes * (1 + case.beside[1]) + case.beside[0]
        found.append(record(case, rows[case.number], each.seconds, peak, each.peak["activations"]))
    return sorted(found, key=lambda each: each["row"])


def in_words(found: dict[str, Any]) -> str:
    """Return a record in a line."""
    published = f", published {found['published']}" if found["published"] is not None else ""
    return f"{found['predicted']:.4g} {found['unit']}{published}; {found['seconds']:.4g} s, {found['peak_gb']:.1f} GB"


def draw(validation: Validation, file: Path) -> None:
    """Draw predicted against published tokens a second and GPU, and each source's errors. Raises UserError."""
    from megahp.report.figures import MARKERS, PALETTE, colour, plot_in

    with plot_in(file, 9, 4.2) as figure:
        scatter, spread = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.2)})
        sources = validation.sources()
        for index, source in enumerate(sources):
            rows = validation.of(source)
            rates = [each.case.config.step_tokens / each.case.ranks for each in rows]
            published = [rate / (each.case.seconds or np.nan) for rate, each in zip(rates, rows, strict=True)]
            predicted = [rate / each.seconds for rate, each in zip(rates, rows, strict=True)]
            style = {"color": PALETTE[colour(index)], "marker": MARKERS[index // 6][0], "s": 10, "label": source}
            scatter.scatter(published, predicted, **style)
            errors = [100 * each.error for each in rows]
            spread.scatter(errors, [index] * len(rows), **{**style, "alpha": 0.5})
            spread.plot([np.median(errors)] * 2, [index - 0.3, index + 0.3], color=PALETTE["ink"])
        ends = [10, 2e5]
        scatter.plot(ends, ends, color=PALETTE["muted"], linewidth=0.7)
        scatter.set(xscale="log", yscale="log", xlabel="published tokens/s/GPU", ylabel="predicted tokens/s/GPU")
        for axis in (scatter.xaxis, scatter.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        spread.axvspan(-20, 20, color=PALETTE["rule"], zorder=0)
        spread.set_yticks(range(len(sources)), sources)
        spread.set(xlabel="error of the step time, %", xlim=(-70, 70))
        spread.invert_yaxis()
