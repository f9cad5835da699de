"""Forward passes for a search: on the model that a client holds, or on the server's, for clients
that hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi.data.tokens import Text, by_length, collate
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import answer_losses
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptBatch
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.training.device import oom_as_client_error

Group = Sequence[Text]


class InferenceBackend(Protocol):
    """Whose losses they are does not matter."""

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """For each group of texts the mean loss of each text's answer under each point, fp64
        [points, texts].

        Args:
            client: whose texts they are.
            points: z, [points, dimension].
            groups: texts whose losses are told apart.
        """
        ...


class LocalInference:
    """On a model in this process, with the prompts first + A z, those of several points in one
    pass.

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
        self._subspace, self._depths, self._batch_tokens, self._spec = (
            subspace,
            depths,
            batch_tokens,
            prompt.spec,
        )

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """As `InferenceBackend` says. Raises OutOfMemoryError."""
        texts, tried = [text for group in groups for text in group], self._prompts(points)
        found = np.empty((len(points), len(texts)))
        each = [text for _ in points for text in texts]
        with oom_as_client_error(), torch.inference_mode(), self._model.evaluating():
            prompts = self._model.remember(PromptBatch(self._spec, tried, torch.arange(len(tried))))
            for some in by_length(each, self._batch_tokens, self._spec.num_tokens):
                which, where = np.divmod(some, len(texts))
                own = replace(prompts, owners=torch.from_numpy(which).to(tried.device))
                found[which, where] = self._losses([texts[i] for i in where], own)
        self._prompt.load({"prompt": tried[-1]})
        return np.split(found, np.cumsum([len(group) for group in groups])[:-1], axis=1)

    def _prompts(self, points: np.ndarray) -> Tensor:
        """The prompt of each point, fp32 [points, tokens, row width]."""
        changes = [
            self._depths.down({"prompt": change})["prompt"]
            for change in self._subspace.expand(points)
        ]
        return (self._first + torch.stack(changes)).to(self._model.device)

    def _losses(self, texts: Group, prompts: PromptBatch) -> np.ndarray:
        """The mean loss of each text's answer."""
        batch = collate(texts).to(self._model.device)
        counts = (batch.targets != -100).sum(dim=1).tolist()
        return (
            answer_losses(*self._model.answer_logits(batch, prompts), counts).double().cpu().numpy()
        )


class RemoteInference:
    """On the server's model: points and texts go there, and losses come back; what a client of a
    private model has.

    Args:
        ask: what the server answers to a client's values.
    """

    def __init__(self, ask: Callable[[int, np.ndarray], np.ndarray]) -> None:
        self._ask = ask

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
        """As `InferenceBackend` says. Raises ValueError if the answer is not one."""
        counts = [len(group) for group in groups]
        found = self._ask(client, packed(points, groups))
        if found.size != len(points) * sum(counts):
            raise ValueError(
                f"found {found.size} losses from the server, expected {len(points)} x "
                f"{sum(counts)} for client {client}"
            )
        columns = found.astype(np.float64).reshape(len(points), sum(counts))
        return np.split(columns, np.cumsum(counts)[:-1], axis=1)


class Limits(NamedTuple):
    """What a question can be about.

    Attributes:
        dimension: of a point.
        num_tokens: of the vocabulary.
        max_length: most tokens of a text.
    """

    dimension: int
    num_tokens: int
    max_length: int


def answered(forward: InferenceBackend, question: np.ndarray, limits: Limits) -> np.ndarray:
    """The losses that a client asks for, fp32, one point after the other, each over all of its
    texts.

    Raises ValueError if the values are no question: see `unpacked`.
    """
    points, groups = unpacked(question, limits)
    return np.concatenate(forward.losses(-1, points, groups), axis=1).astype(np.float32).ravel()


def packed(points: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """Points and texts as fp32 values, which hold every token id below 2^24 exactly.

    Layout: number of points, dimension, number of groups, texts of each group; the points; of each
    text its length, answer, and gap (-1: none), and its ids.
    """
    head = [*points.shape, len(groups), *map(len, groups)]
    texts = [part for group in groups for text in group for part in (_about(text), text.ids)]
    return np.concatenate([head, points.ravel(), *texts], dtype=np.float32, casting="same_kind")


def unpacked(question: np.ndarray, limits: Limits) -> tuple[np.ndarray, list[list[Text]]]:
    """The points, fp32 [points, dimension], and groups of texts that were packed.

    Args:
        question: what a client sent, fp32 [any number].
        limits: what points and texts of this run are like.

    Raises ValueError if the values are not points and texts of that layout.
    """
    values = _Values(question)
    num_points, width, num_groups = values.numbers(3)
    if width != limits.dimension or num_points < 1:
        raise ValueError(
            f"found {num_points} points of {width} dimensions, expected some of {limits.dimension}"
        )
    counts = values.numbers(num_groups)
    points = values.take(num_points * width).reshape(num_points, width)
    if not np.isfinite(points).all():
        raise ValueError("found a point that is not finite, expected finite numbers")
    groups = [[_text(values, limits) for _ in range(count)] for count in counts]
    values.require_end()
    return points, groups


def _text(values: _Values, limits: Limits) -> Text:
    length, answer = values.numbers(2)
    gap = values.take(1)[0]
    if not 0 < length <= limits.max_length or answer >= length:
        raise ValueError(
            f"found a text of {length} tokens whose answer begins at {answer}, expected at "
            f"most {limits.max_length} "
            "tokens, the answer among them"
        )
    ids = np.array(values.numbers(length), dtype=np.int32)
    largest = max(int(ids.max()), gap)
    if largest >= limits.num_tokens or gap < -1 or gap != np.floor(gap):
        raise ValueError(f"found token {largest:g}, expected ids below {limits.num_tokens}")
    return Text(ids, answer, None if gap < 0 else int(gap))


class _Values:
    """Reads fp32 values from the front; ValueError where there are not as many, or where one is no
    count.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values, self._place = values, 0

    def take(self, num: int) -> np.ndarray:
        if num > self._values.size - self._place:
            raise ValueError(f"found {self._values.size - self._place} values, expected {num} more")
        self._place += num
        return self._values[self._place - num : self._place]

    def numbers(self, num: int) -> list[int]:
        """Whole numbers from 0, below 2^24."""
        values = self.take(num)
        if not ((values >= 0) & (values < 1 << 24) & (values == np.floor(values))).all():
            raise ValueError(
                "found a value that is no whole number from 0, expected a count or a token id"
            )
        return [int(value) for value in values]

    def require_end(self) -> None:
        if self._place != self._values.size:
            raise ValueError(
                f"found {self._values.size - self._place} values behind the last text, "
                "expected none"
            )


def _about(text: Text) -> tuple[int, int, int]:
    return len(text.ids), text.answer, -1 if text.gap is None else text.gap
