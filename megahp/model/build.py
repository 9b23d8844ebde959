"""From a run's settings to its model on the mesh: meta tensors, tensor-parallel parts, shards, drawn weights."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import nn

from megahp.config import Config, phases_of
from megahp.model.compute import arrange, replace_norms, replace_products
from megahp.model.moe import routers
from megahp.model.transformer import Transformer
from megahp.parallel.data import shard
from megahp.parallel.draw import initialise
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import Module, Row, distribute, parameters, probes, rows
from megahp.parallel.pipeline import split, stages_of
from megahp.scaling.flops import layer_costs
from megahp.scaling.parameterization import Role, table_of


def longest(config: Config) -> int:
    """Tokens of the longest sequence the run trains on."""
    return max(stage.length for stage in phases_of(config.data))


@dataclass(frozen=True)
class Model:
    """What this rank holds of a model, and what there is in all of it."""

    stages: dict[int, Transformer]  # pipeline stages, by number; without pipelines there is one, the whole
    rows: dict[str, Row]
    probes: dict[str, int]  # norms that measure, and routers -> how many numbers
    routers: list[str]
    parameters: int


def build_model(config: Config, mesh: Mesh) -> Model:
    """The model with its initial weights, which are the same on every layout. model.vocab_size must be set."""
    whole = skeleton(config, mesh)
    cuts = cut(config)
    stages = {number: _stage(config, mesh, cuts[number]) for number in stages_of(mesh.rank("pp"), config.parallel)}
    return Model(
        stages,
        rows(whole),
        {name: probe.numel() for name, probe in probes(whole).items()},
        list(routers(whole)),
        sum(weight.numel() for _, weight in parameters(whole)),
    )


def cut(config: Config) -> list[range]:
    """The blocks of each pipeline stage, first to last."""
    model, parallel = config.model, config.parallel
    if not parallel.split:
        return split(layer_costs(model, config.data.sequence_length), parallel.pp * parallel.local_stages)
    ends = list(accumulate(parallel.split, initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def skeleton(config: Config, mesh: Mesh) -> Transformer:
    """The whole model on `meta`."""
    axis = mesh.tensor_axis(config.parallel.sequence_parallel)
    with torch.device("meta"):
        model = Transformer(
            config.model,
            longest(config),
            table_of(config),
            axis,
            getattr(torch, config.train.dtype),
            config.train.noise_scale,
        )
    for block, density in zip(
        model.blocks.values(), config.sparsity.initial_densities(config.model.layers), strict=True
    ):
        _say_density(block, density)
    if config.train.weights == "embeddings":
        _freeze_but(model, (model.embedding, model.unembedding))
    return model


def _say_density(block: nn.Module, density: float) -> None:
    """Have the rows of a block's matrices, the router's aside, tell their density."""
    for module in block.modules():
        if isinstance(module, Module):
            hidden = {name: row for name, row in module.rows.items() if row.role is Role.HIDDEN}
            module.rows |= {name: replace(row, density=density) for name, row in hidden.items()}


def _freeze_but(model: nn.Module, trained: Collection[nn.Module | None]) -> None:
    """Have the rows of all other modules tell that they stay as they are."""
    for module in model.modules():
        if isinstance(module, Module) and module not in trained:
            module.rows = {name: replace(row, trained=False) for name, row in module.rows.items()}


def _stage(config: Config, mesh: Mesh, blocks: range) -> Transformer:
    """The pipeline stage of these blocks, with its initial weights."""
    model = skeleton(config, mesh)
    model.keep(blocks)
    master = torch.promote_types(model.dtype, torch.float32)
    arrange(model.blocks, config.compute)
    if config.compute.norms != "megahp":
        replace_norms(model, config.compute.norms)
    distribute(model, mesh, master)
    if config.compute.fp8 != "none":
        replace_products(model, config.compute.fp8, mesh.device)
    shard(model, list(model.blocks.values()), mesh, config.parallel, model.dtype, master)
    model.to_empty(device=mesh.device)
    initialise(model, model.table, config.parameterization.init_std, config.train.seed)
    return model
