import math
from dataclasses import replace

import numpy as np
import pytest

from megahp.errors import UserError
from megahp.recipe import law_file
from megahp.recipe.law_file import LawFile
from megahp.scaling import power_laws
from megahp.scaling.laws import LossLaw

LOSS = LossLaw(
    floor=1.7,
    a=400.0,
    b=2000.0,
    alpha=0.34,
    beta=0.37,
    source='12 runs in "runs/"',
    confidence="fitted",
    tokens=(1e9, math.inf),
    draws=((1.6, 390.0, 2100.0, 0.33, 0.38), (1.8, 410.0, 1900.0, 0.35, 0.36)),
)


def _written(tmp_path, laws):
    law_file.write(tmp_path / "laws.toml", laws)
    return tmp_path / "laws.toml"


def test_what_is_written_is_read_back(tmp_path):
    drawn = replace(power_laws.CRITICAL_BATCH, scale=np.float64(96.5), draws=((np.float64(90.0), 0.46), (100.0, 0.47)))
    for laws in (LawFile(loss=LOSS), LawFile(LOSS, power_laws.TAU, power_laws.OPTIMAL_BATCH, drawn)):
        assert law_file.read(_written(tmp_path, laws)) == laws


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("floor =", "flor =", "must have the fields floor, a, b, .* it has flor, a"),
        ("alpha = 0.34\n", "", "must have the fields"),
        ("beta = 0.37", 'beta = "0.37"', "loss.beta = '0.37' must be a number"),
        ("beta = 0.37", "beta = 0", "loss.beta = 0 must be above 0"),
        ("beta = 0.37", "beta = nan", "loss.beta = nan must be a number"),
        ("0.33, 0.38]", "0.33]", "loss.draws = .* must be 5 numbers"),
        ("[1000000000.0, inf]", "1e9", "loss.tokens = 1000000000.0 must be a list"),
        ("[loss]", "[los]", "holds los; its sections are loss, timescale, optimal_batch, critical_batch"),
        ("[loss]", "loss = 3\n[los]", "holds los"),
        ("[loss]", "[loss", "is not valid TOML"),
    ],
)
def test_a_wrong_law_file_is_one_error(tmp_path, old, new, words):
    path = _written(tmp_path, LawFile(loss=LOSS))
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        law_file.read(path)


def test_no_law_file_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match=r"no\.toml does not exist"):
        law_file.read(tmp_path / "no.toml")
    with pytest.raises(UserError, match="holds nothing"):
        law_file.read(_written(tmp_path, LawFile()))


def test_a_critical_batch_that_falls_is_no_law(tmp_path):
    path = _written(tmp_path, LawFile(critical_batch=law_file.PowerLaw(40.0, -0.4, "mine", "fitted")))
    with pytest.raises(UserError, match=r"critical_batch\.exponent = -0\.4 must be above 0 and below 1"):
        law_file.read(path)
