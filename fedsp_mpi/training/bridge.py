"""The bridge of an auxiliary model, in closed form: ridge regression onto the states of the global
model behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.data.tokens import Batches, Text
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.process_group import ServerGroup

_BATCH = 16  # texts of a forward pass


@dataclass(frozen=True)
class BridgeEnd:
    """One of the two models, the prompt that is attached to it, and the part of it whose inputs are
    compared.
    """

    model: LanguageModel
    prompt: Prompt
    part: nn.Module


@dataclass(frozen=True)
class BridgeFit:
    """How well a bridge fits the texts that it was fitted to.

    Attributes:
        texts: how many they were.
        seconds: wall time. unexplained, unexplained_answers: the part of the variance of the global
            model's states behind it that is
            left, over all tokens, and where an answer's token is due.
    """

    texts: int
    seconds: float
    unexplained: float
    unexplained_answers: float


class NormalEquations:
    """Sums of products over positions, fp64: of the inputs x [hidden + 1, the last one 1] and the
    goals y [hidden].
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.xx, self.xy, self.yy = zeros(width + 1, width + 1), zeros(width + 1, width), zeros(1)

    def add(self, inputs: Tensor, goals: Tensor) -> None:
        """Count positions in, [positions, hidden] both, each in units of its goal: first tokens
        have vast states.
        """
        y = goals.double()
        unit = y.square().mean(dim=1, keepdim=True).sqrt()
        x = torch.cat([inputs.double(), torch.ones_like(unit)], dim=1) / unit
        y = y / unit
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()

    @property
    def count(self) -> Tensor:
        """Positions, as they weigh."""
        return self.xx[-1, -1]

    def unexplained(self, solution: Tensor) -> float:
        """What a solution [hidden + 1, hidden] leaves of the goals' variance."""
        left = self.yy - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        variance = self.yy - self.xy[-1].square().sum() / self.count
        return float(left / variance)


def fit_bridge(
    student: BridgeEnd,
    teacher: BridgeEnd,
    texts: Sequence[Text],
    settings: DistillationConfig,
    seed: int,
    team: ServerGroup,
    stop: Callable[[], bool],
) -> BridgeFit:
    """Set the bridge of `student` so that what leaves it is what enters the layer of `teacher` it
    leads to.

    That is least squares over relative errors: positions where an answer's token is due weigh, in
    sum, as much as all others, because they are few, and tuning works on them. The solution is held
    to the identity by a ridge. No gradient is taken, and no other weight changes.

    Args:
        student: the auxiliary model, and its bridge, the identity so far.
        teacher: the global model, and the layer behind the bridge.
        texts: not empty; `settings.bridge_texts` of them are taken, in an order that follows from
            `seed`.
        team: the ranks that share the work; all get the same bridge.

    Raises StoppedError on all ranks when `stop` says so on one.
    """
    begin, bridge = time.perf_counter(), student.part
    assert isinstance(bridge, nn.Linear)
    assert torch.equal(bridge.weight, torch.eye(len(bridge.weight), device=bridge.weight.device))
    num_texts = min(settings.bridge_texts, len(texts))
    num_batches = -(-num_texts // _BATCH)
    batches = Batches(texts, min(_BATCH, num_texts), None, seed, "bridge")
    others, answers = (NormalEquations(bridge.in_features, student.model.device) for _ in range(2))
    for index in range(num_batches):
        if team.any(stop()):
            raise StoppedError(index, num_batches, 0)
        if team.is_mine(index):
            for batch in batches.step(index):
                _add(student, teacher, batch.to(student.model.device), others, answers)
    for moments in (others, answers):
        team.sum([moments.xx, moments.xy, moments.yy])
    weight = float(others.count / answers.count) if others.count and answers.count else 1.0
    solution = _solve(
        others.xx + weight * answers.xx, others.xy + weight * answers.xy, settings.bridge_ridge
    )
    bridge.weight.data.copy_(solution[:-1].T)
    bridge.bias.data.copy_(solution[-1])
    whole = NormalEquations(bridge.in_features, student.model.device)
    whole.xx, whole.xy, whole.yy = (
        others.xx + answers.xx,
        others.xy + answers.xy,
        others.yy + answers.yy,
    )
    found = whole.unexplained(solution), answers.unexplained(solution)
    return BridgeFit(num_texts, time.perf_counter() - begin, *found)


def _add(
    student: BridgeEnd,
    teacher: BridgeEnd,
    batch: Batch,
    others: NormalEquations,
    answers: NormalEquations,
) -> None:
    with torch.no_grad():
        inputs, goals = (
            side.model.entering(side.part, batch, side.prompt) for side in (student, teacher)
        )
    asked = batch.targets != -100
    for moments, where in ((others, batch.attention_mask.bool() & ~asked), (answers, asked)):
        if where.any():
            moments.add(inputs[where], goals[where])


def _solve(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """The solution W of least |x W - y|^2 + r |W - W0|^2, where W0 is the identity without an
    offset.
    """
    rows, width = xy.shape
    strength = ridge * xx.diagonal()[:-1].mean()
    held = torch.eye(rows, width, dtype=xx.dtype, device=xx.device)
    holding = strength * torch.eye(rows, dtype=xx.dtype, device=xx.device)
    holding[-1, -1] = 0  # the offset is free
    return torch.linalg.solve(xx + holding, xy + holding @ held)
