"""What tests of a tool share."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from corpus import write_corpus


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> ModuleType:
    """The file of the COMMAND that a file of tests is about."""
    return importlib.import_module(f"megahp.commands.{'_'.join(request.module.COMMAND).replace('-', '_')}")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a corpus, and the run file that is RUN in a file of tests."""
    folder = tmp_path_factory.mktemp("folder")
    write_corpus(folder / "corpus")
    (folder / "run.toml").write_text(request.module.RUN)
    return folder
