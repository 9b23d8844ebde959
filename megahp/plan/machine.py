"""What a plan knows of a cluster's GPUs and links: data sheets, and the shares of them that training reaches.

A machine is a TOML file, one of megahp/plan/machines or the user's own, whose every number names its source.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from megahp.errors import UserError
from megahp.files import read_toml

FOLDER = Path(__file__).parent / "machines"
REMEDY = "compare it with one of megahp/plan/machines"


def number(least: float, most: float) -> Any:
    """Return a field whose value lies between two bounds, within which every machine of these years does."""
    return field(metadata={"bounds": (least, most)})


@dataclass(frozen=True)
class Peak:
    """Dense operations a second of the matrix units, a multiply-add as two, by the dtype of their inputs."""

    float32: float = number(1e9, 1e16)
    float16: float = number(1e9, 1e17)
    bfloat16: float = number(1e9, 1e17)
    float8: float = number(0, 1e17)  # 0: there is none


@dataclass(frozen=True)
class Links:
    """Bytes a second that one GPU sends, in one direction, and seconds that a message takes beside."""

    node_bandwidth: float = number(1e7, 1e13)
    node_latency: float = number(1e-8, 1e-2)
    network_bandwidth: float = number(1e6, 1e13)  # a GPU's share of its node's adapters
    network_latency: float = number(1e-7, 1e-1)


@dataclass(frozen=True)
class Best:
    """Shares of the peak that single kernels reach in benchmarks."""

    products: float = number(0.01, 1)  # the best shape
    attention: float = number(0.01, 1)  # FlashAttention 2, long causal sequences, heads of 128


@dataclass(frozen=True)
class Efficiency:
    """Shares that training reaches where nothing else limits it; calibration.py fits them to public measurements."""

    products: float = number(0.01, 2)  # of the best
    attention: float = number(0.01, 2)  # of the best
    memory: float = number(0.01, 1)  # of the bandwidth, as below
    node: float = number(0.01, 1)
    network: float = number(0.01, 1)
    contention: float = number(0, 1)  # share of hidden communication's time that it takes from what hides it


@dataclass(frozen=True)
class Machine:
    """A GPU and the links between many of them."""

    name: str
    peak: Peak
    best: Best
    links: Links
    efficiency: Efficiency
    memory: float = number(1e8, 1e13)  # bytes of a GPU
    memory_bandwidth: float = number(1e8, 1e14)  # bytes a second
    gpus_per_node: int = number(1, 1024)
    units: int = number(1, 100_000)  # multiprocessors, each of which computes one tile of a product at a time
    ramp: int = number(0, 4096)  # of a product's inner dimension: what filling and draining a tile costs
    launch: float = number(0, 1e-2)  # seconds in which the host launches a kernel

    @property
    def usable(self) -> float:
        """Bytes that PyTorch can allocate, without the CUDA context, NCCL's buffers and fragments. (Assumed, after what
        published peaks have beside the formulas')"""
        return 0.97 * self.memory - 2e9


def machine_names() -> list[str]:
    """Return the names of the machines that come with megahp."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_machine(name: str) -> Machine:
    """Return a machine of ours by its name, or of a TOML file by its path. Raises UserError."""
    path = FOLDER / f"{name.lower()}.toml"
    if name.lower() not in machine_names():
        path = Path(name)
        if path.suffix != ".toml":
            raise UserError(f"--cluster {name} is unknown; name a .toml file, or one of {', '.join(machine_names())}")
    tree = read_toml(path, "cluster file")
    return _read(Machine, {"name": path.stem, **tree}, str(path), "")


def _read(kind: Any, tree: Mapping[str, Any], file: str, section: str) -> Any:
    """Return a dataclass whose fields are those of the tree, exactly. Raises UserError for the first that is not."""
    known = {each.name: each for each in fields(kind)}
    for key in tree:
        if key not in known:
            raise UserError(f"cluster file {file}: {section}{key} is not known; choose of {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, hint in get_type_hints(kind).items():
        if key not in tree:
            raise UserError(f"cluster file {file}: {section}{key} is missing; {REMEDY}")
        value = tree[key]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"cluster file {file}: {key} = {value!r} is a section; write [{key}] and its keys below"
                )
            values[key] = _read(hint, value, file, f"{key}.")
        elif hint is str:
            values[key] = str(value)
        else:
            least, most = known[key].metadata["bounds"]
            if isinstance(value, bool) or not isinstance(value, hint if hint is int else int | float):
                kind_of = "a whole number" if hint is int else "a number"
                raise UserError(f"cluster file {file}: {section}{key} = {value!r} must be {kind_of}; {REMEDY}")
            if not (math.isfinite(value) and least <= value <= most):
                between = f"must be between {least:g} and {most:g}"
                raise UserError(f"cluster file {file}: {section}{key} = {value!r} {between}; {REMEDY}")
            values[key] = hint(value)
    return kind(**values)
