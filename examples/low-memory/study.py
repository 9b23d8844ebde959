"""What do optimizers with few moments lose to AdamW and Muon, at equal steps and at equal memory?

    python examples/low-memory/study.py [--jobs 2] [--seeds 1 2 3]

AdamW, Muon, and AdamW with moments of rank width / 4 in a subspace of cosines (`dct`) or of the gradient's singular
vectors (`galore`), without and with the gradient's remainder. At equal steps all train one model, each at the best of
three rates by its first seed. At equal memory each trains the model whose weights, gradients and optimizer state are as
many bytes as AdamW's at width 64, at the rate found there, which muP carries over widths. Bytes are counted in the
checkpoint: weights twice, for their gradients, and all that the optimizer has saved.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Line, Run, Study, code, half_interval, main, mean_and_interval, prepare, print_table

MILLIONS, WIDTH = 0.3, 64
REMAINDER = ", remainder"
# the rates tried, the best of them last
RATES = {
    "adamw": ("0.004", "0.016", "0.008"),
    "muon": ("0.016", "0.064", "0.032"),
    "dct": ("0.008", "0.032", "0.016"),
    "galore": ("0.008", "0.032", "0.016"),
    f"dct{REMAINDER}": ("0.016", "0.064", "0.032"),
    f"galore{REMAINDER}": ("0.008", "0.032", "0.016"),
}
# width and MLP's width that take as many bytes as AdamW's model
SIZES = {"muon": (72, 224), "dct": (80, 224), "galore": (80, 208)}
BYTES = {"torch.float32": 4, "torch.int64": 8}


def sizes_of(arm: str) -> tuple[int, int] | None:
    return SIZES.get(arm.removesuffix(REMAINDER))


def settings(arm: str, lr: str, seed: int, tokens: int, width: int = WIDTH) -> list[str]:
    name = arm.removesuffix(REMAINDER)
    words = [f"optimizer.name={name}", f"optimizer.lr={lr}", f"train.seed={seed}", f"train.tokens={tokens}"]
    if name == "muon":
        words.append(f"optimizer.muon_lr={2.5 * float(lr):g}")  # the ratio is ours
    if name in ("dct", "galore"):
        remainder = str(arm != name).lower()
        words += [f"optimizer.rank={width // 4}", "optimizer.refresh=50", f"optimizer.remainder={remainder}"]
    return words


def runs(study: Study, seeds: list[int]) -> list[Run]:
    tokens, found = study.tokens(MILLIONS), []
    for seed in seeds:
        for arm, rates in RATES.items():
            tried = rates if seed == seeds[0] else rates[-1:]
            found += [Run(f"{arm} {lr}/{seed}", settings(arm, lr, seed, tokens)) for lr in tried]
        for arm, rates in RATES.items():
            if sizes := sizes_of(arm):
                words = settings(arm, rates[-1], seed, tokens, sizes[0])
                wider = [f"model.width={sizes[0]}", f"model.mlp_width={sizes[1]}"]
                found.append(Run(f"{arm} {rates[-1]}, wider/{seed}", [*words, *wider]))
    return found


def measure(directory: Path) -> Line:
    """Return the bytes of weights, and of all that the optimizer keeps, in the run's checkpoint."""
    *_, newest = sorted(directory.glob("checkpoints/step-*"))
    found = {"weights": 0, "optimizer": 0}
    for name, tensor in json.loads((newest / "index.json").read_text())["tensors"].items():
        size = math.prod(tensor["shape"]) * BYTES[tensor["dtype"]]
        found["weights" if name.startswith("model.") else "optimizer"] += size
    return found


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print losses and bytes by optimizer, and the rates tried; draw loss over bytes."""
    from megahp.report.figures import PALETTE, plot_in

    def column(arm: str, key: str = "loss") -> list[float]:
        return [lines[f"{arm}/{seed}"][key] for seed in seeds]

    rows, base = [], column(f"adamw {RATES['adamw'][-1]}")
    with plot_in(study.figure, 5.5, 3.4) as figure:
        axes = figure.add_subplot()
        for number, (arm, rates) in enumerate(RATES.items()):
            kinds = {"steps": f"{arm} {rates[-1]}"} | ({"memory": f"{arm} {rates[-1]}, wider"} if sizes_of(arm) else {})
            for kind, runs_of in kinds.items():
                losses, line = column(runs_of), lines[f"{runs_of}/{seeds[0]}"]
                weights, state = line["weights"], line["optimizer"]
                total = (2 * weights + state) / 1e3
                difference = mean_and_interval([a - b for a, b in zip(losses, base, strict=True)])
                counts = [f"{weights / 4:,.0f}", f"{state / 1e3:,.0f}", f"{total:,.0f}"]
                rows.append([arm, kind, *counts, mean_and_interval(losses), "" if arm == "adamw" else difference])
                style = {
                    "fmt": "o" if kind == "steps" else "s",
                    "ms": 4,
                    "capsize": 2,
                    "color": PALETTE[f"run{number}"],
                }
                label = arm if kind == "steps" else None
                axes.errorbar([total], [np.mean(losses)], [half_interval(losses)], label=label, **style)
        axes.set(xlabel="weights, gradients and optimizer's state, kB", ylabel="held-out loss, nats per byte")
        axes.legend(frameon=False, fontsize=7)
    print_table(("optimizer", "at equal", "weights", "state, kB", "in all, kB", "loss", "to AdamW"), rows)
    tried = [
        [arm, *(f"{lr}: {lines[f'{arm} {lr}/{seeds[0]}']['loss']:.3f}" for lr in rates)] for arm, rates in RATES.items()
    ]
    print_table(("rates, first seed", "", "", "chosen"), tried)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
