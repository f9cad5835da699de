"""The parts of a configuration that several roles have: a stage of training, its optimizer, what it computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.plain import ConfigError

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero over all steps of the run."""

    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup: float = 0.1  # fraction of all steps
    clip: float | None = None  # largest gradient norm; None: no clipping

    def check(self, where: str) -> None:
        at_least(where, "learning_rate", self.learning_rate, 0)
        at_least(where, "weight_decay", self.weight_decay, 0)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"{where}.warmup: found {self.warmup}, expected a fraction from 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{where}.{name}: found {getattr(self, name)}, expected 0 <= value < 1")
        for name in ("epsilon", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{where}.{name}: found {value}, expected a number above 0")


@dataclass(frozen=True)
class StageConfig:
    """One kind of training: so many optimizer steps each round, in batches of so many examples."""

    steps: int = 10
    batch_size: int = 16
    micro_batch: int | None = None  # examples of a forward pass, of similar length; None: the whole batch
    optimizer: OptimizerConfig = OptimizerConfig()

    def check(self, where: str) -> None:
        at_least(where, "steps", self.steps, 0)
        at_least(where, "batch_size", self.batch_size, 1)
        if self.micro_batch is not None:
            at_least(where, "micro_batch", self.micro_batch, 1)
        self.optimizer.check(f"{where}.optimizer")


@dataclass(frozen=True)
class ComputeConfig:
    """What one role computes with. Equal bits are promised for equal numbers of threads."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = "float32"  # of the forward and backward pass; prompts, gradients' owners and optimizers are fp32
    threads: int | None = None  # None: a rank's share of the cores that it may run on


def at_least(where: str, name: str, value: float, low: float) -> None:
    """Raise ConfigError if a value is below `low`, or not a number; `where` is the dotted key of its section."""
    if not value >= low:
        raise ConfigError(f"{where}.{name}: found {value}, expected at least {low}")
