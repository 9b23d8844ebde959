"""The settings of a run: what there is (schema), from files and words to a checked tree (resolve), what cannot run
together (checks), known shapes (presets), "tokens:value" words (words)."""

from megahp.config.schema import (
    Batch,
    Checkpoint,
    Compute,
    Config,
    Log,
    Model,
    Optimizer,
    Parallel,
    Parameterization,
    Schedule,
    Sparsity,
    differences,
    fixed,
    get,
    names,
    to_dict,
    to_toml,
    with_values,
)
from megahp.config.words import Stage, parse_table, stage_at, stages
