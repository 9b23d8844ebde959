"""The table of architectures against transformers' own configuration classes."""

from __future__ import annotations

import pytest

from megahp.convert import huggingface
from megahp.convert.families import DEFAULTS, FAMILIES, REQUIRED, Family
from megahp.errors import UserError

AutoConfig = pytest.importorskip("transformers").AutoConfig
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


@each_family
def test_what_a_config_omits_is_as_transformers_has_it(family: Family) -> None:
    """F16: a key that config.json may omit has the default of the family's own class, or is one that must be as we have
    it, and then the class has it so. (Mixtral's rope_theta is 1e6, Mistral has 8 key-value heads.)"""
    theirs = huggingface._flatten(AutoConfig.for_model(family.model_type).to_dict())
    ours, required = {**DEFAULTS, **family.defaults}, {**REQUIRED, **family.required}
    heads, width = (theirs[family.keys[setting]] for setting in ("heads", "width"))
    derived = {"num_key_value_heads": heads, "head_dim": width // heads, "n_inner": None}
    checked = 0
    for key in {*family.keys.values(), *family.bias_keys, *required} & theirs.keys():
        if key in ours:
            assert theirs[key] == ours[key] or (ours[key] is None and theirs[key] == derived[key]), key
            checked += 1
        elif key in required:
            assert huggingface._matches(theirs[key], required[key]), key
            checked += 1
    assert checked >= 2


@each_family
def test_what_transformers_writes_is_known(family: Family) -> None:
    """Every key of the family's class, of this version of transformers, is used or known to be irrelevant."""
    huggingface._refuse_unknown(family, AutoConfig.for_model(family.model_type).to_dict())


@each_family
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention_scale", 0.5, "attention_scale = 0.5"),
        ("use_rope", False, "use_rope = False"),
        ("logit_softcap", None, "logit_softcap = None"),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [1]}, r"rope_parameters.mrope_section = \[1\]"),
    ],
)
def test_what_is_not_known_is_refused_by_name(family: Family, key: str, value: object, named: str) -> None:
    """F25: also null and false, which may not be the default."""
    with pytest.raises(UserError, match=f"config.json: {named} is not known of {family.model_type} models"):
        huggingface._refuse_unknown(family, {**AutoConfig.for_model(family.model_type).to_dict(), key: value})
