"""The settings of a run: what there is (schema), from files and words to a checked tree (resolve), what cannot run
together (checks), known shapes (presets), "tokens:value" words (words)."""

from megahp.config.schema import (
    SECTIONS,
    TYPES,
    VOCAB_MULTIPLE,
    Batch,
    Checkpoint,
    Compute,
    Config,
    Data,
    Log,
    Model,
    Optimizer,
    Parallel,
    Parameterization,
    Resilience,
    Schedule,
    Sparsity,
    Train,
    fixed,
    get,
    names,
    to_dict,
    to_toml,
    toml_value,
    with_values,
)
from megahp.config.words import Stage, parse_table, stage_at, stages
