"""Distillation: the auxiliary model learns to give the global model's hidden states (FedSP,
knowledge distillation).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi import rng
from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.log import Log
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import hidden_loss, logits_loss
from fedsp_mpi.tensors import Batch, State, join_states, part_of_state
from fedsp_mpi.training.engine import DeepSpeedEngine, TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, num_text_tokens, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


class StoppedError(Exception):
    """The distillation was told to stop before its end.

    Attributes:
        kept: steps that it goes on from.
    """

    def __init__(self, done: int, of: int, kept: int) -> None:
        rest = "`run --resume` goes on from there" if kept else "nothing of it is kept"
        super().__init__(f"told to stop after {done} of {of} steps of the distillation; {rest}")
        self.kept = kept


@dataclass(frozen=True)
class Progress:
    """Where a distillation goes on from, and where it leaves that.

    Attributes:
        start: what `keep` was given, or None to begin.
        keep: puts a state away.
        seconds: between two of them, beside the one when it is told to stop; None: only that one.
    """

    start: State | None = None
    keep: Callable[[State], None] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Distilled:
    """How an auxiliary model was aligned.

    Attributes:
        trace: losses and seconds.
        engine, engine_version, zero_stage: what stepped it.
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
    settings: DistillationConfig,
    seed: int,
    log: Log,
    stop: Callable[[], bool] = lambda: False,
    team: ServerGroup = SINGLE_RANK,
    progress: Progress = Progress(),
) -> Distilled:
    """Train the weights of `student` in place, without prompts, on the texts of the batches (but
    for their last token).

    The loss is hidden_weight * MSE of the last hidden states + logits_weight * T^2 KL of the
    logits, both averaged over the tokens that are not padding. The teacher is frozen and gives no
    gradient. A head of its own that no loss reaches is left as it is; `seed` is that of dropout.
    Every rank of `team` calls this with its part of the batches, and all end with the same weights.
    Raises StoppedError on all of them after the first step in which `stop` says so on one. Where
    nothing is sharded, it goes on from `progress.start` to the same bits.
    """
    stage = settings.stage
    student.train_weights(True)
    if not settings.logits_weight:
        student.freeze_untied_head()
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    engine: TorchEngine | DeepSpeedEngine
    if settings.engine == "torch":
        engine, made = (
            TorchEngine(weights, stage.optimizer, stage.steps, team),
            ("torch", torch.__version__, 0),
        )
    else:
        num_micro, zero = len(batches.step(0)), settings.zero_stage
        engine = DeepSpeedEngine(student.model, stage.optimizer, stage.steps, num_micro, zero, team)
        made = ("deepspeed", engine.version, zero)
    history = _History(student, engine, progress, can_rest=made[2] == 0)
    # The parts of a batch drop other values.
    seed_step = (
        partial(rng.seed_torch, seed, "distillation", team.rank)
        if student.dropout
        else lambda step: None
    )
    shown = log.progress("distilling", stage.steps)
    history.tell(log, stage.steps, shown.step)
    begin, age = time.perf_counter(), _process_age() - time.perf_counter()

    def on_step(loss: Tensor) -> None:
        stopped = team.any(stop())
        history.add(loss, stopped)
        if stopped:
            raise StoppedError(history.steps, stage.steps, history.kept)
        shown.step(note=lambda: f"loss {loss.item():.4f}")
        seed_step(history.steps)

    seed_step(history.steps)

    def loss_of(batch: Batch) -> Tensor:
        return distillation_loss(student, teacher, batch, settings)

    trace = train(
        engine,
        batches,
        loss_of,
        first_step=history.steps,
        num_steps=stage.steps - history.steps,
        device=student.device,
        count=num_text_tokens,
        on_step=on_step,
    )
    if isinstance(engine, DeepSpeedEngine):
        engine.close()
    student.train_weights(False)
    step_seconds = tuple(end - before for before, end in pairwise([begin, *history.ends]))
    whole = Trace(
        history.before + trace.losses,
        stage.steps * stage.batch_size,
        history.seconds + trace.seconds,
    )
    return Distilled(whole, *made, step_seconds, age + (history.ends or [begin])[0])


class _History:
    """Losses and times of a distillation's steps, in this process and before, and the states that
    are put away.
    """

    def __init__(
        self,
        student: LanguageModel,
        engine: TorchEngine | DeepSpeedEngine,
        progress: Progress,
        can_rest: bool,
    ) -> None:
        self._student, self._engine = student, engine
        self._keep, self._every = progress.keep if can_rest else None, progress.seconds
        self._losses: list[Tensor] = []
        self._begin = self._last = time.perf_counter()
        self.ends: list[float] = []
        self.before: tuple[float, ...] = ()
        self.seconds, self.kept = 0.0, 0
        if progress.start is not None and can_rest:
            self._load(progress.start)

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self.before) + len(self.ends)

    def tell(self, log: Log, of: int, count: Callable[[int], None]) -> None:
        """Say where it goes on, if it does not begin."""
        if self.steps:
            log.say(f"goes on after {self.steps} of {of} steps of the distillation")
            count(self.steps)

    def add(self, loss: Tensor, stopped: bool) -> None:
        """A step was done; put the state away if it is time, or the last chance."""
        self.ends.append(time.perf_counter())
        self._losses.append(loss)
        due = self._every is not None and self.ends[-1] - self._last > self._every
        if self._keep and (due or stopped):
            self._put_away()

    def _put_away(self) -> None:
        losses = torch.stack(self._losses).tolist()
        if self._keep and all(map(math.isfinite, losses)):
            weights = {
                name: weight.detach().cpu().numpy()
                for name, weight in self._student.weights.items()
            }
            told = {"losses": np.array([*self.before, *losses]), "seconds": np.array(self._spent())}
            self._keep(
                join_states({"weights": weights, "engine": self._engine.state(), "told": told})
            )
            self.kept, self._last = self.steps, time.perf_counter()

    def _spent(self) -> float:
        return self.seconds + time.perf_counter() - self._begin

    def _load(self, start: State) -> None:
        for name, value in part_of_state(start, "weights").items():
            self._student.weights[name].data.copy_(torch.from_numpy(value))
        self._engine.load_state(part_of_state(start, "engine"))
        self.before = tuple(start["told/losses"].tolist())
        self.seconds, self.kept = float(start["told/seconds"]), len(self.before)


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
