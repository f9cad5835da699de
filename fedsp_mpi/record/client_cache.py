"""The states of one rank's clients between rounds: the latest in memory, the others in files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from fedsp_mpi.record.checkpoint import CheckpointFile, Checkpoints, client_file
from fedsp_mpi.tensors import State

_MAX_PENDING_WRITES = 2  # states that wait in memory to be written


class StateHolder(Protocol):
    """Holds the states that are in memory; a method's `ClientStates` is one."""

    def has_state(self, client: int) -> bool: ...

    def client_state(self, client: int) -> State: ...

    def load_client_state(self, client: int, state: State) -> None: ...

    def forget(self, client: int) -> None: ...


class ClientStateCache:
    """Keeps the states of the clients that trained last in memory, and the others in files.

    A background thread reads the state of the client that trains next, and writes that of an idle
    one, while another client trains.

    Args:
        holder: holds the states that are in memory.
        checkpoints: where the others go.
        max_in_memory: number of states that stay in memory.
        files: the states that are on disk already, by client, when a run is resumed.
    """

    def __init__(
        self,
        holder: StateHolder,
        checkpoints: Checkpoints,
        *,
        max_in_memory: int,
        files: Mapping[int, CheckpointFile],
    ) -> None:
        self._holder = holder
        self._checkpoints = checkpoints
        self._max_in_memory = max_in_memory
        # In memory: client -> round in which it trained last, the longest idle first.
        self._last_rounds: dict[int, int] = {}
        # On disk and up to date.
        self._files = dict(files)
        # client -> round of its newest file, up to date or not.
        self._newest_rounds = {client: file.round for client, file in files.items()}
        # (client, round) of the older files -> round of the client's next one.
        self._superseded: dict[tuple[int, int], int] = {}
        self._unsynced: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "states")
        # The clients that train next.
        self._queue: deque[int] = deque()
        self._reads: dict[int, Future[State]] = {}
        self._writes: dict[int, Future[CheckpointFile]] = {}

    def start_round(self, clients: Iterable[int]) -> None:
        """Remove the files that no checkpoint refers to any more; begin to read the first state.

        Every rank has written its files of the last round by now, and the server its checkpoint.

        Args:
            clients: those that train in this round, in order.

        Raises:
            RecordError: a file cannot be removed, or a state could not be written.
        """
        for client, round in self._checkpoints.unreferenced(self._superseded):
            self._checkpoints.remove_client(client, round)
            del self._superseded[client, round]
            self._unsynced.discard(client_file(client, round))
        self._queue = deque(clients)
        self._read_ahead()

    def load(self, client: int) -> None:
        """Bring a client's state into memory before it trains; begin to read the next client's.

        Raises:
            ValueError: its file is not what was written.
            RecordError: its state could not be written.
        """
        # Of this client, if its state was still in memory when the one before it began.
        self._read_ahead()
        self._queue.popleft()
        reading = self._reads.pop(client, None)
        self._read_ahead()
        if reading is not None:
            self._holder.load_client_state(client, reading.result())

    def store(self, client: int, round: int) -> None:
        """Take over a client's state after it has trained; make room for the next client's.

        Raises:
            RecordError: a state cannot be written.
        """
        self._files.pop(client, None)
        self._last_rounds.pop(client, None)
        if self._holder.has_state(client):
            self._last_rounds[client] = round
        while len(self._last_rounds) > self._max_in_memory:
            idle = next(iter(self._last_rounds))
            self._write(idle)
            self._holder.forget(idle)
            del self._last_rounds[idle]

    def save(self) -> dict[int, CheckpointFile]:
        """Bring every state to disk; return the clients' files.

        Raises:
            RecordError: a state cannot be written.
        """
        for client in self._last_rounds:
            self._write(client)
        for client in list(self._writes):
            self._wait_for_write(client)
        self._checkpoints.sync(self._unsynced)
        self._unsynced.clear()
        return dict(self._files)

    def _read_ahead(self) -> None:
        """Begin to read the state of the next client, unless it is in memory or on its way."""
        if not self._queue:
            return
        client = self._queue[0]
        if client in self._last_rounds or client in self._reads:
            return
        self._wait_for_write(client)
        file = self._files.get(client)
        if file is not None:
            self._reads[client] = self._thread.submit(self._checkpoints.read_client, client, file)

    def _write(self, client: int) -> None:
        """Begin to write a client's state, unless its file is up to date or about to be."""
        if client in self._files or client in self._writes:
            return
        state = self._holder.client_state(client)
        round = self._last_rounds[client]
        while len(self._writes) >= _MAX_PENDING_WRITES:
            self._wait_for_write(next(iter(self._writes)))
        write = self._checkpoints.write_client
        self._writes[client] = self._thread.submit(write, client, round, state)
        newest = self._newest_rounds.get(client, round)
        if newest != round:
            self._superseded[client, newest] = round
        self._newest_rounds[client] = round
        self._unsynced.add(client_file(client, round))

    def _wait_for_write(self, client: int) -> None:
        writing = self._writes.pop(client, None)
        if writing is not None:
            self._files[client] = writing.result()
