"""One rank of several that train cases of distributed/training.py on CUDA devices; rank 0 writes what they did.

python tests/cuda/cells.py CASES OUTCOMES      # pickles: {name: (config, steps)}, {name: outcome}
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed.training import train_cases

from megahp import launch


def main(ranks: str, cases: str, outcomes: str) -> int:
    world = launch.world()
    if world.size != int(ranks):
        return launch.spawn(sys.argv[1:], int(ranks), (__file__,))
    launch.join(world, cuda=True)
    found = train_cases(pickle.loads(Path(cases).read_bytes()))
    if world.rank == 0:
        Path(outcomes).write_bytes(pickle.dumps(found))
    launch.leave(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
