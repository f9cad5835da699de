"""Prompts in a space of few dimensions, by a random matrix that every rank can generate and none
has to store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi import rng
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec

_BLOCK_ROWS = 2048  # rows of a matrix that are in memory at a time


@dataclass(frozen=True)
class Subspace:
    """The map z -> A z, where A has independent values of N(0, scale^2) and one row for each value
    of a prompt.

    A is generated anew, block by block, in every call, and so takes no memory: with 500 dimensions
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
        """Return A z for each point z.

        Args:
            points: [num, dimension], of any float type.

        Returns:
            fp32 [num, num_tokens, row_width] on the CPU.
        """
        num_tokens = self.spec.num_tokens
        num_values = num_tokens * self.spec.row_width
        columns = torch.from_numpy(np.asarray(points, dtype=np.float32)).T
        expanded = torch.empty(len(points), num_values)
        for block_index, start in enumerate(range(0, num_values, _BLOCK_ROWS)):
            num_rows = min(_BLOCK_ROWS, num_values - start)
            random = rng.generator(self.seed, "projection", block_index)
            block = torch.from_numpy(
                random.standard_normal((num_rows, self.dimension), dtype=np.float32)
            )
            expanded[:, start : start + num_rows] = (block @ columns).T.mul_(self.scale)
        return expanded.view(len(points), num_tokens, self.spec.row_width)


def scale_of(
    model: LanguageModel, first: Prompt, dimension: int, *, step_size: float, spread: float
) -> float:
    """Return the scale of a `Subspace` whose points deviate as much as what they are added to.

    With it, A z for z of N(0, step_size^2) has `spread` times the standard deviation of all values
    of the word embeddings (as in FedBPT's reference), or of the first prompt if it is a prefix.

    Args:
        model: whose word embeddings [vocabulary, hidden] are measured.
        first: the prompt that a search starts from, [num_tokens, row_width].
        dimension: of z.
        step_size: standard deviation of z, at the start of the search.
        spread: ratio of both deviations.
    """
    num_values = 0
    total = 0.0
    squares = 0.0
    with torch.no_grad():
        for rows in _measured_rows(model, first):
            values = rows.double()
            num_values += values.numel()
            total += float(values.sum())
            squares += float(values.square().sum())
    mean = total / num_values
    deviation = math.sqrt(squares / num_values - mean**2)
    return spread * deviation / (math.sqrt(dimension) * step_size)


def _measured_rows(model: LanguageModel, first: Prompt) -> Iterator[Tensor]:
    """Yield the rows whose deviation counts, [at most _BLOCK_ROWS, width] each.

    Word embeddings are those that enter the first layer, which Gemma scales by its width.
    """
    if first.spec.kind == "prefix":
        yield from first.matrix().split(_BLOCK_ROWS)
        return
    embedding = model.model.get_input_embeddings()
    tokens = torch.arange(len(embedding.weight), device=embedding.weight.device)
    yield from map(embedding, tokens.split(_BLOCK_ROWS))
