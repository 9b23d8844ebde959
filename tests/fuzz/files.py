"""Files as nobody should write them: good ones, each made wrong in one way."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

from megahp.checkpoint.store import write_manifest

# what is in the place of a value, by the way in which it is wrong
VALUES: dict[str, list[Any]] = {
    "type": [None, True, 1.5, "a", "", "2", "true", [], [[]], {}, {"a": {}}, [1, 2, 3], ["a"], [0] * 300],
    "number": [
        0,
        -1,
        1e-300,
        10**30,
        -(2**63),
        2**63 - 1,
        2**40,
        1e308,
        float("nan"),
        float("inf"),
        "9" * 400,
        10**400,
    ],
    "path": ["../../x", "/etc/passwd", "/dev/zero", "..", "a/b", "~", "x" * 300, "s3://b/x", "a\0b", "\ud800", "$(id)"],
}
WAYS = (*VALUES, "structure", "bytes", "truncated", "irregular", "hostile")
LIMITS = [0, -1, 1, 2**31 - 1, 2**40, 2**62, 2**63 - 1, -(2**63)]  # for numbers of eight bytes
PICKLED = (".pt", ".distcp", ".metadata")


class Canary:
    """Unpickled, it makes a folder here."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def spoil(path: Path, draw: random.Random, way: str) -> str:
    """Make a file wrong in a way, and return how in words."""
    if way == "irregular":
        return _irregular(path, draw)
    if way == "hostile":
        return _hostile(path, draw)
    if way == "truncated":
        return _truncated(path, draw)
    if way != "bytes":
        if path.suffix == ".toml":
            return _in_toml(path, draw, way)
        if path.suffix in (".json", ".jsonl"):
            return _in_json(path, draw, way)
        if path.suffix == ".safetensors":
            return _in_safetensors(path, draw, way)
        if way in VALUES:
            return _in_another(path, draw, way)
    return _bytes(path, draw)


def _bytes(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    how = draw.choice(("flip", "flip", "insert", "noise", "twice"))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 5, 100))):
            place = draw.randrange(min(len(data), draw.choice((64, 4096, 1 << 30)))) if data else 0
            data[place : place + 1] = bytes([draw.randrange(256)])
    elif how == "insert":
        place = draw.randrange(len(data) + 1)
        data[place:place] = draw.randbytes(draw.choice((1, 8, 500)))
    elif how == "noise":
        data = bytearray(draw.randbytes(draw.choice((1, 40, 4000))))
    else:
        data *= 2
    path.write_bytes(data)
    return how


def _truncated(path: Path, draw: random.Random) -> str:
    how, size = draw.choice(("cut", "cut", "last byte", "empty", "gone")), path.stat().st_size
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, {"cut": draw.randrange(size + 1), "last byte": max(size - 1, 0), "empty": 0}[how])
    return how


def _irregular(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    path.unlink()
    how = draw.choice(("folder", "pipe", "pipe", "link to a pipe", "socket", "zeros", "loop", "nowhere", "sparse"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to a pipe":
        os.mkfifo(path.parent / "a-pipe")
        path.symlink_to("a-pipe")
    elif how == "socket":
        with chdir(path.parent), socket.socket(socket.AF_UNIX) as server:  # names of sockets are short
            server.bind(path.name)
    elif how == "zeros":
        path.symlink_to("/dev/zero")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "nowhere":
        path.symlink_to("nowhere")
    else:
        with path.open("wb") as file:
            file.truncate(draw.choice((1 << 36, size)))
    return how


def _hostile(path: Path, draw: random.Random) -> str:
    text = path.read_bytes()
    how = draw.choice(("pickle", "pickle", "deep", "nul", "long", "encoded", "closed"))
    if how == "pickle" and (path.suffix in PICKLED or draw.random() < 0.3):
        torch.save({"model": Canary()}, path) if draw.random() < 0.5 else path.write_bytes(pickle.dumps(Canary()))
    elif how in ("pickle", "deep"):
        deep = draw.choice(('{"a":', "[")) * 100_000
        how = "deep"
        path.write_bytes(gzip.compress(deep.encode())) if path.suffix == ".gz" else path.write_text(deep)
    elif how == "nul":
        path.write_bytes(b"\0" * 3000)
    elif how == "long":
        path.write_bytes(b'"' + b"a" * (1 << 21))  # as a text it is valid, and evaluated within 30 s
    elif how == "encoded":
        path.write_bytes(text.decode("latin-1").encode(draw.choice(("utf-16", "utf-32", "utf-8-sig"))))
    else:
        path.chmod(0)
    return how


def _changed(tree: Any, draw: random.Random, way: str) -> tuple[Any, str]:
    """The tree with one of its nodes replaced; in the way "structure" taken out, renamed, or in another's place."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                nodes.append((node, key))
                walk(node[key])

    walk(tree)
    if not nodes or draw.random() < 0.05:
        return draw.choice(VALUES[way if way in VALUES else "type"]), "the whole"
    # the fewer of their kind the likelier: not only one of a thousand weights
    node, key = draw.choice(nodes if draw.random() < 0.5 else nodes[:40])
    how = draw.random()
    if way in VALUES:
        node[key] = draw.choice(VALUES[way])
    elif how < 0.4:
        del node[key]
    elif how < 0.7 and isinstance(node, dict):
        node[draw.choice(("x", "", "../x", "__class__"))] = node.pop(key)
    else:
        other, its = draw.choice(nodes)
        node[key] = copy.deepcopy(other[its])
    return tree, f"{key} = {node.get(key) if isinstance(node, dict) else '...'}"[:80]


def _in_json(path: Path, draw: random.Random, way: str) -> str:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = draw.choice((0, len(lines) - 1, draw.randrange(len(lines))))
    tree, what = _changed(json.loads(lines[place]), draw, way)
    lines[place] = json.dumps(tree)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return what


def _in_safetensors(path: Path, draw: random.Random, way: str) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    tree, what = _changed(json.loads(data[8 : 8 + length]), draw, way)
    header = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return what


def _in_toml(path: Path, draw: random.Random, way: str) -> str:
    lines = path.read_text().splitlines()
    place = draw.choice([number for number, line in enumerate(lines) if " = " in line])
    key = lines[place].partition(" = ")[0]
    value = draw.choice(VALUES[way if way in VALUES else "type"])
    if way == "structure":
        line = draw.choice(
            ("", lines[place] + "\n" + lines[place], f"x.{key} = 1", f"[{key}]", f"[[{key}]]", f"{key} =")
        )
    elif isinstance(value, float | int) and not isinstance(value, bool):
        line = f"{key} = {value!r}"
    else:
        line = f"{key} = {'{a = {}}' if isinstance(value, dict) else json.dumps(value).replace('null', '[[1]]')}"
    lines[place] = line
    path.write_text("\n".join(lines) + "\n")
    return line[:80]


def _in_another(path: Path, draw: random.Random, way: str) -> str:
    """A pickle of another value, a line of text that is one, or a number of eight bytes."""
    value, data = draw.choice(VALUES[way]), bytearray(path.read_bytes())
    if path.suffix in PICKLED or path.name in PICKLED:
        packed = io.BytesIO()
        if draw.random() < 0.5:
            torch.save(value, packed)  # not to the path: it refuses a name that begins with a dot
        else:
            pickle.dump(value, packed)
        path.write_bytes(packed.getvalue())
        return f"a pickle of {value!r}"[:80]
    if len(data) < 8:
        return _bytes(path, draw)
    if data.isascii() and b"\0" not in data:
        lines = data.decode().splitlines()
        lines[draw.randrange(len(lines))] = line = str(value).encode(errors="replace").decode()
        path.write_text("\n".join(lines) + "\n")
        return line[:80]
    # headers are where numbers matter; that of an index is not aligned
    place = 8 * draw.randrange(min(len(data) // 8, draw.choice((8, 64, 1 << 30)))) + draw.choice((0, 1, 2))
    place, number = min(place, len(data) - 8), draw.choice(LIMITS)
    struct.pack_into("<q", data, place, number)
    path.write_bytes(data)
    return f"{number} at byte {place}"


def reseal(checkpoint: Path) -> bool:
    """Make the manifest of a checkpoint agree with its files, where that can be done."""
    try:
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
    except (OSError, shutil.Error):
        return False
    return True
