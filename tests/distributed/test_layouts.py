"""Every layout trains the same model: loss, every gradient, norms, per-example norms and weights against one rank.

That one rank takes its loss from logits, the layouts from slices of the vocabulary that do not divide it evenly. The
batch grows in mid-run. `pytest -m slow` runs every model on every layout, and prints the table of docs/layouts.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from parallel.test_cross_entropy import plain_losses

from distributed import world
from distributed.training import MODELS, differences, settings_of, train_cases, write_model
from megahp.config import Config
from megahp.model import transformer
from megahp.parallel import cross_entropy

TP, CP, EP, REPLICATE = ("parallel.tp=2",), ("parallel.cp=2",), ("parallel.ep=2",), ("parallel.dp_replicate=2",)
SP = (*TP, "parallel.sequence_parallel=true")
PP = ("parallel.pp=2", "model.layers=4")
INTERLEAVED, ZERO_BUBBLE, ZBV = (
    (*PP, f"parallel.schedule={schedule}") for schedule in ("interleaved", "zero-bubble", "zbv")
)
FULL, SELECTIVE = "compute.recompute=full", "compute.recompute=selective"
FOUR, EIGHT = "batch.micro_batch=4", "batch.micro_batch=8"
UNEVEN = ("batch.micro_batch=auto", "batch.largest_micro_batch=3")  # 2 + 2, 3 + 3 + 2, ... sequences
# ranks -> layout -> settings. All run multiples of 8 sequences, from one to eight microbatches of them.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "tp2": (*TP, EIGHT),
        "tp2 sp": (*SP, FOUR),
        "tp2 sp, full recomputation": (*SP, FOUR, FULL),
        "shard2": (FOUR,),
        "shard2, selective recomputation": (SELECTIVE,),
        "shard2, zero 2, reduced every time": ("parallel.zero=2", "parallel.reduce=every"),
        "shard2, zero 1": ("parallel.zero=1",),
        "shard2, uneven microbatches": UNEVEN,
        "replicate2": (*REPLICATE,),
        "replicate2, uneven microbatches": (*REPLICATE, *UNEVEN),
        "cp2": (*CP, EIGHT),
        "ep2": (*EP, FOUR),
        "pp2 1f1b": (*PP,),
        "pp2 1f1b, uneven": (*PP, "parallel.split=[3,1]", "batch.micro_batch=1"),
        "pp2 interleaved": INTERLEAVED,
        "pp2 zero-bubble": ZERO_BUBBLE,
        "pp2 zero-bubble, 2 stages a rank": (*ZERO_BUBBLE, "parallel.stages_per_rank=2"),
        "pp2 zbv": (*ZBV, "batch.micro_batch=1"),
    },
    4: {
        "tp4 sp": ("parallel.tp=4", "parallel.sequence_parallel=true", FOUR),
        "tp2 shard2": (*TP, FOUR),
        "tp2 sp shard2": (*SP, FOUR),
        "tp2 sp replicate2": (*SP, *REPLICATE, FOUR),
        "replicate2 shard2": REPLICATE,
        "shard4, zero 2, prefetch": ("parallel.zero=2", "parallel.prefetch=2"),
        "cp4": ("parallel.cp=4", EIGHT),
        "cp2 tp2": (*CP, *TP, EIGHT),
        "cp2 tp2 sp": (*CP, *SP, EIGHT),
        "cp2 shard2": (*CP, FOUR),
        "cp2 shard2, selective recomputation": (*CP, FOUR, SELECTIVE),
        "cp2 replicate2": (*CP, *REPLICATE, FOUR),
        "ep2 shard4": EP,
        "ep4": ("parallel.ep=4",),
        "ep2 tp2 sp": (*EP, *SP, FOUR),
        "ep2 replicate2": (*EP, *REPLICATE),
        "ep2 cp2": (*EP, *CP, FOUR),
        "pp2 tp2": (*PP, *TP, FOUR),
        "pp2 tp2 sp, interleaved": (*INTERLEAVED, *SP, FOUR),
        "pp2 shard2": PP,
        "pp2 shard2, interleaved, full recomputation": (*INTERLEAVED, FULL),
        "pp2 shard2, zbv": ZBV,
        "pp2 shard2, zero-bubble, full recomputation": (*ZERO_BUBBLE, FULL),
        "pp2 replicate2, zero-bubble": (*ZERO_BUBBLE, *REPLICATE),
        "pp2 shard2, selective recomputation": (*PP, SELECTIVE),
        "pp2 cp2": (*PP, *CP, FOUR),
        "pp2 cp2, zbv": (*ZBV, *CP, FOUR),
        "pp2 ep2": (*PP, *EP),
        "pp2 ep2, zbv": (*ZBV, *EP),
        "pp4 1f1b": (*PP, "parallel.pp=4"),
        "pp4 zero-bubble": (*ZERO_BUBBLE, "parallel.pp=4"),
    },
}
# of DeepSpeed's engine, which keeps state in a process: on two ranks of their own, in float32, which is all it has
ZERO1, ZERO2, ZERO3 = ((f"parallel.zero={stage}", "parallel.engine=deepspeed") for stage in (1, 2, 3))
OFFLOAD = "parallel.offload=true"
DEEPSPEED = {
    "deepspeed, zero 1": ZERO1,
    "deepspeed, zero 1, uneven microbatches": (*ZERO1, *UNEVEN),
    "deepspeed, zero 1, offload": (*ZERO1, OFFLOAD),
    "deepspeed, zero 2": ZERO2,
    "deepspeed, zero 2, uneven microbatches, offload": (*ZERO2, *UNEVEN, OFFLOAD),
    "deepspeed, zero 3": ZERO3,
    "deepspeed, zero 3, full recomputation": (*ZERO3, FULL),
    "deepspeed, zero 3, selective recomputation, offload": (*ZERO3, SELECTIVE, OFFLOAD),
}
DEEPSPEED_MODELS = ["llama", "gpt2", "gemma"]
DEEPSPEED_CELLS: list[tuple[str, str, str]] = [
    (layout, model, "float32")
    for number, layout in enumerate(DEEPSPEED)
    for model in (DEEPSPEED_MODELS if layout.endswith(("1", "2", "3")) else [DEEPSPEED_MODELS[number % 3]])
]
EIGHT_RANKS: dict[int, dict[str, tuple[str, ...]]] = {
    8: {
        "pp2 cp2 tp2 sp": (*PP, *CP, *SP, FOUR),
        "pp2 cp2 tp2 sp, zbv, full recomputation": (*ZBV, *CP, *SP, FOUR, FULL),
        "pp2 ep2 tp2 sp, zero-bubble": (*ZERO_BUBBLE, *EP, *SP),
        "pp2 ep2 cp2, interleaved": (*INTERLEAVED, *EP, *CP),
        "cp2 ep2 tp2 sp": (*CP, *EP, *SP, FOUR),
        "pp2 replicate2 shard2": (*PP, *REPLICATE, "batch.micro_batch=1"),
    }
}
# tolerance of measures, of weights
DTYPES = {
    "float32": (1e-5, None),
    **dict.fromkeys(("float64", "embeddings", "series", "int4", "fp4", "dct", "galore", "taught"), (1e-10, 1e-10)),
}
LOW_RANK = ("optimizer.rank=8", "optimizer.refresh=2")  # so that subspaces change in mid-run
# in place of its type
WORDS = {
    "embeddings": (
        *("train.dtype=float64", "train.weights=embeddings"),
        *("train.start_from=elsewhere", "train.noise_scale=false"),
    ),
    "series": ("train.dtype=float64", "model.levels=[36,30,20]"),
    "int4": ("train.dtype=float64", "model.quantize=int4", "model.quantize_group=8"),
    "fp4": (  # of sizes that hold whole blocks on every layout
        *("train.dtype=float64", "model.width=64", "model.heads=8", "model.kv_heads=4", "model.mlp_width=64"),
        *("data.sequence_length=128", 'batch.table=["1024:16","3072:24","6144:32"]', "train.tokens=40960"),
        *("compute.fp4_forward=nvfp4", "compute.fp4_backward=mxfp4", "compute.fp4_hadamard=backward"),
        "compute.fp4_stochastic=true",
    ),
    **{name: ("train.dtype=float64", f"optimizer.name={name}", *LOW_RANK) for name in ("dct", "galore")},
}
STEPS = 4  # of 8, 16, 24 and 32 sequences
BF16 = [
    ("replicate2", "gpt2"),
    ("tp2 sp shard2", "gpt2"),
    ("replicate2 shard2", "gpt2"),
    ("cp4", "gpt2"),
    ("ep2 shard4", "moe"),
    ("pp4 1f1b", "gpt2"),
]
Cell = tuple[
    str, str, str
]  # layout, model, dtype; in float64: embeddings alone, tokens of series, in levels, weights or products in 4 bits,
# or an optimizer
TAUGHT: list[Cell] = [  # by teachers, in float64
    ("tp2", "llama", "taught"),
    ("tp2 sp", "gpt2", "taught"),
    ("shard2", "gpt2", "taught"),
    ("shard2, zero 2, reduced every time", "moe", "taught"),
    ("shard2, zero 1", "alibi", "taught"),
    ("replicate2, uneven microbatches", "llama", "taught"),
    ("cp2", "llama", "taught"),
    ("cp2 tp2 sp", "gemma", "taught"),
    ("tp2 sp shard2", "olmo", "taught"),
]
TEACHERS = ("gemma", "gpt2", "moe")  # with capped logits, tied embeddings, learned positions, experts
SERIES: list[Cell] = [(layout, "gpt2", "series") for layout in ("tp2", "shard2", "cp2")]
QUANTIZED: list[Cell] = [(layout, "llama", "int4") for layout in ("tp2 sp", "shard2", "cp2", "pp2 zero-bubble")]
FP4: list[Cell] = [
    ("tp2 sp, full recomputation", "llama", "fp4"),
    ("shard2, zero 2, reduced every time", "llama", "fp4"),
    ("cp2", "llama", "fp4"),
    ("pp2 zero-bubble", "llama", "fp4"),
    ("cp2 tp2 sp", "gpt2", "fp4"),
    ("pp2 shard2, selective recomputation", "llama", "fp4"),
]
LOW_MEMORY: list[Cell] = [
    *(
        (layout, "llama", "dct")
        for layout in ("tp2", "shard2, zero 1", "pp2 interleaved", "tp2 sp shard2", "cp2 shard2")
    ),
    *((layout, "llama", "galore") for layout in ("tp2 sp", "shard2", "cp2", "pp2 zbv", "replicate2 shard2")),
    *((layout, "moe", optimizer) for layout in ("ep2", "ep2 shard4") for optimizer in ("dct", "galore")),
]
EMBEDDINGS: list[Cell] = [
    ("tp2 sp, full recomputation", "gpt2", "embeddings"),
    ("pp2 zero-bubble", "gpt2", "embeddings"),
    ("pp2 interleaved", "muon", "embeddings"),
    ("shard2, zero 2, reduced every time", "moe", "embeddings"),
    ("pp2 zbv", "muon", "embeddings"),  # nothing of one rank is trained
    ("pp2 shard2, zbv", "muon", "embeddings"),
    ("cp2 shard2", "gpt2", "embeddings"),
    ("ep2 shard4", "moe-loss", "embeddings"),
]


def runs(layout: str, model: str) -> bool:
    """Experts are parallel where there are experts, and as many a rank; zbv unties embeddings."""
    experts = "ep2" in layout or "ep4" in layout
    uneven = "ep4" in layout and model == "moe-loss"  # of its 6 experts
    return not (experts and "moe" not in model or "zbv" in layout and model in ("gpt2", "gemma") or uneven)


def every_cell(layouts: Mapping[int, Mapping[str, Any]]) -> list[Cell]:
    return [
        (layout, model, "float64")
        for cells in layouts.values()
        for layout in cells
        for model in MODELS
        if runs(layout, model)
    ]


def some_cells() -> list[Cell]:
    """Of every layout one model, and another on two ranks; now and then in single precision too."""
    found: list[Cell] = []
    places = [(ranks, layout) for ranks, cells in LAYOUTS.items() for layout in cells]
    for number, (ranks, layout) in enumerate(places):
        models = [model for model in MODELS if runs(layout, model)]
        first, second = models[number % len(models)], models[(number + 3) % len(models)]
        found.append((layout, first, "float64"))
        if ranks == 2 and first != second:
            found.append((layout, second, "float64"))
        if number % 3 == 0:
            found.append((layout, first, "float32"))
    return found


def reference(layout: str) -> str:
    return "one, 4 blocks" if "pp" in layout else "one"


def train_plainly(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    with mock.patch.object(transformer, "linear_cross_entropy", plain_losses):
        return train_cases(cases)


def train_in_slices(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    with mock.patch.object(cross_entropy, "rows_at_once", lambda *_: 24):
        return train_cases(cases)


def train_cells(cells: Iterable[Cell], layouts: Mapping[int, Mapping[str, tuple[str, ...]]]) -> dict[Cell, Any]:
    """What each cell's training tells, and that of one rank beside it."""
    cells = list(cells)
    plain = {1: {"one": (), "one, 4 blocks": ("model.layers=4",)}}
    wanted = list(dict.fromkeys([*cells, *((reference(layout), *rest) for layout, *rest in cells)]))
    found = {}
    for ranks, words in {**plain, **layouts}.items():
        cases = {
            (layout, model, dtype): (
                settings_of(model, *WORDS.get(dtype, (f"train.dtype={dtype}",)), *words[layout]),
                1 if dtype == "bfloat16" else STEPS,
            )
            for layout, model, dtype in wanted
            if layout in words
        }
        if cases:
            found |= world.run(ranks, train_plainly if ranks == 1 else train_in_slices, cases, timeout=3600)[-1]
    return found


def compare(outcomes: Mapping[Cell, Any], cell: Cell) -> list[str]:
    layout, model, dtype = cell
    return differences(outcomes[cell], outcomes[reference(layout), model, dtype], *DTYPES[dtype])


@pytest.fixture(scope="module")
def outcomes() -> dict[Cell, Any]:
    return train_cells([*CELLS, *((*cell, "bfloat16") for cell in BF16)], LAYOUTS)


CELLS = [*some_cells(), *EMBEDDINGS, *SERIES, *QUANTIZED, *FP4, *LOW_MEMORY]


@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_layout_equals_one_rank(outcomes: dict[Cell, Any], cell: Cell) -> None:
    assert compare(outcomes, cell) == []


def write_teachers(folder: Path) -> list[str]:
    return [write_model(folder / name, name, "model.vocab_size=90", "train.dtype=float64") for name in TEACHERS]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Any]:
    (teachers,) = world.run(1, write_teachers, tmp_path_factory.mktemp("teachers"))
    named = f"distill.teachers={json.dumps(teachers)}"
    words = ("train.dtype=float64", "model.vocab_size=90", named, "distill.weight=0.7")
    with mock.patch.dict(WORDS, taught=words):
        return train_cells(TAUGHT, LAYOUTS)


@pytest.mark.parametrize("cell", TAUGHT, ids="/".join)
def test_teachers_teach_the_same_on_every_layout(taught: dict[Cell, Any], cell: Cell) -> None:
    assert compare(taught, cell) == []


@pytest.mark.parametrize("cell", EMBEDDINGS, ids="/".join)
def test_all_but_embeddings_stays_to_the_bit(outcomes: dict[Cell, Any], cell: Cell) -> None:
    """As drawn, which is the same on every layout. Biases of routers are zeros at first."""
    got, drawn = outcomes[cell]["weights"], outcomes[cell]["drawn"]
    trained = {"embedding.weight"} | {"unembedding.weight"} & got.keys()
    assert {name for name in got if not got[name].equal(drawn[name])} == trained == set(outcomes[cell]["grads"])


@pytest.mark.parametrize(("layout", "model"), BF16)
def test_bf16_gradients_differ_by_bf16_rounding_only(outcomes: dict[Cell, Any], layout: str, model: str) -> None:
    """No layout adds up in half precision what one rank adds up in single."""
    got = outcomes[layout, model, "bfloat16"]["grads"]
    wanted = outcomes[reference(layout), model, "bfloat16"]["grads"]
    for name in wanted:
        error = (got[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.02, (name, error)


@pytest.fixture(scope="module")
def of_deepspeed() -> dict[Cell, Any]:
    cases = {cell: (settings_of(cell[1], *DEEPSPEED[cell[0]]), STEPS) for cell in DEEPSPEED_CELLS}
    alone = {("one", model, "float32"): (settings_of(model), STEPS) for model in DEEPSPEED_MODELS}
    return world.run(1, train_plainly, alone)[0] | world.run_afresh(2, train_in_slices, cases)[-1]


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("cell", DEEPSPEED_CELLS, ids="/".join)
def test_deepspeed_equals_one_rank(of_deepspeed: dict[Cell, Any], cell: Cell) -> None:
    assert compare(of_deepspeed, cell) == []


@pytest.mark.slow
def test_the_whole_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = {**LAYOUTS, **EIGHT_RANKS}
    cells = every_cell(layouts)
    outcomes = train_cells(cells, layouts)
    wrong = {cell: found for cell in cells if (found := compare(outcomes, cell))}
    with capsys.disabled():
        print("\n".join(table(cells, wrong)))
    assert wrong == {}


def table(cells: list[Cell], wrong: Mapping[Cell, list[str]]) -> list[str]:
    """A line for each layout, a column for each model, in Markdown."""
    ranks = {layout: count for count, words in {**LAYOUTS, **EIGHT_RANKS}.items() for layout in words}
    lines = [f"| layout | ranks | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 2) + "|"]
    for layout, count in ranks.items():
        marks = [
            "–" if not runs(layout, model) else "no" if (layout, model, "float64") in wrong else "yes"
            for model in MODELS
        ]
        lines.append(f"| {layout} | {count} | {' | '.join(marks)} |")
    return lines
