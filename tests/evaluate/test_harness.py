"""Tasks on imported models, beside lm-evaluation-harness' own Hugging Face backend on what is exported of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import write_task

FLOAT64 = "train.dtype=float64"
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 500.0},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True, "hidden_act": "gelu"},
}
TEXTS = [Path(json.__file__).read_text()[:400], "Ein Satz, und noch einer. " * 9, "x"]
QUESTIONS = [("The sky is", [" blue", " green", " a fish"], 0), ("1 + 1 =", [" 2", " 3"], 0), ("", ["yes", "no"], 1)]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "likelihood": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0][:1]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
}


def write_tasks(folder: Path) -> Path:
    rows = [{"question": question, "choices": few, "answer": n} for question, few, n in QUESTIONS]
    folder.mkdir()
    for name, text in TASKS.items():
        write_task(folder, name, [{"text": t} for t in TEXTS] if name == "rolling" else rows, text)
    return folder


def write_model(folder: Path, model_type: str) -> None:
    """Write a random model of transformers, with a byte-level tokenizer; of NeoX without a begin token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if model_type != "gpt_neox":
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        names |= {"bos_token": "<s>", "add_bos_token": True}
    ids = {"eos_token_id": 0, "bos_token_id": None if model_type == "gpt_neox" else 1, "pad_token_id": None}
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 64, **ids}
    config = AutoConfig.for_model(model_type, **SIZES, **sizes, **MODELS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def megahp(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "megahp", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def table_of_the_harness(folder: Path, tasks: Path) -> dict[str, Any]:
    """Evaluate a folder by the harness' own backend, as a user does."""
    out = folder.parent / "harness"
    words = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float64", "--tasks", ",".join(TASKS)]
    words += ["--include_path", tasks, "--device", "cpu", "--output_path", out, "--batch_size", "1"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.rglob("results*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed: docs/evaluation.md")
@pytest.mark.parametrize("model_type", MODELS)
def test_an_imported_model_scores_as_its_export_does_in_the_harness(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F21: to all printed digits, begin tokens included."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    write_model(tmp_path / "theirs", model_type)
    megahp("convert", "--from", "huggingface", "--to", "megahp", tmp_path / "theirs", tmp_path / "ours", FLOAT64)
    words = ("--architecture", model_type)
    megahp("convert", "--from", "megahp", "--to", "huggingface", *words, tmp_path / "ours", tmp_path / "back")
    tasks = write_tasks(tmp_path / "tasks")
    megahp("evaluate-tasks", tmp_path / "ours", tasks, "--json", tmp_path / "out.json")
    ours = json.loads((tmp_path / "out.json").read_text())["results"]
    theirs = table_of_the_harness(tmp_path / "back", tasks)
    measured = {
        (task, key): (ours[task][key], value)
        for task in TASKS
        for key, value in theirs[task].items()
        if key.endswith(",none") and isinstance(value, float) and "stderr" not in key
    }
    assert len(measured) >= 6
    print(model_type, *(f"{task} {key}: {a:.6f} {b:.6f}" for (task, key), (a, b) in measured.items()), sep="\n  ")
    # the harness prints four decimals; both compute in float64, but for norms, which transformers has in float32
    assert all(abs(a - b) < 1e-4 for a, b in measured.values()), measured
