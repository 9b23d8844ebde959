"""F1's kin: no command's output takes the place of a file that megahp did not write."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from megahp import cli
from megahp.commands.output import check_outputs, check_replaceable, write_json
from megahp.errors import UserError
from megahp.recipe.law_file import LawFile, write
from megahp.report.figures import plot_in

RECIPE = "recipe --params 1e7 --tokens 2e8"


@pytest.mark.parametrize(
    "words",
    [
        f"{RECIPE} --out precious --overwrite",
        "fit runs.jsonl --loss --out precious",
        "fit runs.jsonl --loss --out runs.jsonl",
        "fit runs.jsonl --loss --out law.toml --plot precious.svg",
        f"{RECIPE} --target-loss 3 --pareto precious.png",
        "plan run.toml --ranks 1 --json precious",
        "benchmark norm --json precious",
        "evaluate-tasks run tasks --json precious",
        "forecast run text.txt --output precious",
        "merge part --output precious --overwrite",
    ],
)
def test_a_file_of_others_is_kept(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [(params, tokens) for params in (1e5, 1e6, 1e7) for tokens in (1e7, 1e8, 1e9)]
    rows = ({"parameters": n, "tokens": d, "loss": 1.7 + 10 / n**0.34 + 10 / d**0.28} for n, d in sizes)
    Path("runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.toml").write_text("[model]\nvocab_size = 300\n")
    Path("text.txt").write_text("text")
    assert (
        cli.main(["preprocess", "--input", "text.txt", "--output", "part", "--tokenizer", "bytes", "--workers", "1"])
        == 0
    )
    for name in ("precious", "precious.svg", "precious.png", "precious.json"):
        Path(name).write_text('{"mine": "megahpx"}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert cli.main(words.split()) == 2
    assert "would replace '" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_megahp_wrote_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("svg", "png", "pdf"):
        with plot_in(Path(f"a.{suffix}"), 2, 2) as figure:
            figure.add_subplot().plot([1, 2])
        check_outputs(Namespace(plot=Path(f"a.{suffix}")))
    write_json(Path("a.json"), {"rows": []})
    check_outputs(Namespace(json=Path("a.json"), plot=None))
    write(Path("law.toml"), LawFile())
    for _ in range(2):
        assert cli.main(f"{RECIPE} --out run.toml --overwrite".split()) == 0


def test_an_input_is_known_by_any_name(tmp_path: Path) -> None:
    """It is of megahp here: that does not help."""
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "c")
    for output in "abc":
        for read in "abc":
            with pytest.raises(UserError, match=f"--out would replace .*/{output}', which is the input .*/{read}'"):
                check_replaceable("--out", {tmp_path / output: lambda _: True}, [tmp_path / read])
