"""Settings are described in full."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megahp.config import schema, setting_names
from megahp.config.describe import describe, markdown
from megahp.errors import UserError


def test_the_page_of_settings_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/settings.md"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "docs/settings.md is not what megahp/config/schema.py says; write it again: "
        "python -m megahp.config.describe > docs/settings.md"
    )


def test_the_glossary_names_settings_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs/glossary.md").read_text(encoding="utf-8")
    sections = {name.partition(".")[0] for name in setting_names()}
    found = re.findall(r"`([a-z]+\.[a-z_]+)", text)
    named = {name for name in found if name.partition(".")[0] in sections}
    assert len(named) > 15 and named <= set(setting_names()), named - set(setting_names())


def test_every_setting_is_a_row_of_five_cells() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == setting_names()
    assert {row.count("|") for row in rows} == {6}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "model.rope_theta",
            """\
model.rope_theta: base of the rotary wavelengths
  type       a number
  bounds     above 0
  default    10000.0
  only with  model.positions: "rope"
  fixed      on resume, and in a branch (train.start_from)""",
        ),
        (
            "optimizer.beta2",
            """\
optimizer.beta2: decay of the second moment
  type       a number
  bounds     at least 0, below 1
  default    0.95""",
        ),
        (
            "sparsity.layers",
            """\
sparsity.layers: density of each block; empty = density for all
  type       a list of numbers
  default    []
  only with  sparsity.method: "static" or "rigl"
  fixed      on resume, and in a branch (train.start_from) unless it is dense""",
        ),
        (
            "train.seed",
            """\
train.seed: random seed of the initial weights and the data order
  type       a whole number
  bounds     at least 0
  default    1
  fixed      on resume""",
        ),
    ],
)
def test_a_setting_is_described_in_full(key: str, message: str) -> None:
    assert describe(key) == message


def test_choices_and_counts_are_described_in_words() -> None:
    assert '\n  type       one of "once", "every"\n' in describe("parallel.reduce")
    assert "\n  only with  parallel.pp: at least 2" in describe("parallel.split")
    assert "\n  only with  train.noise_scale: true" in describe("train.noise_half_life")


def test_a_section_lists_its_settings_and_no_name_lists_all() -> None:
    model = describe("model")
    assert model.startswith("[model]  The decoder-only transformer.\n  preset = ")
    assert [line.split()[0] for line in model.splitlines() if " = " in line[:30]] == list(schema.TYPES["model"])
    assert describe() == "\n\n".join(map(describe, schema.SECTIONS))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.lyers", "model.lyers is not a setting; did you mean layers"),
        ("btach", "btach is neither a section nor a setting; did you mean batch?"),
        ("optimiser.lr", "optimiser.lr is neither a section nor a setting; did you mean optimizer?"),
        ("lr", "lr is neither a section nor a setting; did you mean optimizer.lr?"),
        ("zzz", "zzz is neither a section nor a setting; choose one of: model, parameterization, data"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        describe(name)
    assert "\n" not in str(caught.value)
