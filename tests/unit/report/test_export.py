"""Records as CSV and JSON for other programs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsp_mpi.cli import main
from fedsp_mpi.record import ClientRow, Run, read
from fedsp_mpi.record.tables import TABLES, table
from fedsp_mpi.report import as_json, write_csv
from helpers.big_run import big_run
from helpers.record_samples import make, results

QUESTION = "Who owns this text?"  # of the server's test split, in the record


@pytest.fixture
def run(tmp_path: Path) -> Run:
    record = make(tmp_path / "run")
    record.write_results(results(0.7))
    record.describe(plain_use={"question": {"text": QUESTION}})
    record.finish()
    return read(tmp_path / "run")


def test_tables_come_back_from_csv_bit_by_bit(run: Run, tmp_path: Path) -> None:
    assert main(["report", str(run.file.parent), "--csv", str(tmp_path / "tables")]) == 0
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "clients.csv",
        "results.csv",
        "rounds.csv",
        "wire.csv",
    ]
    for name in ("clients", "results", "rounds", "wire"):
        stored = getattr(run, name)
        frame = pd.read_csv(tmp_path / "tables" / f"{name}.csv", keep_default_na=False)
        assert tuple(frame.columns) == stored.dtype.names
        for column in stored.dtype.names if len(stored) else ():
            if stored.dtype[column].kind in "if":
                np.testing.assert_array_equal(
                    pd.to_numeric(frame[column]).astype(stored.dtype[column]), stored[column]
                )
            else:
                assert frame[column].tolist() == stored[column].tolist()


def test_texts_from_outside_are_no_formulas_and_end_no_row(tmp_path: Path) -> None:
    reasons = ["=HYPERLINK(1)", 'a "b",\nc', "@x", "-1"]
    rows = [
        ClientRow(round=1, client=i, rank=1, reason=reason, loss_prompt_last=-0.5)
        for i, reason in enumerate(reasons)
    ]
    write_csv(replace(big_run(), clients=table(ClientRow, rows)), tmp_path / "tables")
    with (tmp_path / "tables" / "clients.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["reason"] for row in written] == ["'=HYPERLINK(1)", reasons[1], "'@x", "'-1"]
    assert {row["loss_prompt_last"] for row in written} == {"-0.5"}
    assert {row["fitness"] for row in written} == {""}
    assert (tmp_path / "tables" / "silos.csv").exists()


def test_csv_leaves_files_of_somebody_else(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tables"
    write_csv(run, folder)
    write_csv(run, folder)
    (folder / "wire.csv").write_text("my,own\n1,2\n")
    before = (folder / "rounds.csv").read_bytes()
    (folder / "rounds.csv").write_bytes(before[:60])
    assert main(["report", str(run.file.parent), "--csv", str(folder)]) == 2
    assert "wire.csv: found a file that no report wrote" in capsys.readouterr().err
    assert (folder / "wire.csv").read_text() == "my,own\n1,2\n"
    assert (folder / "rounds.csv").read_bytes() == before[:60], "all or nothing"


def test_json_is_one_document_without_nan(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run.file.parent)
    assert main(["report", folder, "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = capsys.readouterr().out
    assert QUESTION not in printed, "an export is for others, who do not own the text"
    document = json.loads(printed, parse_constant=refuse)
    [content] = document["runs"]
    assert (content["name"], content["status"], content["committed_rounds"]) == (
        "run",
        "complete",
        3,
    )
    assert content["rounds"][1] | {"round": 2, "validation_loss": 1.0} == content["rounds"][1]
    assert content["rounds"][1]["server_loss_last"] is None
    assert content["results"][2]["acc"] == 0.7 and content["config"] == run.config
    assert set(TABLES) <= content.keys()

    path = tmp_path / "runs.json"
    assert main(["report", folder, "--json", str(path)]) == 0
    assert main(["report", folder, "--json", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(path.read_text()) == document
    path.write_text('{"mine": 1}')
    assert main(["report", folder, "--json", str(path)]) == 2
    assert json.loads(path.read_text()) == {"mine": 1}


def test_json_of_several_runs_with_names_of_any_kind() -> None:
    odd = replace(big_run(), sections={"a": {"b": [float("nan"), float("inf"), None, True]}})
    document = json.loads(as_json([odd, odd]))
    assert len(document["runs"]) == 2
    assert document["runs"][0]["sections"] == {"a": {"b": [None, None, None, True]}}
