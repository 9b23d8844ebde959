"""`megahp preprocess --series`: cut series into windows, and write each as a document of tokens."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from megahp.commands.arguments import add_column_arguments
from megahp.commands.output import write_description
from megahp.data.indexed import IndexedWriter
from megahp.data.texts import LeftOut, note
from megahp.errors import UserError
from megahp.series.binning import Binning, fit_tails
from megahp.series.coding import SUFFIX, SeriesCoding, load_coding
from megahp.series.order import ORDERS
from megahp.series.tables import Columns, read_series, unusable

WINDOWS_AT_ONCE = 1024
# of a new coding; ranges of C2FAR's run documents
LEVELS, RANGE, TAILS = (12, 12, 12), (-0.1, 1.3), (2.0, 2.0)
CODING = ("conditioning", "horizon", "levels", "range", "tails", "sub_series", "order")
OPTIONS = (*CODING, "stride", "name_column", "time_column", "value_column")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with --series alone; a default of None tells which are given."""
    parser.add_argument("--series", action="store_true", help="the input is series of numbers: .csv, .jsonl, .parquet")
    add = parser.add_argument_group("with --series").add_argument
    add("--conditioning", type=int, metavar="C", help="given values of a window")
    add("--horizon", type=int, metavar="H", help="values to forecast")
    add("--stride", type=int, metavar="N", help="values between the beginnings of windows (default 1)")
    levels = " ".join(map(str, LEVELS))
    add("--levels", type=int, nargs="+", metavar="BINS", help=f"bins of each level, coarse to fine (default {levels})")
    low, high = RANGE
    words = "bins are over this range, 0 and 1 being the smallest and largest given value"
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"{words} (default {low} {high})")
    words = "Pareto exponents below and above the range (default: fitted to the windows)"
    add("--tails", type=float, nargs=2, metavar=("LOWER", "UPPER"), help=words)
    add("--sub-series", type=int, metavar="K", help="SutraNets: number of sub-series, a divisor of H (default 1)")
    add("--order", choices=ORDERS, help="of sub-series (default regular)")
    add_column_arguments(add)


def run(arguments: argparse.Namespace) -> int:
    """Write the windows of all usable series, and the coding where it is new. Raises UserError."""
    path, stride = Path(arguments.tokenizer), 1 if arguments.stride is None else arguments.stride
    if stride < 1:
        raise UserError(f"--stride is {stride}: give at least 1")
    coding = coding_of(arguments, path)
    columns = Columns(arguments.name_column, arguments.time_column, arguments.value_column)
    series = read_series(map(Path, arguments.input), columns)
    if not path.exists() and arguments.tails is None:
        parts = (part for _, part in windows_of(series, coding, stride, LeftOut()))
        scaled = (coding.scale(part[:, : coding.conditioning]).apply(part) for part in parts)
        coding = replace(coding, binning=replace(coding.binning, tails=fit_tails(coding.binning, scaled)))
    bad, flat, count = LeftOut(), LeftOut(), 0
    with IndexedWriter(arguments.output, coding.vocab_size, arguments.overwrite) as writer:
        for name, part in windows_of(series, coding, stride, bad):
            tokens, scale = coding.encode(part)
            usable = scale.span > 0  # not NaN either
            for row in tokens[usable]:
                writer.add_document(row)
            for _ in range(int((~usable).sum())):
                note(flat, "given values are constant, or missing", name)
            count += int(usable.sum())
        if not count:
            reason, (_, first) = next(iter((bad | flat).items()), ("the files are empty", (0, "")))
            raise UserError(f"--input holds no usable window: {first}{': ' * bool(first)}{reason}; correct it")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        coding.save(path)
    ids = {"vocab_size": coding.vocab_size, "eod": coding.begin, "bos": coding.begin}
    counts = {"documents": count, "tokens": count * coding.window_tokens, "largest_id": writer.largest}
    description = {"tokenizer": str(path), "tokenizer_fingerprint": coding.fingerprint, **ids, **counts}
    write_description(arguments.output, description)
    below, above = coding.binning.tails
    print(
        f"{arguments.output}: {count} windows of {len(series)} series, {counts['tokens']} tokens; tails "
        f"{below:.4g} and {above:.4g}; train with data.sequence_length={coding.window_tokens}"
    )
    for what, left_out in (("series", bad), ("windows", flat)):
        for reason, (times, first) in left_out.items():
            print(f"{arguments.output}: left out {times} {what}: {reason}, the first {first}")
    return 0


def windows_of(
    series: Mapping[str, np.ndarray], coding: SeriesCoding, stride: int, bad: LeftOut
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the windows of all usable series in parts, float64 [n, window], with the series' name; count the others."""
    for name, values in series.items():
        problem, before = unusable(values, 0), unusable(values[: -coding.horizon], coding.horizon)
        if problem or before:
            note(bad, problem or f"before its last {coding.horizon} values, {before}", name)
            continue
        windows = coding.windows(values, stride)
        while part := list(islice(windows, WINDOWS_AT_ONCE)):
            yield name, np.stack(part)


def coding_of(arguments: argparse.Namespace, path: Path) -> SeriesCoding:
    """Return the coding of an existing --tokenizer file, which the options must not contradict, or theirs. Raises
    UserError."""
    if path.suffix != SUFFIX:
        raise UserError(
            f"--tokenizer {str(path)!r} is for texts; with --series name a *{SUFFIX} file, which is written"
        )
    given = {name: value for name in CODING if (value := getattr(arguments, name)) is not None}
    if path.exists():
        coding = load_coding(path)
        low, high = coding.binning.low, coding.binning.high
        holds = {**vars(coding), "levels": coding.levels, "range": (low, high), "tails": coding.binning.tails}
        for name, value in given.items():
            if (tuple(value) if isinstance(value, list) else value) != holds[name]:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {value} is not {path}'s {holds[name]}; remove it, or name a new file")
        return coding
    if arguments.conditioning is None or arguments.horizon is None:
        raise UserError(f"{path} does not exist: give --conditioning and --horizon, and it is written")
    low, high = given.pop("range", RANGE)
    binning = Binning(tuple(given.pop("levels", LEVELS)), low, high, tuple(given.pop("tails", TAILS)))
    return SeriesCoding(binning, **given)
