"""The only gradient loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsp_mpi.tensors import Batch, ClientError
from fedsp_mpi.training.process_group import ServerGroup

# Steps whose micro-batches are cut at once: one at a time, between two steps, cutting takes four
# times as long.
BLOCK = 32


class NonFiniteError(ClientError, ArithmeticError):
    """A loss is infinite or not a number."""


class Engine(Protocol):
    """An optimizer as the loop sees it, and the ranks that step together."""

    @property
    def group(self) -> ServerGroup: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, a scalar."""
        ...

    def step(self) -> None:
        """Update the parameters by the gradient, and clear it."""
        ...


class Batches(Protocol):
    """This rank's micro-batches by optimizer step."""

    @property
    def batch_size(self) -> int: ...

    def step(self, index: int) -> list[Batch]: ...


@dataclass(frozen=True)
class Trace:
    """The course of a stretch of training.

    Attributes:
        losses: mean loss of each step.
        samples: number of examples processed.
        seconds: wall time.
    """

    losses: tuple[float, ...] = ()
    samples: int = 0
    seconds: float = 0.0

    @property
    def first(self) -> float:
        """Loss of the first step, nan if there is none."""
        return self.losses[0] if self.losses else math.nan

    @property
    def last(self) -> float:
        """Loss of the last step, nan if there is none."""
        return self.losses[-1] if self.losses else math.nan


def num_answer_tokens(batch: Batch) -> float:
    """Return the number of tokens that a batch's targets [batch, length] ask for, by weight."""
    weights = batch.target_weights
    if weights is not None:
        return float(weights.double().sum())
    return int((batch.targets != -100).sum())


def num_text_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch [batch, length] that are not padding."""
    return int(batch.attention_mask.sum())


def train(
    engine: Engine,
    batches: Batches,
    loss: Callable[[Batch], Tensor],
    *,
    first_step: int,
    num_steps: int,
    device: torch.device,
    count: Callable[[Batch], float] = num_answer_tokens,
    on_step: Callable[[Tensor], None] | None = None,
    until: float | None = None,
) -> Trace:
    """Take optimizer steps over consecutive batches.

    A step's loss is the sum of `loss` over its micro-batches divided by the sum of `count`, so it
    does not depend on how the batch is cut, or on how many ranks share it. Losses are fetched from
    the device once, at the end.

    Args:
        engine: holds the optimizer of what is trained.
        batches: by the number of the step.
        loss: returns the sum of a micro-batch's losses, fp32 [].
        first_step: number of the first batch.
        num_steps: steps to take.
        device: that batches are moved to.
        count: returns the number that losses are averaged over.
        on_step: is called with every step's loss, a scalar on the device.
        until: a time of `time.perf_counter()`, in seconds, after which no step begins but the
            first.

    Raises:
        NonFiniteError: names the first step whose loss is not finite.
    """
    start = time.perf_counter()
    step_losses: list[Tensor] = []
    for micro_batches, total in _in_blocks(
        batches, first_step, num_steps, count=count, group=engine.group
    ):
        # --- forward and backward ---
        step_loss: Tensor | None = None
        for batch in micro_batches:
            share = loss(batch.to(device)) / total
            engine.backward(share)
            step_loss = share.detach() if step_loss is None else step_loss + share.detach()
        assert step_loss is not None, "a step has at least one micro-batch"
        # --- update ---
        engine.step()
        # --- report ---
        engine.group.sum([step_loss])
        step_losses.append(step_loss)
        if on_step is not None:
            on_step(step_loss)
        if until is not None and _is_past(until, step_loss):
            break
    losses = torch.stack(step_losses).tolist() if step_losses else []
    _require_finite(losses)
    seconds = time.perf_counter() - start
    return Trace(tuple(losses), len(losses) * batches.batch_size, seconds)


def _in_blocks(
    batches: Batches,
    first_step: int,
    num_steps: int,
    *,
    count: Callable[[Batch], float],
    group: ServerGroup,
) -> Iterator[tuple[list[Batch], float]]:
    """Yield every step's micro-batches, and what they count on all ranks together.

    They are cut `BLOCK` steps at a time.
    """
    end = first_step + num_steps
    for start in range(first_step, end, BLOCK):
        block = [batches.step(index) for index in range(start, min(start + BLOCK, end))]
        counts = [sum(map(count, micro_batches)) for micro_batches in block]
        yield from zip(block, group.totals(counts))


def _is_past(until: float, loss: Tensor) -> bool:
    # A device works behind the clock: wait until it has this step's loss.
    loss.item()
    return time.perf_counter() >= until


def _require_finite(losses: list[float]) -> None:
    for index, value in enumerate(losses):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {index + 1} of {len(losses)} is {value}, "
                "expected a finite number (lower the learning rate)"
            )
