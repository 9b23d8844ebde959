"""Listing a run's checkpoints, and comparing two of them."""

from collections.abc import Iterator

from megahp.checkpoint.remote import Location
from megahp.checkpoint.shards import Tensors
from megahp.checkpoint.store import complete, problems, read_manifest, read_state
from megahp.config import config_differences, resolve

LINE = "{name:<15}{step:>10,}{tokens:>16,}{loss:>12}{size:>12}  {layout}"
HEADER = f"{'checkpoint':<15}{'step':>10}{'tokens':>16}{'validation':>12}{'MB':>12}  layout"


def listing(folder: Location) -> Iterator[str]:
    """Yield the lines of a table of a run's checkpoints, oldest first."""
    yield HEADER
    for checkpoint in complete(folder):
        if found := problems(checkpoint, shards=False):
            yield f"{checkpoint.name:<15}damaged: {found[0]}"
            continue
        state = read_state(checkpoint)
        layout = ", ".join(f"{axis} {size}" for axis, size in state["layout"].items() if size > 1) or "one rank"
        size = sum(entry["bytes"] for entry in read_manifest(checkpoint).values()) / 1e6
        loss = state.get("validation_loss")
        columns = {"loss": "-" if loss is None else f"{loss:.4f}", "size": f"{size:,.1f}", "layout": layout}
        yield LINE.format(name=checkpoint.name, **state["progress"], **columns)


def differences(one: Location, other: Location) -> Iterator[str]:
    """Yield how two checkpoints differ: settings, progress, and every tensor's largest difference."""
    states = read_state(one), read_state(other)
    configs = [resolve.from_dict(state["config"], "checkpoint") for state in states]
    for key, (before, now) in config_differences(*configs).items():
        yield f"{key} = {before!r} and {now!r}"
    for key, before in states[0]["progress"].items():
        if before != states[1]["progress"][key]:
            yield f"{key}: {before:,} and {states[1]['progress'][key]:,}"
    first, second = Tensors(one), Tensors(other)  # read one by one: only two tensors are in memory
    for name in dict.fromkeys((*first, *second)):
        if name not in first or name not in second:
            yield f"{name} is in {one if name in first else other} only"
            continue
        a, b = first[name], second[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name}: {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}"
        elif not a.equal(b):
            off = (a.double() - b.double()).abs().max().item()
            yield f"{name}: {(a != b).sum().item():,} of {a.numel():,} values differ, by {off:.3g} at most"
