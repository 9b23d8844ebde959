"""Say, before a run is queued, what each of its ranks will compute, send and allocate in a step.

    megahp plan run.toml --ranks 64 [section.key=value ...] [--json FILE]

The step is the product's own, on tensors without contents: one rank of each pipeline stage is built and stepped as on a
cluster, on this machine and within seconds. Peak memory is what PyTorch allocates, without the CUDA context, NCCL's
buffers and fragmentation; it is within 5 % for CPU ranks (tests/plan), and has not been compared with a GPU's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahp.commands.arguments import add_run_file
from megahp.commands.output import provenance, write_json
from megahp.config import resolve
from megahp.errors import UserError

KINDS = ("weights", "moments", "gradients", "gathered", "activations", "temporary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the run, as on the cluster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every kernel and collective here")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
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
    write_json(options.json, {**provenance(words), "ranks": found})
    return 0
