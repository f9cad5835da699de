"""What travels between server and clients: named fp32 tensors, a weight, a few numbers, or a
failure.

Everything here is numpy on the outside, so that a rank that only waits needs no torch. The tensors
of one message lie in one contiguous fp32 vector: what is sent is that vector as it lies in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


State = dict[
    str, np.ndarray
]  # what somebody goes on from, by name: views, valid until the next step


def join_states(parts: Mapping[str, Mapping[str, np.ndarray]]) -> State:
    """Several states in one; the names get the part's name and a slash in front."""
    return {
        f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()
    }


def part_of_state(state: Mapping[str, np.ndarray], part: str) -> State:
    """One of the states that `join_states` put together; empty if it is not there."""
    start = f"{part}/"
    return {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}


class ClientError(Exception):
    """What makes one client fail in a round, and nobody else."""


class SealedTensorError(ValueError):
    """A tensor of the global model was about to be packed for the wire."""


class TensorSpec(NamedTuple):
    """Name and shape of one tensor; its type on the wire is always fp32."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Schema(tuple[TensorSpec, ...]):
    """The names and shapes of a message, in order."""

    __slots__ = ()

    @classmethod
    def of(cls, items: Iterable[tuple[str, Iterable[int]]]) -> Schema:
        """Build from (name, shape) pairs, for instance from JSON."""
        return cls(TensorSpec(str(name), tuple(int(n) for n in shape)) for name, shape in items)

    @property
    def num_values(self) -> int:
        return sum(spec.num_values for spec in self)

    @property
    def digest(self) -> bytes:
        """16 bytes that two equal schemas share."""
        return hashlib.blake2b(
            repr([(s.name, s.shape) for s in self]).encode(), digest_size=16
        ).digest()

    def require(self, expected: Schema, whose: str) -> None:
        """Raise ValueError naming the first tensor in which `self` differs from `expected`."""
        for found, wanted in zip(self, expected):
            if found != wanted:
                raise ValueError(
                    f"{whose}: found tensor {found.name!r} {list(found.shape)}, "
                    f"expected {wanted.name!r} {list(wanted.shape)}"
                )
        if len(self) != len(expected):
            extra = (self if len(self) > len(expected) else expected)[min(len(self), len(expected))]
            raise ValueError(
                f"{whose}: found {len(self)} tensors, expected {len(expected)}; "
                f"the first that differs is {extra.name!r}"
            )


class _Seal:
    """The memory of the global model, which may not be packed; it is held here, so that its
    addresses stay its own.
    """

    def __init__(self) -> None:
        self._owners: list[object] = []
        self._storages: dict[int, str] = {}
        self._ranges: list[tuple[int, int, str]] = []

    def add(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start == 0 or start in self._storages:
                continue
            self._owners.append(storage)
            self._storages[start] = name
            if tensor.device.type == "cpu":
                self._ranges.append((start, start + storage.nbytes(), name))

    def refuse_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._refuse(name, self._storages.get(tensor.untyped_storage().data_ptr()))
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self._refuse_range(name, storage.data_ptr(), storage.nbytes())

    def refuse_array(self, array: np.ndarray) -> None:
        self._refuse_range("this array", array.__array_interface__["data"][0], array.nbytes)

    def _refuse_range(self, name: str, low: int, size: int) -> None:
        if size:
            self._refuse(
                name, next((n for a, b, n in self._ranges if low < b and a < low + size), None)
            )

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    @staticmethod
    def _refuse(name: str, owner: str | None) -> None:
        if owner is not None:
            raise SealedTensorError(
                f"{name} is the memory of {owner!r} of the global model, which never leaves "
                "the server; "
                "expected a prompt, or a tensor of the auxiliary model made by copying"
            )


seal = _Seal()


class NamedTensors(Mapping[str, np.ndarray]):
    """Named fp32 arrays that are views of one contiguous vector.

    Args:
        schema: names and shapes, in order.
        flat: fp32 vector of `schema.num_values` values, C-contiguous; it is kept, not copied.

    Raises:
        ValueError: type, layout or length of `flat` does not fit the schema.
        SealedTensorError: `flat` is memory of the global model.
    """

    __slots__ = ("_views", "flat", "schema")

    def __init__(self, schema: Schema, flat: np.ndarray) -> None:
        if flat.dtype != np.float32 or flat.ndim != 1 or not flat.flags.c_contiguous:
            raise ValueError(
                f"found a {flat.dtype} array of shape {flat.shape}, expected a contiguous "
                "float32 vector"
            )
        if flat.size != schema.num_values:
            raise ValueError(
                f"found {flat.size} values, expected {schema.num_values} for "
                f"{[s.name for s in schema]}"
            )
        seal.refuse_array(flat)
        self.schema, self.flat = schema, flat
        ends = np.cumsum([spec.num_values for spec in schema])
        self._views = {
            s.name: flat[end - s.num_values : end].reshape(s.shape) for s, end in zip(schema, ends)
        }

    @classmethod
    def pack(cls, tensors: Mapping[str, torch.Tensor]) -> NamedTensors:
        """Copy torch tensors (any device, any float type) into one fp32 vector on the host.

        Raises SealedTensorError if one of them is memory of the global model.
        """
        import torch

        schema = Schema.of((name, tensor.shape) for name, tensor in tensors.items())
        flat = np.empty(schema.num_values, dtype=np.float32)
        packed = cls(schema, flat)
        for name, tensor in tensors.items():
            seal.refuse_tensor(name, tensor)
            torch.from_numpy(packed[name]).copy_(tensor.detach())
        return packed

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> NamedTensors:
        """Copy arrays, of any float type, into one fp32 vector."""
        schema = Schema.of((name, array.shape) for name, array in arrays.items())
        return cls(
            schema, np.concatenate([array.ravel() for array in arrays.values()]).astype(np.float32)
        )

    def torch(self) -> dict[str, torch.Tensor]:
        """The same memory as torch tensors on the CPU; writing to one writes to the message."""
        import torch

        return {name: torch.from_numpy(view) for name, view in self._views.items()}

    def select(self, prefix: str) -> NamedTensors:
        """The tensors whose name starts with `prefix`, renamed without it.

        They must lie side by side.
        """
        offset, chosen = 0, []
        start = None
        for spec in self.schema:
            if spec.name.startswith(prefix):
                start = offset if start is None else start
                chosen.append(TensorSpec(spec.name[len(prefix) :], spec.shape))
            offset += spec.num_values
        schema = Schema(chosen)
        begin = start or 0
        return NamedTensors(schema, self.flat[begin : begin + schema.num_values])

    @classmethod
    def join(cls, parts: Mapping[str, NamedTensors]) -> NamedTensors:
        """Several messages in one; the names get the part's name in front."""
        schema = Schema(
            TensorSpec(p + s.name, s.shape) for p, part in parts.items() for s in part.schema
        )
        return cls(schema, np.concatenate([part.flat for part in parts.values()]))

    def copy(self) -> NamedTensors:
        return NamedTensors(self.schema, self.flat.copy())

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.flat).all())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"NamedTensors({', '.join(f'{s.name}{list(s.shape)}' for s in self.schema)})"


class Batch(NamedTuple):
    """Texts side by side, padded on the right to the longest of them.

    Attributes:
        input_ids: int64 [batch, length].
        attention_mask: int64 [batch, length], 0 on padding.
        targets: int64 [batch, length]: the token that this position should predict, or -100 where
            nothing is asked.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; itself where it is there already."""
        return (
            self
            if device.type == "cpu"
            else Batch(*(tensor.to(device, non_blocking=True) for tensor in self))
        )


@dataclass(frozen=True)
class Contract:
    """What may travel after the hand-out: fixed once, checked on every message.

    Attributes:
        down: tensors of a broadcast.
        up: tensors of an update.
        metrics: names of the numbers that ride in an update's header, at most 12.
        finite: those of them that every update has, as finite numbers, because the server works
            with them.
        servers: ranks of the server that clients may ask during a round, with values of any number;
        0: none.
    """

    down: Schema
    up: Schema
    metrics: tuple[str, ...] = ()
    servers: int = 0
    finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Update:
    """What one client sends up after its local work of one round.

    Attributes:
        client: client id, from 0.
        weight: its say in the merge (samples used).
        tensors: the tuned prompt.
        metrics: losses, seconds, ... under the names of the contract.
    """

    client: int
    weight: float
    tensors: NamedTensors
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client's error as a value: it rides the gather in the place of an update."""

    client: int
    round: int
    phase: str
    reason: str
