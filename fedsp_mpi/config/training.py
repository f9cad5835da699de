"""Sections that several roles have: a stage of training, its optimizer, what it computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.parsing import ConfigError

MOST_AT_ONCE = 4096  # examples of one forward pass
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


@dataclass(frozen=True)
class StageConfig:
    """One kind of training: so many optimizer steps each round, in batches of so many examples."""

    steps: int = 10
    batch_size: int = 16
    # Examples of a forward pass, of similar length; None: the whole batch.
    micro_batch: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.micro_batch is None and self.batch_size > MOST_AT_ONCE:
            raise ConfigError(
                f"{where}.batch_size: found {self.batch_size}, expected at most {MOST_AT_ONCE} "
                f"examples of one forward pass; set {where}.micro_batch, which cuts a batch "
                "into pieces"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """What one role computes with. Equal bits are promised for equal numbers of threads."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Of the forward and backward pass; prompts, gradients' owners and optimizers are fp32.
    dtype: Dtype = "float32"
    threads: int | None = None  # None: a rank's share of the cores that it may run on
