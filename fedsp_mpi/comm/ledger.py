"""The book of everything that travels: every byte has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedsp_mpi.tensors import Contract, Schema

from .messages import HEADER_BYTES, NO_CALLS, CallStats

Direction = Literal["start-up", "handout", "down", "up", "checkpoint", "end"]


@dataclass
class Entry:
    """One name in one phase, summed over the run.

    Attributes:
        direction, phase, name: what it is; names in parentheses are not tensors. shape, dtype: of
            one tensor; bytes without a shape are `uint8` of varying length. messages, bytes:
            logical: one message per client a round, however the clients are placed; at start-up and
            at the hand-out one per client rank (one in all where there is a single process).
        crossed, bytes_crossed: what really went from one process to another, pieces of a message
            not counted apart.
    """

    direction: Direction
    phase: str
    name: str
    shape: tuple[int, ...] | None
    dtype: str
    messages: int = 0
    bytes: int = 0
    crossed: int = 0
    bytes_crossed: int = 0


class Ledger:
    """Adds up messages by (direction, phase, name), and remembers the last round's bytes per
    client.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._round: dict[str, dict[int, int]] = {"down": {}, "up": {}}

    def raw(
        self, direction: Direction, phase: str, name: str, size: int, messages: int, crossed: int
    ) -> None:
        """Count messages of `size` bytes that are no tensors: headers, JSON."""
        self._add(Entry(direction, phase, name, None, "uint8"), size, messages, crossed)

    def header(self, direction: Direction, phase: str, messages: int, crossed: int) -> None:
        """Count headers."""
        self._add(
            Entry(direction, phase, "(header)", (HEADER_BYTES,), "uint8"),
            HEADER_BYTES,
            messages,
            crossed,
        )

    def tensors(
        self, direction: Direction, phase: str, schema: Schema, messages: int, crossed: int
    ) -> None:
        """Count messages with the tensors of `schema`."""
        for spec in schema:
            entry = Entry(direction, phase, spec.name, spec.shape, "float32")
            self._add(entry, 4 * spec.num_values, messages, crossed)

    def broadcast(self, schema: Schema, messages: int, crossed: int) -> None:
        """Count broadcasts: logical ones when it is known which clients answer, real ones when they
        leave.
        """
        self.header("down", "broadcast", messages, crossed)
        self.tensors("down", "broadcast", schema, messages, crossed)

    def answers(
        self,
        contract: Contract,
        updates: list[int],
        failures: Mapping[int, int],
        crossed: bool,
        asked: Mapping[int, CallStats],
    ) -> None:
        """Count one round: the clients that were handed the broadcast and answered with an update,
        or a failure.

        `failures` gives of each client how many bytes of its reason came behind the header;
        `asked`: what they asked the server meanwhile, by client.
        """
        everyone = sorted([*updates, *failures])
        for what in asked.values():
            self._questions("up", "(question)", what.questions, what.up, crossed)
            self._questions("down", "(answer)", what.questions, what.down, crossed)
        self.broadcast(contract.down, len(everyone), 0)
        self.header("up", "gather", len(everyone), len(everyone) * crossed)
        self.tensors("up", "gather", contract.up, len(updates), len(updates) * crossed)
        for size in filter(None, failures.values()):
            self.raw("up", "gather", "(reason)", size, 1, int(crossed))
        down, up = (HEADER_BYTES + 4 * schema.num_values for schema in (contract.down, contract.up))
        failed = {client: HEADER_BYTES + size for client, size in failures.items()}
        sent = failed | dict.fromkeys(updates, up)
        more = {client: asked.get(client, NO_CALLS) for client in everyone}
        self._round = {
            "down": {client: down + more[client].down for client in everyone},
            "up": {client: sent[client] + more[client].up for client in everyone},
        }

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Bytes of the last round: {"down": {client: bytes}, "up": {client: bytes}}."""
        return {direction: dict(clients) for direction, clients in self._round.items()}

    def manifest(self) -> list[dict[str, Any]]:
        """All entries, as JSON can say them, in the order in which they first came up."""
        return [asdict(entry) for entry in self._entries.values()]

    def _questions(
        self, direction: Direction, name: str, num: int, size: int, crossed: bool
    ) -> None:
        """Count `num` questions or answers of `size` bytes together, headers among them."""
        self.header(direction, "questions", num, num * crossed)
        values = size - num * HEADER_BYTES
        entry = self._add(
            Entry(direction, "questions", name, None, "float32"), 0, num, num * crossed
        )
        entry.bytes += values
        entry.bytes_crossed += values * crossed

    def _add(self, new: Entry, size: int, messages: int, crossed: int) -> Entry:
        entry = self._entries.setdefault((new.direction, new.phase, new.name), new)
        entry.messages += messages
        entry.bytes += messages * size
        entry.crossed += crossed
        entry.bytes_crossed += crossed * size
        return entry
