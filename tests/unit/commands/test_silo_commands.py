"""The commands around a run whose clients have silos: check, plan, fetch, evaluate, and others."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from fedsp_mpi import config
from fedsp_mpi.comm.messages import HEADER_BYTES
from fedsp_mpi.commands import evaluate
from fedsp_mpi.commands.evaluate import Options
from fedsp_mpi.commands.sweep import sweep
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.estimate import cost
from fedsp_mpi.log import Log
from fedsp_mpi.record import Run, RunRecord, read
from fedsp_mpi.run.silos import found_here
from helpers.mpi import both_ends
from helpers.runs import FEDBPT, FEDPROMPT, SHORT, fedsp, here

NUM_SILOS = 3
FINETUNE = ("method=finetune", "client.tuning.optimizer.learning_rate=1e-4")


def sets(*settings: str) -> list[str]:
    return [word for item in settings for word in ("--set", item)]


@pytest.fixture(scope="module")
def silos(tmp_path_factory) -> Path:
    """What `split` writes of the short embedded run, and beside it a folder of no task."""
    folder = tmp_path_factory.mktemp("split") / "silos"
    here(["split", "--to", folder, *sets(*SHORT)])
    (folder / "client_bad").mkdir()
    (folder / "client_bad/train.jsonl").write_text('{"secret": "w1 w2"}\n')
    return folder


@pytest.fixture(scope="module")
def run(silos) -> Run:
    """A complete run on the silos, which judge beside the server."""
    where = sets(f"run.folder={silos.parent}", "evaluation.at=both")
    here(["run", silos / "silos.yaml", "--name", "run", *where])
    return read(silos.parent / "run")


def settings_of(silos: Path, *settings: str) -> config.Config:
    return config.load(silos / "silos.yaml", list(settings))


def pattern(silos: Path, glob: str) -> tuple[str, ...]:
    """Silos that are still to be found."""
    return ("federation.clients=null", f"federation.silos={{source: '{silos}/{glob}'}}")


def checked(n: int, silos: Path, *settings: str, status: int = 0) -> list[str]:
    """The lines of a check on n ranks, none of which has a row's text."""
    chosen = sets(f"run.folder={silos.parent / 'checked'}", *settings)
    ended = fedsp(n, ["check", silos / "silos.yaml", *chosen], status)
    assert "w1 w2" not in ended.stdout + ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == (1 if status else 0), both_ends(ended)
    return ended.stdout.splitlines()


def of(lines: list[str], subject: str) -> list[str]:
    """Status and finding of the lines about one subject."""
    rows = [(line[:6].strip(), line[6:21].strip(), line[21:]) for line in lines]
    return [f"{status} {finding}" for status, name, finding in rows if name == subject]


# -- check -----------------------------------------------------------------------------------------


def test_check_says_what_each_silo_can_be_used_for(silos):
    lines = checked(0, silos, "evaluation.at=both")
    assert [re.sub(r" on \S+,", ",", line) for line in of(lines, "silo")] == [
        f"ok client_00{number}, rank 0: 14 examples, 2 held out, the longest 12 tokens"
        for number in range(NUM_SILOS)
    ]
    assert of(lines, "silos")[-1] == "ok 3 of 3 can be used"
    [model] = of(lines, "model, data")
    assert model.endswith("the server's 16 train, 16 validation, 24 test")


@pytest.mark.parametrize(
    ("on_failure", "status", "mark"), [("drop", 0, "warn"), ("stop", 2, "FAIL")]
)
def test_a_bad_silo_is_what_on_failure_makes_of_it(silos, on_failure, status, mark):
    names = "[client_000, client_bad, client_gone]"
    silo_settings = f"federation.silos={{source: '{silos}/{{silo}}', names: {names}}}"
    lines = checked(
        0,
        silos,
        "federation.clients=null",
        silo_settings,
        f"federation.on_failure={on_failure}",
        status=status,
    )
    usable, other_columns, gone = of(lines, "silo")
    assert usable.startswith("ok client_000 on ")
    assert other_columns.startswith(f"{mark} client_bad on ") and "no column" in other_columns
    assert gone.startswith(f"{mark} client_gone on ") and "no folder" in gone
    assert "1 of 3 can be used" in of(lines, "silos")[-1]


def test_too_few_silos_fail_whatever_on_failure_says(silos):
    lines = checked(0, silos, *pattern(silos, "client_b*"), status=2)
    assert of(lines, "silos")[-1].startswith("FAIL found that 0 of 1 can be used")
    assert of(lines, "memory") and of(lines, "run folder"), "the check went on"


def test_many_silos_take_a_few_lines(silos):
    names = [f"gone_{number}" for number in range(40)]
    silo_settings = f"federation.silos={{source: '{silos}/{{silo}}', names: {names}}}"
    lines = checked(0, silos, "federation.clients=null", silo_settings, status=2)
    assert len(of(lines, "silo")) == 11
    assert of(lines, "silo")[-1] == "warn 30 more cannot be used"


def test_a_server_without_text_is_no_mistake(silos):
    settings = ("server.data.source=null", "server.tuning.steps=0", "evaluation.at=silos")
    lines = checked(0, silos, *FEDPROMPT, *settings, "federation.disclose=nothing")
    assert of(lines, "model, data")[0].endswith("the server owns no text")
    assert all(line.endswith("sizes are not disclosed") for line in of(lines, "silo"))


def test_a_pattern_that_matches_nothing_is_a_failure_and_the_check_goes_on(silos):
    lines = checked(0, silos, *pattern(silos, "nobody_*"), status=2)
    assert "found nothing that matches" in of(lines, "silos")[0]
    assert of(lines, "model, data") and of(lines, "run folder")


@pytest.mark.slow
def test_check_on_three_ranks_finds_places_and_opens(silos):
    lines = checked(3, silos, *pattern(silos, "client_*"))
    assert of(lines, "world") == ["ok 3 ranks: 1 server, 2 for 4 clients"]
    assert of(lines, "silos")[0].endswith("sees 4 of 4 folders")
    places = [re.sub(r" on \S+ ", " ", line) for line in of(lines, "placement")]
    assert places == [
        "ok rank 1 plays 2: 000, 002",
        "ok rank 2 plays 2: 001, bad",
    ]
    *usable, bad = of(lines, "silo")
    assert [int(re.findall(r"rank (\d)", line)[0]) for line in usable] == [1, 2, 1]
    assert bad.startswith("warn bad on ")


# -- plan ------------------------------------------------------------------------------------------


def test_plan_counts_what_silos_judge_as_a_run_does(silos, run):
    estimate = cost.plan(settings_of(silos, "evaluation.at=both"), "silos")
    fedsp_cost = estimate.methods[0]
    wire = [row for row in run.wire if row["phase"] == "evaluation"]
    assert sum(row["bytes"] for row in wire) == 2 * NUM_SILOS * fedsp_cost.judged
    alone = cost.plan(settings_of(silos), "silos").methods[0]
    assert alone.judged == 0
    assert fedsp_cost.total - alone.total == 2 * NUM_SILOS * fedsp_cost.judged


@pytest.mark.parametrize("method", [(), FEDBPT, FINETUNE])
def test_a_round_s_result_is_as_large_as_what_it_begins_with(silos, method):
    estimate = cost.plan(settings_of(silos, *method, "evaluation.at=silos"), "silos")
    assert all(cost_of.judged == cost_of.down > HEADER_BYTES for cost_of in estimate.methods)


def test_forward_passes_of_silos_grow_with_what_they_hold_back(silos):
    def flops(*settings: str) -> float:
        chosen = settings_of(silos, "evaluation.at=both", *settings)
        return cost.plan(chosen, "silos").phases["silos' validation"]

    assert "silos' validation" not in cost.plan(settings_of(silos), "silos").phases
    once = flops("data.limit.train=100")
    assert once > 0
    assert flops("data.limit.train=200") == pytest.approx(2 * once)
    assert flops("data.limit.train=100", "federation.rounds=4") == pytest.approx(2 * once)


def test_a_search_runs_over_each_silo_s_own_examples(silos):
    estimate = cost.plan(settings_of(silos, *FEDBPT, "data.limit.train=30"), "silos")
    assert estimate.silos is not None and estimate.silos.train == 30
    divided = ("data.limit.train=90", "data.server_share=0", *SHORT[:2])
    simulation = cost.plan(config.load(None, [*FEDBPT, *divided]), "simulation")
    assert estimate.phases["client search"] == simulation.phases["client search"] > 0


@pytest.mark.parametrize(
    ("glob", "words"),
    [
        ("client_00*", ["silos     3: 0, 1, 2\n", "of 3 of 3 clients"]),
        ("nobody_*", ["found nothing here that matches", "counted as 1 in all"]),
    ],
)
def test_plan_says_which_silos_it_counts(silos, glob, words):
    text = here(["plan", silos / "silos.yaml", *sets(*pattern(silos, glob))]).stdout
    assert all(piece in text for piece in words), text


# -- fetch -----------------------------------------------------------------------------------------


def test_fetch_says_which_folders_are_here_and_opens_none(silos):
    (silos / "client_bad/train.jsonl").chmod(0)
    items = [
        f"{{name: here, source: '{silos}/client_000'}}",
        f"{{name: bad, source: '{silos}/client_bad'}}",
        "{name: east, source: /nowhere/east, host: node07}",
    ]
    settings = sets("federation.clients=null", f"federation.silos=[{', '.join(items)}]")
    lines = here(["fetch", silos / "silos.yaml", *settings]).stdout.splitlines()
    (silos / "client_bad/train.jsonl").chmod(0o600)
    assert "silos: 2 of 3 are folders that are here" in lines
    assert "silo east: not here, expected on its host node07: /nowhere/east" in lines
    assert any(line.startswith("data multiple_choice, the server's: ") for line in lines)


# -- evaluate --------------------------------------------------------------------------------------


def test_evaluate_asks_what_the_server_s_own_test_has(run):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = evaluate.evaluate(run.file.parent, Options(), Log()).rows
    assert len(rows) == 2
    assert all(row.n == 24 and row.equal for row in rows), rows


def test_evaluate_without_text_of_the_server_s_is_one_line(silos, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    settings = ("server.data.source=null", "server.tuning.steps=0", "evaluation.at=silos")
    chosen = settings_of(silos, *FEDPROMPT, *settings)
    RunRecord.create(tmp_path / "run", config=asdict(chosen), config_text="", environment={})
    ended = here(["evaluate", tmp_path / "run", "--without-prompt"], 2)
    assert re.search(
        r"^fedsp_mpi: server\.data\.source: found a run whose .*--tasks$", ended.stderr
    )


# -- sweep and bench -------------------------------------------------------------------------------


def test_a_sweep_knows_the_runs_of_silos_that_it_found(silos, tmp_path):
    chosen = {"base": str(silos / "silos.yaml"), "seeds": [1], "tasks": {"t": {}}}
    federation = {"clients": None, "silos": {"names": None, "source": f"{silos}/client_00*"}}
    file = tmp_path / "sweep.yaml"
    methods = {"m": {"federation": federation}}
    file.write_text(json.dumps({**chosen, "folder": str(tmp_path / "runs"), "methods": methods}))
    lines: list[str] = []
    sweep([file], [], Log(lines.append), dry_run=True)
    assert lines[-1] == "1/1  t-m-1  new"
    settings = (*pattern(silos, "client_00*"), "run.seed=1", "run.label=m")
    found = found_here(settings_of(silos, *settings))
    folder = tmp_path / "runs/t-m-1"
    RunRecord.create(folder, config=asdict(found), config_text="", environment={}).finish()
    sweep([file], [], Log(lines.append), dry_run=True)
    assert lines[-1] == "1/1  t-m-1  complete  no result"
    file.write_text(file.read_text().replace("client_00*", "client_b*"))
    with pytest.raises(ConfigError, match=r"federation\.silos: was "):
        sweep([file], [], Log(), dry_run=True)


@pytest.mark.parametrize("what", ["local", "transfer"])
def test_a_benchmark_needs_one_source(silos, what):
    ended = here(["bench", what, silos / "silos.yaml"], 2)
    assert re.search(r"^fedsp_mpi: federation\.silos: found 3, expected none: .*\n$", ended.stderr)
