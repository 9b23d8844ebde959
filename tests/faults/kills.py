"""A run of one rank that is killed again and again while it saves. `python tests/faults/kills.py FOLDER KILLS SEED`

Lives are forked from a process that has imported everything, since that is most of a start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from megahp.checkpoint import Store
from megahp.cli import main
from megahp.train import loop  # noqa: F401  what a life needs

LONGEST = 0.1  # seconds from the beginning of a save to the kill, at first; a save takes 0.03 to 0.07 when quiet


def kill_soon(saves: int, seconds: float) -> None:
    """Let this process be killed so long after its so manyth save has begun. Nothing can catch it."""
    begin, left = Store.begin, [saves]

    def begun(self: Store, step: int, *more: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            Path("begun").write_text(str(step))
            signal.setitimer(signal.ITIMER_REAL, seconds)
        begin(self, step, *more)

    Store.begin = begun  # type: ignore[method-assign]


def life(*kill: Any) -> int | None:
    """One start of the run. Returns its exit code, or None when it was killed."""
    if (child := os.fork()) == 0:
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        if kill:
            kill_soon(*kill)
        main(["train", "run.toml", "log.name=killed", "--resume", "auto"])  # leaves by itself
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.chdir(folder)
    draw, longest = random.Random(seed), LONGEST
    for number in range(kills):
        code = life(draw.randrange(1, 4), draw.uniform(0, longest))
        assert code is None, f"life {number} ended with {code}"
        kept = sorted(path.name for path in (folder / "runs/killed/checkpoints").glob("step-*"))
        begun = int(Path("begun").read_text())
        print(json.dumps({"begun": begun, "kept": kept}), flush=True)
        # A save lasts longer on a busy machine: aim earlier after one that was finished, later after one cut short.
        longest *= 0.6 if f"step-{begun:08d}" in kept else 1.6
    print(json.dumps({"code": life()}))
