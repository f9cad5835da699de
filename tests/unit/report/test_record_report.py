"""Summaries, tables over seeds, and differences between records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, Run, WireRow, read
from fedsp_mpi.report import difference, markdown, summarize
from helpers.record_samples import make, results, tensors


def finished(folder: Path, fedsp: float = 0.7, **options: Any) -> Run:
    record = make(folder, **options)
    record.write_wire(
        [
            WireRow(
                name="aux",
                shape=(5,),
                dtype="float32",
                direction="handout",
                count=2,
                bytes=4_500_000,
            )
        ]
    )
    record.write_results(results(fedsp))
    record.finish()
    return read(folder)


def test_summary_fits_a_terminal_and_says_what_was_gained(tmp_path: Path) -> None:
    text = summarize(finished(tmp_path / "a"))
    lines = text.splitlines()
    assert text.isascii() and max(len(line) for line in lines[:-1]) <= 100
    assert "a   complete, 3 rounds" in lines[0] and "node01, 3 ranks, 2 clients" in lines[1]
    rounds = next(i for i, line in enumerate(lines) if line.startswith("round"))
    assert lines[rounds].split() == ["round", "clients", "client", "tuned", "round", "s"]
    assert lines[rounds + 4].split() == ["3", "2/2", "2.5000", "0.6667", "1.50", "best"]
    fedsp = next(x for x in lines if x.startswith("fedsp "))
    assert " ".join(fedsp.split()) == "fedsp test 2 400 70.00 60.00 1.00 2.0000"
    assert (
        "fedsp against server-only (test): +10.00 points of acc, standard error 1.41 (unpaired)"
        in lines
    )
    assert (
        "fedsp against zero-shot (test): +20.00 points of acc, standard error 1.41 (unpaired)"
        in lines
    )
    assert "wire      down 3 kB, up 6 kB, handout 4.5 MB, in all 4.51 MB" in lines
    assert "          per client and round: down 500 B, up 1 kB" in lines
    assert lines[-1] == f"folder    {tmp_path / 'a'}"


NO_DIFFERENCE = "    no difference that 400 questions can show: 95 % interval "


@pytest.mark.parametrize(
    ("fedsp", "gain", "verdict"),
    [
        (0.61, "+1.00", f"{NO_DIFFERENCE}-5.75 to +7.74"),
        (0.6, "+0.00", f"{NO_DIFFERENCE}-6.76 to +6.76"),
        (0.55, "-5.00", f"{NO_DIFFERENCE}-11.78 to +1.84"),
        (0.5, "-10.00", "    fedsp is worse than server-only: 95 % interval -16.76 to -3.11"),
    ],
)
def test_summary_says_what_the_questions_can_show(
    tmp_path: Path, fedsp: float, gain: str, verdict: str
) -> None:
    lines = summarize(finished(tmp_path / "a", fedsp)).splitlines()
    place = lines.index(
        f"fedsp against server-only (test): {gain} points of acc, standard error 1.41 (unpaired)"
    )
    assert lines[place + 1] == verdict


def test_summary_of_a_gain_beyond_its_error(tmp_path: Path) -> None:
    text = summarize(finished(tmp_path / "a", 0.7))
    assert "can show" not in text and "worse" not in text


def test_summary_explains_its_columns(tmp_path: Path) -> None:
    record = make(tmp_path / "a")
    seconds = {"seconds_clients": 2.0, "seconds_server": 0.5, "seconds_total": 3.0}
    client = ClientRow(
        round=4, client=0, rank=1, loss_prompt_last=2.5, seconds_model=0.5, seconds_prompt=0.25
    )
    record.commit_round(RoundRow(round=4, num_clients=1, **seconds), [client])
    lines = summarize(record.run).splitlines()
    head = next(line for line in lines if line.startswith("round"))
    text = " ".join(lines)
    assert all(name in head and f"{name} = " in text for name in ("wait s", "server s", "round s"))
    assert "best = the round of the lowest validation loss" in text
    assert (
        "overhead per client and round 1.25" in text
        and "overhead = local work other than training" in text
    )
    assert not any(line.endswith("...") for line in lines)


def test_summary_falls_back_on_the_loss(tmp_path: Path) -> None:
    record = make(tmp_path / "a")
    losses = {"server-only": 2.0, "fedsp": 2.25}
    record.write_results(
        [ResultRow(method=m, split="validation", loss=loss) for m, loss in losses.items()]
    )
    text = summarize(record.run)
    assert "fedsp against server-only (validation): validation loss higher by 0.2500" in text


def test_summary_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    text = summarize(make(tmp_path / "a", rounds=0).run)
    assert (
        "running, 0 rounds" in text
        and "no round was committed" in text
        and "no results yet" in text
    )


def test_summary_names_failed_clients(tmp_path: Path) -> None:
    record = make(tmp_path / "a")
    failed = ClientRow(round=4, client=1, rank=1, status="failed", reason="loss is\n nan")
    record.commit_round(RoundRow(round=4, num_clients=2, num_failed=1), [failed])
    text = summarize(record.run)
    assert "client 1 failed in round 4: loss is nan" in text and "    1/2" in text


def test_summary_counts_failed_clients_among_those_that_took_part(tmp_path: Path) -> None:
    """Of three clients one failed: two are left, and the bytes are those of three."""
    record = make(tmp_path / "a", rounds=0)
    failed = ClientRow(
        round=1, client=1, rank=1, status="failed", reason="nan", bytes_down=1000, bytes_up=100
    )
    good = [
        ClientRow(round=1, client=c, rank=1, loss_prompt_last=2.0, bytes_down=1000, bytes_up=1000)
        for c in (0, 2)
    ]
    row = RoundRow(round=1, num_clients=3, num_failed=1, bytes_down=3000, bytes_up=2100)
    record.commit_round(row, [good[0], failed, good[1]])
    lines = summarize(record.run).splitlines()
    assert next(line for line in lines if line.split()[:1] == ["1"]).split()[:3] == [
        "1",
        "2/3",
        "2.0000",
    ]
    assert "          per client and round: down 1 kB, up 700 B" in lines
    assert "3 clients" in lines[1]


def test_summary_header_and_time(tmp_path: Path) -> None:
    record = make(tmp_path / "a", federation={"clients": 2})
    ranks = [{"host": host, "device": "cpu"} for host in ("n1", "n1", "n2")]
    run = replace(
        record.run, environment={"hosts": ranks, "machine": "x86_64, 4 cores", "commit": "abc+"}
    )
    record.run = run
    record.describe(
        models={"global": 1_557_611_200, "prompt_on_the_wire": 6_144_000, "odd": None},
        data={
            "task": "sciq",
            "train": 80,
            "test": 9,
            "server_shard": 10,
            "client_shards": [34, 36],
        },
        distillation={"seconds": 12.0},
        timing={"seconds": 345.6},
    )
    text = summarize(read(tmp_path / "a"))
    assert (
        "machine   n1, n2, x86_64, 4 cores, 3 ranks, cpu, 2 clients\n" in text
        and "commit    abc+\n" in text
    )
    assert (
        "models    global tiny (1.56 B parameters), prompt on the wire (6.14 M parameters)\n"
        in text
    )
    assert "data      sciq, 80 train, 9 test, server's shard 10, clients' shards 34 to 36\n" in text
    assert "seconds   distillation 12.00, all rounds 4.50, whole run 346\n" in text
    record.describe(distillation={"reused_from": "runs/b"})
    assert "seconds   distillation reused, all rounds 4.50" in summarize(record.run)


def test_summary_names_the_keys_of_the_newest_start(tmp_path: Path) -> None:
    record = make(tmp_path / "a")
    assert "sealed" not in summarize(record.run)
    for start in ("1", "2"):
        clients = {str(client): start * 32 for client in range(9)}
        keys = {"cipher": "C20", "server": "a" * 32, "clients": clients}
        record.describe(encryption={start: keys})
    lines = summarize(record.run).splitlines()
    [first] = [place for place, line in enumerate(lines) if line.startswith("sealed    ")]
    words = " ".join(line.strip() for line in lines[first : first + 6])
    assert (
        f"sealed    what goes up, by C20, key of server {'a' * 32}, client 0 {'2' * 32}," in words
    )
    assert f"client 7 {'2' * 32}, and 1 more" in words and "client 8" not in words


def test_summary_bears_with_free_form_parts(tmp_path: Path) -> None:
    run = make(tmp_path / "a").run
    sections = {
        "models": {"a": [1]},
        "data": {"client_shards": 3},
        "distillation": {"seconds": "long"},
        "timing": {},
        "encryption": {"1": {"clients": {}}},
    }
    assert "unknown machine" in summarize(
        replace(run, environment={"hosts": 3}, sections=sections, config={})
    )


def test_markdown_groups_seeds(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "a", 0.7, seed=1, prompt={"num_tokens": 8}),
        finished(tmp_path / "b", 0.8, seed=2, prompt={"num_tokens": 8}),
        finished(tmp_path / "c", 0.5, seed=1, prompt={"num_tokens": 16}),
        make(tmp_path / "d", seed=3, prompt={"num_tokens": 16}).run,
    ]
    lines = markdown(runs).splitlines()
    assert len(lines) == 2 + 3 + 3 + 2 + 2 and len({line.count("|") for line in lines[:8]}) == 1
    row = "| prompt.num_tokens=8 | fedsp | test | 1, 2 | 400 | 75.00 ± 7.07 | 65.00 ± 7.07 | - |"
    assert lines[4] == row + " 2.0000 ± 0.0000 | +15.00 ± 7.07 ~ |"
    assert lines[7].startswith(
        "| prompt.num_tokens=16 | fedsp | test | 1 | 400 | 50.00 [45.1, 54.9] |"
    )
    assert lines[7].endswith("| -10.00 |")
    assert lines[-1] == "Not complete: d (running)."


def test_difference_of_equal_runs_is_empty(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a"), finished(tmp_path / "b")
    assert difference(a, b) == []


def test_difference_names_round_tensor_and_distance(tmp_path: Path) -> None:
    a = finished(tmp_path / "a")
    record = make(tmp_path / "b", rounds=1)
    for round in (2, 3):
        changed = tensors(round)
        changed["z.prefix"][5, 1] += np.float32(0.5)
        changed["z.prefix"][0, 0] = 0.0  # from -0.0: other bits, the same value
        row = RoundRow(round=round, num_clients=2, validation_loss=2.0 / round, is_best=True)
        clients = [ClientRow(round=round, client=c, rank=9, loss_prompt_last=2.5) for c in (1, 0)]
        record.commit_round(row, clients, changed)
    record.write_results(results(0.71))
    lines = difference(a, record.run)
    assert lines == [
        (
            "round 2, the first whose prompts differ: tensor 'z.prefix': 2 of 32 values, "
            "largest difference 0.5"
        ),
        "prompts differ in 2 of 3 rounds",
        "results: acc differs first at method fedsp, split test: 0.7 and 0.71",
        (
            f"results: acc_norm differs first at method fedsp, split test: {0.7 - 0.1} and "
            f"{0.71 - 0.1}"
        ),
    ]


def test_difference_names_columns_that_one_run_has(tmp_path: Path) -> None:
    """Methods add columns of their own, such as the losses of a user's second prompt."""
    a = finished(tmp_path / "a")
    record = make(tmp_path / "b", rounds=0)
    extra = {"loss_personal_last": 2.0}
    for round in (1, 2, 3):
        clients = [
            ClientRow(round=round, client=c, rank=9, loss_prompt_last=2.5, extra=extra)
            for c in (1, 0)
        ]
        row = RoundRow(round=round, num_clients=2, validation_loss=2.0 / round, is_best=True)
        record.commit_round(row, clients, tensors(round))
    record.write_results(results(0.7))
    column = "clients: the column loss_personal_last is only in the"
    assert difference(a, record.run) == [f"{column} second run"]
    assert difference(record.run, a) == [f"{column} first run"]


@pytest.mark.parametrize("stage", ["prompt", "model"])
def test_a_clients_loss_is_the_mean_of_those_that_trained(tmp_path: Path, stage: str) -> None:
    """One without examples has none; weights have a loss as prompts do."""
    record = make(tmp_path / "a", rounds=0)
    losses = (2.0, float("nan"), 3.0)
    clients = [
        ClientRow(round=1, client=c, rank=1, **{f"loss_{stage}_last": loss})
        for c, loss in enumerate(losses)
    ]
    record.commit_round(RoundRow(round=1, num_clients=3), clients)
    lines = summarize(record.run).splitlines()
    assert next(line for line in lines if line.split()[:1] == ["1"]).split()[:3] == [
        "1",
        "3/3",
        "2.5000",
    ]


def test_difference_of_rounds_and_kept_prompts(tmp_path: Path) -> None:
    a, b, c = (
        make(tmp_path / "a").run,
        make(tmp_path / "b", rounds=2).run,
        make(tmp_path / "c", keep=False).run,
    )
    assert difference(a, b) == ["rounds: 3 in the first run, 2 in the second"]
    assert difference(a, c) == ["prompts of round 1, 2, 3 were kept by one run only"]
