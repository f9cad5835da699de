"""The ledger of everything that travels: every byte has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fedsp_mpi.tensors import Contract, Schema

from ..files.untrusted import JsonObject
from .compression import num_bytes, scale_bytes
from .envelope import SEAL_BYTES
from .messages import HEADER_BYTES, NO_CALLS, CallStats, Direction

# Type and bytes of a value, by `CompressionConfig.format`.
_TYPES = {"none": ("float32", 4), "bf16": ("bfloat16", 2), "int8": ("int8", 1)}


@dataclass
class Entry:
    """One name in one phase, summed over the run.

    Logical messages do not depend on how the clients are placed: one per client and round; at
    start-up and at the hand-out one per client rank (one in all where there is a single process).

    Attributes:
        direction: which way the messages went, or when.
        phase: operation that sent them.
        name: name of the tensor; names in parentheses are not tensors.
        shape: shape of one tensor; None for bytes of varying length.
        dtype: type of the values.
        messages: number of logical messages.
        bytes: their size.
        crossed: number of messages that really went from one process to another; the chunks of one
            vector count as one message.
        bytes_crossed: their size.
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
    """Sums messages by (direction, phase, name), and keeps the last round's bytes per client.

    The methods take the number of logical messages and of those that crossed (see `Entry`).

    Attributes:
        evaluation_bytes: of the last broadcast that clients evaluated, all of them together.
        is_sealed: what goes up is sealed.
        num_chunks: of an update, each of which is sealed by itself.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._round_bytes: dict[str, dict[int, int]] = {"down": {}, "up": {}}
        self.evaluation_bytes = 0
        self.is_sealed = False
        self.num_chunks = 0

    def add_bytes(
        self,
        direction: Direction,
        phase: str,
        name: str,
        *,
        size: int,
        messages: int,
        crossed: int,
    ) -> None:
        """Add messages of `size` bytes each that are not tensors, such as JSON.

        Args:
            direction: which way they went.
            phase: operation that sent them.
            name: in parentheses.
            size: bytes of one message.
            messages: number of logical messages.
            crossed: number of messages that crossed.
        """
        entry = Entry(direction, phase, name, None, "uint8")
        self._add(entry, size=size, messages=messages, crossed=crossed)

    def add_headers(self, direction: Direction, phase: str, *, messages: int, crossed: int) -> None:
        """Add headers.

        Args:
            direction: which way they went.
            phase: operation that sent them.
            messages: number of logical messages.
            crossed: number of messages that crossed.
        """
        entry = Entry(direction, phase, "(header)", (HEADER_BYTES,), "uint8")
        self._add(entry, size=HEADER_BYTES, messages=messages, crossed=crossed)

    def add_tensors(
        self, direction: Direction, phase: str, schema: Schema, *, messages: int, crossed: int
    ) -> None:
        """Add messages with the fp32 tensors of `schema`.

        Args:
            direction: which way they went.
            phase: operation that sent them.
            schema: names and shapes of the tensors of one message.
            messages: number of logical messages.
            crossed: number of messages that crossed.
        """
        for spec in schema:
            entry = Entry(direction, phase, spec.name, spec.shape, "float32")
            self._add(entry, size=4 * spec.num_values, messages=messages, crossed=crossed)

    def add_seals(
        self, direction: Direction, phase: str, *, num_seals: int, messages: int, crossed: int
    ) -> None:
        """Add what sealing adds to messages: envelopes and tags.

        Args:
            direction: which way they went.
            phase: operation that sent them.
            num_seals: of one message, whose chunks are sealed one by one.
            messages: number of logical messages.
            crossed: number of messages that crossed.
        """
        size = SEAL_BYTES * num_seals
        self.add_bytes(direction, phase, "(seal)", size=size, messages=messages, crossed=crossed)

    def add_exchanged(
        self, direction: Direction, phase: str, contract: Contract, *, messages: int, crossed: int
    ) -> None:
        """Add messages with the tensors of a round, as the contract compresses them.

        Args:
            direction: "down" or "up".
            phase: operation that sent them.
            contract: schemas and compression.
            messages: number of logical messages.
            crossed: number of messages that crossed.
        """
        schema = contract.down if direction == "down" else contract.up
        compression = contract.compression
        dtype, value_bytes = _TYPES[compression.format]
        for spec in schema:
            entry = Entry(direction, phase, spec.name, spec.shape, dtype)
            self._add(entry, size=value_bytes * spec.num_values, messages=messages, crossed=crossed)
        if compression.format == "int8":
            size = scale_bytes(schema.num_values, compression)
            entry = Entry(direction, phase, "(scales)", (size // 4,), "float32")
            self._add(entry, size=size, messages=messages, crossed=crossed)

    def add_broadcasts(
        self, contract: Contract, *, messages: int, crossed: int, phase: str = "broadcast"
    ) -> None:
        """Add broadcasts.

        Those that cross are added when they are sent; logical ones when it is known which clients
        sent a result.

        Args:
            contract: schemas and compression.
            messages: number of logical messages.
            crossed: number of messages that crossed.
            phase: "broadcast" at the beginning of a round, or "evaluation" at its end.
        """
        if phase == "evaluation":
            self.evaluation_bytes = messages * _message_bytes(contract.down, contract)
        self.add_headers("down", phase, messages=messages, crossed=crossed)
        self.add_exchanged("down", phase, contract, messages=messages, crossed=crossed)

    def add_round(
        self,
        contract: Contract,
        updates: list[int],
        failures: Mapping[int, int],
        *,
        calls: Mapping[int, CallStats],
        crossed: bool,
    ) -> None:
        """Add the messages of one round's clients: broadcasts, results and remote calls.

        Args:
            contract: schemas of broadcast and update.
            updates: ids of the clients that sent an update.
            failures: bytes of the reason behind the header, by id of the clients that failed.
            calls: remote calls of the clients that made some, by id.
            crossed: the messages went from one process to another.
        """
        for stats in calls.values():
            # The names are those of the record's layout, which calls requests "questions".
            self._add_calls(
                "up", "(question)", stats.num_calls, size=stats.bytes_up, crossed=crossed
            )
            self._add_calls(
                "down", "(answer)", stats.num_calls, size=stats.bytes_down, crossed=crossed
            )
        clients = sorted([*updates, *failures])
        self.add_broadcasts(contract, messages=len(clients), crossed=0)
        self.add_headers(
            "up", "gather", messages=len(clients), crossed=len(clients) if crossed else 0
        )
        self.add_exchanged(
            "up",
            "gather",
            contract,
            messages=len(updates),
            crossed=len(updates) if crossed else 0,
        )
        num_seals = 1 + self.num_chunks
        if self.is_sealed:
            for seals, senders in ((num_seals, updates), (1, [*failures])):
                number = len(senders)
                self.add_seals(
                    "up",
                    "gather",
                    num_seals=seals,
                    messages=number,
                    crossed=number if crossed else 0,
                )
        for size in failures.values():
            if size:
                self.add_bytes(
                    "up", "gather", "(reason)", size=size, messages=1, crossed=int(crossed)
                )

        broadcast_bytes = _message_bytes(contract.down, contract)
        update_bytes = _message_bytes(contract.up, contract)
        failure_bytes = HEADER_BYTES
        if self.is_sealed:
            update_bytes += SEAL_BYTES * num_seals
            failure_bytes += SEAL_BYTES
        result_bytes = {client: failure_bytes + size for client, size in failures.items()}
        result_bytes |= dict.fromkeys(updates, update_bytes)
        self._round_bytes = {"down": {}, "up": {}}
        for client in clients:
            stats = calls.get(client, NO_CALLS)
            self._round_bytes["down"][client] = broadcast_bytes + stats.bytes_down
            self._round_bytes["up"][client] = result_bytes[client] + stats.bytes_up

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Return the bytes of the last round: {"down": {client: bytes}, "up": {client: bytes}}."""
        return {direction: dict(clients) for direction, clients in self._round_bytes.items()}

    def manifest(self) -> list[JsonObject]:
        """Return all entries as JSON-able dicts, in the order in which they were first added."""
        return [asdict(entry) for entry in self._entries.values()]

    def _add_calls(
        self, direction: Direction, name: str, num_calls: int, *, size: int, crossed: bool
    ) -> None:
        """Add requests or responses of `size` bytes together, headers included."""
        num_crossed = num_calls if crossed else 0
        self.add_headers(direction, "questions", messages=num_calls, crossed=num_crossed)
        entry = Entry(direction, "questions", name, None, "float32")
        entry = self._add(entry, size=0, messages=num_calls, crossed=num_crossed)
        value_bytes = size - num_calls * HEADER_BYTES
        if self.is_sealed and direction == "up":
            # A request's header and its values are sealed by themselves.
            self.add_seals(
                direction, "questions", num_seals=2, messages=num_calls, crossed=num_crossed
            )
            value_bytes -= num_calls * 2 * SEAL_BYTES
        entry.bytes += value_bytes
        entry.bytes_crossed += value_bytes if crossed else 0

    def _add(self, entry: Entry, *, size: int, messages: int, crossed: int) -> Entry:
        """Add messages of `size` bytes to the entry of the same name, and return that."""
        total = self._entries.setdefault((entry.direction, entry.phase, entry.name), entry)
        total.messages += messages
        total.bytes += messages * size
        total.crossed += crossed
        total.bytes_crossed += crossed * size
        return total


def _message_bytes(schema: Schema, contract: Contract) -> int:
    """Return the bytes of a message with the tensors of a schema, its header included."""
    return HEADER_BYTES + num_bytes(schema.num_values, contract.compression)
