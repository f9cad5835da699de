"""Topology, messages, and the wire in one process."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from fedsp_mpi.comm import (
    Handout,
    Refused,
    RoundBroadcast,
    Solo,
    checked_result,
    connect,
    launcher_rank,
    launcher_size,
    refuse_singletons,
    spread,
)
from fedsp_mpi.comm.inspection import (
    Expected,
    ProtocolError,
    collect_failures,
    read_headers,
    require_one_rank_each,
)
from fedsp_mpi.comm.messages import (
    HEADER_BYTES,
    REASON_BYTES,
    TEXT_BYTES,
    CallStats,
    Header,
    Kind,
    accepted_reports,
    chunk_slices,
    pack_results,
    unpack_results,
)
from fedsp_mpi.comm.updates import reorder
from fedsp_mpi.comm.waiting import DeadlineError, wait
from fedsp_mpi.tensors import (
    Contract,
    Failure,
    NamedTensors,
    Schema,
    SealedTensorError,
    Update,
    seal,
)
from helpers.mpi import run_mpi

SCHEMA = Schema.of([("prefix", [4, 2]), ("input", [3])])
CONTRACT = Contract(SCHEMA, SCHEMA, ("loss", "seconds"))
LAUNCHERS = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "SLURM_")


def tensors(value: float = 0.0, schema: Schema = SCHEMA) -> NamedTensors:
    return NamedTensors(schema, np.full(schema.num_values, value, dtype=np.float32))


def solo(chunk_bytes: int = 20) -> Solo:
    wire = Solo(chunk_bytes)
    wire.handout(Handout({}, tensors(), CONTRACT))
    return wire


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return monkeypatch


# Topology.


def test_without_a_launcher_there_is_no_rank_and_connect_is_solo(
    no_launcher: pytest.MonkeyPatch,
) -> None:
    assert launcher_rank() is None and launcher_size() is None
    wire = connect()
    assert isinstance(wire, Solo) and wire.topology.solo and wire.is_server and wire.is_client


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4),
        ({"PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, 1, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 5, 8),
        (
            {
                "SLURM_STEP_ID": "4294967290",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "8",
            },
            0,
            1,
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None, None),  # the shell of a batch job
        ({"PMIX_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 1, 2),
        (
            {
                "PMI_RANK": "1",
                "PMI_SIZE": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            1,
            2,
        ),
    ],
)
def test_the_launcher_says_who_we_are(
    no_launcher: pytest.MonkeyPatch, variables: dict[str, str], rank: int | None, size: int | None
) -> None:
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert (launcher_rank(), launcher_size()) == (rank, size)


def test_singletons_are_refused_with_cause_and_cure(no_launcher: pytest.MonkeyPatch) -> None:
    refuse_singletons(1)
    no_launcher.setenv("PMI_RANK", "0")
    no_launcher.setenv("PMI_SIZE", "1")
    refuse_singletons(1)
    no_launcher.setenv("PMI_SIZE", "4")
    refuse_singletons(4)
    with pytest.raises(
        ValueError, match=r"world of 1 process, expected 4.*PMI do not match.*--mpi=pmi2"
    ):
        refuse_singletons(1)


def test_a_slurm_step_that_mpi_does_not_see_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    run = run_mpi(0, ["-c", "from fedsp_mpi.comm import connect; connect()"], env=step, status=1)
    assert "ValueError: found an MPI world of 1 process, expected 3" in run.stderr


def test_the_guard_needs_neither_numpy_nor_mpi() -> None:
    code = (
        "import sys; from fedsp_mpi.comm import guard; print({'numpy', 'mpi4py', "
        "'torch'} & sys.modules.keys())"
    )
    assert run_mpi(0, ["-c", code]).stdout.strip() == "set()"


def test_the_room_never_imports_torch() -> None:
    code = (
        "import sys, fedsp_mpi.comm as c; c.connect(); c.Wire; print({'mpi4py', "
        "'torch'} & sys.modules.keys())"
    )
    assert run_mpi(0, ["-c", code]).stdout.strip() == "set()"


def test_spread_is_largest_first_then_least_loaded() -> None:
    assert spread([1, 5, 2, 4, 3], 2) == [(0, 1, 2), (3, 4)]
    assert spread([1, 1, 1, 1], 2) == [(0, 2), (1, 3)]
    assert spread([3, 2, 1], 3) == [(0,), (1,), (2,)]


def test_spread_hosts_every_client_once_and_leaves_no_rank_empty() -> None:
    random = np.random.default_rng(0)
    for num_ranks in (1, 3, 7):
        for work in (np.zeros(9), random.random(50), [1e9] + [0.0] * 10):
            places = spread(list(work), num_ranks)
            assert sorted(client for place in places for client in place) == list(range(len(work)))
            assert all(place == tuple(sorted(place)) and place for place in places)


def test_spread_refuses_more_ranks_than_clients() -> None:
    with pytest.raises(
        ValueError, match=r"found 2 clients on 3 client ranks.*start 3 processes or fewer, or raise"
    ):
        spread([1, 1], 3)
    with pytest.raises(ValueError, match="finite"):
        spread([1, float("nan")], 1)


# Messages.


def test_a_header_is_256_bytes_and_comes_back() -> None:
    header = Header(
        Kind.UPDATE,
        3,
        7,
        11,
        SCHEMA.digest,
        2.5,
        {"seconds": float("inf"), "loss": -1.0},
        "done: ü",
    )
    raw = header.pack(CONTRACT.metrics)
    assert len(raw) == HEADER_BYTES == 256
    assert Header.unpack(raw, "me", CONTRACT.metrics) == header


def test_a_metric_that_is_not_there_stays_away() -> None:
    raw = Header(Kind.UPDATE, metrics={"seconds": 0.0}).pack(CONTRACT.metrics)
    assert Header.unpack(raw, "me", CONTRACT.metrics).metrics == {"seconds": 0.0}


def test_a_digest_that_ends_in_zeros_comes_back() -> None:
    header = Header(Kind.UPDATE, digest=b"\1" + bytes(15))
    assert Header.unpack(header.pack(), "me").digest == header.digest


def test_a_long_reason_is_cut_between_characters() -> None:
    failure = Header.unpack(Header.of(Failure(1, 2, "local", "ü" * 200), 2).pack(), "me").failure()
    assert failure == Failure(1, 2, "local", "ü" * 42)


def test_a_long_reason_goes_on_behind_its_header() -> None:
    """It arrives up to a limit, cut between characters; wrong lengths are refused."""
    short, long, endless = (
        Failure(client, 2, "local", "ü" * size) for client, size in ((1, 3), (2, 900), (3, 9000))
    )
    update = Update(4, 1.0, tensors(), {"loss": 0.5})
    headers = [Header.of(item, 2) for item in (short, long, endless, update)]
    message = pack_results(headers, CONTRACT.metrics)
    assert len(message) == 4 * HEADER_BYTES + (6 + 2 * 900 - TEXT_BYTES) + REASON_BYTES
    unpacked = unpack_results(message, "rank 3", CONTRACT.metrics)
    failures = collect_failures(unpacked, CONTRACT, round=2, expected=None)
    assert (failures[:2], [report.client for report in accepted_reports(unpacked)]) == (
        [short, long],
        [4],
    )
    assert (
        endless.reason.startswith(failures[2].reason)
        and len(failures[2].reason) == 42 + REASON_BYTES // 2
    )
    for wrong in (
        message[:-1],
        message[: HEADER_BYTES + 300],
        pack_results([replace(headers[1], num_values=9999)], ()),
    ):
        with pytest.raises(ValueError, match=r"rank 3: found .* expected"):
            unpack_results(wrong, "rank 3", CONTRACT.metrics)


def test_a_foreign_header_is_refused() -> None:
    raw = Header(Kind.STOP).pack()
    for wrong in (b"XXXX" + raw[4:], raw[:4] + b"\7\0" + raw[6:], raw[:6] + b"\11\0" + raw[8:]):
        with pytest.raises(ValueError, match="rank 3: found a message of"):
            Header.unpack(wrong, "rank 3")


def test_checked_refuses_what_the_contract_does_not_say() -> None:
    other = tensors(schema=Schema.of([("prefix", [4, 2]), ("wte", [3])]))
    with pytest.raises(
        ValueError, match=r"update of client 5: found tensor 'wte' \[3\], expected 'input' \[3\]"
    ):
        checked_result(Update(5, 1.0, other), CONTRACT, 0)
    with pytest.raises(
        ValueError, match=r"found metrics \['labels'\], expected some of \['loss', 'seconds'\]"
    ):
        checked_result(Update(5, 1.0, tensors(), {"labels": 1.0}), CONTRACT, 0)
    with pytest.raises(ValueError, match="found weight -1"):
        checked_result(Update(5, -1.0, tensors()), CONTRACT, 0)


def test_checked_turns_what_is_not_finite_into_a_failure() -> None:
    bad = tensors()
    bad["input"][2] = np.inf
    assert checked_result(Update(5, 1.0, bad), CONTRACT, 4) == Failure(
        5, 4, "check", "tensor 'input' is not finite"
    )
    assert checked_result(Update(5, float("nan"), tensors()), CONTRACT, 4) == Failure(
        5, 4, "check", "weight is nan"
    )


EXPECTED = Expected({4: 1, 5: 2, 6: 2}, {4: 8.0, 5: 8.0, 6: 8.0})


def read_from_rank_2(*headers: Header) -> list[Header]:
    return read_headers(
        b"".join(header.pack(CONTRACT.metrics) for header in headers),
        2,
        CONTRACT,
        round=4,
        expected=EXPECTED,
    )


def test_the_server_refuses_headers_that_break_the_contract() -> None:
    good = Header.of(Update(5, 1.0, tensors()), 4)
    assert read_from_rank_2(good) == [good]
    breaches = {
        "round": (
            Header(Kind.UPDATE, 3, 5, 11, SCHEMA.digest, 1.0),
            "client 5 from rank 2: found .*3, 11.*expected .*4, 11",
        ),
        "values": (
            Header(Kind.UPDATE, 4, 5, 2**63, SCHEMA.digest, 1.0),
            "client 5 from rank 2.*expected .*4, 11",
        ),
        "digest": (
            Header(Kind.UPDATE, 4, 5, 11, bytes(16), 1.0),
            "client 5 from rank 2.*0000.*expected",
        ),
        "kind": (
            Header(Kind.BROADCAST, 4, 5, 11, SCHEMA.digest, 1.0),
            "client 5 from rank 2.*BROADCAST",
        ),
        "failure": (Header.of(Failure(5, 3, "local", "gone"), 3), r"client 5 from rank 2.*\[3, 0"),
        "foreign": (Header.of(Update(4, 1.0, tensors()), 4), "client 4 from rank 2.*does not host"),
        "requests": (
            Header(Kind.UPDATE, 4, 5, 11, SCHEMA.digest, 1.0, calls=CallStats(1, 300, 300)),
            "found 1 requests",
        ),
    }
    for header, message in breaches.values():
        with pytest.raises(ProtocolError, match=message):
            read_from_rank_2(header)
    hidden = bytearray(good.pack(CONTRACT.metrics))
    hidden[-120] = 1  # in a metric that the contract does not have
    with pytest.raises(ProtocolError, match="rank 2: found bytes in its results that the contract"):
        read_headers(bytes(hidden), 2, CONTRACT, round=4, expected=EXPECTED)
    with pytest.raises(ProtocolError, match="client 5 from rank 2: found two results"):
        read_from_rank_2(good, good)
    named = replace(EXPECTED, client_name="silo s{}".format)
    twice = 2 * good.pack(CONTRACT.metrics)
    with pytest.raises(ProtocolError, match=r"^update of silo s5 from rank 2: found two"):
        read_headers(twice, 2, CONTRACT, round=4, expected=named)
    with pytest.raises(
        ProtocolError, match="rank 2: found a message of results that cannot be read"
    ):
        read_headers(bytes(300), 2, CONTRACT, round=4, expected=EXPECTED)
    with pytest.raises(ProtocolError, match="ranks 1 and 2: found two results of client 5"):
        require_one_rank_each([[], [5], [5, 6]])


def test_what_one_client_cannot_have_sent_is_its_failure() -> None:
    contract = Contract(SCHEMA, SCHEMA, ("loss", "fitness"), finite=("fitness",))
    results = {5: (1.0, {"fitness": 1.0, "loss": math.nan}), 6: (8.5, {"fitness": 1.0})}
    headers = [
        Header.of(Update(id, weight, tensors(), metrics), 4)
        for id, (weight, metrics) in results.items()
    ]
    failures = collect_failures(headers, contract, round=4, expected=EXPECTED)
    assert [(failure.client, failure.phase) for failure in failures] == [
        (4, "gather"),
        (6, "check"),
    ]
    assert failures[0].reason == "rank 1 sent no answer"
    assert failures[1].reason == "weight is 8.5, expected at most 8 samples"
    for weight, metrics, reason in (
        (math.nan, {"fitness": 1.0}, "weight is nan"),
        (-1.0, {"fitness": 1.0}, "weight is -1"),
        (1e30, {"fitness": 1.0}, "at most 8 samples"),
        (1.0, {"fitness": math.nan}, "metric fitness is nan"),
        (1.0, {"fitness": 1.0, "loss": math.inf}, "metric loss is inf"),
        (1.0, {}, "found no metric fitness"),
    ):
        [failure] = collect_failures(
            [Header.of(Update(5, weight, tensors(), metrics), 4)],
            contract,
            round=4,
            expected=Expected({5: 2}, {5: 8}),
        )
        assert reason in failure.reason


def test_no_mutated_header_is_accepted_that_the_contract_does_not_allow() -> None:
    """Change, cut or double 5,000 messages of two headers: each is refused, or still allowed."""
    random = np.random.default_rng(0)
    good = b"".join(
        Header.of(Update(id, 3.0, tensors(), {"loss": 1.0}), 4).pack(CONTRACT.metrics)
        for id in (5, 6)
    )
    accepted = 0
    for _ in range(5000):
        message = bytearray(good)
        for place in random.integers(
            0, len(message) if random.random() < 0.5 else 60, random.integers(1, 6)
        ):
            message[place] = random.choice([0, 1, 4, 127, 128, 255, random.integers(256)])
        cut = random.integers(0, 10)
        if cut == 0:
            message = message[: random.integers(len(message))]
        elif cut == 1:
            message = message * 2
        try:
            headers = read_headers(bytes(message), 2, CONTRACT, round=4, expected=EXPECTED)
        except ProtocolError as error:
            assert "rank 2" in str(error) and len(str(error)) < 300 and str(error).isprintable()
            continue
        failed = {
            failure.client
            for failure in collect_failures(headers, CONTRACT, round=4, expected=EXPECTED)
        }
        for header in headers:
            assert (header.round, header.client in (5, 6), header.calls) == (4, True, CallStats())
            if header.kind is Kind.UPDATE and header.client not in failed:
                assert (header.num_values, header.digest) == (
                    11,
                    SCHEMA.digest,
                ) and 0 <= header.weight <= 8
                assert not any(math.isinf(value) for value in header.metrics.values())
                accepted += 1
    assert 100 < accepted < 9000  # it does see both


def test_reorder_in_place_is_what_indexing_does() -> None:
    random = np.random.default_rng(0)
    for size in range(8):
        order = [int(row) for row in random.permutation(size)]
        rows = random.random((size, 3))
        expected = rows[order]
        reorder(rows, order)
        np.testing.assert_array_equal(rows, expected)


def test_slices_cover_the_vector_once() -> None:
    assert list(chunk_slices(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(chunk_slices(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(chunk_slices(0, 4)) == []


# Solo.


def test_solo_never_shares_memory_between_server_and_clients() -> None:
    wire = Solo()
    server_tensors = tensors(1.0)
    meta = {"list": [1]}
    received = wire.handout(Handout(meta, server_tensors, CONTRACT))
    assert not np.shares_memory(received.tensors.flat, server_tensors.flat)
    assert received.meta == meta
    received.meta["list"].append(2)
    assert meta == {"list": [1]}
    down = wire.broadcast(RoundBroadcast(0, tensors=server_tensors))
    assert down.tensors is not None and not np.shares_memory(down.tensors.flat, server_tensors.flat)
    np.testing.assert_array_equal(down.tensors.flat, server_tensors.flat)


def test_solo_sorts_results_by_client_and_reads_columns_once() -> None:
    failure = Failure(1, 0, "local", "gone")
    results = [Update(2, 1.0, tensors(2)), Update(0, 1.0, tensors(0)), failure]
    updates = solo().gather(0, results)
    assert [report.client for report in updates.reports] == [0, 2]
    assert updates.failures == [failure]
    np.testing.assert_array_equal(
        updates.rows(), np.array([[0.0] * 11, [2.0] * 11], dtype=np.float32)
    )
    with pytest.raises(AssertionError, match="once"):
        next(updates.columns())


def test_leaving_the_columns_early_does_not_stop_the_rest() -> None:
    updates = solo().gather(0, [Update(0, 1.0, tensors())])
    columns = updates.columns()
    next(columns)
    del columns
    assert [part.start for part, _ in updates._source] == [5, 10]


def test_solo_refuses_a_breach_of_contract() -> None:
    wire = solo()
    other = tensors(schema=Schema.of([("wte", [11])]))
    with pytest.raises(ValueError, match="update of client 0: found tensor 'wte'"):
        wire.gather(0, [Update(0, 1.0, other)])
    with pytest.raises(ValueError, match="broadcast of round 1: found tensor 'wte'"):
        wire.broadcast(RoundBroadcast(1, tensors=other))
    with pytest.raises(ValueError, match="found 13 metrics, expected at most 12"):
        wire.handout(Handout({}, tensors(), Contract(SCHEMA, SCHEMA, tuple("abcdefghijklm"))))
    with pytest.raises(Refused, match="no such task"):
        wire.agree(Refused("no such task"))


def test_solo_refuses_the_memory_of_the_global_model() -> None:
    torch = pytest.importorskip("torch")
    model = torch.zeros(11)
    message = NamedTensors(SCHEMA, model.numpy())
    wire = solo()
    seal.add([("transformer.wte", model)])
    try:
        for send in (
            lambda: wire.broadcast(RoundBroadcast(0, tensors=message)),
            lambda: wire.gather(0, [Update(0, 1.0, message)]),
            lambda: wire.handout(Handout({}, message, CONTRACT)),
        ):
            with pytest.raises(SealedTensorError, match=r"transformer\.wte"):
                send()
    finally:
        seal.clear()


# --- deadlines ---


def test_a_wait_ends_at_its_deadline_and_names_the_missing_ranks():
    late = time.monotonic() + 5
    expected = "gather: found nothing from rank 2, 5 after 0.1 s, expected an answer within 0.1 s; "
    with pytest.raises(DeadlineError) as caught:
        wait(lambda: time.monotonic() > late, "gather", 0.1, missing=lambda: {5, 2})
    assert time.monotonic() < late and str(caught.value).startswith(expected)
    assert caught.value.missing == (2, 5) and caught.value.exit_status == 124


def test_a_wait_that_is_over_before_its_deadline_returns():
    end = time.monotonic() + 0.05
    wait(lambda: time.monotonic() > end, "gather", 30)
    assert end < time.monotonic() < end + 10
