"""The options of `megahp recipe` as what its plan is made from: files read, names looked up."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megahp import resolve
from megahp.data.tokenizer import load_tokenizer
from megahp.errors import UserError
from megahp.presets import PRESETS
from megahp.scaling import law_file, loss_laws
from megahp.scaling.recipe import PROXY, RULES, Base, Laws
from megahp.scaling.sizing import Given

# Dense bfloat16 peaks, FLOP/s.
GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


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
    base = _tuned(options.base) if options.base else PROXY
    known = PRESETS[options.preset] if options.preset else base.tree["model"]
    words = options.vocab_size
    if options.tokenizer or not (words or known.get("vocab_size")):
        words = load_tokenizer(options.tokenizer or base.get("data", "tokenizer")).vocab_size
    data = {"train": options.data, "tokenizer": options.tokenizer, "sequence_length": options.sequence_length}
    told: dict[str, dict[str, Any]] = {
        "model": {} if words is None else {"vocab_size": words},
        "data": {key: value for key, value in data.items() if value is not None},
    }
    return replace(base, told=told, preset=options.preset or "")


def _tuned(path: Path) -> Base:
    """A user's run file: what it gives, a preset's values included, and of the defaults what is tuned or scaled."""
    found = resolve.load(path)
    tree: dict[str, dict[str, Any]] = {"model": {}}
    for key, origin in found.origins.items():
        section, name = key.split(".")
        if key != "model.preset" and (origin == path.name or origin.startswith("preset")):
            tree.setdefault(section, {})[name] = getattr(getattr(found.config, section), name)
    tree["model"] |= {"width": found.config.model.width, "heads": found.config.model.heads}
    tree["optimizer"] = {"lr": found.config.optimizer.lr} | tree.get("optimizer", {})
    return Base(path.name, tree, f"your run {path}", "yours")


def laws_of(law: str, loss_law: str | None) -> Laws:
    """Of the names, or law files, given. A law file has Power Lines' laws for those it lacks. Raises UserError."""
    if law in RULES:
        return Laws(loss_laws.named(loss_law or loss_laws.DEFAULT), rule=law)
    loss_laws.refuse_unknown("--law", law, RULES)
    own = law_file.read(Path(law))
    kinds = ("timescale", "optimal_batch", "critical_batch")
    fitted = {name: getattr(own, name) for name in kinds if getattr(own, name)}
    if not fitted:
        raise UserError(f"--law {law} has none of {', '.join(kinds)}; for its loss law, give --loss-law {law}")
    loss = own.loss if own.loss and not loss_law else loss_laws.named(loss_law or loss_laws.DEFAULT)
    return Laws(loss, **fitted)
