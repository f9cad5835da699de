"""What silos have scored on their own text: the table, and the picture by round."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsp_mpi import cli
from fedsp_mpi.record import RoundRow, Run, RunRecord, read
from fedsp_mpi.record.tables import SiloRow
from fedsp_mpi.report import draw_silos, summarize
from helpers import pictures

NAMES = ("north", "a ward of a very long name, third floor", "a$b$")
LONG = "a ward of a very long name,..."
SIZES = (30, 10, 10)
# Of each silo by round; the second is not there in the second round, the third has none in the
# third.
LOSSES = ((3.0, 2.5, 2.0), (4.0, None, 3.5), (2.0, 1.5, float("nan")))


def made(folder: Path, rounds: int = 3, name: str = "run") -> Run:
    """Make a record with the scores of three silos."""
    record = RunRecord.create(
        folder / name, config={"run": {"seed": 1}}, config_text="", environment={}
    )
    record.describe(silos={"names": list(NAMES)})
    for number in range(1, rounds + 1):
        rows = [
            SiloRow(round=number, silo=silo, n=SIZES[silo], loss=loss, acc=0.5)
            for silo, losses in enumerate(LOSSES)
            if (loss := losses[number - 1]) is not None
        ]
        record.commit_round(RoundRow(round=number), [], None, silos=rows)
    return read(folder / name)


def unscored(folder: Path) -> Run:
    """Make a record of a run whose server alone judges."""
    record = RunRecord.create(folder / "plain", config={}, config_text="", environment={})
    record.commit_round(RoundRow(round=1), [], None)
    return read(folder / "plain")


def points(line) -> list[tuple[float, float]]:
    return [(x, pytest.approx(y)) for x, y in zip(line.get_xdata(), line.get_ydata())]


def test_a_line_for_each_silo_the_worst_named_and_the_mean_bold(tmp_path):
    run = made(tmp_path)
    [panel] = pictures.panels(lambda path: draw_silos([run], path))
    *each, worst, mean = panel.lines
    assert [points(line) for line in each] == [
        [(1, 3.0), (2, 2.5), (3, 2.0)],
        [(1, 4.0), (3, 3.5)],
        [(1, 2.0), (2, 1.5)],
    ]
    assert points(worst) == points(each[1])
    assert points(mean) == [(1, 3.0), (2, 2.25), (3, 2.375)]  # by 30, 10 and 10 examples
    widths = [line.get_linewidth() for line in (each[0], worst, mean)]
    assert widths == sorted(widths) and len({line.get_color() for line in each}) == 1
    [label] = panel.texts
    assert label.get_text() == LONG and label.xy == (3, 3.5)
    assert panel.get_title("left") == "run" and panel.get_xlabel() == "round"


def test_a_single_round_is_seen(tmp_path):
    run = made(tmp_path, 1)
    [panel] = pictures.panels(lambda path: draw_silos([run], path))
    assert {line.get_marker() for line in panel.lines} == {"o"}


def test_runs_without_scores_have_no_panel_and_none_at_all_is_a_message(tmp_path):
    runs = [made(tmp_path), unscored(tmp_path), made(tmp_path, name="a$b$")]
    axes = pictures.panels(lambda path: draw_silos(runs, path))
    assert [panel.get_title("left") for panel in axes] == ["run", "a$b$"]
    with pytest.raises(ValueError, match=r"found no scores of silos.*evaluation\.at=silos"):
        draw_silos([runs[1]], tmp_path / "x.png")


def test_the_command_draws_and_says_what_is_missing(tmp_path, capsys):
    made(tmp_path)
    assert cli.main(["report", str(tmp_path / "run"), "--silos", str(tmp_path / "x.svg")]) == 0
    assert capsys.readouterr().out == ""
    texts = pictures.texts(tmp_path / "x.svg")
    assert {"each silo", "mean by examples", "highest loss in the last round"} <= set(texts)
    unscored(tmp_path)
    assert cli.main(["report", str(tmp_path / "plain"), "--silos", str(tmp_path / "y.png")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found no scores of silos" in line
    assert not (tmp_path / "y.png").exists()


def test_the_table_has_mean_worst_and_spread_by_round(tmp_path):
    lines = summarize(made(tmp_path)).splitlines()
    [head] = [index for index, line in enumerate(lines) if line.endswith("worst silo")]
    cells = [line.split(maxsplit=7) for line in lines[head + 2 : head + 5]]
    assert [row[:5] for row in cells] == [
        ["1", "3", "3.0000", "4.0000", "0.8165"],
        ["2", "2", "2.2500", "2.5000", "0.5000"],
        ["3", "2", "2.3750", "3.5000", "0.7500"],
    ]
    assert [row[7] for row in cells] == [LONG, NAMES[0], LONG]
