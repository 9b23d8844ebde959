"""MediSwift's pretraining with static sparsity and dense finetuning, beside dense pretraining at equal FLOPs.

    python examples/sparse-to-dense/study.py [--jobs 2] [--seeds 1 2 3]

A model is pretrained on code, dense or with half or three quarters of its hidden weights masked at random (arXiv
2403.00952), then finetuned densely on text: zeros become trainable. Dense rivals are pretrained on as many tokens, and
on as many FLOPs as each sparse model would take on hardware that skips zeros; all are finetuned alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Line, Run, Study, code, english, half_interval, main, mean_and_interval, prepare, print_table

PRETRAIN, FINETUNE = 0.6, 0.15  # millions of tokens
FINETUNE_RATE = 0.004
DENSITIES = 0.5, 0.25
LENGTH = 128


def cost_of(density: float) -> float:
    """Return the FLOPs of a token's training step as a share of the dense model's, if masked weights cost nothing."""
    from megahp.config import resolve
    from megahp.scaling.flops import training_flops

    model = resolve.load(Path(__file__).parent / "run.toml", ["model.vocab_size=257"]).config.model
    masked = model.layers * model.width * (4 * model.width + 3 * model.mlp_width) * (1 - density)
    return 1 - 6 * masked / training_flops(model, LENGTH)


def runs(study: Study, seeds: list[int]) -> list[Run]:
    pretrained = {"dense": ["sparsity.method=none"]}
    for density in DENSITIES:
        pretrained[f"sparse, density {density:g}"] = [f"sparsity.density={density}"]
    found = []
    for seed in seeds:
        for arm, words in pretrained.items():
            found += pair(study, arm, PRETRAIN, words, seed)
        for density in DENSITIES:
            arm = f"dense, FLOPs of density {density:g}"
            found += pair(study, arm, PRETRAIN * cost_of(density), ["sparsity.method=none"], seed)
    return found


def pair(study: Study, arm: str, millions: float, words: list[str], seed: int) -> list[Run]:
    """Return a pretraining run and the finetuning run that starts from it."""
    first, more = study.tokens(millions), study.tokens(FINETUNE)
    finetune = [
        *('data.train=["data/studies/english"]', "sparsity.method=none", f"optimizer.lr={FINETUNE_RATE}"),
        *(f"schedule.start={first}", f"train.tokens={first + more}", f"train.seed={seed}"),
    ]
    before = Run(f"{arm}/{seed}", [*words, f"train.tokens={first}", f"train.seed={seed}"])
    return [before, Run(f"{arm}, finetuned/{seed}", finetune, before.name)]


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print FLOPs of pretraining, the loss on code before and on text after finetuning, and differences to the dense
    model of equal FLOPs; draw the latter."""
    from megahp.report.figures import PALETTE, plot_in

    def losses(arm: str, kind: str) -> list[float]:
        return [lines[f"{arm}/{seed}"]["losses"][kind] for seed in seeds]

    arms, rows = [("dense", 1.0, "dense")], []
    for density in DENSITIES:
        rival = f"dense, FLOPs of density {density:g}"
        arms += [(f"sparse, density {density:g}", cost_of(density), rival), (rival, cost_of(density), rival)]
    with plot_in(study.figure, 5, 3.2) as figure:
        axes = figure.add_subplot()
        for arm, cost, rival in arms:
            before, text = losses(arm, "code"), losses(f"{arm}, finetuned", "text")
            others = [a - b for a, b in zip(text, losses(f"{rival}, finetuned", "text"), strict=True)]
            difference = "" if arm == rival else mean_and_interval(others)
            rows.append([arm, f"{cost:.0%}", mean_and_interval(before), mean_and_interval(text), difference])
            hue, mark = ("run1", "o") if arm.startswith("dense") else ("accent", "s")
            mean, style = sum(text) / len(text), {"fmt": mark, "color": PALETTE[hue], "capsize": 2}
            axes.errorbar([cost], [mean], [half_interval(text)], **style)
            axes.annotate(arm, (cost, mean), (5, 5), textcoords="offset points", fontsize=6)
        axes.set(xlabel="FLOPs of pretraining, share of the dense model's", ylabel="loss on text after finetuning")
    print_table(("pretrained", "FLOPs", "code, before", "text, finetuned", "to dense of equal FLOPs"), rows)


def prepare_data() -> None:
    prepare("english", english)
    prepare("code", code)


if __name__ == "__main__":
    main(__file__, __doc__, prepare_data, runs, show)
