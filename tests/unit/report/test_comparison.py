"""Compare methods, from made-up records: the table, what is said below it, and pictures."""

from __future__ import annotations

import builtins
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsp_mpi import cli
from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, Run, RunRecord, read
from fedsp_mpi.report import (
    compare,
    comparison_table,
    draw_bars,
    draw_curves,
    gain_table,
    main_result,
    markdown,
    read_all,
)
from helpers import pictures

ROUNDS = 4
OWN = 1000  # bytes of a client and round, each way


def made(
    folder: Path,
    label: str = "FedSP",
    task: str = "sciq",
    seed: int = 1,
    score: float = 0.7,
    control: float | None = 0.6,
    n: int = 400,
    clients: int = 2,
    wire: int = OWN,
    slope: float = 0.1,
    status: str = "complete",
    **config: Any,
) -> Run:
    """Make a record with zero-shot 0.5, a score of its method and, unless None, a control."""
    record = RunRecord.create(
        folder / f"{task}-{label}-{seed}".replace(" ", "_"),
        config={
            "run": {"seed": seed, "label": label},
            "method": "fedsp",
            "model": {"name": "some/tiny"},
            "data": {"task": task},
            "client": {"training": "alternating", "alignment": {"steps": 4}},
            **config,
        },
        config_text="",
        environment={
            "hosts": [{"host": "node01", "device": "cpu"}] * 3,
            "machine": "x86_64, 2 cores",
        },
    )
    record.describe(models={"global": 9000, "auxiliary": 3000, "prompt_on_the_wire": 500})
    for round in range(1, ROUNDS + 1):
        client_rows = [
            ClientRow(
                round=round,
                client=id,
                rank=1,
                seconds_model=0.5,
                seconds_prompt=1.0,
                bytes_down=wire,
            )
            for id in range(clients)
        ]
        row = RoundRow(
            round=round,
            num_clients=clients,
            bytes_down=wire * clients,
            bytes_up=wire * clients,
            validation_loss=3 - slope * round + 0.02 * seed,
            control_validation_loss=float("nan") if control is None else 4 - control - 0.05 * round,
        )
        record.commit_round(row, client_rows)
    scores = (
        {"zero-shot": 0.5} | ({} if control is None else {"server-only": control}) | {label: score}
    )
    record.write_results(
        ResultRow(method=m, split="test", n=n, acc=a, loss=2 - a) for m, a in scores.items()
    )
    record.finish(status)
    return record.run


def grid(
    folder: Path,
    labels: Sequence[str],
    tasks: Sequence[str] = ("sciq",),
    seeds: Sequence[int] = (1, 2),
):
    """Make a run of each label, task and seed; scores rise with all of them."""
    return [
        made(folder, label, task, seed, score=0.6 + 0.02 * i + 0.01 * seed, slope=0.05 * (i + 1))
        for seed in seeds
        for task in tasks
        for i, label in enumerate(labels)
    ]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a Markdown table by method."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in (cells[0], *cells[2:])}


def test_what_clients_bring_is_told_beside_what_all_text_in_one_place_would(tmp_path):
    """Gains of 6, 10 and 5 points: 7 ± 1.53. The gap is 20 with each seed."""
    scores = {1: (0.60, 0.66, 0.80), 2: (0.62, 0.72, 0.82), 3: (0.60, 0.65, 0.80)}
    runs = [
        made(tmp_path, "FedSP", seed=seed, score=score, control=control)
        for seed, (control, score, _) in scores.items()
    ]
    centralised = {"federation": {"clients": 0}, "clients": 0, "control": None}
    runs += [
        made(tmp_path, "All", seed=seed, score=top, **centralised)
        for seed, (*_, top) in scores.items()
    ]
    for shown in (runs[:3], runs[:5]):  # without all seeds of the other, nothing is said of it
        assert rows(gain_table(compare(shown))) == {"gain": ["sciq"], "FedSP": ["+7.00 ± 1.53"]}
    assert rows(gain_table(compare(runs))) == {"gain": ["sciq"], "FedSP": ["+7.00 ± 1.53 (35%)"]}
    assert "the gap between it and All" in gain_table(compare(runs))
    assert gain_table(compare(runs[3:])) is None
    few = made(
        tmp_path,
        "Few",
        score=0.9,
        control=None,
        federation={"clients": 0},
        clients=0,
        data={"task": "sciq", "server_share": 16},
    )
    assert "and Few" not in gain_table(compare([*runs[:3], few]))


def warnings(text: str) -> list[str]:
    return [line.removeprefix("- **Warning:** ") for line in text.splitlines() if "Warning" in line]


def named(run: Run, task: str | None) -> Run:
    """Return a run whose task has this name in tables."""
    return replace(run, config={**run.config, "run": {**run.config["run"], "task_label": task}})


def test_tables_show_the_names_that_a_sweep_gave_to_its_tasks(tmp_path):
    """Two tasks on the user's own data are one kind of task from two folders; to the user they are
    trec and piqa.
    """
    runs = [
        named(
            made(
                tmp_path / task,
                label,
                seed=seed,
                score=score,
                data={"task": "multiple_choice", "source": folder},
            ),
            task if seed == 1 else None,  # an earlier version of the package has begun this sweep
        )
        for folder, task in (("/d/a", "trec"), ("/d/b", "piqa"))
        for label, score in (("FedSP", 0.7), ("FedPrompt", 0.8))
        for seed in (1, 2)
    ]
    text = comparison_table(compare(runs))
    assert rows(text)["method"][:2] == ["trec (acc)", "piqa (acc)"] and "/d/" not in text
    assert all(
        f"{name} = " in text for name in ("holds, trains", "down + up", "client s", "peak memory")
    )
    first = [run for run in runs if run.config["run"]["task_label"]]
    named_rows = {line.split(" | ")[0] for line in markdown(first).splitlines()[2:]}
    assert named_rows == {"| trec", "| piqa"}  # what sets methods apart is in the next column
    alone = [run for run in first if run.config["run"]["label"] == "FedSP"]
    assert {line.split(" | ")[0] for line in markdown(alone).splitlines()[2:]} == {
        "| trec, FedSP",
        "| piqa, FedSP",
    }
    assert "95 % interval" not in str(gain_table(compare(runs)))
    assert "95 % interval" in str(gain_table(compare(first)))  # one seed has no spread
    alike = [named(run, "mine") for run in runs]
    assert rows(comparison_table(compare(alike)))["method"][:2] == [
        "mine, /d/a (acc)",
        "mine, /d/b (acc)",
    ]
    assert "data.source=/d/b" in markdown([named(run, "mine") for run in first])


# -- the table -------------------------------------------------------------------------------------


def test_methods_against_tasks_over_seeds(tmp_path):
    text = comparison_table(compare(grid(tmp_path, ["FedSP", "FedPrompt"], ["sciq", "piqa"])))
    cells = rows(text)
    assert list(cells) == ["method", "zero-shot", "server-only", "FedSP", "FedPrompt"]
    assert cells["method"] == [
        "sciq (acc)",
        "piqa (acc)",
        "holds",
        "copied",
        "trains",
        "down + up",
        "client s",
        "peak memory",
    ]
    assert cells["zero-shot"] == ["50.00 ± 0.00"] * 2 + [""] * 6
    assert cells["server-only"] == ["60.00 ± 0.00"] * 2 + [""] * 6
    assert cells["FedSP"] == ["61.50 ± 0.71 ~"] * 2 + ["3 k", "", "3.5 k", "2 kB", "1.50", ""]
    assert cells["FedPrompt"][:2] == ["63.50 ± 0.71 ~"] * 2
    for fact in (
        "test questions: sciq 400, piqa 400",
        "seeds: 1, 2",
        "rounds: 4",
        "model: some/tiny",
    ):
        assert f"- {fact}\n" in text
    assert "- machine: node01, x86_64, 2 cores, 3 ranks, cpu\n" in text and re.search(
        r"- dates: \d{4}-\d\d-\d\d$", text
    )
    assert warnings(text) == []


def test_one_seed_has_no_deviation_and_exact_match_is_a_main_measure(tmp_path):
    run = made(tmp_path, score=0.25)
    results = run.results.copy()
    results["exact_match"] = [0.1, 0.2, 0.3]
    cells = rows(comparison_table(compare([replace(run, results=results)])))
    assert cells["method"][0] == "sciq (exact match)" and cells["FedSP"][0] == "30.00 [25.7, 34.7]"
    assert main_result(run) == ("acc", 0.25)


def test_what_clients_hold_and_train(tmp_path):
    quiet = {"client": {"training": "alternating", "alignment": {"steps": 0}}}
    joint = {"client": {"training": "joint", "alignment": {"steps": 0}}}
    central = made(tmp_path, "central", clients=0, control=None)
    runs = [made(tmp_path, "prompts", **quiet), made(tmp_path, "joint", **joint), central]
    tuned = made(tmp_path, "tuned", method="finetune")
    sections = {
        **tuned.sections,
        "models": {
            "global": 9000,
            "auxiliary": 9000,
            "prompt": 0,
            "prompt_on_the_wire": 9000,
            "exact_copies": 8997,
        },
    }
    memory = {"memory": {"clients": 1_500_000_000, "server": 3}}
    cells = rows(comparison_table(compare([*runs, replace(tuned, sections=sections | memory)])))
    assert cells["prompts"][1:] == ["3 k", "", "500", "2 kB", "1.50", ""]
    assert cells["joint"][1:4] == ["3 k", "", "3.5 k"]
    assert cells["tuned"][1:] == ["9 k", "99.9 %", "9 k", "2 kB", "1.50", "1.5 GB"]
    assert cells["central"] == ["70.00 [65.3, 74.3]", "", "", "", "", "", ""]


def test_controls_that_disagree_have_rows_of_their_own(tmp_path):
    """FedPrompt's server has other settings; in one of two seeds both controls score the same by
    chance.
    """
    runs = [made(tmp_path, "FedSP", seed=seed) for seed in (1, 2)]
    runs += [made(tmp_path, "FedSP without KD", seed=seed, score=0.65) for seed in (1, 2)]
    runs += [made(tmp_path, "FedPrompt", seed=1), made(tmp_path, "FedPrompt", seed=2, control=0.64)]
    runs += [
        made(tmp_path, "FedSP without server tuning", seed=seed, control=None) for seed in (1, 2)
    ]
    cells = rows(comparison_table(compare(runs)))
    shared = "server-only (of FedSP and FedSP without KD)"
    assert list(cells)[1:4] == ["zero-shot", shared, "server-only (of FedPrompt)"]
    assert (
        cells[shared][0] == "60.00 ± 0.00"
        and cells["server-only (of FedPrompt)"][0] == "62.00 ± 2.83"
    )
    more = comparison_table(
        compare([*runs, *(made(tmp_path, "joint", seed=seed) for seed in (1, 2))])
    )
    assert (
        "\n- server-only (of FedSP and 2 others): FedSP, FedSP without KD, joint\n" in more + "\n"
    )
    agreeing = rows(
        comparison_table(compare([run for run in runs if run.name != "sciq-FedPrompt-2"]))
    )
    assert "server-only" in agreeing


def test_cells_that_do_not_compare_are_named(tmp_path):
    runs = grid(tmp_path, ["FedSP", "FedPrompt"], ["sciq", "piqa"])
    runs = [
        run
        for run in runs
        if run.name not in ("sciq-FedPrompt-2", "piqa-FedPrompt-1", "piqa-FedPrompt-2")
    ]
    fewer = made(tmp_path, "other", n=24, prompt={"num_tokens": 8})
    more = made(tmp_path, "other", seed=2, prompt={"num_tokens": 16})
    text = comparison_table(compare([*runs, fewer, more, made(tmp_path, "open", status="stopped")]))
    assert warnings(text) == [
        "FedPrompt on sciq: only seed 1 of 1, 2.",
        "FedPrompt has no run on piqa.",
        "other has no run on piqa.",
        "other on sciq: its runs differ in prompt.num_tokens.",
        (
            "sciq: not the same test questions: zero-shot 400, server-only 400, FedSP 400, "
            "FedPrompt 400, other 24 - 400."
        ),
    ]
    assert "- not complete: sciq-open-1 (stopped)\n" in text and "open" not in rows(text)
    assert rows(text)["FedPrompt"][1] == "-"


def test_columns_say_what_sets_them_apart(tmp_path):
    skewed = {"data": {"task": "sciq", "partition": "labels", "alpha": 0.1}}
    larger = {"model": {"name": "some/larger"}}
    runs = [
        made(tmp_path / "a"),
        made(tmp_path / "b", **skewed),
        made(tmp_path / "c", "FedSP", "piqa"),
        made(tmp_path / "d", **larger),
    ]
    assert compare(runs).tasks == (
        "sciq, tiny, iid",
        "sciq, tiny, labels 0.1",
        "piqa, tiny",
        "sciq, larger",
    )
    assert compare(runs[:3]).tasks == ("sciq, iid", "sciq, labels 0.1", "piqa")
    # Where no server tunes, and each method has a partition of its own, it belongs to the method
    # too.
    alone = [
        made(tmp_path / name, name, control=None, **settings)
        for name, settings in (("equal", {}), ("skewed", skewed))
    ]
    assert compare(alone).tasks == ("sciq",) and compare([*alone, runs[0]]).tasks == (
        "sciq, iid",
        "sciq, labels 0.1",
    )
    text = comparison_table(compare(alone))
    assert (
        "- partition iid: equal\n- partition labels 0.1: skewed" in text and "Warning" not in text
    )
    # What the server owns belongs to the method: centralised ones own all.
    share = made(tmp_path / "e", "central", data={"task": "sciq", "server_share": 0.5})
    assert compare([runs[0], share]).tasks == ("sciq",)


def test_the_same_run_twice_is_refused(tmp_path):
    twins = [made(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(
        ValueError,
        match=r"two runs of FedSP on sciq with seed 1 .*a/sciq-FedSP-1 and .*expected one",
    ):
        compare(twins)
    with pytest.raises(ValueError, match="two runs of FedSP"):
        draw_curves(twins, tmp_path / "x.png")


def test_nothing_to_compare(tmp_path):
    with pytest.raises(
        ValueError,
        match="found 1 runs, none of which is complete and has a result, expected at least",
    ):
        compare([made(tmp_path, status="failed")])


# -- reading ---------------------------------------------------------------------------------------


def test_a_folder_of_runs_stands_for_those_in_it(tmp_path):
    for name in ("b", "a"):
        made(tmp_path / "runs", name)
    (tmp_path / "runs" / "configs").mkdir()
    first = tmp_path / "runs" / "sciq-a-1"
    names = [run.name for run in read_all([first, tmp_path / "runs", first / "run.h5"])]
    assert sorted(names) == ["sciq-a-1", "sciq-b-1"] and names[0] == "sciq-a-1"
    with pytest.raises(ValueError, match="found no such file, expected the record of a run"):
        read_all([tmp_path / "runs" / "configs"])


def test_runs_of_a_folder_come_as_they_began(tmp_path, monkeypatch):
    from fedsp_mpi.report import comparison

    for name in ("b", "a"):
        made(tmp_path, name)
    later = {"sciq-a-1": "2026-01-02", "sciq-b-1": "2026-01-01"}
    monkeypatch.setattr(
        comparison, "read", lambda file: replace(read(file), created=later[file.parent.name])
    )
    assert [run.name for run in read_all([tmp_path])] == ["sciq-b-1", "sciq-a-1"]


# -- pictures --------------------------------------------------------------------------------------


def pixels(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG picture."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_bars_are_sorted_with_their_names_scores_and_errors(tmp_path):
    comparison = compare(grid(tmp_path, ["FedSP", "FedPrompt"], ["sciq", "piqa"]))
    panels = pictures.panels(lambda path: draw_bars(comparison, path))
    assert [axes.get_title(loc="left") for axes in panels] == ["sciq", "piqa"]
    for axes in panels:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["FedPrompt", "FedSP", "server-only", "zero-shot"]
        lowest, highest = axes.get_ylim()
        assert lowest > highest, "the first bar is at the top"
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["63.5 ± 0.7", "61.5 ± 0.7", "60.0", "50.0"]
        greys = [bar.get_facecolor()[0] == bar.get_facecolor()[2] for bar in axes.patches]
        assert greys == [False, False, True, True]
        assert axes.get_legend() is None
    draw_bars(comparison, tmp_path / "bars.png")
    width, height = pixels(tmp_path / "bars.png")
    assert width > height > 300


def test_bars_of_one_seed_have_the_error_of_their_questions(tmp_path):
    runs = grid(tmp_path, [f"method {i}" for i in range(18)], seeds=(1,))
    column = runs[0].results.copy()
    column["stderr"] = 0.05
    runs[0] = replace(runs[0], results=column)
    comparison = compare(runs)
    draw_bars(comparison, tmp_path / "bars.svg")
    texts = pictures.texts(tmp_path / "bars.svg")
    assert "61.0 ± 5.0" in texts and "63.0" in texts
    assert {f"method {i}" for i in range(18)} <= set(texts)
    assert any("standard error over questions (one seed); grey: controls" in x for x in texts)


def test_curves_against_rounds_bytes_and_seconds(tmp_path):
    runs = grid(tmp_path, ["FedSP", "FedPrompt"])
    draw_curves(runs, tmp_path / "curves.svg")
    texts = pictures.texts(tmp_path / "curves.svg")
    for text in (
        "round",
        "bytes sent so far, without the hand-out",
        "seconds of all clients so far",
        "sciq",
    ):
        assert text in texts
    assert "validation loss, nats per token" in texts
    assert texts.count("server-only") == texts.count("FedSP") == texts.count("FedPrompt") == 1
    assert {"0 B", "16 kB", "0 s"} <= set(texts), texts
    draw_curves(runs, tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png") == (1800, 585)


def test_curves_of_plain_text_are_perplexities(tmp_path):
    runs = grid(tmp_path, ["DiLoCo"])
    plain = [replace(run, config={**run.config, "method": "pretrain"}) for run in runs]
    [losses, *_], [perplexities, *_] = panels(runs), panels(plain)
    each = np.exp([run.rounds["validation_loss"] for run in plain])
    assert perplexities.lines[0].get_ydata() == pytest.approx(each.mean(0))
    assert perplexities.get_ylabel() == "validation perplexity"
    labels = [label.get_text() for label in perplexities.get_yticklabels()]
    assert labels and all(re.fullmatch(r"[\d.,]*", label) for label in labels)
    assert perplexities.get_yscale() == "log" and losses.get_yscale() == "linear"


def test_equal_pictures_are_equal_files(tmp_path):
    runs = grid(tmp_path, ["FedSP"])
    for name in ("a.svg", "b.svg"):
        draw_curves(runs, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def panels(runs: Sequence[Run]) -> list[Any]:
    """Return the axes of a picture of curves."""
    return pictures.panels(lambda path: draw_curves(runs, path))


def test_lines_are_means_over_seeds_and_the_control_is_dashed(tmp_path):
    rounds, num_bytes, seconds = panels(grid(tmp_path, ["FedSP"]))
    method, control = rounds.lines
    assert method.get_xdata().tolist() == [1, 2, 3, 4] and control.get_linestyle() == "--"
    assert method.get_ydata() == pytest.approx([3 - 0.05 * round + 0.03 for round in range(1, 5)])
    assert control.get_ydata() == pytest.approx([3.4 - 0.05 * round for round in range(1, 5)])
    assert num_bytes.lines[0].get_xdata().tolist() == [4000, 8000, 12000, 16000]
    assert seconds.lines[0].get_xdata().tolist() == [3, 6, 9, 12]
    for panel in (num_bytes, seconds):  # the control sends nothing: drawn across, at its lowest
        assert (
            panel.lines[1].get_ydata() == pytest.approx([3.2, 3.2])
            and panel.get_xscale() == "linear"
        )
    [band] = [collection for collection in rounds.collections if len(collection.get_paths())][:1]
    assert np.ptp(band.get_paths()[0].vertices[:, 1]) == pytest.approx(0.15 + 2 * 0.01414, abs=1e-3)


def test_bytes_far_apart_are_on_a_logarithmic_axis_and_none_at_all_is_a_level(tmp_path):
    runs = [made(tmp_path), made(tmp_path, "Fine-tuning", wire=500 * OWN)]
    runs.append(made(tmp_path, "central", clients=0, control=None))
    rounds, num_bytes, seconds = panels(runs)
    assert (rounds.get_xscale(), num_bytes.get_xscale(), seconds.get_xscale()) == (
        "linear",
        "log",
        "linear",
    )
    assert [len(set(line.get_ydata())) for line in num_bytes.lines] == [4, 4, 1, 1]
    assert len({(line.get_color(), str(line.get_linestyle())) for line in rounds.lines}) == 4


def test_losses_of_another_kind_have_a_row_of_their_own_and_methods_look_the_same_in_all(tmp_path):
    over = {label: {"task": "sciq", "loss_over": label} for label in ("vocabulary", "auto")}
    runs = [
        made(tmp_path),
        made(tmp_path, "A", data=over["vocabulary"]),
        made(tmp_path, "B", data=over["auto"]),
    ]
    runs.append(made(tmp_path, "A", "piqa"))
    axes = panels(runs)
    titles = ["sciq, data.loss_over: vocabulary", "sciq, data.loss_over: auto", "piqa"]
    assert [row.get_title("left") for row in axes[::3]] == titles
    shown = [{line.get_label(): line.get_color() for line in row.lines} for row in axes[::3]]
    assert [set(row) - {"server-only"} for row in shown] == [{"FedSP", "A"}, {"B"}, {"A"}]
    assert shown[0]["A"] == shown[2]["A"] != shown[1]["B"]


def test_controls_that_differ_are_drawn_in_the_colours_of_their_methods(tmp_path):
    rounds, *_ = panels([made(tmp_path), made(tmp_path, "FedPrompt", control=0.64)])
    first, second, *controls = rounds.lines
    assert [line.get_label() for line in controls] == [
        "server-only (of FedSP)",
        "server-only (of FedPrompt)",
    ]
    assert [line.get_color() for line in controls] == [first.get_color(), second.get_color()]


def test_each_task_has_a_row_and_runs_that_are_not_complete_are_left_out(tmp_path):
    runs = [made(tmp_path), made(tmp_path, task="piqa"), made(tmp_path, "open", status="stopped")]
    axes = panels(runs)
    assert len(axes) == 6 and [len(panel.lines) for panel in axes] == [2] * 6
    assert len(panels([runs[2]])) == 3  # a run that goes on, alone
    with pytest.raises(ValueError, match="found 1 runs without a round"):
        draw_curves([replace(runs[2], committed_rounds=0)], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.jpg", r"x.jpg: found the ending '.jpg', expected .png or .svg"),
        ("none/x.png", "none/x.png: found no place to write to .*No such file"),
    ],
)
def test_pictures_that_cannot_be_written(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        draw_curves([made(tmp_path)], tmp_path / name)


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    run = made(tmp_path)
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["report", str(run.file.parent), "--plot", str(tmp_path / "x.png")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found no matplotlib, expected it for pictures" in line and ".[plot]" in line


# -- the command -----------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    grid(tmp_path / "runs", ["FedSP", "FedPrompt"])
    files = [str(tmp_path / name) for name in ("bars.png", "curves.svg")]
    arguments = [
        "report",
        str(tmp_path / "runs"),
        "--table",
        "comparison",
        "--picture",
        files[0],
        "--plot",
        files[1],
    ]
    assert cli.main(arguments) == 0
    table, gain = capsys.readouterr().out.split("| gain")
    assert set(rows(table)) == {"method", "zero-shot", "server-only", "FedSP", "FedPrompt"}
    assert set(rows("| gain" + gain)) == {"gain", "FedSP", "FedPrompt"}
    assert all(Path(path).stat().st_size > 5000 for path in files)
    assert cli.main(["report", str(tmp_path / "runs"), "--plot", files[1]]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["report", str(tmp_path / "runs"), "--picture", files[0]]) == 2
    assert "--picture: found without --table comparison" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.count("run       sciq-") == 4
