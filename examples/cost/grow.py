"""Measure how the time and memory of a step grow with the model, the batch and the ranks: docs/benchmarks/training.md.

    python examples/cost/grow.py [--rounds 3] [--plot docs/figures/cost-growth.svg]     on an idle machine, 20 minutes

Each point is a process of `megahp benchmark training` on one thread a rank; rounds go through all points in turn, and a
point is the least of its rounds' medians, which other load on the machine changes least. A finished run is a line in
runs/cost-growth.jsonl and is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megahp.report.figures import PALETTE, plot_in

LINES = Path("runs/cost-growth.jsonl")
BASE = {"layers": 4, "width": 256, "sequences": 4, "tokens": 256, "ranks": 1}  # sequences: of a rank
AXES = {
    "width": (64, 128, 192, 256, 384, 512, 768),
    "layers": (1, 2, 4, 8, 16),
    "sequences": (1, 2, 4, 8, 16, 32),
    "tokens": (64, 128, 256, 512, 1024, 2048),
    "ranks": (1, 2, 4),
}
TITLES = {
    "width": "width",
    "layers": "layers",
    "sequences": "sequences a step",
    "tokens": "tokens a sequence",
    "ranks": "ranks, each its own 4 sequences",
}


def points() -> list[dict[str, int]]:
    """Return every point once: the base, and one axis changed at a time."""
    found = [{**BASE, axis: value} for axis, values in AXES.items() for value in values]
    return [point for k, point in enumerate(found) if point not in found[:k]]


def measure(point: dict[str, int]) -> dict[str, Any]:
    """Return seconds of a step, peak bytes of rank 0's process and the model's FLOPs of a step."""
    file = LINES.with_suffix(".point.json")
    command = [sys.executable, "-m", "megahp", "benchmark", "training", "--contestants", "megahp", "--json", str(file)]
    command += ["--shape", f"{point['layers']}x{point['width']}", "--micro-batch", str(point["sequences"])]
    command += ["--sequence", str(point["tokens"]), "--ranks", str(point["ranks"]), "--dtype", "float32"]
    command += ["--turns", "5", "--steps", "1", "--settings", "compute.keep_heap=false"]  # else the heap's memory
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (row,) = json.loads(file.read_text())["rows"]
    flops = row["model_flops_per_token"] * row["tokens_per_step"]
    return {"point": point, "seconds": row["seconds"], "bytes": row["peak_memory"], "flops": flops}


def draw(lines: list[dict[str, Any]], file: str) -> None:
    """Draw time (above) and memory (below) along each axis, and print the figures."""

    def least(point: dict[str, int], key: str) -> float:
        return min(line[key] for line in lines if line["point"] == point)

    rate = least(BASE, "flops") / least(BASE, "seconds")
    with plot_in(Path(file), 3 * len(AXES), 5.2) as figure:
        panels = figure.subplots(2, len(AXES))
        for column, (axis, values) in enumerate(AXES.items()):
            along = [{**BASE, axis: value} for value in values]
            seconds, sizes = ([least(point, key) for point in along] for key in ("seconds", "bytes"))
            by_flops = [least(point, "flops") / rate for point in along]
            time, memory = panels[0, column], panels[1, column]
            time.plot(values, by_flops, "--", lw=1, color=PALETTE["ink"], label="the base's FLOP/s")
            time.plot(values, seconds, "o-", ms=4, lw=1, color=PALETTE["accent"], label="measured")
            time.set(xscale="log", yscale="log", title=TITLES[axis])
            memory.plot(values, [size / 2**20 for size in sizes], "o-", ms=4, lw=1, color=PALETTE["run1"])
            memory.set(xscale="log", ylim=0)
            for axes in (time, memory):
                axes.set_xticks(values, [str(value) for value in values], minor=False)
                axes.minorticks_off()
            for row in zip(values, seconds, by_flops, sizes, strict=True):
                print(
                    f"{axis:<10}{row[0]:>6}{row[1]:>9.3f} s{row[1] / row[2]:>7.2f} of FLOPs{row[3] / 2**20:>8.0f} MiB"
                )
        panels[0, 0].set_ylabel("seconds a step")
        panels[1, 0].set_ylabel("peak MiB of rank 0")
        panels[0, 0].legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", default="docs/figures/cost-growth.svg", metavar="FILE")
    options = parser.parse_args()
    LINES.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    todo = points() * options.rounds
    for line in lines:
        if line["point"] in todo:
            todo.remove(line["point"])
    for left, point in zip(range(len(todo) - 1, -1, -1), todo, strict=True):
        lines.append(measure(point))
        with LINES.open("a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
        print(f"{point}: {lines[-1]['seconds']:.3f} s, {left} left", flush=True)
    draw(lines, options.plot)


if __name__ == "__main__":
    main()
