"""What tests of a tool share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from corpus import write_corpus


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The SCRIPT that a file of tests is about, as a module, importable in spawned workers too."""
    script = request.module.SCRIPT
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        yield importlib.import_module(script.stem)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a corpus, and the run file that is RUN in a file of tests."""
    folder = tmp_path_factory.mktemp("folder")
    write_corpus(folder / "corpus")
    (folder / "run.toml").write_text(request.module.RUN)
    return folder
