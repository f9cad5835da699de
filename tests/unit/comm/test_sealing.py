"""What goes up sealed: nothing to see without the key, and nothing accepted that was changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedsp_mpi.comm import Handout, RoundBroadcast, Solo
from fedsp_mpi.comm.envelope import ENVELOPE_BYTES, SEAL_BYTES, Content, Envelope
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.comm.incoming import IncomingUpdates
from fedsp_mpi.comm.inspection import Expected, ProtocolError, open_json, read_headers
from fedsp_mpi.comm.keys import Seals
from fedsp_mpi.comm.messages import Header, Kind, pack_results, to_json
from fedsp_mpi.comm.sealing import KeyPair, Receiver, Secrets, Sender
from fedsp_mpi.config import CompressionConfig
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, Update

START = bytes(range(16))
SCHEMA = Schema.of([("prefix", [6, 4]), ("input", [5])])
CONTRACT = Contract(SCHEMA, SCHEMA, ("loss",))
CLIENTS = (0, 1, 2)


def ends(purpose: str = "results", sender: int = 7) -> tuple[Sender, Receiver]:
    """Both ends of a channel between two new key pairs."""
    client = KeyPair()
    server = KeyPair()
    up = client.agree(server.public, purpose, START, is_sender=True)
    down = server.agree(client.public, purpose, START, is_sender=False)
    assert up.proof == down.proof
    return Sender(up, sender, START), Receiver(down, sender, START)


def seal_all(sender: Sender, values: np.ndarray, *, round: int) -> np.ndarray:
    target = np.empty(values.nbytes + SEAL_BYTES, dtype=np.uint8)
    sender.seal_into(target, values, Content.VALUES, round=round)
    return target


# -- what a listener sees --------------------------------------------------------------------------


def windows(data: bytes, size: int = 8) -> set[bytes]:
    return {data[i : i + size] for i in range(len(data) - size + 1)}


def chi_squares(data: bytes) -> tuple[float, float]:
    """Statistics against equally frequent bytes (255 degrees of freedom) and bits (1)."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    ones = int(np.unpackbits(np.frombuffer(data, dtype=np.uint8)).sum())
    half = 4 * len(data)
    return float(((counts - expected) ** 2 / expected).sum()), 2 * (ones - half) ** 2 / half


def test_a_captured_payload_shows_nothing_of_the_values():
    values = np.tile(np.linspace(-1, 1, 4096, dtype=np.float32), 16)
    sender, receiver = ends()
    sealed = seal_all(sender, values, round=3)
    captured = sealed[ENVELOPE_BYTES:].tobytes()
    assert not windows(values.tobytes()) & windows(captured)
    # Beyond 6 standard deviations: once in a billion.
    bytes_statistic, bits_statistic = chi_squares(captured)
    assert abs(bytes_statistic - 255) < 6 * np.sqrt(2 * 255) and bits_statistic < 36
    plain_statistics = chi_squares(values.tobytes())
    assert plain_statistics[0] > 1e4 and plain_statistics[1] > 36, "the tests tell them apart"
    opened = np.empty_like(values)
    receiver.open_into(opened, sealed, Content.VALUES, round=3)
    assert opened.tobytes() == values.tobytes()


def test_equal_values_never_travel_as_equal_bytes():
    """No nonce serves twice on a key, nor a key in two channels, clients or starts."""
    values = np.zeros(64, dtype=np.float32)
    client = KeyPair()
    server = KeyPair()
    senders = [
        Sender(client.agree(server.public, purpose, start, is_sender=True), 7, start)
        for purpose in ("results", "calls")
        for start in (START, bytes(16))
    ]
    senders += [ends()[0], ends()[0]]
    sealed = [
        seal_all(sender, values, round=1)[ENVELOPE_BYTES:].tobytes()
        for sender in senders
        for _ in range(50)
    ]
    beginnings = {content[:16] for content in sealed}
    assert len(beginnings) == len(sealed) == 300


def test_derived_keys_are_overwritten_and_closed_ends_are_dead():
    derived = bytearray(range(1, 49))
    secrets = Secrets(derived)
    assert derived == bytes(48) and secrets.proof == bytes(range(33, 49))
    sender, receiver = ends()
    sealed = sender.seal(b"a", Content.JSON)
    for end in (sender, receiver):
        end.close()
    with pytest.raises(ValueError, match="closed"):
        sender.seal(b"a", Content.JSON)
    with pytest.raises(ValueError, match="closed"):
        receiver.open(sealed, Content.JSON)


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), b"short"])
def test_what_is_no_public_key_is_not_agreed_with(key):
    with pytest.raises(ValueError, match="found no key that can be agreed with"):
        KeyPair().agree(key, "results", START, is_sender=False)


# -- what a channel refuses ------------------------------------------------------------------------


def test_an_answer_is_opened_once_in_its_place_and_unchanged():
    pairs = [KeyPair(), KeyPair()]
    keys = [pair.public for pair in pairs]
    server, client = (Seals(rank, pair, keys, start=START) for rank, pair in enumerate(pairs))
    assert server.add_answers() == client.add_answers() == keys[0]
    sealed = [server.seal_answer(b'{"text":"yes"}') for _ in range(4)]
    assert not [digits for digits in sealed if b"yes" in bytes.fromhex(digits)]
    assert client.open_answer(sealed[0]) == b'{"text":"yes"}'
    changed = sealed[2][:-1] + ("0" if sealed[2][-1] != "0" else "1")
    for digits, reason in (
        (sealed[0], "found message 0, expected 1"),
        (changed, "its key did not seal"),
    ):
        with pytest.raises(ProtocolError, match=rf"rank 0, whose key is .*{reason}"):
            client.open_answer(digits)
    assert client.open_answer(sealed[3]) == b'{"text":"yes"}'
    for nothing in (None, 7, "zz", ""):
        with pytest.raises(ProtocolError, match=r"rank 0, whose key is .* its answer cannot be"):
            client.open_answer(nothing)


def test_every_flipped_bit_is_refused_and_leaves_no_value():
    values = np.ones(3, dtype=np.float32)
    client = KeyPair()
    server = KeyPair()
    up = client.agree(server.public, "results", START, is_sender=True)
    sealed = seal_all(Sender(up, 7, START), values, round=1)
    down = server.agree(client.public, "results", START, is_sender=False)
    for bit in range(8 * sealed.size):
        changed = sealed.copy()
        changed[bit // 8] ^= 1 << bit % 8
        target = np.ones(3, dtype=np.float32)
        with pytest.raises(ValueError, match=r"found .*expected|its key did not seal"):
            Receiver(down, 7, START).open_into(target, changed, Content.VALUES, round=1)
        assert not target.any()


@pytest.mark.parametrize(
    ("order", "wrong", "reason"),
    [
        ([0, 1, 1, 3], 2, "found message 1, expected 2: one was repeated, left out or moved"),
        ([0, 2, 1, 3], 1, "found message 2, expected 1: "),
        ([0, 2, 3, 3], 1, "found message 2, expected 1: "),
        ([1, 1, 2, 3], 0, "found message 1, expected 0: "),
    ],
)
def test_a_replayed_or_reordered_message_is_refused_and_those_in_place_are_not(
    order, wrong, reason
):
    sender, receiver = ends()
    messages = [sender.seal(bytes([number]), Content.JSON) for number in range(4)]
    for place, number in enumerate(order):
        if number == place:
            assert receiver.open(messages[number], Content.JSON) == bytes([number])
            continue
        with pytest.raises(ValueError) as caught:
            receiver.open(messages[number], Content.JSON)
        assert place != wrong or str(caught.value).startswith(reason)


def test_a_message_of_another_round_client_content_or_start_is_refused_by_name():
    client = KeyPair()
    server = KeyPair()
    sealed = Sender(client.agree(server.public, "results", START, is_sender=True), 7, START).seal(
        b"abc", Content.RESULT, round=4
    )
    secrets = server.agree(client.public, "results", START, is_sender=False)
    for receiver, kind, round, reason in (
        (Receiver(secrets, 7, START), Content.RESULT, 5, "found round 4 on the envelope, expected"),
        (Receiver(secrets, 8, START), Content.RESULT, 4, "found sender 7 on the envelope"),
        (Receiver(secrets, 7, START), Content.JSON, 4, "found content 2 on the envelope"),
        (Receiver(secrets, 7, bytes(16)), Content.RESULT, 4, "found a message of another start"),
        (ends()[1], Content.RESULT, 4, "found bytes that its key did not seal"),
    ):
        with pytest.raises(ValueError, match=reason):
            receiver.open(sealed, kind, round=round)


# -- the server's end of a round -------------------------------------------------------------------


def tensors(value: float) -> NamedTensors:
    return NamedTensors(SCHEMA, np.full(SCHEMA.num_values, value, dtype=np.float32))


def introduced(contract: Contract = CONTRACT) -> Solo:
    """A process that has exchanged keys with its three clients."""
    wire = Solo(chunk_bytes=4 * 12)
    wire.exchange_keys()
    exchange = None
    if contract.compression.is_on:
        exchange = Exchange(contract.compression, tensors(0).flat.copy())
    wire.handout(Handout({}, tensors(0), contract, exchange))
    wire.exchange_client_keys([CLIENTS])
    return wire


def fresh(seals: Seals) -> None:
    """Have all channels begin with message 0."""
    for channel in (*seals._senders.values(), *seals._receivers.values()):
        channel._number = 0


def mutate(message: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """Change a message in one of the ways in which a stranger on the wire could."""
    way = dice.randrange(7)
    at = dice.randrange(len(message))
    if way == 0:  # a bit
        return message[:at] + bytes([message[at] ^ 1 << dice.randrange(8)]) + message[at + 1 :]
    if way == 1:  # some bytes
        size = dice.randint(1, 40)
        return message[:at] + dice.randbytes(size) + message[at + size :]
    if way == 2:  # cut
        return message[:at]
    if way == 3:  # longer
        return message[:at] + dice.randbytes(dice.randint(1, 80)) + message[at:]
    if way == 4:  # a piece of an earlier message in its place
        other = dice.choice(others)
        return other[:at] + message[at:]
    if way == 5:  # an earlier message again
        return dice.choice(others)
    return dice.randbytes(len(message))


def fuzz(
    num_cases: int,
    seals: Seals,
    make: Callable[[], bytes],
    receive: Callable[[bytes], object],
) -> None:
    """Require that none of the changed messages is received, and that the true one is."""
    dice = random.Random(1)
    fresh(seals)
    others = [make() for _ in range(3)]
    for _ in range(num_cases):
        fresh(seals)
        message = make()
        changed = mutate(message, others[1:], dice)
        if changed != message:
            with pytest.raises(ProtocolError) as caught:
                receive(changed)
            assert str(caught.value).isprintable()
    fresh(seals)
    receive(make())


def test_a_thousand_changed_messages_are_refused_without_a_trace():
    seals = introduced(replace(CONTRACT, servers=1))._seals
    fuzz_headers(seals, 250)
    fuzz_chunks(seals, 250)
    fuzz_requests(seals, 125)
    rank = KeyPair()
    server = KeyPair()
    seals = Seals(0, server, [server.public], start=START)
    seals._add_sender("messages", 0, rank, to=0)
    seals._add_receiver("messages", 0, rank.public)
    fuzz_json(seals, 250)


def fuzz_json(seals: Seals, num_cases: int) -> None:
    content = to_json({"scores": [{"silo": 1, "loss": 0.5}]})

    def make() -> bytes:
        header = Header(Kind.JSON, client=0, num_values=len(content))
        return seals.seal_json(header.pack() + content)

    fuzz(num_cases, seals, make, lambda message: open_json(seals.open_json(0, message), 0))


def fuzz_headers(seals: Seals, num_cases: int) -> None:
    results = [
        Update(0, 8.0, tensors(1), {"loss": 0.5}),
        Failure(1, 2, "local", "gone " * 40),
        Update(2, 8.0, tensors(2), {"loss": 0.25}),
    ]
    expected = Expected(dict.fromkeys(CLIENTS, 0), dict.fromkeys(CLIENTS, 8.0))

    def make() -> bytes:
        return b"".join(
            seals.seal_result(r.client, pack_results([Header.of(r, 2)], CONTRACT.metrics), 2)
            for r in results
        )

    def receive(message: bytes) -> None:
        opened = seals.open_results(message, 0, round=2, expected=expected)
        headers = read_headers(opened, 0, CONTRACT, round=2, expected=expected)
        # A message that ends between two clients is one that the others are missing from.
        if len(headers) < len(results):
            raise ProtocolError("rank 0 sent no answer of some clients")

    fuzz(num_cases, seals, make, receive)


def fuzz_chunks(seals: Seals, num_cases: int) -> None:
    """Of a chunk that was changed, the client is dropped; the others are as they were sealed."""
    width = 12

    def make() -> bytes:
        rows = [
            seal_all(seals._senders["results", client], tensors(client).flat[:width], round=2)
            for client in CLIENTS
        ]
        return np.concatenate(rows).tobytes()

    def receive(message: bytes) -> None:
        def receive_chunks(targets: dict[int, np.ndarray]) -> dict[int, int]:
            [target] = targets.values()
            if len(message) != target.nbytes:
                return {0: len(message)}
            target[...] = np.frombuffer(message, dtype=np.uint8).reshape(target.shape)
            return {}

        incoming = IncomingUpdates(
            receive_chunks, [CLIENTS], width, chunk=width, round=2, seals=seals
        )
        reasons = incoming.receive_first()
        accepted = set(CLIENTS) - set(reasons)
        for _, matrix in incoming.columns(accepted):
            expected = [tensors(client).flat[:width] for client in sorted(accepted)]
            assert matrix.tolist() == [row.tolist() for row in expected], (
                "others are as they were sealed"
            )
        if reasons:
            raise ProtocolError("; ".join(reasons.values()))

    fuzz(num_cases, seals, make, receive)


def fuzz_requests(seals: Seals, num_cases: int) -> None:
    """Both parts of a request: as many cases of each."""
    values = np.arange(5, dtype=np.float32)

    def receive_header(message: bytes) -> None:
        header = Header.unpack(seals.open_call(0, message), "rank 0")
        assert (header.kind, header.client, header.num_values) == (Kind.REQUEST, 1, 5)

    def receive_values(message: bytes) -> None:
        sealed = np.frombuffer(message, dtype=np.uint8)
        assert seals.open_request(1, 0, sealed=sealed).tolist() == values.tolist()

    header = Header(Kind.REQUEST, client=1, num_values=5).pack()
    fuzz(num_cases, seals, lambda: seals.seal_call(1, header), receive_header)
    fuzz(num_cases, seals, lambda: seals.seal_request(1, values).tobytes(), receive_values)


@pytest.mark.parametrize("format", ["none", "int8"])
def test_a_sealed_round_has_the_bits_and_the_ledger_of_an_open_one_and_the_seals(format):
    compression = CompressionConfig(format, block=8)
    contract = replace(CONTRACT, compression=compression)
    sealed = introduced(contract)
    plain = Solo(chunk_bytes=4 * 12)
    exchange = Exchange(compression, tensors(0).flat.copy()) if compression.is_on else None
    plain.handout(Handout({}, tensors(0), contract, exchange))
    outcomes = []
    for wire in (plain, sealed):
        rows = []
        for round in (1, 2):
            wire.broadcast(RoundBroadcast(round, tensors=tensors(round)))
            packed = None if exchange is None else np.full(29 + 4 * 4, 1, dtype=np.uint8)
            results = [
                Update(0, 1.0, tensors(0.1), {"loss": 0.5}, packed),
                Failure(1, round, "local", "gone " * 40),
                Update(2, 3.0, tensors(0.3), {}, packed),
            ]
            updates = wire.gather(round, results)
            rows.append((updates.rows().tobytes(), updates.reports, updates.failures))
        outcomes.append(rows)
    assert outcomes[0] == outcomes[1]
    names = {(entry["phase"], entry["name"]): entry for entry in sealed.manifest}
    seals = names.pop(("gather", "(seal)"))
    num_chunks = 3 if format == "none" else 4  # of 12 values, or of one block of 8
    update_seal = (1 + num_chunks) * SEAL_BYTES
    assert seals["messages"] == 6 and seals["bytes"] == 2 * (2 * update_seal + SEAL_BYTES)
    assert list(names.values()) == [e for e in plain.manifest if e["name"] != "(seal)"]
    extra = {0: update_seal, 1: SEAL_BYTES, 2: update_seal}
    plain_up = plain.round_bytes()["up"]
    assert sealed.round_bytes()["up"] == {c: plain_up[c] + extra[c] for c in CLIENTS}


def test_an_envelope_is_48_bytes_and_comes_back():
    envelope = Envelope(Content.VALUES, 7, 3, 2**40, 2**33, START)
    assert len(envelope.pack()) == ENVELOPE_BYTES and Envelope.unpack(envelope.pack()) == envelope
