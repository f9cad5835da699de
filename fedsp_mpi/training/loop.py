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

BLOCK = 32


class NonFiniteError(ClientError, ArithmeticError):
    """A loss is infinite or not a number."""


class Engine(Protocol):
    """What the loop asks of an optimizer, and who steps it together."""

    @property
    def team(self) -> ServerGroup: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...


class Batches(Protocol):
    """This rank's micro-batches by optimizer step."""

    @property
    def batch_size(self) -> int: ...

    def step(self, index: int) -> list[Batch]: ...


@dataclass(frozen=True)
class Trace:
    """What a stretch of training did.

    Attributes:
        losses: mean loss of each step.
        samples: examples processed.
        seconds: wall time.
    """

    losses: tuple[float, ...] = ()
    samples: int = 0
    seconds: float = 0.0

    @property
    def first(self) -> float:
        return self.losses[0] if self.losses else math.nan

    @property
    def last(self) -> float:
        return self.losses[-1] if self.losses else math.nan


def train(
    engine: Engine,
    batches: Batches,
    first_step: int,
    num_steps: int,
    loss: Callable[[Batch], Tensor],
    count: Callable[[Batch], int],
    device: torch.device,
    on_step: Callable[[Tensor], None] | None = None,
    until: float | None = None,
) -> Trace:
    """Take `num_steps` optimizer steps over the batches from `first_step` on.

    With `until`, a time of `time.perf_counter()`, no step begins after it but the first.

    A step's loss is the sum of `loss` over its micro-batches divided by the sum of `count`, so it
    does not depend on how the batch is cut, or on how many ranks share it. Losses are fetched from
    the device once, at the end.

    Raises NonFiniteError naming the first step whose loss is not finite.
    """
    start = time.perf_counter()
    losses: list[Tensor] = []
    for micro_batches, total in _in_blocks(batches, first_step, num_steps, count, engine.team):
        shares = [_share(engine, loss(batch.to(device)) / total) for batch in micro_batches]
        engine.step()
        losses.append(sum(shares[1:], shares[0]))
        engine.team.sum(losses[-1:])
        if on_step is not None:
            on_step(losses[-1])
        if until is not None and _is_past(until, losses[-1]):
            break
    found = torch.stack(losses).tolist() if losses else []
    _require_finite(found)
    return Trace(tuple(found), len(found) * batches.batch_size, time.perf_counter() - start)


def num_answer_tokens(batch: Batch) -> int:
    """Tokens that a batch asks for."""
    return int((batch.targets != -100).sum())


def num_text_tokens(batch: Batch) -> int:
    """Tokens of a batch that are not padding."""
    return int(batch.attention_mask.sum())


def _in_blocks(
    batches: Batches,
    first_step: int,
    num_steps: int,
    count: Callable[[Batch], int],
    team: ServerGroup,
) -> Iterator[tuple[list[Batch], float]]:
    """The micro-batches of every step, and what they count on all ranks together.

    They are cut many steps at a time: alone, between two steps, one takes four times as long.
    """
    end = first_step + num_steps
    for start in range(first_step, end, BLOCK):
        block = [batches.step(index) for index in range(start, min(start + BLOCK, end))]
        yield from zip(
            block, team.totals([sum(map(count, micro_batches)) for micro_batches in block])
        )


def _is_past(until: float, loss: Tensor) -> bool:
    loss.item()  # a device works behind the clock
    return time.perf_counter() >= until


def _share(engine: Engine, loss: Tensor) -> Tensor:
    engine.backward(loss)
    return loss.detach()


def _require_finite(losses: list[float]) -> None:
    for index, value in enumerate(losses):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {index + 1} of {len(losses)} is {value}, expected a "
                "finite number"
            )
