"""One site for all tests of this folder, whose first jobs run while others are tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm.cluster import running
from slurm.site import Site

OURS = ("SLURM_CONF", "PATH", "PYTHONPATH", "OMP_NUM_THREADS")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running(tmp_path_factory.mktemp("slurm"), 4) as cluster, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for key in OURS:
            patch.setenv(key, cluster.environment[key])
        yield Site(cluster, folder)
