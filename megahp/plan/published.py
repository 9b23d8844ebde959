"""Published measurements of other stacks' steps, each read into the same formulas, to hold predictions against.

published.csv has a row a measurement, with its source. SOURCES says how the rows of each source are read: what its
stack does differently from megahp, by its code or page, and what its columns mean. Values that only its rows support
say "by its rows". A row that does not state what the
formulas need is left out, with the reason.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megahp.config import schema
from megahp.config.schema import Config
from megahp.errors import UserError
from megahp.files import read_text
from megahp.plan.machine import Machine, load_machine, machine_names
from megahp.plan.rank import Stack
from megahp.scaling.flops import parameters, training_flops

FILE = Path(__file__).parent / "published.csv"
Row = Mapping[str, str]

RECOMPUTE = {"none?": "none", "selective?": "selective", "selective per op": "selective"}  # as its source's code has it


@dataclass(frozen=True)
class Source:
    """How the rows of one source are read."""

    name: str
    stack: Stack
    model: Mapping[str, Any] = field(default_factory=dict)  # settings that no column has
    sequence_parallel: bool = False
    balanced: bool = False  # blocks are spread over stages by their cost
    batch_of_rank: bool = False  # under pipelines the column microbatch is a rank's batch, cut into as many as ranks
    links: Mapping[str, float] = field(default_factory=dict)  # of its cluster, where they are not the machine's
    beside: tuple[float, float] = (0.0, 0.0)  # bytes that its memory counts beside, and a share of what is allocated
    row: Callable[[Row], dict[str, Any]] = lambda row: {}  # what a row says of the stack


def _of_bigscience(row: Row) -> dict[str, Any]:
    """In bfloat16 gradients are summed in float32, beside those in half precision."""
    wide = _has_embedding_layers(row) or row["precision"] == "bf16"
    return {"gradient_bytes": 6, "reduced_bytes": 4} if wide else {}


def _of_fms(row: Row) -> dict[str, Any]:
    """Its selective recomputation is of every n-th block, whole; HFU over MFU says of how many."""
    if row["recompute"] != "selective":
        return {}
    mfu, hfu = (float(word) for word in re.findall(r"MFU ([\d.]+) HFU ([\d.]+)", row["notes"])[0])
    return {"recomputed": min(1.0, 3 * (hfu / mfu - 1))}


def _of_titan(row: Row) -> dict[str, Any]:
    return {
        "elementwise": "eager" if "eager" in row["notes"] else "compiled",
        # by its rows
        "hidden_tp": 0.6 if re.search(r"async ?TP", row["notes"], re.IGNORECASE) else 0.0,
    }


GPT = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True}
MEGATRON = Stack(
    states="megatron",
    fused_attention=False,
    dropout=True,
    whole_logits=True,
    hides_reduction=False,
    recomputes_all=True,
    gradient_bytes=2,
    reduced_bytes=2,
)
DEEPSPEED = replace(MEGATRON, whole_stream=True)
# of products every second one is kept: selective_ac_option "op"
TITAN = Stack(elementwise="compiled", whole_logits=True, kept_products=0.5)
# calls: by its rows
NANOTRON = Stack(states="megatron", elementwise="fused", whole_logits=True, hides_reduction=False, calls_per_block=6)
FSDP = Stack(states="fsdp", whole_logits=True, reduced_bytes=2)
JEAN_ZAY = {"network_bandwidth": 6.25e9}  # four Omni-Path adapters of 100 Gb/s for eight GPUs
# What nvidia-smi counts, by its rows: the CUDA context (1.1 to 1.6e9, says bigscience), NCCL's buffers, what is cached.
SMI = (4.5e9, 0.1)
RESERVED = (0.0, 0.1)  # what the allocator keeps, by its rows
SOURCES = {  # the column source begins with
    # attention: Triton's, of FlashAttention 1; by its rows
    "mosaicml/llm-foundry": Source("llm-foundry", replace(FSDP, attention=0.6), GPT),
    "bigscience-workshop/bigscience@9e64ede train": Source(
        "bigscience-176b", DEEPSPEED, {**GPT, "positions": "alibi"}, links=JEAN_ZAY, beside=SMI, row=_of_bigscience
    ),
    "bigscience-workshop/bigscience@9e64ede experiments": Source("bigscience-1b3", DEEPSPEED, GPT, beside=SMI),
    "huggingface/nanotron": Source(
        "nanotron",
        NANOTRON,
        sequence_parallel=True,
        balanced=True,
        row=lambda row: {"hides_reduction": row["zero"] == "0"},  # without ZeRO, by hooks of the backward pass
    ),
    "pytorch/torchtitan@b5bcd76 benchmarks/llama3_h100": Source(
        "torchtitan-2024", TITAN, sequence_parallel=True, batch_of_rank=True, beside=RESERVED, row=_of_titan
    ),
    "pytorch/torchtitan@b5bcd76 benchmarks/asyncTP": Source(
        "torchtitan-2025", TITAN, sequence_parallel=True, beside=RESERVED, row=_of_titan
    ),
    "pytorch/torchtitan": Source("torchtitan-h200", TITAN, beside=RESERVED),
    "foundation-model-stack/fms-fsdp": Source("fms-fsdp", replace(FSDP, elementwise="compiled"), row=_of_fms),
    "calculon-ai/calculon": Source("korthikanti", MEGATRON, GPT),
    "NVIDIA/Megatron-LM": Source("sc21", MEGATRON, GPT),
}
OTHERS = {  # sources that are not listed, by ZeRO level
    "3": Source("other", replace(FSDP, elementwise="compiled")),
    "0": Source("other", Stack(states="megatron", elementwise="fused", whole_logits=True), sequence_parallel=True),
}


@dataclass(frozen=True)
class Case:
    """A published row as the formulas take it."""

    number: int  # of the row, from 0
    source: str
    gpu: str
    kind: str  # dense, or fp8: of products
    config: Config
    ranks: int
    machine: Machine
    stack: Stack
    seconds: float | None  # of a step
    memory: float | None  # bytes at the peak
    beside: tuple[float, float]  # bytes that its memory counts beside what is allocated, and a share of that
    activations: float | None  # bytes
    out_of_memory: bool


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file with published.csv's columns. Raises UserError."""
    rows = list(csv.DictReader(read_text(path, "file of measurements").splitlines()))
    with open(FILE, encoding="utf-8") as file:
        known = next(csv.reader(file))
    missing = [column for column in known if not rows or rows[0].get(column) is None]
    if missing:
        raise UserError(f"{path} has no rows with the columns {', '.join(missing)}; add them, as in {FILE}")
    return rows


def read_all(rows: Sequence[Row]) -> tuple[list[Case], dict[int, str]]:
    """Return the rows that can be read, and for each other one, by its number, why not."""
    cases, reasons = [], {}
    for number, row in enumerate(rows):
        try:
            cases.append(read(number, row))
        except (LookupError, ValueError, ZeroDivisionError, UserError) as error:
            reasons[number] = str(error)
    return cases, reasons


def read(number: int, row: Row) -> Case:
    """Return a row as a case. Raises LookupError or ValueError with the reason why it cannot be read."""
    if "MoE" in row["notes"] or whole(row, "ep") > 1:
        raise ValueError("its experts are in no column")
    other = OTHERS["3" if row["zero"] in ("3", "hybrid") else "0"]
    source = next((each for prefix, each in SOURCES.items() if row["source"].startswith(prefix)), other)
    gpu = row["gpu"].lower().replace("_", "-")
    name = max((each for each in machine_names() if gpu.startswith(each)), key=len, default="")
    if not name:
        raise ValueError("its GPU has no machine file")
    machine = load_machine(name)
    links = replace(machine.links, **source.links)
    machine = replace(machine, gpus_per_node=whole(row, "gpus_per_node"), links=links)
    kind = "fp8" if "8" in row["precision"] else "dense"
    stack = replace(source.stack, products_dtype="float8" if kind == "fp8" else "", **source.row(row))
    config, ranks = _config_of(source, row), whole(row, "gpus")
    failed, unit = row["measured_value"] == "OOM", row["measured_unit"]
    peak = re.search(r"memory (\d+(?:\.\d+)?) ?(GiB|GB)", row["notes"])
    return Case(
        number,
        source.name,
        row["gpu"],
        kind,
        config,
        ranks,
        machine,
        stack,
        None if failed or not row["measured_value"] or unit.startswith(("GB", "GiB")) else _seconds(row, config, ranks),
        float(peak[1]) * (2**30 if peak[2] == "GiB" else 1e9) if peak else None,
        source.beside,
        float(row["measured_value"]) * 2**30 if unit.startswith("GiB") else None,
        failed,
    )


def whole(row: Row, column: str) -> int:
    """Return the whole number of a column, at least 1 but for zero. Raises ValueError where the source does not state
    one."""
    if not row[column].isdigit() or (column != "zero" and int(row[column]) < 1):
        raise ValueError(f"its {column.replace('_', ' ')} is not stated")
    return int(row[column])


def _config_of(source: Source, row: Row) -> Config:
    recompute = RECOMPUTE.get(row["recompute"], row["recompute"])
    if recompute not in ("none", "selective", "full"):
        raise ValueError("its recomputation is not stated")
    if source.name == "fms-fsdp" and recompute == "selective":
        recompute = "full"
    micro_batch, parallel = whole(row, "microbatch"), _parallel_of(source, row)
    if source.batch_of_rank and parallel.pp > 1:
        micro_batch //= parallel.pp
    half = "float16" if "fp16" in row["precision"] else "bfloat16"
    return Config(
        model=_model_of(source, row),
        data=schema.DataConfig(sequence_length=whole(row, "seq")),
        batch=schema.BatchConfig(global_batch=whole(row, "global_batch"), micro_batch=micro_batch),
        parallel=parallel,
        compute=schema.ComputeConfig(recompute=recompute),  # type: ignore[arg-type]
        train=schema.TrainConfig(tokens=10**16, dtype=half, noise_scale=False),  # type: ignore[arg-type]
    )


def _model_of(source: Source, row: Row) -> schema.ModelConfig:
    heads, width = whole(row, "heads"), whole(row, "hidden")
    llama = schema.ModelConfig(
        layers=whole(row, "layers"),
        width=width,
        heads=heads,
        kv_heads=whole(row, "kv_heads"),
        head_size=width // heads,
        mlp_width=whole(row, "ffn"),
        vocab_size=whole(row, "vocab"),
        tied_embeddings=source.name == "nanotron" and whole(row, "ffn") < 10_000,
    )
    gpt = replace(llama, **GPT)  # type: ignore[arg-type]
    if source.name != "other" or not row["params"]:
        return replace(llama, **source.model)
    size, length = float(row["params"]), whole(row, "seq")
    return min((llama, gpt), key=lambda model: abs(parameters(model, length) - size))


def _parallel_of(source: Source, row: Row) -> schema.ParallelConfig:
    tp, pp, cp, dp = (whole(row, axis) for axis in ("tp", "pp", "cp", "dp"))
    if tp * pp * cp * dp != whole(row, "gpus"):
        raise ValueError("its layout is not of as many GPUs as it states")
    stages, fsdp = whole(row, "vpp"), source.stack.states != "megatron"
    # "hybrid" is a shard to a node, and copies of it
    replicas = max(1, dp // whole(row, "gpus_per_node")) if row["zero"] == "hybrid" else 1
    zero = 3 if row["zero"] == "hybrid" else whole(row, "zero")
    return schema.ParallelConfig(
        tp=tp,
        pp=pp,
        cp=cp,
        dp_replicate=replicas,
        dp_shard=dp // replicas,
        schedule="interleaved" if stages > 1 else "1f1b",
        stages_per_rank=stages if pp > 1 else 0,
        split=_split(row, pp * stages) if pp > 1 and not source.balanced else (),
        sequence_parallel=source.sequence_parallel or row["notes"].startswith("sequence parallelism"),
        zero=1 if fsdp and pp > 1 else zero,
        reduce="every" if fsdp and pp == 1 else "once",
    )


def _has_embedding_layers(row: Row) -> bool:
    """Return whether a row is of the last section of bigscience's page: with the optimizer for bfloat16, and embedding
    and unembedding as a layer each."""
    line = re.match(r"line (\d+)", row["notes"])
    return "chronicles-prequel" in row["source"] and line is not None and int(line[1]) >= 900


def _split(row: Row, stages: int) -> tuple[int, ...]:
    """Return the blocks of each stage: equally many; of a number that does not divide, as DeepSpeed gives as many as
    are needed to all but the last."""
    layers = whole(row, "layers")
    if _has_embedding_layers(row) or "Re-do" in row["notes"] and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return (each - 1, *(each,) * (stages - 2), each - 1)
    each = -(-layers // stages)
    full, rest = divmod(layers, each)
    if full + (rest > 0) == stages:
        return (each,) * full + ((rest,) if rest else ())
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def _seconds(row: Row, config: Config, ranks: int) -> float:
    """Return the seconds of a step from the row's unit; MFU is of all scores, and of H100's 989 TFLOP/s."""
    value, unit, length = float(row["measured_value"]), row["measured_unit"], config.data.sequence_length
    tokens = config.batch.global_batch * length
    if unit == "s/step":
        return value
    if unit == "tok/s/GPU":
        return tokens / (value * ranks)
    if unit == "MFU %":
        return tokens * training_flops(config.model, length, causal=False) / (ranks * 989e12 * value / 100)
    if unit == "TFLOP/s/GPU incl. recompute":
        flops = training_flops(config.model, length, causal=False, recomputed_layers=config.model.layers)
        return tokens * flops / (ranks * 1e12 * value)
    raise ValueError(f"its unit {unit!r} is not known")
