"""Write a run file from a size, a budget or a loss, with the source of every number."""

import bisect
import contextlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megahp.commands.arguments import parse_number
from megahp.commands.output import begins_with, check_replaceable
from megahp.config import Config, config_to_toml, get_setting, resolve, with_values
from megahp.config.presets import PRESETS
from megahp.data.tokenizer import load_tokenizer
from megahp.errors import UserError
from megahp.log.progress import human_count
from megahp.plan.machine import Machine, load_machine, machine_names
from megahp.plan.search import WRITTEN, search
from megahp.recipe import law_file, loss_laws, pareto
from megahp.recipe import rows as recipe_rows
from megahp.recipe import text as recipe_text
from megahp.recipe.recipe import PROXY, RULES, Base, Laws, Recipe, make_recipe
from megahp.recipe.sizing import TPP, Given

MARKED = (10, 20, 30, 50, 80, 130, 200, 320, 500, 1000)  # tokens per parameter labelled in the Pareto plot


def add_arguments(parser: ArgumentParser) -> None:
    numbers = {
        "params": "parameters, embeddings included, and of experts the active ones; such as 1e9, 1B or 300M",
        "tokens": "tokens to train on",
        "tpp": "tokens per parameter",
        "epochs": "tokens, as times that the data of --data, which is there already, is read",
        "flops": "compute, as 6 N D",
        "days": "compute, as days of the cluster",
        "target-loss": "loss to reach, nats per token",
        "peak-flops": "FLOP/s of one GPU",
        "mfu": "share of the peak that training reaches (default 0.4)",
        "density": "share of the weights left after pruning from 25 to 75 %% of the compute",
    }
    for name, meaning in numbers.items():
        parser.add_argument(f"--{name}", type=parse_number, metavar="X", help=meaning)
    whole = {
        "batch": "sequences of every batch, instead of a growing one",
        "width": "width of the model",
        "layers": "layers of the model",
        "gpus": "GPUs of the cluster, or ranks on CPUs",
    }
    for name, meaning in whole.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"with --gpus, for layout and speed: {', '.join(machine_names())}"
    )
    parser.add_argument("--preset", metavar="NAME", help="shape and kind of a known model")
    parser.add_argument("--base", type=Path, metavar="RUN.toml", help="your tuned run, to transfer from")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="training data: prefixes of .bin/.idx pairs")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a sample")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--tokenizer", metavar="FILE", help="tokenizer of the data; sets the vocabulary size")
    words.add_argument("--vocab-size", type=int, metavar="N", help="number of token ids")
    parser.add_argument(
        "--law", default="power-lines", help="rate and batch: a name, or a law file (default power-lines)"
    )
    parser.add_argument("--loss-law", metavar="LAW", help="loss law: a name or a law file (default besiroglu)")
    parser.add_argument("--compare", action="store_true", help="print what other rules choose")
    parser.add_argument("--pareto", type=Path, metavar="FILE.png", help="plot time against compute at --target-loss")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, metavar="RUN.toml", help="write the run file")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if it exists")


def run(options: Namespace, words: Sequence[str]) -> int:
    laws = load_laws(options.law, options.loss_law)
    if options.pareto and not options.target_loss:
        raise UserError(f"--pareto {options.pareto} plots runs of one loss; give --target-loss")
    if options.out:
        is_ours = begins_with(config_to_toml(Config()).partition(" = ")[0].encode())  # the first section and key
        check_replaceable("--out", {options.out: is_ours}, filter(None, [options.base]), options.overwrite)
    given, base, name = read_given(options), load_base(options), options.out.stem if options.out else ""
    if given.epochs:
        given = replace(given, tokens=given.epochs * tokens_of_epoch(base))
    recipe = make_recipe(given, base, laws, name)
    for _ in range(2 if options.gpu else 0):  # the layout rounds the batch, which may then allow a faster one
        recipe = make_recipe(*laid_out(recipe, machine_of(options.gpu)), laws, name)
    rows, notes, choices = recipe_rows.rows(recipe), recipe_rows.notes(recipe), recipe_rows.choices(recipe)
    notes += [*advice_on_data(recipe), *advice_on_machine(recipe)]
    if options.out:
        try:
            options.out.write_text(config_to_toml(recipe.run, recipe.resolved.origins), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written ({error.strerror}); name another file") from None
        print(f"run file: {options.out}", file=sys.stderr)
    if options.pareto:
        plot_pareto(options.pareto, options.target_loss, laws)
    if options.json:
        tree = {"rows": rows, "notes": notes, "choices": choices, "run": recipe.run}
        print(json.dumps(tree, default=asdict, indent=2))
        return 0
    print(recipe_text.table(rows, notes))
    if options.compare:
        print(f"\n{recipe_text.comparison(choices)}")
    return 0


def machine_of(gpu: str) -> Machine:
    """Return the machine of a GPU's name; of several sizes of memory, as A100's, the smallest. Raises UserError."""
    named = [name for name in machine_names() if f"{name}-".startswith(f"{gpu.lower()}-")]
    if not named:
        raise UserError(f"--gpu {gpu} is unknown; choose from {', '.join(machine_names())}, or give --peak-flops")
    return load_machine(named[0])


def laid_out(recipe: Recipe, machine: Machine) -> tuple[Given, Base]:
    """Return what a recipe was given, with the layout, micro batch and utilisation that a plan finds for its GPUs.

    With --days the utilisation stays: it decides the size of the model, and that its layout. Raises UserError where no
    layout fits."""
    gpus = recipe.given.gpus or 1
    best = search(recipe.run, gpus, machine).fitting[0]
    tree: dict[str, dict[str, Any]] = {}
    for key, value in best.settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    tuned = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in WRITTEN}
        for section, values in recipe.base.tree.items()
    }
    given_mfu = recipe.given.mfu if recipe.base.mfu is None else None
    mfu = None if given_mfu or recipe.given.days else best.estimate.mfu
    base = replace(recipe.base, tree=tuned, layout=tree, planned=str(best), mfu=mfu)
    return replace(recipe.given, mfu=mfu or given_mfu), base


def advice_on_data(recipe: Recipe) -> list[str]:
    """Return warnings about the run with its data, if that exists already: too many epochs, for example."""
    run = recipe.run
    if not run.data.train or not all(Path(f"{prefix}.idx").exists() for prefix in run.data.train):
        return []
    from megahp.train.advice import advice
    from megahp.train.prepare import open_data

    try:
        data = open_data(run)
    except UserError as error:  # training would refuse the data, but the run file may still be edited
        return [str(error)]
    return list(advice(run, data, recipe.given.gpus or 1, "cpu" if run.train.device == "cpu" else "cuda"))


def advice_on_machine(recipe: Recipe) -> list[str]:
    """Return a warning if this machine, without a GPU, cannot train the run in a day; it names a size that it can."""
    from megahp.parallel.device import uses_cuda
    from megahp.parallel.layout import fit
    from megahp.train.advice import beyond_cpus

    def beyond(recipe: Recipe) -> str:
        return beyond_cpus(recipe.run, fit(recipe.run.parallel, recipe.ranks), recipe.ranks)

    def is_beyond(params: float) -> bool:
        with contextlib.suppress(UserError):  # a size without a shape, or with fewer tokens than a batch
            return bool(beyond(make_recipe(Given(params=params, tpp=recipe.given.tpp), recipe.base, recipe.laws)))
        return False

    if recipe.given.gpus or uses_cuda(recipe.run) or not (problem := beyond(recipe)):
        return []
    sizes = [float(f"{digit}e{power}") for power in range(5, 10) for digit in (1, 2, 3, 5)]
    largest = sizes[max(0, bisect.bisect_left(sizes, True, key=is_beyond) - 1)]
    smaller = f"--params {human_count(largest)} --tpp {recipe.given.tpp or TPP:g}"
    return [f"{problem}; {smaller} is about the largest that trains within a day, and for a cluster give --gpus"]


def plot_pareto(file: Path, target: float, laws: Laws) -> None:
    """Plot time against compute at a loss, labelled with tokens per parameter. Raises UserError."""
    from megahp.report.figures import PALETTE, plot_in

    frontier, hue = pareto.frontier(target, laws.loss, laws.critical_batch), PALETTE["run0"]
    ratio = frontier.tokens / frontier.parameters
    with plot_in(file, 7, 4.5) as figure:
        axes = figure.add_subplot()
        axes.loglog(frontier.compute, frontier.time, color=hue)
        for tpp in (tpp for tpp in MARKED if ratio.min() <= tpp <= ratio.max()):
            i = int(abs(ratio / tpp - 1).argmin())
            point = frontier.compute[i], frontier.time[i]
            label = f"{tpp} TPP, N {frontier.parameters[i]:.2g}\nB {frontier.batch[i]:.2g} tokens"
            axes.plot(*point, "o", color=hue, ms=4)
            axes.annotate(label, point, (-4, 8), textcoords="offset points", fontsize=7, rotation=45)
        axes.set(xlabel="compute, 6 N D (FLOPs)", ylabel="time on enough devices, N x steps")
        axes.margins(y=0.2)
        axes.set_title(f"loss {target:g}; {laws.loss.source}", wrap=True)


def read_given(options: Namespace) -> Given:
    """Return the options that size a run, a preset's shape and a GPU's peak filled in. Raises UserError."""
    names = {f.name for f in fields(Given)}
    given = Given(**{name: value for name, value in vars(options).items() if name in names})
    if options.gpu:
        if options.peak_flops:
            raise UserError("--gpu and --peak-flops both set the peak; remove one")
        given = replace(given, peak_flops=machine_of(options.gpu).peak.bfloat16)
    if options.preset:
        if options.preset not in PRESETS:
            raise UserError(f"--preset {options.preset} is unknown; choose from {', '.join(PRESETS)}")
        if options.width or options.layers:
            raise UserError("--preset sets width and layers; remove --width and --layers")
        shape = resolve.resolve([("", {"model": {"preset": options.preset}})]).config.model
        given = replace(given, width=shape.width, layers=shape.layers)
    if given.epochs and given.tokens:
        raise UserError("--epochs and --tokens both set the tokens; remove one")
    return given


def tokens_of_epoch(base: Base) -> float:
    """Return the training tokens of the base's data; of several sources, until one has been read once. Raises
    UserError."""
    from megahp.train.prepare import open_data

    prefixes = base.get("data", "train")
    if not prefixes or not all(Path(f"{prefix}.idx").exists() for prefix in prefixes):
        raise UserError("--epochs counts how often data is read; name prefixes that are there in --data, or --tokens")
    names = ("weights", "sequence_length", "validation_fraction", "skip")
    values = {"data.train": tuple(prefixes), **{f"data.{name}": base.get("data", name) for name in names}}
    data = open_data(with_values(Config(), values))
    return 1 / max(data.epochs(0, 1).values())


def load_base(options: Namespace) -> Base:
    """Return the proxy or the user's tuned run, with preset and settings of the command line. Raises UserError."""
    for name in ("vocab_size", "sequence_length"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} {number} must be above 0")
    base = PROXY
    if options.base:
        # Keep what the file and its preset set, and of the defaults what is tuned or scaled.
        loaded = resolve.load(options.base)
        tree: dict[str, dict[str, Any]] = {"model": {}}
        for key, origin in loaded.origins.items():
            if key != "model.preset" and (origin == options.base.name or origin.startswith("preset")):
                section, name = key.split(".")
                tree.setdefault(section, {})[name] = get_setting(loaded.config, key)
        tree["model"] |= {"width": loaded.config.model.width, "heads": loaded.config.model.heads}
        tree["optimizer"] = {"lr": loaded.config.optimizer.lr} | tree.get("optimizer", {})
        base = Base(options.base.name, tree, f"your run {options.base}", "yours", tokens=loaded.config.train.tokens)
    model = PRESETS[options.preset] if options.preset else base.tree["model"]
    vocab_size = options.vocab_size
    if options.tokenizer or not (vocab_size or model.get("vocab_size")):
        vocab_size = load_tokenizer(options.tokenizer or base.get("data", "tokenizer")).vocab_size
    data = {"train": options.data, "tokenizer": options.tokenizer, "sequence_length": options.sequence_length}
    overrides: dict[str, dict[str, Any]] = {
        "model": {} if vocab_size is None else {"vocab_size": vocab_size},
        "data": {key: value for key, value in data.items() if value is not None},
    }
    return replace(base, overrides=overrides, preset=options.preset or "")


def load_laws(law: str, loss_law: str | None) -> Laws:
    """Return the laws by name or from law files; for those a file lacks, Power Lines'. Raises UserError."""
    if law in RULES:
        return Laws(loss_laws.named(loss_law or loss_laws.DEFAULT), rule=law)
    loss_laws.refuse_unknown("--law", law, RULES)
    file = law_file.read(Path(law))
    kinds = ("timescale", "optimal_batch", "critical_batch")
    fitted = {name: getattr(file, name) for name in kinds if getattr(file, name)}
    loss = file.loss if file.loss and not loss_law else loss_laws.named(loss_law or loss_laws.DEFAULT)
    error = file.task_error if loss is file.loss else None  # it is of that law's losses
    return Laws(loss, task_error=error, **fitted)
