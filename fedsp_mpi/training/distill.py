"""Distillation: the auxiliary model learns to give the global model's hidden states (FedSP,
knowledge distillation).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi import rng
from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.log import Log
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import hidden_loss, logits_loss
from fedsp_mpi.tensors import Batch, State, join_states, part_of_state
from fedsp_mpi.training.engine import DeepSpeedEngine, TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, num_text_tokens, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


class StoppedError(Exception):
    """The distillation was told to stop before its end.

    Args:
        num_done: steps that are done.
        num_steps: of the whole distillation.
        kept: steps that a resumed run goes on from.
    """

    def __init__(self, num_done: int, num_steps: int, kept: int) -> None:
        advice = "they are kept" if kept else "nothing of it is kept"
        super().__init__(
            f"told to stop after {num_done} of {num_steps} steps of the distillation; {advice}"
        )
        self.kept = kept


@dataclass(frozen=True)
class Progress:
    """The state that a distillation goes on from, and the place for its later states.

    Attributes:
        start: a state that `keep` was called with, or None to begin.
        keep: stores a state.
        seconds: between two calls of `keep`; it is also called when the distillation is told to
            stop. None: only then.
    """

    start: State | None = None
    keep: Callable[[State], None] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class DistillationResult:
    """How an auxiliary model was aligned.

    Attributes:
        trace: losses and seconds.
        engine: "torch" or "deepspeed".
        engine_version: of that library.
        zero_stage: what the ranks held in parts; see `DeepSpeedEngine`.
        step_seconds: wall time of each step that this process took.
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
    *,
    settings: DistillationConfig,
    seed: int,
    log: Log,
    stop: Callable[[], bool] = lambda: False,
    group: ServerGroup = SINGLE_RANK,
    progress: Progress = Progress(),
) -> DistillationResult:
    """Train the weights of `student` in place, without prompts, on the texts of the batches.

    The loss is hidden_weight * MSE of the last hidden states + logits_weight * T^2 KL of the
    logits, both averaged over the tokens that are not padding. An output head of its own that no
    loss reaches is left as it is. Every rank of the group calls this with its part of the batches,
    and all end with the same weights. Where nothing is sharded, a resumed distillation gives the
    same bits.

    Args:
        student: the auxiliary model.
        teacher: the global model; frozen, without gradient.
        batches: texts without their last token.
        settings: engine, steps, optimizer and weights of the loss.
        seed: of the student's dropout.
        log: shows progress.
        stop: whether to stop after the current step.
        group: the ranks that share the work.
        progress: where to go on from, and where to store states.

    Raises:
        StoppedError: on all ranks, after the first step in which `stop` is true on one.
    """
    stage = settings.stage
    student.train_weights(True)
    if not settings.logits_weight:
        student.freeze_untied_head()
    engine = _build_engine(student, batches, settings, group=group)
    zero_stage = engine.zero_stage if isinstance(engine, DeepSpeedEngine) else 0
    version = engine.version if isinstance(engine, DeepSpeedEngine) else torch.__version__
    history = _History(student, engine, progress, can_resume=zero_stage == 0)
    bar = log.progress("distilling", stage.steps)
    if history.num_steps:
        log.say(f"goes on after {history.num_steps} of {stage.steps} steps of the distillation")
        bar.step(history.num_steps)

    def seed_dropout() -> None:
        if student.dropout:
            # With the rank, because the parts of a batch drop other values.
            rng.seed_torch(seed, "distillation", group.rank, history.num_steps)

    def loss_of(batch: Batch) -> Tensor:
        return distillation_loss(student, teacher, batch, settings=settings)

    def on_step(loss: Tensor) -> None:
        is_stopped = group.any(stop())
        history.add(loss, is_stopped)
        if is_stopped:
            raise StoppedError(history.num_steps, stage.steps, history.kept)
        bar.step(note=lambda: f"loss {loss.item():.4f}")
        seed_dropout()

    process_age = _process_age()
    start = time.perf_counter()
    seed_dropout()
    trace = train(
        engine,
        batches,
        loss_of,
        first_step=history.num_steps,
        num_steps=stage.steps - history.num_steps,
        device=student.device,
        count=num_text_tokens,
        on_step=on_step,
    )
    if isinstance(engine, DeepSpeedEngine):
        engine.close()
    student.train_weights(False)
    total_trace = Trace(
        history.losses_before + trace.losses,
        stage.steps * stage.batch_size,
        history.seconds_before + trace.seconds,
    )
    ends = [start, *history.ends]
    first_end = history.ends[0] if history.ends else start
    return DistillationResult(
        total_trace,
        settings.engine,
        version,
        zero_stage,
        step_seconds=tuple(end - begin for begin, end in pairwise(ends)),
        first_step_at=process_age + first_end - start,
    )


def distillation_loss(
    student: LanguageModel, teacher: LanguageModel, batch: Batch, *, settings: DistillationConfig
) -> Tensor:
    """Return the weighted losses of a batch, summed over its tokens: a scalar; see `distil`.

    Args:
        student: the auxiliary model, with gradient.
        teacher: the global model, without.
        batch: int64 [batch, length], on their device.
        settings: weights of the losses, and the temperature.
    """
    with torch.no_grad():
        teacher_states = teacher.hidden(batch)
    states = student.hidden(batch)
    loss = settings.hidden_weight * hidden_loss(states, teacher_states, batch.attention_mask)
    if settings.logits_weight:
        is_text = batch.attention_mask.bool()
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_states[is_text])
        logits = student.head(states[is_text])
        loss = loss + settings.logits_weight * logits_loss(
            logits, teacher_logits, settings.temperature
        )
    return loss


def _build_engine(
    student: LanguageModel, batches: Batches, settings: DistillationConfig, *, group: ServerGroup
) -> TorchEngine | DeepSpeedEngine:
    """Build the configured engine over the student's trainable weights."""
    stage = settings.stage
    if settings.engine == "torch":
        weights = [weight for weight in student.model.parameters() if weight.requires_grad]
        return TorchEngine(weights, stage.optimizer, stage.steps, group=group)
    return DeepSpeedEngine(
        student.model,
        stage.optimizer,
        stage.steps,
        num_micro_batches=len(batches.step(0)),
        zero_stage=settings.zero_stage,
        group=group,
    )


class _History:
    """Losses and times of a distillation's steps, in this process and before it, and the states
    that are stored on the way.

    Attributes:
        losses_before: of the steps before this process.
        seconds_before: wall time of those steps.
        ends: time of `time.perf_counter()` at which each step of this process ended.
        kept: steps in the last state that was stored.
    """

    def __init__(
        self,
        student: LanguageModel,
        engine: TorchEngine | DeepSpeedEngine,
        progress: Progress,
        *,
        can_resume: bool,
    ) -> None:
        self._student = student
        self._engine = engine
        self._keep = progress.keep if can_resume else None
        self._interval = progress.seconds
        self._losses: list[Tensor] = []
        self._start = time.perf_counter()
        self._last_kept = self._start
        self.ends: list[float] = []
        self.losses_before: tuple[float, ...] = ()
        self.seconds_before = 0.0
        self.kept = 0
        if progress.start is not None and can_resume:
            self._load(progress.start)

    @property
    def num_steps(self) -> int:
        """Steps that are done."""
        return len(self.losses_before) + len(self.ends)

    def add(self, loss: Tensor, is_stopped: bool) -> None:
        """Note a step's loss, fp32 []; store the state if that is due, or the last chance."""
        self.ends.append(time.perf_counter())
        self._losses.append(loss)
        is_due = self._interval is not None and self.ends[-1] - self._last_kept > self._interval
        if self._keep is not None and (is_due or is_stopped):
            self._store(self._keep)

    def _store(self, keep: Callable[[State], None]) -> None:
        """Store weights, optimizer, losses and seconds, unless a loss is not finite."""
        losses = torch.stack(self._losses).tolist()
        if not all(map(math.isfinite, losses)):
            return
        weights = {
            name: weight.detach().cpu().numpy() for name, weight in self._student.weights.items()
        }
        seconds = self.seconds_before + time.perf_counter() - self._start
        trace = {
            "losses": np.array([*self.losses_before, *losses]),
            "seconds": np.array(seconds),
        }
        # "told" is the trace's name in the layout of checkpoints.
        keep(join_states({"weights": weights, "engine": self._engine.state(), "told": trace}))
        self.kept = self.num_steps
        self._last_kept = time.perf_counter()

    def _load(self, state: State) -> None:
        for name, value in part_of_state(state, "weights").items():
            self._student.weights[name].data.copy_(torch.from_numpy(value))
        self._engine.load_state(part_of_state(state, "engine"))
        self.losses_before = tuple(state["told/losses"].tolist())
        self.seconds_before = float(state["told/seconds"])
        self.kept = len(self.losses_before)


def _process_age() -> float:
    """Return the seconds since this process was started, as the kernel counts them; 0 if it does
    not tell.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    start_ticks = float(fields[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
