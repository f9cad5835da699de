"""Sections that several roles have: a stage of training, its optimizer, what it computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError

MOST_AT_ONCE = 4096  # examples of one forward pass
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, by default with linear warm-up and linear decay to zero over all steps of the run."""

    learning_rate: float = option(
        5e-4,
        "at its peak; in tuning, of a prefix, input prompts or weights: configs/defaults/README.md",
    )
    weight_decay: float = option(0.01, "decoupled, as AdamW has it")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.999, "decay of the mean of their squares")
    epsilon: float = option(1e-8, "added to the root of that mean")
    warmup: float = option(0.1, "of all steps of the run, in which the rate rises", "fraction")
    clip: float | None = option(None, "largest gradient; `null`: no clipping", "L2 norm")
    schedule: Literal["linear", "constant"] = option(
        "linear",
        "`constant`: no warm-up and no decay, so that a run can be given more rounds later",
    )


@dataclass(frozen=True)
class StageConfig:
    """One kind of training: so many optimizer steps each round, in batches of so many examples."""

    steps: int = option(10, "", "steps")
    batch_size: int = option(16, "of an optimizer step", "examples")
    micro_batch: int | None = option(
        None, "of a forward pass, of similar length; `null`: the whole batch", "examples"
    )
    max_padding: Literal["auto"] | float | None = option(
        "auto",
        "of a step's forward passes, at most: a batch is cut by length into as few as that takes. "
        "Losses and gradients stay the same but for rounding. `null`: any; `auto`: 0.15, but any "
        "in distillation, and on a GPU, where a pass of few tokens is hardly quicker",
        "fraction of tokens",
    )
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

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "`cpu`, `cuda`, or `auto`: a GPU where there is one"
    )
    dtype: Dtype = option(
        "float32", "of forward and backward pass; prompts, gradients and optimizers are fp32"
    )
    matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest",
        "of float32 matrix products, as torch has it: `high` is TF32 on a GPU, `medium` bf16; they "
        "are faster, and change results from the third digit on",
    )
    compile: bool = option(
        False,
        "compile each layer's norms and feed-forward part by `torch.compile`, which takes some "
        "seconds to a minute at the start. Losses stay the same but for rounding; equal bits are "
        "not promised. Needs a C++ compiler on a CPU, Triton on a GPU",
    )
    threads: int | None = option(
        None,
        "`null`: a rank's share of the cores it may run on. Equal numbers give equal bits (the "
        "embedded default takes 1)",
        "threads",
    )
