"""How much of the global model is in the model that clients get, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp_mpi.models.families import layers_path
from fedsp_mpi.models.language_model import LanguageModel

_FIRST_VALUES = 16  # that are compared before a whole tensor is


@dataclass(frozen=True)
class ExactCopies:
    """What clients hold of the global model, bit by bit.

    Attributes:
        num_values: numbers of its weights.
        num_layers: its layers of which they hold every weight.
    """

    num_values: int
    num_layers: int


def exact_copies(model: LanguageModel, handed_out: LanguageModel) -> ExactCopies:
    """Compare every weight of the global model with those of the clients' model.

    Args:
        model: the global model.
        handed_out: the clients' model.
    """
    if handed_out is model:
        return ExactCopies(model.num_parameters(), model.shape.num_layers)
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in handed_out.weights.values():
        by_shape.setdefault(weight.shape, []).append(weight.detach())
    num_values = 0
    is_whole: dict[str, bool] = {}  # by layer
    prefix = f"{layers_path(model.model)}."
    for name, weight in model.weights.items():
        candidates = by_shape.get(weight.shape, [])
        is_copied = any(_are_equal(weight.detach(), candidate) for candidate in candidates)
        if is_copied:
            num_values += weight.numel()
        if name.startswith(prefix):
            layer = name.removeprefix(prefix).partition(".")[0]
            is_whole[layer] = is_whole.get(layer, True) and is_copied
    return ExactCopies(num_values, sum(is_whole.values()))


def _are_equal(weight: Tensor, candidate: Tensor) -> bool:
    """Return whether two tensors [*shape] are equal, in the type of the first."""
    start = weight.flatten()[:_FIRST_VALUES]
    if not torch.equal(start, candidate.flatten()[:_FIRST_VALUES].to(start)):
        return False
    return torch.equal(weight, candidate.to(weight))
