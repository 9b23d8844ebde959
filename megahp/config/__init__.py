"""The settings of a run: definitions (schema), loading and checking (resolve), cross-field validation (checks), model
presets (presets), settings that are lists of words (phases)."""

from megahp.config.phases import Phase, longest, parse_skip, parse_table, parse_validation, phase_at, phases_of
from megahp.config.schema import (
    AUTO,
    Auto,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DistillConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ParameterizationConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    config_differences,
    config_to_dict,
    config_to_toml,
    fixed_when,
    get_setting,
    setting_names,
    with_values,
)
