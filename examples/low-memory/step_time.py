"""Time an update of one matrix by each optimizer, on one thread: those that choose a subspace, and those that do not.

python examples/low-memory/step_time.py
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import begin_worker, print_table

from megahp.config import resolve
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.owners import Owners
from megahp.parallel.parameters import Row
from megahp.scaling.batch import BatchScheduler, Progress
from megahp.scaling.parameterization import Role, table_of
from megahp.train.optimizer import make_optimizer

SHAPES, RANK, REPEATS = ((1024, 1024), (4096, 1024)), 256, 5


def main() -> None:
    begin_worker()
    config = resolve.load(Path(__file__).parent / "run.toml", ["train.tokens=1e6"]).config
    owners = Owners(single_rank_mesh(config))
    plan, rows = BatchScheduler(config, 1).step(Progress()), []
    assert plan
    for shape in SHAPES:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name in ("adamw", "muon", "dct", "galore"):
            settings = replace(config.optimizer, name=name, rank=RANK, refresh=10**9)
            weights, table = {"matrix": torch.zeros(shape)}, table_of(config)
            optimizer = make_optimizer(settings, weights, {"matrix": Row(Role.HIDDEN)}, table, owners)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * REPEATS + 1):
                if number % 2 == 0:
                    optimizer.updates = 0  # so that the next chooses a subspace
                began = time.perf_counter()
                optimizer.step([grad], plan)
                if number:
                    seconds[number % 2 == 0].append(time.perf_counter() - began)
            state = sum(tensor.nbytes for tensor in optimizer.state().values())
            times = [f"{1e3 * min(seconds[chosen]):.1f}" for chosen in (False, True)]
            rows.append([f"{shape[0]} x {shape[1]}", name, *times, f"{state / 1e6:.2f}"])
    print_table(("matrix", "optimizer", "ms an update", "ms with a new subspace", "state, MB"), rows)


if __name__ == "__main__":
    main()
