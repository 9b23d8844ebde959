"""Say, before a run is queued, what each of its ranks will compute, send and allocate in a step, which layout is best
on a cluster, and when the run ends.

    megahp plan run.toml --ranks 64 [section.key=value ...] [--json FILE]
    megahp plan run.toml --cluster h100 --gpus 64 [--set] [section.key=value ...] [--json FILE]
    megahp plan run.toml --cluster h100 --gpus 64 --simulate [--grow 512] [--mtbf HOURS] [--price X] ...
    megahp plan --validate [--json [FILE]] [--plot FILE]
    megahp plan --predict ROWS.csv [--json [FILE]]

The step is the product's own, on tensors without contents: one rank of each pipeline stage is built and stepped as on a
cluster, on this machine and within seconds. Peak memory is what PyTorch allocates, without the CUDA context, NCCL's
buffers and fragmentation; it is within 5 % for CPU ranks (tests/plan), and has not been compared with a GPU's.

With --cluster the layouts that divide the GPUs and fit their memory are compared by formulas, and the fastest must fit
by its own trace too; --set writes it into the run file. Settings on the command line stay as they are. --simulate takes
the run file's own layout through the whole run: its batches, growth, checkpoints, and failures at random.

--validate predicts the published step times and peaks of megahp/plan/published.csv, those of each source by what the
others say, and prints the tables of docs/plan.md; --predict does so for a file of measurements with its columns.
"""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megahp.commands.arguments import key_of, parse_number
from megahp.commands.output import provenance, write_json
from megahp.config import Config, get_setting, resolve
from megahp.config.edit import edited
from megahp.errors import UserError
from megahp.files import read_text, replace_text
from megahp.log.metrics import without_nan
from megahp.parallel.layout import AXES, fit
from megahp.plan.machine import Machine, load_machine
from megahp.train.prepare import check_batch

STDOUT = Path("-")
# of --simulate: option, unit and meaning; defaults and their sources are megahp.plan.simulate.Conditions'
CONDITIONS = (
    ("mtbf", "HOURS", "hours between failures of one GPU (default 50,000)"),
    ("restart", "MINUTES", "minutes from a failure to the next step (default 10)"),
    ("storage", "GB/S", "gigabytes a second in which checkpoints are written (default 57)"),
    ("price", "X", "price of a GPU for an hour"),
)
KINDS = ("weights", "moments", "gradients", "gathered", "activations", "temporary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_file", type=Path, nargs="?", metavar="RUN.toml")
    add("overrides", nargs="*", default=[], metavar="section.key=value", help="override the file's own")
    add("--ranks", type=int, metavar="N", help="ranks of the run, as on the cluster")
    add("--cluster", metavar="NAME", help="machine of megahp/plan/machines, such as h100, or a .toml file like those")
    add("--gpus", type=int, metavar="N", help="with --cluster: GPUs to find the best layout on")
    add("--set", action="store_true", help="write the best layout into the run file")
    add("--simulate", action="store_true", help="simulate the whole run with the run file's layout")
    add("--grow", type=int, metavar="N", help="with --simulate: double the nodes as the batch grows, up to N GPUs")
    for name, unit, what in CONDITIONS:
        add(f"--{name}", type=parse_number, metavar=unit, help=f"with --simulate: {what}")
    add("--start", type=datetime.date.fromisoformat, metavar="DATE", help="with --simulate: its first day (today)")
    add("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="write all results here, or print them")
    add("--validate", action="store_true", help="predict published measurements, and print the verdict")
    add("--predict", type=Path, metavar="ROWS.csv", help="predict measurements, in published.csv's columns")
    add("--plot", type=Path, metavar="FILE", help="with --validate: draw it: .svg, .png or .pdf")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    refuse_ignored(options)
    if options.validate or options.predict:
        return predict_published(options, words)
    config = resolve.load(options.run_file, options.overrides).config
    if not config.model.vocab_size:
        raise UserError("model.vocab_size = 0 is the tokenizer's, which a plan does not read; set it, e.g. 32000")
    if config.parallel.engine != "megahp":
        raise UserError("parallel.engine = 'deepspeed' is not planned, only megahp's own; add parallel.engine=megahp")
    if config.compute.fp4:
        raise UserError("simulated FP4 is not planned; add compute.fp4_forward=none compute.fp4_backward=none")
    if config.distill.teachers:
        print("planned without distill.teachers, which take more time and memory", file=sys.stderr)
    if options.cluster and config.model.quantize != "none":
        print("times are without the rounding of model.quantize, which takes more", file=sys.stderr)
    if options.cluster:
        machine = load_machine(options.cluster)
        found = simulate_run(options, config, machine) if options.simulate else find_layout(options, config, machine)
    else:
        found = trace_ranks(config, options.ranks)
    write_or_print(options.json, {**provenance(words), **found})
    return 0


def trace_ranks(config: Config, ranks: int) -> dict[str, Any]:
    """Print what a rank of each pipeline position computes, sends and allocates in a step."""
    from megahp.plan.trace import trace_step  # imported late, with torch: only for valid settings
    from megahp.plan.work import at_each_length

    layout = fit(config.parallel, ranks)
    check_batch(config, layout, config.batch.global_batch)
    named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, layout.shape, strict=True) if size > 1)
    print(f"{ranks} ranks: {named or 'one rank'}")
    found: list[dict[str, Any]] = []
    lengths = at_each_length(config)
    for stage in range(layout.pp):
        rank = stage * (ranks // layout.pp)
        steps = [trace_step(begun, ranks, rank) for begun in lengths]
        step = steps[0]
        if layout.pp > 1:
            print(f"pipeline rank {stage}")
        for begun, work in zip(lengths, steps, strict=True):
            when = f" in sequences of {begun.data.sequence_length:,} tokens" if len(steps) > 1 else ""
            parts = ", ".join(f"{kind} {work.peak[kind] / 2**30:.2f}" for kind in KINDS if work.peak[kind])
            print(f"  peak memory     {work.bytes / 2**30:.2f} GiB{when}: {parts}")
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
        kernels = [{**vars(each), "count": n} for each, n in step.kernels.items()]
        collectives = [{**vars(each), "count": n} for each, n in step.collectives.items()]
        fullest = max(steps, key=lambda work: work.bytes)
        memory = {"peak": dict(fullest.peak), "resident": step.resident}
        found.append({"rank": rank, **memory, "kernels": kernels, "collectives": collectives})
    return {"ranks": found}


def refuse_ignored(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not belong together, so that none is silently without effect."""
    on_cluster, published = options.gpus is not None, options.validate or options.predict is not None
    ways = (options.ranks is not None, on_cluster, options.validate, options.predict is not None)
    if (options.cluster is None) == on_cluster or sum(ways) != 1 or (options.run_file is None) != published:
        raise UserError(
            "megahp plan needs a run file and either --ranks N or --cluster NAME --gpus N; or --validate alone, or "
            "--predict ROWS.csv alone"
        )
    for name in ("ranks", "gpus"):
        if (count := getattr(options, name)) is not None and count < 1:
            raise UserError(f"--{name} {count} must be at least 1")
    if options.plot and not options.validate:
        raise UserError(f"--plot {options.plot} is of --validate; add it, or omit --plot")
    if options.json and "=" in options.json.name:
        raise UserError(f"--json {options.json} looks like a setting; put settings before --json, or name a file")
    if (options.set or options.simulate) and (not on_cluster or options.set == options.simulate):
        raise UserError("--set and --simulate each need --cluster NAME --gpus N, and exclude the other")
    for name in ("grow", *(name for name, _, _ in CONDITIONS), "start"):
        if (value := getattr(options, name)) is not None and not options.simulate:
            raise UserError(f"--{name} {value} is of a simulated run; add --simulate")
        if name != "start" and value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g} must be above 0, and finite")
    if options.set:
        from megahp.plan.search import WRITTEN

        keys = (key_of(word).removeprefix("--") for word in options.overrides)
        others = [key for key in keys if key not in (*WRITTEN, "model.vocab_size")]
        if others:
            raise UserError(f"--set writes a layout for the run file's own settings; set {others[0]} in the file first")


def find_layout(options: argparse.Namespace, config: Config, machine: Machine) -> dict[str, Any]:
    """Print the best layouts on --gpus, and write the first into the run file with --set."""
    from megahp.plan import search, text  # imported late: torch comes with the trace

    fixed = {key_of(word).removeprefix("--") for word in options.overrides}
    found = search.confirm(search.search(config, options.gpus, machine, fixed), options.gpus, machine)
    best = found.fitting[0]
    if options.json != STDOUT:
        print(text.layouts(found, options.gpus, machine))
        print(f"\n{text.sections(best)}")
    if options.set:
        values = {
            key: get_setting(best.config, key) if key in fixed else best.settings.get(key) for key in search.WRITTEN
        }
        replace_text(options.run_file, edited(read_text(options.run_file, "run file"), values))
        if options.json != STDOUT:
            print(f"\nwritten into {options.run_file}")
    return {
        "layouts": [
            {**vars(each.estimate), "memory": each.estimate.bytes, "settings": each.settings, "traced": each.traced}
            for each in found.fitting
        ]
    }


def simulate_run(options: argparse.Namespace, config: Config, machine: Machine) -> dict[str, Any]:
    """Print what becomes of the whole run on --gpus, growing to --grow."""
    from megahp.plan import text
    from megahp.plan.guard import check_fits
    from megahp.plan.simulate import Conditions, simulate

    given = {"mtbf": options.mtbf, "restart": options.restart, "storage": options.storage}
    units = {"mtbf": 3600.0, "restart": 60.0, "storage": 1e9}
    conditions = Conditions(**{name: value * units[name] for name, value in given.items() if value})
    found = simulate(config, options.gpus, options.grow or options.gpus, machine, conditions)
    check_batch(config, fit(config.parallel, options.gpus), config.batch.global_batch)
    check_fits(config, options.gpus, machine)
    if options.json != STDOUT:
        begin = options.start or datetime.date.today()
        print(text.forecast(found, config.data.sequence_length, begin, options.price, config.checkpoint.every))
    return {
        "seconds": float(found.elapsed.mean()),
        "seconds_of_nine_in_ten": found.late,
        "shares": found.shares,
        "gpu_hours": found.gpu_seconds / 3600,
        "node_hours": found.node_seconds / 3600,
        "failures": sum(float(part.failures.mean()) for part in found.parts),
    }


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
