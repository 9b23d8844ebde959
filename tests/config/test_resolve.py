"""Where a setting's value comes from, and which values are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megahp.config import config_to_dict, resolve
from megahp.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve.load(write(folder, text), overrides)
    return str(caught.value).splitlines()


def test_command_line_wins_over_file_over_preset_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npreset = "llama-3-8b"\nlayers = 3\n[train]\ntokens = 1e8\n')
    resolved = resolve.load(path, ["model.layers=5", "log.name=first"])
    assert (resolved.config.model.layers, resolved.origins["model.layers"]) == (5, "command line")
    assert (resolved.config.model.kv_heads, resolved.origins["model.kv_heads"]) == (8, "preset llama-3-8b")
    assert (resolved.config.train.tokens, resolved.origins["train.tokens"]) == (100_000_000, "run.toml")
    assert (resolved.config.optimizer.beta2, resolved.origins["optimizer.beta2"]) == (0.95, "default")
    assert resolved.origins["model.head_size"].startswith("derived")
    assert resolved.config.log.name == "first"


def test_lengths_that_double_after_equal_shares(tmp_path: Path) -> None:
    words = ["data.sequence_length=64", 'data.lengths=["doubling:3"]', "train.tokens=10002", "batch.global_batch=8"]
    found = resolve.load(write(tmp_path, ""), words)
    assert found.config.data.lengths == ("2500:128", "5001:256", "7501:512")
    assert found.origins["data.lengths"] == "derived from doubling:3 and train.tokens"
    assert resolve.from_dict(config_to_dict(found.config), "again") == found.config
    for word in ("doubling:0", "doubling", "doubling:3,1e6:8"):
        (problem,) = problems_of(tmp_path, "", f'data.lengths=["{word}"]')
        assert "is not tokens:length" in problem


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        ((), (704, 704)),
        (("model.mlp_width=96",), (96, 96)),
        (("model.expert_width=96",), (96, 96)),
        (("model.expert_width=96", "model.dense_layers=1"), (704, 96)),
        (("model.expert_width=96", "model.dense_layers=1", "model.mlp_width=128"), (128, 96)),
    ],
)
def test_the_widths_of_experts_and_mlps(tmp_path: Path, words: tuple[str, ...], widths: tuple[int, int]) -> None:
    found = resolve.load(write(tmp_path, "[model]\nexperts = 4\n"), words).config
    assert (found.model.mlp_width, found.model.expert_width) == widths
    assert resolve.from_dict(config_to_dict(found), "again") == found


def test_all_problems_are_reported_at_once_each_with_key_value_and_remedy(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        '[model]\nlyers = 3\nwidth = "wide"\nbias = 1\n[train]\ndtype = "fp8"\ntokens = 0.5\n[optimser]\nlr = 1\n',
        "optimizer.lr=-1",
        "parallel.pp=0",
    )
    message = "\n".join(found)
    assert len(found) == 8
    for words in (
        "model.lyers = 3",
        "did you mean layers",
        "model.width = 'wide'",
        "whole number",
        "true or false",
        "float32, bfloat16, float16, float64",
        "[optimser]",
        "did you mean optimizer",
        "optimizer.lr = -1.0",
        "above 0",
        "parallel.pp = 0",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[train]\nstart_from = "a\\u0000b"\n',
            "train.start_from = 'a\\x00b' (run.toml) must not contain a NUL character",
        ),
        ('[data]\ntrain = ["a\\u0000b"]\n', "must not contain a NUL character"),
        ("[optimizer]\neps = 1e-300\n", "optimizer.eps = 1e-300 (run.toml) must be at least 1e-30"),
        ("[model]\nnorm_eps = 1e-39\n", "model.norm_eps = 1e-39 (run.toml) must be at least 1e-30"),
    ],
)
def test_values_that_nothing_can_use(tmp_path: Path, text: str, problem: str) -> None:
    """Found by tests/fuzz: a name that no system call takes, a number that is 0 in float32."""
    assert problem in problems_of(tmp_path, text)[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.positions=alibi", "model.rope_theta=500"], ["model.rope_theta", "no effect", "rope"]),
        (["parameterization.name=sp", "parameterization.base_width=64"], ["parameterization.base_width", "no effect"]),
        (["model.preset=lama-3-8b"], ["lama-3-8b", "llama-3-8b"]),
        (["parallel.ep=2"], ["parallel.ep = 2", "model.experts = 0", "needs at least 1"]),
        (["model.balance_rate=0.1"], ["model.balance_rate = 0.1", "model.experts = 0"]),
        (["--rank", "2"], ["--rank"]),
        (
            ["compute.fp4_forward=mxfp4", "compute.fp4_tensor_scale=none"],
            ["compute.fp4_tensor_scale = 'none'", "no effect", "fp4_forward = 'mxfp4'", "needs nvfp4 or ue5m3"],
        ),
        (["compute.fp4_stochastic=true"], ["compute.fp4_stochastic = True", "no effect", "fp4_backward = 'none'"]),
        (["batch.critical_batch=[90, 0.5]"], ["batch.critical_batch = (90.0, 0.5)", "no effect", "law"]),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    message = "\n".join(problems_of(tmp_path, "", *overrides))
    assert all(word in message for word in words), message


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.toml does not exist"):
        resolve.load(tmp_path / "nowhere.toml")
    assert "not valid TOML" in problems_of(tmp_path, "[model\n")[0]


def test_paths_beside_a_run_file(tmp_path: Path) -> None:
    """F22: {here} is the run file's folder, at the beginning of a text; in another place it is an ordinary text."""
    (tmp_path / "run.toml").write_text('[data]\ntokenizer = "{here}/tokenizer.json"\n[log]\nname = "a{here}"\n')
    config = resolve.load(tmp_path / "run.toml", ["train.start_from={here}"]).config
    assert config.data.tokenizer == f"{tmp_path}/tokenizer.json"
    assert (config.log.name, config.train.start_from) == ("a{here}", "{here}")
    (tmp_path / "run.toml").write_text("train = 3\n")
    with pytest.raises(UserError, match="train = 3"):
        resolve.load(tmp_path / "run.toml")
