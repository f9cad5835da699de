"""Pseudo-labels by round, and scores by the number of labels: tables and picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedsp_mpi import cli
from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, Run, RunRecord, read
from fedsp_mpi.report import draw_labels, summarize
from fedsp_mpi.report.pseudo_labels import by_round
from helpers import pictures

# By round and client: pseudo-labels, the share of them that is right, texts that were read.
ROUNDS = (((30, 0.5, 90), (0, math.nan, 0)), ((10, 1.0, 0), (30, 0.8, 60)))


def made(
    folder: Path,
    name: str,
    acc: float,
    *,
    labels: int | None = 64,
    gamma: float = 0.01,
    label: str = "AUG",
    seed: int = 1,
    task: str = "ag_news",
) -> Run:
    """Make a record of two rounds of two clients, and a score."""
    data = {"task": task, "labels": labels, "label_spread": gamma}
    settings = {"run": {"seed": seed, "label": label}, "data": data}
    record = RunRecord.create(folder / name, config=settings, config_text="", environment={})
    for number, clients in enumerate(ROUNDS, 1):
        rows = [
            ClientRow(
                round=number,
                client=client,
                rank=0,
                samples=pseudo + 2,
                extra={
                    "pseudo_labels": pseudo,
                    "pseudo_precision": right,
                    "texts_scored": texts,
                    "seconds_labels": 0.5 if texts else 0.0,
                },
            )
            for client, (pseudo, right, texts) in enumerate(clients)
        ]
        record.commit_round(RoundRow(round=number), rows, None)
    record.write_results([ResultRow(method=label, split="test", round=2, n=400, acc=acc)])
    return read(folder / name)


def test_a_row_for_each_round_with_the_precision_of_all_pseudo_labels(tmp_path):
    run = made(tmp_path, "a", 0.7)
    first, second = by_round(run)
    assert (first.num_labelling, first.texts, first.examples, first.pseudo) == (1, 90, 34, 30)
    assert (first.precision, second.precision) == (0.5, pytest.approx((10 + 24) / 40))
    assert "    2         1     60      0.50          44      40        85.00" in summarize(run)


def test_scores_by_labels_and_all_labels_across(tmp_path):
    runs = [
        made(tmp_path, "a1", 0.6, labels=16),
        made(tmp_path, "a2", 0.7, labels=16, seed=2),
        made(tmp_path, "b1", 0.8, labels=64),
        made(tmp_path, "c1", 0.5, labels=16, gamma=100),
        made(tmp_path, "d1", 0.9, labels=None, label="FedPrompt"),
    ]
    scores, precision = pictures.panels(lambda path: draw_labels(runs, path))
    lines = {line.get_label(): line for line in scores.lines if line.get_label()[0] != "_"}
    [skewed, even] = [container.lines[0] for container in scores.containers]
    assert list(skewed.get_xdata()) == [16, 64]
    assert list(skewed.get_ydata()) == pytest.approx([65, 80])
    assert list(even.get_ydata()) == pytest.approx([50])
    assert list(lines["FedPrompt, all labels"].get_ydata()) == pytest.approx([90, 90])
    assert [container.get_label() for container in scores.containers] == [
        "AUG, gamma 0.01",
        "AUG, gamma 100",
    ]
    assert list(precision.lines[0].get_ydata()) == pytest.approx([50, 85])
    assert [text.get_text() for text in precision.texts] == ["16", "64", "16"]


def test_a_method_has_one_look_in_the_panels_of_all_tasks(tmp_path):
    runs = [
        made(tmp_path, "a", 0.6, gamma=0.01),
        made(tmp_path, "b", 0.6, gamma=100),
        made(tmp_path, "c", 0.6, gamma=100, task="sst2"),
    ]
    first, _, second, _ = pictures.panels(lambda path: draw_labels(runs, path))
    colours = [[c.lines[0].get_color() for c in panel.containers] for panel in (first, second)]
    assert colours[0][0] != colours[0][1] and colours[1] == colours[0][1:]


@pytest.mark.parametrize("labels", [64, None])
def test_two_runs_of_one_seed_are_no_two_seeds(tmp_path, labels):
    runs = [made(tmp_path, name, 0.6, labels=labels) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"found two runs of AUG .* seed 1 .*, expected one"):
        draw_labels([made(tmp_path, "c", 0.5, label="x"), *runs], tmp_path / "labels.png")


def test_the_command_line_draws_it_and_says_what_is_missing(tmp_path, capsys):
    made(tmp_path, "a", 0.7)
    picture = tmp_path / "labels.svg"
    assert cli.main(["report", str(tmp_path / "a"), "--labels", str(picture)]) == 0
    assert "labels of all clients together" in pictures.texts(picture)
    assert capsys.readouterr().out == ""
    made(tmp_path, "d", 0.7, labels=None)
    assert cli.main(["report", str(tmp_path / "d"), "--labels", str(picture)]) == 2
    assert "expected a run with data.labels" in capsys.readouterr().err
