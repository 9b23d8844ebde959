"""Faults for real ranks. Python imports this at its start where PYTHONPATH leads here; a rank for which FAULTS names
one then meets it, once in the life of the run, however often it is started again.

FAULTS is a file of JSON: [{"kind": ..., "rank": 1, "step": 7}, ...]. A fault that has struck leaves FAULTS.<number>,
whose time of change is when. A "lasting" one strikes whenever the rank computes a step that holds its "sample", and a
"slow" rank is so from its step on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAN = float("nan")
RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", -1)))


def planned() -> list[dict[str, Any]]:
    """This rank's faults, with their numbers."""
    faults = json.loads(Path(os.environ["FAULTS"]).read_text())
    return [{**fault, "number": number} for number, fault in enumerate(faults) if fault["rank"] == RANK]


def due(step: int, *kinds: str) -> dict[str, Any] | None:
    """The fault of one of these kinds that strikes this rank now; it is marked as struck."""
    for fault in planned():
        mark = Path(f"{os.environ['FAULTS']}.{fault['number']}")
        if fault["kind"] in kinds and step >= fault["step"] and not mark.exists():
            mark.write_text(str(step))
            return fault
    return None


def freeze() -> None:
    """Stand still with Python's lock held, as a hanging driver does."""
    ctypes.PyDLL(None).sleep(1000)


def fail() -> None:
    raise RuntimeError("injected")


def jump() -> None:
    """From now on the wall clock is an hour behind."""
    now = time.time
    time.time = lambda: now() - 3600


def lose_node() -> None:
    """Kill all that runs on this emulated node of Slurm's (tests/slurm), this process last."""
    marks = {f"{name}={os.environ[name]}".encode() for name in ("SLURMD_NODENAME", "SLURM_CONF")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # others' processes, and some that have just ended
            if marks <= set((process / "environ").read_bytes().split(b"\0")) and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


AT_A_STEP: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "freeze": freeze,
    "exception": fail,
    "exit": lambda: os._exit(7),
    "node": lose_node,
    "clock": jump,
    "pause": lambda: time.sleep(0.5),
    "wait": signal.pause,  # for a signal
}


def fill(folder: Path) -> None:
    """Leave no room on a file system."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def flip_a_bit(checkpoint: Path) -> None:
    """Change one bit in the middle of the largest file."""
    file = max(checkpoint.iterdir(), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def holds(plan: Any, sample: int) -> bool:
    return plan.first_sample <= sample < plan.first_sample + plan.global_batch


def strike_steps() -> None:
    """Faults inside a step."""
    from megahp.parallel.parameters import local, storage
    from megahp.train import loop

    compute = loop.compute

    def struck(run: Any, loader: Any, plan: Any, told: bool) -> Any:
        if fault := due(plan.step, *AT_A_STEP):
            AT_A_STEP[fault["kind"]]()
        if fault := due(plan.step, "fill"):
            fill(Path(fault["folder"]))
        if due(plan.step, "flip"):
            flip_a_bit(max(run.folder.glob("step-*")))
            AT_A_STEP["kill"]()
        weights = list(run.engine.weights.values())
        if due(plan.step, "weight"):
            storage(weights[-1]).view(-1)[0] = NAN
        if due(plan.step, "drift"):  # one unit in the last place
            part = storage(weights[-1]).view(-1)
            part[0] = part[0].nextafter(part[0] + 1)
        (stage,) = run.engine.stages
        block = next(iter(stage.blocks.values()))
        hooks = []
        for fault in planned():
            if fault["kind"] == "lasting" and holds(plan, fault["sample"]):
                times = fault["times"]
                hooks.append(stage.register_forward_hook(lambda module, inputs, output, times=times: output * times))
            if fault["kind"] == "slow" and plan.step >= fault["step"]:
                time.sleep(0.2)
        if due(plan.step, "activation"):
            hooks.append(block.register_forward_hook(lambda module, inputs, output: output * NAN))
        if due(plan.step, "gradient"):
            spoil = lambda module, inputs, output: output.register_hook(lambda gradient: gradient * NAN) and None  # noqa: E731
            hooks.append(block.register_forward_hook(spoil))
        try:
            step = compute(run, loader, plan, told)
            if due(plan.step, "sum"):
                local(step.grads[0]).view(-1)[0] = NAN
        finally:
            for hook in hooks:
                hook.remove()
        return step

    loop.compute = struck


def strike_saving() -> None:
    """A kill before or after each thing that is done to save; what is written may be damaged as soon as it is there."""
    from megahp.checkpoint import shards, store

    def killing(module: Any, name: str, phase: str) -> None:
        function = getattr(module, name)

        def struck(*arguments: Any, **named: Any) -> Any:
            step = progress()
            if due(step, f"before {phase}"):
                AT_A_STEP["kill"]()
            result = function(*arguments, **named)
            if due(step, f"after {phase}"):
                AT_A_STEP["kill"]()
            return result

        setattr(module, name, struck)

    begun = [0]
    begin = store.Store.begin

    def noted(self: Any, step: int, *more: Any) -> None:
        begun[0] = step
        begin(self, step, *more)

    def progress() -> int:
        return begun[0]

    store.Store.begin = noted  # type: ignore[method-assign]
    killing(shards, "write_shard", "shard")
    killing(store, "write_manifest", "manifest")
    killing(store, "publish", "publication")
    killing(store, "superseded", "dropping")


if "FAULTS" in os.environ and RANK >= 0 and "megahp" in sys.orig_argv:
    strike_steps()
    strike_saving()
