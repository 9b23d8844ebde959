"""What tests of a tool share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The SCRIPT that a file of tests is about, as a module, importable in spawned workers too."""
    script = request.module.SCRIPT
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        yield importlib.import_module(script.stem)
