"""Whole runs of the embedded default, shortened, on a real mpirun with 1, 2 and 3 ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers.mpi import both_ends
from helpers.paths import PROGRAMS, ROOT
from helpers.runs import FEDPROMPT, SHORT, short_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run the same experiment in this process and on 1 and 3 ranks; each distils for itself."""
    folder = tmp_path_factory.mktemp("runs")
    for n in (0, 1, 3):
        result = short_run(n, folder, f"n{n}", "distillation.reuse=false")
        (folder / f"n{n}.txt").write_text(result.stdout)
    return folder


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path):
    settings = " ".join(f"--set {setting}" for setting in (*SHORT, f"run.folder={tmp_path}"))
    process = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m fedsp_mpi run --name unread {settings} | true"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert process.stderr == "" and read(tmp_path / "unread").status == "complete"


@pytest.mark.parametrize("n", [1, 3])
def test_bits_do_not_depend_on_the_number_of_ranks(runs, n):
    single, several = read(runs / "n0"), read(runs / f"n{n}")
    assert single.prompt_rounds == several.prompt_rounds == (1, 2)
    for round in single.prompt_rounds:
        for name, values in single.prompts(round).items():
            assert np.isfinite(values).all()
            assert values.tobytes() == several.prompts(round)[name].tobytes(), (round, name)
    assert single.prompts(1)["prompt"].tobytes() != single.prompts(2)["prompt"].tobytes()
    for column in ("acc", "acc_norm", "loss"):
        assert single.results[column].tobytes() == several.results[column].tobytes()
    weights = [
        (runs / name / "auxiliary" / "model.safetensors").read_bytes() for name in ("n0", f"n{n}")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_ranks_distil_by_deepspeed_to_the_bits_of_one_process(tmp_path):
    engine = ("distillation.engine=deepspeed", "distillation.reuse=false")
    for n in (0, 2):
        short_run(n, tmp_path, f"n{n}", *engine)
    alone, two = read(tmp_path / "n0"), read(tmp_path / "n2")
    assert difference(alone, two) == [] and "reused_from" not in two.sections["distillation"]
    assert two.sections["distillation"]["engine"] == "deepspeed"
    weights = [
        (tmp_path / name / "auxiliary" / "model.safetensors").read_bytes() for name in ("n0", "n2")
    ]
    assert weights[0] == weights[1]


def test_start_progress_and_table_are_shown(runs):
    text = (runs / "n3.txt").read_text()
    assert re.search(r"ranks +3 \(1 server, 2 client ranks\)", text)
    assert "round 1/2" in text and "round 2/2" in text and " left" in text
    assert re.search(r"^zero-shot .*\n(server-only .*)\n(fedsp .*)", text, re.M)
    assert str(runs / "n3") in text


def test_a_launcher_with_more_ranks_than_cores_gets_a_line_of_advice(runs):
    num_cores = len(os.sched_getaffinity(0))
    advice = f"3 ranks share {num_cores} cores: `-n {max(2, num_cores)}` does the same"
    assert (advice in (runs / "n3.txt").read_text()) == (num_cores < 3)
    assert "ranks share" not in (runs / "n1.txt").read_text()


def test_a_round_is_validated_and_recorded_while_clients_work_on_the_next(tmp_path):
    """Where the server does not tune, and once."""
    result = short_run(
        2,
        tmp_path,
        "run",
        *FEDPROMPT,
        "server.tuning.steps=0",
        program=[PROGRAMS / "phases.py"],
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("phases: "))
    phases = [phase for phase, _ in groupby(line.removeprefix("phases: ").split(", "))]
    first = phases.index("broadcast 2")
    assert phases[first : first + 5] == [
        "broadcast 2",
        "validation 1",
        "best round 1",
        "record 1",
        "checkpoint 1",
    ]
    assert phases.index("gather 2") > first + 4
    for round in (1, 2):
        names = [phase for phase in phases if phase.startswith("validation")]
        assert sum(name.endswith(f" {round}") for name in names) == 1, names


def test_record_says_what_happened(runs):
    run = read(runs / "n3")
    assert run.status == "complete" and run.committed_rounds == 2
    assert run.config["federation"]["rounds"] == 2
    assert {"torch", "deepspeed", "mpi4py", "python"} <= set(run.environment["versions"])
    assert len(run.environment["hosts"]) == 3
    assert run.sections["models"]["auxiliary"] < run.sections["models"]["global"]
    assert (
        run.sections["distillation"]["engine"] == "deepspeed"
        and run.sections["distillation"]["zero_stage"] == 0
    )
    assert run.clients["client"].tolist() == [0, 1, 2] * 2
    assert set(run.clients["status"]) == {b"ok"} or set(run.clients["status"]) == {"ok"}
    assert (
        np.isfinite(run.clients["loss_model_last"]).all()
        and np.isfinite(run.clients["loss_prompt_last"]).all()
    )
    assert (run.rounds["seconds_clients"] > 0).all() and np.isfinite(
        run.rounds["validation_merged"]
    ).all()
    assert [row["method"] for row in run.results] == [
        "chance",
        "zero-shot",
        "server-only",
        "fedsp",
    ]
    with h5py.File(runs / "n3" / "run.h5") as file:
        assert file["prompts/0002/prompt"].shape == run.prompts(2)["prompt"].shape


@pytest.mark.parametrize("n", [0, 3])
def test_every_byte_on_the_wire_has_a_name(runs, n):
    run = read(runs / f"n{n}")
    values = run.sections["models"]["prompt_on_the_wire"]
    assert (run.clients["bytes_down"] == 4 * values + 256).all()
    assert (run.clients["bytes_up"] == 4 * values + 256).all()
    names = {(row["direction"], row["name"]) for row in run.wire}
    names = {
        tuple(part.decode() if isinstance(part, bytes) else part for part in pair) for pair in names
    }
    assert {name for direction, name in names if direction in ("down", "up")} == {
        "(header)",
        "prompt",
    }
    handed_out = {
        name for direction, name in names if direction == "handout" and not name.startswith("(")
    }
    assert all(name.startswith(("auxiliary/", "prompt/")) for name in handed_out)
    blocks = {match[1] for name in handed_out if (match := re.search(r"\.h\.(\d+)\.", name))}
    assert blocks == {"0"}, "only the one shared block travels"


def test_adapter_gives_the_run_s_own_logits(runs):
    torch, peft, transformers = (
        pytest.importorskip(name) for name in ("torch", "peft", "transformers")
    )
    from fedsp_mpi.config import load
    from fedsp_mpi.data.tokens import collate
    from fedsp_mpi.models.backbone import load_global
    from fedsp_mpi.models.prompts import Prompt
    from fedsp_mpi.run.inputs import RESOURCES, ExperimentInputs

    run = read(runs / "n0")
    best = int(run.results[-1]["round"])
    materials = ExperimentInputs(load(runs / "n0" / "config.yaml"))
    model = load_global(str(RESOURCES / "model"), device=torch.device("cpu"))
    prompt = Prompt(materials.prompt_spec)
    prompt.load({name: torch.from_numpy(values) for name, values in run.prompts(best).items()})
    batch = collate(materials.validation)
    stock = transformers.AutoModelForCausalLM.from_pretrained(RESOURCES / "model")
    stock = peft.PeftModel.from_pretrained(stock, runs / "n0" / "prompt").eval()
    with torch.no_grad():
        logits = model.head(model.hidden(batch, prompt))
        peft_logits = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[
            :, -logits.shape[1] :
        ]
    text = batch.attention_mask.bool()
    assert (logits - peft_logits)[text].abs().max() < 1e-5
    assert torch.equal(logits[text].argmax(-1), peft_logits[text].argmax(-1))


def test_auxiliary_is_reused_by_the_same_recipe_only(runs):
    again = short_run(0, runs, "again", "federation.rounds=1")
    assert "taken from" in again.stdout and "distilled in" not in again.stdout
    # The schedule of one round is not that of two, so only the auxiliary model can be compared.
    weights = [
        (runs / name / "auxiliary" / "model.safetensors").read_bytes() for name in ("n0", "again")
    ]
    assert weights[0] == weights[1]
    story = json.loads((runs / "again" / "auxiliary" / "distillation.json").read_text())
    assert story["distillation"]["reused_from"].startswith(str(runs))
    other = short_run(0, runs, "other", "federation.rounds=1", "distillation.stage.steps=3")
    assert "distilled in 3 steps" in other.stdout


def test_client_without_finite_loss_is_dropped_and_named(tmp_path):
    program = [PROGRAMS / "faulty.py", "nan:1:1"]
    short_run(0, tmp_path, "drop", "evaluation.server_only=false", program=program)
    run = read(tmp_path / "drop")
    assert run.rounds["num_failed"].tolist() == [1, 0] and run.rounds["num_clients"].tolist() == [
        3,
        3,
    ]
    failed = next(row for row in run.clients if row["round"] == 1 and row["client"] == 1)
    assert failed["status"] in ("failed", b"failed") and "nan" in str(failed["reason"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "setting"), [(2, "federation.on_failure=stop"), (0, "federation.min_clients=3")]
)
def test_client_without_finite_loss_stops_the_run_if_so_configured(tmp_path, n, setting):
    program = [PROGRAMS / "faulty.py", "nan:1:1"]
    result = short_run(n, tmp_path, "stop", setting, program=program, status=None)
    assert result.returncode not in (0, 2), both_ends(result)
    assert "client 1" in result.stderr and "round 1" in result.stderr
    assert read(tmp_path / "stop").status == "failed"


@pytest.mark.parametrize(
    ("n", "phase", "rank", "round"),
    [
        (2, "checks", 0, None),
        pytest.param(3, "client set-up", 2, None, marks=pytest.mark.slow),
        pytest.param(2, "evaluation", 0, None, marks=pytest.mark.slow),
    ],
)
def test_an_exception_anywhere_ends_the_job_with_one_report(tmp_path, n, phase, rank, round):
    where = f"raise:{phase}:{rank}" + (f":{round}" if round else "")
    result = short_run(n, tmp_path, "crash", program=[PROGRAMS / "faulty.py", where], status=None)
    assert result.returncode not in (0, 2), both_ends(result)
    assert result.stderr.count("Traceback") == 1, both_ends(result)
    assert "the fault that was put in" in result.stderr
    assert f"rank {rank} " in result.stderr and repr(phase) in result.stderr
    assert round is None or f"round {round}" in result.stderr
