"""The core trains with torch and numpy alone: nothing else needs to be installed beside a CUDA build of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from distributed.test_resume import RUN

from megahp.data.indexed import IndexedWriter

ALONE = """
import sys
for name in ("sentencepiece", "tokenizers", "zstandard", "rich", "matplotlib", "tensorboard", "wandb", "torchao"):
    sys.modules[name] = None  # importing it now raises ImportError
from megahp.cli import main
sys.exit(main(["train", "run.toml", "train.steps=2", "log.tensorboard=false"]))
"""


def test_training_needs_only_torch_and_numpy(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document(list(b"some text, again and again " * 8))
    (tmp_path / "run.toml").write_text(RUN)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no report: " in done.stdout and "matplotlib" in done.stdout
    assert len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) == 2
