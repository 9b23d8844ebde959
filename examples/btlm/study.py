"""BTLM's lengths: train on short sequences, then on longer ones at equal tokens a step, and read beyond both.

    python examples/btlm/study.py [--jobs 2] [--seeds 1 2 3]

Three ways to spend the same tokens: all at 64 (BTLM: 2,048), three quarters at 64 and one at 256 (BTLM: 8,192), all at
256. Each is measured on held-out text of up to 1,024 tokens, by position, with ALiBi's slopes as trained and
interpolated.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Line, Run, Study, code, half_interval, main, mean_and_interval, prepare, print_table

MILLIONS = 0.8
LONGEST, WINDOWS = 1024, 64
EDGES = [0, 16, 32, 64, 128, 256, 512, 1024]


def runs(study: Study, seeds: list[int]) -> list[Run]:
    tokens = study.tokens(MILLIONS)
    settings = {
        "64": [],
        "64, then 256": [f'data.lengths=["{round(0.75 * tokens)}:256"]'],
        "256": ["data.sequence_length=256", "batch.global_batch=4", "batch.micro_batch=4"],
    }
    return [
        Run(f"{arm}/{seed}", [*words, f"train.tokens={tokens}", f"train.seed={seed}"])
        for seed in seeds
        for arm, words in settings.items()
    ]


def measure(directory: Path) -> Line:
    """Return the mean loss at the positions between EDGES of held-out windows that end at the edge: with slopes
    interpolated beyond the longest sequence trained on, as megahp does, and with slopes as they were trained."""
    import torch

    from megahp.data.indexed import IndexedDataset
    from megahp.evaluate.sample import load_trained

    trained, documents = load_trained(directory), IndexedDataset(str(prepare("code", code)[1]))
    lengths = documents.document_tokens(np.arange(documents.documents))
    # from within documents, so that a position says how much is before it, not how far into a document it is
    windows = [documents.tokens(n, LONGEST, 2 * LONGEST + 1) for n in np.flatnonzero(lengths > 2 * LONGEST)[:WINDOWS]]
    rows, found = torch.from_numpy(np.stack(windows).astype(np.int64)), {}
    for kind, longest in (("interpolated", trained.model.longest), ("as trained", LONGEST)):
        trained.model.longest, found[kind] = longest, []
        for first, last in itertools.pairwise(EDGES):
            with torch.no_grad():
                losses = [trained.model(part[:, :last], part[:, 1 : last + 1]) for part in rows.split(4)]
            found[kind].append(torch.cat(losses)[:, first:].double().mean().item())
    return found


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print a table in Markdown, and draw it."""
    from megahp.report.figures import PALETTE, plot_in

    arms, rows = list(dict.fromkeys(name.rpartition("/")[0] for name in lines)), []
    with plot_in(study.figure, 6, 3.6) as figure:
        axes, middles = figure.add_subplot(), [max(1, (a * b) ** 0.5) for a, b in itertools.pairwise(EDGES)]
        for number, arm in enumerate(arms):
            for kind, mark in (("interpolated", "o-"), ("as trained", "x:")):
                losses = np.array([lines[f"{arm}/{seed}"][kind] for seed in seeds])
                rows.append([arm, kind, *map(mean_and_interval, losses.T)])
                if kind == "as trained" and arm != arms[0]:
                    before = np.array([lines[f"{arms[number - 1]}/{seed}"][kind] for seed in seeds])
                    rows.append([f"{arm} less {arms[number - 1]}", kind, *map(mean_and_interval, (losses - before).T)])
                style = {"fmt": mark, "ms": 4, "capsize": 2, "color": PALETTE[f"run{number}"]}
                halves = [half_interval(column) for column in losses.T]
                axes.errorbar(middles, losses.mean(0), halves, label=f"{arm}, {kind}", **style)
        axes.set(xscale="log", xlabel="position, tokens", ylabel="loss, nats per byte")
        axes.legend(frameon=False, fontsize=7)
    print_table(("trained at", "slopes", *(f"{a} to {b}" for a, b in itertools.pairwise(EDGES))), rows)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
