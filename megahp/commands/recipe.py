"""From a size, a budget or a loss to a run file, with every source."""

import bisect
import contextlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megahp.commands.arguments import human_number
from megahp.config import config_to_toml, get_setting, resolve
from megahp.config.presets import PRESETS
from megahp.data.tokenizer import load_tokenizer
from megahp.errors import UserError
from megahp.log.progress import human_count
from megahp.recipe import law_file, loss_laws, pareto
from megahp.recipe import rows as recipe_rows
from megahp.recipe import text as recipe_text
from megahp.recipe.recipe import PROXY, RULES, Base, Laws, Recipe, make_recipe
from megahp.recipe.sizing import TPP, Given

MARKED = (10, 20, 30, 50, 80, 130, 200, 320, 500, 1000)  # tokens per parameter in the Pareto plot
# Dense bfloat16 peaks, FLOP/s.
GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def add_arguments(parser: ArgumentParser) -> None:
    numbers = {
        "params": "parameters, embeddings included; 1e9, 1B and 300M are numbers here",
        "tokens": "tokens to train on",
        "tpp": "tokens per parameter",
        "flops": "compute, as 6 N D",
        "days": "compute, as days of the cluster",
        "target-loss": "loss to reach, nats per token",
        "peak-flops": "FLOP/s of one GPU",
        "mfu": "share of the peak that is reached (assumed: 0.4)",
        "density": "share of the weights left after pruning between 25 and 75 %% of compute: N_avg and its loss",
    }
    for name, meaning in numbers.items():
        parser.add_argument(f"--{name}", type=human_number, metavar="X", help=meaning)
    model = "of the model"
    whole = {
        "batch": "sequences of every batch",
        "width": model,
        "layers": model,
        "gpus": "of the cluster, or ranks on CPUs",
    }
    for name, meaning in whole.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU, for its peak")
    parser.add_argument("--preset", metavar="NAME", help="a known model")
    parser.add_argument("--base", type=Path, metavar="RUN.toml", help="your tuned run, to transfer from")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="prefixes of .bin/.idx pairs")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a sample")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--tokenizer", metavar="FILE", help="of the data; its vocabulary is the model's")
    words.add_argument("--vocab-size", type=int, metavar="N", help="number of token ids")
    parser.add_argument("--law", default="power-lines", help="whose rate and batch: a name, or a law file")
    parser.add_argument("--loss-law", metavar="LAW", help="a name, or a law file (default besiroglu)")
    parser.add_argument("--compare", action="store_true", help="what other rules would have chosen")
    parser.add_argument("--pareto", type=Path, metavar="FILE.png", help="plot time against compute at --target-loss")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, metavar="RUN.toml", help="write the run file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")


def run(options: Namespace, words: Sequence[str]) -> int:
    laws = laws_of(options.law, options.loss_law)
    if options.pareto and not options.target_loss:
        raise UserError(f"--pareto {options.pareto} is drawn at one loss; give --target-loss")
    if options.out and options.out.exists() and not options.overwrite:
        raise UserError(f"--out {options.out} exists; choose another name, or add --overwrite")
    found = make_recipe(given_of(options), base_of(options), laws, options.out.stem if options.out else "")
    rows, notes, choices = recipe_rows.rows(found), recipe_rows.notes(found), recipe_rows.choices(found)
    notes += [*advice_on(found), *advice_on_machine(found)]
    if options.out:
        try:
            options.out.write_text(config_to_toml(found.run, found.resolved.origins), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written ({error.strerror}); name another file") from None
        print(f"run file: {options.out}", file=sys.stderr)
    if options.pareto:
        draw_pareto(options.pareto, options.target_loss, laws)
    if options.json:
        tree = {"rows": rows, "notes": notes, "choices": choices, "run": found.run}
        print(json.dumps(tree, default=asdict, indent=2))
        return 0
    print(recipe_text.table(rows, notes))
    if options.compare:
        print(f"\n{recipe_text.comparison(choices)}")
    return 0


def advice_on(found: Recipe) -> list[str]:
    """What is likely a mistake beside the data, where that is there already."""
    run = found.run
    if not run.data.train or not all(Path(f"{prefix}.idx").exists() for prefix in run.data.train):
        return []
    from megahp.train.advice import advice
    from megahp.train.prepare import open_data

    try:
        data = open_data(run)
    except UserError as error:  # training would refuse it; the settings may yet change
        return [str(error)]
    return list(advice(run, data, found.given.gpus or 1, "cpu" if run.train.device == "cpu" else "cuda"))


def advice_on_machine(found: Recipe) -> list[str]:
    """What this machine, where the plan is for no cluster and it has no GPU, can hardly train; and what it can."""
    from megahp.parallel.device import cuda_wanted
    from megahp.parallel.layout import fit
    from megahp.train.advice import beyond_cpus

    def beyond(recipe: Recipe) -> str:
        return beyond_cpus(recipe.run, fit(recipe.run.parallel, recipe.ranks), recipe.ranks)

    def is_beyond(params: float) -> bool:
        with contextlib.suppress(UserError):  # no shape is so small, or no batch fits so few tokens
            return bool(beyond(make_recipe(Given(params=params, tpp=found.given.tpp), found.base, found.laws)))
        return False

    if found.given.gpus or cuda_wanted(found.run) or not (why := beyond(found)):
        return []
    sizes = [float(f"{digit}e{power}") for power in range(5, 10) for digit in (1, 2, 3, 5)]
    largest = sizes[max(0, bisect.bisect_left(sizes, True, key=is_beyond) - 1)]
    tokens = f"--tpp {found.given.tpp or TPP:g}"
    smaller = f"--params {human_count(largest)} {tokens} is about the largest that trains within a day"
    return [f"{why}; {smaller}, and for a cluster give --gpus"]


def draw_pareto(file: Path, target: float, laws: Laws) -> None:
    """One curve of time against compute, marked with tokens per parameter. Raises UserError."""
    from megahp.report.figures import PALETTE, plot_in

    found, hue = pareto.frontier(target, laws.loss, laws.critical_batch), PALETTE["run0"]
    ratio = found.tokens / found.parameters
    with plot_in(file, 7, 4.5) as figure:
        axes = figure.add_subplot()
        axes.loglog(found.compute, found.time, color=hue)
        for tpp in (tpp for tpp in MARKED if ratio.min() <= tpp <= ratio.max()):
            i = int(abs(ratio / tpp - 1).argmin())
            at = found.compute[i], found.time[i]
            words = f"{tpp} TPP, N {found.parameters[i]:.2g}\nB {found.batch[i]:.2g} tokens"
            axes.plot(*at, "o", color=hue, ms=4)
            axes.annotate(words, at, (-4, 8), textcoords="offset points", fontsize=7, rotation=45)
        axes.set(xlabel="compute, 6 N D (FLOPs)", ylabel="time on enough devices, N x steps")
        axes.margins(y=0.2)
        axes.set_title(f"loss {target:g}; {laws.loss.source}", wrap=True)


def given_of(options: Namespace) -> Given:
    """Raises UserError."""
    names = {f.name for f in fields(Given)}
    given = Given(**{name: value for name, value in vars(options).items() if name in names})
    if options.gpu:
        if options.gpu.upper() not in GPUS:
            raise UserError(f"--gpu {options.gpu} is unknown; there are {', '.join(GPUS)}, or give --peak-flops")
        if options.peak_flops:
            raise UserError("--gpu and --peak-flops are both a peak; leave one out")
        given = replace(given, peak_flops=GPUS[options.gpu.upper()])
    if options.preset:
        if options.preset not in PRESETS:
            raise UserError(f"--preset {options.preset} is unknown; there are {', '.join(PRESETS)}")
        if options.width or options.layers:
            raise UserError("--preset has a width and layers of its own; leave out --width and --layers")
        shape = resolve.resolve([("", {"model": {"preset": options.preset}})]).config.model
        given = replace(given, width=shape.width, layers=shape.layers)
    return given


def base_of(options: Namespace) -> Base:
    """The proxy or the user's run, with the preset and the settings that are given beside it. Raises UserError."""
    for name in ("vocab_size", "sequence_length"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} {number} must be above 0")
    base = PROXY
    if options.base:  # what it gives, a preset's values included, and of the defaults what is tuned or scaled
        found = resolve.load(options.base)
        tree: dict[str, dict[str, Any]] = {"model": {}}
        for key, origin in found.origins.items():
            if key != "model.preset" and (origin == options.base.name or origin.startswith("preset")):
                section, name = key.split(".")
                tree.setdefault(section, {})[name] = get_setting(found.config, key)
        tree["model"] |= {"width": found.config.model.width, "heads": found.config.model.heads}
        tree["optimizer"] = {"lr": found.config.optimizer.lr} | tree.get("optimizer", {})
        base = Base(options.base.name, tree, f"your run {options.base}", "yours", tokens=found.config.train.tokens)
    known = PRESETS[options.preset] if options.preset else base.tree["model"]
    words = options.vocab_size
    if options.tokenizer or not (words or known.get("vocab_size")):
        words = load_tokenizer(options.tokenizer or base.get("data", "tokenizer")).vocab_size
    data = {"train": options.data, "tokenizer": options.tokenizer, "sequence_length": options.sequence_length}
    overrides: dict[str, dict[str, Any]] = {
        "model": {} if words is None else {"vocab_size": words},
        "data": {key: value for key, value in data.items() if value is not None},
    }
    return replace(base, overrides=overrides, preset=options.preset or "")


def laws_of(law: str, loss_law: str | None) -> Laws:
    """Of the names, or law files, given. A law file has Power Lines' laws for those it lacks. Raises UserError."""
    if law in RULES:
        return Laws(loss_laws.named(loss_law or loss_laws.DEFAULT), rule=law)
    loss_laws.refuse_unknown("--law", law, RULES)
    own = law_file.read(Path(law))
    kinds = ("timescale", "optimal_batch", "critical_batch")
    fitted = {name: getattr(own, name) for name in kinds if getattr(own, name)}
    loss = own.loss if own.loss and not loss_law else loss_laws.named(loss_law or loss_laws.DEFAULT)
    return Laws(loss, **fitted)
