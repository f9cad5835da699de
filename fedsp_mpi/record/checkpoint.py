"""Checkpoints: all that a run needs to go on with the same bits, on any number of ranks.

    checkpoints/0007.json                        the commit mark of round 7, written last: its
    files' sizes and digests checkpoints/server-0007.safetensors          the server's state after
    round 7 checkpoints/client-00003-0006.safetensors    client 3 after its work in round 6
    checkpoints/distillation-400.safetensors     before the first round: the distillation after 400
    steps checkpoints/distillation.json                its commit mark

A client's file is written once, by the rank that plays the client, and belongs to every checkpoint
from its round until the client works again. A checkpoint is there when its mark is: a kill before
leaves the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedsp_mpi.files import fingerprint, ownership, untrusted
from fedsp_mpi.record import atomic, states
from fedsp_mpi.tensors import State

LAYOUT = 2
FOLDER = "checkpoints"


class CheckpointFile(NamedTuple):
    """A file of a checkpoint: the round after which it was written, its size in bytes, and its
    64-bit digest.
    """

    round: int
    size: int
    digest: str

    @classmethod
    def of(cls, content: Sequence[object]) -> CheckpointFile:
        """What JSON says of a file. Raises ValueError if that is no such three values."""
        round, size, digest = content
        if not (isinstance(round, int) and isinstance(size, int) and isinstance(digest, str)):
            raise ValueError(
                f"found {[type(value).__name__ for value in content]}, expected a round, a "
                "size, a digest"
            )
        if not (0 <= round < 1 << 31 and 0 <= size < 1 << 62 and len(digest) <= 64):
            raise ValueError("found a round, a size or a digest that cannot be")
        return cls(round, size, digest)


@dataclass(frozen=True)
class Checkpoint:
    """A committed state of the whole run.

    Attributes:
        round: the last round that it knows of.
        server: the server's file.
        clients: client id -> its file, for those that have a state.
        inputs: digest of all that the run reads; None in those of versions that wrote none.
    """

    round: int
    server: CheckpointFile
    clients: Mapping[int, CheckpointFile]
    inputs: str | None = None


class Checkpoints:
    """The checkpoints of one run folder. Every rank has one; `commit` is the server's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def write_client(self, client: int, round: int, state: State) -> CheckpointFile:
        """Write a client's state after `round`; it is on disk for good after `sync`. Raises
        RecordError.
        """
        return self._write(client_file(client, round), round, state, is_client=True)

    def read_client(self, client: int, piece: CheckpointFile) -> State:
        """What `write_client` wrote. Raises ValueError if the file is not what was written."""
        return states.unpack(self._image(client_file(client, piece.round), piece))

    def read_server(self, checkpoint: Checkpoint) -> State:
        """The server's state. Raises ValueError if the file is not what was written."""
        return states.unpack(self._image(server_file(checkpoint.round), checkpoint.server))

    def obsolete(self, written: Mapping[int, Collection[int]]) -> list[tuple[int, int]]:
        """Those of some clients' files, as (client, round), that no checkpoint needs and that are
        not the newest.
        """
        kept = {
            (id, piece.round)
            for mark in self._marks()
            for id, piece in self._clients_of(mark).items()
        }
        old = [
            (client, round)
            for client, rounds in written.items()
            for round in rounds
            if round < max(rounds)
        ]
        return [pair for pair in old if pair not in kept]

    def remove_client(self, client: int, round: int) -> None:
        """Take away a file of `obsolete`. Raises RecordError."""
        with atomic.writing(self.folder, _KEPT):
            (self.folder / client_file(client, round)).unlink(missing_ok=True)

    def sync(self, names: Collection[str]) -> None:
        """Wait until files are on disk. Raises RecordError."""
        for name in names:
            with atomic.writing(self.folder / name, _KEPT):
                atomic.sync(self.folder / name)

    def commit(
        self,
        round: int,
        server: State,
        clients: Mapping[int, CheckpointFile],
        keep: int,
        best: int | None = None,
        inputs: str | None = None,
    ) -> Checkpoint:
        """Write the server's state, then the mark; then remove the marks and the server's files
        that are not kept.

        The clients' files are removed by those who play them; all that is left of them goes when
        `clients` is empty, after the last round.

        Args:
            round: the last round that is committed in the record.
            clients: the files of the clients, which are on disk.
            keep: so many checkpoints are kept, the newest ones;
            best: and this one.
            inputs: digest of all that the run reads.

        Raises RecordError; the checkpoint before is still there then.
        """
        piece = self._write(server_file(round), round, server)
        mark = {
            "layout": LAYOUT,
            "round": round,
            "server": piece,
            "clients": {str(id): p for id, p in clients.items()},
        }
        atomic.write(
            self.folder / _mark_file(round), [fingerprint.seal({**mark, "inputs": inputs})], _KEPT
        )
        done = Checkpoint(round, piece, dict(clients), inputs)
        self._sweep(done, keep, best)
        return done

    def write_distillation(self, step: int, state: State, recipe: Any) -> None:
        """Write how far a distillation is, in the place of what was written before.

        Raises RecordError.
        """
        piece = self._write(_distillation_file(step), step, state)
        atomic.write(
            self.folder / _REST, [fingerprint.seal({"recipe": recipe, "piece": piece})], _KEPT
        )
        self._sweep_distillation(piece.round)

    def read_distillation(self, recipe: Any) -> State | None:
        """What `write_distillation` wrote for the same recipe; None if there is nothing that is
        whole.
        """
        try:
            mark = _parsed(self.folder / _REST)
            piece = _piece(mark["piece"])
            return (
                states.unpack(self._image(_distillation_file(piece.round), piece))
                if mark["recipe"] == recipe
                else None
            )
        except _UNREADABLE:
            return None

    def remove_distillation(self) -> None:
        """Take that away. Raises RecordError."""
        with atomic.writing(self.folder, _KEPT):
            (self.folder / _REST).unlink(missing_ok=True)
        self._sweep_distillation(None)

    def _sweep_distillation(self, step: int | None) -> None:
        needed = None if step is None else _distillation_file(step)
        with atomic.writing(self.folder, _KEPT):
            for path in ownership.written_in(self.folder, "checkpoints"):
                if path.name.startswith(_STEPS) and path.name not in (needed, _REST):
                    path.unlink()

    def remove_clients(self) -> None:
        """Take away the clients' states, and the checkpoints that need them: of a run that is
        complete.

        Raises RecordError.
        """
        marks = [round for round in self._marks() if self._clients_of(round)]
        gone = {_mark_file(round) for round in marks} | {server_file(round) for round in marks}
        with atomic.writing(self.folder, "the run is complete all the same"):
            for path in sorted(
                ownership.written_in(self.folder, "checkpoints"), key=lambda path: path.suffix
            ):
                if path.name in gone or path.name.startswith(
                    "client-"
                ):  # marks first: *.json, *.safetensors
                    path.unlink()
            ownership.remove_if_empty(self.folder)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, or None; and what is wrong with those that are
        newer.
        """
        wrong = []
        for round in sorted(self._marks(), reverse=True):
            try:
                checkpoint = self._read_mark(round)
                self._verify(checkpoint)
            except ValueError as error:
                wrong.append(str(error))
                continue
            return checkpoint, wrong
        return None, wrong

    def remove_after(self, round: int) -> None:
        """Take away the marks of later rounds, which the run is about to go through again.

        Raises RecordError.
        """
        for later in [number for number in self._marks() if number > round]:
            with atomic.writing(self.folder, _KEPT):
                (self.folder / _mark_file(later)).unlink()

    def _write(
        self, name: str, round: int, state: State, is_client: bool = False
    ) -> CheckpointFile:
        image = states.pack(state)
        atomic.write(self.folder / name, image, _KEPT, sync=not is_client, bypass=is_client)
        return CheckpointFile(round, sum(len(part) for part in image), fingerprint.of_pieces(image))

    def _image(self, name: str, piece: CheckpointFile) -> memoryview:
        path = self.folder / name
        try:
            if (size := path.stat().st_size) != piece.size:
                raise ValueError(f"{path}: found {size} bytes, expected {piece.size}")
            image = atomic.read(path)
        except OSError as error:
            raise ValueError(
                f"{path}: found no readable file ({error.strerror}), expected {piece.size} bytes"
            ) from None
        if (digest := fingerprint.of_pieces([image])) != piece.digest:
            raise ValueError(
                f"{path}: found digest {digest}, expected {piece.digest}: the file was damaged"
            )
        return image

    def _verify(self, checkpoint: Checkpoint) -> None:
        for client, piece in checkpoint.clients.items():
            self._image(client_file(client, piece.round), piece)
        self._image(server_file(checkpoint.round), checkpoint.server)

    def _marks(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal()]

    def _read_mark(self, round: int) -> Checkpoint:
        path = self.folder / _mark_file(round)
        try:
            mark = _parsed(path)
            if mark["layout"] != LAYOUT:
                raise ValueError(f"layout {mark['layout']!r}, expected {LAYOUT}")
            if mark["round"] != round:
                raise ValueError(f"round {mark['round']!r}, expected {round}")
            clients = {int(id): _piece(piece) for id, piece in mark["clients"].items()}
            return Checkpoint(round, _piece(mark["server"]), clients, mark.get("inputs"))
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}: found no checkpoint ({error}), expected one of layout {LAYOUT}"
            ) from None

    def _sweep(self, newest: Checkpoint, keep: int, best: int | None) -> None:
        marks = sorted(self._marks(), reverse=True)
        kept = {*marks[:keep], newest.round} | ({best} & set(marks) if best else set())
        needed = {server_file(round) for round in kept}
        needed |= {
            client_file(id, piece.round)
            for round in kept
            for id, piece in self._clients_of(round).items()
        }
        with atomic.writing(self.folder, _KEPT):
            for round in set(marks) - kept:
                (self.folder / _mark_file(round)).unlink()
            swept = ("server-",) if newest.clients else ("server-", "client-")
            for path in ownership.written_in(self.folder, "checkpoints"):
                if path.name.startswith(swept) and path.name not in needed:
                    path.unlink()

    def _clients_of(self, round: int) -> Mapping[int, CheckpointFile]:
        try:
            return self._read_mark(round).clients
        except ValueError:
            return {}


def _parsed(path: Path) -> dict[str, Any]:
    """The mapping in a mark. Raises OSError, ValueError."""
    return fingerprint.open_sealed(untrusted.read_bytes(path, _LONGEST_MARK))


def _piece(values: Any) -> CheckpointFile:
    """A piece as a mark has it.

    Raises TypeError if it has other parts, ValueError if they are of other types.
    """
    piece = CheckpointFile(*values)
    if (
        type(piece.round) is not int
        or type(piece.size) is not int
        or not isinstance(piece.digest, str)
    ):
        raise ValueError(f"{values!r} as a file's round, size and digest")
    return piece


def server_file(round: int) -> str:
    """Name of the server's file."""
    return f"server-{round:04d}.safetensors"


def client_file(client: int, round: int) -> str:
    """Name of a client's file."""
    return f"client-{client:05d}-{round:04d}.safetensors"


def _distillation_file(step: int) -> str:
    return f"{_STEPS}-{step}.safetensors"


def _mark_file(round: int) -> str:
    return f"{round:04d}.json"


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # what a damaged mark can bring about
_LONGEST_MARK = 1 << 30  # bytes; a client takes less than 100
_KEPT = "the last checkpoint is still there"
_STEPS = "distillation"
_REST = "distillation.json"  # written last: which file is good, and for which recipe


class StateHolder(Protocol):
    """What the shelf asks of an algorithm's clients."""

    def has_state(self, client: int) -> bool: ...

    def client_state(self, client: int) -> State: ...

    def load_client_state(self, client: int, state: State) -> None: ...

    def forget(self, client: int) -> None: ...


class ClientStateCache:
    """The states of one rank's clients between rounds: those that worked last in memory, the others
    in files.

    A thread of its own reads the state of the client that is next, and writes that of one that
    rests, while another works.

    Args:
        keeper: holds the states that are in memory.
        store: where the others go.
        resident: so many stay in memory.
        pieces: the states that are there already, when a run goes on.
    """

    def __init__(
        self,
        keeper: StateHolder,
        store: Checkpoints,
        resident: int,
        pieces: Mapping[int, CheckpointFile],
    ) -> None:
        self._keeper, self._store, self._resident = keeper, store, resident
        self._rounds: dict[
            int, int
        ] = {}  # in memory: client -> round of its last work, the longest idle first
        self._pieces = dict(pieces)  # in files that are up to date
        self._written = {
            client: {piece.round} for client, piece in pieces.items()
        }  # client -> rounds of its files
        self._unsynced: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "states")
        self._coming: deque[int] = deque()  # the clients that work next
        self._reading: dict[int, Future[State]] = {}
        self._writing: dict[int, Future[CheckpointFile]] = {}

    def begin(self, clients: Iterable[int]) -> None:
        """A round begins: the checkpoints of the last one are written, and what they do not need
        goes.

        Args:
            clients: those that work in it, in their order.
        """
        for client, round in self._store.obsolete(self._written):
            self._store.remove_client(client, round)
            self._written[client].remove(round)
            self._unsynced.discard(client_file(client, round))
        self._coming = deque(clients)
        self._read_ahead()

    def fetch(self, client: int) -> None:
        """Have a client's state in memory, if it has one, before its work; begin to read the next
        one's.

        Raises ValueError if its file is not what was written, RecordError if it could not be
        written.
        """
        self._read_ahead()  # of this one, if it was still in memory when the one before began
        self._coming.popleft()
        state = self._reading.pop(client, None)
        self._read_ahead()
        if state is not None:
            self._keeper.load_client_state(client, state.result())

    def put(self, client: int, round: int) -> None:
        """Take note of a client's work; make room for the next. Raises RecordError."""
        self._pieces.pop(client, None)
        self._rounds.pop(client, None)
        if self._keeper.has_state(client):
            self._rounds[client] = round
        while len(self._rounds) > self._resident:
            idle = next(iter(self._rounds))
            self._write(idle)
            self._keeper.forget(idle)
            del self._rounds[idle]

    def save(self) -> dict[int, CheckpointFile]:
        """Bring every state to disk: client id -> its file. Raises RecordError."""
        for client in self._rounds:
            self._write(client)
        for client in list(self._writing):
            self._wait_for(client)
        self._store.sync(self._unsynced)
        self._unsynced.clear()
        return dict(self._pieces)

    def _read_ahead(self) -> None:
        if (
            not self._coming
            or (client := self._coming[0]) in self._rounds
            or client in self._reading
        ):
            return
        self._wait_for(client)
        if piece := self._pieces.get(client):
            self._reading[client] = self._thread.submit(self._store.read_client, client, piece)

    def _write(self, client: int) -> None:
        if client in self._pieces or client in self._writing:
            return
        state, round = self._keeper.client_state(client), self._rounds[client]
        while len(self._writing) >= _AT_ONCE:
            self._wait_for(next(iter(self._writing)))
        self._writing[client] = self._thread.submit(self._store.write_client, client, round, state)
        self._written.setdefault(client, set()).add(round)
        self._unsynced.add(client_file(client, round))

    def _wait_for(self, client: int) -> None:
        if (writing := self._writing.pop(client, None)) is not None:
            self._pieces[client] = writing.result()


_AT_ONCE = 2  # states that wait in memory to be written
