"""Forward passes for a search: on the model that a client holds, or on the server's.

The second is for clients that hold no model; FedBPT calls it an inference API.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsp_mpi.data.tokens import Text, by_length, collate
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_losses
from fedsp_mpi.models.prompts import Prompt, PromptBatch
from fedsp_mpi.training.device import oom_as_client_error

Texts = Sequence[Text]


class InferenceBackend(Protocol):
    """Something that runs a search's forward passes.

    Attributes:
        model: what runs them in this process; None if it is elsewhere.
        prompt: the prompt that was tried last; None likewise.
    """

    @property
    def model(self) -> LanguageModel | None: ...

    @property
    def prompt(self) -> Prompt | None: ...

    def hold(self, point: np.ndarray) -> None:
        """Set the prompt to that of a point, [dimension]."""

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Texts]) -> list[np.ndarray]:
        """Return each text's mean answer loss under each point, in nats a token.

        Args:
            client: whose texts they are.
            points: what prompts are made of, [points, dimension].
            groups: texts whose losses are returned apart.

        Returns:
            For each group fp64 [points, texts].
        """
        ...


class LocalInference:
    """Runs the passes on a model in this process, several points in one pass.

    Args:
        model: frozen.
        prompt: of that model's depth; is set to the point that was tried last.
        matrices: returns the prompt of each point, fp32 [points, tokens, row width].
        batch_tokens: most tokens of a forward pass, prompts among them.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        matrices: Callable[[np.ndarray], Tensor],
        *,
        batch_tokens: int,
    ) -> None:
        self.model = model
        self.prompt = prompt.requires_grad_(False)
        self._matrices = matrices
        self._batch_tokens = batch_tokens

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Texts]) -> list[np.ndarray]:
        """Return each text's mean answer loss, fp64 [points, texts]; see `InferenceBackend.losses`.

        Raises:
            OutOfMemoryError: the device's memory does not suffice.
        """
        spec = self.prompt.spec
        texts = [text for group in groups for text in group]
        prompts = self.prompts(points)
        losses = np.empty((len(points), len(texts)))
        pairs = [text for _ in points for text in texts]  # point by point
        with oom_as_client_error(), torch.inference_mode(), self.model.evaluating():
            for batch in by_length(pairs, self._batch_tokens, spec.num_tokens):
                point_of, text_of = np.divmod(batch, len(texts))
                owners = torch.from_numpy(point_of).to(prompts.values.device)
                losses[point_of, text_of] = self._batch_losses(
                    [texts[index] for index in text_of], replace(prompts, prompt_index=owners)
                )
        self.prompt.load({"prompt": prompts.values[-1]})
        return np.split(losses, np.cumsum([len(group) for group in groups])[:-1], axis=1)

    def prompts(self, points: np.ndarray) -> PromptBatch:
        """Return the prompts of points [points, dimension], read by the model already."""
        matrices = self._matrices(points).to(self.model.device)
        prompts = PromptBatch(self.prompt.spec, matrices, torch.arange(len(matrices)))
        with oom_as_client_error(), torch.inference_mode(), self.model.evaluating():
            return self.model.precompute_cache(prompts)

    def hold(self, point: np.ndarray) -> None:
        """Set the prompt to that of a point, [dimension]."""
        self.prompt.load({"prompt": self._matrices(point[None])[0]})

    def _batch_losses(self, texts: Texts, prompts: PromptBatch) -> np.ndarray:
        """Return the mean loss of each text's answer, fp64 [texts]."""
        batch = collate(texts).to(self.model.device)
        counts = (batch.targets != -100).sum(dim=1).tolist()
        logits, targets = self.model.answer_logits(batch, prompts)
        return answer_losses(logits, targets, counts).double().cpu().numpy()


class RemoteInference:
    """Sends points and texts to the server and gets losses back: for clients without a model.

    Args:
        call_server: sends a client's fp32 request and returns the server's fp32 response.
    """

    model = None
    prompt = None

    def __init__(self, call_server: Callable[[int, np.ndarray], np.ndarray]) -> None:
        self._call_server = call_server

    def hold(self, point: np.ndarray) -> None:
        """Do nothing with the point, [dimension]: there is no model here to score with."""

    def losses(self, client: int, points: np.ndarray, groups: Sequence[Texts]) -> list[np.ndarray]:
        """Return each text's mean answer loss, fp64 [points, texts]; see `InferenceBackend.losses`.

        Raises:
            ValueError: the response has another number of losses.
        """
        counts = [len(group) for group in groups]
        response = self._call_server(client, encode_request(points, groups))
        if response.size != len(points) * sum(counts):
            raise ValueError(
                f"found {response.size} losses from the server, expected {len(points)} x "
                f"{sum(counts)} for client {client}"
            )
        losses = response.astype(np.float64).reshape(len(points), sum(counts))
        return np.split(losses, np.cumsum(counts)[:-1], axis=1)


class Limits(NamedTuple):
    """What a request can contain.

    Attributes:
        dimension: of a point.
        vocabulary: number of tokens that there are.
        max_length: most tokens of a text.
    """

    dimension: int
    vocabulary: int
    max_length: int


def handle_request(inference: InferenceBackend, request: np.ndarray, limits: Limits) -> np.ndarray:
    """Return the losses that a client asks for.

    Args:
        inference: runs the forward passes.
        request: fp32 [any number], as `encode_request` makes it.
        limits: what it can contain.

    Returns:
        fp32 [points x texts], one point after the other, each over all of its texts.

    Raises:
        ValueError: the values are no request; see `decode_request`.
    """
    points, groups = decode_request(request, limits)
    losses = np.concatenate(inference.losses(-1, points, groups), axis=1)
    return losses.astype(np.float32).ravel()


def encode_request(points: np.ndarray, groups: Sequence[Texts]) -> np.ndarray:
    """Encode points and texts as fp32 values, which hold every token id below 2^24 exactly.

    Layout: number of points, dimension, number of groups, texts of each group; the points; of each
    text its length, answer, and gap (-1: none), and its ids.

    Args:
        points: [points, dimension].
        groups: texts whose losses are returned apart.

    Returns:
        fp32 [number of values].
    """
    parts: list[Sequence[int] | np.ndarray] = [
        [*points.shape, len(groups), *(len(group) for group in groups)],
        points.ravel(),
    ]
    for group in groups:
        for text in group:
            gap = -1 if text.gap is None else text.gap
            parts.append([len(text.ids), text.answer, gap])
            parts.append(text.ids)
    return np.concatenate(parts, dtype=np.float32, casting="same_kind")


def decode_request(request: np.ndarray, limits: Limits) -> tuple[np.ndarray, list[list[Text]]]:
    """Return the points, fp32 [points, dimension], and the groups of texts of a request.

    Args:
        request: what a client sent, fp32 [any number].
        limits: what it can contain.

    Raises:
        ValueError: the values are not points and texts of that layout.
    """
    reader = _Reader(request)
    num_points, width, num_groups = reader.counts(3)
    if width != limits.dimension or num_points < 1:
        raise ValueError(
            f"found {num_points} points of {width} dimensions, expected some of {limits.dimension}"
        )
    group_sizes = reader.counts(num_groups)
    points = reader.values(num_points * width).reshape(num_points, width)
    if not np.isfinite(points).all():
        raise ValueError("found a point that is not finite, expected finite numbers")
    groups = [[_read_text(reader, limits) for _ in range(size)] for size in group_sizes]
    reader.require_end()
    return points, groups


def _read_text(reader: _Reader, limits: Limits) -> Text:
    length, answer = reader.counts(2)
    gap = reader.values(1)[0]
    if not 0 < length <= limits.max_length or answer >= length:
        raise ValueError(
            f"found a text of {length} tokens whose answer begins at {answer}, expected at most "
            f"{limits.max_length} tokens, the answer among them"
        )
    ids = np.array(reader.counts(length), dtype=np.int32)
    largest = max(int(ids.max()), gap)
    if largest >= limits.vocabulary or gap < -1 or gap != np.floor(gap):
        raise ValueError(f"found token {largest:g}, expected ids below {limits.vocabulary}")
    return Text(ids, answer, None if gap < 0 else int(gap))


class _Reader:
    """Reads fp32 values from the front; raises ValueError where there are not as many."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._position = 0

    def values(self, num: int) -> np.ndarray:
        """Return the next values, fp32 [num].

        Raises:
            ValueError: fewer are left.
        """
        remaining = self._values.size - self._position
        if num > remaining:
            raise ValueError(f"found {remaining} values, expected {num} more")
        start = self._position
        self._position += num
        return self._values[start : self._position]

    def counts(self, num: int) -> list[int]:
        """Read whole numbers from 0 to 2^24 - 1."""
        values = self.values(num)
        is_count = (values >= 0) & (values < 1 << 24) & (values == np.floor(values))
        if not is_count.all():
            raise ValueError(
                "found a value that is no whole number from 0, expected a count or a token id"
            )
        return [int(value) for value in values]

    def require_end(self) -> None:
        remaining = self._values.size - self._position
        if remaining:
            raise ValueError(f"found {remaining} values behind the last text, expected none")
