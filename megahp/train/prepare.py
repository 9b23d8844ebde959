"""Checks of a run before anything is built or written, and opening its data.

`megahp train --ranks` runs these checks before it starts ranks: what needs torch is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import resource
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megahp.config import (
    AUTO,
    Config,
    SparsityConfig,
    TrainConfig,
    config_differences,
    fixed_when,
    get_setting,
    longest,
    parse_skip,
    parse_validation,
    phases_of,
    resolve,
    with_values,
)
from megahp.config.checks import find_conflicts
from megahp.data.cache import read_numbers, write_numbers
from megahp.data.indexed import IndexedDataset
from megahp.data.loader import TrainingData
from megahp.data.samples import Order
from megahp.data.tokenizer import Tokenizer, fingerprint_of, load_tokenizer, refuse_other
from megahp.errors import UserError
from megahp.files import read_json, refuse_links
from megahp.log.wandb_log import check_wandb
from megahp.parallel.device import check_devices, cpu_has_bfloat16, memory_here, uses_cuda
from megahp.parallel.layout import Layout, shards_of
from megahp.scaling.batch import BatchScheduler, Progress, batch_multiple, least_batch, runnable
from megahp.scaling.flops import parameters as parameter_count
from megahp.scaling.parameterization import DECAY
from megahp.series.coding import SeriesCoding
from megahp.series.tokenizer import SeriesTokenizer
from megahp.train.advice import advice, beyond_cpus

if TYPE_CHECKING:
    from megahp import checkpoint

WRONG_SAMPLES = "correct it, leave the document out with data.skip, or set data.wrong_samples=skip"  # the remedy
OTHER_FILES = 1024  # open in a rank beside its data: sockets and libraries
MOST_OUTSIDE = 1 << 20  # documents with ids outside the vocabulary that are told apart
DOCUMENTS_SEEN = 100  # of each prefix, to know how documents begin and end
# Settings that a run fills in from its data, tokenizer or the checkpoint it continues: empty in older checkpoints.
FILLED_IN = ("data.tokenizer_fingerprint", "data.eos", "data.bos", "model.padding", "parameterization.weight_decay")


def prepare(
    config: Config, layout: Layout, local_ranks: int, resume: bool, warn: Callable[[str], None] | None = None
) -> Config:
    """Check, before anything is built or written, all that can be checked: devices, batch and layout, tokenizer, run
    directory, and on resume that the run is the same one. Returns the config with the vocabulary filled in. Raises
    UserError.

    local_ranks: on this machine, 0 where others will check its devices and memory (a machine that only submits the run,
    a process that only starts ranks); warn: called with each warning about a new run.
    """
    check_devices(config, local_ranks)
    check_engines(config)
    check_best(config)
    if config.log.wandb != "off":
        check_wandb()
    if not config.data.train:
        raise UserError("data.train is empty; name at least one prefix written by `megahp preprocess`")
    begin_before = config.data.begin  # of the model that these settings came with
    config = with_vocabulary(config, load_described_tokenizer(config))
    check_memory(config, layout, local_ranks)
    refuse_links(config.directory)  # before the first look inside, which would follow them
    saved = newest(config)
    if config.directory.exists() and not config.directory.is_dir():
        raise UserError(f"{config.directory} is a file; choose another log.name")
    if not resume and (saved or (config.directory / "metrics.jsonl").exists()):
        raise UserError(f"{saved or config.directory} already exists; pass --resume auto to continue, or set log.name")
    config = with_teachers(config, saved if resume else None)
    config, start_tokens = check_origin(config, layout, saved if resume else None)
    data = open_data(config)
    check_token_ids(config, data)
    if config.train.validation_samples:
        config = with_validation(config, data, warn)
    begin = begin_of(config, data.datasets)
    if warn and begin_before == "bos" and begin != "bos":
        warn("warning: the model was trained on documents with a begin token, and these have none: preprocess --bos")
    config = with_values(config, {"data.begin": begin})
    if warn and not (resume and saved):
        # a machine without ranks of the run, such as a login node, may lack the GPUs that the run's machines have
        is_cuda = uses_cuda(config) if local_ranks else config.train.device != "cpu"
        for line in advice(config, data, math.prod(layout.shape), "cuda" if is_cuda else "cpu", start_tokens):
            warn(f"warning: {line}")
        if local_ranks and not is_cuda:
            teachers = teacher_bytes(config, shards_of(config.parallel, layout))
            if problem := beyond_cpus(config, layout, local_ranks, start_tokens, teachers):
                warn(f"warning: {problem}; make model or train.tokens smaller, or add ranks on other machines")
        if local_ranks and not is_cuda and config.train.dtype == "bfloat16" and not cpu_has_bfloat16():
            warn(
                "warning: train.dtype = 'bfloat16' is tens of times slower than float32 on this CPU, which has no "
                "instructions for it; set train.dtype=auto"
            )
    return config


def check_origin(config: Config, layout: Layout, saved: checkpoint.Location | None) -> tuple[Config, int]:
    """Check batch, schedule and settings against the checkpoint that the run resumes from (`saved`), against the one
    that it starts from, or alone. Returns the config with its empty or "auto" settings of the checkpoint filled in, and
    the tokens that a new run's checkpoint was trained on. Raises UserError."""
    if saved:
        from megahp import checkpoint

        state = checkpoint.read_state(saved)
        config = with_saved_choices(config, resolve.from_dict(state["config"], str(saved)))
        config = with_saved_dtype(with_sample_order(with_saved_source_order(config, state), state), state)
        refuse_changes(config, state["config"], saved, {"always", "unless dense", "on resume"})
        check_schedule(config, state["progress"]["tokens"], saved)
        check_resumed_batch(config, layout, state, saved)
        return config, 0
    check_batch(config, layout, config.batch.global_batch)
    if not config.train.start_from:
        return with_saved_choices(with_values(config, {"data.order": config.data.order or "keyed"})), 0
    from megahp import checkpoint

    path = checkpoint.find(checkpoint.location(config.train.start_from))
    state = checkpoint.read_state(path)
    config = with_saved_choices(config, resolve.from_dict(state["config"], str(path)))
    config = with_saved_dtype(with_sample_order(config, state), state)
    check_start(config, layout, path, state)
    return config, state["progress"]["tokens"]


def with_saved_source_order(config: Config, state: Mapping[str, Any]) -> Config:
    """Return the config with its sources in the order in which a checkpoint has them, if they are the same ones: their
    order decides which sample is of which."""
    data, saved = config.data, state.get("sources", ())
    if len(saved) != len(data.train) or state["config"]["data"]["train"] == list(data.train):
        return config
    identities = [IndexedDataset(prefix).identity for prefix in data.train]
    order = [max(range(len(saved)), key=lambda k: identities[k].likeness(before)) for before in saved]
    if sorted(order) != list(range(len(order))):
        return config

    def ordered(values: Sequence[Any]) -> list[Any]:
        return [values[k] for k in order] if len(values) == len(order) else list(values)

    mixtures = [word.partition(":") for word in data.mixtures]
    words = tuple(f"{tokens}{colon}{','.join(ordered(weights.split(',')))}" for tokens, colon, weights in mixtures)
    values = {"data.train": tuple(ordered(data.train)), "data.weights": tuple(ordered(data.weights))}
    return with_values(config, {**values, "data.mixtures": words})


def with_sample_order(config: Config, state: Mapping[str, Any]) -> Config:
    """Fill in data.order, if it is empty: what a checkpoint that has read data was trained in, else the one of new
    runs."""
    read_in = saved_sample_order(state["config"]) if state["data"] is not None else "keyed"
    return with_values(config, {"data.order": config.data.order or read_in})


def with_saved_choices(config: Config, saved: Config | None = None) -> Config:
    """Fill in model.padding and parameterization.weight_decay, if they are empty: as in the settings of the checkpoint
    that the run continues, else as in new runs."""
    new = {"model.padding": "masked"}
    if config.parameterization.name != "sp":  # without effect there
        new["parameterization.weight_decay"] = DECAY[config.parameterization.name]
    before = saved or config
    chosen = {key: get_setting(config, key) or get_setting(before, key) or value for key, value in new.items()}
    return with_values(config, chosen)


def with_saved_dtype(config: Config, state: Mapping[str, Any]) -> Config:
    """Replace a train.dtype that is "auto" by what the checkpoint was trained in, on whatever device. Raises UserError
    where that does not go with other settings."""
    if config.train.dtype != AUTO:
        return config
    config = with_values(config, {"train.dtype": state["config"]["train"]["dtype"]})
    if conflicts := find_conflicts(config):
        raise UserError(f"with the checkpoint's train.dtype: {conflicts[0]}")
    return config


def saved_sample_order(saved: Mapping[str, Mapping[str, Any]]) -> Order:
    """Return the sample order of saved settings. Those that do not name one are older than the choice."""
    return saved["data"].get("order") or "drawn"


def check_token_ids(config: Config, data: TrainingData) -> None:
    """Raise UserError for an id outside the vocabulary in a document that is not skipped. Where the description beside
    the data does not exclude one, all of it is scanned, once: the outcome is kept in the cache."""
    vocab_size, skip = config.model.vocab_size, parse_skip(config.data.skip)
    for dataset in data.datasets if config.data.wrong_samples == "refuse" else ():
        sidecar, bounds = Path(f"{dataset.prefix}.json"), np.iinfo(dataset.dtype)
        described = read_json(sidecar, "description of data") if sidecar.exists() else {}
        largest = described.get("largest_id") if described.get("fingerprint") == dataset.identity.fingerprint else None
        if bounds.min == 0 and bounds.max < vocab_size or type(largest) is int and 0 <= largest < vocab_size:
            continue
        name = hashlib.sha256(f"{dataset.identity.fingerprint} {dataset.modified} {vocab_size}".encode()).hexdigest()
        path = cache_of(config) / f"outside-{name[:32]}.npy"
        documents = read_numbers(path)
        if documents is None:
            documents = dataset.outside(vocab_size, MOST_OUTSIDE)
            with contextlib.suppress(UserError):  # then it is scanned again at the next start
                write_numbers(path, documents)
        skipped = skip.get(dataset.prefix, [])
        left = [each for each in documents.tolist() if not any(each in part for part in skipped)]
        if left:
            more = f", as {len(left) - 1:,} other documents do" if left[1:] else ""
            why = dataset.problem(vocab_size, left[0]) + more
            raise UserError(f"{why}; name the tokenizer it was written with, {WRONG_SAMPLES}")


def with_validation(config: Config, data: TrainingData, warn: Callable[[str], None] | None) -> Config:
    """Lower train.validation_samples, if it is the default, to what there is by the mixture's weights, and say so.
    Raises UserError where any other number cannot be had, and for ids outside the vocabulary."""
    asked = config.train.validation_samples
    fits = data.most_validation_samples(asked)
    if asked == TrainConfig().validation_samples and 0 < fits < asked:
        config = with_values(config, {"train.validation_samples": fits})
        if warn:
            held_out = f"data.validation_fraction = {config.data.validation_fraction:g}"
            warn(
                f"warning: train.validation_samples = {fits} in place of the default, {asked}: {held_out} holds out no "
                "more by the mixture's weights; raise it, or add data"
            )
    wrong = data.wrong_in_validation(config.train.validation_samples)
    if wrong and config.data.wrong_samples == "refuse":
        raise UserError(f"validation {wrong[0]}; {WRONG_SAMPLES}")
    return config


def newest(config: Config) -> checkpoint.Location | None:
    """Return the checkpoint that the run would resume from. Raises UserError."""
    folder, remote = config.directory / "checkpoints", config.checkpoint.remote
    if not remote and not folder.exists():
        return None
    from megahp import checkpoint

    return checkpoint.first_valid(checkpoint.candidates(folder, remote))


def refuse_without_checkpoint(config: Config) -> None:
    """Raise UserError when there is nothing to resume from."""
    if newest(config) is None:
        folder = config.directory / "checkpoints"
        raise UserError(f"{folder} holds no checkpoint to resume from; start anew with --resume auto, or restore one")


def check_batch(config: Config, layout: Layout, global_batch: int) -> None:
    """Raise UserError when the layout cannot run this global batch, that of a new run or of one that is resumed, in
    every phase of the data."""
    batch, multiple, least = config.batch, batch_multiple(config, layout.dp), least_batch(config, layout.dp)
    nearest = runnable(global_batch, multiple, least)
    if nearest != (global_batch,):
        is_auto = batch.micro_batch == AUTO
        of = f"data parallel {layout.dp}" + ("" if is_auto else f" x batch.micro_batch {batch.micro_batch}")
        if layout.pp > 1:
            of += f", {layout.pp} pipeline stages kept busy by the {config.parallel.schedule} schedule"
        if phases_of(config.data)[1:]:
            of += ", in sequences of every length in data.lengths"
        problem = f"below {least}" if global_batch < least else f"not a multiple of {multiple}"
        which = "batch.global_batch" if global_batch == batch.global_batch else "the checkpoint's global batch"
        share, rest = divmod(global_batch, layout.dp)
        micro = math.gcd(batch.micro_batch, share) if isinstance(batch.micro_batch, int) and not rest else 0
        smaller = with_values(config, {"batch.micro_batch": micro}) if micro else config
        limits = batch_multiple(smaller, layout.dp), least_batch(smaller, layout.dp)
        remedy = f"; or set batch.micro_batch={micro}" if runnable(global_batch, *limits) == (global_batch,) else ""
        near = ", ".join(map(str, nearest))
        raise UserError(f"{which} = {global_batch} is {problem} ({of}); nearest valid: {near}{remedy}")


def check_resumed_batch(config: Config, layout: Layout, state: Mapping[str, Any], path: checkpoint.Location) -> None:
    """Raise UserError when the layout cannot run the batch that a checkpoint leads to, or the run would stop at once:
    resilience.stop_at_batch is reached already."""
    scheduler = BatchScheduler(config, layout.dp)
    scheduler.load_state(state["batch_plan"], Progress(**state["progress"]))
    check_batch(config, layout, scheduler.batch)
    stop_at, batch = config.resilience.stop_at_batch, state["batch_plan"]["batch"]
    if 0 < stop_at <= batch:
        raise UserError(f"resilience.stop_at_batch = {stop_at} is not above the batch of {path}, {batch}; raise it")


def check_memory(config: Config, layout: Layout, local_ranks: int) -> None:
    """Raise UserError when this machine's memory cannot even hold its ranks' shares of the weights, 4 bytes each. GPUs'
    memory is not checked: CUDA would have to be initialised before the ranks are started."""
    parameters = parameter_count(config.model, longest(config))
    share = 4 * parameters * layout.dp_replicate / math.prod(layout.shape)
    needed, memory = share * local_ranks, memory_here()
    if needed > memory and not uses_cuda(config):
        raise UserError(
            f"the model's {parameters:,} parameters take at least {needed / 1e9:,.0f} GB of this machine, which has "
            f"{memory / 1e9:,.0f} GB; make it smaller, or shard it over more machines"
        )


def check_best(config: Config) -> None:
    """Raise UserError where checkpoint.keep_best has nothing to choose from: no checkpoint will have a validation."""
    # at most, since a batch never shrinks
    steps = min(config.train.tokens // config.step_tokens, config.train.steps or math.inf)
    every, validated = config.checkpoint.every, config.train.validate_every
    if config.checkpoint.keep_best and math.lcm(every, validated) > steps:
        raise UserError(
            f"checkpoint.keep_best = true, but of at most {steps} steps none has both a checkpoint (checkpoint.every = "
            f"{every}) and a validation (train.validate_every = {validated}); set train.validate_every={every}"
        )


def check_engines(config: Config) -> None:
    """Raise UserError when a configured engine is not installed, or cannot compute on the run's device."""
    if config.parallel.engine == "deepspeed" and not find_spec("deepspeed"):  # importing it takes seconds
        raise UserError(
            "parallel.engine = 'deepspeed' is not installed; pip install 'megahp[deepspeed]', or leave it out"
        )
    own = {"compute.norms": "megahp", "compute.fp8": "none", "optimizer.engine": "torch"}
    if all(get_setting(config, key) == value for key, value in own.items()):
        return
    import torch

    from megahp.ops.engines import fused_adam, linear_of, norm_of

    if config.compute.norms != "megahp":
        norm_of(config.compute.norms, config.model.norm)
    if config.compute.fp8 != "none":
        linear_of(config.compute.fp8, torch.device("cpu"), 16, 16)
    if config.optimizer.engine == "apex":
        fused_adam()
    for key in own:
        if (engine := get_setting(config, key)) in ("apex", "transformer-engine") and not uses_cuda(config):
            raise UserError(f"{key} = {engine!r} computes on CUDA devices only; train on one, or remove it")


def check_start(config: Config, layout: Layout, path: checkpoint.Location, state: Mapping[str, Any]) -> None:
    """Raise UserError when this run cannot start from a checkpoint, of this state."""
    # a sparse run may become dense: what was masked is then trained, from 0 (MediSwift, arXiv 2403.00952)
    sparse = config.sparsity.method != "none"
    refuse_changes(config, state["config"], path, {"always", "unless dense"} if sparse else {"always"})
    saved, progress = resolve.from_dict(state["config"], str(path)), Progress(**state["progress"])
    if config.model.positions == "learned" and longest(config) != longest(saved):
        raise UserError(
            f"model.positions = 'learned': {path} holds {longest(saved)} positions, and the longest sequence is "
            f"{longest(config)}; set it to {longest(saved)}"
        )
    check_schedule(config, progress.tokens, path)
    scheduler = BatchScheduler(config, layout.dp)
    scheduler.load_state(initial_batch_state(config, saved, state, scheduler), progress)
    if scheduler.step(progress) is None:
        train = config.train
        raise UserError(
            f"train.tokens = {train.tokens} and train.steps = {train.steps} leave no step after the {progress.tokens} "
            f"tokens and {progress.step} steps of {path}, which count towards this run's; raise them"
        )


def check_schedule(config: Config, tokens: int, path: checkpoint.Location) -> None:
    """Raise UserError when the schedule starts only after this checkpoint."""
    if config.schedule.start > tokens:
        raise UserError(
            f"schedule.start = {config.schedule.start} is beyond the {tokens} tokens of {path}, from which the run "
            f"continues; set schedule.start={tokens} for a schedule that starts there"
        )


def initial_batch_state(
    config: Config, saved: Config, state: Mapping[str, Any], scheduler: BatchScheduler
) -> dict[str, Any]:
    """Return the state in which a branch's batch scheduler starts: the checkpoint's, where [batch] and the sequence
    length are as before, else a new one's."""
    # how a batch is divided, which each start may decide anew, does not make another plan
    plans = [(replace(each.batch, largest_micro_batch=0), each.data.sequence_length) for each in (saved, config)]
    is_same = plans[0] == plans[1]
    return state["batch_plan"] if is_same else {**scheduler.state(), "began": state["progress"]["tokens"]}


def load_described_tokenizer(config: Config) -> Tokenizer:
    """Load the run's tokenizer, with the end and begin tokens that its data was written with. Raises UserError when the
    .json beside a prefix names another tokenizer, or other tokens than the settings or another prefix."""
    data, remedy, descriptions = config.data, "preprocess again, or remove it", dict[str, dict[str, Any]]()
    for prefix in (*data.train, *parse_validation(data).values()):
        if not (sidecar := Path(f"{prefix}.json")).exists():  # other tools write none
            continue
        descriptions[prefix] = read_json(sidecar, "description of data", remedy)
        if not isinstance(fingerprint := descriptions[prefix].get("tokenizer_fingerprint"), str):
            raise UserError(f"{sidecar} holds no tokenizer_fingerprint; {remedy}")
        refuse_other(data.tokenizer, fingerprint, f"{prefix} was written with, according to {sidecar}")
    written = [
        (prefix, name, value)
        for prefix, description in descriptions.items()
        for name, value in (("eos", description.get("eod")), ("bos", description.get("bos")))
        if type(value) is int
    ]
    first = {name: str(value) for _, name, value in reversed(written)}
    tokenizer = load_tokenizer(data.tokenizer, data.eos or first.get("eos", ""), data.bos or first.get("bos", ""))
    own = {"eos": tokenizer.eod, "bos": tokenizer.bos}
    for prefix, name, value in written:
        if value != own[name]:
            problem = f"data.{name} is token {own[name]} and {prefix} was written with {value}"
            raise UserError(f'{problem}; set data.{name}="{value}", or preprocess all data with the same')
    return tokenizer


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Fill in what the tokenizer decides: model.vocab_size if it is 0, its fingerprint, its end and begin tokens as
    ids. Raises UserError for another one than the fingerprint's, or when the vocabulary is too small for it."""
    data = config.data
    refuse_other(tokenizer.path, data.tokenizer_fingerprint, "data.tokenizer_fingerprint names")
    if 0 < config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer = {data.tokenizer!r}; remove it to use the tokenizer's"
        )
    levels = config.model.levels
    if isinstance(tokenizer, SeriesTokenizer):
        levels = tokenizer.coding.levels
        check_series(config, tokenizer.coding)
    values = {
        "model.vocab_size": config.model.vocab_size or tokenizer.vocab_size,
        "model.levels": levels,
        "data.tokenizer_fingerprint": data.tokenizer_fingerprint or fingerprint_of(tokenizer.path),
        "data.eos": str(tokenizer.eod),
        "data.bos": "none" if tokenizer.bos is None else str(tokenizer.bos),
        "data.begin": data.begin or ("bos" if tokenizer.adds_bos else ""),
    }
    return with_values(config, values)


def with_teachers(config: Config, resumed: checkpoint.Location | None) -> Config:
    """Fill in the fingerprints of distill.teachers, and name the checkpoints of run directories: those of the `resumed`
    checkpoint's run, which may have been trained further since, else the newest. Raises UserError for a teacher
    that cannot predict this run's tokens on its layout, and for another one than the fingerprint's."""
    if not config.distill.teachers:
        return config
    from megahp import checkpoint

    names, fingerprints = [], []
    of_run = checkpoint.settings_of(resumed).distill.teachers if resumed else ()
    for number, name in enumerate(config.distill.teachers):
        kept = of_run[number] if number < len(of_run) else ""
        path = checkpoint.find(checkpoint.location(kept if kept.startswith(f"{name.rstrip('/')}/") else name))
        saved, teacher = checkpoint.settings_of(path), f"distill.teachers: {path}"
        refuse_other(config.data.tokenizer, saved.data.tokenizer_fingerprint, f"{path} was trained with")
        if saved.model.vocab_size != config.model.vocab_size:
            sizes = f"{saved.model.vocab_size} token ids and the run {config.model.vocab_size}"
            raise UserError(f"{teacher} has {sizes}; set model.vocab_size={saved.model.vocab_size}, or name another")
        if longest(saved) < longest(config):
            lengths = f"at most {longest(saved)} tokens at a time and the run has sequences of {longest(config)}"
            raise UserError(f"{teacher} has read {lengths}; shorten them, or name another")
        if "float64" in (before := saved.train.dtype, now := config.train.dtype) and before != now:
            raise UserError(
                f"{teacher} has weights for train.dtype = {before!r}, not {now!r}; use one, or name another"
            )
        of_teacher = replace(config, model=saved.model, parameterization=saved.parameterization)
        if conflicts := find_conflicts(replace(of_teacher, sparsity=SparsityConfig())):
            raise UserError(f"{teacher} cannot be loaded on this layout: {conflicts[0]}")
        names.append(checkpoint.url_of(path))
        fingerprints.append(checkpoint.fingerprint(path))
    if config.distill.fingerprints not in ((), tuple(fingerprints)):
        raise UserError("distill.fingerprints are of other checkpoints than distill.teachers; name those, or remove it")
    return with_values(config, {"distill.teachers": tuple(names), "distill.fingerprints": tuple(fingerprints)})


def teacher_bytes(config: Config, shards: int) -> float:
    """Return the bytes that the teachers' weights, in fp32, take on a rank that holds one shard of each."""
    from megahp import checkpoint

    models = [checkpoint.settings_of(checkpoint.find(checkpoint.location(name))) for name in config.distill.teachers]
    return sum(4 * parameter_count(saved.model, longest(saved)) for saved in models) / shards


def check_series(config: Config, coding: SeriesCoding) -> None:
    """Raise UserError for settings under which a sample would not be one window of the coding."""
    name, data = config.data.tokenizer, config.data
    if config.model.levels not in ((), coding.levels):
        levels = list(config.model.levels)
        raise UserError(f"model.levels = {levels} are not those of {name!r}, {list(coding.levels)}; remove it")
    if data.lengths or data.sequence_length != coding.window_tokens:
        which = "data.lengths" if data.lengths else f"data.sequence_length = {data.sequence_length}"
        remedy = "remove it" if data.lengths else f"set it to {coding.window_tokens}"
        raise UserError(f"{which}: a sample is a window of {name!r}, of {coding.window_tokens} tokens; {remedy}")


def begin_of(config: Config, datasets: Sequence[IndexedDataset]) -> str:
    """Return what stands before the first token of most documents: "bos", a begin token of their own; "eos", the end
    token of the document before; "none"."""
    seen = (each.tokens(document) for each in datasets for document in range(min(each.documents, DOCUMENTS_SEEN)))
    ends = [(str(tokens[0]), str(tokens[-1])) for tokens in seen if len(tokens)]
    if 2 * sum(first == config.data.bos for first, _ in ends) > len(ends):
        return "bos"
    return "eos" if 2 * sum(last == config.data.eos for _, last in ends) > len(ends) else "none"


def changes(config: Config, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Return the settings whose value differs from the saved one: key -> (saved, now)."""
    before = resolve.from_dict(saved, "checkpoint")
    return config_differences(with_values(before, {"data.order": saved_sample_order(saved)}), config)


def refuse_changes(
    config: Config, saved: Mapping[str, Mapping[str, Any]], path: checkpoint.Location, fixed: Collection[str]
) -> None:
    """Raise UserError when a setting differs that is fixed in one of these ways (megahp/config/schema.py: fixed)."""
    for key, (before, now) in changes(config, saved).items():
        # a checkpoint of an older megahp may lack what is filled in
        if fixed_when(key) in fixed and (before != "" or key not in FILLED_IN):
            if key == "data.tokenizer_fingerprint":
                refuse_other(config.data.tokenizer, before, f"{path} was trained with")
                continue
            if key == "distill.fingerprints":
                names = ", ".join(saved.get("distill", {}).get("teachers", ()))
                raise UserError(f"{path} was trained with other distill.teachers, {names}; name those, or begin anew")
            or_new = ", or start a new run under another log.name" if "on resume" in fixed else ""
            raise UserError(f"{key} = {now!r} but {path} was trained with {before!r}; set it back{or_new}")


def open_data(config: Config) -> TrainingData:
    """Open the run's data, memory-mapped. Raises UserError for missing or damaged files."""
    data = config.data
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < (needed := len(data.train) + OTHER_FILES):  # every source keeps a file open
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))
    datasets = [IndexedDataset(prefix) for prefix in data.train]
    tokens = {dataset.prefix: dataset.total_tokens for dataset in datasets}
    for prefix, count in tokens.items():
        if count == 0:
            raise UserError(f"data {prefix!r} holds no tokens; remove it from data.train, or preprocess again")
    by_tokens = tuple(map(float, tokens.values()))
    phases = [replace(phase, weights=phase.weights or by_tokens) for phase in phases_of(data)]
    cache, skip = cache_of(config), parse_skip(data.skip)
    for dataset in datasets:
        if any(part.stop > dataset.documents for part in skip.get(dataset.prefix, [])):
            few = f"{dataset.prefix!r} has only {dataset.documents} documents, from 0 on"
            raise UserError(f"data.skip: {few}; correct it")
    sets = {name: IndexedDataset(prefix) for name, prefix in parse_validation(data).items()}
    return TrainingData(
        datasets,
        phases,
        config.train.seed,
        data.validation_fraction,
        cache,
        config.model.vocab_size,
        skip,
        sets,
        data.order or "keyed",
    )


def cache_of(config: Config) -> Path:
    """Return the folder that keeps what is computed from the data: sample orders, scans for wrong ids."""
    return Path(config.data.cache) if config.data.cache else Path(config.data.train[0]).parent / "cache"
