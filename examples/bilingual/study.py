"""Another language for a trained model: more tokens, their embeddings first, then a mix of both languages.

    python examples/bilingual/study.py [--jobs 2] [--seeds 1 2 3]

A model of Python in bytes learns English (arXiv 2407.12869, there English and Arabic): its vocabulary is extended by
768 tokens of English, embedding and unembedding are trained alone, then all weights on both languages. Ablated, at
equal tokens: no new tokens, how their rows begin, the embeddings' stage, and the first language's share of the mix.
Bits per byte on held-out text of both, before and after. Needs `tokenizers`.
"""

import json
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import DATA, Line, Run, Study, code, english, half_interval, main, mean_and_interval, prepare, print_table

BASE, EMBEDDINGS, MIXED = 0.7, 0.06, 0.24  # millions of tokens
RATE = 0.004
PIECES = 768
TOKENIZER = DATA / "bilingual-tokenizer.json"
FIRST = 0.25  # share of the first language in the mix
HELD_OUT_BYTES = 60_000  # of each language, to measure


def write_tokenizer() -> None:
    """Write a byte-level BPE of English whose first 257 ids are those of the tokenizer `bytes`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if TOKENIZER.exists():
        return
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + PIECES, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator((text for n, text in enumerate(english()) if n % 16 != 15), trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    # the letters that stand for bytes: printable ones for themselves, others for 256 and on, in order (GPT-2)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)} | {"<|endoftext|>": 256}
    vocab |= {"".join(pair): 257 + n for n, pair in enumerate(merges)}
    extended = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    extended.pre_tokenizer, extended.decoder = trained.pre_tokenizer, decoders.ByteLevel()
    extended.add_special_tokens(["<|endoftext|>"])
    extended.save(str(TOKENIZER))


def runs(study: Study, seeds: list[int]) -> list[Run]:
    base, embeddings, mixed = map(study.tokens, (BASE, EMBEDDINGS, MIXED))
    extended = [f"data.tokenizer={TOKENIZER}", f"optimizer.lr={RATE}"]
    found = []

    def data(share: float, suffix: str) -> list[str]:
        names = [f"{DATA}/english{suffix}", f"{DATA}/code{suffix}"]
        return [f"data.train={json.dumps(names)}", f"data.weights=[{1 - share}, {share}]"]

    for seed in seeds:
        own = f"train.seed={seed}"
        found.append(Run(f"base/{seed}", [f"train.tokens={base}", own]))
        longer = [f"schedule.start={base}", f"train.tokens={base + embeddings + mixed}", f"optimizer.lr={RATE}"]
        found.append(Run(f"no new tokens/{seed}", [*data(FIRST, ""), *longer, own], f"base/{seed}"))
        for rule in ("mean", "zeros"):
            stage = [*data(0.0, "-extended"), "train.weights=embeddings", f"train.tokens={embeddings}"]
            first = Run(
                f"embeddings, {rule}/{seed}", [*stage, *extended, own], f"base/{seed}", (str(TOKENIZER), "--rule", rule)
            )
            found.append(first)
            for share in (FIRST, 0.0, 0.5) if rule == "mean" else (FIRST,):
                whole = [f"schedule.start={embeddings}", f"train.tokens={embeddings + mixed}"]
                arm = f"{rule}, {share:.0%} of the first language/{seed}"
                found.append(Run(arm, [*data(share, "-extended"), *whole, *extended, own], first.name))
        direct = [*data(FIRST, "-extended"), f"train.tokens={embeddings + mixed}", *extended, own]
        found.append(
            Run(f"mean, no embeddings' stage/{seed}", direct, f"base/{seed}", (str(TOKENIZER), "--rule", "mean"))
        )
    return found


@cache
def held_out() -> list[list[str]]:
    """Return texts of both languages that no run has seen: the second, the first."""
    found = []
    for documents in (english, code):
        texts, size = list[str](), 0
        for text in documents()[15::16]:
            if size < HELD_OUT_BYTES:
                texts.append(text[: HELD_OUT_BYTES - size])
                size += len(texts[-1])
        found.append(texts)
    return found


def measure(directory: Path) -> Line:
    """Return bits per byte of both languages, and the tokens per byte that they are encoded to."""
    from megahp.evaluate.perplexity import evaluate
    from megahp.evaluate.sample import load_trained

    scores = evaluate(load_trained(directory), held_out(), 128, 64)
    bits = {name: score.numbers()["bits_per_byte"] for name, score in zip(("second", "first"), scores, strict=True)}
    return {"bits": bits, "tokens per byte": [score.tokens / score.bytes for score in scores]}


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print bits per byte of both languages, and what is lost of the first; draw one over the other."""
    from megahp.report.figures import PALETTE, plot_in

    rows = []
    with plot_in(study.figure, 5.5, 3.4) as figure:
        axes = figure.add_subplot()
        for arm in dict.fromkeys(name.rpartition("/")[0] for name in lines):
            mine = [lines[f"{arm}/{seed}"] for seed in seeds]
            second, first = ([line["bits"][kind] for line in mine] for kind in ("second", "first"))
            lost = [value - lines[f"base/{seed}"]["bits"]["first"] for value, seed in zip(first, seeds, strict=True)]
            rows.append([arm, *map(mean_and_interval, (second, first, lost)), f"{mine[0]['tokens per byte'][0]:.2f}"])
            if arm == "base" or arm.startswith("embeddings"):
                continue  # far off the others
            x, y = sum(first) / len(first), sum(second) / len(second)
            halves = {"xerr": [half_interval(first)], "yerr": [half_interval(second)]}
            axes.errorbar([x], [y], fmt="o", ms=4, capsize=2, color=PALETTE["run1"], **halves)
            axes.annotate(arm, (x, y), (4, 4), textcoords="offset points", fontsize=6)
        axes.set(xlabel="first language, bits per byte", ylabel="second language, bits per byte")
    print_table(("", "second language, bits per byte", "first", "forgotten", "tokens per byte of the second"), rows)


def prepare_data() -> None:
    corpora = {"english": english, "code": code}
    for name, documents in corpora.items():
        prepare(name, documents)
    write_tokenizer()
    for name, documents in corpora.items():
        prepare(f"{name}-extended", documents, str(TOKENIZER))


if __name__ == "__main__":
    main(__file__, __doc__, prepare_data, runs, show, measure)
