"""Prompts in a space of few dimensions: a random matrix that everybody can make and nobody has to
hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi import rng
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec

_ROWS = 2048  # of the matrix that there are at a time


@dataclass(frozen=True)
class Subspace:
    """The map z -> A z, where A has independent values of N(0, scale^2) and one row for each value
    of a prompt.

    A is made anew in pieces whenever it is asked for, and so takes no memory: with 500 dimensions
    it would have 500 times a prompt's size. Black-box tuning (Sun et al., 2022, arXiv 2201.03514)
    calls it the random projection.

    Attributes:
        spec: of the prompts, without a re-parameterisation.
        dimension: of z.
        scale: standard deviation of a value of A.
        seed: of the run.
    """

    spec: PromptSpec
    dimension: int
    scale: float
    seed: int

    def expand(self, points: np.ndarray) -> Tensor:
        """A z for each row of `points` [num, dimension]: fp32 [num, tokens, row width] on the CPU."""
        tokens, width = self.spec.num_tokens, self.spec.row_width
        narrow = torch.from_numpy(np.asarray(points, dtype=np.float32)).T
        found = torch.empty(len(points), tokens * width)
        for block, start in enumerate(range(0, tokens * width, _ROWS)):
            rows = min(_ROWS, tokens * width - start)
            random = rng.generator(self.seed, "projection", block)
            piece = torch.from_numpy(
                random.standard_normal((rows, self.dimension), dtype=np.float32)
            )
            found[:, start : start + rows] = (piece @ narrow).T.mul_(self.scale)
        return found.view(len(points), tokens, width)


def scale_of(
    model: LanguageModel, first: Prompt, dimension: int, step_size: float, spread: float
) -> float:
    """The scale with which A z, for z of N(0, step_size^2), has `spread` times the deviation of
    what it is added to.

    That is the deviation of all values of the word embeddings (as in FedBPT's reference), or of a
    first prefix.
    """
    with torch.no_grad():
        weights = (
            model.model.get_input_embeddings().weight
            if first.spec.kind == "input"
            else first.matrix()
        )
        total = squares = 0.0
        for part in weights.split(_ROWS):
            values = part.double()
            total, squares = total + float(values.sum()), squares + float(values.square().sum())
    mean = total / weights.numel()
    deviation = math.sqrt(squares / weights.numel() - mean**2)
    return spread * deviation / (math.sqrt(dimension) * step_size)
