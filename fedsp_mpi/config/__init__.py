"""YAML to frozen dataclasses, a file a section; what cannot work is refused before a run."""

from fedsp_mpi.config.augment import AugmentConfig
from fedsp_mpi.config.data import DataConfig, LimitConfig
from fedsp_mpi.config.experiment import (
    EMBEDDED,
    Config,
    EvaluationConfig,
    changed_keys,
    checked,
    config_text_with_rounds,
    given,
    load,
    to_yaml,
)
from fedsp_mpi.config.federation import (
    ClientConfig,
    CompressionConfig,
    FederationConfig,
    OuterConfig,
    ServerConfig,
)
from fedsp_mpi.config.instructions import InstructionsConfig
from fedsp_mpi.config.model import AuxiliaryConfig, DistillationConfig, ModelConfig, PromptConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.config.runtime import (
    CheckpointConfig,
    DeadlineConfig,
    RecordConfig,
    RunConfig,
    TopologyConfig,
)
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.config.silos import ServerDataConfig, SiloConfig
from fedsp_mpi.config.threats import AttackConfig, PrivacyConfig
from fedsp_mpi.config.training import ComputeConfig, OptimizerConfig, StageConfig

__all__ = [
    "EMBEDDED",
    "AttackConfig",
    "AugmentConfig",
    "AuxiliaryConfig",
    "CheckpointConfig",
    "ClientConfig",
    "CompressionConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeadlineConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "FederationConfig",
    "InstructionsConfig",
    "LimitConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OuterConfig",
    "PrivacyConfig",
    "PromptConfig",
    "RecordConfig",
    "RunConfig",
    "SearchConfig",
    "ServerConfig",
    "ServerDataConfig",
    "SiloConfig",
    "StageConfig",
    "TopologyConfig",
    "changed_keys",
    "checked",
    "config_text_with_rounds",
    "given",
    "load",
    "to_yaml",
]
