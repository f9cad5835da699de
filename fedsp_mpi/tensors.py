"""Data that travels between server and clients: named fp32 tensors, weights, metrics, failures.

The interface is numpy, so that a rank that only waits does not need torch. The tensors of one
message are views of one contiguous fp32 vector, and that vector is sent as it lies in memory.

In docstrings, [*shape] is that of each tensor under its name, as a `Schema` holds it; it stays as
it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from fedsp_mpi.config.federation import CompressionConfig

if TYPE_CHECKING:
    import torch


# Resumable state by name. The arrays, each [*shape] of a parameter, an optimizer's state or a list
# of numbers, are views that are valid until the next training step.
State = dict[str, np.ndarray]


def join_states(parts: Mapping[str, Mapping[str, np.ndarray]]) -> State:
    """Return one state with the arrays [*shape] of all parts, named "part/name"; no copies."""
    joined: State = {}
    for part, state in parts.items():
        for name, value in state.items():
            joined[f"{part}/{name}"] = value
    return joined


def part_of_state(state: Mapping[str, np.ndarray], part: str) -> State:
    """Return the arrays [*shape] of one part of a joined state; empty if it is absent."""
    prefix = f"{part}/"
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


class ClientError(Exception):
    """An error that makes one client fail in a round, but not the run.

    Attributes:
        explains_itself: its message is all that a user needs; see `comm.guard.Guard`.
    """

    explains_itself = True


class SealedTensorError(ValueError):
    """A tensor of the global model was about to be packed for the wire."""


class TensorSpec(NamedTuple):
    """Name and shape of one tensor; its type on the wire is always fp32."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class Schema(tuple[TensorSpec, ...]):
    """Names and shapes of the tensors of a message, in order."""

    __slots__ = ()

    @classmethod
    def of(cls, items: Iterable[tuple[str, Iterable[int]]]) -> Schema:
        """Build from (name, shape) pairs, for instance from JSON."""
        return cls(TensorSpec(str(name), tuple(int(n) for n in shape)) for name, shape in items)

    @property
    def num_values(self) -> int:
        """Number of elements of all tensors together."""
        return sum(spec.num_values for spec in self)

    @property
    def digest(self) -> bytes:
        """16-byte hash of the names and shapes, the same on every machine."""
        text = repr([(spec.name, spec.shape) for spec in self])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def require(self, expected: Schema, whose: str) -> None:
        """Raise ValueError unless this schema equals `expected`.

        The message begins with `whose` and names the first tensor that differs.
        """
        for spec, expected_spec in zip(self, expected):
            if spec != expected_spec:
                raise ValueError(
                    f"{whose}: found tensor {spec.name!r} {list(spec.shape)}, "
                    f"expected {expected_spec.name!r} {list(expected_spec.shape)}"
                )
        if len(self) != len(expected):
            longer = self if len(self) > len(expected) else expected
            first_extra = longer[min(len(self), len(expected))]
            raise ValueError(
                f"{whose}: found {len(self)} tensors, expected {len(expected)}; "
                f"the first that differs is {first_extra.name!r}"
            )


class _ProtectedMemory:
    """Memory of the global model, which must never be packed into a message.

    The storages are kept alive, so that their addresses are never reused for other tensors.
    """

    def __init__(self) -> None:
        self._storages: list[object] = []
        self._name_by_address: dict[int, str] = {}
        self._host_ranges: list[tuple[int, int, str]] = []  # first byte, end, name

    def add(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Protect the storages of pairs (name, tensor [*shape]), tied ones once."""
        for name, tensor in named:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address == 0 or address in self._name_by_address:
                continue
            self._storages.append(storage)
            self._name_by_address[address] = name
            if tensor.device.type == "cpu":
                self._host_ranges.append((address, address + storage.nbytes(), name))

    def check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Raise SealedTensorError if a tensor [*shape] shares storage with the global model."""
        storage = tensor.untyped_storage()
        self._refuse_owned(name, self._name_by_address.get(storage.data_ptr()))
        # A tensor made by way of numpy may begin inside a protected storage.
        if tensor.device.type == "cpu":
            self._check_range(name, storage.data_ptr(), storage.nbytes())

    def check_array(self, array: np.ndarray) -> None:
        """Raise SealedTensorError if an array [*shape] overlaps the global model's memory."""
        self._check_range("this array", array.__array_interface__["data"][0], array.nbytes)

    def clear(self) -> None:
        """Forget all protected memory: the next run has a global model of its own."""
        self._storages.clear()
        self._name_by_address.clear()
        self._host_ranges.clear()

    def _check_range(self, name: str, address: int, size: int) -> None:
        if size == 0:
            return
        for begin, end, owner in self._host_ranges:
            if address < end and begin < address + size:
                self._refuse_owned(name, owner)

    @staticmethod
    def _refuse_owned(name: str, owner: str | None) -> None:
        if owner is not None:
            raise SealedTensorError(
                f"{name} is the memory of {owner!r} of the global model, which never leaves "
                "the server; expected a prompt, or a tensor of the auxiliary model made by copying"
            )


seal = _ProtectedMemory()


class NamedTensors(Mapping[str, np.ndarray]):
    """Named fp32 arrays, each [*shape] as the schema says, that are views of one contiguous vector.

    Args:
        schema: names and shapes, in order.
        flat: fp32 vector [schema.num_values], C-contiguous; it is used as it is, not copied.

    Raises:
        ValueError: dtype, layout or length of `flat` does not match the schema.
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
                f"{[spec.name for spec in schema]}"
            )
        seal.check_array(flat)
        self.schema = schema
        self.flat = flat
        self._views: dict[str, np.ndarray] = {}
        begin = 0
        for spec in schema:
            end = begin + spec.num_values
            self._views[spec.name] = flat[begin:end].reshape(spec.shape)
            begin = end

    @classmethod
    def pack(cls, tensors: Mapping[str, torch.Tensor]) -> NamedTensors:
        """Copy torch tensors [*shape] into one fp32 vector [num_values] on the host.

        Their device and float dtype may be any.

        Raises:
            SealedTensorError: one of them is memory of the global model.
        """
        import torch

        schema = Schema.of((name, tensor.shape) for name, tensor in tensors.items())
        flat = np.empty(schema.num_values, dtype=np.float32)
        packed = cls(schema, flat)
        for name, tensor in tensors.items():
            seal.check_tensor(name, tensor)
            torch.from_numpy(packed[name]).copy_(tensor.detach())
        return packed

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> NamedTensors:
        """Copy at least one array [*shape] of any float dtype into one fp32 vector [num_values]."""
        schema = Schema.of((name, array.shape) for name, array in arrays.items())
        flat = np.concatenate([array.ravel() for array in arrays.values()])
        return cls(schema, flat.astype(np.float32))

    def torch(self) -> dict[str, torch.Tensor]:
        """Return fp32 CPU tensors [*shape] that share this memory.

        Writing to one of them writes to the message.
        """
        import torch

        return {name: torch.from_numpy(view) for name, view in self._views.items()}

    def select(self, prefix: str) -> NamedTensors:
        """Return the fp32 tensors [*shape] whose names start with `prefix`, without the prefix.

        They share this memory, and must be adjacent in it.
        """
        selected: list[TensorSpec] = []
        begin = 0
        offset = 0
        for spec in self.schema:
            if spec.name.startswith(prefix):
                if not selected:
                    begin = offset
                selected.append(TensorSpec(spec.name.removeprefix(prefix), spec.shape))
            offset += spec.num_values
        schema = Schema(selected)
        return NamedTensors(schema, self.flat[begin : begin + schema.num_values])

    @classmethod
    def join(cls, parts: Mapping[str, NamedTensors]) -> NamedTensors:
        """Copy the fp32 tensors [*shape] of at least one part into one vector [num_values].

        Each name gets its part's key in front.
        """
        schema = Schema(
            TensorSpec(prefix + spec.name, spec.shape)
            for prefix, part in parts.items()
            for spec in part.schema
        )
        return cls(schema, np.concatenate([part.flat for part in parts.values()]))

    def copy(self) -> NamedTensors:
        """Return fp32 tensors of the same shapes and values in memory of their own."""
        return NamedTensors(self.schema, self.flat.copy())

    def is_finite(self) -> bool:
        """Return True unless a value is nan or infinite."""
        return bool(np.isfinite(self.flat).all())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        specs = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self.schema)
        return f"NamedTensors({specs})"


class AnswerPlaces(NamedTuple):
    """Where a batch has targets, as indices, so that nobody has to look for them on a device.

    Attributes:
        positions: of each text's targets, int64 [batch, most]; behind the last one any position.
        flat: of all targets, text after text, in the flattened batch, int64 [answers].
        slots: of all targets in the flattened `positions`, int64 [answers]; None: all of them are.
    """

    positions: torch.Tensor
    flat: torch.Tensor
    slots: torch.Tensor | None

    @classmethod
    def of(cls, is_target: np.ndarray) -> AnswerPlaces:
        """Return the places where a batch has targets, bool [batch, length], on the CPU."""
        import torch

        batch_size, length = is_target.shape
        flat = is_target.ravel().nonzero()[0]
        rows = flat // length
        columns = flat - rows * length
        counts = np.bincount(rows, minlength=batch_size)
        most = int(counts.max())
        if most * batch_size == len(flat):
            positions = columns.reshape(batch_size, most)
            return cls(torch.from_numpy(positions), torch.from_numpy(flat), None)
        slots = (
            np.arange(len(flat)) + (np.arange(batch_size) * most - counts.cumsum() + counts)[rows]
        )
        positions = np.zeros(batch_size * most, dtype=np.int64)
        positions[slots] = columns
        return cls(
            torch.from_numpy(positions.reshape(batch_size, most)),
            torch.from_numpy(flat),
            torch.from_numpy(slots),
        )

    def to(self, device: torch.device) -> AnswerPlaces:
        """Return the same indices, each of its shape, on a device."""
        if device.type == "cpu":
            return self
        parts = [None if part is None else part.to(device, non_blocking=True) for part in self]
        return AnswerPlaces._make(parts)


class Batch(NamedTuple):
    """Texts of one batch, padded on the right to the longest of them.

    Attributes:
        input_ids: int64 [batch, length].
        attention_mask: int64 [batch, length], 0 on padding.
        targets: int64 [batch, length]: the token to predict at this position, or -100 where there
            is no loss.
        weights: fp32 [batch], how much the answer of each text counts; None: all count alike.
        known_places: where the targets are, if that has been found out.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    known_places: AnswerPlaces | None = None

    @property
    def places(self) -> AnswerPlaces:
        """Where the targets are."""
        if self.known_places is not None:
            return self.known_places
        is_target = (self.targets != -100).cpu().numpy()
        return AnswerPlaces.of(is_target).to(self.targets.device)

    @property
    def target_weights(self) -> torch.Tensor | None:
        """How much each target counts, fp32 [answers], text after text; None: all alike."""
        if self.weights is None:
            return None
        return self.weights[self.places.flat // self.targets.shape[1]]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; itself if that is the CPU, where batches are made.

        There its targets' places are found, which would make a device wait.
        """
        if device.type == "cpu":
            return self
        parts = self._replace(known_places=self.places)
        return Batch._make(None if part is None else part.to(device) for part in parts)


@dataclass(frozen=True)
class Contract:
    """What may travel after the hand-out: fixed once, checked on every message.

    Attributes:
        down: schema of a broadcast.
        up: schema of an update.
        metrics: names of the numbers in an update's header, at most 12.
        servers: number of server ranks that answer clients' requests during a round, whose values
            may be of any number; 0: none.
        finite: those of the metrics that every update must have, as finite numbers, because the
            server computes with them.
        compression: how values travel in rounds.
    """

    down: Schema
    up: Schema
    metrics: tuple[str, ...] = ()
    servers: int = 0
    finite: tuple[str, ...] = ()
    compression: CompressionConfig = field(default_factory=CompressionConfig)


@dataclass(frozen=True)
class Update:
    """Result that one client sends to the server after its local training of one round.

    Attributes:
        client: client id, from 0.
        weight: weight in the aggregate (number of samples used).
        tensors: the tuned prompt.
        metrics: losses, seconds, ... by the names in the contract.
        packed: the tensors as they travel where the contract compresses them, uint8 [num_bytes].
    """

    client: int
    weight: float
    tensors: NamedTensors
    metrics: dict[str, float] = field(default_factory=dict)
    packed: np.ndarray | None = None


class Report(Protocol):
    """The sender of an update, its weight, and the numbers reported with it."""

    @property
    def client(self) -> int: ...

    @property
    def weight(self) -> float: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Failure:
    """Error of one client as a value, which is gathered in place of an update.

    Attributes:
        client: client id, from 0.
        round: round in which it failed.
        phase: what the client was doing.
        reason: one line for the user.
    """

    client: int
    round: int
    phase: str
    reason: str
