"""Measure the gradient noise scale of every kind of layer at a run's checkpoints, exactly, and the ratio of the total's
to the norm layers' as training smoothed it, which batch.noise_to_total stands for.

    megahp measure noise-scale runs/first [--batches 16] [--batch N] [--micro-batch N] [--without-embeddings]
        [--json FILE] [--plot FILE]

At every checkpoint of the run, or at the named one, the batches that the run takes next go forward and backward,
without an update, in float32 (float64 for a run in it), and the squared norm of every example's gradient is measured in
every weight (Gray et al., arXiv 2411.00999); runs with experts are refused. It takes one process, whatever the layout
was; start it where the run was started, since its data may have a relative path.

You see a table per checkpoint, then a comparison. A noise scale is S / |G|^2 in sequences, both averaged over the
batches; more or larger batches make it more accurate. Slope: of the total's noise scale on a kind's, over checkpoints,
through the origin. r: their correlation, over checkpoints, and over batches that of S, each over its checkpoint's mean.
Intervals hold 95 % of a bootstrap over checkpoints and their batches; - where |G|^2 may not be positive. The
data-parallel estimate, from microbatches instead of examples, is a check. Exit code 2: invalid input.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp import checkpoint
from megahp.commands.arguments import add_outputs
from megahp.commands.output import write_json
from megahp.config import AUTO, ComputeConfig, Config, ParallelConfig, with_values
from megahp.data.loader import Batch, Loader, TrainingData
from megahp.diagnose.example_norms import Squares, measure
from megahp.diagnose.statistics import correlation, interval, resampled, slope
from megahp.errors import UserError
from megahp.log.progress import human_count, human_duration
from megahp.model.build import build_model
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state
from megahp.scaling.batch import largest_micro_batch
from megahp.scaling.noise_scale import estimate
from megahp.train.prepare import open_data, with_sample_order

HEADER = f"{'layers':<13}{'mean |g_b|^2':>13}{'|G_B|^2':>11}{'|G|^2':>11}{'S':>11}{'noise scale':>13}  95 %"
SMOOTHED = "norms, in training"
LINE = "{name:<13}{sq_example:>13.4g}{sq_batch:>11.4g}{true_sq:>11.4g}{noise:>11.4g}{noise_scale:>13}  {interval}"
SUMMARY_HEADER = f"{'layers':<19}{'slope':>8}  {'95 %':<17}{'r':>6}  {'95 %':<17}r over batches"
SUMMARY_LINE = "{name:<19}{slope:>8}  {slope_interval:<17}{r:>6}  {r_interval:<17}{r_batches}"

Sums = Mapping[str, np.ndarray]  # example, micro and batch -> [batches, kinds]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run directory, for all its checkpoints, or one of them")
    add("--batches", type=int, default=16, metavar="K", help="at each checkpoint (default 16)")
    add("--batch", type=int, metavar="N", help="sequences (default: as many as at the checkpoint)")
    add("--micro-batch", type=int, metavar="N", help="sequences at once (default: the run's)")
    add("--without-embeddings", action="store_true", help="total without embedding and unembedding, as the paper's")
    add_outputs(parser, "the noise scales")


@dataclass(frozen=True)
class Measurement:
    """A checkpoint, and the batches to measure there."""

    path: Path
    tokens: int  # trained
    samples: int  # trained
    smoothed: tuple[float, float]  # |G|^2 and S of the norm layers, as training smoothed them; 0 where it did not
    data_order: Mapping[str, Any]
    length: int  # tokens of a sequence
    batch: int  # sequences
    micro_batch: int

    def microbatches(self, loader: Loader, batch: int) -> Iterator[Batch]:
        """Yield a batch's microbatches, of the samples that the run takes next; batch: its index."""
        first = self.samples + batch * self.batch
        for start in range(first, first + self.batch, self.micro_batch):
            yield loader.take(np.arange(start, start + self.micro_batch))


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    if arguments.batches < 2:
        raise UserError(f"--batches {arguments.batches} must be at least 2, for an interval")
    paths = checkpoint.complete(arguments.run / "checkpoints") or [checkpoint.find(arguments.run)]
    config = with_sample_order(measurable(paths[-1]), checkpoint.read_state(paths[-1]))
    data = open_data(config)
    measurements = [plan_measurement(path, config, data, arguments) for path in paths]
    mesh = single_rank_mesh(config)
    (model,) = build_model(config, mesh).stages.values()
    loader = Loader(data, mesh.device, config.data.mask_documents)
    squares, began = [], time.monotonic()
    for number, at in enumerate(measurements, start=1):
        checkpoint.load(at.path, model_state(model))
        data.load_state(at.data_order)
        squares.append([measure(model, at.microbatches(loader, batch)) for batch in range(arguments.batches)])
        eta = human_duration((time.monotonic() - began) / number * (len(measurements) - number))
        print(f"{at.path.name} measured; {number} of {len(measurements)}, ETA {eta}", flush=True)
    loader.close()
    kinds = kinds_of(squares[0][0].example, arguments.without_embeddings)
    totals = [sum_kinds(batches, kinds) for batches in squares]
    pairs = zip(measurements, totals, strict=True)
    estimates = [np.stack(estimate(sums["example"], sums["batch"], at.batch), -1) for at, sums in pairs]
    exact = np.stack(estimates)  # of every batch, |G|^2 and S: [checkpoints, batches, kinds, 2]
    rows = [checkpoint_row(*at, list(kinds)) for at in zip(measurements, totals, exact, strict=True)]
    summary = compare(np.array([at.smoothed for at in measurements]), exact, list(kinds))
    show(rows, summary, config.batch.noise_to_total)
    results = {
        "checkpoints": [
            {**row, "batches": [vars(batch) for batch in batches]} for row, batches in zip(rows, squares, strict=True)
        ],
        "comparison": summary,
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    write_json(arguments.json, results)
    if arguments.plot:
        plot(arguments.plot, rows, summary)
    return 0


def measurable(path: Path) -> Config:
    """Return a checkpoint's config, for one process without an optimizer step. Raises UserError."""
    config = checkpoint.settings_of(path)
    if config.model.experts:
        setting = f"model.experts = {config.model.experts} at {path}"
        raise UserError(f"{setting}: gradients per example of experts cannot be measured; name a run without experts")
    if config.sparsity.method != "none":
        setting = f"sparsity.method = {config.sparsity.method!r} at {path}"
        raise UserError(f"{setting}: gradients of masked weights would count; name a dense run")
    dtype = "float64" if config.train.dtype == "float64" else "float32"
    own = {"train.weights": "all", "train.noise_scale": True, "train.device": "auto", "train.dtype": dtype}
    return with_values(replace(config, parallel=ParallelConfig(), compute=ComputeConfig()), own)


def plan_measurement(path: Path, config: Config, data: TrainingData, arguments: argparse.Namespace) -> Measurement:
    """Return what to measure at a checkpoint. Raises UserError."""
    state = checkpoint.read_state(path)
    data.recognize(state.get("sources", ()))
    if state["data"] != data.fingerprint:
        raise UserError(f"the data of {', '.join(config.data.train)} is not what {path} was trained on; restore it")
    length = state["data_order"]["length"]
    batch, micro = arguments.batch, arguments.micro_batch
    if batch is None:
        batch = state["batch_plan"]["batch"] * config.data.sequence_length // length
    if micro is None:
        micro = largest_micro_batch(config, length)
        if config.batch.micro_batch == AUTO:  # a part of the batch, where microbatches need not be equal
            micro = math.gcd(batch, micro)
    if micro < 1 or batch < 2 or batch % micro:
        bounds = f"at least 2, and whole microbatches of {micro}"
        raise UserError(f"--batch {batch} at {path} must be {bounds}; change it, or --micro-batch")
    progress, pooled = state["progress"], state["noise_scale"]["pooled"]
    smoothed = pooled["true_sq"], pooled["noise"]
    order = state["data_order"]
    return Measurement(path, progress["tokens"], progress["samples"], smoothed, order, length, batch, micro)


def kinds_of(layers: Iterable[str], without_embeddings: bool) -> dict[str, list[str]]:
    """Return the layers of each kind, and all of them as the total. Norms are one kind, as in training."""
    layers = [layer for layer in layers if not (without_embeddings and layer in ("embedding", "unembedding"))]
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kind = "norms" if layer.endswith("norm") else layer.split(".")[2 if layer.startswith("blocks.") else 0]
        kinds.setdefault(kind, []).append(layer)
    return {**kinds, "total": layers}


def sum_kinds(squares: Sequence[Squares], kinds: Mapping[str, Sequence[str]]) -> Sums:
    """Return each batch's squares, summed over the layers of a kind."""

    def summed(values: Mapping[str, float]) -> list[float]:
        return [sum(values[layer] for layer in layers) for layers in kinds.values()]

    keys = ("example", "micro", "batch")
    return {key: np.array([summed(getattr(batch, key)) for batch in squares]) for key in keys}


def noise_scales(estimates: np.ndarray) -> np.ndarray:
    """Return S / |G|^2 of [..., 2]; NaN where it is not positive."""
    true_sq, noise = np.moveaxis(estimates, -1, 0)
    return np.divide(noise, true_sq, out=np.full(true_sq.shape, np.nan), where=(true_sq > 0) & (noise > 0))


def checkpoint_row(at: Measurement, totals: Sums, exact: np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the results at one checkpoint; exact: its estimates [batches, kinds, 2].

    data_parallel: the total as microbatches, or ranks of one each, estimate it; None where there is only one. apart:
    its difference to the exact S, in standard errors of the mean difference over batches (that of |G|^2 is -1/B times
    it).
    """
    drawn = noise_scales(resampled(exact[None])[:, 0])
    rows = {
        name: {
            "sq_example": totals["example"].mean(0)[k],
            "sq_batch": totals["batch"].mean(0)[k],
            "true_sq": exact[:, k, 0].mean(),
            "noise": exact[:, k, 1].mean(),
            "noise_scale": float(noise_scales(exact[:, k].mean(0))),
            "interval": interval(drawn[:, k]),
        }
        for k, name in enumerate(kinds)
    }
    data_parallel = None
    if at.batch != at.micro_batch:
        micro, batch = totals["micro"][:, -1], totals["batch"][:, -1]
        estimates = np.stack(estimate(micro, batch, at.batch, at.micro_batch), -1)
        differences = estimates[:, 1] - exact[:, -1, 1]
        error = differences.std(ddof=1) / math.sqrt(len(differences))
        data_parallel = {
            "noise": estimates[:, 1].mean(),
            "noise_scale": float(noise_scales(estimates.mean(0))),
            "apart": differences.mean() / error if error > 0 else 0.0,
        }
    return {
        "checkpoint": str(at.path),
        "tokens": at.tokens,
        "sequence_length": at.length,
        "batch": at.batch,
        "micro_batch": at.micro_batch,
        "smoothed": float(noise_scales(np.array(at.smoothed))),
        "kinds": rows,
        "data_parallel": data_parallel,
    }


def compare(smoothed: np.ndarray, exact: np.ndarray, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare the total's noise scale with each kind's, and with what training smoothed, over checkpoints.

    smoothed: [checkpoints, 2]; exact: estimates [checkpoints, batches, kinds, 2], the total last.
    """
    in_training = np.broadcast_to(smoothed[:, None, None], (*exact.shape[:2], 1, 2))
    estimates = np.concatenate((in_training, exact), 2)
    scales, drawn = noise_scales(estimates.mean(1)), noise_scales(resampled(estimates))
    noise = (exact[..., 1] / exact[..., 1].mean(1, keepdims=True)).reshape(-1, len(kinds))
    comparison = {}
    for k, name in enumerate((SMOOTHED, *kinds[:-1])):
        comparison[name] = {
            "slope": float(slope(scales[:, k], scales[:, -1])),
            "slope_interval": interval(slope(drawn[..., k], drawn[..., -1])),
            "r": float(correlation(scales[:, k], scales[:, -1])),
            "r_interval": interval(correlation(drawn[..., k], drawn[..., -1])),
            "r_batches": float(correlation(noise[:, k - 1], noise[:, -1])) if k else math.nan,
        }
    return comparison


def show(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Mapping[str, Any]], noise_to_total: float) -> None:
    """Print a table per checkpoint, the comparison, and what it says of batch.noise_to_total."""
    for row in rows:
        batches = f"batches of {row['batch']} x {row['sequence_length']} tokens"
        print(f"\nafter {human_count(row['tokens'])} tokens: {batches}")
        print(HEADER)
        for name, kind in row["kinds"].items():
            print(LINE.format(name=name, **kind | formatted(kind, "noise_scale", "interval")))
        print(f"norms as training smoothed them: noise scale {format_number(row['smoothed'])}")
        if by_ranks := row["data_parallel"]:
            values = f"S {by_ranks['noise']:.4g}, noise scale {format_number(by_ranks['noise_scale'])}"
            apart = f"{by_ranks['apart']:+.1f} standard errors from the exact S"
            print(f"total from microbatches of {row['micro_batch']}: {values}; {apart}")
    print(f"\nthe total's noise scale over {len(rows)} checkpoint{'s' * (len(rows) > 1)}, by that of the layers alone")
    print(SUMMARY_HEADER)
    for name, comparison in summary.items():
        print(SUMMARY_LINE.format(name=name, **formatted(comparison, *comparison)))
    ratio = formatted(summary[SMOOTHED], "slope", "slope_interval")
    total = f"total = {ratio['slope']} (95 %: {ratio['slope_interval']}) x the norm layers' in training"
    print(f"{total}; the run has batch.noise_to_total = {noise_to_total:g}")


def formatted(values: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """Format these numbers and intervals for the tables."""
    return {key: " .. ".join(map(format_number, np.atleast_1d(values[key]))) for key in keys}


def format_number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def plot(file: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the noise scales along the run, and the total's against the norm layers'. Raises UserError."""
    from megahp.report.figures import PALETTE, logarithmic, plot_in

    kinds = list(rows[0]["kinds"])
    colours = [*(PALETTE[f"run{n}"] for n in range(len(kinds) - 1)), PALETTE["ink"]]
    with plot_in(file, 8, 3) as figure:
        along, against = figure.subplots(1, 2)
        for name, colour in zip(kinds, colours, strict=True):
            scales = [row["kinds"][name]["noise_scale"] for row in rows]
            along.plot([row["tokens"] for row in rows], scales, "o-", ms=3, color=colour, label=name)
        logarithmic(along, 10)
        along.set(xlabel="tokens", ylabel="noise scale, sequences")
        along.legend(frameon=False)
        norms, total = [row["smoothed"] for row in rows], [row["kinds"]["total"]["noise_scale"] for row in rows]
        against.plot(norms, total, "o", ms=4, color=PALETTE["ink"])
        ratio, ends = summary[SMOOTHED]["slope"], np.array([0, np.nanmax(norms)])
        against.plot(ends, ratio * ends, color=PALETTE["accent"], label=f"{format_number(ratio)} x")
        against.set(xlabel="norm layers' noise scale in training, sequences", ylabel="total's")
        against.legend(frameon=False)
