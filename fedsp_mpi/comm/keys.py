"""Keys of ranks and clients: agreed on at the introduction, and the channels that follow from them.

Every rank makes a key pair at the start, for its own messages, and one more for each client that it
plays, as soon as it knows them, for what that client sends. Public keys go to the server, which
tells them all to everybody; both ends then prove that they have agreed on the same, before anything
else travels. The first exchange is not sealed: whoever can change messages there can put keys of
his own in their place, and only a comparison of fingerprints outside the run shows that.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from ..files.untrusted import JsonMapping, JsonObject
from .envelope import ENVELOPE_BYTES, SEAL_BYTES, Content, Envelope
from .inspection import Expected, ProtocolError, reading, require_fields
from .messages import HEADER_BYTES, MAX_RESULT_BYTES, Header, JsonPhase
from .sealing import CIPHER, KeyPair, Receiver, Sender, fingerprint
from .topology import Topology, called_rank

_SERVER = 0  # rank
# What a channel is for. Messages are a rank's, and go to rank 0; results and requests are a
# client's; by `close` a rank tells the server's rank that it calls that no more requests follow.
# Answers go from rank 0 to the rank that has asked.
_Purpose = Literal["messages", "results", "calls", "close", "answers"]


class _Speaks(Protocol):
    """What an introduction needs of `Wire` and `Solo`."""

    topology: Topology

    def collect(self, info: JsonMapping, phase: JsonPhase = ...) -> list[JsonObject] | None: ...

    def agree(self, verdict: None, phase: str = ..., note: object = ...) -> JsonObject: ...


class Seals:
    """One rank's ends of all channels: client ranks seal, the server's ranks open.

    In one process both ends are there.

    Args:
        rank: of this process.
        pair: this rank's.
        keys: public keys of all ranks, by rank.
        start: 16 random bytes of the server.
    """

    def __init__(self, rank: int, pair: KeyPair, keys: Sequence[bytes], *, start: bytes) -> None:
        self._rank = rank
        self._pair = pair
        self._keys = keys
        self._start = start
        self._client_keys: dict[int, bytes] = {}
        self._senders: dict[tuple[_Purpose, int], Sender] = {}
        self._receivers: dict[tuple[_Purpose, int], Receiver] = {}
        self._proofs: dict[int, bytes] = {}  # by rank

    @property
    def fingerprints(self) -> JsonObject:
        """Cipher, and fingerprints of the public keys: the server's, by rank and by client."""
        return {
            "cipher": CIPHER,
            "server": fingerprint(self._keys[_SERVER]),
            "ranks": [fingerprint(key) for key in self._keys],
            "clients": {str(c): fingerprint(key) for c, key in sorted(self._client_keys.items())},
        }

    def close(self) -> None:
        """Drop all keys."""
        self._pair.forget()
        for channel in (*self._senders.values(), *self._receivers.values()):
            channel.close()

    # -- up ----------------------------------------------------------------------------------------

    def seal_json(self, message: bytes) -> bytes:
        """Seal a JSON message of this rank, its header included."""
        return self._senders["messages", self._rank].seal(message, Content.JSON)

    def seal_result(self, client: int, message: bytes, round: int) -> bytes:
        """Seal a client's header of a round, and the text behind it.

        Args:
            client: client id.
            message: as it would travel unsealed.
            round: number of the round.
        """
        return self._senders["results", client].seal(message, Content.RESULT, round=round)

    def seal_values(
        self, client: int, target: np.ndarray, values: np.ndarray, *, round: int
    ) -> None:
        """Seal a chunk of a client's update into the memory that is sent.

        Args:
            client: client id.
            target: uint8 [num_bytes + SEAL_BYTES].
            values: [num_values], fp32 or uint8.
            round: number of the round.
        """
        self._senders["results", client].seal_into(target, values, Content.VALUES, round=round)

    def seal_call(self, client: int, header: bytes) -> bytes:
        """Seal the header of a client's request."""
        return self._senders["calls", client].seal(header, Content.CALL)

    def seal_request(self, client: int, values: np.ndarray) -> np.ndarray:
        """Seal the fp32 values [num_values] of a request; return uint8 [num_bytes]."""
        sealed = np.empty(values.nbytes + SEAL_BYTES, dtype=np.uint8)
        values = np.ascontiguousarray(values)
        self._senders["calls", client].seal_into(sealed, values, Content.VALUES)
        return sealed

    def seal_close(self, header: bytes) -> bytes:
        """Seal the word that this rank makes no more requests."""
        return self._senders["close", self._rank].seal(header, Content.CLOSE)

    # -- between two ranks -------------------------------------------------------------------------

    def add_answers(self) -> bytes:
        """Make this rank's end of the channel from rank 0 to rank 1; return the key of rank 0."""
        if self._rank == _SERVER:
            self._add_sender("answers", _SERVER, self._pair, to=1)
        else:
            self._add_receiver("answers", _SERVER, self._keys[_SERVER])
        return self._keys[_SERVER]

    def seal_answer(self, content: bytes) -> str:
        """Seal an answer of rank 0; return it in hexadecimal digits."""
        return self._senders["answers", _SERVER].seal(content, Content.ANSWER).hex()

    def open_answer(self, digits: object) -> bytes:
        """Open what `seal_answer` returned; raise ProtocolError if it is refused."""
        try:
            if not isinstance(digits, str):
                raise ValueError("found no digits")
            sealed = bytes.fromhex(digits)
            return self._receivers["answers", _SERVER].open(sealed, Content.ANSWER)
        except ValueError as error:
            raise ProtocolError(
                f"rank {_SERVER}, whose key is {fingerprint(self._keys[_SERVER])}: its answer "
                f"cannot be opened: {error}"
            ) from None

    # -- opened at the server ----------------------------------------------------------------------

    def open_json(self, rank: int, message: bytes) -> bytes:
        """Open a rank's JSON message; raise ProtocolError, naming the rank, if it is refused."""
        try:
            return self._receivers["messages", rank].open(message, Content.JSON)
        except ValueError as error:
            raise ProtocolError(
                f"rank {rank}, whose key is {fingerprint(self._keys[rank])}: its message cannot be "
                f"opened: {error}"
            ) from None

    def open_results(
        self, message: bytes, rank: int, *, round: int, expected: Expected | None
    ) -> bytes:
        """Open the headers of a rank's results; return them as they would come unsealed.

        Args:
            message: what the rank sent.
            rank: who sent it.
            round: number of the round.
            expected: the clients that take part; None accepts any with a key.

        Raises:
            ProtocolError: a header is refused; names client, rank and round. What the rank sends
                next would not be known.
        """
        clients = self._client_keys if expected is None else expected.of_rank(rank)
        client_name = Expected.client_name if expected is None else expected.client_name
        opened = []
        offset = 0
        while offset < len(message):
            with reading(rank, "a message of sealed results"):
                envelope = Envelope.unpack(message[offset : offset + ENVELOPE_BYTES])
            client = envelope.sender
            whose = f"update of {client_name(client)} from rank {rank} in round {round}"
            receiver = self._receivers.get(("results", client))
            if receiver is None or client not in clients:
                raise ProtocolError(f"{whose}: found a client that this rank does not host")
            if envelope.size > MAX_RESULT_BYTES:
                raise ProtocolError(
                    f"{whose}: found a header of {envelope.size} bytes, expected at most "
                    f"{MAX_RESULT_BYTES}"
                )
            end = offset + SEAL_BYTES + envelope.size
            try:
                content = receiver.open(message[offset:end], Content.RESULT, round=round)
            except ValueError as error:
                raise ProtocolError(f"{whose}: its header cannot be opened: {error}") from None
            with reading(rank, "a message of sealed results"):
                header = Header.unpack(content[:HEADER_BYTES], whose)
            if header.client != client:
                raise ProtocolError(f"{whose}: found client {header.client} in its header")
            opened.append(content)
            offset = end
        return b"".join(opened)

    def open_values(
        self, client: int, target: np.ndarray, sealed: np.ndarray, *, round: int
    ) -> None:
        """Open a chunk of a client's update into its row.

        Args:
            client: client id.
            target: [num_values], fp32 or uint8; 0 if the chunk is refused.
            sealed: uint8 [num_bytes + SEAL_BYTES].
            round: number of the round.

        Raises:
            ValueError: it is refused.
        """
        self._receivers["results", client].open_into(target, sealed, Content.VALUES, round=round)

    def skip_values(self, client: int) -> None:
        """Count a chunk of a client's update that had another length."""
        self._receivers["results", client].skip()

    def open_call(self, rank: int, message: bytes) -> bytes:
        """Open the header of a request of one of a rank's clients, or the word that none follow.

        Raises:
            ProtocolError: it is refused; names the rank, and the client if there is one.
        """
        with reading(rank, "a sealed request"):
            envelope = Envelope.unpack(message[:ENVELOPE_BYTES])
        sender = envelope.sender
        is_close = envelope.content is Content.CLOSE
        receiver = self._receivers.get(("close" if is_close else "calls", sender))
        whose = f"rank {rank}" if is_close else f"request of client {sender} from rank {rank}"
        if receiver is None or (is_close and sender != rank):
            raise ProtocolError(f"{whose}: found a sender that this rank does not host")
        try:
            return receiver.open(message, Content.CLOSE if is_close else Content.CALL)
        except ValueError as error:
            raise ProtocolError(f"{whose}: it cannot be opened: {error}") from None

    def open_request(self, client: int, rank: int, *, sealed: np.ndarray) -> np.ndarray:
        """Open the values of a request.

        Args:
            client: client id.
            rank: who plays it.
            sealed: uint8 [num_bytes + SEAL_BYTES].

        Returns:
            fp32 [num_values].

        Raises:
            ProtocolError: it is refused; names client and rank.
        """
        whose = f"request of client {client} from rank {rank}"
        receiver = self._receivers.get(("calls", client))
        num_values = max(0, sealed.size - SEAL_BYTES) // 4
        values = np.empty(num_values, dtype=np.float32)
        try:
            if receiver is None:
                raise ValueError("found a client without a key")
            receiver.open_into(values, sealed, Content.VALUES)
        except ValueError as error:
            raise ProtocolError(f"{whose}: its values cannot be opened: {error}") from None
        return values

    # -- introductions -----------------------------------------------------------------------------

    def _add_sender(self, purpose: _Purpose, name: int, pair: KeyPair, *, to: int) -> None:
        """Make the sealing end of a channel; `to` is the server's rank that opens it."""
        secrets = pair.agree(self._keys[to], purpose, self._start, is_sender=True)
        self._senders[purpose, name] = Sender(secrets, name, self._start)
        if purpose == "messages":
            self._proofs[name] = secrets.proof

    def _add_receiver(self, purpose: _Purpose, name: int, key: bytes) -> None:
        """Make the opening end of a channel from the owner of a public key to this rank."""
        secrets = self._pair.agree(key, purpose, self._start, is_sender=False)
        self._receivers[purpose, name] = Receiver(secrets, name, self._start)
        if purpose == "messages":
            self._proofs[name] = secrets.proof

    @classmethod
    def agree_with_ranks(cls, wire: _Speaks) -> Seals:
        """Exchange the public keys of all ranks; collective, and not sealed yet.

        Raises:
            ProtocolError: a rank has sent no key, or another rank's; or the server has told this
                rank another key than its own.
        """
        rank = wire.topology.rank
        pair = KeyPair()
        messages = wire.collect({"key": pair.public.hex()})
        note: JsonObject | None = None
        if messages is not None:
            keys = [_read_key(message, sender, "key") for sender, message in enumerate(messages)]
            _require_different({f"rank {sender}": key for sender, key in enumerate(keys)})
            note = {"start": os.urandom(16).hex(), "keys": [key.hex() for key in keys]}
        note = wire.agree(None, note=note)
        keys = [bytes.fromhex(key) for key in note["keys"]]
        _require_own(f"rank {rank}", keys[rank], pair)
        seals = cls(rank, pair, keys, start=bytes.fromhex(note["start"]))
        with reading(_SERVER, "keys of the ranks"):
            if rank != _SERVER:
                seals._add_sender("messages", rank, pair, to=_SERVER)
        if rank == _SERVER:
            for sender, key in enumerate(keys):
                if sender != _SERVER:
                    with reading(sender, "a key"):
                        seals._add_receiver("messages", sender, key)
        return seals

    def confirm_ranks(self, wire: _Speaks) -> None:
        """Have all ranks and the server prove to each other that they have the same keys.

        Collective; the ranks' messages are the first that are sealed.

        Raises:
            ProtocolError: a rank or the server has another key.
        """
        server = fingerprint(self._keys[_SERVER])
        messages = wire.collect({"server": server})
        note: JsonObject | None = None
        if messages is not None:
            for rank, message in enumerate(messages):
                require_fields(message, rank, {"server": str})
                if message["server"] != server:
                    raise ProtocolError(
                        f"rank {rank}: found {message['server']!r} as the server's key, expected "
                        f"{server}"
                    )
            note = {"proofs": [self._proofs.get(rank, b"").hex() for rank in range(len(messages))]}
        proofs = wire.agree(None, note=note)["proofs"]
        expected = self._proofs.get(self._rank, b"").hex()
        if self._rank != _SERVER and not hmac.compare_digest(proofs[self._rank], expected):
            raise ProtocolError(
                f"rank {_SERVER}: found that the server has agreed on another key with this rank "
                f"than its own, {fingerprint(self._pair.public)}, expected the same"
            )

    def introduce_clients(
        self, wire: _Speaks, assignment: Sequence[Collection[int]], num_servers: int
    ) -> None:
        """Make a key pair for each client of this rank, and exchange and prove all of them.

        Collective. Private keys are dropped then: nothing else will be agreed on.

        Args:
            wire: between all ranks.
            assignment: the ids of each rank's clients.
            num_servers: number of ranks that answer requests; 0: none.

        Raises:
            ProtocolError: a rank has sent keys of other clients than it plays, or has another key
                than it has sent.
        """
        pairs = {client: KeyPair() for client in assignment[self._rank]}
        messages = wire.collect({"keys": {str(c): pair.public.hex() for c, pair in pairs.items()}})
        note: JsonObject | None = None
        if messages is not None:
            note = {}
            for rank, message in enumerate(messages):
                note |= _read_client_keys(message, rank, assignment[rank])
            _require_different({f"client {client}": note[client] for client in note})
        note = wire.agree(None, note=note)
        self._client_keys = {int(client): bytes.fromhex(key) for client, key in note.items()}
        for client, pair in pairs.items():
            _require_own(f"client {client}", self._client_keys[client], pair)
            self._add_sender("results", client, pair, to=_SERVER)
            if num_servers:
                to = called_rank(self._rank, num_servers)
                self._add_sender("calls", client, pair, to=to)
        if 0 < num_servers <= self._rank:
            to = called_rank(self._rank, num_servers)
            self._add_sender("close", self._rank, self._pair, to=to)
        self._add_client_receivers(assignment, num_servers)
        for pair in (self._pair, *pairs.values()):
            pair.forget()
        self._confirm_clients(wire, assignment)
        # Nobody's next message may arrive before the server has all proofs.
        wire.agree(None)

    def _add_client_receivers(
        self, assignment: Sequence[Collection[int]], num_servers: int
    ) -> None:
        for rank, clients in enumerate(assignment):
            is_caller = bool(num_servers) and called_rank(rank, num_servers) == self._rank
            if is_caller and rank >= num_servers:
                self._add_receiver("close", rank, self._keys[rank])
            for client in clients:
                with reading(rank, f"a key of client {client}"):
                    if self._rank == _SERVER:
                        self._add_receiver("results", client, self._client_keys[client])
                    if is_caller:
                        self._add_receiver("calls", client, self._client_keys[client])

    def _confirm_clients(self, wire: _Speaks, assignment: Sequence[Collection[int]]) -> None:
        proofs = {
            str(client): self._senders["results", client].seal(b"", Content.PROOF).hex()
            for client in assignment[self._rank]
        }
        messages = wire.collect({"proofs": proofs})
        if messages is None:
            return
        for rank, message in enumerate(messages):
            require_fields(message, rank, {"proofs": dict})
            for client in assignment[rank]:
                whose = f"client {client} on rank {rank}"
                key = fingerprint(self._client_keys[client])
                with reading(rank, f"a proof of {whose}"):
                    proof = bytes.fromhex(message["proofs"][str(client)])
                try:
                    self._receivers["results", client].open(proof, Content.PROOF)
                except ValueError as error:
                    raise ProtocolError(
                        f"{whose}: it has not the key that it has sent, {key}: {error}"
                    ) from None


def _read_key(message: JsonMapping, rank: int, name: str) -> bytes:
    """Return the public key in a rank's message; raise ProtocolError if there is none."""
    with reading(rank, "a key"):
        require_fields(message, rank, {name: str})
        key = bytes.fromhex(message[name])
        if len(key) != 32:
            raise ValueError(f"{len(key)} bytes, expected 32")
        return key


def _read_client_keys(message: JsonMapping, rank: int, clients: Collection[int]) -> dict[str, str]:
    """Return the public keys of a rank's clients, by id, both as they travel."""
    require_fields(message, rank, {"keys": dict})
    keys = message["keys"]
    if sorted(keys) != sorted(str(client) for client in clients):
        raise ProtocolError(
            f"rank {rank}: found keys of other clients than it plays, expected one for each of "
            "those"
        )
    return {client: _read_key(keys, rank, client).hex() for client in keys}


def _require_different(keys: Mapping[str, bytes | str]) -> None:
    """Raise ProtocolError if two owners have sent the same key."""
    owner_of: dict[bytes | str, str] = {}
    for owner, key in keys.items():
        first = owner_of.setdefault(key, owner)
        if first != owner:
            raise ProtocolError(f"{owner}: found the key of {first}, expected one of its own")


def _require_own(owner: str, key: bytes, pair: KeyPair) -> None:
    """Raise ProtocolError if the server has told everybody another key than an owner's."""
    if key != pair.public:
        raise ProtocolError(
            f"rank {_SERVER}: found {fingerprint(key)} as the key of {owner} in what the server "
            f"has sent, expected {fingerprint(pair.public)}"
        )
