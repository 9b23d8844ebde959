"""Settings changed in a run file's text: what they change, and what stays."""

from __future__ import annotations

import tomllib

import pytest

from megahp.config.edit import edited
from megahp.errors import UserError

RUN = """# mine
[model]
layers = 4  # shallow

[parallel] # of the old cluster
tp = 8
sequence_parallel = true
[data]
train = ["one"]
"""


def test_values_change_and_all_else_stays() -> None:
    values = {"parallel.tp": 2, "parallel.sequence_parallel": None, "parallel.pp": 4, "compute.recompute": "full"}
    text = edited(RUN, values)
    assert tomllib.loads(text) == {
        "model": {"layers": 4},
        "parallel": {"tp": 2, "pp": 4},
        "data": {"train": ["one"]},
        "compute": {"recompute": "full"},
    }
    assert [line for line in RUN.splitlines() if line not in text.splitlines()] == [
        "tp = 8",
        "sequence_parallel = true",
    ]
    assert edited(text, values) == text


def test_nothing_to_change() -> None:
    assert edited(RUN, {"parallel.tp": 8, "batch.micro_batch": None}) == RUN


@pytest.mark.parametrize("text", ["parallel.tp = 8\n", "parallel = {tp = 8}\n", "[parallel]\ntp = [\n8]\n"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write them yourself: parallel.tp = 2"):
        edited(text, {"parallel.tp": 2})
