"""Losses as sums over what counts; what they are averaged over is decided by the caller, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsp_mpi.tensors import Batch

if TYPE_CHECKING:
    from fedsp_mpi.models.language_model import LanguageModel
    from fedsp_mpi.models.prompts import Prompt

# A smaller loss counts as this where it is divided by.
MIN_LOSS = 1e-6


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the next-token cross entropy over answer tokens, an fp32 scalar in nats.

    Args:
        logits: [answers, vocabulary], of any float type.
        targets: int64 [answers].
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def answer_loss_of(model: LanguageModel, prompt: Prompt | None, batch: Batch) -> Tensor:
    """Return the sum of the next-token cross entropy over a batch's answers, by their weights, an
    fp32 scalar in nats.

    Args:
        model: answers.
        prompt: goes in front of every text.
        batch: int64 [batch, length], on the model's device.
    """
    states = model.answer_states(batch, prompt)
    logits, targets = model.logits_and_targets(states, batch)
    weights = batch.target_weights
    if weights is None:
        return answer_loss(logits, targets)
    return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum()


def answer_losses(logits: Tensor, targets: Tensor, counts: list[int]) -> Tensor:
    """Return each example's mean next-token cross entropy over its answer, fp32 [examples], in
    nats.

    Args:
        logits: [answers, vocabulary], example after example.
        targets: int64 [answers].
        counts: number of answer tokens of each example.
    """
    token_losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([losses.mean() for losses in token_losses.split(counts)])


def fitness(objective: str, losses: Tensor, perturbed: Tensor) -> Tensor:
    """Return what a search minimises, a scalar: the mean loss, or its ratio to perturbed copies'.

    Args:
        objective: "loss", the mean; "ratio_of_means", as in FedBPT's reference; or
            "mean_of_ratios" (FedBPT, Eq. 7, divided by the number of examples).
        losses: [examples], in nats.
        perturbed: losses of the perturbed copies, [examples], in nats; unused by "loss".
    """
    if objective == "loss":
        return losses.mean()
    if objective == "ratio_of_means":
        return losses.mean() / perturbed.mean().clamp(min=MIN_LOSS)
    return (losses / perturbed.clamp(min=MIN_LOSS)).mean()


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared difference across the width, summed over the text's positions.

    The reference averages over padding as well.

    Args:
        student: hidden states [batch, length, hidden].
        teacher: hidden states [batch, length, hidden].
        mask: [batch, length], 1 where there is text, 0 at padding.

    Returns:
        An fp32 scalar.
    """
    squared_error = (student.float() - teacher.float()).square().mean(dim=-1)
    return torch.where(mask.bool(), squared_error, 0.0).sum()


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened distributions, summed over positions.

    Source: Hinton et al., 2015.

    Args:
        student: logits [positions, vocabulary] of the positions that are not padding.
        teacher: logits [positions, vocabulary] of the same positions.
        temperature: T, which both logits are divided by.

    Returns:
        An fp32 scalar in nats.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
