"""A client rank that breaks the protocol, under a real mpirun: never averaged, always named."""

from __future__ import annotations

import json
import time

import pytest

from helpers.mpi import both_ends, only_report, run_mpi
from helpers.paths import PROGRAMS

DROPPED = {  # why client 2 is left out
    "nan": "check: the update is not finite",
    "infinite": "check: the update is not finite",
    "huge": "check: the update has a value of 1e+30, expected at most 1e+06",
    "heavy": "check: weight is 1e+06, expected at most 16 samples",
    "astronomic": "check: weight is 1e+30, expected at most 16 samples",
    "negative": "check: weight is -1, expected a finite number of samples",
    "weight_nan": "check: weight is nan, expected a finite number of samples",
    "metric_nan": "check: metric fitness is nan, expected a finite number",
    "metric_missing": "check: found no metric fitness, expected one",
    "failure": "local\\x1b[2J: gone\\x07",
}
ALL_DROPPED = {  # why clients 2 and 3 are
    "short": "check: rank 2 sent 76 bytes for clients 2, 3, expected 96",
    "long": "check: rank 2 sent 192 bytes for clients 2, 3, expected 96",
    "silent": "gather: rank 2 sent no answer",
}
SCALE = "check: the update cannot be decoded: found {} as a scale, expected a finite number from 0"
COMPRESSED = {  # of a compressed exchange
    "int8_nan": SCALE.format("nan"),
    "int8_infinite": SCALE.format("inf"),
    "int8_negative": SCALE.format("-1"),
    "int8_huge": "check: the update cannot be decoded: found a scale too large for its codes, "
    "expected finite numbers",
    "int8_code": "check: the update cannot be decoded: found a code below -127, expected none",
}
ENDS = {  # what the job ends with
    "foreign": (
        "update of client 0 from rank 2: found a client that this rank does not host in round 1"
    ),
    "duplicate": "update of client 2 from rank 2: found two results, expected one",
    "wrong_round": "update of client 2 from rank 2: found [round, values, schema] [2, 20,",
    "crafted": (
        "update of client 2 from rank 2: found [round, values, schema] [1, 9223372036854775808,"
    ),
    "asks": "update of client 2 from rank 2: found 4294967295 requests, expected none",
    "torn": (
        "rank 2: found a message of results that cannot be read (ValueError: rank 2: "
        "found 249 bytes"
    ),
    "noise": "rank 2: found a message of results that cannot be read",
    "long_message": "rank 2: found a message of 1048576 bytes in gather, expected at most 8704",
    "late_nan": (
        "update of client 2 from rank 2 in round 1: values 12 to 20: the update is not finite"
    ),
    "int8_late_nan": (
        "update of client 2 from rank 2 in round 1: values 8 to 16: the update cannot be decoded: "
        "found nan as a scale"
    ),
    "json_list": (
        "rank 2: found a JSON message that cannot be read (ValueError: a list, expected a mapping)"
    ),
    "json_deep": "rank 2: found a JSON message that cannot be read (RecursionError",
    "json_not_utf8": "rank 2: found a JSON message that cannot be read (UnicodeDecodeError",
    "json_cut": "rank 2: found a JSON message that cannot be read (JSONDecodeError",
    "json_large": "rank 2: found a message of 68157696 bytes in gather, expected at most 67108864",
}
NOT_SEALED = "found bytes that its key did not seal: they were changed, or the key is another"
SEALED = {  # why clients are left out, where somebody changes sealed chunks on their way
    "sealed_flip": {"2": NOT_SEALED},
    "sealed_tag_flip": {"2": NOT_SEALED},
    "sealed_round_flip": {"2": "found round 5 on the envelope, expected 4"},
    "sealed_replay": dict.fromkeys(
        "23", "found message 11, expected 14: one was repeated, left out or moved"
    ),
    "sealed_swap": {
        "2": "found sender 3 on the envelope, expected 2",
        "3": "found sender 2 on the envelope, expected 3",
    },
    "sealed_not": {"2": "found a message that is not sealed, expected a sealed one"},
}
SEALED_ENDS = {  # what the job ends with
    "sealed_header_flip": (
        f"update of client 2 from rank 2 in round 1: its header cannot be opened: {NOT_SEALED}"
    ),
    "sealed_header_replay": (
        "update of client 2 from rank 2 in round 1: its header cannot be opened: found message 1, "
        "expected 2: one was repeated, left out or moved"
    ),
    "sealed_late_flip": (
        "update of client 2 from rank 2 in round 1: values 12 to 20: the update cannot be opened: "
        f"{NOT_SEALED}"
    ),
    "sealed_json_flip": f"its message cannot be opened: {NOT_SEALED}",
    "sealed_json_replay": "its message cannot be opened: found message 3, expected 4: one was rep",
    "sealed_wrong_key": f"its message cannot be opened: {NOT_SEALED}",
    "sealed_wrong_client_key": ("client 2 on rank 2: it has not the key that it has sent, "),
    "sealed_changed_key": " as the key of client 3 in what the server has sent, expected ",
    "sealed_foreign_key": "rank 2: found keys of other clients than it plays, expected one for",
}
SEALED_ENDS_FAST = ("sealed_header_flip", "sealed_json_flip", "sealed_wrong_client_key")
SILENT = ("mute", "no_chunks")  # nothing comes: the deadline says from whom


def test_what_a_client_cannot_have_sent_is_left_out_by_name(tmp_path):
    ways = [*DROPPED, *ALL_DROPPED, "honest"]
    run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", *ways])
    rounds = json.loads((tmp_path / "out.json").read_text())
    assert [outcome["way"] for outcome in rounds] == ways
    for outcome in rounds:
        way = outcome["way"]
        reasons = {}
        if way in DROPPED:
            reasons = {"2": DROPPED[way]}
        elif way in ALL_DROPPED:
            reasons = dict.fromkeys("23", ALL_DROPPED[way])
        accepted = [client for client in range(4) if str(client) not in reasons]
        assert outcome["failures"] == reasons, way
        assert outcome["accepted"] == accepted, way
        for start, width in ((0, 12), (12, 8)):
            rows = [[1.0 + client] * width for client in accepted]
            if way == "honest" and start == 0:
                rows[2][3] = 3.0
            assert outcome["rows"][str(start)] == rows, way


def test_bytes_that_no_encoder_writes_are_left_out_by_name(tmp_path):
    ways = [*COMPRESSED, "int8_short", "int8_honest"]
    run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", *ways])
    rounds = json.loads((tmp_path / "out.json").read_text())
    short = "check: rank 2 sent 23 bytes for clients 2, 3, expected 24"
    for outcome in rounds:
        way = outcome["way"]
        reasons = {"2": COMPRESSED[way]} if way in COMPRESSED else {}
        if way == "int8_short":
            reasons = dict.fromkeys("23", short)
        assert outcome["failures"] == reasons, way
    assert rounds[-1]["accepted"] == [0, 1, 2, 3]
    # A change of 1 + the client's id against the broadcast, which is 0.
    assert rounds[-1]["rows"]["16"] == [[1.0 + client] * 4 for client in range(4)]


def test_sealed_chunks_that_were_changed_on_their_way_are_left_out_by_name(tmp_path):
    ways = ["sealed_honest", *SEALED, "sealed_short", "sealed_honest"]
    run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", *ways])
    rounds = json.loads((tmp_path / "out.json").read_text())
    short = "check: rank 2 sent 222 bytes for clients 2, 3, expected 224"
    for outcome in rounds:
        way = outcome["way"]
        opened = "check: the update cannot be opened: "
        reasons = {client: opened + reason for client, reason in SEALED.get(way, {}).items()}
        if way == "sealed_short":
            reasons = dict.fromkeys("23", short)
        assert outcome["failures"] == reasons, way
        accepted = [client for client in range(4) if str(client) not in reasons]
        assert outcome["accepted"] == accepted, way
        for start, width in ((0, 12), (12, 8)):
            assert outcome["rows"][str(start)] == [[1.0 + c] * width for c in accepted], way


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[] if way in SEALED_ENDS_FAST else pytest.mark.slow)
        for way in SEALED_ENDS
    ],
)
def test_a_wrong_key_and_a_changed_header_end_the_job_and_name_whose_it_is(tmp_path, way):
    result = run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", way], status=None)
    assert result.returncode not in (0, 2), both_ends(result)
    only_report(result)
    assert SEALED_ENDS[way] in result.stderr, both_ends(result)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("way", ENDS)
def test_what_breaks_the_protocol_ends_the_job_and_names_the_rank(tmp_path, way):
    start = time.monotonic()
    result = run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", way], status=None)
    assert result.returncode not in (0, 2) and time.monotonic() - start < 15, both_ends(result)
    assert "rank 0" in only_report(result) and ENDS[way] in result.stderr, both_ends(result)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("way", SILENT)
def test_a_rank_that_sends_nothing_is_named_by_the_deadline(tmp_path, way):
    start = time.monotonic()
    result = run_mpi(3, [PROGRAMS / "hostile.py", tmp_path / "out.json", way], status=None)
    assert result.returncode == 124 and time.monotonic() - start < 15, both_ends(result)
    assert "gather: found nothing from rank 2 after 3." in result.stderr, both_ends(result)
