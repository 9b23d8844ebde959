"""Tasks of lm-evaluation-harness in local files. Not in tests/evaluate, a name that the harness has a package of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_task(folder: Path, name: str, rows: Iterable[Any], text: str) -> None:
    """Write a task of the harness, and its questions. text: of its YAML file, but for where they are."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    where = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
    (folder / f"{name}.yaml").write_text(where + text)
