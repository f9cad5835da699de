"""Distillation: the auxiliary model learns to give the global model's hidden states (FedSP, knowledge distillation)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fedsp_mpi import rng
from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.log import Log
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import hidden_loss, logits_loss
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.engine import DeepSpeedEngine, TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, num_text_tokens, train
from fedsp_mpi.training.team import ALONE, Team


class StoppedError(Exception):
    """The distillation was told to stop before its end."""


@dataclass(frozen=True)
class Distilled:
    """How an auxiliary model was aligned.

    Attributes:
        trace: losses and seconds.
        engine, engine_version, zero_stage: what stepped it.
        step_seconds: wall time of each step.
        first_step_at: seconds from the start of this process to the end of the first step.
    """

    trace: Trace
    engine: str
    engine_version: str
    zero_stage: int
    step_seconds: tuple[float, ...]
    first_step_at: float


def distil(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Batches,
    settings: DistillationConfig,
    seed: int,
    log: Log,
    stop: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> Distilled:
    """Train the weights of `student` in place, without prompts, on the texts of the batches (but for their last token).

    The loss is hidden_weight * MSE of the last hidden states + logits_weight * T^2 KL of the logits, both averaged over
    the tokens that are not padding. The teacher is frozen and gives no gradient. A head of its own that no loss reaches
    is left as it is; `seed` is that of dropout. Every rank of `team` calls this with its part of the batches, and all
    end with the same weights. Raises StoppedError on all of them after the first step in which `stop` says so on one.
    """
    stage = settings.stage
    rng.seed_torch(seed, "distillation", *([team.rank] if team.rank else []))  # the parts of a batch drop other values
    student.train_weights(True)
    if not settings.logits_weight:
        student.freeze_untied_head()
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    if settings.engine == "torch":
        engine: TorchEngine | DeepSpeedEngine = TorchEngine(weights, stage.optimizer, stage.steps, team)
        name, version, zero = "torch", torch.__version__, 0
    else:
        num_micro = len(batches.step(0))
        engine = DeepSpeedEngine(student.model, stage.optimizer, stage.steps, num_micro, settings.zero_stage, team)
        name, version, zero = "deepspeed", engine.version, settings.zero_stage
    progress = log.progress("distilling", stage.steps)
    step_ends, age = [time.perf_counter()], _process_age() - time.perf_counter()

    def on_step(loss: Tensor) -> None:
        step_ends.append(time.perf_counter())
        if team.any(stop()):
            raise StoppedError(f"told to stop after {len(step_ends) - 1} of {stage.steps} steps of the distillation")
        progress.step(note=lambda: f"loss {loss.item():.4f}")

    trace = train(
        engine,
        batches,
        0,
        stage.steps,
        lambda batch: distillation_loss(student, teacher, batch, settings),
        num_text_tokens,
        student.device,
        on_step,
    )
    if isinstance(engine, DeepSpeedEngine):
        engine.close()
    student.train_weights(False)
    step_seconds = tuple(end - begin for begin, end in pairwise(step_ends))
    return Distilled(trace, name, version, zero, step_seconds, age + step_ends[1])


def _process_age() -> float:
    """Seconds since this process was started, as the kernel knows it; 0 where it does not tell."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def distillation_loss(
    student: LanguageModel, teacher: LanguageModel, batch: Batch, settings: DistillationConfig
) -> Tensor:
    """The batch's sum over tokens of the weighted losses; see `distil`."""
    with torch.no_grad():
        goal = teacher.hidden(batch)
    found = student.hidden(batch)
    loss = settings.hidden_weight * hidden_loss(found, goal, batch.attention_mask)
    if settings.logits_weight:
        where = batch.attention_mask.bool()
        with torch.no_grad():
            goal_logits = teacher.head(goal[where])
        loss = loss + settings.logits_weight * logits_loss(
            student.head(found[where]), goal_logits, settings.temperature
        )
    return loss
