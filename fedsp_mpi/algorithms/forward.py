"""Forward passes for a search: on the model that a client holds, or on the server's, for clients that hold none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi.data.tokens import Text, by_length, collate
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import answer_losses
from fedsp_mpi.models.prompts import DepthMap, Prompt, Several
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.training.device import named_out_of_memory

Group = Sequence[Text]


class Forward(Protocol):
    """Whose losses they are does not matter."""

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """For each group of texts the mean loss of each text's answer under each point, fp64 [points, texts].

        Args:
            client: whose texts they are.
            points: z, [points, dimension].
            groups: texts whose losses are told apart.
        """
        ...


class Held:
    """On a model in this process, with the prompts first + A z, those of several points in one pass.

    Args:
        model: frozen.
        prompt: of that model's depth; what was tried last of all is found there.
        first: what they begin with, [tokens, row width].
        subspace: leads from z to what is added, at the depth of the global model;
        depths: from there to that model's.
        batch_tokens: of a forward pass, prompts among them.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        first: Tensor,
        subspace: Subspace,
        depths: DepthMap,
        batch_tokens: int,
    ) -> None:
        self._model, self._prompt, self._first = model, prompt.requires_grad_(False), first
        self._subspace, self._depths, self._batch_tokens, self._spec = subspace, depths, batch_tokens, prompt.spec

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """As `Forward` says. Raises OutOfMemoryError."""
        texts, tried = [text for group in groups for text in group], self._prompts(points)
        found = np.empty((len(points), len(texts)))
        each = [text for _ in points for text in texts]
        with named_out_of_memory(), torch.inference_mode(), self._model.evaluating():
            prompts = self._model.remember(Several(self._spec, tried, torch.arange(len(tried))))
            for some in by_length(each, self._batch_tokens, self._spec.num_tokens):
                which, where = np.divmod(some, len(texts))
                own = replace(prompts, owners=torch.from_numpy(which).to(tried.device))
                found[which, where] = self._losses([texts[i] for i in where], own)
        self._prompt.load({"prompt": tried[-1]})
        return np.split(found, np.cumsum([len(group) for group in groups])[:-1], axis=1)

    def _prompts(self, points: np.ndarray) -> Tensor:
        """The prompt of each point, fp32 [points, tokens, row width]."""
        changes = [self._depths.down({"prompt": change})["prompt"] for change in self._subspace.expand(points)]
        return (self._first + torch.stack(changes)).to(self._model.device)

    def _losses(self, texts: Group, prompts: Several) -> np.ndarray:
        """The mean loss of each text's answer."""
        batch = collate(texts).to(self._model.device)
        counts = (batch.targets != -100).sum(dim=1).tolist()
        return answer_losses(*self._model.answer_logits(batch, prompts), counts).double().cpu().numpy()


class Asking:
    """On the server's model: points and texts go there, and losses come back; what a client of a private model has.

    Args:
        ask: what the server answers to a client's values.
    """

    def __init__(self, ask: Callable[[int, np.ndarray], np.ndarray]) -> None:
        self._ask = ask

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """As `Forward` says. Raises ValueError if the answer is not one."""
        counts = [len(group) for group in groups]
        found = self._ask(client, packed(points, groups))
        if found.size != len(points) * sum(counts):
            raise ValueError(
                f"found {found.size} losses from the server, expected {len(points)} x {sum(counts)} for client {client}"
            )
        columns = found.astype(np.float64).reshape(len(points), sum(counts))
        return np.split(columns, np.cumsum(counts)[:-1], axis=1)


def answered(forward: Forward, question: np.ndarray) -> np.ndarray:
    """The losses that a client asks for, fp32, one point after the other, each over all of its texts."""
    points, groups = unpacked(question)
    return np.concatenate(forward.losses(-1, points, groups), axis=1).astype(np.float32).ravel()


def packed(points: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """Points and texts as fp32 values, which hold every token id below 2^24 exactly.

    Layout: number of points, dimension, number of groups, texts of each group; the points; of each text its length,
    answer, and gap (-1: none), and its ids.
    """
    head = [*points.shape, len(groups), *map(len, groups)]
    texts = [part for group in groups for text in group for part in (_about(text), text.ids)]
    return np.concatenate([head, points.ravel(), *texts], dtype=np.float32, casting="same_kind")


def unpacked(question: np.ndarray) -> tuple[np.ndarray, list[list[Text]]]:
    """The points, fp32 [points, dimension], and groups of texts that were packed."""
    num, dimension, num_groups = question[:3].astype(int)
    start = 3 + num_groups
    counts = question[3:start].astype(int)
    points = question[start : start + num * dimension].reshape(num, dimension)
    place, groups = start + num * dimension, []
    for count in counts:
        group = []
        for _ in range(count):
            length, answer, gap = question[place : place + 3].astype(int)
            place += 3 + length
            group.append(Text(question[place - length : place].astype(np.int32), answer, None if gap < 0 else gap))
        groups.append(group)
    return points, groups


def _about(text: Text) -> tuple[int, int, int]:
    return len(text.ids), text.answer, -1 if text.gap is None else text.gap
