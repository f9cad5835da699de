"""Losses as sums over what counts, with the count: what is averaged, and over what, is decided in
one place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsp_mpi.tensors import Batch

if TYPE_CHECKING:
    from fedsp_mpi.models.backbone import LanguageModel
    from fedsp_mpi.models.prompts import Prompt

LEAST = 1e-6  # that a loss is divided by


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the next-token cross entropy over answer tokens: logits [answers, vocabulary], targets
    [answers].
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def answer_loss_of(model: LanguageModel, prompt: Prompt | None, batch: Batch) -> Tensor:
    """Return the sum of the next-token cross entropy over a batch's answers, a scalar in nats.

    Args:
        model: answers.
        prompt: goes in front of every text.
        batch: int64 [batch, length], on the model's device.
    """
    return answer_loss(*model.answer_logits(batch, prompt))


def answer_losses(logits: Tensor, targets: Tensor, counts: list[int]) -> Tensor:
    """Of each example the mean of the next-token cross entropy over its answer's tokens, fp32
    [examples].

    Args:
        logits, targets: [answers, vocabulary] and [answers], example after example.
        counts: answer tokens of each example.
    """
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([part.mean() for part in each.split(counts)])


def fitness(objective: str, losses: Tensor, others: Tensor) -> Tensor:
    """What a search minimises: the mean loss, or how the losses compare with those of perturbed
    copies.

    Args:
        objective: "loss"; "ratio_of_means" (FedBPT's reference); "mean_of_ratios" (FedBPT, Eq. 7,
            over the number).
        losses: [examples].
        others: [examples], of the copies; not looked at by "loss". What is nearly 0 counts as 1e-6.
    """
    if objective == "loss":
        return losses.mean()
    if objective == "ratio_of_means":
        return losses.mean() / others.mean().clamp(min=LEAST)
    return (losses / others.clamp(min=LEAST)).mean()


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum over the positions that are not padding of the mean squared difference across the width.

    Args:
        student, teacher: [batch, length, hidden].
        mask: [batch, length], 1 where there is text. (The reference averages over padding too.)
    """
    apart = (student.float() - teacher.float()).square().mean(dim=-1)
    return torch.where(mask.bool(), apart, 0.0).sum()


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over positions of T^2 KL(teacher || student) of the softened distributions (Hinton et
    al., 2015).

    Args:
        student, teacher: logits [positions, vocabulary] of the positions that are not padding.
        temperature: T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
