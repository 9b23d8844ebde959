"""Files as nobody should write them: good ones with bytes, JSON values or the whole of them replaced at random."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

from megahp.checkpoint.store import write_manifest

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    -(2**63),
    1e308,
    "",
    "a",
    "../../x",
    "/etc/passwd",
    "\ud800",
    "a\0b",
]
VALUES += [[], [[]], {}, {"a": {}}, [1, 2, 3], ["a"], "9" * 400, [0] * 300, float("nan"), float("inf"), "2", "true"]


class Canary:
    """Unpickled, it makes a folder here."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def spoil(path: Path, draw: random.Random) -> str:
    """Make something else of a file, and return what in words."""
    good = path.read_bytes()
    ways = ["json"] * 6 if path.suffix in (".json", ".jsonl") else ["settings"] * 4 if path.suffix == ".toml" else []
    ways += ["cut", "flip", "flip", "insert", "noise", "whole"]
    how = draw.choice(ways)
    data = bytearray(good)
    if how == "json":
        return _in_json(path, draw)
    if how == "settings":
        return _in_toml(path, draw)
    if how == "whole":
        return _whole(path, draw)
    if how == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif how == "flip":
        for _ in range(draw.choice((1, 1, 5, 100))):
            place = draw.randrange(min(len(data), draw.choice((64, 4096, 1 << 30)))) if data else 0
            data[place : place + 1] = bytes([draw.randrange(256)])
    elif how == "insert":
        place = draw.randrange(len(data) + 1)
        data[place:place] = draw.randbytes(draw.choice((1, 8, 500)))
    else:
        data = bytearray(draw.randbytes(draw.choice((1, 40, 4000))))
    path.write_bytes(data)
    return how


def _whole(path: Path, draw: random.Random) -> str:
    path.unlink()
    how = draw.choice(("gone", "folder", "pipe", "zeros", "loop", "sparse", "empty", "pickle", "deep", "closed", "nul"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "zeros":
        path.symlink_to("/dev/zero")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 36)
    elif how == "empty":
        path.touch()
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Canary()))
    elif how == "deep":
        path.write_text(draw.choice(('{"a":', "[")) * 100_000)
    elif how == "closed":
        path.write_text("x")
        path.chmod(0)
    elif how == "nul":
        path.write_bytes(b"\0" * 3000)
    return how


def _changed(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """The tree with one of its nodes replaced, taken out, doubled or renamed."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                nodes.append((node, key))
                walk(node[key])

    walk(tree)
    if not nodes or draw.random() < 0.05:
        return draw.choice(VALUES), "the whole"
    # the fewer of their kind the likelier: not only one of a thousand weights
    node, key = draw.choice(nodes if draw.random() < 0.5 else nodes[:40])
    how = draw.random()
    if how < 0.15:
        del node[key]
    elif how < 0.25 and isinstance(node, dict):
        node[draw.choice(("x", "", "../x", "__class__"))] = node.pop(key)
    else:
        node[key] = draw.choice(VALUES)
    return tree, f"{key} = {node.get(key) if isinstance(node, dict) else '...'}"[:80]


def _in_json(path: Path, draw: random.Random) -> str:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = draw.choice((0, len(lines) - 1, draw.randrange(len(lines))))
    tree, what = _changed(json.loads(lines[place]), draw)
    lines[place] = json.dumps(tree)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return what


def _in_toml(path: Path, draw: random.Random) -> str:
    lines = path.read_text().splitlines()
    places = [number for number, line in enumerate(lines) if " = " in line]
    place = draw.choice(places)
    value = draw.choice(("1", "-1", "nan", "1e400", '""', '"x"', "[]", "[[1]]", "{}", "true", "9" * 400, "{a = {}}"))
    lines[place] = f"{lines[place].partition(' = ')[0]} = {value}"
    path.write_text("\n".join(lines) + "\n")
    return lines[place][:80]


def reseal(checkpoint: Path) -> bool:
    """Make the manifest of a checkpoint agree with its files, where that can be done."""
    try:
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
    except (OSError, shutil.Error):
        return False
    return True
