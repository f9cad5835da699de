"""Perplexity in comparisons, where lower is better, and the table and picture of phases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi import cli
from fedsp_mpi.commands.sweep import _score
from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, Run, RunRecord
from fedsp_mpi.report import (
    compare,
    comparison_table,
    draw_bars,
    gain_table,
    markdown,
    phases_table,
    summarize,
)

NAN = float("nan")


def made(
    folder: Path,
    task: str,
    label: str,
    seed: int,
    *,
    scores: dict[str, float],
    is_perplexity: bool = False,
    clients: int = 2,
    after: Run | None = None,
    **config: object,
) -> Run:
    """Make a complete record: scores by method, and where it comes from."""
    record = RunRecord.create(
        folder / f"{task}-{label}-{seed}",
        config={
            "run": {"seed": seed, "label": label, "task_label": task},
            "method": "pretrain" if is_perplexity else "finetune",
            "model": {"name": "tiny", "weights": "random" if after is None else "pretrained"},
            "data": {"task": "plain_text" if is_perplexity else "sst2"},
            "federation": {"clients": clients},
            **config,
        },
        config_text="",
        environment={"host": "node01"},
    )
    for round in (1, 2):
        rows = [ClientRow(round=round, client=id, rank=0, samples=24) for id in range(clients)]
        traffic = 1000 * clients
        row = RoundRow(
            round=round, num_clients=clients, bytes_down=traffic, bytes_up=traffic, is_best=True
        )
        record.commit_round(row, rows)
    if after is not None:
        earlier = {
            "run": after.name,
            "folder": str(after.folder),
            "method": after.config["method"],
            "round": 2,
            "rounds": 2,
            "weights": {"model.safetensors": after.name},
        }
        runs = [earlier, *after.sections.get("origin", {}).get("runs", [])]
        record.describe(origin={"runs": runs, "initial": "random"})
    record.write_results(
        ResultRow(
            method=method,
            split="test",
            n=400,
            acc=NAN if is_perplexity else value,
            perplexity=value if is_perplexity else NAN,
            loss=1.0,
        )
        for method, value in scores.items()
    )
    record.finish()
    return record.run


def text_runs(folder: Path, *, seeds: tuple[int, ...] = (1, 2, 3)) -> list[Run]:
    """Make runs of plain text: "good" is better than its control by about 8, "bad" is worse."""
    runs = []
    for seed in seeds:
        for label, value in (("good", 52.0), ("same", 60.0), ("bad", 68.0)):
            noise = 0.3 * seed * (-1) ** seed if label == "same" else 0.1 * seed
            scores = {"zero-shot": 300.0, "server-only": 60.0, label: value + noise}
            runs.append(made(folder, "wiki", label, seed, scores=scores, is_perplexity=True))
    return runs


def cells(table: str, first: str) -> list[str]:
    """The cells of the row that begins with a text."""
    [line] = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_comparison_shows_perplexities_and_marks_what_is_no_difference(tmp_path):
    comparison = compare(text_runs(tmp_path))
    table = comparison_table(comparison)
    assert "wiki (perplexity)" in table and "lower is better" in table and "400 tokens" in table
    shown = {label: cells(table, label)[1] for label in ("good", "same", "bad", "server-only")}
    assert shown["good"] == "52.20 ± 0.10" and shown["server-only"] == "60.00 ± 0.00"
    assert shown["same"].endswith(" ~") and not shown["bad"].endswith("~")
    gains = gain_table(comparison)
    assert gains is not None and "of perplexity, by how much it is lower" in gains
    assert cells(gains, "good")[1] == "+7.80 ± 0.06" and cells(gains, "bad")[1] == "-8.20 ± 0.06"
    low, high = comparison.gain_interval(comparison.methods[2], "wiki")
    assert 7 < low < 7.8 < high < 8.6  # t with two degrees of freedom, by hand: 7.8 +- 0.248
    assert high - low == pytest.approx(2 * 4.3027 * 0.1 / np.sqrt(3), rel=1e-3)


def test_a_single_seed_of_perplexity_has_no_interval(tmp_path):
    comparison = compare(text_runs(tmp_path, seeds=(1,)))
    assert cells(comparison_table(comparison), "same")[1] == "59.70"
    assert cells(str(gain_table(comparison)), "same")[1] == "+0.30"


def test_sweep_summary_and_markdown_say_perplexities(tmp_path):
    runs = text_runs(tmp_path)
    assert _score(runs[0]) == "perplexity 52.10"
    assert "good against server-only (test): perplexity lower by 7.90" in summarize(runs[0])
    assert "bad against server-only (test): perplexity higher by 8.10" in summarize(runs[2])
    lines = markdown(runs)
    assert "| perplexity |" in lines and "+7.80 ± 0.10" in lines
    assert "perplexity" not in markdown([made(tmp_path, "a", "b", 1, scores={"b": 0.5})])


def walk(folder: Path, *, seeds: tuple[int, ...] = (1,)) -> list[Run]:
    """Make two phases, federated and centralised."""
    runs = []
    for seed in seeds:
        for label, perplexity, accuracy in (("federated", 90.0, 0.7), ("centralised", 80.0, 0.75)):
            clients = 2 if label == "federated" else 0
            tuning = {"steps": 12, "batch_size": 4}
            first = made(
                folder,
                "wiki",
                label,
                seed,
                scores={"zero-shot": 2048.0, label: perplexity + seed},
                is_perplexity=True,
                clients=clients,
                server={"tuning": tuning if not clients else {"steps": 0}},
            )
            scores = {"zero-shot": 0.5 if clients else 0.55, label: accuracy}
            later = made(folder, "task", label, seed, scores=scores, after=first, clients=clients)
            runs += [first, later]
    return runs


def test_a_table_of_phases_has_them_in_their_order_beside_their_twins(tmp_path):
    runs = walk(tmp_path)
    table = phases_table(compare([*runs[2:], *runs[:2]]))
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    by_phase = {(row[0], row[1]): row[2:] for row in body}
    assert [row[0] for row in body] == ["wiki", "wiki", "task", "task"]
    assert by_phase["wiki", "federated"] == [
        *("random weights", "perplexity", "2048.00", "91.00", "96", "8 kB")
    ]
    assert by_phase["wiki", "centralised"][-2:] == ["96", ""]  # the same number of examples
    start, measure, before, after, *_ = by_phase["task", "federated"]
    assert (start, measure) == ("wiki (federated)", "acc")
    assert before.startswith("50.00 [45.1, 54.9]") and after.startswith("70.00 [65.")


def test_each_way_has_the_zero_shot_of_its_own_start(tmp_path):
    runs = walk(tmp_path, seeds=(1, 2))
    table = comparison_table(compare(runs))
    assert cells(table, "zero-shot (of federated)")[1:3] == ["2048.00 ± 0.00", "50.00 ± 0.00"]
    assert cells(table, "zero-shot (of centralised)")[1:3] == ["2048.00 ± 0.00", "55.00 ± 0.00"]
    assert "differ in" not in table


def test_a_summary_says_where_the_model_comes_from(tmp_path):
    _, later, *_ = walk(tmp_path)
    words = "from wiki-federated-1 (pretrain, round 2 of 2), first random weights of tiny"
    assert f"starts    {words}" in summarize(later)


def test_the_command_line_shows_and_draws_phases(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    walk(tmp_path / "runs", seeds=(1, 2))
    picture = tmp_path / "phases.svg"
    words = ["report", str(tmp_path / "runs"), "--table", "phases", "--picture", str(picture)]
    assert cli.main(words) == 0
    assert "| phase | method | starts from |" in capsys.readouterr().out
    text = picture.read_text()
    assert "wiki, perplexity (lower is better)" in text and "centralised" in text
    draw_bars(compare(text_runs(tmp_path / "text")), tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text()
    assert drawn.index(">good<") < drawn.index(">server-only<") < drawn.index(">bad<")
