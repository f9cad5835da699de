"""The wire, the guard and who is where: alone, and on real processes under mpirun."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi import PROGRAMS, both_ends, run_mpi

from fedsp_mpi.comm import (
    Down,
    Handout,
    Refused,
    Solo,
    checked,
    connect,
    guard,
    launcher_rank,
    launcher_size,
    refuse_singletons,
    spread,
)
from fedsp_mpi.comm.messages import HEADER_BYTES, Header, Kind, require_update, slices, sort_answers
from fedsp_mpi.comm.updates import reorder
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, SealedTensorError, Update, seal

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


# Who is where.


def test_without_a_launcher_there_is_no_rank_and_connect_is_solo(no_launcher: pytest.MonkeyPatch) -> None:
    assert launcher_rank() is None and launcher_size() is None
    wire = connect()
    assert isinstance(wire, Solo) and wire.topology.solo and wire.is_server and wire.is_client


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4),
        ({"PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, 1, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 5, 8),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, 0, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None, None),  # the shell of a batch job
        ({"PMIX_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 1, 2),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 1, 2),
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
    with pytest.raises(ValueError, match=r"world of 1 process, expected 4.*PMI do not match.*--mpi=pmi2"):
        refuse_singletons(1)


def test_a_slurm_step_that_mpi_does_not_see_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    run = run_mpi(0, ["-c", "from fedsp_mpi.comm import connect; connect()"], env=step, status=1)
    assert "ValueError: found an MPI world of 1 process, expected 3" in run.stderr


def test_the_guard_needs_neither_numpy_nor_mpi() -> None:
    code = "import sys; from fedsp_mpi.comm import guard; print({'numpy', 'mpi4py', 'torch'} & sys.modules.keys())"
    assert run_mpi(0, ["-c", code]).stdout.strip() == "set()"


def test_the_room_never_imports_torch() -> None:
    code = "import sys, fedsp_mpi.comm as c; c.connect(); c.Wire; print({'mpi4py', 'torch'} & sys.modules.keys())"
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
    with pytest.raises(ValueError, match=r"found 2 clients on 3 client ranks.*start 3 processes or fewer, or raise"):
        spread([1, 1], 3)
    with pytest.raises(ValueError, match="finite"):
        spread([1, float("nan")], 1)


# Messages.


def test_a_header_is_256_bytes_and_comes_back() -> None:
    header = Header(Kind.UPDATE, 3, 7, 11, SCHEMA.digest, 2.5, {"seconds": float("inf"), "loss": -1.0}, "done: ü")
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
    assert failure == Failure(1, 2, "local", "ü" * 52)


def test_a_foreign_header_is_refused() -> None:
    raw = Header(Kind.STOP).pack()
    for wrong in (b"XXXX" + raw[4:], raw[:4] + b"\7\0" + raw[6:], raw[:6] + b"\11\0" + raw[8:]):
        with pytest.raises(ValueError, match="rank 3: found a message of"):
            Header.unpack(wrong, "rank 3")


def test_checked_refuses_what_the_contract_does_not_say() -> None:
    other = tensors(schema=Schema.of([("prefix", [4, 2]), ("wte", [3])]))
    with pytest.raises(ValueError, match=r"update of client 5: found tensor 'wte' \[3\], expected 'input' \[3\]"):
        checked(Update(5, 1.0, other), CONTRACT, 0)
    with pytest.raises(ValueError, match=r"found metrics \['labels'\], expected some of \['loss', 'seconds'\]"):
        checked(Update(5, 1.0, tensors(), {"labels": 1.0}), CONTRACT, 0)
    with pytest.raises(ValueError, match="found weight -1"):
        checked(Update(5, -1.0, tensors()), CONTRACT, 0)


def test_checked_turns_what_is_not_finite_into_a_failure() -> None:
    bad = tensors()
    bad["input"][2] = np.inf
    assert checked(Update(5, 1.0, bad), CONTRACT, 4) == Failure(5, 4, "check", "tensor 'input' is not finite")
    assert checked(Update(5, float("nan"), tensors()), CONTRACT, 4) == Failure(5, 4, "check", "weight is nan")


def test_the_server_refuses_headers_that_break_the_contract() -> None:
    good = Header.of(Update(5, 1.0, tensors()), 4)
    assert require_update(good, CONTRACT, 4, 2) is good
    breaches = {
        "round": (Header(Kind.UPDATE, 3, 5, 11, SCHEMA.digest, 1.0), "found .*3, 11"),
        "values": (Header(Kind.UPDATE, 4, 5, 12, SCHEMA.digest, 1.0), "found .*4, 12.*expected .*4, 11"),
        "digest": (Header(Kind.UPDATE, 4, 5, 11, bytes(16), 1.0), "0000.*expected"),
        "weight": (Header(Kind.UPDATE, 4, 5, 11, SCHEMA.digest, float("nan")), "weight nan"),
        "kind": (Header(Kind.BROADCAST, 4, 5, 11, SCHEMA.digest, 1.0), "BROADCAST"),
        "late failure": (Header.of(Failure(5, 3, "local", "gone"), 3), r"found .*\[3\], expected \[4\]"),
    }
    for header, message in breaches.values():
        with pytest.raises(ValueError, match=f"client 5 from rank 2.*{message}"):
            require_update(header, CONTRACT, 4, 2)
    with pytest.raises(ValueError, match="two answers of client 5"):
        sort_answers([good, good])


def test_reorder_in_place_is_what_indexing_does() -> None:
    random = np.random.default_rng(0)
    for size in range(8):
        order = [int(row) for row in random.permutation(size)]
        rows = random.random((size, 3))
        expected = rows[order]
        reorder(rows, order)
        np.testing.assert_array_equal(rows, expected)


def test_slices_cover_the_vector_once() -> None:
    assert list(slices(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(slices(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(slices(0, 4)) == []


# Solo.


def test_solo_never_shares_memory_between_server_and_clients() -> None:
    wire, mine = Solo(), tensors(1.0)
    meta = {"list": [1]}
    given = wire.handout(Handout(meta, mine, CONTRACT))
    assert not np.shares_memory(given.tensors.flat, mine.flat) and given.meta == meta
    given.meta["list"].append(2)
    assert meta == {"list": [1]}
    down = wire.broadcast(Down(0, tensors=mine))
    assert down.tensors is not None and not np.shares_memory(down.tensors.flat, mine.flat)
    np.testing.assert_array_equal(down.tensors.flat, mine.flat)


def test_solo_reads_the_answers_lazily_and_columns_once() -> None:
    events: list[str] = []

    def outgoing() -> Iterator[Update | Failure]:
        for client in (2, 0):
            events.append(f"train {client}")
            yield Update(client, 1.0, tensors(client))
        yield Failure(1, 0, "local", "gone")

    wire = solo()
    answers = outgoing()
    assert events == []
    updates = wire.gather(0, answers)
    assert events == ["train 2", "train 0"]
    assert [report.client for report in updates.reports] == [0, 2]
    assert updates.failures == [Failure(1, 0, "local", "gone")]
    np.testing.assert_array_equal(updates.rows(), np.array([[0.0] * 11, [2.0] * 11], dtype=np.float32))
    with pytest.raises(AssertionError, match="once"):
        next(updates.columns())


def test_leaving_the_columns_early_does_not_stop_the_rest() -> None:
    updates = solo().gather(0, [Update(0, 1.0, tensors())])
    columns = updates.columns()
    next(columns)
    del columns
    assert [part.start for part, _ in updates._source] == [5, 10]


def test_solo_refuses_a_breach_of_contract() -> None:
    wire, other = solo(), tensors(schema=Schema.of([("wte", [11])]))
    with pytest.raises(ValueError, match="update of client 0: found tensor 'wte'"):
        wire.gather(0, [Update(0, 1.0, other)])
    with pytest.raises(ValueError, match="broadcast of round 1: found tensor 'wte'"):
        wire.broadcast(Down(1, tensors=other))
    with pytest.raises(ValueError, match="found 13 metrics, expected at most 12"):
        wire.handout(Handout({}, tensors(), Contract(SCHEMA, SCHEMA, tuple("abcdefghijklm"))))
    with pytest.raises(Refused, match="no such task"):
        wire.agree("no such task")


def test_solo_refuses_the_memory_of_the_global_model() -> None:
    torch = pytest.importorskip("torch")
    model = torch.zeros(11)
    message, wire = NamedTensors(SCHEMA, model.numpy()), solo()
    seal.add([("transformer.wte", model)])
    try:
        for send in (
            lambda: wire.broadcast(Down(0, tensors=message)),
            lambda: wire.gather(0, [Update(0, 1.0, message)]),
            lambda: wire.handout(Handout({}, message, CONTRACT)),
        ):
            with pytest.raises(SealedTensorError, match=r"transformer\.wte"):
                send()
    finally:
        seal.clear()


# The wire on real processes.


def fold(path: Path, processes: int, *options: object, timeout: float = 60) -> dict[str, Any]:
    run_mpi(processes, [PROGRAMS / "fold.py", path, *map(str, options)], timeout=timeout)
    return json.loads(path.read_text())


def without(rounds: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in seen.items() if name not in names} for seen in rounds]


@pytest.mark.parametrize(
    "options",
    [
        ("--fail",),
        ("--partial", "--chunk", 4 << 20),
        ("--chunk", 4 * 7, "--values", 101),
        ("--values", 300_000, "--chunk", 4 * 131_072),
    ],
    ids=["failures", "partial", "tiny-pieces", "large"],
)
def test_one_result_on_one_two_and_four_processes(tmp_path: Path, options: tuple[object, ...]) -> None:
    alone, two, four = (fold(tmp_path / f"{n}.json", n, *options)["rounds"] for n in (0, 2, 4))
    assert without(alone, "peak") == without(two, "peak") == without(four, "peak")
    assert len({seen["digest"] for seen in alone}) == (2 if "--fail" in options else 3)


def test_failures_ride_in_the_place_of_updates(tmp_path: Path) -> None:
    rounds = fold(tmp_path / "out.json", 3, "--fail")["rounds"]
    assert [report["client"] for report in rounds[1]["reports"]] == [0, 2, 4]
    first, second = rounds[1]["failures"]
    assert (first["client"], first["round"], first["phase"]) == (1, 1, "local")
    assert first["reason"].startswith("no memory: üü")
    assert (second["client"], second["reason"]) == (3, "tensor 'input' is not finite")
    assert [failure["client"] for failure in rounds[2]["failures"]] == [0, 1, 2, 3, 4]


def test_fifty_clients_on_three_ranks(tmp_path: Path) -> None:
    alone, spread_out = (fold(tmp_path / f"{n}.json", n, "--clients", 50)["rounds"] for n in (0, 4))
    assert [report["client"] for report in spread_out[0]["reports"]] == list(range(50))
    assert without(alone, "peak") == without(spread_out, "peak")


def test_a_rule_that_stops_reading_does_not_break_the_next_round(tmp_path: Path) -> None:
    alone, three = (fold(tmp_path / f"{n}.json", n, "--stop-early")["rounds"] for n in (0, 3))
    assert without(alone, "peak") == without(three, "peak")


@pytest.mark.parametrize("processes", [0, 3])
def test_the_merge_needs_memory_for_one_piece_of_every_update(tmp_path: Path, processes: int) -> None:
    values, clients, chunk = 500_000, 30, 16 << 10
    rounds = fold(tmp_path / "out.json", processes, "--values", values, "--clients", clients, "--chunk", chunk)[
        "rounds"
    ]
    everything, allowed = clients * 4 * values, clients * chunk + 4 * values + 200_000  # pieces, the result, and change
    assert max(seen["peak"] for seen in rounds) < allowed < everything / 20


def test_the_manifest_names_every_byte(tmp_path: Path) -> None:
    clients, client_ranks, rounds, values = 5, 3, 3, 1003
    runs = [fold(tmp_path / f"{n}.json", n) for n in (0, 4)]
    for run, ranks in zip(runs, (0, client_ranks)):
        book = {(entry["direction"], entry["phase"], entry["name"]): entry for entry in run["manifest"]}
        for direction, phase in (("down", "broadcast"), ("up", "gather")):
            prefix, header = book[direction, phase, "prefix"], book[direction, phase, "(header)"]
            assert (prefix["shape"], prefix["dtype"]) == ([500, 2], "float32")
            assert (prefix["messages"], prefix["bytes"]) == (clients * rounds, clients * rounds * 4000)
            assert (header["messages"], header["bytes"]) == (clients * rounds, clients * rounds * 256)
        assert book["down", "broadcast", "prefix"]["crossed"] == ranks * rounds
        assert book["down", "broadcast", "(header)"]["crossed"] == ranks * (rounds + 1)  # and the word to stop
        assert book["up", "gather", "prefix"]["crossed"] == (clients * rounds if ranks else 0)
        assert book["handout", "handout", "input"]["bytes"] == max(1, ranks) * 12
        for entry in run["rounds"]:
            for sizes in entry["round_bytes"].values():
                assert sizes == {str(client): 4 * values + 256 for client in range(clients)}
    names = {entry["name"] for entry in runs[1]["manifest"]}
    assert names == {"(header)", "(introduction)", "(verdict)", "(meta)", "prefix", "input"}


def test_everybody_is_introduced_to_the_server(tmp_path: Path) -> None:
    assert fold(tmp_path / "out.json", 4)["hosts"] == [{"rank": rank, "name": "Jürgen"} for rank in range(4)]


def test_the_real_topology() -> None:
    code = (
        "from fedsp_mpi.comm import connect; w = connect(); t = w.topology;"
        "import sys; numbers = (t.rank, t.size, t.local_rank, t.local_size, t.is_server, t.solo);"
        "sys.stdout.write(' '.join(map(str, numbers)) + '\\n'); w.finish()"
    )
    seen = run_mpi(3, ["-c", code]).stdout
    assert all(line in seen for line in ("0 3 0 3 True False", "1 3 1 3 False False", "2 3 2 3 False False"))
    assert run_mpi(1, ["-c", code]).stdout.strip() == "0 1 0 1 True True"


@pytest.mark.parametrize(
    ("case", "who", "message"),
    [
        ("up", "rank 1", "update of client 0: found tensor 'wte.weight' [3], expected 'input' [3]"),
        ("metric", "rank 1", "found metrics ['secret'], expected some of []"),
        ("down", "rank 0", "broadcast of round 0: found tensor 'wte.weight' [3], expected 'input' [3]"),
        ("sealed", "rank 0", "is the memory of 'transformer.wte' of the global model, which never leaves the server"),
        ("unseen", "rank 0", "update of client 0 from rank 1: found [round, values, schema]"),
    ],
)
def test_what_must_not_travel_is_refused(case: str, who: str, message: str) -> None:
    run = run_mpi(2, [PROGRAMS / "refuse.py", case], timeout=30, status=None)
    assert run.returncode != 0 and only_report(run).startswith(f"refuse failed: {who} of 2")
    assert message in run.stderr, both_ends(run)


def test_a_client_that_answers_on_two_ranks_is_refused() -> None:
    run = run_mpi(3, [PROGRAMS / "refuse.py", "twice"], timeout=30, status=None)
    assert run.returncode != 0 and "found two answers of client 0 in one round" in run.stderr


def test_a_verdict_is_no_crash() -> None:
    run = run_mpi(3, [PROGRAMS / "refuse.py", "verdict"], timeout=30, status=2)
    assert run.stderr.count("there is no such data set") == 1 and "Traceback" not in run.stderr


# The guard.


def only_report(run: subprocess.CompletedProcess[str]) -> str:
    """The title of the report, of which there is one."""
    titles = [line for line in run.stderr.split("\n") if " failed: rank " in line]
    assert len(titles) == 1 and run.stderr.count("Traceback") == 1, both_ends(run)
    return titles[0]


def crash(who: str, where: str, how: str, *folder: Path, processes: int = 4) -> subprocess.CompletedProcess[str]:
    run = run_mpi(processes, [PROGRAMS / "crash.py", who, where, how, *folder], timeout=15, status=None)
    assert run.returncode != 0, both_ends(run)
    return run


@pytest.mark.parametrize("where", ["import", "handout", "local", "broadcast"])
@pytest.mark.parametrize("who", ["one", "clients"])
def test_a_clients_crash_ends_the_job_with_one_report(tmp_path: Path, who: str, where: str) -> None:
    title = only_report(crash(who, where, "raise", tmp_path))
    scene = {"local": "round 0, client ", "broadcast": "round 1, phase 'round'"}.get(where, "phase 'start-up'")
    assert "of 4 on host " in title and scene in title
    assert who == "clients" or title.startswith("crash failed: rank 1 of 4")
    if where != "import":
        assert (tmp_path / "failure.txt").read_text().startswith(title)


@pytest.mark.parametrize("where", ["import", "handout", "merge", "broadcast"])
def test_the_servers_crash_ends_the_job_with_one_report(where: str) -> None:
    title = only_report(crash("server", where, "raise"))
    assert title.startswith("crash failed: rank 0 of 4")
    assert where != "merge" or "round 0, phase 'merge'" in title


@pytest.mark.parametrize("where", ["import", "handout"])
@pytest.mark.parametrize("with_folder", [False, True])
def test_everybody_crashing_at_once_makes_one_report(tmp_path: Path, with_folder: bool, where: str) -> None:
    only_report(crash("all", where, "raise", *([tmp_path] if with_folder else []), processes=6))


def test_the_report_of_an_earlier_run_does_not_silence_this_one(tmp_path: Path) -> None:
    (tmp_path / "failure.txt").write_text("an earlier one")
    title = only_report(crash("clients", "local", "raise", tmp_path))
    assert (tmp_path / "failure.txt").read_text().startswith(title)
    assert [path.read_text() for path in tmp_path.glob("failure-*.txt")] == ["an earlier one"]


def test_a_folder_that_is_gone_does_not_silence_the_report(tmp_path: Path) -> None:
    only_report(crash("one", "local", "raise", tmp_path / "missing"))


def test_another_threads_crash_ends_the_job() -> None:
    assert "thread 'helper'" in only_report(crash("one", "local", "thread"))


@pytest.mark.parametrize("how", ["exit", "exit0"])
def test_leaving_while_others_wait_is_a_crash(how: str) -> None:
    run = crash("one", "local", how)
    assert "SystemExit" in run.stderr and "client 0" in only_report(run)
    assert run.returncode == (3 if how == "exit" else 1)


@pytest.mark.parametrize("how", ["interrupt", "term", "kill"])
@pytest.mark.parametrize("who", ["server", "one"])
def test_a_signal_ends_the_whole_job_without_a_report(who: str, how: str) -> None:
    assert "Traceback" not in crash(who, "merge" if who == "server" else "local", how).stderr


def test_the_deadline_names_the_rank_that_is_missing() -> None:
    run = crash("one", "local", "stop", processes=3)
    assert only_report(run).startswith("crash failed: rank 0 of 3")
    assert "DeadlineError: gather: found nothing from rank 1 after" in run.stderr


def test_a_client_names_the_server_that_is_late() -> None:
    run = crash("server", "broadcast", "late", processes=3)
    assert "DeadlineError: broadcast: found nothing from rank 0 after" in run.stderr
    only_report(run)


def test_before_mpi_and_alone_a_crash_is_reported_and_leaves_status_1() -> None:
    run = run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "raise"], status=1)
    assert only_report(run).startswith("crash failed: rank 0 of 1")
    run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "exit"], status=3)
    assert "Traceback" not in run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "interrupt"], status=130).stderr


def test_phases_nest_and_an_error_remembers_its_own() -> None:
    with pytest.raises(RuntimeError) as caught, guard.phase("round", round=3):
        with guard.phase("local training", client=5):
            assert str(guard.scene()) == "round 3, client 5, phase 'local training'"
        assert str(guard.scene()) == "round 3, phase 'round'"
        with guard.phase("merge"):
            raise RuntimeError
    assert str(guard.scene(caught.value)) == "round 3, phase 'merge'"
    assert str(guard.scene()) == "phase 'start-up'"


def test_the_guard_passes_on_what_harms_nobody() -> None:
    hook = threading.excepthook
    for error in (Refused("no"), SystemExit(2), SystemExit(0)):
        with pytest.raises(type(error)) as caught, guard("test"):
            raise error
        assert caught.value is error
    assert threading.excepthook is hook


def test_the_bench_measures_and_waiting_is_cheap(tmp_path: Path) -> None:
    run_mpi(3, [PROGRAMS / "bench.py", tmp_path / "out.json", "200000", "3"])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ranks"] == 3 and figures["ratio"] > 0
    assert figures["ratio"] == pytest.approx(figures["wire_seconds"] / figures["bare_seconds"])
    assert figures["waiting_cores"] < 0.5  # of a core: a blocking call takes all of it
    assert {"broadcast_slowdown", "gather_slowdown"} <= figures.keys()
