"""Build a run's model on the mesh: meta tensors, tensor-parallel parts, shards, drawn weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megahp.config import Config, longest
from megahp.model.compute import (
    apply_recompute_and_compile,
    quantize_products,
    replace_norms,
    replace_products,
    simulate_fp4,
)
from megahp.model.moe import routers
from megahp.model.transformer import Transformer
from megahp.parallel.data import shard
from megahp.parallel.draw import initialise
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import Module, Row, distribute, is_dtensor, parameters, probes, rows
from megahp.parallel.stages import stage_blocks, stages_of
from megahp.scaling.parameterization import Role, table_of


@dataclass(frozen=True)
class Model:
    """This rank's stages of a model, and what the whole model consists of."""

    stages: dict[int, Transformer]  # pipeline stages by number; without pipelines one, the whole model
    rows: dict[str, Row]
    probes: dict[str, int]  # norms that measure, and routers -> numbers in their probes
    routers: list[str]
    parameters: int


def draw_weights(model: Transformer, config: Config, device: torch.device) -> None:
    """Allocate this rank's shards of a stage on `meta`, and draw their weights: the same on every layout."""
    # not to_empty: empty_like of a plain `meta` tensor imports sympy, a third of a second that a rank alone saves
    model._apply(
        lambda weight: (
            torch.empty_like(weight, device=device)
            if is_dtensor(weight)
            else torch.empty(weight.shape, dtype=weight.dtype, device=device)
        )
    )
    initialise(model, model.table, config.parameterization.init_std, config.train.seed)


def build_model(
    config: Config, mesh: Mesh, fill: Callable[[Transformer, Config, torch.device], None] = draw_weights
) -> Model:
    """Return the model, by default with its initial weights. model.vocab_size must be set.

    A stage is built in this order:
    1. The whole model on `meta`, which takes no memory, without the parts that other stages have.
    2. Recomputation and compilation. They wrap the blocks' functions, not the modules, so FSDP2's hooks stay outside:
       gathering and resharding are neither compiled nor, but for a block's experts, repeated by a recomputation.
    3. Other engines' norms, in place of the op that measures.
    4. Tensor-parallel parts as DTensors: float8 products need their shapes, and FSDP2 shards them further.
    5. Products in float8, in simulated FP4, or by quantized weights.
    6. FSDP2, over the data-parallel ranks; prefetching, once all of its units exist.
    7. Memory, for this rank's shards alone, and the weights drawn into it (`fill`; a plan allocates nothing real).
    """
    whole = skeleton(config, mesh)
    compute, stages = config.compute, {}
    cuts = stage_blocks(config)
    for number in stages_of(mesh.rank("pp"), config.parallel):
        model = skeleton(config, mesh)
        model.keep(cuts[number])
        master = torch.promote_types(model.dtype, torch.float32)
        apply_recompute_and_compile(model.blocks, compute)
        if compute.norms != "megahp":
            replace_norms(model, compute.norms)
        distribute(model, mesh, master)
        if compute.fp8 != "none":
            replace_products(model, compute.fp8, mesh.device)
        if compute.fp4:
            simulate_fp4(model, compute, config.train.seed, mesh.device)
        if config.model.quantize != "none":
            quantize_products(model, config.model)
        shard(model, list(model.blocks.values()), mesh, config.parallel, model.dtype, master)
        fill(model, config, mesh.device)
        stages[number] = model
    return Model(
        stages,
        rows(whole),
        {name: probe.numel() for name, probe in probes(whole).items()},
        list(routers(whole)),
        sum(weight.numel() for _, weight in parameters(whole)),
    )


def skeleton(config: Config, mesh: Mesh) -> Transformer:
    """Return the whole model on `meta`, its rows completed by what the run's settings say of density and training."""
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
    # sparsity masks the hidden matrices of blocks; routers, whose role is another, stay dense
    densities = config.sparsity.initial_densities(config.model.layers)
    for block, density in zip(model.blocks.values(), densities, strict=True):
        for module in block.modules():
            if isinstance(module, Module):
                hidden = {name: row for name, row in module.rows.items() if row.role is Role.HIDDEN}
                module.rows |= {name: replace(row, density=density) for name, row in hidden.items()}
    if config.train.weights == "embeddings":
        for module in model.modules():
            if isinstance(module, Module) and module not in (model.embedding, model.unembedding):
                module.rows = {name: replace(row, trained=False) for name, row in module.rows.items()}
    return model
