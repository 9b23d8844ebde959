"""Published measurements of other stacks' steps, each read into the same formulas, to hold predictions against.

published.csv has a row a measurement, with its source; SOURCES says how the rows of each source are read. What a source
does not state, and its code does not tell, leaves its rows out, with a reason.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megahp.config.schema import (
    BatchConfig,
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from megahp.errors import UserError
from megahp.files import read_text
from megahp.plan.machine import Machine, load_machine
from megahp.plan.rank import Stack
from megahp.scaling.flops import training_flops

FILE = Path(__file__).parent / "published.csv"
Row = Mapping[str, str]

GPT: dict[str, Any] = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True}
MEGATRON = Stack(
    states="megatron",
    fused_attention=False,
    dropout=True,
    whole_logits=True,
    hides_reduction=False,
    recomputes_all=True,
)
# of products every second one is kept: torchtitan, selective_ac_option "op"
TITAN = Stack(elementwise="compiled", whole_logits=True, kept_products=0.5)
# nvidia-smi's memory: CUDA context (1.1 to 1.6e9, says bigscience), NCCL's buffers, what the allocator keeps
SMI = (4.5e9, 0.1)
RESERVED = (0.0, 0.1)  # what the allocator keeps
# Jean Zay, as bigscience describes it: of eight GPUs each has half of an Omni-Path adapter of 100 Gb/s
JEAN_ZAY = {"network_bandwidth": 6.25e9}


@dataclass(frozen=True)
class Source:
    """How the rows of one source are read."""

    name: str
    stack: Stack
    model: Mapping[str, Any]  # what the columns do not say
    links: Mapping[str, float] | None = None  # of its cluster, where they are not the machine's
    beside: tuple[float, float] = (0.0, 0.0)  # bytes that its memory counts beside, and a share of what is allocated


SOURCES = {
    "mosaicml/llm-foundry": Source(
        "llm-foundry",
        Stack(states="fsdp", whole_logits=True, reduced_bytes=2, gradient_bytes=4, attention=0.6),
        {**GPT, "tied_embeddings": True},
    ),
    "bigscience-workshop/bigscience@9e64ede train": Source(
        "bigscience-176b",
        replace(MEGATRON, gradient_bytes=2, reduced_bytes=2, whole_stream=True),
        {**GPT, "positions": "alibi", "tied_embeddings": True},
        JEAN_ZAY,
        beside=SMI,
    ),
    "bigscience-workshop/bigscience@9e64ede experiments": Source(
        "bigscience-1b3",
        replace(MEGATRON, gradient_bytes=2, reduced_bytes=2, whole_stream=True),
        {**GPT, "tied_embeddings": True},
        beside=SMI,
    ),
    "huggingface/nanotron": Source(
        "nanotron",
        Stack(states="megatron", elementwise="fused", whole_logits=True, hides_reduction=False, calls_per_block=6),
        {},
    ),
    "pytorch/torchtitan@b5bcd76 benchmarks/llama3_h100": Source("torchtitan-2024", TITAN, {}, beside=RESERVED),
    "pytorch/torchtitan@b5bcd76 benchmarks/asyncTP": Source("torchtitan-2025", TITAN, {}, beside=RESERVED),
    "pytorch/torchtitan@b5bcd76 benchmarks/llama3-8b_h200": Source("torchtitan-h200", TITAN, {}, beside=RESERVED),
    "foundation-model-stack/fms-fsdp": Source(
        "fms-fsdp", Stack(states="fsdp", whole_logits=True, reduced_bytes=2, elementwise="compiled"), {}
    ),
    "calculon-ai/calculon": Source(
        "korthikanti", replace(MEGATRON, gradient_bytes=2, reduced_bytes=2), {**GPT, "tied_embeddings": True}
    ),
    "NVIDIA/Megatron-LM": Source(
        "sc21", replace(MEGATRON, gradient_bytes=2, reduced_bytes=2), {**GPT, "tied_embeddings": True}
    ),
}
MACHINES = {
    "h100_80gb": "h100",
    "H100-80GB": "h100",
    "H100": "h100",
    "a100_80gb": "a100-80",
    "A100-80GB": "a100-80",
    "a100_40gb": "a100-40",
    "V100-32GB": "v100-32",
    "V100-16GB": "v100-16",
    "H100-96GB-HBM2e-500W": "h100-96",
    "H200-141GB": "h200",
    "B200": "b200",
    "MI300X": "mi300x",
    "MI355X": "mi355x",
}


@dataclass(frozen=True)
class Case:
    """A published row as the formulas take it."""

    number: int  # of the row, from 0
    source: str
    gpu: str
    kind: str  # dense, fp8 or moe
    config: Config
    ranks: int
    machine: Machine
    stack: Stack
    seconds: float | None  # of a step
    memory: float | None  # bytes at the peak
    beside: tuple[float, float]  # bytes that its memory counts beside what is allocated, and a share of that
    activations: float | None  # bytes
    out_of_memory: bool

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.batch.global_batch * self.config.data.sequence_length


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file with published.csv's columns. Raises UserError."""
    lines = read_text(path, "file of measurements").splitlines()
    rows = list(csv.DictReader(lines))
    with open(FILE, encoding="utf-8") as file:
        known = next(csv.reader(file))
    if not rows or (missing := [column for column in known if column not in rows[0]]):
        raise UserError(f"{path} has no rows, or lacks columns; it needs {', '.join(known if not rows else missing)}")
    return rows


def read_all(rows: Sequence[Row]) -> tuple[list[Case], dict[int, str]]:
    """Return the rows that can be read, and for each other one, by its number, why not."""
    cases, reasons = [], {}
    for number, row in enumerate(rows):
        try:
            cases.append(read(number, row))
        except (LookupError, ValueError) as error:
            reasons[number] = str(error)
    return cases, reasons


def read(number: int, row: Row) -> Case:
    """Return a row as a case. Raises LookupError or ValueError with the reason why it cannot be read."""
    source = next((each for prefix, each in SOURCES.items() if row["source"].startswith(prefix)), None)
    if source is None:
        raise LookupError("its source states neither recomputation nor micro batch")
    ranks = int(row["gpus"])
    sizes = {axis: int(row[axis]) for axis in ("tp", "pp", "cp", "ep", "dp")}
    if sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"] != ranks:
        raise ValueError("its layout is not of as many GPUs as it states")
    machine = load_machine(MACHINES[row["gpu"]])
    links = replace(machine.links, **source.links or {})
    machine = replace(machine, gpus_per_node=int(row["gpus_per_node"]), links=links)
    precision = row["precision"]
    kind = "fp8" if "8" in precision else "dense"
    stack = _stack_of(source, row)
    config = _config_of(source, row, sizes, stack)
    if kind == "fp8":
        stack = replace(stack, products_dtype="float8")
    value, unit, notes = row["measured_value"], row["measured_unit"], row["notes"]
    failed = value == "OOM"
    return Case(
        number,
        source.name,
        row["gpu"],
        kind,
        config,
        ranks,
        machine,
        stack,
        None if failed or unit.startswith(("GB", "GiB")) else _seconds(config, ranks, float(value), unit, machine),
        _memory(notes),
        source.beside,
        float(value) * 2**30 if unit.startswith("GiB") else None,
        failed,
    )


def _stack_of(source: Source, row: Row) -> Stack:
    """Return the source's stack with what the row says of it."""
    stack, notes = source.stack, row["notes"]
    if _is_rebalanced(source, row) or row["precision"] == "bf16" and source.name == "bigscience-176b":
        stack = replace(stack, gradient_bytes=6, reduced_bytes=4)  # in bfloat16, and summed in float32
    if source.name == "fms-fsdp" and row["recompute"] == "selective":
        mfu, hfu = (float(word) for word in re.findall(r"MFU ([\d.]+) HFU ([\d.]+)", notes)[0])
        stack = replace(stack, recomputed=min(1.0, 3 * (hfu / mfu - 1)))  # "selective" is every n-th block, whole
    if source.name == "nanotron" and row["zero"] == "0":
        stack = replace(stack, hides_reduction=True)
    if source.name == "torchtitan-2024":
        stack = replace(stack, elementwise="eager" if "eager" in notes else "compiled")
    if re.search(r"async ?TP", notes, re.IGNORECASE):
        stack = replace(stack, hidden_tp=0.6)
    return stack


def _is_rebalanced(source: Source, row: Row) -> bool:
    """Return whether a row is of the page's last section: the optimizer for bfloat16, and layers spread over stages
    with embedding and unembedding as a layer each."""
    line = re.match(r"line (\d+)", row["notes"])
    return source.name == "bigscience-176b" and line is not None and int(line[1]) >= 900


def _config_of(source: Source, row: Row, sizes: Mapping[str, int], stack: Stack) -> Config:
    heads, width = int(row["heads"]), int(row["hidden"])
    small = source.name == "nanotron" and int(row["ffn"]) < 10_000
    model = ModelConfig(
        layers=int(row["layers"]),
        width=width,
        heads=heads,
        kv_heads=int(row["kv_heads"]),
        head_size=width // heads,
        mlp_width=int(row["ffn"]),
        vocab_size=int(row["vocab"]),
        **{**source.model, **({"tied_embeddings": True} if small else {})},
    )
    length, micro = int(row["seq"]), int(row["microbatch"])
    stages, pp = int(row["vpp"]), sizes["pp"]
    fsdp = stack.states != "megatron"
    replicate = 1
    if row["zero"] == "hybrid":  # a shard to a node
        replicate = sizes["dp"] // int(row["gpus_per_node"])
    zero = {"hybrid": 3}.get(row["zero"]) or int(row["zero"])
    parallel = ParallelConfig(
        tp=sizes["tp"],
        pp=pp,
        cp=sizes["cp"],
        ep=sizes["ep"],
        dp_replicate=replicate,
        dp_shard=sizes["dp"] // replicate,
        schedule="interleaved" if stages > 1 else "1f1b",
        stages_per_rank=stages if pp > 1 else 0,
        split=_split(source, row, pp * stages) if pp > 1 else (),
        sequence_parallel=source.name in ("nanotron", "torchtitan-2024", "torchtitan-2025")
        or row["notes"].startswith("sequence parallelism"),
        zero=1 if fsdp and pp > 1 else zero,
        reduce="every" if fsdp and pp == 1 else "once",
    )
    if source.name == "torchtitan-2024" and pp > 1:
        micro //= pp  # the column is a rank's batch, and torchtitan's default is as many microbatches as ranks
    recompute = {"none?": "none", "selective?": "selective", "selective per op": "selective"}.get(
        row["recompute"], row["recompute"]
    )
    if source.name == "fms-fsdp" and recompute == "selective":
        recompute = "full"
    if recompute not in ("none", "selective", "full"):
        raise ValueError("its recomputation is not stated")
    dtype = "float16" if row["precision"].startswith("fp16") or "fp16" in row["precision"] else "bfloat16"
    return Config(
        model=model,
        data=DataConfig(sequence_length=length),
        batch=BatchConfig(global_batch=int(row["global_batch"]), micro_batch=micro),
        parallel=parallel,
        compute=ComputeConfig(recompute=recompute),  # type: ignore[arg-type]
        train=TrainConfig(tokens=10**16, dtype=dtype, noise_scale=False),  # type: ignore[arg-type]
    )


def _split(source: Source, row: Row, stages: int) -> tuple[int, ...]:
    """Return the blocks of each stage: equally many, or as DeepSpeed cuts what does not divide."""
    layers = int(row["layers"])
    if source.name == "nanotron":  # balances by cost, as megahp does
        return ()
    if _is_rebalanced(source, row) or "Re-do" in row["notes"] and (layers + 2) % stages == 0:
        each = (layers + 2) // stages  # embedding and unembedding count as a block each
        return (each - 1, *(each,) * (stages - 2), each - 1)
    each = -(-layers // stages)
    full, rest = divmod(layers, each)
    if full + (rest > 0) == stages:
        return (each,) * full + ((rest,) if rest else ())
    more = layers % stages
    return tuple(layers // stages + (index < more) for index in range(stages))


def _seconds(config: Config, ranks: int, value: float, unit: str, machine: Machine) -> float:
    tokens, length = config.batch.global_batch * config.data.sequence_length, config.data.sequence_length
    if unit == "s/step":
        return value
    if unit == "tok/s/GPU":
        return tokens / (value * ranks)
    if unit == "MFU %":  # nanotron's: all of attention's scores counted
        return tokens * training_flops(config.model, length, causal=False) / (ranks * 989e12 * value / 100)
    if unit == "TFLOP/s/GPU incl. recompute":
        flops = training_flops(config.model, length, causal=False, recomputed_layers=config.model.layers)
        return tokens * flops / (ranks * 1e12 * value)
    raise ValueError(f"its unit {unit!r} is not known")


def _memory(notes: str) -> float | None:
    found = re.search(r"(?:peak )?memory (\d+(?:\.\d+)?) ?(GiB|GB)", notes)
    if not found or "ranking" in notes:
        return None
    return float(found[1]) * (2**30 if found[2] == "GiB" else 1e9)
