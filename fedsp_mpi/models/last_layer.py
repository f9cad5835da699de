"""The last layer at the answers' positions only.

Of what leaves it, nothing else is read. The layers before it run at all positions, because later
tokens attend to what they put out; and so does the last one's projection to keys and values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.tensors import AnswerPlaces

# What the families call the cache in the arguments of a layer.
_CACHE_NAMES = ("past_key_values", "layer_past")


class _Cache(Protocol):
    """What a layer keeps keys and values in: a cache of transformers."""

    def update(self, keys: Tensor, values: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return all of a layer: [batch, heads, positions, head_dim]."""
        ...


class _KeptError(Exception):
    """The layer has computed its keys and values, which was all that it was run for."""


class _KeysAndValues:
    """Stand for a cache, in two runs of one layer.

    In the first run it keeps all keys and values, behind those of the real cache if there is one,
    and ends the run. In the second one, whose own keys and values it ignores, it gives them to the
    queries.

    Args:
        cache: of transformers, or None.
    """

    def __init__(self, cache: _Cache | None) -> None:
        self._cache = cache
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all positions, [batch, heads, positions, head_dim]."""
        if self._kept is not None:
            return self._kept
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, layer_index)
        self._kept = (keys, values)
        raise _KeptError


class LastLayer:
    """What the last layer of one forward pass is run on, as hooks of that layer.

    transformers' own code runs the layer, whatever its parts and their order, twice: on all
    positions until it has its keys and values, and on those of the answers with these keys and
    values. That takes a layer all of whose other parts work on each position alone, as in every
    listed family; the tests compare each with the complete pass.

    Args:
        places: of the answers in the text.
        num_before: prompt positions in front of the text's among those that enter the layer.
        is_causal: whether a pass without a mask means that tokens see none behind them.
    """

    def __init__(self, places: AnswerPlaces, num_before: int, *, is_causal: bool) -> None:
        self._places = places
        self._num_before = num_before
        self._is_causal = is_causal
        self._is_complete = True

    @contextmanager
    def running(self, layer: nn.Module | None) -> Iterator[None]:
        """Run the block, a forward pass, with the model's last layer at the answers' positions.

        Args:
            layer: the last one; None: the pass is a complete one.
        """
        if layer is None:
            yield
            return
        hooks = [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def states_of(self, output: Tensor) -> Tensor:
        """Return the states [answers, hidden] in the last hidden states that the model returned."""
        if self._is_complete:
            states = output[:, self._num_before :].flatten(0, 1)
            return states.index_select(0, self._places.flat)
        return output.flatten(0, 1)[: len(self._places.flat)]

    def _before(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: JsonObject
    ) -> tuple[tuple[Tensor], JsonObject] | None:
        """Replace the arguments of the layer's run by those of the answers' positions."""
        names = _names(type(layer).forward)
        cache_name = next((name for name in _CACHE_NAMES if name in names), None)
        arguments: JsonObject = dict(zip(names, args)) | kwargs
        mask = arguments.get("attention_mask")
        is_sliceable = not self._is_causal if mask is None else mask.dim() == 4
        hidden = arguments.pop("hidden_states")
        batch_size, length, width = hidden.shape
        # With more answers, two runs take longer than one.
        is_worth_it = 2 * self._places.positions.shape[1] <= length
        if cache_name is None or not is_sliceable or not is_worth_it:
            return None
        arguments[cache_name] = _KeysAndValues(arguments.get(cache_name))
        with suppress(_KeptError):
            layer.forward(hidden, **arguments)
        positions = self._places.positions + self._num_before
        first_rows = torch.arange(0, batch_size * length, length, device=hidden.device)
        rows = (positions + first_rows[:, None]).flatten()
        for name, value in arguments.items():
            if value is not None and name in _BY_POSITION:
                arguments[name] = _BY_POSITION[name](value, positions, rows)
        chosen = hidden.reshape(-1, width).index_select(0, rows)
        self._length = length
        self._is_complete = False
        return (chosen.view(batch_size, -1, width),), arguments

    def _after(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        """Lay out the answers' states in rows of the input's length: GPT-2 asks for that length."""
        if self._is_complete:
            return None
        states = output.flatten(0, 1)
        if self._places.slots is not None:
            states = states.index_select(0, self._places.slots)
        padded = F.pad(states, (0, 0, 0, -len(states) % self._length))
        return padded.view(-1, self._length, padded.shape[-1])


@functools.cache
def _names(forward: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of what a layer's forward pass takes, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _select(value: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Select what belongs to the answers' positions.

    Args:
        value: [batch or 1, length, ...].
        positions: in each text, int64 [batch, most].
        rows: of the batch with its texts one behind the other, int64 [batch * most].

    Returns:
        [batch, most, ...].
    """
    index = positions.flatten() if len(value) == 1 else rows
    chosen = value.flatten(0, 1).index_select(0, index)
    return chosen.view(*positions.shape, *chosen.shape[1:])


def _select_mask(value: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Select queries of a mask [batch or 1, 1, length or 1, keys]: [batch, 1, most or 1, keys]."""
    if value.shape[2] == 1:
        return value
    return _select(value[:, 0], positions, rows)[:, None]


def _select_angles(
    value: tuple[Tensor, Tensor], positions: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    """Select of cosines and sines, each [batch or 1, length, head_dim]."""
    return tuple(_select(part, positions, rows) for part in value)


# The arguments of a layer that have a part for each position.
_BY_POSITION: dict[str, Callable[..., object]] = {
    "attention_mask": _select_mask,
    "position_embeddings": _select_angles,
    "position_ids": _select,
}
