"""The bridge of an auxiliary model in closed form: ridge regression onto the states that the global
model has behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.data.tokens import Batches, Text
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.process_group import ServerGroup

_BATCH_SIZE = 16  # texts of a forward pass


@dataclass(frozen=True)
class BridgeEnd:
    """One of the two models whose states are compared.

    Attributes:
        model: the auxiliary or the global one.
        prompt: goes in front of every text.
        part: the submodule whose input states are compared.
    """

    model: LanguageModel
    prompt: Prompt
    part: nn.Module

    def states(self, batch: Batch) -> Tensor:
        """Return the states [batch, length, hidden] that enter the submodule."""
        return self.model.input_states_of(self.part, batch, self.prompt)


@dataclass(frozen=True)
class BridgeFit:
    """How well a bridge fits the texts that it was fitted to.

    Attributes:
        texts: number of them.
        seconds: wall time.
        unexplained: the part of the variance of the global model's states that is left, over all
            tokens.
        unexplained_answers: the same where an answer's token is due.
    """

    texts: int
    seconds: float
    unexplained: float
    unexplained_answers: float


class NormalEquations:
    """Sums of products over positions, of inputs x [hidden + 1], whose last one is 1, and goals y
    [hidden].

    Attributes:
        xx: sum of x x^T, fp64 [hidden + 1, hidden + 1].
        xy: sum of x y^T, fp64 [hidden + 1, hidden].
        yy: sum of |y|^2, fp64 [1].
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.xx = zeros(width + 1, width + 1)
        self.xy = zeros(width + 1, width)
        self.yy = zeros(1)

    def add(self, inputs: Tensor, goals: Tensor) -> None:
        """Add positions, each divided by the size of its goal: first tokens have vast states.

        Args:
            inputs: [positions, hidden], of any float type.
            goals: [positions, hidden], of any float type.
        """
        y = goals.double()
        unit = y.square().mean(dim=1, keepdim=True).sqrt()
        x = torch.cat([inputs.double(), torch.ones_like(unit)], dim=1) / unit
        y = y / unit
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()

    def plus(self, other: NormalEquations, weight: float = 1.0) -> NormalEquations:
        """Return the sums of both, those of `other` multiplied by a weight."""
        total = NormalEquations(len(self.xx) - 1, self.xx.device)
        total.xx = self.xx + weight * other.xx
        total.xy = self.xy + weight * other.xy
        total.yy = self.yy + weight * other.yy
        return total

    @property
    def count(self) -> Tensor:
        """The number of positions, as they are weighed: an fp64 scalar."""
        return self.xx[-1, -1]

    def unexplained(self, solution: Tensor) -> float:
        """Return the part of the goals' variance that a solution [hidden + 1, hidden] leaves."""
        squared_error = (
            self.yy - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        )
        variance = self.yy - self.xy[-1].square().sum() / self.count
        return float(squared_error / variance)


def fit_bridge(
    student: BridgeEnd,
    teacher: BridgeEnd,
    texts: Sequence[Text],
    *,
    settings: DistillationConfig,
    seed: int,
    group: ServerGroup,
    stop: Callable[[], bool],
) -> BridgeFit:
    """Set the student's bridge so that it gives what enters the layer of the teacher it leads to.

    These are least squares of relative errors. Positions where an answer's token is due weigh, in
    sum, as much as all others, because they are few, and tuning works on them. A ridge holds the
    solution near the identity. No gradient is taken, and no other weight changes.

    Args:
        student: the auxiliary model, and its bridge, which is still the identity.
        teacher: the global model, and the layer behind the bridge.
        texts: not empty; `settings.bridge_texts` of them are taken.
        settings: number of texts, and strength of the ridge.
        seed: of the order in which texts are taken.
        group: the ranks that share the work; all get the same bridge.
        stop: whether to stop before the next batch.

    Raises:
        StoppedError: on all ranks, when `stop` is true on one.
    """
    start = time.perf_counter()
    bridge = student.part
    assert isinstance(bridge, nn.Linear)
    assert torch.equal(bridge.weight, torch.eye(len(bridge.weight), device=bridge.weight.device))
    device = student.model.device
    num_texts = min(settings.bridge_texts, len(texts))
    num_batches = -(-num_texts // _BATCH_SIZE)  # rounded up
    batches = Batches(texts, min(_BATCH_SIZE, num_texts), None, seed=seed, purpose="bridge")
    context = NormalEquations(bridge.in_features, device)
    answers = NormalEquations(bridge.in_features, device)
    # --- sums over this rank's batches, then over ranks ---
    for index in range(num_batches):
        if group.any(stop()):
            raise StoppedError(index, num_batches, 0)
        if group.is_mine(index):
            for batch in batches.step(index):
                _add_batch(student, teacher, batch.to(device), context=context, answers=answers)
    for moments in (context, answers):
        group.sum([moments.xx, moments.xy, moments.yy])
    # --- the solution ---
    weight = float(context.count / answers.count) if context.count and answers.count else 1.0
    weighted = context.plus(answers, weight)
    solution = _solve(weighted.xx, weighted.xy, settings.bridge_ridge)
    bridge.weight.data.copy_(solution[:-1].T)
    bridge.bias.data.copy_(solution[-1])
    return BridgeFit(
        num_texts,
        time.perf_counter() - start,
        unexplained=context.plus(answers).unexplained(solution),
        unexplained_answers=answers.unexplained(solution),
    )


def _add_batch(
    student: BridgeEnd,
    teacher: BridgeEnd,
    batch: Batch,
    *,
    context: NormalEquations,
    answers: NormalEquations,
) -> None:
    """Add a batch's positions where an answer is due to `answers`, and all others to `context`."""
    with torch.no_grad():
        inputs = student.states(batch)
        goals = teacher.states(batch)
    is_answer = batch.targets != -100
    is_context = batch.attention_mask.bool() & ~is_answer
    for moments, where in ((context, is_context), (answers, is_answer)):
        if where.any():
            moments.add(inputs[where], goals[where])


def _solve(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """Return W of least |x W - y|^2 + r |W - W0|^2, where W0 is the identity without an offset.

    Args:
        xx: sum of x x^T, fp64 [hidden + 1, hidden + 1].
        xy: sum of x y^T, fp64 [hidden + 1, hidden].
        ridge: r in units of the mean of the diagonal of xx.
    """
    num_rows, width = xy.shape
    strength = ridge * xx.diagonal()[:-1].mean()
    identity = torch.eye(num_rows, width, dtype=xx.dtype, device=xx.device)
    penalty = strength * torch.eye(num_rows, dtype=xx.dtype, device=xx.device)
    penalty[-1, -1] = 0  # the offset is free
    return torch.linalg.solve(xx + penalty, xy + penalty @ identity)
