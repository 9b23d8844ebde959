"""The gradient noise scale of every kind of layer at a run's checkpoints, exactly, and the total's over the norm
layers' as training smoothed it, for which batch.noise_to_total stands.

    megahp measure noise-scale runs/first [--batches 16] [--batch N] [--micro-batch N] [--without-embeddings]
        [--json FILE] [--plot FILE]

At every checkpoint that is kept, or at the one that is named, the batches that the run takes next go forward and
backward, without an update, in float32 (float64 for a run in it), and the squared norm of every example's gradient is
measured in every weight (Gray et al., arXiv 2411.00999); but a run with experts is refused. It takes one process,
whatever the layout was; start it where the run was started, since its data may be named from there.

A noise scale is S / |G|^2 in sequences, both averaged over the batches; more of them, or larger ones, make it surer.
Slope: of the total's noise scale on a kind's, over checkpoints, through the origin. r: their correlation, over
checkpoints, and over batches that of S, each over its checkpoint's mean. Intervals hold 95 % of a bootstrap over
checkpoints and their batches; - where |G|^2 is too unsure to be positive. The data-parallel estimate, from microbatches
instead of examples, is a check. Exit code 2 means a mistake in what was given.
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
from megahp.config import ComputeConfig, Config, ParallelConfig, with_values
from megahp.data.loader import Batch, Loader, TrainingData
from megahp.diagnose.example_norms import Squares, measure
from megahp.diagnose.statistics import correlation, interval, resampled, slope
from megahp.errors import UserError
from megahp.log.progress import human_count, human_duration
from megahp.model.build import build_model
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state
from megahp.scaling.batch import micro_batch
from megahp.scaling.noise_scale import estimate
from megahp.train.prepare import open_data

HEADER = f"{'layers':<13}{'mean |g_b|^2':>13}{'|G_B|^2':>11}{'|G|^2':>11}{'S':>11}{'noise scale':>13}  95 %"
SMOOTHED = "norms, in training"
LINE = "{name:<13}{sq_example:>13.4g}{sq_batch:>11.4g}{true_sq:>11.4g}{noise:>11.4g}{noise_scale:>13}  {interval}"
SUMMARY_HEADER = f"{'layers':<19}{'slope':>8}  {'95 %':<17}{'r':>6}  {'95 %':<17}r over batches"
SUMMARY_LINE = "{name:<19}{slope:>8}  {slope_interval:<17}{r:>6}  {r_interval:<17}{r_batches}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, for all its checkpoints, or one of them")
    add("--batches", type=int, default=16, metavar="K", help="at each checkpoint (default 16)")
    add("--batch", type=int, metavar="N", help="sequences (default: as many as at the checkpoint)")
    add("--micro-batch", type=int, metavar="N", help="sequences at once (default: the run's)")
    add("--without-embeddings", action="store_true", help="total without embedding and unembedding, as the paper's")
    add_outputs(parser, "the noise scales")


@dataclass(frozen=True)
class Place:
    """A checkpoint, and the batches that are measured there."""

    path: Path
    tokens: int  # done
    samples: int  # done
    smoothed: tuple[float, float]  # |G|^2 and S of the norm layers, as training smoothed them; 0 where it did not
    data_order: Mapping[str, Any]
    length: int  # tokens of a sequence
    batch: int  # sequences
    micro_batch: int


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Check, measure at every checkpoint, compare."""
    if arguments.batches < 2:
        raise UserError(f"--batches {arguments.batches} must be at least 2, to know how sure the result is")
    paths = checkpoint.complete(arguments.run / "checkpoints") or [checkpoint.find(arguments.run)]
    config = settings_to_measure(paths[-1])
    data = open_data(config)
    places = [place(path, config, data, arguments) for path in paths]
    mesh = single_rank_mesh(config)
    (model,) = build_model(config, mesh).stages.values()
    loader = Loader(data, mesh.device, config.data.mask_documents)
    squares, began = [], time.monotonic()
    for number, each in enumerate(places, start=1):
        checkpoint.load(each.path, model_state(model))
        data.load_state(each.data_order)
        squares.append([measure(model, microbatches(loader, each, batch)) for batch in range(arguments.batches)])
        rest = human_duration((time.monotonic() - began) / number * (len(places) - number))
        print(f"{each.path.name} measured; {number} of {len(places)}, ETA {rest}", flush=True)
    loader.close()
    kinds = kinds_of(squares[0][0].example, arguments.without_embeddings)
    totals = [sums(each, kinds) for each in squares]
    pairs = zip(places, totals, strict=True)
    estimates = [np.stack(estimate(each["example"], each["batch"], at.batch), -1) for at, each in pairs]
    exact = np.stack(estimates)  # of every batch, |G|^2 and S: [checkpoints, batches, kinds, 2]
    rows = [checkpoint_row(*each, list(kinds)) for each in zip(places, totals, exact, strict=True)]
    summary = compare(np.array([each.smoothed for each in places]), exact, list(kinds))
    show(rows, summary, config.batch.noise_to_total)
    batches = [[vars(batch) for batch in each] for each in squares]
    found = {
        "checkpoints": [{**row, "batches": each} for row, each in zip(rows, batches, strict=True)],
        "comparison": summary,
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    write_json(arguments.json, found)
    if arguments.plot:
        plot(arguments.plot, rows, summary)
    return 0


def settings_to_measure(path: Path) -> Config:
    """Those of the run, for one process that measures. Raises UserError."""
    config = checkpoint.settings_of(path)
    if config.model.experts:
        there = f"model.experts = {config.model.experts} at {path}"
        raise UserError(f"{there}: an example's gradients of experts cannot be measured; name a run without experts")
    if config.sparsity.method != "none":
        there = f"sparsity.method = {config.sparsity.method!r} at {path}"
        raise UserError(f"{there}: gradients of masked weights would be counted; name a dense run")
    dtype = "float64" if config.train.dtype == "float64" else "float32"
    own = {"train.weights": "all", "train.noise_scale": True, "train.device": "auto", "train.dtype": dtype}
    return with_values(replace(config, parallel=ParallelConfig(), compute=ComputeConfig()), own)


def place(path: Path, config: Config, data: TrainingData, arguments: argparse.Namespace) -> Place:
    """What to measure at a checkpoint. Raises UserError."""
    state = checkpoint.read_state(path)
    if state["data"] != data.fingerprint:
        raise UserError(f"the data of {', '.join(config.data.train)} is not what {path} was trained on; restore it")
    length = state["data_order"]["length"]
    batch, micro = arguments.batch, arguments.micro_batch
    if batch is None:
        batch = state["batch_plan"]["batch"] * config.data.sequence_length // length
    if micro is None:
        micro = micro_batch(config, length)
    if micro < 1 or batch < 2 or batch % micro:
        wanted = f"at least 2, and whole microbatches of {micro}"
        raise UserError(f"--batch {batch} at {path} must be {wanted}; change it, or --micro-batch")
    progress, pooled = state["progress"], state["noise_scale"]["pooled"]
    smoothed = pooled["true_sq"], pooled["noise"]
    return Place(path, progress["tokens"], progress["samples"], smoothed, state["data_order"], length, batch, micro)


def microbatches(loader: Loader, place: Place, batch: int) -> Iterator[Batch]:
    """Those of one batch: of the samples that the run takes next, and on from there."""
    first = place.samples + batch * place.batch
    for start in range(first, first + place.batch, place.micro_batch):
        yield loader.take(np.arange(start, start + place.micro_batch))


def kinds_of(layers: Iterable[str], without_embeddings: bool) -> dict[str, list[str]]:
    """Kind -> its layers, and all of them as the total. Norms are together, as training has them."""
    layers = [each for each in layers if not (without_embeddings and each in ("embedding", "unembedding"))]
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kind = "norms" if layer.endswith("norm") else layer.split(".")[2 if layer.startswith("blocks.") else 0]
        kinds.setdefault(kind, []).append(layer)
    return {**kinds, "total": layers}


Sums = Mapping[str, np.ndarray]  # example, micro and batch -> [batches, kinds]


def sums(squares: Sequence[Squares], kinds: Mapping[str, Sequence[str]]) -> Sums:
    """The squares of each kind's layers together."""
    found = {}
    for key in ("example", "micro", "batch"):
        every = [getattr(each, key) for each in squares]
        found[key] = np.array([[sum(each[layer] for layer in layers) for layers in kinds.values()] for each in every])
    return found


def noise_scales(estimates: np.ndarray) -> np.ndarray:
    """S / |G|^2 of [..., 2]; NaN where that is not positive."""
    true_sq, noise = np.moveaxis(estimates, -1, 0)
    return np.divide(noise, true_sq, out=np.full(true_sq.shape, np.nan), where=(true_sq > 0) & (noise > 0))


def checkpoint_row(place: Place, totals: Sums, exact: np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    """What was found at one checkpoint; exact: its estimates [batches, kinds, 2].

    data_parallel: the total as microbatches, or ranks of one each, estimate it; None where there is but one. apart:
    from the exact S, in standard errors of the mean difference over batches (that of |G|^2 is -1/B times it).
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
    by_ranks = None
    if place.batch != place.micro_batch:
        of_total = totals["micro"][:, -1], totals["batch"][:, -1]
        estimates = np.stack(estimate(*of_total, place.batch, place.micro_batch), -1)
        differences = estimates[:, 1] - exact[:, -1, 1]
        error = differences.std(ddof=1) / math.sqrt(len(differences))
        by_ranks = {
            "noise": estimates[:, 1].mean(),
            "noise_scale": float(noise_scales(estimates.mean(0))),
            "apart": differences.mean() / error if error > 0 else 0.0,
        }
    return {
        "checkpoint": str(place.path),
        "tokens": place.tokens,
        "sequence_length": place.length,
        "batch": place.batch,
        "micro_batch": place.micro_batch,
        "smoothed": float(noise_scales(np.array(place.smoothed))),
        "kinds": rows,
        "data_parallel": by_ranks,
    }


def compare(smoothed: np.ndarray, exact: np.ndarray, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The total beside each kind, and beside what training smoothed, over checkpoints. smoothed: [checkpoints, 2];
    exact: estimates [checkpoints, batches, kinds, 2], the total last."""
    known = np.broadcast_to(smoothed[:, None, None], (*exact.shape[:2], 1, 2))
    estimates = np.concatenate((known, exact), 2)
    scales, drawn = noise_scales(estimates.mean(1)), noise_scales(resampled(estimates))
    noise = (exact[..., 1] / exact[..., 1].mean(1, keepdims=True)).reshape(-1, len(kinds))
    found = {}
    for k, name in enumerate((SMOOTHED, *kinds[:-1])):
        found[name] = {
            "slope": float(slope(scales[:, k], scales[:, -1])),
            "slope_interval": interval(slope(drawn[..., k], drawn[..., -1])),
            "r": float(correlation(scales[:, k], scales[:, -1])),
            "r_interval": interval(correlation(drawn[..., k], drawn[..., -1])),
            "r_batches": float(correlation(noise[:, k - 1], noise[:, -1])) if k else math.nan,
        }
    return found


def show(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Mapping[str, Any]], noise_to_total: float) -> None:
    """Print a table for every checkpoint, the comparison, and what it says of the setting."""
    for row in rows:
        batches = f"batches of {row['batch']} x {row['sequence_length']} tokens"
        print(f"\nafter {human_count(row['tokens'])} tokens: {batches}")
        print(HEADER)
        for name, each in row["kinds"].items():
            print(LINE.format(name=name, **each | written(each, "noise_scale", "interval")))
        print(f"norms as training smoothed them: noise scale {number(row['smoothed'])}")
        if by_ranks := row["data_parallel"]:
            found = f"S {by_ranks['noise']:.4g}, noise scale {number(by_ranks['noise_scale'])}"
            apart = f"{by_ranks['apart']:+.1f} standard errors from the exact S"
            print(f"total from microbatches of {row['micro_batch']}: {found}; {apart}")
    print(f"\nthe total's noise scale over {len(rows)} checkpoint{'s' * (len(rows) > 1)}, by that of the layers alone")
    print(SUMMARY_HEADER)
    for name, each in summary.items():
        print(SUMMARY_LINE.format(name=name, **written(each, *each)))
    factor = written(summary[SMOOTHED], *summary[SMOOTHED])
    total = f"total = {factor['slope']} (95 %: {factor['slope_interval']}) x the norm layers' in training"
    print(f"{total}; the run has batch.noise_to_total = {noise_to_total:g}")


def written(found: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """These numbers and intervals as the tables have them."""
    values = {key: found[key] for key in keys}
    return {key: " .. ".join(map(number, np.atleast_1d(value))) for key, value in values.items()}


def number(value: float) -> str:
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
        factor, ends = summary[SMOOTHED]["slope"], np.array([0, np.nanmax(norms)])
        against.plot(ends, factor * ends, color=PALETTE["accent"], label=f"{number(factor)} x")
        against.set(xlabel="norm layers' noise scale in training, sequences", ylabel="total's")
        against.legend(frameon=False)
