"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def group_of_its_own() -> Iterator[None]:
    """Leave the process group that a model of this process joined, for the tests that begin one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
