"""Say, before a run is queued, what each of its ranks will compute, send and allocate in a step.

    megahp plan run.toml --ranks 64 [section.key=value ...] [--json FILE]
    megahp plan --validate [--json [FILE]] [--plot FILE]
    megahp plan --predict ROWS.csv [--json [FILE]]

The step is the product's own, on tensors without contents: one rank of each pipeline stage is built and stepped as on a
cluster, on this machine and within seconds. Peak memory is what PyTorch allocates, without the CUDA context, NCCL's
buffers and fragmentation; it is within 5 % for CPU ranks (tests/plan), and has not been compared with a GPU's.

--validate predicts the published step times and peaks of megahp/plan/published.csv, those of each source by what the
others say, and prints the tables of docs/plan.md; --predict does so for a file of measurements with its columns.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megahp.commands.output import provenance, write_json
from megahp.config import resolve
from megahp.errors import UserError
from megahp.log.metrics import without_nan

STDOUT = Path("-")
KINDS = ("weights", "moments", "gradients", "gathered", "activations", "temporary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_file", type=Path, nargs="?", metavar="RUN.toml")
    add("overrides", nargs="*", default=[], metavar="section.key=value", help="override the file's own")
    add("--ranks", type=int, metavar="N", help="ranks of the run, as on the cluster")
    add("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="write all results here, or print them")
    add("--validate", action="store_true", help="predict published measurements, and print the verdict")
    add("--predict", type=Path, metavar="ROWS.csv", help="predict measurements, in published.csv's columns")
    add("--plot", type=Path, metavar="FILE", help="with --validate: draw it: .svg, .png or .pdf")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    if options.validate or options.predict:
        return predict_published(options, words)
    if options.run_file is None or options.ranks is None:
        raise UserError("megahp plan needs a run file and --ranks N, or --validate, or --predict ROWS.csv")
    config = resolve.load(options.run_file, options.overrides).config
    if not config.model.vocab_size:
        raise UserError("model.vocab_size = 0 is the tokenizer's, which a plan does not read; set it, e.g. 32000")

    from megahp.parallel.layout import AXES, fit  # imported late, with torch: only for valid settings
    from megahp.plan.trace import trace_step

    layout = fit(config.parallel, options.ranks)
    named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, layout.shape, strict=True) if size > 1)
    print(f"{options.ranks} ranks: {named or 'one rank'}")
    found: list[dict[str, Any]] = []
    for stage in range(layout.pp):
        rank = stage * (options.ranks // layout.pp)
        step = trace_step(config, options.ranks, rank)
        if layout.pp > 1:
            print(f"pipeline rank {stage}")
        total = sum(step.peak.values())
        parts = ", ".join(f"{kind} {step.peak[kind] / 2**30:.2f}" for kind in KINDS if step.peak[kind])
        print(f"  peak memory     {total / 2**30:.2f} GiB: {parts}")
        print(f"  between steps   {step.resident / 2**30:.2f} GiB")
        products, attention = step.flops("product") / 1e12, step.flops("attention") / 1e12
        moved = sum(each.bytes * count for each, count in step.kernels.items() if each.kind == "memory")
        print(f"  a step          {products:,.3g} TFLOP in products, {attention:,.3g} in attention, all scores counted")
        print(f"                  {moved / 2**30:,.1f} GiB read and written by all other kernels")
        sent: dict[tuple[str, str], list[int]] = {}
        for each, count in step.collectives.items():
            calls = sent.setdefault((each.name, f"{each.axes} ({each.size})"), [0, 0])
            calls[0] += count
            calls[1] += each.bytes * count
        for (name, axes), (count, size) in sorted(sent.items(), key=lambda item: -item[1][1]):
            print(f"  {name:<15} {count:,} over {axes}, {size / 2**30:,.2f} GiB")
        found.append(
            {
                "rank": rank,
                "peak": dict(step.peak),
                "resident": step.resident,
                "kernels": [{**vars(each), "count": n} for each, n in step.kernels.items()],
                "collectives": [{**vars(each), "count": n} for each, n in step.collectives.items()],
            }
        )
    write_or_print(options.json, {**provenance(words), "ranks": found})
    return 0


def predict_published(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Predict the rows of --predict, or with --validate those of published.csv."""
    from megahp.plan import validation  # imported late: it reads the machines and numpy
    from megahp.plan.published import FILE, read_rows

    rows = read_rows(options.predict or FILE)
    if options.predict:
        found = validation.predict(rows)
        if options.json is None:
            for each in found:
                print(f"row {each['row']}: {each.get('left_out') or validation.in_words(each)}")
        write_or_print(options.json, {**provenance(words), "rows": found})
        return 0
    result = validation.validate(rows)
    if options.json != STDOUT:
        print(validation.report(result))
    if options.plot:
        validation.draw(result, options.plot)
    numbers, factors = validation.numbers(result), dict(result.factors)
    tree = {**provenance(words), "numbers": numbers, "factors": factors, "rows": validation.records(result)}
    write_or_print(options.json, tree)
    return 0


def write_or_print(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write the results as JSON, if a file is named, or print them for --json without one."""
    if file == STDOUT:
        print(json.dumps(without_nan(results), indent=2))
    else:
        write_json(file, results)
