"""The exit of an auxiliary model, in closed form: ridge regression onto the states that the global model ends with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.data.tokens import Batches, Text
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.team import Team

_BATCH = 16  # texts of a forward pass


@dataclass(frozen=True)
class Side:
    """One of the two models, and the prompt that is attached to it."""

    model: LanguageModel
    prompt: Prompt


@dataclass(frozen=True)
class ExitFit:
    """How well an exit fits the texts that it was fitted to.

    Attributes:
        texts: how many they were.
        seconds: wall time.
        unexplained, unexplained_answers: the part of the variance of the global model's last states that is left, over
            all tokens, and where an answer's token is due.
    """

    texts: int
    seconds: float
    unexplained: float
    unexplained_answers: float


class _Moments:
    """Sums of products over positions, fp64: of the inputs x [hidden + 1, the last one 1] and the goals y [hidden]."""

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.xx, self.xy, self.yy = zeros(width + 1, width + 1), zeros(width + 1, width), zeros(1)

    def add(self, inputs: Tensor, goals: Tensor) -> None:
        """Count positions in: [positions, hidden] both."""
        x = torch.cat([inputs.double(), inputs.new_ones(len(inputs), 1).double()], dim=1)
        y = goals.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()

    @property
    def count(self) -> Tensor:
        """Positions."""
        return self.xx[-1, -1]

    def unexplained(self, solution: Tensor) -> float:
        """What a solution [hidden + 1, hidden] leaves of the goals' variance."""
        left = self.yy - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        variance = self.yy - self.xy[-1].square().sum() / self.count
        return float(left / variance)


def fit_exit(
    student: Side,
    teacher: Side,
    texts: Sequence[Text],
    settings: DistillationConfig,
    seed: int,
    team: Team,
    stop: Callable[[], bool],
) -> ExitFit:
    """Set the exit of `student` so that its last states are those of `teacher`, in the sense of least squares.

    Positions where an answer's token is due weigh, in sum, as much as all others: they are few, and they are what
    tuning works on. The solution is held to the identity by a ridge. No gradient is taken, and no other weight changes.
    Source: the tuned lens (Belrose et al., 2023), which is trained by gradient steps.

    Args:
        student: the auxiliary model, whose exit is the identity.
        teacher: the global model.
        texts: not empty; `settings.exit_texts` of them are taken, in an order that follows from `seed`.
        team: the ranks that share the work; all get the same exit.

    Raises StoppedError on all ranks when `stop` says so on one.
    """
    begin, exit = time.perf_counter(), student.model.model.base_model.exit
    assert torch.equal(exit.weight, torch.eye(len(exit.weight), device=exit.weight.device))
    num_texts = min(settings.exit_texts, len(texts))
    num_batches = -(-num_texts // _BATCH)
    batches = Batches(texts, min(_BATCH, num_texts), None, seed, "exit")
    others, answers = (_Moments(exit.in_features, student.model.device) for _ in range(2))
    for index in range(num_batches):
        if team.any(stop()):
            raise StoppedError(index, num_batches, 0)
        if team.is_mine(index):
            for batch in batches.step(index):
                _add(student, teacher, batch.to(student.model.device), others, answers)
    for moments in (others, answers):
        team.sum([moments.xx, moments.xy, moments.yy])
    weight = float(others.count / answers.count) if others.count and answers.count else 1.0
    solution = _solve(others.xx + weight * answers.xx, others.xy + weight * answers.xy, settings.exit_ridge)
    exit.weight.data.copy_(solution[:-1].T)
    exit.bias.data.copy_(solution[-1])
    whole = _Moments(exit.in_features, student.model.device)
    whole.xx, whole.xy, whole.yy = others.xx + answers.xx, others.xy + answers.xy, others.yy + answers.yy
    found = whole.unexplained(solution), answers.unexplained(solution)
    return ExitFit(num_texts, time.perf_counter() - begin, *found)


def _add(student: Side, teacher: Side, batch: Batch, others: _Moments, answers: _Moments) -> None:
    with torch.no_grad():
        inputs, goals = (side.model.hidden(batch, side.prompt) for side in (student, teacher))
    asked = batch.targets != -100
    for moments, where in ((others, batch.attention_mask.bool() & ~asked), (answers, asked)):
        if where.any():
            moments.add(inputs[where], goals[where])


def _solve(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """The solution W of least |x W - y|^2 + r |W - W0|^2, where W0 is the identity without an offset."""
    rows, width = xy.shape
    strength = ridge * xx.diagonal()[:-1].mean()
    held = torch.eye(rows, width, dtype=xx.dtype, device=xx.device)
    holding = strength * torch.eye(rows, dtype=xx.dtype, device=xx.device)
    holding[-1, -1] = 0  # the offset is free
    return torch.linalg.solve(xx + holding, xy + holding @ held)
