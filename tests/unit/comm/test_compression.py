"""The codec of compressed rounds, and the references on both ends of the wire."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fedsp_mpi.algorithms.compressed import CompressedClient, ResidualStates
from fedsp_mpi.comm import Handout, RoundBroadcast, Solo
from fedsp_mpi.comm.compression import (
    between_blocks,
    byte_range,
    decode,
    encode,
    encode_against,
    encode_change,
    num_bytes,
)
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.config import CompressionConfig
from fedsp_mpi.record.checkpoint import Checkpoints
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.tensors import Contract, NamedTensors, Schema, State, Update

INT8 = CompressionConfig("int8", block=16)
BF16 = CompressionConfig("bf16")
FORMATS = pytest.mark.parametrize("compression", [INT8, BF16], ids=["int8", "bf16"])
SCHEMA = Schema.of([("w", (20, 3)), ("b", (7,))])
CONTRACT = Contract(SCHEMA, SCHEMA, compression=INT8)
EXAMPLES = hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)


@st.composite
def changes(draw) -> np.ndarray:
    """Return fp32 values of any length and of magnitudes down to the smallest that there are."""
    values = st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-116), 2.0**-116, width=32)
    return np.array(draw(st.lists(values, max_size=50)), dtype=np.float32)


@EXAMPLES
@hypothesis.given(changes())
def test_an_int8_value_is_half_a_step_of_its_block_away_at_most(change):
    packed = encode(change, INT8)
    assert packed.dtype == np.uint8 and packed.size == num_bytes(change.size, INT8)
    decoded = decode(packed, change.size, INT8)
    assert decoded.dtype == np.float32 and decoded.shape == change.shape
    for start in range(0, change.size, 16):
        block = change[start : start + 16].astype(np.float64)
        step = np.abs(block).max() / 127
        error = np.abs(block - decoded[start : start + 16])
        assert (error <= 0.5001 * step + 2e-36).all()


@EXAMPLES
@hypothesis.given(changes())
def test_bf16_rounds_as_torch_does(change):
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(change).to(torch.bfloat16).to(torch.float32).numpy()
    assert decode(encode(change, BF16), change.size, BF16).tobytes() == expected.tobytes()


def test_int8_rounds_halves_to_the_even_neighbour():
    change = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], dtype=np.float32)
    assert decode(encode(change, INT8), 7, INT8).tolist() == [127, 0, 2, 2, 0, -2, 126]


@FORMATS
def test_a_message_is_that_of_its_chunks(compression):
    change = np.random.default_rng(0).normal(0, 1, 101).astype(np.float32)
    chunk = between_blocks(40, compression)
    assert chunk == (32 if compression is INT8 else 40)
    packed = encode(change, compression)
    for start in range(0, 101, chunk):
        part = slice(start, min(start + chunk, 101))
        assert encode(change[part], compression).tobytes() == (
            packed[byte_range(part, compression)].tobytes()
        )


def test_int8_takes_a_quarter_and_one_scale_a_block():
    settings = CompressionConfig("int8")
    assert num_bytes(1_000_000, settings) == 1_000_000 + 4 * 3907
    assert 4 / (num_bytes(1_000_000, settings) / 1_000_000) > 3.9
    assert num_bytes(7, CompressionConfig()) == 28 and num_bytes(7, BF16) == 14


@FORMATS
@pytest.mark.parametrize("has_feedback", [True, False])
def test_with_feedback_what_is_received_adds_up_to_what_was_sent(compression, has_feedback):
    """The receiver's sum is away by the last residual, not by one for each message."""
    random = np.random.default_rng(1)
    reference = np.zeros(200, dtype=np.float32)
    residual = np.zeros(200, dtype=np.float32) if has_feedback else None
    constant = random.normal(0, 1e-3, 200)  # what rounding alone takes every time
    constant[::16] = 1.0
    total_sent = np.zeros(200)
    total_received = np.zeros(200)
    for _ in range(100):
        values = constant.astype(np.float32)
        _, received = encode_against(values, reference, residual, compression=compression)
        total_sent += values
        total_received += received
    difference = total_sent - total_received
    once = constant - encode_against(values, reference, None, compression=compression)[1]
    if residual is None:
        np.testing.assert_allclose(difference, 100 * once, atol=1e-5)
        assert np.abs(difference).max() > (0.04 if compression is INT8 else 1e-4)
    else:
        np.testing.assert_allclose(difference, residual, atol=1e-5)
        assert np.abs(difference).max() <= (0.5001 / 127 if compression is INT8 else 1e-5)


@EXAMPLES
@hypothesis.given(st.binary(min_size=num_bytes(21, INT8), max_size=num_bytes(21, INT8)))
def test_any_bytes_are_finite_numbers_or_refused(raw):
    packed = np.frombuffer(raw, dtype=np.uint8)
    for compression in (INT8, BF16):
        for num_values in (21, 14):
            try:
                values = decode(packed, num_values, compression)
            except ValueError as error:
                assert "found" in str(error) and "expected" in str(error)
            else:
                assert values.shape == (num_values,) and np.isfinite(values).all()


@FORMATS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_not_finite_is_not_encoded(compression, value):
    with pytest.raises(ValueError, match="expected finite numbers"):
        encode(np.array([0, value], dtype=np.float32), compression)


# -- both ends -------------------------------------------------------------------------------------


def tensors(seed: int, scale: float = 1.0) -> NamedTensors:
    values = np.random.default_rng(seed).normal(0, scale, SCHEMA.num_values)
    return NamedTensors(SCHEMA, values.astype(np.float32))


def opened(contract: Contract = CONTRACT, first: NamedTensors | None = None) -> Solo:
    wire = Solo(chunk_bytes=4 * 32)
    reference = (first or tensors(0)).flat.copy()
    nothing = NamedTensors.of({"w": np.zeros(1)})
    wire.handout(Handout({}, nothing, contract, Exchange(contract.compression, reference)))
    return wire


def test_a_broadcast_that_silos_only_judge_leaves_the_residual_for_the_next_round():
    judged = opened()
    other = opened()
    for wire in (judged, other):
        wire.broadcast(RoundBroadcast(1, tensors=tensors(1)))
    judged.broadcast(RoundBroadcast(1, tensors=tensors(2)), evaluated_by=3)
    errors = {}
    for name, wire in (("judged", judged), ("other", other)):
        residual = wire._exchange.state()["residual"].copy()
        started = wire.broadcast(RoundBroadcast(2, tensors=tensors(2))).tensors.flat
        target = tensors(2).flat + residual
        errors[name] = np.abs(started - target).max()
    # The second message of the same values is about what the first one has left.
    assert 0 < errors["judged"] < errors["other"] / 50
    assert judged.evaluation_bytes() == 3 * (256 + num_bytes(67, INT8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broadcast_without_a_change_that_can_travel_is_nan_and_leaves_both_ends_alone(value):
    wire = opened()
    other = opened()
    for each_wire in (wire, other):
        each_wire.broadcast(RoundBroadcast(1, tensors=tensors(1)))
    broken = tensors(2)
    broken["w"][3, 1] = value
    received = wire.broadcast(RoundBroadcast(2, tensors=broken)).tensors
    assert received.schema == SCHEMA and np.isnan(received.flat).all()
    failures = wire.gather(2, [Update(0, 1.0, received)]).failures
    assert [failure.reason for failure in failures] == ["tensor 'w' is not finite"]
    again, expected = (
        each_wire.broadcast(RoundBroadcast(3, tensors=tensors(3))).tensors
        for each_wire in (wire, other)
    )
    assert again.flat.tobytes() == expected.flat.tobytes()


@FORMATS
def test_a_change_is_encoded_alike_with_and_without_being_decoded(compression):
    values = tensors(1).flat
    reference = tensors(2).flat
    expected, _ = encode_against(values, reference, None, compression=compression)
    assert encode_change(values, reference, compression).tobytes() == expected.tobytes()


def test_an_exchange_goes_on_from_its_state_with_the_same_bits():
    whole = opened()
    first = opened()
    for seed in (1, 2, 3):
        expected = whole.broadcast(RoundBroadcast(seed, tensors=tensors(seed)))
        if seed == 2:
            state = {name: value.copy() for name, value in first._exchange.state().items()}
            again = Exchange(INT8, tensors(9).flat)
            again.load_state(state)
            first._exchange = again
        received = first.broadcast(RoundBroadcast(seed, tensors=tensors(seed)))
        assert received.tensors.flat.tobytes() == expected.tensors.flat.tobytes()


class Walkers:
    """Clients that move by the same small step in every round, and count their rounds."""

    model = None
    prompt = None

    def __init__(self) -> None:
        self.rounds: dict[int, int] = {}
        self.states = self

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        self.rounds[client] = self.rounds.get(client, 0) + 1
        step = tensors(client, 1e-2).flat
        step[::16] = 1.0
        return Update(client, 1.0, NamedTensors(SCHEMA, broadcast.flat + step))

    def has_state(self, client: int) -> bool:
        return client in self.rounds

    def client_state(self, client: int) -> State:
        return {"rounds": np.array(self.rounds[client])}

    def load_client_state(self, client: int, state: State) -> None:
        self.rounds[client] = int(state["rounds"])

    def forget(self, client: int) -> None:
        self.rounds.pop(client, None)


def walk(folder, max_in_memory: int, *, keep: bool = True) -> tuple[list[bytes], Walkers]:
    """Play six rounds of three clients, of which two take part in each."""
    walkers = Walkers()
    client = CompressedClient(walkers, INT8, keep=keep)
    folder.mkdir()
    cache = ClientStateCache(
        client.states, Checkpoints(folder), max_in_memory=max_in_memory, files={}
    )
    sent = []
    for round in range(1, 7):
        ids = sorted({round % 3, (round + 1) % 3})
        cache.start_round(ids)
        for id in ids:
            cache.load(id)
            sent.append(client.local_update(id, round, tensors(0)).packed.tobytes())
            cache.store(id, round)
    cache.save()
    return sent, walkers


def test_residuals_go_to_disk_and_back_with_the_rest_of_a_client(tmp_path):
    resident, walkers = walk(tmp_path / "resident", 3)
    spilt, spilt_walkers = walk(tmp_path / "spilt", 1)
    assert resident == spilt and walkers.rounds == {0: 4, 1: 4, 2: 4}
    assert len(set(resident)) > 3, "a residual changes what a client sends"
    assert len(spilt_walkers.rounds) == 1
    without, _ = walk(tmp_path / "restarted", 3, keep=False)
    assert len(set(without)) == 3


def test_what_cannot_be_averaged_is_not_packed_and_leaves_the_residual(tmp_path):
    class Broken(Walkers):
        def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
            update = super().local_update(client, round, broadcast)
            if round == 2:
                update.tensors["w"][3, 1] = np.nan
            return update

    client = CompressedClient(Broken(), INT8, keep=True)
    client.local_update(0, 1, tensors(0))
    states = client.states
    assert isinstance(states, ResidualStates)
    before = states.residual(0, SCHEMA.num_values).copy()
    wire = opened()
    wire.broadcast(RoundBroadcast(2, tensors=tensors(1)))
    updates = wire.gather(2, [client.local_update(0, 2, tensors(0))])
    assert [failure.reason for failure in updates.failures] == ["tensor 'w' is not finite"]
    assert before.any() and (states.residual(0, SCHEMA.num_values) == before).all()


def test_the_server_averages_what_it_decodes_and_is_told_of_what_nobody_packed():
    wire = opened()
    started = wire.broadcast(RoundBroadcast(1, tensors=tensors(1))).tensors
    assert started is not None
    update = CompressedClient(Walkers(), INT8, keep=True).local_update(4, 1, started)
    [row] = wire.gather(1, [update]).rows()
    _, expected = encode_against(update.tensors.flat, started.flat, None, compression=INT8)
    assert row.tobytes() == expected.tobytes() != update.tensors.flat.tobytes()
    with pytest.raises(ValueError, match="update of client 4: found 0 packed bytes, expected 87"):
        wire.gather(1, [replace(update, packed=None)])
