"""Checkpoints: everything that a run needs to resume with the same bits, on any number of ranks.

    checkpoints/0007.json                        manifest of round 7: sizes and digests of its files
    checkpoints/server-0007.safetensors          the server's state after round 7
    checkpoints/client-00003-0006.safetensors    client 3's state after it trained in round 6
    checkpoints/distillation.json                manifest of the distillation, before round 1
    checkpoints/distillation-400.safetensors     its state after 400 steps

A client's file is written once, by the rank that plays the client, and belongs to every checkpoint
from its round until the client trains again. The manifest is written last: a checkpoint exists when
its manifest does, and a kill before that leaves the previous checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedsp_mpi.files import fingerprint, ownership, untrusted
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.record import atomic, states
from fedsp_mpi.tensors import State

LAYOUT = 2
FOLDER = "checkpoints"
DISTILLATION_MANIFEST = "distillation.json"
_DISTILLATION_PREFIX = "distillation"
_INTACT = "the last checkpoint is still there"
_MAX_MANIFEST_BYTES = 1 << 30  # a client takes less than 100
# What reading a damaged manifest can raise.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class CheckpointFile(NamedTuple):
    """A file of a checkpoint.

    Attributes:
        round: after which it was written; of a distillation, the step.
        size: in bytes.
        digest: of its bytes, 64 bits.
    """

    round: int
    size: int
    digest: str

    @classmethod
    def of(cls, content: Sequence[object]) -> CheckpointFile:
        """Build a file from its form in JSON: [round, size, digest].

        Raises:
            ValueError: the content is something else.
            TypeError: the content is no sequence.
        """
        round, size, digest = content
        if type(round) is not int or type(size) is not int or not isinstance(digest, str):
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
        round: the last round that is part of it.
        server: the server's file.
        clients: client id -> its file, for the clients that have a state.
        inputs: digest of everything that the run reads; None in checkpoints of versions that wrote
            none.
    """

    round: int
    server: CheckpointFile
    clients: Mapping[int, CheckpointFile]
    inputs: str | None = None


class Checkpoints:
    """The checkpoints of one run folder. Every rank has an instance; only the server commits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    # -- files of clients and of the server --------------------------------------------------------

    def write_client(self, client: int, round: int, state: State) -> CheckpointFile:
        """Write a client's state; it survives a loss of power only after `sync`.

        Args:
            client: its id.
            round: after which the client has this state.
            state: arrays [*shape] by name.

        Raises:
            RecordError: the file cannot be written.
        """
        return self._write(client_file(client, round), round, state, is_client=True)

    def read_client(self, client: int, file: CheckpointFile) -> State:
        """Return the state that `write_client` wrote.

        Raises:
            ValueError: the file is not what was written.
        """
        return states.unpack(self._read(client_file(client, file.round), file))

    def newest_client_state(self, client: int) -> State | None:
        """Return the newest state of one client, without opening any other client's; None if there
        is none.

        An older one is no substitute: who answers a user from it would not know.

        Raises:
            ValueError: the file, or the manifest that it is listed in, is not what was written.
        """
        for round in sorted(self._rounds(), reverse=True):
            file = self._read_manifest(round).clients.get(client)
            if file is not None:
                return self.read_client(client, file)
        return None

    def read_server(self, checkpoint: Checkpoint) -> State:
        """Return the server's state.

        Raises:
            ValueError: the file is not what was written.
        """
        return states.unpack(self._read(server_file(checkpoint.round), checkpoint.server))

    def unreferenced(self, superseded: Mapping[tuple[int, int], int]) -> list[tuple[int, int]]:
        """Return the superseded files that no checkpoint refers to.

        A checkpoint refers to the file that was a client's newest after its round, so that no
        manifest needs to be read.

        Args:
            superseded: (client, round) of files -> the round of the same client's next file.

        Returns:
            Pairs of client and round.
        """
        rounds = self._rounds() if superseded else []
        return [
            (client, round)
            for (client, round), next_round in superseded.items()
            if not any(round <= checkpoint < next_round for checkpoint in rounds)
        ]

    def remove_client(self, client: int, round: int) -> None:
        """Remove a file that is `unreferenced`.

        Raises:
            RecordError: it cannot be removed.
        """
        with atomic.writing(self.folder, _INTACT):
            (self.folder / client_file(client, round)).unlink(missing_ok=True)

    def sync(self, names: Collection[str]) -> None:
        """Wait until files are on disk.

        Raises:
            RecordError: they cannot be written.
        """
        for name in names:
            with atomic.writing(self.folder / name, _INTACT):
                atomic.sync(self.folder / name)

    # -- whole checkpoints -------------------------------------------------------------------------

    def commit(
        self,
        round: int,
        server: State,
        clients: Mapping[int, CheckpointFile],
        *,
        keep: int,
        best: int | None = None,
        inputs: str | None = None,
    ) -> Checkpoint:
        """Write the server's state, then the manifest; then remove what is no longer kept.

        Files of clients are removed by the ranks that play them; what is left of them is removed
        here once `clients` is empty, after the last round.

        Args:
            round: the last round that is committed in the record.
            server: the server's state.
            clients: the clients' files, which are on disk.
            keep: number of checkpoints to keep, the newest ones.
            best: a round whose checkpoint is kept besides.
            inputs: digest of everything that the run reads.

        Raises:
            RecordError: the disk cannot be written; the previous checkpoint is still there then.
        """
        file = self._write(server_file(round), round, server)
        manifest = {
            "layout": LAYOUT,
            "round": round,
            "server": file,
            "clients": {str(client): entry for client, entry in clients.items()},
            "inputs": inputs,
        }
        self._write_manifest(_manifest_file(round), manifest)
        checkpoint = Checkpoint(round, file, dict(clients), inputs)
        self._sweep(checkpoint, keep, best)
        return checkpoint

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest intact checkpoint or None, and what is wrong with newer ones."""
        damages = []
        for round in sorted(self._rounds(), reverse=True):
            try:
                checkpoint = self._read_manifest(round)
                self._verify(checkpoint)
            except ValueError as error:
                damages.append(str(error))
                continue
            return checkpoint, damages
        return None, damages

    def remove_after(self, round: int) -> None:
        """Remove the manifests of later rounds, which the run is about to repeat.

        Raises:
            RecordError: they cannot be removed.
        """
        for later in [number for number in self._rounds() if number > round]:
            with atomic.writing(self.folder, _INTACT):
                (self.folder / _manifest_file(later)).unlink()

    def remove_clients(self) -> None:
        """Remove the clients' states of a complete run, and the checkpoints that refer to them.

        Raises:
            RecordError: they cannot be removed.
        """
        rounds = [round for round in self._rounds() if self._client_files(round)]
        names = {_manifest_file(round) for round in rounds}
        names |= {server_file(round) for round in rounds}
        with atomic.writing(self.folder, "the run is complete all the same"):
            paths = ownership.run_files_in(self.folder, "checkpoints")
            # Manifests first (*.json before *.safetensors): no kill leaves one without its files.
            for path in sorted(paths, key=lambda path: path.suffix):
                if path.name in names or path.name.startswith("client-"):
                    path.unlink()
            ownership.remove_if_empty(self.folder)

    # -- the distillation --------------------------------------------------------------------------

    def write_distillation(self, step: int, state: State, recipe: JsonMapping) -> None:
        """Write the state of a distillation, and remove the previous one.

        Args:
            step: number of steps that are done.
            state: arrays [*shape] by name.
            recipe: what the distillation depends on; anything that JSON can hold.

        Raises:
            RecordError: the disk cannot be written.
        """
        file = self._write(_distillation_file(step), step, state)
        self._write_manifest(DISTILLATION_MANIFEST, {"recipe": recipe, "piece": file})
        self._sweep_distillation(file.round)

    def read_distillation(self, recipe: JsonMapping) -> State | None:
        """Return the state that was written for the same recipe; None if there is no intact one."""
        try:
            manifest = _read_json(self.folder / DISTILLATION_MANIFEST)
            file = CheckpointFile.of(manifest["piece"])
            image = self._read(_distillation_file(file.round), file)
            return states.unpack(image) if manifest["recipe"] == recipe else None
        except _UNREADABLE:
            return None

    def remove_distillation(self) -> None:
        """Remove the state of the distillation.

        Raises:
            RecordError: it cannot be removed.
        """
        with atomic.writing(self.folder, _INTACT):
            (self.folder / DISTILLATION_MANIFEST).unlink(missing_ok=True)
        self._sweep_distillation(None)

    def _sweep_distillation(self, step: int | None) -> None:
        """Remove all states of the distillation but that after `step`."""
        keep = {DISTILLATION_MANIFEST}
        if step is not None:
            keep.add(_distillation_file(step))
        with atomic.writing(self.folder, _INTACT):
            for path in ownership.run_files_in(self.folder, "checkpoints"):
                if path.name.startswith(_DISTILLATION_PREFIX) and path.name not in keep:
                    path.unlink()

    # -- reading and writing -----------------------------------------------------------------------

    def _write(
        self, name: str, round: int, state: State, *, is_client: bool = False
    ) -> CheckpointFile:
        image = states.pack(state)
        # Clients' files are many and large: they are synced together, and seldom read soon.
        atomic.write(self.folder / name, image, _INTACT, sync=not is_client, bypass=is_client)
        size = sum(len(part) for part in image)
        return CheckpointFile(round, size, fingerprint.of_pieces(image))

    def _write_manifest(self, name: str, manifest: JsonMapping) -> None:
        atomic.write(self.folder / name, [fingerprint.seal(manifest)], _INTACT)

    def _read(self, name: str, file: CheckpointFile) -> memoryview:
        """Return a file's bytes. Raises ValueError if they are not what was written."""
        path = self.folder / name
        try:
            size = path.stat().st_size
            if size != file.size:
                raise ValueError(f"{path}: found {size} bytes, expected {file.size}")
            image = atomic.read(path)
        except OSError as error:
            raise ValueError(
                f"{path}: found no readable file ({error.strerror}), expected {file.size} bytes"
            ) from None
        digest = fingerprint.of_pieces([image])
        if digest != file.digest:
            raise ValueError(
                f"{path}: found digest {digest}, expected {file.digest}: the file was damaged"
            )
        return image

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError unless all files of a checkpoint are what was written."""
        for client, file in checkpoint.clients.items():
            self._read(client_file(client, file.round), file)
        self._read(server_file(checkpoint.round), checkpoint.server)

    def _rounds(self) -> list[int]:
        """Return the rounds that have a manifest, readable or not.

        Raises:
            ValueError: there is something, but no folder that can be read: to take that for no
                checkpoints would begin a run anew that goes on.
        """
        try:
            paths = list(self.folder.iterdir())
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(self.folder):
                return []
            raise ValueError(
                f"{self.folder}: found no folder that can be read ({error.strerror}), expected the "
                "checkpoints of the run; bring them back or give permission, or move away what is "
                "there"
            ) from None
        return [
            int(path.stem) for path in paths if path.suffix == ".json" and path.stem.isdecimal()
        ]

    def _read_manifest(self, round: int) -> Checkpoint:
        path = self.folder / _manifest_file(round)
        try:
            manifest = _read_json(path)
            if manifest["layout"] != LAYOUT:
                raise ValueError(f"layout {manifest['layout']!r}, expected {LAYOUT}")
            if manifest["round"] != round:
                raise ValueError(f"round {manifest['round']!r}, expected {round}")
            clients = {
                int(client): CheckpointFile.of(file) for client, file in manifest["clients"].items()
            }
            server = CheckpointFile.of(manifest["server"])
            return Checkpoint(round, server, clients, manifest.get("inputs"))
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}: found no checkpoint ({error}), expected one of layout {LAYOUT}"
            ) from None

    def _client_files(self, round: int) -> Mapping[int, CheckpointFile]:
        """Return the clients' files of a checkpoint; none if its manifest cannot be read."""
        try:
            return self._read_manifest(round).clients
        except ValueError:
            return {}

    def _sweep(self, newest: Checkpoint, keep: int, best: int | None) -> None:
        """Remove the manifests that are no longer kept, then the files that none refers to."""
        rounds = sorted(self._rounds(), reverse=True)
        kept_rounds = {*rounds[:keep], newest.round}
        if best in rounds:
            kept_rounds.add(best)
        kept_files = {server_file(round) for round in kept_rounds}
        for round in kept_rounds:
            for client, file in self._client_files(round).items():
                kept_files.add(client_file(client, file.round))
        prefixes = ("server-",) if newest.clients else ("server-", "client-")
        with atomic.writing(self.folder, _INTACT):
            for round in set(rounds) - kept_rounds:
                (self.folder / _manifest_file(round)).unlink()
            for path in ownership.run_files_in(self.folder, "checkpoints"):
                if path.name.startswith(prefixes) and path.name not in kept_files:
                    path.unlink()


def server_file(round: int) -> str:
    """Return the name of the server's file."""
    return f"server-{round:04d}.safetensors"


def client_file(client: int, round: int) -> str:
    """Return the name of a client's file."""
    return f"client-{client:05d}-{round:04d}.safetensors"


def _distillation_file(step: int) -> str:
    return f"{_DISTILLATION_PREFIX}-{step}.safetensors"


def _manifest_file(round: int) -> str:
    return f"{round:04d}.json"


def _read_json(path: Path) -> JsonObject:
    """Return the mapping in a manifest. Raises OSError or ValueError."""
    return fingerprint.open_sealed(untrusted.read_bytes(path, _MAX_MANIFEST_BYTES))
