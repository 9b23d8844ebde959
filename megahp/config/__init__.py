"""The settings of a run: what there is (schema), from files and words to a checked tree (resolve), what cannot run
together (checks), known shapes (presets), "tokens:value" words (words)."""

from megahp.config.schema import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ParameterizationConfig,
    ScheduleConfig,
    SparsityConfig,
    config_differences,
    config_to_dict,
    config_to_toml,
    fixed_when,
    get_setting,
    setting_names,
    with_values,
)
from megahp.config.words import Phase, parse_table, phase_at, phases_of
