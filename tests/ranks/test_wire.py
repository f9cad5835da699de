"""The wire on real processes: the same bits and the same ledger for any number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.mpi import both_ends, only_report, run_mpi
from helpers.paths import PROGRAMS


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
        ("--values", 1001, "--chunk", 4 * 200, "--partial", "--compression", "int8"),
    ],
    ids=["failures", "partial", "tiny-chunks", "large", "int8"],
)
def test_one_result_on_one_two_and_four_processes(
    tmp_path: Path, options: tuple[object, ...]
) -> None:
    alone, two, four = (fold(tmp_path / f"{n}.json", n, *options)["rounds"] for n in (0, 2, 4))
    assert without(alone, "peak") == without(two, "peak") == without(four, "peak")
    assert len({seen["digest"] for seen in alone}) == (2 if "--fail" in options else 3)


@pytest.mark.parametrize("first_ranks", [1, 2, 3])
def test_a_round_between_the_first_ranks_whose_server_plays_clients(
    tmp_path: Path, first_ranks: int
) -> None:
    """Some of its own clients fail, too; the last rank takes no part."""
    options = ("--fail", "--chunk", 4 * 7, "--values", 101)
    alone = fold(tmp_path / "alone.json", 0, *options)["rounds"]
    among = fold(tmp_path / "among.json", 4, *options, "--among-first", first_ranks)["rounds"]
    assert without(alone, "peak") == without(among, "peak")
    assert [failure["client"] for failure in among[1]["failures"]] == [1, 3]


def test_sealed_rounds_have_the_same_result_and_show_nothing_of_it(tmp_path: Path) -> None:
    options = ("--values", 1001, "--chunk", 4 * 200, "--fail")
    taps = {name: tmp_path / f"{name}.bin" for name in ("open", "sealed")}
    plain = fold(tmp_path / "open.json", 3, *options, "--capture", taps["open"])
    sealed_options = (*options, "--encryption")
    sealed = fold(tmp_path / "sealed.json", 3, *sealed_options, "--capture", taps["sealed"])
    alone = fold(tmp_path / "alone.json", 0, *sealed_options)
    for run in (sealed, alone):
        unlike = ("peak", "round_bytes")
        assert without(run["rounds"], *unlike) == without(plain["rounds"], *unlike)
    up = [run["rounds"][0]["round_bytes"]["up"] for run in (alone, sealed, plain)]
    # A header and six chunks are sealed, with 64 bytes each.
    assert up[0] == up[1] == {client: size + 7 * 64 for client, size in up[2].items()}

    captured = {name: tap.read_bytes() for name, tap in taps.items()}
    shown, hidden = (
        {data[i : i + 16] for i in range(len(data) - 15)} for data in captured.values()
    )
    assert len(captured["sealed"]) > len(captured["open"]) > 10_000
    assert "Jürgen".encode() in captured["open"] and "Jürgen".encode() not in captured["sealed"]
    assert not shown & hidden

    seals = {
        (entry["phase"], entry["crossed"]): entry["bytes_crossed"]
        for entry in sealed["manifest"]
        if entry["name"] == "(seal)"
    }
    # Of five clients one fails, of itself, in round 1, another by its values, and all in round 2.
    assert seals["gather", 15] == 64 * (8 * 7 + 7)
    assert set(seals) == {("start-up", 8), ("gather", 15)}


def test_bf16_fails_as_fp32_does_and_halves_the_bytes(tmp_path: Path) -> None:
    options = ("--fail", "--chunk", 4 * 7, "--values", 101, "--compression", "bf16")
    alone, three = (fold(tmp_path / f"{n}.json", n, *options)["rounds"] for n in (0, 3))
    assert without(alone, "peak") == without(three, "peak")
    assert [failure["client"] for failure in three[1]["failures"]] == [1, 3]
    assert three[0]["round_bytes"]["up"]["0"] == 2 * 104 + 256


def test_a_compressed_round_of_a_server_that_is_not_finite_fails_its_clients_by_name(
    tmp_path: Path,
) -> None:
    options = ("--nan", "--chunk", 4 * 64, "--values", 101, "--compression", "int8")
    alone, three = (fold(tmp_path / f"{n}.json", n, *options)["rounds"] for n in (0, 3))
    assert without(alone, "peak") == without(three, "peak")
    reasons = [[failure["reason"] for failure in seen["failures"]] for seen in three]
    assert reasons == [[], ["tensor 'prefix' is not finite"] * 5, []]


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
def test_the_merge_needs_memory_for_one_chunk_of_every_update(
    tmp_path: Path, processes: int
) -> None:
    values = 500_000
    clients = 30
    chunk = 16 << 10
    rounds = fold(
        tmp_path / "out.json", processes, "--values", values, "--clients", clients, "--chunk", chunk
    )["rounds"]
    everything = clients * 4 * values
    allowed = clients * chunk + 4 * values + 200_000  # chunks, the result, and a margin
    assert max(seen["peak"] for seen in rounds) < allowed < everything / 20


def test_the_manifest_names_every_byte(tmp_path: Path) -> None:
    clients = 5
    client_ranks = 3
    rounds = 3
    values = 1003
    runs = [fold(tmp_path / f"{n}.json", n) for n in (0, 4)]
    for run, ranks in zip(runs, (0, client_ranks)):
        book = {
            (entry["direction"], entry["phase"], entry["name"]): entry for entry in run["manifest"]
        }
        for direction, phase in (("down", "broadcast"), ("up", "gather")):
            prefix = book[direction, phase, "prefix"]
            header = book[direction, phase, "(header)"]
            assert (prefix["shape"], prefix["dtype"]) == ([500, 2], "float32")
            assert (prefix["messages"], prefix["bytes"]) == (
                clients * rounds,
                clients * rounds * 4000,
            )
            assert (header["messages"], header["bytes"]) == (
                clients * rounds,
                clients * rounds * 256,
            )
        assert book["down", "broadcast", "prefix"]["crossed"] == ranks * rounds
        # One more header says that there are no more rounds.
        assert book["down", "broadcast", "(header)"]["crossed"] == ranks * (rounds + 1)
        assert book["up", "gather", "prefix"]["crossed"] == (clients * rounds if ranks else 0)
        assert book["handout", "handout", "input"]["bytes"] == max(1, ranks) * 12
        for entry in run["rounds"]:
            for sizes in entry["round_bytes"].values():
                assert sizes == {str(client): 4 * values + 256 for client in range(clients)}
    names = {entry["name"] for entry in runs[1]["manifest"]}
    assert names == {"(header)", "(json)", "(verdict)", "(meta)", "prefix", "input"}


def test_the_server_collects_from_everybody(tmp_path: Path) -> None:
    assert fold(tmp_path / "out.json", 4)["hosts"] == [
        {"rank": rank, "name": "Jürgen"} for rank in range(4)
    ]


def test_the_real_topology() -> None:
    code = (
        "from fedsp_mpi.comm import connect; w = connect(); t = w.topology;"
        "import sys; numbers = (t.rank, t.size, t.local_rank, t.local_size, t.is_server, t.solo);"
        "sys.stdout.write(' '.join(map(str, numbers)) + '\\n'); w.finish()"
    )
    seen = run_mpi(3, ["-c", code]).stdout
    assert all(
        line in seen
        for line in ("0 3 0 3 True False", "1 3 1 3 False False", "2 3 2 3 False False")
    )
    assert run_mpi(1, ["-c", code]).stdout.strip() == "0 1 0 1 True True"


@pytest.mark.parametrize(
    ("case", "who", "message"),
    [
        ("up", "rank 1", "update of client 0: found tensor 'wte.weight' [3], expected 'input' [3]"),
        ("metric", "rank 1", "found metrics ['secret'], expected some of []"),
        (
            "down",
            "rank 0",
            "broadcast of round 0: found tensor 'wte.weight' [3], expected 'input' [3]",
        ),
        (
            "sealed",
            "rank 0",
            "is the memory of 'transformer.wte' of the global model, which never leaves the server",
        ),
        ("unseen", "rank 0", "update of client 0 from rank 1: found [round, values, schema]"),
    ],
)
def test_what_must_not_travel_is_refused(case: str, who: str, message: str) -> None:
    run = run_mpi(2, [PROGRAMS / "refuse.py", case], timeout=30, status=None)
    assert run.returncode != 0 and only_report(run).startswith(f"refuse failed: {who} of 2")
    assert message in run.stderr, both_ends(run)


def test_a_client_that_answers_on_two_ranks_is_refused() -> None:
    run = run_mpi(3, [PROGRAMS / "refuse.py", "twice"], timeout=30, status=None)
    assert run.returncode != 0 and "found two results of client 0 in one round" in run.stderr


def test_a_verdict_is_no_crash() -> None:
    run = run_mpi(3, [PROGRAMS / "refuse.py", "verdict"], timeout=30, status=2)
    assert run.stderr.count("there is no such data set") == 1 and "Traceback" not in run.stderr


def test_the_bench_measures_and_waiting_is_cheap(tmp_path: Path) -> None:
    run_mpi(3, [PROGRAMS / "bench.py", tmp_path / "out.json", "200000", "3"])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ranks"] == 3 and figures["ratio"] > 0
    assert figures["ratio"] == pytest.approx(figures["wire_seconds"] / figures["bare_seconds"])
    assert figures["sealed_seconds"] > 0
    assert figures["waiting_cores"] < 0.5  # of a core: a blocking call takes all of it
    assert {"broadcast_slowdown", "gather_slowdown"} <= figures.keys()
