"""From a run's settings to its model on the mesh: meta tensors, tensor-parallel parts, shards, drawn weights."""

from __future__ import annotations

import torch

from megahp.config import Config, stages
from megahp.model.compute import arrange, replace_norms, replace_products
from megahp.model.transformer import Transformer
from megahp.parallel.data import shard
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import distribute, initialise
from megahp.scaling.parameterization import Table, fill_in


def table_of(config: Config) -> Table:
    """The parameterization's table for this run's model."""
    model = config.model
    return fill_in(config.parameterization, model.width, model.layers, model.head_size)


def longest(config: Config) -> int:
    """Tokens of the longest sequence the run trains on."""
    return max(stage.length for stage in stages(config.data))


def build_model(config: Config, mesh: Mesh) -> Transformer:
    """The model with its initial weights, which are the same on every layout. model.vocab_size must be set."""
    compute = getattr(torch, config.train.dtype)
    master = torch.promote_types(compute, torch.float32)
    table, axis = table_of(config), mesh.tensor_axis(config.parallel.sequence_parallel)
    with torch.device("meta"):
        model = Transformer(config.model, longest(config), table, axis, compute, config.train.noise_scale)
    arrange(model.blocks, config.compute)  # type: ignore[arg-type]
    if config.compute.norms != "megahp":
        replace_norms(model, config.compute.norms)
    distribute(model, mesh, master)
    if config.compute.fp8 != "none":
        replace_products(model, config.compute.fp8, mesh.device)
    shard(model, model.blocks, mesh, compute, master)
    model.to_empty(device=mesh.device)
    initialise(model, table, config.parameterization.init_std, config.train.seed)
    return model
