"""Settings that are "auto", decided when the ranks have met and before the model is built: for all ranks alike, and
recorded in config.toml and every checkpoint, so that a resume trains as the run began."""

from collections.abc import Mapping
from typing import Any

import torch

from megahp import checkpoint
from megahp.config import AUTO, Auto, Config, config_to_dict, longest, with_values
from megahp.launch import World
from megahp.log.progress import human_duration
from megahp.ops.compiler import has_compiler
from megahp.parallel.device import fast_dtype, free_memory
from megahp.parallel.layout import shards_of
from megahp.parallel.mesh import Mesh
from megahp.parallel.messages import all_gather_json, on_rank0
from megahp.scaling.flops import training_flops
from megahp.scaling.memory import fitting_sequences, training_bytes
from megahp.train.prepare import newest, teacher_bytes

# Tokens of a CPU rank's forward pass beyond which larger ones only leave the caches: docs/benchmarks/training.md
CACHED_TOKENS = 4096
# What compiling blocks takes on a CPU, and the share of a run that it may take: it saves some 10 % (the same page)
COMPILE_SECONDS, COMPILE_SHARE = 60.0, 0.03
FLOPS_OF_THREAD = 1.5e11  # at best, measured in bfloat16, so that a run's time is underestimated


def resolve_auto(config: Config, mesh: Mesh, world: World, resume: bool) -> tuple[Config, list[str]]:
    """Return the config with every "auto" decided, and a line for the log about each decision. All ranks call this."""
    if AUTO not in (config.train.dtype, config.batch.micro_batch, config.compute.compile):
        return config, []
    saved: Mapping[str, Mapping[str, Any]] = on_rank0(lambda: _saved(config)) if resume else {}
    lines: list[str] = []
    if config.train.dtype == AUTO:  # of a new run: others have their checkpoint's (check_origin)
        dtype = max(all_gather_json(fast_dtype(mesh.device)))  # float32, if one rank needs that
        config = with_values(config, {"train.dtype": dtype})
        has = "every rank's device has" if dtype == "bfloat16" else "a rank's device has no"
        lines.append(f"train.dtype is {dtype}: {has} instructions for bfloat16")
    if config.batch.micro_batch == AUTO and not config.batch.largest_micro_batch:
        same = saved.get("batch", {}).get("largest_micro_batch", 0)
        largest, line = _largest_micro_batch(config, mesh, world, same)
        config = with_values(config, {"batch.largest_micro_batch": largest})
        lines.append(line)
    if config.compute.compile == AUTO:
        same = saved.get("compute", {}).get("compile", AUTO)
        compiled, line = _is_compiled(config, mesh, same)
        config = with_values(config, {"compute.compile": compiled})
        lines.append(line)
    return config, lines


def _is_compiled(config: Config, mesh: Mesh, saved: bool | Auto) -> tuple[bool, str]:
    """Return whether to compile blocks, and why: as another start has decided, else on CPUs, in a run so long that
    compiling takes a small share of it. Only what was measured to gain is compiled."""
    if config.parallel.engine == "deepspeed":
        return False, "blocks are not compiled: that is not checked with DeepSpeed"
    compilers, threads = all(all_gather_json(has_compiler())), sum(all_gather_json(torch.get_num_threads()))
    if saved != AUTO and (compilers or not saved):
        return saved is True, f"blocks are {'' if saved else 'not '}compiled, as before"
    train = config.train
    tokens = min(train.tokens, train.steps * config.step_tokens or train.tokens)
    seconds = tokens * training_flops(config.model, longest(config)) / (FLOPS_OF_THREAD * threads)
    split_backward = config.parallel.pp > 1 and config.parallel.schedule in ("zero-bubble", "zbv")
    if not compilers:
        why = "a rank has no C++ compiler (g++, or the one that CXX names)"
    elif mesh.device.type != "cpu":
        why = "what that gains is not measured on GPUs"
    elif config.model.experts or config.compute.fp8 != "none" or split_backward:
        why = "what that gains is measured for dense blocks alone, without float8 or a split backward pass"
    elif config.batch.varies_micro_batch:
        why = "microbatches that follow a growing batch would be compiled anew at each size"
    elif seconds < COMPILE_SECONDS / COMPILE_SHARE:
        why = f"about {COMPILE_SECONDS:g} s of compiling are too much of a run of about {human_duration(seconds)}"
    else:
        return True, f"blocks are compiled, which takes about {COMPILE_SECONDS:g} s in the first steps"
    return False, f"blocks are not compiled: {why}"


def _saved(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings of the checkpoint that the run resumes from; {} without one."""
    path = newest(config)
    return config_to_dict(checkpoint.settings_of(path)) if path else {}


def _largest_micro_batch(config: Config, mesh: Mesh, world: World, saved: int) -> tuple[int, str]:
    """Return the most sequences of a forward pass that every rank can hold, and why; `saved`, which another start has
    decided (0 = none), if that can be held at all: another division of the batch would round otherwise."""
    is_cpu, layout = mesh.device.type == "cpu", mesh.layout
    shards = shards_of(config.parallel, layout)
    free = free_memory(mesh.device) / (world.local_size if is_cpu else 1)  # CPU ranks share it
    free -= teacher_bytes(config, shards)
    fitting, why = fitting_sequences(config, shards, free), "as half of the free memory holds"
    cached = max(1, CACHED_TOKENS * layout.cp * layout.tp // config.data.sequence_length)
    if is_cpu and cached < fitting:
        fitting, why = cached, f"{CACHED_TOKENS} tokens a rank, beyond which a CPU gains nothing"
    is_held = saved > 0 and training_bytes(config, shards, saved) <= free
    found = all_gather_json((fitting, why, is_held))
    if saved and all(held for _, _, held in found):
        return saved, f"microbatches of at most {saved} sequences, as before"
    least, why, _ = min(found)
    before = f" in place of {saved}, which this machine cannot hold: sums are rounded otherwise" if saved else ""
    return least, f"microbatches of at most {least} sequences{before}: {why}"
