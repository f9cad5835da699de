"""The last layer at the answers' positions only.

Of what leaves it, nothing else is read. The layers before it run at all positions, because later
tokens attend to what they put out; and so does the last one's projection to keys and values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsp_mpi.tensors import AnswerPlaces

# What the families call the cache in the arguments of a layer.
_CACHE_NAMES = ("past_key_values", "layer_past")


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

    def __init__(self, cache: Any) -> None:
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

    def states_of(self, output: Tensor) -> Tensor:
        """Return the states [answers, hidden] in the last hidden states that the model returned."""
        if self._is_complete:
            states = output[:, self._num_before :].flatten(0, 1)
            return states.index_select(0, self._places.flat)
        return output.flatten(0, 1)[: len(self._places.flat)]

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the arguments of the layer's run by those of the answers' positions."""
        arguments = {**dict(zip(_names(type(layer)), args)), **kwargs}
        cache_name = next((name for name in _CACHE_NAMES if name in _names(type(layer))), None)
        mask = arguments.get("attention_mask")
        is_sliceable = not self._is_causal if mask is None else mask.dim() == 4
        if cache_name is None or not is_sliceable:
            return None
        hidden = arguments.pop("hidden_states")
        arguments[cache_name] = _KeysAndValues(arguments.get(cache_name))
        with suppress(_KeptError):
            layer.forward(hidden, **arguments)
        positions = self._places.positions + self._num_before
        for name, value in arguments.items():
            arguments[name] = _at(positions, name, value)
        batch_size, length, width = hidden.shape
        rows = torch.arange(batch_size, device=hidden.device)[:, None] * length + positions
        chosen = hidden.reshape(-1, width).index_select(0, rows.flatten())
        self._length = length
        self._is_complete = False
        return (chosen.view(batch_size, -1, width),), arguments

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Lay out the answers' states in rows of the input's length: GPT-2 asks for that length."""
        if self._is_complete:
            return None
        states = output.flatten(0, 1)
        if self._places.slots is not None:
            states = states.index_select(0, self._places.slots)
        padded = F.pad(states, (0, 0, 0, -len(states) % self._length))
        return padded.view(-1, self._length, padded.shape[-1])


@contextmanager
def at_answers(
    layer: nn.Module, places: AnswerPlaces, num_before: int, *, is_causal: bool
) -> Iterator[LastLayer]:
    """Run the block, a forward pass, with the last layer at the answers' positions.

    The layer runs on all positions where it draws random numbers, as in dropout, so that the two
    runs would differ, and where there are too many answers for two runs to pay.

    Args:
        layer: the last one.
        places: of the answers in the text.
        num_before: prompt positions in front of the text's among those that enter the layer.
        is_causal: whether a pass without a mask means that tokens see none behind them.
    """
    run = LastLayer(places, num_before, is_causal=is_causal)
    if any(module.training for module in layer.modules()):
        yield run
        return
    hooks = [
        layer.register_forward_pre_hook(run.before, with_kwargs=True),
        layer.register_forward_hook(run.after),
    ]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def _names(layer_class: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of what a layer's forward pass takes, in order."""
    return tuple(inspect.signature(layer_class.forward).parameters)[1:]


def _at(positions: Tensor, name: str, value: Any) -> Any:
    """Return the part of a layer's argument that belongs to positions, int64 [batch, most].

    Args:
        positions: counted from the first one that enters the layer.
        name: of the argument.
        value: a mask [batch or 1, 1, length or 1, keys]; sines and cosines, [batch or 1, length,
            head_dim] each; position numbers [batch or 1, length]; or what belongs to none.
    """
    if name == "position_embeddings" and value is not None:
        return tuple(_select(part, positions) for part in value)
    if name == "position_ids" and value is not None:
        return _select(value, positions)
    if name == "attention_mask" and value is not None and value.shape[2] > 1:
        return _select(value[:, 0], positions)[:, None]
    return value


def _select(value: Tensor, positions: Tensor) -> Tensor:
    """Select positions [batch, most] of [batch or 1, length, ...]: [batch, most, ...]."""
    if len(value) == 1:
        return value[0][positions]
    rows = torch.arange(len(value), device=value.device)
    return value[rows[:, None], positions]
