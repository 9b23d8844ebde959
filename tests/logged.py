"""What a run logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megahp.log.metrics import read_metrics

CLOCK = ("tokens_per_second", "step_seconds")


def numbers(run: Path) -> list[dict[str, Any]]:
    """All that is logged of each step but the clock's readings."""
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in read_metrics(run)]
