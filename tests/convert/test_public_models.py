"""Public models, their sizes shrunk and every other field as published: imported and exported again, each compared with
transformers, or refused by what is missing. `pytest -m slow` prints the table of docs/conversion.md."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.test_huggingface import RTOL, imported, needs_transformers
from distributed import world

from megahp.convert import huggingface
from megahp.errors import UserError

MODELS = json.loads(Path(__file__).with_name("public_models.json").read_text())
VOCABULARY = 300
SIZES = {
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers"), 8),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), 96),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **{"head_dim": 16, "vocab_size": VOCABULARY, "sliding_window": 7, "num_experts_per_tok": 2},
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with smaller sizes, heads in the same proportion as far as 8 heads go, and token ids that
    the smaller vocabulary has."""
    small = {key: min(value, SIZES[key]) if key in SIZES and value else value for key, value in config.items()}
    heads = next((key for key in ("num_attention_heads", "n_head", "n_heads") if key in config), None)
    if heads:
        groups = config.get("num_key_value_heads") or config[heads]
        small[heads] = 8 if config[heads] > groups else 4
        if config.get("num_key_value_heads"):
            small["num_key_value_heads"] = max(1, small[heads] * groups // config[heads])
    for key, value in config.items():
        if key.endswith("token_id") and value is not None:
            ids = [min(one, VOCABULARY - 1) for one in (value if isinstance(value, list) else [value])]
            small[key] = ids if isinstance(value, list) else ids[0]
        if key in ("layer_types", "no_rope_layers"):
            small[key] = value[:8]
    return small


def outcome(name: str, folder: Path) -> str:
    """Return the last columns of a model's line: how far apart the logits are, imported and exported, or why not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shrunk(MODELS[name]["config"])
    try:
        huggingface.import_(config, {})
    except UserError as error:
        if "tensors of the" not in str(error):  # it has none yet
            return f"refused: {str(error).removeprefix('config.json: ')} | | "
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for weight in theirs.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    model, (ours, weights) = imported(folder)
    hf_config, tensors = huggingface.export(ours, weights)
    (folder / "back").mkdir()
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / "back/model.safetensors", metadata={"format": "pt"})
    (folder / "back/config.json").write_text(json.dumps(hf_config))
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)  # config.json may say bfloat16
        logits = [load(path)(tokens).logits for path in (folder, folder / "back")]
        ours_logits = model(tokens)[..., :VOCABULARY]
    there, back = (((logit - ours_logits).abs().max() / logits[0].abs().max()).item() for logit in logits)
    return f"{there:.1e} | {back:.1e} | {hf_config['model_type']}"


def outcomes(folder: Path) -> dict[str, str]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return {name: outcome(name, folder / str(number)) for number, name in enumerate(MODELS)}


@pytest.mark.slow
@needs_transformers
def test_public_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = world.run_afresh(1, outcomes, tmp_path)[0]
    lines = ["| model | config.json | imported | and exported | as |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {MODELS[name]['source']} | {columns} |" for name, columns in found.items()]
    with capsys.disabled():
        print("\n".join(lines))
    converted = {name: columns for name, columns in found.items() if not columns.startswith("refused")}
    assert len(converted) >= 30
    far = {n: c for n, c in converted.items() if not all(float(x) <= RTOL for x in c.split(" | ")[:2])}
    assert not far
