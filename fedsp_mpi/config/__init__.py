"""YAML to frozen dataclasses: unknown keys are refused with the nearest name, values are checked
before a run.
"""

from fedsp_mpi.config.experiment import (
    EMBEDDED,
    Config,
    DataConfig,
    FederationConfig,
    changed_keys,
    checked,
    load,
    to_yaml,
)
from fedsp_mpi.config.model import AuxiliaryConfig, DistillationConfig, PromptConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.config.training import ComputeConfig, StageConfig

__all__ = [
    "AuxiliaryConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillationConfig",
    "EMBEDDED",
    "FederationConfig",
    "PromptConfig",
    "SearchConfig",
    "StageConfig",
    "changed_keys",
    "checked",
    "load",
    "to_yaml",
]
