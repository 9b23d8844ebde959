"""Run files as nobody should write them: one that trains in a moment, settings or bytes of it changed at random."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from megahp.config import Config, get_setting
from megahp.config.schema import TYPES, toml_value

RUN = """[model]
layers = 1
width = 16
heads = 2
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 4
micro_batch = 2
[train]
tokens = 256
device = "cpu"
[log]
tensorboard = false
baselines = false
"""
LARGE = ("model", "data", "batch", "train")  # whose defaults are no run of a moment
KEYS = [(section, key) for section, keys in TYPES.items() for key in keys]
NUMBERS = ["0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e-300", "1e300", "1e400", "nan", "inf", "-inf", "9" * 30]
NUMBERS += ["9" * 5000, "9223372036854775808", "0x10", "1_000", "4.0", "1e3", "true", "false"]
WORDS = [
    "",
    "none",
    "auto",
    "all",
    "corpus",
    "..",
    "../corpus",
    "/dev/zero",
    "/dev/null",
    ".",
    "a/b",
    "~",
    "a b",
    "größe",
]
WORDS += [
    "a\nb",
    "a\0b",
    "\ud800",
    "x" * 300,
    "s3://b/x",
    "$(touch owned)",
    "`touch owned`",
    "-n",
    "%n",
    "{0}",
    "1",
    "true",
]
WORDS += [
    "llama-3-8b",
    "muon",
    "adamw",
    "wsd",
    "linear",
    "measured",
    "noise-scale",
    "table",
    "ramp",
    "rope",
    "moe",
    "bytes",
]
OTHERS = ["[]", "[[]]", "{}", "[1, 2]", '["corpus"]', '["corpus", "corpus"]', "[0.5, 0.5]", "1979-05-27", "07:32:00"]
OTHERS += ["[" * 700 + "]" * 700, '["16:32"]', '["0:8", "64:16"]', '["64:16", "0:8"]', '[":"]', '["a:b"]', "'''a'''"]


@dataclass(frozen=True)
class Mutant:
    text: bytes
    what: str  # was changed, in words


def value(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(NUMBERS)
    if kind < 0.8:
        return json.dumps(draw.choice(WORDS), ensure_ascii=draw.random() < 0.5)
    return draw.choice(OTHERS)


def mutant(draw: random.Random) -> Mutant:
    """One to three settings set, or the text itself spoilt."""
    lines = RUN.splitlines()
    if draw.random() < 0.2:
        return _spoilt(draw)
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        section, key = draw.choice(KEYS)
        key = key if draw.random() < 0.97 else draw.choice((key + "s", key.upper(), "", "a.b", '"ä"'))
        line = f"{key} = {value(draw)}"
        if (section, key) in KEYS and section not in LARGE and draw.random() < 0.3:  # most others are refused
            line = f"{key} = {toml_value(get_setting(Config(), f'{section}.{key}'))}"
        header = f"[{section}]"
        lines = [each for each in lines if not each.startswith(f"{key} = ") or draw.random() < 0.03]
        if header not in lines:
            lines.append(header)
        lines.insert(lines.index(header) + 1, line)
        done.append(f"{section}.{line}"[:90])
    return Mutant("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n", "; ".join(done))


def _spoilt(draw: random.Random) -> Mutant:
    data = bytearray(RUN.encode())
    how = draw.choice(("cut", "flip", "insert", "repeat", "encode", "nest", "header", "empty"))
    place = draw.randrange(len(data))
    if how == "cut":
        del data[place:]
    elif how == "flip":
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "insert":
        data[place:place] = draw.randbytes(draw.choice((1, 4, 100)))
    elif how == "repeat":
        data *= 2
    elif how == "encode":
        data = bytearray(RUN.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig"))))
    elif how == "nest":
        data += b"a" + b".a" * draw.choice((10, 3000)) + b" = 1\n"
    elif how == "header":
        data += draw.choice(
            (b"[model.layers]\n", b"[[model]]\n", b"[x]\n", b"[model]\n", b"['']\n", b"[log]\nname=1\n")
        )
    else:
        data = bytearray(draw.choice((b"", b"\n", b"\0", b"# nothing\n", b"{}", b"null", b"[]")))
    return Mutant(bytes(data), how)


def settings_of(tree: Any) -> dict[str, Any]:
    """section.key -> value, of a parsed run file."""
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
